#!/usr/bin/env python
"""Evaluates a trained detector after each of its stages.

    python tools/analysis/stage_metrics.py --output stages.json \\
        --config-file CONFIG MODEL.WEIGHTS model.pth

Takes the arguments of `train_net.py`. Writes a JSON list with the metrics of each stage; with
--last-only the list has one entry, that of the whole detector.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from asag.checkpoint.loading import load_weights
from asag.cli import load_command
from asag.data.catalog import check_registered
from asag.engine.defaults import (
    choose_device,
    configure,
    register_data,
    use_data,
)
from asag.engine.trainer import Trainer

from detectron2.config import CfgNode
from detectron2.evaluation.testing import flatten_results_dict


def stage_metrics(arguments: Sequence[str], last_only: bool = False) -> list[dict[str, float]]:
    """Evaluates the first 1, 2, ... stages.

    Args:
        arguments: of `train_net.py`; MODEL.WEIGHTS among them.
        last_only: evaluate the whole detector only.

    Returns:
        Box metrics in percent.

    Raises:
        ValueError: no weights or no data set to evaluate on.
    """
    args = load_command("train_net.py").build_parser().parse_args(arguments)
    cfg, _ = configure(args)
    choose_device(cfg, args.num_gpus)
    registered = register_data(args, cfg)
    if registered is not None:
        use_data(cfg, registered)
    if not os.path.isfile(cfg.MODEL.WEIGHTS):
        raise ValueError(f"MODEL.WEIGHTS = {cfg.MODEL.WEIGHTS!r}: name the trained weights")
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty; name a data set, or pass --data DIR")
    check_registered(cfg, need_train=False)
    cfg.TEST.NUM_PICTURES = 0
    cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "stages")  # keep the results of the run
    stages = cfg.MODEL.DECODER.NUM_STAGES
    return [evaluate(cfg, count) for count in range(stages if last_only else 1, stages + 1)]


def evaluate(cfg: CfgNode, num_stages: int) -> dict[str, float]:
    """Returns the finite box metrics of MODEL.WEIGHTS with the first `num_stages` stages."""
    cfg.MODEL.DECODER.NUM_STAGES = num_stages
    model = Trainer.build_model(cfg)
    load_weights(model, cfg.MODEL.WEIGHTS, use_average=cfg.TEST.EMA_WEIGHTS)
    results = flatten_results_dict(Trainer.test(cfg, model))
    return {
        name.removeprefix("bbox/"): float(value)
        for name, value in results.items()
        if name.startswith("bbox/") and math.isfinite(value)
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--last-only", action="store_true", help="only the whole detector")
    own, rest = parser.parse_known_args(arguments)
    try:
        found = stage_metrics(rest, own.last_only)
    except (ValueError, KeyError, OSError) as error:
        print(f"stage_metrics: {error.args[0] if error.args else error}", file=sys.stderr)
        return 2
    own.output.parent.mkdir(parents=True, exist_ok=True)
    own.output.write_text(json.dumps(found, indent=1))
    for number, metrics in enumerate(found, start=1):
        print(f"stage {number}: " + ", ".join(f"{k} {v:.2f}" for k, v in metrics.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
