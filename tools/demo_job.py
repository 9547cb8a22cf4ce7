#!/usr/bin/env python
"""Detects in photographs with a packaged model, then trains a detector on generated images.

The trained detector is evaluated, and its predictions are drawn. The job takes less than ten
minutes on two CPU cores. The photographs come with installed packages. An interrupted job is
resumed, a finished one is evaluated again. Results are written to `output/demo`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path

CONFIG = "SparseRCNN/sparse_rcnn_tiny.yaml"
# Package -> photographs inside of it, of people and animals.
PHOTOGRAPHS = {
    "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
    "skimage": ("data/astronaut.png", "data/chelsea.png"),
}
THRESHOLD = 0.3


def main() -> int:
    """Runs the command line; returns the exit code of the training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", default=CONFIG, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("output/demo"))
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="configuration overrides")
    options = parser.parse_args()

    detect_photographs(options.output / "photographs")

    from asag.cli import load_command
    from asag.visualization.curves import plot_curves

    start = time.perf_counter()
    arguments = ["--config-file", options.config_file, "--num-gpus", "1", "--resume"]
    status = load_command("train_net.py").main(
        [*arguments, "OUTPUT_DIR", str(options.output), *options.opts]
    )
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
        f"  AP {found['bbox/AP']:.1f}, AP50 {found['bbox/AP50']:.1f} on validation images\n"
        f"  curves    {curves}\n"
        f"  pictures  {options.output / 'pictures'} (predictions beside ground truth)\n"
        f"  weights   {options.output / 'model_final.pth'}\n"
        "Try it on your own images:\n"
        f"  .venv/bin/python demo/demo.py --config-file {options.config_file} "
        f"--weights {options.output / 'model_final.pth'} --output output/detections IMAGES\n"
        "Train on your own data (COCO, Pascal VOC or YOLO format):\n"
        "  .venv/bin/python train_net.py --data DIR"
    )
    return 0


def photographs() -> list[Path]:
    """Finds the photographs of installed packages without importing them."""
    found = []
    for package, names in PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)
        folders = spec.submodule_search_locations if spec else None
        found += [Path(folder) / name for folder in folders or () for name in names]
    return [path for path in found if path.is_file()]


def detect_photographs(folder: Path) -> list[Path]:
    """Detects objects in the photographs, draws them, and prints the detections.

    Args:
        folder: for the drawn images.

    Returns:
        Paths of the drawn images.
    """
    from asag import Detector

    pictures = photographs()
    if not pictures:
        print("No installed package has photographs: pip install matplotlib scikit-image")
        return []
    folder.mkdir(parents=True, exist_ok=True)
    detector = Detector.from_pretrained()
    drawn = []
    for picture in pictures:
        found = detector.predict(picture, threshold=THRESHOLD)
        drawn.append(folder / f"{picture.stem}.jpg")
        found.save(drawn[-1])
        seen = ", ".join(f"{x.name} {x.score:.2f}" for x in found) or "nothing"
        print(f"{picture.name}: {seen} -> {drawn[-1]}")
    return drawn


if __name__ == "__main__":
    sys.exit(main())
