"""Reading a configuration: a yaml file, then overrides; only known keys pass. And comparing two."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode as CN

from . import get_asag_cfg

# A checkout has configs/ beside the package, an installed package holds a copy.
_PACKAGE = Path(__file__).resolve().parents[1]
CONFIG_FOLDERS = (_PACKAGE.parent / "configs", _PACKAGE / "model_configs")

Changes = dict[str, tuple[Any, Any]]
"""Key -> (value before, value now)."""


def find_config(name: str) -> Path:
    """A configuration file by path, or by its name below the library's configs.

    Raises:
        ValueError: there is no such file.
    """
    for path in (Path(name), *(folder / name for folder in CONFIG_FOLDERS)):
        if path.is_file():
            return path
    raise ValueError(
        f"--config-file {name}: no such file, neither from here nor below {CONFIG_FOLDERS[0]}"
    )


def load_config(config_file: str, options: Sequence[str] = ()) -> CN:
    """Configuration of a yaml file (its `_BASE_` included) and KEY VALUE overrides.

    Whole numbers are taken for keys that hold floats.

    Raises:
        KeyError: an unknown key; the message names it and the nearest known ones.
        ValueError: a value of the wrong type, or an odd number of override words.
    """
    cfg = get_asag_cfg()
    if len(options) % 2:
        raise ValueError(f"overrides come in pairs KEY VALUE, got {list(options)}")
    _merge(cfg, _read_yaml(config_file), config_file)
    given = CN({})
    for key, value in zip(options[::2], options[1::2], strict=True):
        node = given
        *parents, leaf = key.split(".")
        for name in parents:
            node = node.setdefault(name, CN({}))
            if not isinstance(node, CN):
                raise KeyError(f"unknown configuration key {key} in the command line")
        node[leaf] = CN._decode_cfg_value(value)
    _merge(cfg, given, "the command line")
    return cfg


def differences(before: CN, now: CN) -> Changes:
    """Keys whose values are not the same, in alphabetical order; a key of one side only counts as
    None on the other."""
    old, new = dict(leaves(before)), dict(leaves(now))
    return {
        key: (old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if _plain(old.get(key)) != _plain(new.get(key))
    }


def leaves(node: CN, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in a configuration."""
    for name, value in node.items():
        if isinstance(value, CN):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _plain(value: Any) -> Any:
    """Lists and tuples alike: YAML does not tell them apart."""
    return [_plain(x) for x in value] if isinstance(value, list | tuple) else value


def _read_yaml(path: str) -> CN:
    """A file with its `_BASE_`; ValueError with the file's name for all that can be wrong with it,
    for which there is no common class of errors."""
    try:
        content = CN.load_yaml_with_base(path)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not keys and values")
        return CN(content)
    except Exception as error:
        raise ValueError(
            f"cannot read the configuration {path}: {error}. Fix the file: it is YAML, a line "
            "KEY: VALUE each, and _BASE_ names another one"
        ) from error


def _merge(cfg: CN, given: CN, source: str) -> None:
    _fit(cfg, given, source)
    try:
        cfg.merge_from_other_cfg(given)
    except ValueError as error:  # names key, types and values
        raise ValueError(f"{source}: {error}. Give a value of the first type") from error


def _fit(cfg: CN, given: CN, source: str) -> None:
    """Refuses unknown keys and turns whole numbers into floats where the default is a float."""
    known = dict(leaves(cfg))
    for key, value in list(leaves(given)):
        if key not in known:
            close = difflib.get_close_matches(key, known, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise KeyError(f"unknown configuration key {key} in {source}{hint}")
        if isinstance(known[key], float) and type(value) is int:
            *parents, leaf = key.split(".")
            node = given
            for name in parents:
                node = node[name]
            node[leaf] = float(value)
