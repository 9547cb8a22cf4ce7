#!/usr/bin/env python
"""Trains variants of a detector at equal budget with several seeds, and tabulates what they reach.

A study is a yaml file:

    config: configs/SparseRCNN/sparse_rcnn_tiny.yaml   # what all variants start from
    seeds: [1, 2, 3]
    options: {SOLVER.EPOCHS: 4}                         # for every run
    variants:                                           # overrides of one variant
      plain: {}
      IoU-ESA: {MODEL.META_ARCHITECTURE: SparseDetector, MODEL.DECODER.SELF_ATTENTION: iou_esa}
    data:                                               # overrides or a COCO folder
      crowd: {options: {DATASETS.TRAIN: "('shapes_crowd_train',)", ...}}
      cells: {folder: path/to/bccd, options: {SOLVER.EPOCHS: 10}}
    per_stage: true                                     # also the AP of each stage's predictions

Runs are independent processes, a few at a time, each with one thread. A finished run is not
repeated, an interrupted one is resumed. OUTPUT holds one folder a run, `results.json` and `table.md`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
STUDY_KEYS = {"config", "seeds", "options", "variants", "data", "per_stage", "metrics"}


@dataclass(frozen=True)
class Run:
    """One training: a variant on a data set with a seed."""

    data: str
    variant: str
    seed: int
    folder: Path
    command: tuple[str, ...]

    @property
    def result_file(self) -> Path:
        return self.folder / "result.json"


def read_study(path: Path) -> dict[str, Any]:
    """Reads a study; raises ValueError naming a key that is missing or unknown."""
    study = yaml.safe_load(path.read_text())
    if unknown := study.keys() - STUDY_KEYS:
        raise ValueError(f"{path}: unknown keys {sorted(unknown)}; known are {sorted(STUDY_KEYS)}")
    if missing := {"config", "seeds", "variants", "data"} - study.keys():
        raise ValueError(f"{path}: missing keys {sorted(missing)}")
    return study


def plan_runs(study: dict[str, Any], output: Path) -> list[Run]:
    """All runs, seeds outermost, so that an early stop still compares every variant."""
    runs = []
    for seed, (data, where), (variant, options) in itertools.product(
        study["seeds"], study["data"].items(), study["variants"].items()
    ):
        folder = output / data / variant.replace(" ", "_") / f"seed{seed}"
        merged = {
            **study.get("options", {}),
            **where.get("options", {}),
            **options,
            "SEED": seed,
            "OUTPUT_DIR": str(folder),
        }
        command = ["--config-file", str(ROOT / study["config"])]
        if "folder" in where:
            command += ["--data", str((ROOT / where["folder"]).resolve())]
        command += [str(x) for pair in merged.items() for x in pair]
        runs.append(Run(data, variant, seed, folder, tuple(command)))
    return runs


def last_metrics(folder: Path) -> dict[str, float]:
    """The newest evaluation in a run's `metrics.json`."""
    found: dict[str, float] = {}
    for line in (folder / "metrics.json").read_text().splitlines():
        found.update({k: v for k, v in json.loads(line).items() if k.startswith("bbox/")})
    return {k.removeprefix("bbox/"): v for k, v in found.items()}


def train_net(arguments: list[str], log: Path) -> None:
    """Runs `train_net.py` with one thread; raises RuntimeError with the end of its log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("a") as stream:
        command = [sys.executable, str(ROOT / "train_net.py"), *arguments]
        status = subprocess.run(command, stdout=stream, stderr=stream, env=environment, cwd=ROOT)
    if status.returncode:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command)} failed; the end of {log}:\n{tail}")


def execute(run: Run, num_stages: int) -> None:
    """Trains and evaluates a run unless its result is there already.

    `num_stages` > 0 also evaluates the detector cut off after each stage.
    """
    if run.result_file.is_file():
        return
    train_net(["--resume", *run.command], run.folder / "study.log")
    result: dict[str, Any] = {"metrics": last_metrics(run.folder)}
    if num_stages:
        result["per_stage"] = [stage_metrics(run, s + 1) for s in range(num_stages)]
    partial = run.result_file.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1))
    partial.replace(run.result_file)
    print(f"{run.data} {run.variant} seed {run.seed}: {result['metrics']}", flush=True)


def stage_metrics(run: Run, stages: int) -> dict[str, float]:
    """Metrics of the trained detector with only its first `stages` stages."""
    folder = run.folder / f"first_{stages}_stages"
    options = list(run.command)
    options[options.index("OUTPUT_DIR") + 1] = str(folder)
    options += ["MODEL.DECODER.NUM_STAGES", str(stages)]
    options += ["MODEL.WEIGHTS", str(run.folder / "model_final.pth")]
    train_net(["--eval-only", *options], folder / "study.log")
    return last_metrics(folder)


def summarise(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.fmean(values):.1f} ± {spread:.1f}"


def tabulate(runs: list[Run], metrics: list[str]) -> tuple[dict[str, Any], str]:
    """Results by data set and variant, and a markdown table of mean ± spread over the seeds."""
    results: dict[str, Any] = {}
    for run in runs:
        if run.result_file.is_file():
            entry = results.setdefault(run.data, {}).setdefault(run.variant, {})
            entry[run.seed] = json.loads(run.result_file.read_text())
    lines = []
    for data, variants in results.items():
        shown = [
            m for m in metrics if all(_has(m, x) for v in variants.values() for x in v.values())
        ]
        lines += [f"| {data} | seeds | {' | '.join(shown)} |", "|---" * (len(shown) + 2) + "|"]
        for variant, seeds in variants.items():
            cells = [summarise([x["metrics"][m] for x in seeds.values()]) for m in shown]
            lines.append(f"| {variant} | {len(seeds)} | {' | '.join(cells)} |")
        lines += ["", *_stage_table(data, variants)]
    return results, "\n".join(lines)


def _has(metric: str, result: dict[str, Any]) -> bool:
    return metric in result["metrics"]


def _stage_table(data: str, variants: dict[str, Any]) -> list[str]:
    depth = max(len(x.get("per_stage", ())) for v in variants.values() for x in v.values())
    if not depth:
        return []
    header = " | ".join(f"stage {s + 1}" for s in range(depth))
    lines = [f"| {data}, AP by stage | {header} |", "|---" * (depth + 1) + "|"]
    for variant, seeds in variants.items():
        stages = zip(*(x["per_stage"] for x in seeds.values()), strict=True)
        cells = [summarise([x["AP"] for x in stage]) for stage in stages]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return [*lines, ""]


def stage_count(study: dict[str, Any]) -> int:
    """Stages to evaluate one by one, 0 if the study does not ask for it."""
    if not study.get("per_stage"):
        return 0
    from asag import load_config

    options = study.get("options", {})
    flat = [str(x) for pair in options.items() for x in pair]
    return load_config(str(ROOT / study["config"]), flat).MODEL.DECODER.NUM_STAGES


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--data", nargs="*", help="only these data sets of the study")
    parser.add_argument("--variants", nargs="*", help="only these variants")
    parser.add_argument("--seeds", nargs="*", type=int, help="only these seeds")
    parser.add_argument("--table-only", action="store_true", help="tabulate what is finished")
    options = parser.parse_args()
    study = read_study(options.study)
    runs = [
        run
        for run in plan_runs(study, options.output.resolve())
        if (not options.data or run.data in options.data)
        and (not options.variants or run.variant in options.variants)
        and (not options.seeds or run.seed in options.seeds)
    ]
    if not options.table_only:
        stages = stage_count(study)
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda run: execute(run, stages), runs))
    metrics = study.get("metrics", ["AP", "AP50", "AP75", "mMR", "Recall"])
    results, table = tabulate(runs, metrics)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(results, indent=1))
    (options.output / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
