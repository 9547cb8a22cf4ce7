"""Validation images with predictions beside the ground truth, as PNG files."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from PIL import Image
from torch import nn

from ..data import SparseDetectionMapper, read_image
from ..data.mapper import training_instances

logger = logging.getLogger(__name__)


def save_pictures(cfg: CfgNode, model: nn.Module, dataset_name: str, folder: Path) -> list[Path]:
    """Draws TEST.NUM_PICTURES images, evenly spread over a data set, in their original size.

    Args:
        cfg: TEST.NUM_PICTURES and INPUT.*.
        model: the detector, not wrapped; its mode is restored.
        dataset_name: a registered data set.
        folder: gets one file for each image, named after it.

    Returns:
        The written files; none (with a warning) if the drawing packages are not installed.
    """
    try:
        from .detections import draw_comparison
    except ImportError as error:
        logger.warning(
            f"no pictures: {error}; pip install asag[visual], or set TEST.NUM_PICTURES 0"
        )
        return []
    dicts = DatasetCatalog.get(dataset_name)
    class_names = MetadataCatalog.get(dataset_name).get("thing_classes", [])
    mapper = SparseDetectionMapper(cfg, is_train=False)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for index in spread(len(dicts), cfg.TEST.NUM_PICTURES):
        entry = dicts[index]
        image = np.ascontiguousarray(read_image(entry["file_name"], "RGB"))
        gt = training_instances(entry.get("annotations", []), T.NoOpTransform(), image.shape[:2])
        found = _predict(model, mapper, entry, image.shape[:2])
        drawn = draw_comparison(image, found, gt, class_names)
        path = folder / f"{_file_stem(entry)}.png"
        Image.fromarray(drawn).save(path)
        written.append(path)
    return written


def save_curves(folder: Path) -> None:
    """Draws the `metrics.json` of a folder as `curves.png`, if the packages are installed."""
    try:
        from .curves import plot_curves
    except ImportError as error:
        logger.warning(f"no curves: {error}; pip install asag[visual]")
        return
    plot_curves(folder / "metrics.json", folder / "curves.png")


def spread(count: int, requested: int) -> Sequence[int]:
    """Returns at most `requested` distinct indices below `count`, evenly spread from 0."""
    requested = min(requested, count)
    return [i * count // requested for i in range(requested)]


@torch.no_grad()
def _predict(
    model: nn.Module, mapper: SparseDetectionMapper, entry: dict[str, Any], hw: tuple[int, int]
) -> Any:
    was_training = model.training
    model.eval()
    try:
        sample = mapper(entry) | {"height": hw[0], "width": hw[1]}
        return model([sample])[0]["instances"].to("cpu")
    finally:
        model.train(was_training)


def _file_stem(entry: dict[str, Any]) -> str:
    """Image id and file name, which are often the same, as a file name of at most 200 bytes."""
    stem, image_id = Path(entry["file_name"]).stem, str(entry["image_id"])
    name = stem if image_id.endswith(stem) else f"{image_id}_{stem}"
    return re.sub(r"[^\w.-]+", "_", name).encode()[-200:].decode(errors="ignore")
