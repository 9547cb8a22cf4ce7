#!/usr/bin/env python
"""The main job, small: train a detector on generated images, evaluate it, draw what it sees.

Two CPU cores do it in under ten minutes. An interrupted job goes on where it stopped, a finished
one is evaluated again. Everything lands in `output/demo`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

CONFIG = "SparseRCNN/sparse_rcnn_tiny.yaml"


def main() -> int:
    """Command line; returns the exit status of the training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", default=CONFIG, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("output/demo"))
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="configuration overrides")
    options = parser.parse_args()

    from asag.visualization.curves import plot_curves
    from train_net import main as train

    start = time.perf_counter()
    arguments = ["--config-file", options.config_file, "--num-gpus", "1", "--resume"]
    status = train([*arguments, "OUTPUT_DIR", str(options.output), *options.opts])
    if status:
        return status
    metrics = options.output / "metrics.json"
    curves = options.output / "curves.png"
    plot_curves(metrics, curves)
    found: dict[str, float] = {}
    for line in metrics.read_text().splitlines():
        found.update({k: v for k, v in json.loads(line).items() if k.startswith("bbox/")})
    print(
        f"\nThe demonstration took {(time.perf_counter() - start) / 60:.1f} minutes.\n"
        f"  AP {found['bbox/AP']:.1f}, AP50 {found['bbox/AP50']:.1f} on images it never saw\n"
        f"  curves    {curves}\n"
        f"  pictures  {options.output / 'pictures'} (predictions beside ground truth)\n"
        f"  weights   {options.output / 'model_final.pth'}\n"
        "Try it on pictures of your own:\n"
        f"  .venv/bin/python demo/demo.py --config-file {options.config_file} "
        f"--weights {options.output / 'model_final.pth'} --output output/looked PICTURES\n"
        "Train it on data of your own (COCO format):\n"
        "  .venv/bin/python train_net.py --data DIR"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
