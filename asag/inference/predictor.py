"""Detections for pictures in memory: resize, batch, run the model, scale back.

B images of a batch, H, W picture size, K classes.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.structures import Instances
from torch import Tensor, nn

from ..checkpoint.loading import load_weights
from ..data.mapper import eval_augmentations
from .images import ImageLike, check_rgb, check_threshold, to_rgb

logger = logging.getLogger(__name__)


class Predictor:
    """Callable that turns RGB pictures of any sizes into detections.

    Pictures share a batch only if they are padded to the same size, so that what is found in one
    does not depend on its neighbors.

    Example:
        >>> cfg = load_config("config.yaml", ["MODEL.WEIGHTS", "model_final.pth"])
        >>> predictor = Predictor.from_config(cfg)
        >>> (detections,) = predictor([read_image("street.jpg", "RGB")])
        >>> names = [predictor.class_names[k] for k in detections.pred_classes]
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        class_names: Sequence[str],
        augmentations: Sequence[T.Augmentation] = (),
        image_format: str = "RGB",
        batch_size: int = 8,
        score_threshold: float = 0.0,
    ) -> None:
        """
        Args:
            model: any of Detectron2's box detectors; it is put into evaluation mode.
            class_names: index -> name, K of them.
            augmentations: what every picture goes through first: the resize.
            image_format: color order that the model expects, "RGB" or "BGR".
            batch_size: pictures that go through the model together, at most.
            score_threshold: detections scored below are left out, 0 to 1.

        Raises:
            ValueError: a value out of its range.
        """
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"INPUT.FORMAT is {image_format!r}; prediction knows 'RGB' and 'BGR'")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self.model = model.eval()
        self.class_names = tuple(class_names)
        self.augmentations = T.AugmentationList(list(augmentations))
        self.image_format = image_format
        self.batch_size = batch_size
        self.score_threshold = check_threshold(score_threshold)
        self._divisor = getattr(getattr(model, "backbone", None), "size_divisibility", 0) or 1

    @classmethod
    def from_config(
        cls, cfg: CfgNode, *, batch_size: int = 8, score_threshold: float = 0.0
    ) -> Predictor:
        """Builds the model of a configuration on MODEL.DEVICE and loads MODEL.WEIGHTS.

        An empty MODEL.WEIGHTS leaves the random initial weights.

        Raises:
            FileNotFoundError: MODEL.WEIGHTS does not exist.
            ValueError: the weights are not of this model.
        """
        model = build_model(cfg)
        checkpoint = {}
        if cfg.MODEL.WEIGHTS:
            checkpoint = load_weights(model, cfg.MODEL.WEIGHTS, use_average=cfg.TEST.EMA_WEIGHTS)
        return cls(
            model,
            class_names=find_class_names(cfg, checkpoint),
            augmentations=eval_augmentations(cfg),
            image_format=cfg.INPUT.FORMAT,
            batch_size=batch_size,
            score_threshold=score_threshold,
        )

    def __call__(
        self, images: Sequence[ImageLike], *, threshold: float | None = None
    ) -> list[Instances]:
        """Detects objects in images.

        Args:
            images: see `images.ImageLike`; arrays and tensors in RGB order, sizes may differ.
            threshold: detections scored below are left out; default: that of the predictor.

        Returns:
            One `Instances` an image, on the CPU, by falling score: `pred_boxes` in absolute xyxy
            pixels of the upright image, `scores`, `pred_classes`.

        Raises:
            ImageReadError: a file is missing or not an image.
            TypeError, ValueError: an image of another kind, shape or dtype; the message has its
                position.
        """
        return self.detect([self.prepare(x) for x in to_rgb(images)], threshold=threshold)

    def prepare(self, image_rgb: np.ndarray) -> dict[str, Any]:
        """Model input of one picture: `image` (3, H', W') uint8, `height` and `width` as given.

        It touches neither model nor device, and may run in other threads while the model works.

        Raises:
            ValueError: not an (H, W, 3) uint8 array, or an empty one.
        """
        height, width = check_rgb(image_rgb).shape[:2]
        augmented = T.AugInput(image_rgb)
        self.augmentations(augmented)
        image = augmented.image
        if self.image_format == "BGR":
            image = image[:, :, ::-1]
        chw = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return {"image": chw, "height": height, "width": width}

    @torch.no_grad()
    def detect(
        self, inputs: Sequence[dict[str, Any]], *, threshold: float | None = None
    ) -> list[Instances]:
        """Runs the model on inputs made by `prepare`; returns the detections in their order."""
        threshold = self.score_threshold if threshold is None else check_threshold(threshold)
        found: list[Instances | None] = [None] * len(inputs)
        for members in self._batches([x["image"] for x in inputs]):
            outputs = self.model([inputs[i] for i in members])
            for i, output in zip(members, outputs, strict=True):
                instances = output["instances"].to("cpu")
                found[i] = instances[instances.scores >= threshold]
        return [x for x in found if x is not None]

    def _batches(self, images: Sequence[Tensor]) -> Iterator[list[int]]:
        """Indices of images that are padded to the same size, at most `batch_size` together."""
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, image in enumerate(images):
            padded = tuple(-(-side // self._divisor) * self._divisor for side in image.shape[1:])
            groups[padded].append(i)
        for members in groups.values():
            for start in range(0, len(members), self.batch_size):
                yield members[start : start + self.batch_size]


def find_class_names(cfg: CfgNode, checkpoint: dict[str, Any]) -> list[str]:
    """Class names of the checkpoint, else of the metadata of DATASETS.TEST, else "class 0", ...

    Names whose number differs from MODEL.ROI_HEADS.NUM_CLASSES belong to another data set and are
    passed over, with a warning.
    """
    count = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    sources = [(Path(cfg.MODEL.WEIGHTS).name, checkpoint.get("class_names"))]
    for name in cfg.DATASETS.TEST:
        if name in MetadataCatalog.list():  # asking for an unknown one would create it
            sources.append((name, getattr(MetadataCatalog.get(name), "thing_classes", None)))
    for source, names in sources:
        if names is None:
            continue
        if len(names) == count:
            return list(names)
        logger.warning(
            "%s names %d classes, but MODEL.ROI_HEADS.NUM_CLASSES is %d: names not used",
            source,
            len(names),
            count,
        )
    return [f"class {k}" for k in range(count)]
