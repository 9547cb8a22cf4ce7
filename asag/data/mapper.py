"""From a dataset dict to a training or test sample: read, augment, clip, sort out.

The recipe of Sparse R-CNN and the DETR family: flip, then with probability PROB a resize to a small
size and a random crop, then the multi-scale resize (configured by Detectron2's INPUT.* keys, plus
INPUT.CROP.PRE_RESIZE and INPUT.CROP.PROB).
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.structures import Boxes, BoxMode, Instances

from asag.data.image_io import read_image

IMAGE_FORMATS = ("RGB", "BGR", "L", "YUV-BT.601")
CROP_TYPES = ("relative_range", "relative", "absolute", "absolute_range")
MIN_BOX_SIDE = 1e-5  # pixels of the network input; smaller boxes have no area to learn from


class SparseDetectionMapper:
    """Callable that turns one of Detectron2's dataset dicts into one model input.

    Training samples have `image` (C, H, W) uint8 tensor in `image_format` order, `instances` with
    `gt_boxes` (absolute XYXY in the augmented image) and `gt_classes` (int64), and every other key
    of the dict. Crowd regions and boxes that vanish in a crop are left out; images without objects
    are kept. Test samples have no `instances`. Input dicts are not changed.
    """

    @configurable
    def __init__(
        self,
        *,
        is_train: bool,
        augmentations: Sequence[T.Augmentation],
        image_format: str,
        max_pixels: int | None = None,
    ) -> None:
        """
        Args:
            is_train: whether to prepare `instances`.
            augmentations: applied in this order to image and boxes.
            image_format: one of `IMAGE_FORMATS`.
            max_pixels: larger images are an error, see `asag.data.image_io.open_image`.
        """
        if image_format not in IMAGE_FORMATS:
            raise ValueError(f"INPUT.FORMAT = {image_format!r}: use one of {IMAGE_FORMATS}")
        self.is_train = is_train
        self.augmentations = T.AugmentationList(list(augmentations))
        self.image_format = image_format
        self.max_pixels = max_pixels

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Read INPUT.*; see `train_augmentations` and `eval_augmentations` for the keys."""
        augmentations = train_augmentations(cfg) if is_train else eval_augmentations(cfg)
        return {
            "is_train": is_train,
            "augmentations": augmentations,
            "image_format": cfg.INPUT.FORMAT,
            "max_pixels": cfg.INPUT.MAX_PIXELS,
        }

    @classmethod
    def without_augmentation(cls, cfg: CfgNode) -> "SparseDetectionMapper":
        """Build a mapper for training samples that are resized as for testing."""
        augmentations = eval_augmentations(cfg)
        return cls(is_train=True, augmentations=augmentations, image_format=cfg.INPUT.FORMAT)

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Make one sample.

        Raises:
            ImageReadError: the image file is absent, truncated or not an image.
            SizeMismatchError: the image has another size than its annotation says.
        """
        sample = {key: value for key, value in dataset_dict.items() if key != "annotations"}
        sample = copy.deepcopy(sample)
        image = read_image(sample["file_name"], self.image_format, max_pixels=self.max_pixels)
        _check_size(sample, image)

        augmented = T.AugInput(image)
        transforms = self.augmentations(augmented)
        image = np.ascontiguousarray(augmented.image.transpose(2, 0, 1))
        sample["image"] = torch.as_tensor(image)
        if self.is_train:
            sample["instances"] = training_instances(
                dataset_dict.get("annotations", []), transforms, image.shape[1:]
            )
        return sample

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(is_train={self.is_train}, image_format={self.image_format}, "
            f"augmentations={self.augmentations})"
        )


def training_instances(
    annotations: Sequence[dict[str, Any]], transforms: T.Transform, image_hw: tuple[int, int]
) -> Instances:
    """Ground truth of one augmented image, all boxes at once.

    Args:
        annotations: of one image, in Detectron2's form (`bbox`, `bbox_mode`, `category_id`,
            `iscrowd`).
        transforms: what was applied to the image.
        image_hw: size of the augmented image, to which boxes are clipped.
    """
    objects = [a for a in annotations if not a.get("iscrowd", 0)]
    boxes = np.array([a["bbox"] for a in objects], dtype=np.float64).reshape(-1, 4)
    modes = np.array([a["bbox_mode"] for a in objects])
    for mode in np.unique(modes):
        rows = modes == mode
        boxes[rows] = BoxMode.convert(boxes[rows], BoxMode(int(mode)), BoxMode.XYXY_ABS)
    boxes_xyxy = transforms.apply_box(boxes)
    gt_boxes = Boxes(torch.as_tensor(boxes_xyxy, dtype=torch.float32))
    gt_boxes.clip(image_hw)
    instances = Instances(image_hw)
    instances.gt_boxes = gt_boxes
    labels = [a["category_id"] for a in objects]
    instances.gt_classes = torch.tensor(labels, dtype=torch.int64)
    return instances[gt_boxes.nonempty(MIN_BOX_SIDE)]


class ResizeShortestEdge(T.ResizeShortestEdge):
    """Detectron2's, which leaves nothing of the short side of an image a thousand times as long."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """As Detectron2, with at least one pixel a side."""
        resize = super().get_transform(image)
        if isinstance(resize, T.ResizeTransform) and min(resize.new_h, resize.new_w) < 1:
            new_h, new_w = max(resize.new_h, 1), max(resize.new_w, 1)
            return T.ResizeTransform(resize.h, resize.w, new_h, new_w, resize.interp)
        return resize


def _check_size(sample: dict[str, Any], image: np.ndarray) -> None:
    """Fills in the size of the image; raises SizeMismatchError if it is not the annotated one."""
    height, width = image.shape[:2]
    annotated = sample.setdefault("height", height), sample.setdefault("width", width)
    if annotated != (height, width):
        turned = " (it is turned by its EXIF orientation)" * (annotated == (width, height))
        raise detection_utils.SizeMismatchError(
            f"image {sample['file_name']} has {width} x {height} pixels{turned}, but its "
            f"annotation says {annotated[1]} x {annotated[0]}. Correct the annotation: size and "
            "boxes are those of the upright picture"
        )


def train_augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """Flip, then (resize, crop) with some probability, then resize.

    Keys: INPUT.RANDOM_FLIP, INPUT.MIN_SIZE_TRAIN, INPUT.MAX_SIZE_TRAIN,
    INPUT.MIN_SIZE_TRAIN_SAMPLING and INPUT.CROP.{ENABLED, TYPE, SIZE, PRE_RESIZE, PROB}.

    Raises:
        ValueError: naming the key and what it may be.
    """
    flip, sampling = cfg.INPUT.RANDOM_FLIP, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
    _require_one_of("INPUT.RANDOM_FLIP", flip, ("none", "horizontal", "vertical"))
    _require_one_of("INPUT.MIN_SIZE_TRAIN_SAMPLING", sampling, ("choice", "range"))
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    _require(
        sampling == "choice" or len(sizes) == 2,
        "INPUT.MIN_SIZE_TRAIN",
        sizes,
        "the least and the largest size, or set INPUT.MIN_SIZE_TRAIN_SAMPLING to choice",
    )
    augmentations: list[T.Augmentation] = []
    if flip != "none":
        augmentations.append(
            T.RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical")
        )
    if cfg.INPUT.CROP.ENABLED:
        augmentations.append(_crop_pair(cfg.INPUT.CROP))
    augmentations.append(ResizeShortestEdge(sizes, cfg.INPUT.MAX_SIZE_TRAIN, sampling))
    return augmentations


def eval_augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """Resize to INPUT.MIN_SIZE_TEST and INPUT.MAX_SIZE_TEST; a short side of 0 does not resize."""
    size = cfg.INPUT.MIN_SIZE_TEST
    return [ResizeShortestEdge(size, cfg.INPUT.MAX_SIZE_TEST, "choice")] if size else []


def _crop_pair(crop: CfgNode) -> T.Augmentation:
    """Resize and crop of the DETR family, applied together or not at all."""
    _require_one_of("INPUT.CROP.TYPE", crop.TYPE, CROP_TYPES)
    _require(0 <= crop.PROB <= 1, "INPUT.CROP.PROB", crop.PROB, "a probability from 0 to 1")
    _require(
        len(crop.PRE_RESIZE) > 0 and min(crop.PRE_RESIZE) > 0,
        "INPUT.CROP.PRE_RESIZE",
        crop.PRE_RESIZE,
        "one or more short sides in pixels",
    )
    in_order = crop.TYPE != "absolute_range" or crop.SIZE[0] <= crop.SIZE[-1]
    _require(
        len(crop.SIZE) == 2 and min(crop.SIZE) > 0 and in_order,
        "INPUT.CROP.SIZE",
        crop.SIZE,
        "two positive numbers, the smaller one first for absolute_range",
    )
    # The recipe bounds only the short side before the crop.
    resize = ResizeShortestEdge(tuple(crop.PRE_RESIZE), sample_style="choice")
    pair = T.AugmentationList([resize, T.RandomCrop(crop.TYPE, tuple(crop.SIZE))])
    return T.RandomApply(pair, prob=crop.PROB)


def _require_one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, key, value, "one of " + ", ".join(allowed))


def _require(condition: bool, key: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{key} = {value!r}: use {allowed}")
