#!/usr/bin/env python
"""Writes an HTML report of a run: results, curves, best and worst images, data, configuration.

    python tools/report.py output/run
    python tools/report.py output/run --weights output/run/model_0004999.pth --output report.html

Training writes the page at its end (TEST.REPORT); this tool writes it again, also for a run that
was interrupted. A run that has not been evaluated is evaluated first.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from asag.checkpoint.loading import load_weights
from asag.data import register_dataset
from asag.data.errors import DatasetError
from asag.engine.trainer import Trainer
from asag.model_zoo.loading import RUN_WEIGHTS, choose_device
from asag.report import REPORT_FILE, Run, RunFolderError, write_report

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.evaluation.testing import flatten_results_dict
from torch import nn


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="OUTPUT_DIR of a run")
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="evaluate these instead of taking the run's last evaluation",
    )
    parser.add_argument(
        "--data", type=Path, metavar="PATH", help="the data, if it is not where it was"
    )
    parser.add_argument(
        "--val-fraction", type=float, metavar="SHARE", help="of --data, as in the training"
    )
    parser.add_argument(
        "--max-images",
        type=int,
        default=4,
        metavar="N",
        help="best and worst images, at most N each (default 4)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"default RUN_DIR/{REPORT_FILE}"
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    return parser


def make_report(args: argparse.Namespace) -> Path:
    """Writes the report.

    Raises:
        RunFolderError: the folder is not that of a run, or a part of it is missing.
        ValueError: weights, detections and data do not match.
        OSError: a file cannot be read or written.
    """
    if args.max_images < 0:
        raise ValueError(f"--max-images is {args.max_images}; it must be at least 0")
    run = Run.read(args.run)
    _register(run, args.data, args.val_fraction)
    cfg = run.cfg.clone()  # the page shows those of the run
    cfg.MODEL.DEVICE = choose_device(args.device)
    cfg.MODEL.COMPILE = False
    cfg.TEST.NUM_PICTURES = 0
    output = args.output or args.run / REPORT_FILE
    readable = [name for name in cfg.DATASETS.TEST if name in DatasetCatalog.list()]
    unevaluated = [name for name in readable if run.detections_file(name) is None]
    model = _model(run, cfg, args.weights, needed_for=unevaluated)
    if not args.weights and not unevaluated:
        return write_report(run, output, model=model, num_images=args.max_images)
    if len(readable) < len(cfg.DATASETS.TEST) or not readable:
        lacking = sorted(set(cfg.DATASETS.TEST) - set(readable))
        raise ValueError(
            f"nothing can be evaluated: DATASETS.TEST has {', '.join(lacking) or 'no data set'}"
            f"{', which is not known here; pass its folder with --data DIR' if lacking else ''}"
        )
    with contextlib.ExitStack() as stack:
        folder = args.run
        if args.weights:  # keep the detections of the run
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="report_")))
        cfg.OUTPUT_DIR = str(folder)
        results = flatten_results_dict(Trainer.test(cfg, model))
        return write_report(
            run,
            output,
            model=model,
            num_images=args.max_images,
            detections_folder=folder / "inference",
            metrics={k: float(v) for k, v in results.items() if math.isfinite(v)},
            weights=str(args.weights or weights_file(run.folder)),
        )


def _register(run: Run, data: Path | None, val_fraction: float | None) -> None:
    """Registers the data sets of the run: those of --data, else those recorded in run.json."""
    if data is not None:
        train, test = run.cfg.DATASETS.TRAIN, run.cfg.DATASETS.TEST
        name = train[0].removesuffix("_train") if train else data.name
        same = bool(test) and tuple(train) == tuple(test)
        register_dataset(
            data,
            name=name,
            output_dir=run.folder,
            evaluate_on_train=same,
            val_fraction=val_fraction,
        )
    elif run.record is not None:
        try:
            run.record.register_datasets()
        except DatasetError as error:
            print(f"warning: {error}", file=sys.stderr)


def _model(
    run: Run, cfg: CfgNode, weights: Path | None, *, needed_for: Sequence[str]
) -> nn.Module | None:
    """Builds the model of the run on MODEL.DEVICE; None if there are no weights and no need."""
    file = weights or weights_file(run.folder)
    if file is None:
        if needed_for:
            raise RunFolderError(
                f"{run.folder} has no detections on {', '.join(needed_for)} and no weights to "
                f"detect with ({', '.join(RUN_WEIGHTS)}, or a checkpoint); pass --weights FILE"
            )
        return None
    if not file.is_file():
        raise FileNotFoundError(f"--weights {file}: no such file")
    model = Trainer.build_model(cfg)
    load_weights(model, str(file), use_average=cfg.TEST.EMA_WEIGHTS)
    return model.eval()


def weights_file(folder: Path) -> Path | None:
    """Returns the latest checkpoint of a run.

    The file `last_checkpoint` names it; without that file it is the final weights, else those of
    the most iterations, else the best.
    """
    mark = folder / "last_checkpoint"
    marked = [folder / mark.read_text(encoding="utf-8").strip()] if mark.is_file() else []
    checkpoints = sorted(folder.glob("model_[0-9]*.pth"))[-1:]
    known = [folder / name for name in RUN_WEIGHTS]
    found = (*marked, folder / "model_final.pth", *checkpoints, *known)
    return next((x for x in found if x.is_file()), None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = build_parser().parse_args(arguments)
    try:
        print(f"report: {make_report(args)}")
    except (ValueError, KeyError, OSError) as error:
        print(f"report: {error.args[0] if len(error.args) == 1 else error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
