#!/usr/bin/env python3
"""Writes MODEL_ZOO.md and asag/model_zoo/figures.json.

    python tools/make_model_zoo.py                    # after adding or changing a configuration
    python tools/make_model_zoo.py --recount          # after changing a model: count all again
    python tools/make_model_zoo.py --golden DIR       # and measure the numerical agreement again
    python tools/make_model_zoo.py --check            # exit code 1 if anything is stale

Parameters and multiply-adds come from `tools/analyze.py`, agreement from the comparisons of
`tools/verify.py`, claims from `asag/model_zoo/published.json`, results of packaged weights from
their own records. No figure in the two outputs is written by hand.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from asag import load_config, model_zoo
from asag.files import atomic_writer
from asag.model_zoo.entries import FOLDER, Entry, read

import analyze
import torch
from analysis.free_convolutions import free_convolutions
from checkout import ROOT, import_from_tests
from detectron2.config import CfgNode
from zoo.model_zoo_page import render

verify = import_from_tests("conformance.runner")

FIGURES = FOLDER / "figures.json"
PAGE = ROOT / "MODEL_ZOO.md"
FULL_SIZE = (800, 1216)  # where recipes test at a short side of 800 pixels

Figures = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recount", action="store_true", help="count unchanged models as well")
    parser.add_argument("--golden", type=Path, metavar="DIR", help="reference tensors to compare")
    parser.add_argument("--check", action="store_true", help="write nothing, list what is stale")
    options = parser.parse_args(arguments)
    old = read(FIGURES.name)
    if options.check:
        issues = stale(old)
        print("\n".join(issues) or "the model zoo is up to date")
        return 1 if issues else 0
    agreement = measure_agreement(options.golden) if options.golden else old.get("agreement", {})
    known = {} if options.recount else old.get("models", {})
    new: Figures = {"agreement": agreement, "models": dict(known)}
    for new["models"] in count_all(known, print):  # an interrupted job continues where it stopped
        with atomic_writer(FIGURES) as file:
            file.write(json.dumps(new, indent=1, sort_keys=True) + "\n")
    with atomic_writer(PAGE) as file:
        file.write(page(new))
    return 0


def stale(figures: Figures) -> list[str]:
    """Lists figures that do not fit the current configurations; nothing is built or counted."""
    models = figures.get("models", {})
    entries = counted_entries()
    issues = [f"{name}: not counted yet" for name in entries if name not in models]
    issues += [f"{name}: there is no such model any more" for name in models.keys() - entries]
    for name in sorted(models.keys() & entries):
        facts = recipe_facts(entries[name])
        issues += [
            f"{name}: {key} is {models[name].get(key)} in {FIGURES.name}, now {value}"
            for key, value in facts.items()
            if models[name].get(key) != value
        ]
    if not issues and (not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page(figures)):
        issues.append(f"{PAGE.name} is not what its data give")
    return issues and [*issues, "run python tools/make_model_zoo.py"]


def page(figures: Figures) -> str:
    """Returns the text of MODEL_ZOO.md."""
    entries = [model_zoo.entry(name) for name in model_zoo.names()]
    return render(entries, figures, read("published.json")["sources"])


def counted_entries() -> dict[str, Entry]:
    """Entries with figures of their own: recipes, and the packaged weights. Published
    weights have those of their recipe."""
    entries = {name: model_zoo.entry(name) for name in model_zoo.names()}
    return {name: x for name, x in entries.items() if x.recipe or x.weights}


def count_all(
    known: Mapping[str, Figures], say: Callable[[str], None]
) -> Iterator[dict[str, Figures]]:
    """Counts all models; figures whose model has not changed since `known` are kept.

    Args:
        known: earlier figures by name.
        say: called with a message before each count.

    Yields:
        The figures by name so far, after each count; complete at the end.
    """
    counted = {
        (x["model_fingerprint"], x["input"]): {k: x[k] for k in COUNTED}
        for x in known.values()
        if x.keys() >= {*COUNTED, "model_fingerprint", "input"}
    }
    facts = {name: recipe_facts(entry) for name, entry in counted_entries().items()}

    def complete() -> dict[str, Figures]:
        keys = {name: (x["model_fingerprint"], x["input"]) for name, x in facts.items()}
        return {n: {**facts[n], **counted[k]} for n, k in keys.items() if k in counted}

    for name, x in facts.items():
        key = x["model_fingerprint"], x["input"]
        if key not in counted:
            say(f"counting {name}")
            counted[key] = count(model_zoo.entry(name))
            yield complete()
    yield complete()


def recipe_facts(entry: Entry) -> Figures:
    """Returns facts of a configuration, and fingerprints that change when it does.

    Fingerprints cover the yaml files and options, not the library's defaults, so that a new key
    with its default makes nothing stale.
    """
    cfg = load_config(str(entry.config), entry.options)
    said = CfgNode.load_yaml_with_base(str(entry.config))
    model = {k: v for k, v in said.get("MODEL", {}).items() if k not in ("WEIGHTS", "DEVICE")}
    return {
        "fingerprint": fingerprint([said, entry.options]),
        "model_fingerprint": fingerprint([model, entry.options]),
        "epochs": cfg.SOLVER.EPOCHS or cfg.SOLVER.BY_DATA.EPOCHS,
        "queries": queries(cfg),
        "input": "x".join(map(str, input_size(cfg))),
    }


def fingerprint(content: Any) -> str:
    """Returns the first digits of a hash of plain values."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def queries(cfg: CfgNode) -> int | list[int]:
    """Returns the number of queries, or its minimum and maximum where it depends on the image."""
    if cfg.MODEL.PROPOSAL_GENERATOR.NAME == "AdaptiveSparseAnchors":
        return [cfg.MODEL.ASAG.MIN_ANCHORS, cfg.MODEL.ASAG.MAX_ANCHORS]
    return cfg.MODEL.PROPOSAL_GENERATOR.NUM_QUERIES


def input_size(cfg: CfgNode) -> tuple[int, int]:
    """Returns height and width in pixels at which the multiply-adds are counted."""
    if cfg.INPUT.MIN_SIZE_TEST == 800:
        return FULL_SIZE
    return cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST


COUNTED = ("parameters", "deployed_parameters", "gmacs", "gflops")


def count(entry: Entry, exact: bool = False) -> Figures:
    """Builds the model and counts parameters and operations.

    Args:
        entry: of the zoo.
        exact: compute the convolutions as well, which takes many times as long.

    Returns:
        `COUNTED`: `parameters` in training, `deployed_parameters` without the auxiliary copies of
        the decoder, 1e9 multiply-adds and floating point operations of one image.
    """
    always = [*entry.options, "MODEL.DEVICE", "cpu", "MODEL.COMPILE", "False"]
    cfg = load_config(str(entry.config), always)
    args = argparse.Namespace(annotations=None, images=0, input=input_size(cfg))
    with nullcontext() if exact else free_convolutions():
        found = analyze.report(str(entry.config), cfg, args)
    deployed = found["parameters"]
    if cfg.MODEL.DECODER.NUM_AUXILIARY:
        cfg = load_config(str(entry.config), [*always, "MODEL.DECODER.NUM_AUXILIARY", "0"])
        deployed, _ = analyze.count_parameters(analyze.build_model(cfg))
    return {
        "parameters": found["parameters"],
        "deployed_parameters": deployed,
        "gmacs": round(found["gmacs"], 4),
        "gflops": round(found["gflops"], 4),
    }


def measure_agreement(folder: Path) -> dict[str, Figures]:
    """Compares every reference case with this library's modules.

    Args:
        folder: of suites, as `tools/verify.py` takes it.

    Returns:
        "suite/case" -> number of comparisons and of failures, and the largest error of `values`
        and of `gradients` with the tensor that has it.

    Raises:
        ValueError: no case was found.
    """
    torch.manual_seed(0)
    suites, root = verify.load_suites(), folder.resolve()
    result = {}
    for path in sorted(p for p in root.rglob("*") if p.suffix in verify.DATA_SUFFIXES):
        suite = verify.suite_of(path, root, suites)
        if suite is None:
            continue
        with suppress(verify.MissingCheckpoint):
            found = summary(suites[suite](path))
            if found["comparisons"]:  # other files may stand beside the cases
                result[f"{suite}/{path.stem}"] = found
    if not result:
        raise ValueError(f"{folder}: no reference cases found")
    return result


def summary(checks: Iterator[tuple[Any, ...]]) -> Figures:
    """Summarizes the comparisons of one case."""
    found: Figures = {"comparisons": 0, "failed": 0, "values": None, "gradients": None}
    for check in (verify.Check(*item) for item in checks):
        error, good = verify.compare(check)
        found["comparisons"] += 1
        found["failed"] += not good
        kind = "gradients" if "grad" in check.name else "values"
        if found[kind] is None or error > found[kind]["max_abs_error"]:
            found[kind] = {
                "tensor": check.name,
                "max_abs_error": error,
                "atol": check.atol,
                "rtol": check.rtol,
            }
    return found


if __name__ == "__main__":
    sys.exit(main())
