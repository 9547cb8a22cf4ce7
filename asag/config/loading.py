"""Loading of configuration files and overrides, and comparison of configurations."""

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
    """Finds a configuration file by its path, or by its name below the library's configs.

    Raises:
        ValueError: no such file exists.
    """
    for path in (Path(name), *(folder / name for folder in CONFIG_FOLDERS)):
        if path.is_file():
            return path
    raise ValueError(
        f"--config-file {name}: no such file, neither as a path nor below {CONFIG_FOLDERS[0]}"
    )


def load_config(config_file: str, options: Sequence[str] = ()) -> CN:
    """Loads a YAML file (with its `_BASE_`) and applies KEY VALUE overrides.

    Integers are accepted for keys with float values.

    Raises:
        KeyError: a key is unknown. The message names it and similar keys.
        ValueError: a value has the wrong type, or the number of override words is odd.
    """
    cfg = get_asag_cfg()
    _merge(cfg, _read_yaml(config_file), config_file)
    merge_options(cfg, options)
    return cfg


def merge_options(cfg: CN, options: Sequence[str]) -> None:
    """Merges KEY VALUE overrides into a configuration, in place.

    Raises:
        KeyError: an unknown key; the message names it and the nearest known ones.
        ValueError: a value of the wrong type, or an odd number of override words.
    """
    if len(options) % 2:
        raise ValueError(f"overrides come in pairs KEY VALUE, got {list(options)}")
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


def differences(before: CN, now: CN) -> Changes:
    """Returns the keys with different values, in alphabetical order.

    A key that only one of the configurations has counts as None in the other.
    """
    old, new = dict(leaves(before)), dict(leaves(now))
    return {
        key: (old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if _plain(old.get(key)) != _plain(new.get(key))
    }


def leaves(node: CN, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted key and value of all entries of a configuration."""
    for name, value in node.items():
        if isinstance(value, CN):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _plain(value: Any) -> Any:
    """Turns tuples into lists: YAML does not distinguish them."""
    return [_plain(x) for x in value] if isinstance(value, list | tuple) else value


def _read_yaml(path: str) -> CN:
    """Reads a file with its `_BASE_`. Raises ValueError with the file's name on any error: the
    possible ones have no common base class."""
    try:
        content = CN.load_yaml_with_base(path)
        if not isinstance(content, dict):
            raise ValueError(f"it contains a {type(content).__name__}, not keys and values")
        return CN(content)
    except Exception as error:
        raise ValueError(
            f"cannot read the configuration {path}: {error}. Fix the file: it must be YAML with "
            "lines KEY: VALUE, and _BASE_ must name another such file"
        ) from error


def _merge(cfg: CN, given: CN, source: str) -> None:
    _fit(cfg, given, source)
    try:
        cfg.merge_from_other_cfg(given)
    except ValueError as error:  # names key, types and values
        raise ValueError(f"{source}: {error}. Give a value of the first type") from error


def _fit(cfg: CN, given: CN, source: str) -> None:
    """Raises KeyError on unknown keys, and turns integers into floats if the default is a float."""
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
