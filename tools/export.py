#!/usr/bin/env python3
"""Exports a detector to ONNX and keeps the file only if its detections agree with PyTorch.

    python tools/export.py --config-file output/run/config.yaml \\
        --weights output/run/model_final.pth --output model.onnx --size 800 1216

The model has one input, `images` (B, 3, H, W): float32, RGB, 0 to 255, of one fixed size. Resize
images to it, and rescale the boxes by the same two factors. Its outputs have a slot for each of the
D = TEST.DETECTIONS_PER_IMAGE best detections: `boxes_xyxy` (B, D, 4) in pixels of the input,
`scores` (B, D) in descending order, `labels` (B, D) and `valid` (B, D). Invalid slots come last.

Normalization and non-maximum suppression (MODEL.NMS_THRESH_TEST) are included, test-time
augmentation is not. ASAG needs fixed capacities (MODEL.ASAG.PATCH_CAPACITY and
MODEL.ASAG.ANCHOR_CAPACITY).

onnxruntime runs the file on noise, on generated scenes and on the images of --images. Its
detections must agree with those of PyTorch with the same weights; otherwise the exit code is 1 and
the file is kept with the suffix ".rejected".
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from asag import __version__, load_config
from asag.checkpoint.loading import load_weights
from asag.config.loading import find_config
from asag.export import (
    ExportableDetector,
    ExportError,
    Tolerance,
    check_onnx,
    describe,
    export_onnx,
    generated_pictures,
    read_pictures,
)
from asag.export.onnx_file import require_packages
from asag.inference.predictor import find_class_names

import torch
from detectron2.modeling import build_model


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        Exit code: 1 if the file detects otherwise, 2 if the model cannot be exported.
    """
    args = parse(arguments)
    try:
        return export(args)
    except (ExportError, OSError, KeyError, ValueError) as error:
        print(f"export: {error.args[0] if len(error.args) == 1 else error}", file=sys.stderr)
        return 2


def export(args: argparse.Namespace) -> int:
    """Builds the model, writes the file and compares; see `main` for the result."""
    require_packages()
    tolerance = Tolerance(args.box_tolerance, args.score_tolerance)
    size = tuple(args.size)
    # Options that speed up PyTorch do not reach the file and would only blur the comparison.
    fixed = ["MODEL.DEVICE", "cpu", "MODEL.COMPILE", "False", "MODEL.INFERENCE_DTYPE", "float32"]
    cfg = load_config(str(find_config(args.config_file)), [*args.opts, *fixed])
    if args.weights:
        cfg.MODEL.WEIGHTS = args.weights
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    checkpoint = load_weights(model, cfg.MODEL.WEIGHTS) if args.weights else {}
    if not args.weights:
        print("no --weights: the file gets the random weights of a new model")
    pictures = generated_pictures(size)
    if args.images:
        pictures |= read_pictures(args.images, size)

    description = describe(
        cfg,
        config_name=Path(args.config_file).name,
        class_names=find_class_names(cfg, checkpoint),
        version=__version__,
    )
    output: Path = args.output
    output.parent.mkdir(parents=True, exist_ok=True)
    unchecked = output.with_name(output.name + ".unchecked")
    try:
        export_onnx(
            ExportableDetector(model, size),
            unchecked,
            batch=args.batch,
            opset=args.opset,
            description=description,
        )
        agreement = check_onnx(unchecked, model, pictures, tolerance)
    except BaseException:
        unchecked.unlink(missing_ok=True)
        raise
    print(
        f"{agreement.detections} detections in {agreement.pictures} pictures: boxes differ by at "
        f"most {agreement.box:.2g} px (allowed {tolerance.box:g}), scores by at most "
        f"{agreement.score:.2g} (allowed {tolerance.score:g})"
    )
    if agreement.problems:
        rejected = output.with_name(output.name + ".rejected")
        os.replace(unchecked, rejected)
        print_problems(agreement.problems if args.weights else (), rejected)
        return 1
    os.replace(unchecked, output)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")
    return 0


def print_problems(problems: Sequence[str], rejected: Path) -> None:
    """Prints the reasons for a rejection; without problems, that trained weights are missing."""
    for problem in problems:
        print(f"export: {problem}", file=sys.stderr)
    if problems:
        print(f"export: the file does not detect what PyTorch does: {rejected}", file=sys.stderr)
    else:
        print(
            "export: the check needs trained weights, because random ones amplify rounding errors: "
            f"pass --weights FILE; the file is kept as {rejected}",
            file=sys.stderr,
        )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", required=True, metavar="YAML", help="a path, or a name below configs/")
    add("--weights", metavar="FILE", help="trained weights; without, random ones")
    add("--output", required=True, type=Path, metavar="FILE", help="ONNX file to write")
    add("--size", required=True, type=int, nargs=2, metavar=("H", "W"), help="pixels of the input")
    add("--batch", type=batch_size, default=1, help="images of a batch, or 'dynamic' (default 1)")
    add("--opset", type=int, help="version of the ONNX operators (default: torch's choice)")
    add("--images", type=Path, metavar="DIR", help="compare on its first 16 images as well")
    add(
        "--box-tolerance",
        type=float,
        default=Tolerance.box,
        metavar="PX",
        help="default %(default)s",
    )
    add("--score-tolerance", type=float, default=Tolerance.score, help="default %(default)s")
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="configuration overrides, last")
    return parser.parse_args(arguments)


def batch_size(text: str) -> int | None:
    """Parses a positive number, or "dynamic" (None).

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    if text == "dynamic":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a positive number nor 'dynamic'")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
