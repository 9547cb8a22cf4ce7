"""The command line of train_net.py: from arguments to a finished training or evaluation."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from torch import nn

from ..checkpoint.checkpointer import AtomicCheckpointer
from ..checkpoint.loading import load_weights
from ..config.loading import find_config, load_config
from ..config.rules import check_config
from ..data import (
    CocoSplit,
    RegisteredFolder,
    SampleError,
    register_coco_folder,
    register_coco_splits,
)
from ..data import catalog as datasets
from ..diagnostics.overfit import STEPS, run_check
from ..files import atomic_writer
from ..modeling.tta import check_test_augmentation
from ..report.record import write_record
from ..visualization.pictures import save_curves
from .hooks import BEST_WEIGHTS, FINAL_WEIGHTS, box_ap
from .launch import launch, started_by_torchrun
from .log_files import keep_files_plain
from .loss_log import NonFiniteLossError
from .memory import NotEnoughMemoryError
from .restarts import resume_if_restarted
from .step import unwrap
from .trainer import Trainer

DEFAULT_CONFIG = "SparseRCNN/sparse_rcnn_tiny.yaml"
USER_ERROR = 2  # exit code when the user can fix it
# Seconds that the other processes wait for the first one to report the error. If it does, the
# launcher ends them meanwhile, and the message is printed once.
GRACE = 15.0

EPILOG = f"""
--config-file takes a path or a file below configs/ (default {DEFAULT_CONFIG}),
--num-gpus the processes of this machine: one a GPU, on the CPU where there is none; 0 is CPU.

Examples:
  train_net.py                                         a small detector on generated images
  train_net.py --data DIR                              ... on your images, in COCO format
  train_net.py --config-file FILE --num-gpus 8         a recipe, on eight GPUs
  train_net.py --data DIR --overfit-check              can it learn four of them by heart?
  train_net.py --data DIR MODEL.WEIGHTS model.pth      fine-tune a trained detector
  train_net.py --config-file FILE --resume             go on after an interruption
  train_net.py --config-file FILE --eval-only MODEL.WEIGHTS model.pth
  torchrun --nproc-per-node 8 train_net.py --config-file FILE
Any configuration key can follow as KEY VALUE, for example SOLVER.EPOCHS 12.
"""

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments and those for data of one's own."""
    parser = default_argument_parser(EPILOG)
    parser.set_defaults(config_file=DEFAULT_CONFIG, dist_url="auto")
    check = parser.add_argument_group("does it learn at all")
    check.add_argument(
        "--overfit-check",
        action="store_true",
        help="learn one batch of training images by heart; exit code 0, or 1 and which part failed",
    )
    check.add_argument(
        "--overfit-steps", type=int, default=STEPS, metavar="N", help=f"at most (default {STEPS})"
    )
    data = parser.add_argument_group("data of your own, in COCO format")
    data.add_argument("--data", metavar="DIR", help="folder in one of the usual layouts")
    data.add_argument("--evaluate-on-train", action="store_true", help="there is no other split")
    for split in ("train", "val"):
        data.add_argument(f"--{split}-json", metavar="FILE", help=f"{split} annotations")
        data.add_argument(f"--{split}-images", metavar="DIR", help=f"folder of the {split} images")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Trains or evaluates.

    Args:
        argv: arguments; default: those of the command line.

    Returns:
        Exit code: 0, or 2 with a message on stderr when a file, a key or an argument is wrong, or 1
        after an --overfit-check that failed.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.overfit_steps < 1:
        parser.error(f"--overfit-steps is {args.overfit_steps}; it must be at least 1")
    if args.overfit_check:
        args.num_gpus, args.num_machines = min(args.num_gpus, 1), 1
        with tempfile.TemporaryDirectory(prefix="overfit_check_") as folder:
            args.opts = [*args.opts, "OUTPUT_DIR", folder]
            return _start(args)
    return _start(args)


def _start(args: argparse.Namespace) -> int:
    """`main`, once the arguments are read."""
    try:
        cfg, recipe = configure(args)
        check_config(cfg)
        say = print if _is_first() else _silent
        cuda = choose_device(cfg, args.num_gpus, say)
        registered = register_data(args, cfg.OUTPUT_DIR)
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


def configure(args: argparse.Namespace) -> tuple[CfgNode, CfgNode]:
    """The configuration with overrides (not frozen), and the file's own.

    OUTPUT_DIR is output/<name of the file> unless the file or the command line says otherwise.

    Raises:
        ValueError: an unknown file or value, or an override that would do nothing.
    """
    path = find_config(args.config_file)
    recipe = load_config(str(path))
    cfg = load_config(str(path), args.opts or ())
    without_effect = {"SOLVER.MAX_ITER", "SOLVER.STEPS"} & set((args.opts or [])[::2])
    if without_effect and cfg.SOLVER.EPOCHS > 0:
        raise ValueError(
            f"{min(without_effect)} has no effect while SOLVER.EPOCHS is {cfg.SOLVER.EPOCHS:g}: "
            "set SOLVER.EPOCHS instead, or add SOLVER.EPOCHS 0 to count in iterations"
        )
    cfg.defrost()
    if cfg.OUTPUT_DIR == "./output":  # Detectron2's default
        cfg.OUTPUT_DIR = os.path.join("output", path.stem)
    return cfg, recipe


def choose_device(cfg: CfgNode, num_gpus: int, say: Any = print) -> bool:
    """Settles MODEL.DEVICE and says so if it is not what the configuration asked for.

    Returns:
        Whether the processes use CUDA.
    """
    if num_gpus == 0:
        cfg.MODEL.DEVICE = "cpu"
    elif cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        say(f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but torch sees no CUDA device: using the CPU")
        cfg.MODEL.DEVICE = "cpu"
    return cfg.MODEL.DEVICE.startswith("cuda")


def register_data(args: argparse.Namespace, output_dir: str) -> RegisteredFolder | None:
    """Registers --data, or --train-json and its kin.

    Args:
        args: of the command line.
        output_dir: where cleaned copies of annotation files go.

    Returns:
        What was registered; None when the configuration's own data sets are used.

    Raises:
        DatasetError: the files cannot be used.
        ValueError: contradicting arguments.
    """
    explicit = {name: getattr(args, name) for name in ("train_json", "val_json")}
    if not args.data and not any(explicit.values()):
        return None
    if args.data and any(explicit.values()):
        raise ValueError("pass either --data DIR or --train-json FILE, not both")
    if args.data:
        registered = register_coco_folder(
            args.data, output_dir=output_dir, evaluate_on_train=args.evaluate_on_train
        )
    else:
        if not args.train_json:
            raise ValueError("--val-json needs --train-json: it defines the classes")
        if not args.val_json and not args.evaluate_on_train:
            raise ValueError("--train-json needs --val-json FILE, or --evaluate-on-train")
        val = _split(args.val_json, args.val_images) if args.val_json else None
        registered = register_coco_splits(
            Path(args.train_json).resolve().parent.name or "data",
            train=_split(args.train_json, args.train_images),
            val=val,
            output_dir=output_dir,
        )
    return registered


def use_data(cfg: CfgNode, registered: RegisteredFolder, say: Any = print) -> None:
    """Points DATASETS and MODEL.ROI_HEADS.NUM_CLASSES to registered data."""
    cfg.DATASETS.TRAIN = (registered.train,)
    cfg.DATASETS.TEST = (registered.val,)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(registered.class_names)
    fullest = max(report.max_boxes_per_image for report in registered.reports)
    queries = cfg.MODEL.PROPOSAL_GENERATOR.NUM_QUERIES
    if fullest > queries:
        say(
            f"WARNING: an image has {fullest} boxes, but there are {queries} queries, which find "
            "one object each at most. Raise MODEL.PROPOSAL_GENERATOR.NUM_QUERIES."
        )
    kept = cfg.TEST.DETECTIONS_PER_IMAGE
    if fullest > kept:
        say(
            f"WARNING: an image has {fullest} boxes, but only the {kept} best detections of an "
            "image are kept. Raise TEST.DETECTIONS_PER_IMAGE."
        )


def _split(json_file: str, images: str | None) -> CocoSplit:
    return CocoSplit(Path(json_file), (Path(images) if images else Path(json_file).parent,))


def run(args: argparse.Namespace, cfg: CfgNode, recipe: CfgNode) -> int:
    """One process of the job.

    Returns:
        Exit code, see `main`.
    """
    try:
        if comm.get_world_size() > 1 and not started_by_torchrun():
            register_data(args, cfg.OUTPUT_DIR)  # a spawned process knows nothing yet
        _set_up(cfg)
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


def train(args: argparse.Namespace, cfg: CfgNode, recipe: CfgNode) -> None:
    """Trains, and says where everything is."""
    _check_weights(cfg)
    trainer = Trainer(cfg, recipe=recipe)
    logger.info(trainer.schedule.summary())
    trainer.resume_or_load(resume=args.resume)
    if comm.is_main_process():  # not before: a refused --resume leaves the run as it is
        with atomic_writer(Path(cfg.OUTPUT_DIR) / "config.yaml") as file:
            file.write(trainer.cfg.dump())
        write_record(trainer.cfg, recipe, args.config_file)
    results = trainer.train()
    if results is None:
        return
    with trainer.evaluation_weights():
        augmented = _test_augmented(cfg, unwrap(trainer.model))
    if not comm.is_main_process():
        return
    best = trainer.best
    best_text = f" (best {best.ap:.2f} after {best.iterations} iterations)" if best else ""
    save_curves(Path(cfg.OUTPUT_DIR))
    places = _places(cfg, FINAL_WEIGHTS, *([BEST_WEIGHTS] if best else []))
    logger.info(f"done: {_ap_text(results)}{best_text}{augmented}. {places}")


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
    _check_weights(cfg)
    datasets.check_registered(cfg, need_train=False)
    datasets.check_classes(cfg)
    if cfg.TEST.AUG.ENABLED:
        check_test_augmentation(cfg)
    model = Trainer.build_model(cfg)
    checkpointer = AtomicCheckpointer(model, cfg.OUTPUT_DIR)
    if args.resume and not checkpointer.has_checkpoint():
        raise ValueError(f"--resume: there is no checkpoint in OUTPUT_DIR = {cfg.OUTPUT_DIR}")
    weights = checkpointer.get_checkpoint_file() if args.resume else cfg.MODEL.WEIGHTS
    extra = load_weights(model, weights, use_average=cfg.TEST.EMA_WEIGHTS)
    trained, data = extra.get("class_names"), datasets.class_names(cfg.DATASETS.TEST[0])
    if trained and data and list(trained) != data:
        logger.warning(f"the weights were trained on the classes {trained}, the data has {data}")
    results = Trainer.test(cfg, model)
    augmented = _test_augmented(cfg, model)
    if comm.is_main_process():
        logger.info(f"done: {_ap_text(results)}{augmented}. {_places(cfg)}")


def _test_augmented(cfg: CfgNode, model: nn.Module) -> str:
    """With TEST.AUG.ENABLED evaluates once more, with test-time augmentation; says what came
    out."""
    if not cfg.TEST.AUG.ENABLED:
        return ""
    results = Trainer.test_with_TTA(cfg, model)
    plain = {key.removesuffix("_TTA"): value for key, value in results.items()}
    return f", with test-time augmentation {_ap_text(plain)}"


def report_error(error: Exception) -> int:
    """Prints the message of an error, without a traceback, and returns the exit code for it."""
    # str() of a KeyError is the repr of its message.
    message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if isinstance(error, SampleError):  # a loader's process wraps its traceback around the message
        message = message.rsplit("SampleError: ", 1)[-1].strip()
    print(f"error: {message}", file=sys.stderr, flush=True)
    return USER_ERROR


def _set_up(cfg: CfgNode) -> None:
    """Output folder, loggers, environment report, seed."""
    rank = comm.get_rank()
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    for name in ("fvcore", "detectron2", "asag"):
        keep_files_plain(setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name=name))
    if comm.is_main_process():
        with atomic_writer(Path(cfg.OUTPUT_DIR) / "environment.txt") as file:
            file.write(collect_env_info() + "\n")
    # Different on each process, so that they do not drop the same units.
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK


def _check_weights(cfg: CfgNode) -> None:
    weights = cfg.MODEL.WEIGHTS
    if weights and "://" not in weights and not os.path.isfile(weights):
        raise ValueError(f"MODEL.WEIGHTS = {weights}: no such file")


def _ap_text(results: dict[str, Any]) -> str:
    ap = box_ap(results)
    return "no box AP" if ap is None else f"box AP {ap:.2f}"


def _places(cfg: CfgNode, *weights: str) -> str:
    """Where to find what the job wrote."""
    folder = cfg.OUTPUT_DIR
    parts = [f"weights {', '.join(f'{folder}/{name}.pth' for name in weights)}"] if weights else []
    parts += [f"metrics {folder}/metrics.json, curves {folder}/curves.png"] if weights else []
    parts += [f"detections {folder}/inference"]
    if cfg.TEST.NUM_PICTURES > 0:
        parts.append(f"pictures {folder}/pictures")
    return "; ".join(parts)


def _is_first() -> bool:
    """Whether this is the process that prints, before the processes know each other."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"


def _silent(*_: Any) -> None:
    pass
