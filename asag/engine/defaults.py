"""Steps that the entrances of the library share: configuration, device, data, logging, errors."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from ..config import check_config, find_config, load_config
from ..data import (
    CocoSplit,
    DataChecks,
    RegisteredDataset,
    SampleError,
    register_coco_splits,
    register_dataset,
)
from ..data.catalog import check_images
from ..files import atomic_writer
from .fine_tuning import SMALL_DATA, check_start, fine_tuning_config, learn_all_from_scratch
from .launch import started_by_torchrun
from .trainer import Trainer
from .writers import keep_files_plain

DEFAULT_CONFIG = "SparseRCNN/sparse_rcnn_tiny.yaml"  # without data of one's own
USER_ERROR = 2  # exit code for errors that the user can fix

logger = logging.getLogger(__name__)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `register_data` reads."""
    data = parser.add_argument_group("data of your own, in COCO, Pascal VOC or YOLO format")
    data.add_argument("--data", metavar="PATH", help="folder, data.yaml, COCO json or zip")
    data.add_argument(
        "--model",
        metavar="NAME",
        help="fine-tune a trained detector: a name of the model zoo (MODEL_ZOO.md), or the folder "
        "of a run; classes of equal name keep their weights",
    )
    data.add_argument("--evaluate-on-train", action="store_true", help="there is no other split")
    data.add_argument(
        "--val-fraction",
        type=float,
        metavar="SHARE",
        help="keep this share of the images of a single split for evaluation, for example 0.2",
    )
    data.add_argument(
        "--check-images",
        action="store_true",
        help="decode all images before training (small sets: always; headers: always)",
    )
    for split in ("train", "val"):
        data.add_argument(f"--{split}-json", metavar="FILE", help=f"{split} annotations")
        data.add_argument(f"--{split}-images", metavar="DIR", help=f"folder of the {split} images")


def configure(args: argparse.Namespace) -> tuple[CfgNode, CfgNode]:
    """Reads the configuration with overrides (not frozen), and the file's own.

    OUTPUT_DIR is output/<name of the file or of --model> unless the file or the command line says
    otherwise.

    Raises:
        ValueError: an unknown file or value, or an override that would do nothing.
    """
    say = print if is_first_process() else lambda *_: None
    options = args.opts or ()
    if args.model and args.config_file:
        raise ValueError("pass either --model NAME or --config-file FILE, not both")
    if args.model:
        cfg, recipe = fine_tuning_config(args.model, options, say)
        name = Path(args.model).stem
    else:
        own_data = args.data or args.train_json
        path = find_config(args.config_file or (SMALL_DATA if own_data else DEFAULT_CONFIG))
        args.config_file, name = str(path), path.stem
        cfg, recipe = load_config(args.config_file, options), load_config(args.config_file)
    _check_length(cfg, options)
    cfg.defrost()
    if cfg.OUTPUT_DIR == "./output":  # Detectron2's default
        cfg.OUTPUT_DIR = os.path.join("output", name)
    if not args.eval_only:
        learn_all_from_scratch(cfg, say)
        check_start(cfg)
    return cfg, recipe


def _check_length(cfg: CfgNode, options: Sequence[str]) -> None:
    """Raises ValueError for lengths on the command line that others overrule."""
    solver, given = cfg.SOLVER, set(options[::2])
    if without_effect := {"SOLVER.MAX_ITER", "SOLVER.STEPS"} & given:
        for key, value in (("EPOCHS", solver.EPOCHS), ("BY_DATA.EPOCHS", solver.BY_DATA.EPOCHS)):
            if value > 0:
                raise ValueError(
                    f"{min(without_effect)} has no effect while SOLVER.{key} is {value:g}: set "
                    f"SOLVER.EPOCHS instead, or add SOLVER.{key} 0 to count in iterations"
                )


def choose_device(cfg: CfgNode, num_gpus: int, say: Any = print) -> bool:
    """Sets MODEL.DEVICE to a device that exists, and says so if it is not the configured one.

    Returns:
        True if the processes use CUDA.
    """
    if num_gpus == 0:
        cfg.MODEL.DEVICE = "cpu"
    elif cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        say(f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but torch sees no CUDA device: using the CPU")
        cfg.MODEL.DEVICE = "cpu"
    return cfg.MODEL.DEVICE.startswith("cuda")


def register_data(args: argparse.Namespace, cfg: CfgNode) -> RegisteredDataset | None:
    """Registers --data, or --train-json and --val-json.

    Args:
        args: of the command line.
        cfg: OUTPUT_DIR, where copies of annotations go; INPUT.MAX_PIXELS; DATASETS.CHECK_BOXES.

    Returns:
        The registered data set; None if the configuration's own data sets are used.

    Raises:
        DatasetError: the files cannot be used.
        ValueError: contradicting arguments.
    """
    explicit = {name: getattr(args, name) for name in ("train_json", "val_json")}
    first = is_first_process() and comm.is_main_process()  # one process decodes images for all
    if not args.data and not any(explicit.values()):
        if args.val_fraction is not None:
            raise ValueError("--val-fraction needs --data PATH or --train-json FILE to divide")
        if args.check_images and first:
            check_images(cfg)
        return None
    if args.data and any(explicit.values()):
        raise ValueError("pass either --data DIR or --train-json FILE, not both")
    checks = DataChecks(
        decode_images=(args.check_images or None) if first else False,
        max_pixels=cfg.INPUT.MAX_PIXELS,
        boxes=cfg.DATASETS.CHECK_BOXES,
    )
    given = {"output_dir": cfg.OUTPUT_DIR, "val_fraction": args.val_fraction, "checks": checks}
    if args.data:
        return register_dataset(args.data, evaluate_on_train=args.evaluate_on_train, **given)
    if not args.train_json:
        raise ValueError("--val-json needs --train-json: it defines the classes")
    choices = (args.val_json, args.evaluate_on_train, args.val_fraction is not None)
    if sum(map(bool, choices)) != 1:
        raise ValueError(
            "--train-json needs one of --val-json FILE, --val-fraction SHARE and "
            "--evaluate-on-train"
        )
    return register_coco_splits(
        None,
        train=_split(args.train_json, args.train_images),
        val=_split(args.val_json, args.val_images) if args.val_json else None,
        **given,
    )


def use_data(cfg: CfgNode, registered: RegisteredDataset, say: Any = print) -> None:
    """Sets DATASETS and MODEL.ROI_HEADS.NUM_CLASSES to registered data."""
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


def default_setup(cfg: CfgNode) -> None:
    """Prepares a process: output folder, loggers, environment report, seed."""
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


def check_weights(cfg: CfgNode) -> None:
    """Raises ValueError if MODEL.WEIGHTS names a local file that does not exist."""
    weights = cfg.MODEL.WEIGHTS
    if weights and "://" not in weights and not os.path.isfile(weights):
        raise ValueError(f"MODEL.WEIGHTS = {weights}: no such file")


def start_trainer(cfg: CfgNode, recipe: CfgNode, resume: bool = False) -> Trainer:
    """Builds a trainer, loads or resumes its weights, and writes config.yaml into OUTPUT_DIR.

    Args:
        cfg: of the run, frozen.
        recipe: the configuration without overrides.
        resume: continue from the last checkpoint of OUTPUT_DIR.

    Raises:
        ValueError: a configuration that cannot work, or a checkpoint that cannot be resumed.
    """
    check_weights(cfg)
    trainer = Trainer(cfg, recipe=recipe)
    logger.info(trainer.schedule.summary())
    trainer.resume_or_load(resume=resume)
    if comm.is_main_process():  # not before: a refused --resume leaves the run as it is
        with atomic_writer(Path(cfg.OUTPUT_DIR) / "config.yaml") as file:
            file.write(trainer.cfg.dump())
    return trainer


def train_on(data: str | os.PathLike[str], model: str, options: Sequence[str] = ()) -> Path:
    """Fine-tunes a detector on custom data in this process, for Python programs.

    Args:
        data: see `asag.data.register_dataset`.
        model: name or folder of a trained detector.
        options: KEY VALUE words.

    Returns:
        The folder of the run.

    Raises:
        ValueError, KeyError, OSError: as the command line would report them.
    """
    parser = argparse.ArgumentParser()
    add_data_arguments(parser)
    args = parser.parse_args(["--data", os.fspath(data), "--model", model])
    args.config_file, args.opts, args.eval_only = "", list(options), False
    cfg, recipe = configure(args)
    check_config(cfg)
    use_data(cfg, register_data(args, cfg))
    cfg.freeze()
    default_setup(cfg)
    start_trainer(cfg, recipe).train()
    return Path(cfg.OUTPUT_DIR)


def report_error(error: Exception) -> int:
    """Prints the message of an error, without a traceback, and returns the exit code for it."""
    # str() of a KeyError is the repr of its message.
    message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if isinstance(error, SampleError):  # a loader's process wraps its traceback around the message
        message = message.rsplit("SampleError: ", 1)[-1].strip()
    print(f"error: {message}", file=sys.stderr, flush=True)
    return USER_ERROR


def is_first_process() -> bool:
    """Returns True in the process that prints, also before the processes know each other."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"
