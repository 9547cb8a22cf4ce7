#!/usr/bin/env python3
"""Train and evaluate sparse detectors.

A run reads the configuration, registers the data, and starts one process a device; each of them
calls `train` or `evaluate`. `python train_net.py --help` lists the options.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asag.checkpoint.checkpointer import AtomicCheckpointer
from asag.checkpoint.loading import load_weights
from asag.config import check_config
from asag.data import SampleError
from asag.data.catalog import check_classes, check_registered, class_names
from asag.diagnostics.overfit import STEPS, run_check
from asag.engine import NonFiniteLossError, Trainer
from asag.engine.defaults import (
    DEFAULT_CONFIG,
    add_data_arguments,
    check_weights,
    choose_device,
    configure,
    default_setup,
    is_first_process,
    register_data,
    report_error,
    start_trainer,
    use_data,
)
from asag.engine.fine_tuning import SMALL_DATA
from asag.engine.forecast import estimate
from asag.engine.hooks import BEST_WEIGHTS, FINAL_WEIGHTS, box_ap
from asag.engine.launch import launch, resume_if_restarted, started_by_torchrun
from asag.engine.memory import NotEnoughMemoryError
from asag.engine.step import unwrap
from asag.inference.tta import check_test_augmentation
from asag.report.record import report_training, write_record
from asag.visualization.pictures import save_curves

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.utils import comm
from torch import nn

# Seconds that the other processes wait for the first one to report an error. If it does, the
# launcher ends them meanwhile, and the message is printed once.
GRACE = 15.0

EPILOG = f"""
--config-file takes a path or a file below configs/ (default {SMALL_DATA}
for data of your own, {DEFAULT_CONFIG} for generated images),
--num-gpus the processes of this machine: one a GPU, on the CPU where there is none; 0 is CPU.

Examples:
  train_net.py                                         a small detector on generated images
  train_net.py --data PATH                             your images: COCO, Pascal VOC or YOLO
  train_net.py --data PATH MODEL.TIMM.WEIGHTS ""       ... without ImageNet weights
  train_net.py --data PATH --model NAME                fine-tune a detector of the model zoo
  train_net.py --config-file FILE --num-gpus 8         a recipe, on eight GPUs
  train_net.py --data PATH --overfit-check             can it overfit four of them?
  train_net.py --data PATH MODEL.WEIGHTS model.pth     fine-tune a trained detector
  train_net.py --config-file FILE --resume             go on after an interruption
  train_net.py --config-file FILE --eval-only MODEL.WEIGHTS model.pth
  torchrun --nproc-per-node 8 train_net.py --config-file FILE
Any configuration key can follow as KEY VALUE, for example SOLVER.EPOCHS 12.
"""

logger = logging.getLogger("asag.train_net")


def build_parser() -> argparse.ArgumentParser:
    """Builds Detectron2's parser with the options for data of one's own and the overfit check."""
    parser = default_argument_parser(EPILOG)
    parser.set_defaults(config_file="", dist_url="auto")
    add_data_arguments(parser)
    check = parser.add_argument_group("overfit check")
    check.add_argument(
        "--overfit-check",
        action="store_true",
        help="overfit one batch of training images; exit code 0, or 1 and which part failed",
    )
    check.add_argument(
        "--overfit-steps", type=int, default=STEPS, metavar="N", help=f"at most (default {STEPS})"
    )
    return parser


def train(args: argparse.Namespace, cfg: CfgNode, recipe: CfgNode) -> None:
    """Trains with `Trainer`, then writes curves and report.

    Args:
        args: of the command line.
        cfg: with overrides, frozen.
        recipe: the configuration file as it stands, to report what was changed in it.
    """
    trainer = start_trainer(cfg, recipe, resume=args.resume)
    if comm.is_main_process():
        write_record(trainer.cfg, recipe, args.config_file or args.model)
    if (args.data or args.train_json) and trainer.start_iter < trainer.max_iter:
        logger.info(f"estimate before the start: {estimate(trainer)}")
    results = trainer.train()
    if trainer.iter < trainer.start_iter:
        return  # the resumed run was complete
    with trainer.evaluation_weights():
        if comm.is_main_process() and cfg.TEST.REPORT:
            report_training(trainer.cfg, unwrap(trainer.model), trainer.dataset_dicts)
        comm.synchronize()
        if results is None:
            return  # nothing was evaluated, or this is not the main process
        augmented = evaluate_augmented(cfg, unwrap(trainer.model))
    if comm.is_main_process():
        best = trainer.best
        best_text = f" (best {best.ap:.2f} after {best.iterations} iterations)" if best else ""
        save_curves(Path(cfg.OUTPUT_DIR))
        written = list_outputs(cfg, FINAL_WEIGHTS, *([BEST_WEIGHTS] if best else []))
        logger.info(f"done: {ap_text(results)}{best_text}{augmented}. {written}")


def evaluate(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Evaluates MODEL.WEIGHTS, or with --resume the last checkpoint of OUTPUT_DIR.

    Raises:
        ValueError: no weights were named, or not of all of the model; DATASETS.TEST is empty or of
            other classes.
    """
    if not args.resume and "MODEL.WEIGHTS" not in args.opts:
        raise ValueError(
            "--eval-only needs the weights to evaluate: MODEL.WEIGHTS FILE (for example "
            f"{cfg.OUTPUT_DIR}/{BEST_WEIGHTS}.pth), or --resume for the last of OUTPUT_DIR"
        )
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty; name a data set, or pass --data DIR")
    check_weights(cfg)
    check_registered(cfg, need_train=False)
    check_classes(cfg)
    if cfg.TEST.AUG.ENABLED:
        check_test_augmentation(cfg)
    model = Trainer.build_model(cfg)
    checkpointer = AtomicCheckpointer(model, cfg.OUTPUT_DIR)
    if args.resume and not checkpointer.has_checkpoint():
        raise ValueError(f"--resume: there is no checkpoint in OUTPUT_DIR = {cfg.OUTPUT_DIR}")
    weights = checkpointer.get_checkpoint_file() if args.resume else cfg.MODEL.WEIGHTS
    extra = load_weights(model, weights, use_average=cfg.TEST.EMA_WEIGHTS)
    trained, data = extra.get("class_names"), class_names(cfg.DATASETS.TEST[0])
    if trained and data and list(trained) != data:
        logger.warning(f"the weights were trained on the classes {trained}, the data has {data}")
    results = Trainer.test(cfg, model)
    augmented = evaluate_augmented(cfg, model)
    if comm.is_main_process():
        logger.info(f"done: {ap_text(results)}{augmented}. {list_outputs(cfg)}")


def evaluate_augmented(cfg: CfgNode, model: nn.Module) -> str:
    """Evaluates with test-time augmentation if TEST.AUG.ENABLED; returns the result as text."""
    if not cfg.TEST.AUG.ENABLED:
        return ""
    results = Trainer.test_with_TTA(cfg, model)
    plain = {key.removesuffix("_TTA"): value for key, value in results.items()}
    return f", with test-time augmentation {ap_text(plain)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: arguments; default: those of the process.

    Returns:
        Exit code: 0, or 2 with a message on stderr when a file, a key or an argument is wrong, or 1
        after an --overfit-check that failed.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.overfit_steps < 1:
        parser.error(f"--overfit-steps is {args.overfit_steps}; it must be at least 1")
    if not args.overfit_check:
        return start(args)
    args.num_gpus, args.num_machines = min(args.num_gpus, 1), 1
    with tempfile.TemporaryDirectory(prefix="overfit_check_") as folder:
        args.opts = [*args.opts, "OUTPUT_DIR", folder]
        return start(args)


def start(args: argparse.Namespace) -> int:
    """Prepares configuration, device and data, and launches the processes."""
    say = print if is_first_process() else lambda *_: None
    try:
        cfg, recipe = configure(args)
        check_config(cfg)
        cuda = choose_device(cfg, args.num_gpus, say)
        registered = register_data(args, cfg)
        if registered is not None:
            for report in registered.reports:
                say(report.table())
            use_data(cfg, registered, say)
        cfg.freeze()
        return launch(
            run,
            (args, cfg, recipe),
            processes=max(1, args.num_gpus),
            machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            cuda=cuda,
        )
    except (ValueError, KeyError, OSError) as error:
        return report_error(error)


def run(args: argparse.Namespace, cfg: CfgNode, recipe: CfgNode) -> int:
    """Trains or evaluates in one process; returns the exit code, see `main`."""
    try:
        if comm.get_world_size() > 1 and not started_by_torchrun():
            register_data(args, cfg)  # a spawned process starts with empty catalogs
        default_setup(cfg)
        if args.overfit_check:
            return run_check(cfg, recipe, steps=args.overfit_steps)
        if args.eval_only:
            evaluate(args, cfg)
        else:
            if started_by_torchrun():
                args.resume = resume_if_restarted(cfg.OUTPUT_DIR, args.resume)
            train(args, cfg, recipe)
    except (NonFiniteLossError, NotEnoughMemoryError, SampleError) as error:
        return report_error(error)
    except (ValueError, KeyError, OSError) as error:
        if not comm.is_main_process():
            time.sleep(GRACE)
        return report_error(error)
    return 0


def ap_text(results: dict[str, Any]) -> str:
    """Returns the box AP of an evaluation as text."""
    ap = box_ap(results)
    return "no box AP" if ap is None else f"box AP {ap:.2f}"


def list_outputs(cfg: CfgNode, *weights: str) -> str:
    """Returns the files that a run wrote as text."""
    folder = cfg.OUTPUT_DIR
    parts = [f"weights {', '.join(f'{folder}/{name}.pth' for name in weights)}"] if weights else []
    parts += [f"metrics {folder}/metrics.json, curves {folder}/curves.png"] if weights else []
    parts += [f"detections {folder}/inference"]
    if cfg.TEST.NUM_PICTURES > 0:
        parts.append(f"pictures {folder}/pictures")
    return "; ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
