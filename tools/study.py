#!/usr/bin/env python
"""Trains variants of a detector at equal budget with several seeds and tabulates the results.

A study is a yaml file:

    config: configs/SparseRCNN/sparse_rcnn_tiny.yaml   # what all variants start from
    seeds: [1, 2, 3]
    options: {SOLVER.EPOCHS: 4}                         # for every run
    variants:                                           # overrides of one variant
      plain: {}
      IoU-ESA: {MODEL.META_ARCHITECTURE: SparseDetector, MODEL.DECODER.SELF_ATTENTION: iou_esa}
      ASAG: {config: configs/ASAG/asag_tiny.yaml}       # starts from another configuration
    data:                                               # overrides or a COCO folder
      crowd: {options: {DATASETS.TRAIN: "('shapes_crowd_train',)", ...}}
      cells: {folder: path/to/bccd, options: {SOLVER.EPOCHS: 10}}
    per_stage: true                                     # also the AP of each stage's predictions

Runs are independent processes, --jobs at a time, each with one thread. A finished run is not
repeated, an interrupted one is resumed, and a failed one does not stop the others. OUTPUT gets a
folder for each run, `results.json` and `table.md`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = {"config", "seeds", "variants", "data"}
STUDY_KEYS = REQUIRED | {"options", "per_stage", "metrics"}
DEFAULT_METRICS = ("AP", "AP50", "AP75", "mMR", "Recall")


@dataclass(frozen=True)
class Run:
    """One run: a variant on a data set with a seed."""

    data: str
    variant: str
    seed: int
    folder: Path
    command: tuple[str, ...]

    @property
    def result_file(self) -> Path:
        return self.folder / "result.json"


def read_study(path: Path) -> dict[str, Any]:
    """Reads the file of a study.

    Raises:
        ValueError: a key is missing, unknown or empty, or the configuration does not exist.
    """
    study = yaml.safe_load(path.read_text())
    if not isinstance(study, dict):
        raise ValueError(f"{path}: expected keys and values, among them {sorted(REQUIRED)}")
    if unknown := study.keys() - STUDY_KEYS:
        raise ValueError(f"{path}: unknown keys {sorted(unknown)}; known are {sorted(STUDY_KEYS)}")
    if missing := [key for key in sorted(REQUIRED) if not study.get(key)]:
        raise ValueError(f"{path}: missing or empty keys {missing}")
    for key in ("variants", "data"):  # a variant without overrides is empty in yaml
        study[key] = {name: value or {} for name, value in study[key].items()}
    for options in (study, *study["variants"].values()):
        config = options.setdefault("config", study["config"])
        if not (ROOT / config).is_file():
            raise ValueError(f"{path}: config {config} does not exist below {ROOT}")
    return study


def plan_runs(study: dict[str, Any], output: Path) -> list[Run]:
    """Lists all runs, seeds outermost, so that an unfinished study compares every variant."""
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
        command = ["--config-file", str(ROOT / merged.pop("config"))]
        if "folder" in where:
            command += ["--data", str((ROOT / where["folder"]).resolve())]
        command += [str(x) for pair in merged.items() for x in pair]
        runs.append(Run(data, variant, seed, folder, tuple(command)))
    return runs


def last_metrics(folder: Path) -> dict[str, float]:
    """Reads the final evaluation from `metrics.json`; empty if the run ended before it."""
    lines = (folder / "metrics.json").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    end = max((record["iteration"] for record in records), default=0)
    found: dict[str, float] = {}
    for record in records:
        if record["iteration"] == end:
            found.update({k: v for k, v in record.items() if k.startswith("bbox/")})
    return {k.removeprefix("bbox/"): v for k, v in found.items()}


def run_script(script: str, arguments: list[str], log: Path) -> None:
    """Runs a script of this checkout with one thread.

    Raises:
        RuntimeError: it failed; the message has the end of its log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / script), *arguments]
    with log.open("a") as stream:
        status = subprocess.run(command, stdout=stream, stderr=stream, env=environment, cwd=ROOT)
    if status.returncode:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command)} failed; the end of {log}:\n{tail}")


def execute(run: Run, per_stage: bool) -> None:
    """Trains and evaluates a run unless its result exists.

    Args:
        run: the run.
        per_stage: evaluate the detector after each of its stages as well.
    """
    if run.result_file.is_file():
        return
    run_script("train_net.py", ["--resume", *run.command], run.folder / "study.log")
    result: dict[str, Any] = {"metrics": last_metrics(run.folder)}
    if per_stage:
        result["per_stage"] = evaluate(run)
    if not result["metrics"]:  # ended between the last step and its evaluation
        result["metrics"] = (result.get("per_stage") or evaluate(run, "--last-only"))[-1]
    partial = run.result_file.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1))
    partial.replace(run.result_file)
    print(f"{run.data} {run.variant} seed {run.seed}: {result['metrics']}", flush=True)


def evaluate(run: Run, *options: str) -> list[dict[str, float]]:
    """Evaluates the trained detector by stage, see `tools/analysis/stage_metrics.py`."""
    output = run.folder / "stages.json"
    weights = ["MODEL.WEIGHTS", str(run.folder / "model_final.pth")]
    arguments = ["--output", str(output), *options, *run.command, *weights]
    run_script("tools/analysis/stage_metrics.py", arguments, run.folder / "study.log")
    return json.loads(output.read_text())


def execute_all(runs: list[Run], per_stage: bool, jobs: int) -> list[str]:
    """Executes runs, `jobs` at a time; returns the issues of those that failed."""
    failures = []
    with ThreadPoolExecutor(jobs) as pool:
        pending = [(run, pool.submit(execute, run, per_stage)) for run in runs]
        for run, future in pending:
            try:
                future.result()
            except (RuntimeError, OSError, ValueError) as error:
                failures.append(f"{run.data} {run.variant} seed {run.seed}: {error}")
                print(failures[-1], file=sys.stderr, flush=True)
    return failures


def summarize(values: list[float]) -> str:
    """Formats mean and sample standard deviation."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def tabulate(runs: list[Run], metrics: list[str]) -> tuple[dict[str, Any], str]:
    """Collects results by data set and variant, with a markdown table of mean ± std over seeds."""
    results: dict[str, Any] = {}
    for run in runs:
        if run.result_file.is_file():
            entry = results.setdefault(run.data, {}).setdefault(run.variant, {})
            entry[run.seed] = json.loads(run.result_file.read_text())
    lines = []
    for data, variants in results.items():
        found = [x["metrics"] for seeds in variants.values() for x in seeds.values()]
        shown = [name for name in metrics if all(name in x for x in found)]
        lines += [f"| {data} | seeds | {' | '.join(shown)} |", "|---" * (len(shown) + 2) + "|"]
        for variant, seeds in variants.items():
            cells = [summarize([x["metrics"][m] for x in seeds.values()]) for m in shown]
            lines.append(f"| {variant} | {len(seeds)} | {' | '.join(cells)} |")
        lines += ["", *_stage_table(data, variants)]
    return results, "\n".join(lines)


def _stage_table(data: str, variants: dict[str, Any]) -> list[str]:
    staged = {
        variant: [x["per_stage"] for x in seeds.values()]
        for variant, seeds in variants.items()
        if all("per_stage" in x for x in seeds.values())
    }
    if not staged:
        return []
    depth = max(len(stages) for runs in staged.values() for stages in runs)
    header = " | ".join(f"stage {s + 1}" for s in range(depth))
    lines = [f"| {data}, AP by stage | {header} |", "|---" * (depth + 1) + "|"]
    for variant, runs in staged.items():
        cells = [summarize([x["AP"] for x in stage]) for stage in zip(*runs, strict=True)]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return [*lines, ""]


def choose_runs(runs: list[Run], chosen: dict[str, list[Any] | None]) -> list[Run]:
    """Selects the runs whose fields have one of the given values.

    Raises:
        ValueError: no run has such a value.
    """
    for field, values in chosen.items():
        known = {getattr(run, field) for run in runs}
        if unknown := set(values or ()) - known:
            raise ValueError(f"the study has no {field} {sorted(unknown)}; it has {sorted(known)}")
    return [
        run
        for run in runs
        if all(not values or getattr(run, field) in values for field, values in chosen.items())
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 1 if a run failed, 2 if the study is wrong."""
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
    options = parser.parse_args(arguments)
    chosen = {"data": options.data, "variant": options.variants, "seed": options.seeds}
    try:
        study = read_study(options.study)
        runs = choose_runs(plan_runs(study, options.output.resolve()), chosen)
    except (OSError, ValueError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    failures = []
    if not options.table_only:
        failures = execute_all(runs, bool(study.get("per_stage")), options.jobs)
    results, table = tabulate(runs, list(study.get("metrics", DEFAULT_METRICS)))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(results, indent=1))
    (options.output / "table.md").write_text(table)
    print(table)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
