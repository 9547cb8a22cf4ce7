"""Small data sets as people bring them, for the tests of readers and evaluators."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

from asag.data import RegisteredDataset
from asag.evaluation import build_evaluator
from asag.evaluation.coco import RESULTS_FILE

WIDTH, HEIGHT = 160, 128
CLASSES = ("cat", "dog")

Change = Callable[[str, dict[str, Any]], Any]


def coco_split(name: str, count: int, per_image: int = 3) -> dict[str, Any]:
    """The annotations of one split: boxes of 20 to 60 pixels inside of their images."""
    rng = random.Random(name)
    images, annotations = [], []
    for number in range(1, count + 1):
        file = f"{number:03d}.png"
        images.append({"id": number, "file_name": file, "width": WIDTH, "height": HEIGHT})
        for _ in range(per_image):
            w, h = rng.randint(20, 60), rng.randint(20, 60)
            box = [rng.randint(0, WIDTH - w), rng.randint(0, HEIGHT - h), w, h]
            entry = {"id": len(annotations) + 1, "image_id": number, "bbox": box, "iscrowd": 0}
            label = len(annotations) % len(CLASSES) + 1
            annotations.append(entry | {"category_id": label, "area": w * h})
    categories = [{"id": k, "name": name} for k, name in enumerate(CLASSES, start=1)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def write_image(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Path:
    """An image of one color that its name decides."""
    path.parent.mkdir(parents=True, exist_ok=True)
    color = random.Random(str(path)).choices(range(256), k=3)
    Image.new("RGB", size, tuple(color)).save(path)
    return path


def write_roboflow(
    folder: Path, change: Change | None = None, *, train: int = 4, val: int = 2
) -> Path:
    """`train/_annotations.coco.json` and `valid/_annotations.coco.json` with images beside them.

    `change(split, data)` edits the annotations once the images are there.
    """
    for name, count in (("train", train), ("valid", val)):
        data = coco_split(name, count)
        for image in data["images"]:
            write_image(folder / name / image["file_name"])
        if change is not None:
            change(name, data)
        text = json.dumps(data)
        (folder / name / "_annotations.coco.json").write_text(text, encoding="utf-8")
    return folder


def evaluate_perfect(
    registered: RegisteredDataset, output_dir: Path, *, difficult: bool = True
) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """Evaluates detections equal to the objects of the evaluation set, in the way of a training.

    Args:
        registered: the data.
        output_dir: where the evaluator writes.
        difficult: whether difficult objects are detected as well.

    Returns:
        The results, and the written detections.
    """
    evaluator = build_evaluator(registered.val, str(output_dir))
    evaluator.reset()
    for entry in DatasetCatalog.get(registered.val):
        objects = [
            x
            for x in entry["annotations"]
            if not x["iscrowd"] and (difficult or not x.get("difficult"))
        ]
        boxes = np.array([x["bbox"] for x in objects]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances = Instances((entry["height"], entry["width"]))
        instances.pred_boxes = Boxes(torch.as_tensor(boxes))
        instances.pred_classes = torch.tensor([x["category_id"] for x in objects], dtype=torch.long)
        instances.scores = torch.full((len(objects),), 0.5)
        evaluator.process([entry], [{"instances": instances}])
    results = evaluator.evaluate()
    return results, json.loads((output_dir / RESULTS_FILE).read_text(encoding="utf-8"))
