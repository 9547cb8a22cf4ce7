#!/usr/bin/env python3
"""Packages the weights of a finished run with the library, evaluated and documented.

    python tools/zoo/package_checkpoint.py output/demo sparse_rcnn_tiny_shapes \\
        --config SparseRCNN/sparse_rcnn_tiny.yaml \\
        --command "make demo" --commit HASH --date 2026-11-21 --hardware "CPU, 2 cores"

Writes asag/model_zoo/weights/NAME.pth, with parameters and class names only, and NAME.json, with
the training command and the evaluation of the packaged file on DATASETS.TEST of the recipe or on
the validation images of --data. --half stores float16; models
compute in float32 with them. Run `python tools/make_model_zoo.py` afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asag.checkpoint.loading import load_weights
from asag.config.loading import differences, find_config, load_config
from asag.data import register_dataset
from asag.engine.trainer import Trainer
from asag.evaluation.coco import RESULTS_FILE, ap50_by_class, evaluate_boxes
from asag.files import atomic_writer
from asag.model_zoo.entries import WEIGHTS

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from pycocotools.coco import COCO
from torch import Tensor

MAX_BYTES = 15_000_000
# Keys that affect inference; all other differences of a run concern its training.
INFERENCE_KEYS = ("INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST", "INPUT.FORMAT")
INFERENCE_KEYS += ("TEST.DETECTIONS_PER_IMAGE",)
NOT_OF_THE_MODEL = ("MODEL.WEIGHTS", "MODEL.TIMM.WEIGHTS", "MODEL.DEVICE", "MODEL.COMPILE")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parse(arguments)
    try:
        record = package(args)
    except (OSError, KeyError, ValueError) as error:
        print(f"package_checkpoint: {error}", file=sys.stderr)
        return 2
    print(json.dumps(record, indent=1))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of the run, with config.yaml")
    add("name", metavar="NAME", help="in the model zoo")
    add("--weights", default="model_best.pth", metavar="FILE", help="in RUN (default %(default)s)")
    add("--config", required=True, metavar="FILE", help="recipe, below configs/")
    add("--command", required=True, help="the command of the training")
    add("--commit", required=True, help="of this repository, that the training ran with")
    add("--date", required=True, help="of the training, YYYY-MM-DD")
    add("--hardware", required=True)
    add("--data", type=Path, metavar="DIR", help="folder that the run was trained on (--data)")
    add("--half", action="store_true", help="store float16: half the size")
    add("--note", default="", help="what else a user should know")
    add("--output", type=Path, default=WEIGHTS, metavar="DIR", help="default: the library's own")
    return parser.parse_args(arguments)


def package(args: argparse.Namespace) -> dict[str, Any]:
    """Writes the weights and their record.

    Returns:
        The record.

    Raises:
        ValueError: the weights do not fit the run's configuration, are not finite, or too large.
        OSError: a file is missing or cannot be written.
    """
    recipe_file = find_config(args.config)
    recipe, run = load_config(str(recipe_file)), load_config(str(args.run / "config.yaml"))
    options = overrides(recipe, run)
    source = torch.load(args.run / args.weights, map_location="cpu", weights_only=True)
    args.output.mkdir(parents=True, exist_ok=True)
    target = args.output / f"{args.name}.pth"
    dtype = torch.float16 if args.half else torch.float32
    stripped = {"model": strip(source["model"], dtype), "class_names": list(source["class_names"])}
    with tempfile.TemporaryDirectory() as scratch:
        candidate = Path(scratch) / target.name
        torch.save(stripped, candidate)
        size = candidate.stat().st_size
        if size > MAX_BYTES:
            raise ValueError(f"{size} bytes; weights in the library have {MAX_BYTES} at most")
        fixed = ["OUTPUT_DIR", scratch, "MODEL.DEVICE", "cpu"]
        cfg = load_config(str(recipe_file), [*options, *fixed])
        if args.data:
            cfg.DATASETS.TEST = (register_dataset(args.data, output_dir=scratch).val,)
        evaluation = evaluate(cfg, candidate)
    with atomic_writer(target, "wb") as file:
        torch.save(stripped, file)
    record = {
        "config": recipe_file.stem,
        "options": options,
        "class_names": stripped["class_names"],
        "training": {
            "command": args.command,
            "commit": args.commit,
            "date": args.date,
            "hardware": args.hardware,
            "seed": run.SEED,
            "iterations": run.SOLVER.MAX_ITER,
            "images_per_batch": run.SOLVER.IMS_PER_BATCH,
            "data": list(run.DATASETS.TRAIN),
        },
        "evaluation": evaluation,
        "note": args.note,
        "bytes": size,
        "sha256": hashlib.sha256(target.read_bytes()).hexdigest(),
    }
    with atomic_writer(target.with_suffix(".json")) as file:
        file.write(json.dumps(record, indent=1) + "\n")
    return record


def strip(state: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Copies parameters and buffers, in `dtype`, to memory of their own.

    Raises:
        ValueError: a tensor has entries that are NaN, infinite, or too large for `dtype`.
    """
    stripped = {k: (v.to(dtype) if v.is_floating_point() else v).clone() for k, v in state.items()}
    for name, value in stripped.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{name} has entries that are not finite in {dtype}")
    return stripped


def overrides(recipe: CfgNode, run: CfgNode) -> list[str]:
    """Returns the KEY VALUE words that turn the recipe's model and test input into the run's."""
    words: list[str] = []
    for key, (_, value) in differences(recipe, run).items():
        of_the_model = key.startswith("MODEL.") and key not in NOT_OF_THE_MODEL
        if of_the_model or key in INFERENCE_KEYS:
            words += [key, str(value)]
    if recipe.MODEL.TIMM.WEIGHTS:  # where the training started; the weights come with the name
        words += ["MODEL.TIMM.WEIGHTS", ""]
    return words


def evaluate(cfg: CfgNode, weights: Path) -> dict[str, Any]:
    """Evaluates the file on the first data set of DATASETS.TEST.

    Returns:
        Metrics in percent, and the number of images and of objects of each class.
    """
    name = cfg.DATASETS.TEST[0]
    cfg.DATASETS.TEST = (name,)
    cfg.TEST.NUM_PICTURES = 0
    cfg.MODEL.WEIGHTS = str(weights)
    model = Trainer.build_model(cfg)
    load_weights(model, str(weights))
    (metrics,) = Trainer.test(cfg, model).values()
    finite = {k: round(float(v), 4) for k, v in metrics.items() if math.isfinite(float(v))}
    record = {"dataset": name} | finite
    return record | by_class(name, Path(cfg.OUTPUT_DIR) / "inference" / RESULTS_FILE)


def by_class(dataset: str, results: Path) -> dict[str, Any]:
    """Number of images, and of every class the AP50 and the number of objects."""
    meta = MetadataCatalog.get(dataset)
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(meta.json_file)
    found = evaluate_boxes(gt, json.loads(results.read_text(encoding="utf-8")))
    names = [x["name"] for x in gt.loadCats(gt.getCatIds())]
    ap50 = ap50_by_class(found)
    objects = [len(gt.getAnnIds(catIds=[x], iscrowd=False)) for x in gt.getCatIds()]
    return {
        "images": len(gt.getImgIds()),
        "classes": {
            name: {"AP50": None if math.isnan(ap) else round(ap, 1), "objects": count}
            for name, ap, count in zip(names, ap50, objects, strict=True)
        },
    }


if __name__ == "__main__":
    sys.exit(main())
