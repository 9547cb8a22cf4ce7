"""Entries of the model zoo: configuration, claims of the paper, measured figures, weights.

A name is that of a recipe, or of weights. Those of the authors go by the name of their recipe;
weights that others trained or converted add to it whose they are: `_mmdet`, `_detrex`, `_hf`.

Figures and facts are read from the data files beside this module.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..checkpoint.layouts import LAYOUTS
from ..config import get_asag_cfg
from ..config.loading import CONFIG_FOLDERS, leaves

FOLDER = Path(__file__).resolve().parent
WEIGHTS = FOLDER / "weights"
# The model among these weights that knows photographs: where nothing else is said, it detects.
PHOTOGRAPHS = "dense_lite0_voc_animals"


@dataclass(frozen=True)
class Claim:
    """Result that a paper reports for a configuration; it was not measured here.

    Attributes:
        ap: box AP in percent.
        where: table of the paper, preceded by the paper where it is another than the model's.
        data: what the AP is of.
    """

    ap: float
    where: str
    data: str = "COCO val2017"


@dataclass(frozen=True)
class Release:
    """Weights that others published.

    Attributes:
        trained_by: whose training the AP is.
        ap: box AP in percent that they state for this file.
        layout: of its parameter names, a key of `checkpoint.layouts.LAYOUTS`.
        data: what the AP is of.
        address: from which it is downloaded; None where it lies behind a page that asks something.
        page: from which a person can download it.
        file: its name there.
        note: what that person has to know.
        options: KEY VALUE words with which the AP was taken, such as the copy of ASAG's decoder.
    """

    trained_by: str
    ap: float
    layout: str
    data: str = "COCO val2017"
    address: str | None = None
    page: str | None = None
    file: str | None = None
    note: str | None = None
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """One name of the zoo.

    Attributes:
        name: unique.
        config: the yaml file.
        options: KEY VALUE words on top of the file; only weights have any.
        paper: the paper that the model comes from; None for combinations of several.
        repository: the authors' code; None where none was released.
        claim: the paper's result for this configuration; None where it has none.
        figures: what `tools/make_model_zoo.py` measured: `epochs`, `queries`, `input`,
            `parameters`, `deployed_parameters`, `gmacs`, `gflops`, ...; empty if it did not run
            since the configuration was added.
        weights: file of weights that comes with the library; None if there is none.
        training: how these weights were trained and what they reached, as
            `tools/zoo/package_checkpoint.py` wrote it.
        release: weights that others published; None where none are known.
        recipe: whether the name is that of a configuration file.
    """

    name: str
    config: Path
    options: tuple[str, ...] = ()
    paper: str | None = None
    repository: str | None = None
    claim: Claim | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    weights: Path | None = None
    training: Mapping[str, Any] | None = None
    release: Release | None = None
    recipe: bool = True


def names() -> list[str]:
    """All names, sorted."""
    return sorted(_entries())


def entry(name: str) -> Entry:
    """Entry of the model zoo.

    Raises:
        KeyError: unknown; the message has the nearest names.
    """
    known = _entries()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "see asag.model_zoo.names()"
        raise KeyError(f"no model {name!r} in the zoo; {hint}")
    return known[name]


def read(file: str) -> dict[str, Any]:
    """One of the data files beside this module; empty if it is not there."""
    path = FOLDER / file
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def config_files() -> dict[str, Path]:
    """Name -> yaml file of every configuration that can be built (those named Base* cannot).

    Raises:
        RuntimeError: two files have the same name, or there is no folder of configurations.
    """
    folder = next((x for x in CONFIG_FOLDERS if x.is_dir()), None)
    if folder is None:
        raise RuntimeError(f"no configurations: neither {' nor '.join(map(str, CONFIG_FOLDERS))}")
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*/*.yaml")):
        if path.stem.startswith("Base"):
            continue
        if path.stem in files:
            raise RuntimeError(
                f"{path} and {files[path.stem]} have the same name, by which the model zoo knows "
                "them; rename one"
            )
        files[path.stem] = path
    return files


@cache
def _entries() -> dict[str, Entry]:
    published, figures = read("published.json"), read("figures.json").get("models", {})
    found: dict[str, Entry] = {}
    for name, path in config_files().items():
        source = published["sources"].get(path.parent.name, {})
        claim = published["claims"].get(name)
        found[name] = Entry(
            name=name,
            config=path,
            paper=source.get("paper"),
            repository=source.get("repository"),
            claim=Claim(**claim) if claim else None,
            figures=figures.get(name, {}),
        )
    for name, facts in published["releases"].items():
        base = found[facts.get("config", name)]
        release = _release(facts)
        if "config" not in facts:
            found[name] = replace(base, release=release)
            continue
        if name in found:
            raise RuntimeError(f"published.json: the release {name} has the name of a recipe")
        options = _settings(release.layout)
        found[name] = replace(
            base, name=name, options=options, claim=None, release=release, recipe=False
        )
    for record in sorted(WEIGHTS.glob("*.json")):
        training = json.loads(record.read_text(encoding="utf-8"))
        base, name = found[training["config"]], record.stem
        if name in found:
            raise RuntimeError(f"{record} has the name of the configuration {found[name].config}")
        found[name] = Entry(
            name=name,
            config=base.config,
            options=tuple(training["options"]),
            paper=base.paper,
            repository=base.repository,
            figures=figures.get(name, {}),
            weights=record.with_suffix(".pth"),
            training=training,
            recipe=False,
        )
    return found


def _release(facts: Mapping[str, Any]) -> Release:
    known = {key: value for key, value in facts.items() if key != "config"}
    return Release(**known | {"options": tuple(facts.get("options", ()))})


@cache
def _settings(layout: str) -> tuple[str, ...]:
    """KEY VALUE words for what weights of a layout need and the library does otherwise."""
    defaults = dict(leaves(get_asag_cfg()))
    wanted = LAYOUTS[layout].settings
    return tuple(x for k, v in wanted.items() if v != defaults[k] for x in (k, str(v)))
