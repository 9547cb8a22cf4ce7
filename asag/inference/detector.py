"""Detection in three lines: a detector by name, pictures of any kind, results that draw themselves.

    >>> from asag import Detector
    >>> detector = Detector.from_pretrained()
    >>> found = detector.predict("picture.png", threshold=0.3)
    >>> found.save("drawn.png")

B pictures, n objects of a picture, H, W its height and width.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import Tensor

from .. import model_zoo
from .images import to_rgb
from .predictor import Predictor

if TYPE_CHECKING:
    from .images import ImageLike


class Detection(NamedTuple):
    """One object.

    Attributes:
        box_xyxy: left, top, right, bottom in pixels of the picture.
        score: 0 to 1.
        label: index of the class.
        name: of the class.
    """

    box_xyxy: tuple[float, float, float, float]
    score: float
    label: int
    name: str


@dataclass(frozen=True, eq=False)
class Detections:
    """Detections of one image, by falling score.

    Attributes:
        boxes_xyxy: (n, 4) float32, left, top, right, bottom in pixels of the upright picture.
        scores: (n,) float32, 0 to 1.
        labels: (n,) int64, indices into `class_names`.
        class_names: index -> name.
        image_rgb: the picture, (H, W, 3) uint8.

    All tensors are on the CPU. Boxes end at the borders of the picture, unless the model's source
    leaves them as predicted (MODEL.CLIP_BOXES; MMDetection's Sparse R-CNN).
    """

    boxes_xyxy: Tensor
    scores: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    image_rgb: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detection]:
        rows = zip(
            self.boxes_xyxy.tolist(), self.scores.tolist(), self.labels.tolist(), strict=True
        )
        for box, score, label in rows:
            yield Detection(tuple(box), score, label, self.class_names[label])

    def __getitem__(self, index: int) -> Detection:
        label = int(self.labels[index])
        box = tuple(self.boxes_xyxy[index].tolist())
        return Detection(box, float(self.scores[index]), label, self.class_names[label])

    def __repr__(self) -> str:
        height, width = self.image_size
        best = ", ".join(f"{x.name} {x.score:.2f}" for x, _ in zip(self, range(5), strict=False))
        more = ", ..." if len(self) > 5 else ""
        listed = f": {best}{more}" if best else ""
        return f"<Detections of {len(self)} in {width}x{height} pixels{listed}>"

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the picture."""
        return self.image_rgb.shape[0], self.image_rgb.shape[1]

    def draw(self) -> Image.Image:
        """The picture with boxes, names and scores; small pictures are enlarged for them."""
        from ..visualization.detections import draw_detections  # brings matplotlib along

        drawn = draw_detections(self.image_rgb, self.to_instances(), self.class_names, 0.0)
        return Image.fromarray(drawn)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Draws into a file, whose suffix gives the format."""
        self.draw().save(path)

    def to_instances(self) -> Instances:
        """In Detectron2's form: `pred_boxes`, `scores`, `pred_classes`."""
        found = Instances(self.image_size)
        found.pred_boxes = Boxes(self.boxes_xyxy)
        found.scores = self.scores
        found.pred_classes = self.labels
        return found

    def to_coco(
        self, image_id: int | str, category_ids: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """As entries of a COCO result file.

        Args:
            image_id: of the picture in the annotation file.
            category_ids: label -> category id of the annotation file; default: the label.

        Returns:
            `image_id`, `category_id`, `bbox` (x, y, width, height), `score` of every object.
        """
        return [
            {
                "image_id": image_id,
                "category_id": x.label if category_ids is None else category_ids[x.label],
                "bbox": [left, top, right - left, bottom - top],
                "score": x.score,
            }
            for x in self
            for left, top, right, bottom in [x.box_xyxy]
        ]

    def to_dicts(self) -> list[dict[str, Any]]:
        """Plain numbers and strings: `name`, `label`, `score`, `box_xyxy` of every object."""
        return [{**x._asdict(), "box_xyxy": list(x.box_xyxy)} for x in self]


class Detector:
    """A trained model that takes pictures as they come.

    Colors cannot be confused silently: files and Pillow images know theirs, arrays and tensors are
    RGB unless `color_order="BGR"` says that they come from OpenCV.
    """

    def __init__(self, predictor: Predictor, source: str | None = None) -> None:
        """
        Args:
            predictor: model, resize and class names.
            source: where the model came from, see `from_pretrained`; None cannot be trained.
        """
        self.predictor = predictor
        self.source = source

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] = model_zoo.PHOTOGRAPHS,
        *,
        weights: str | os.PathLike[str] | None = None,
        device: str | None = None,
        batch_size: int = 8,
        options: Sequence[str] = (),
    ) -> Detector:
        """A detector with weights.

        Args:
            source: default: the model that comes with the library and knows photographs of people
                and animals. Or a name of `asag.model_zoo.names()`, whose weights come
                with the library or are downloaded; the folder of a training run; a
                file of weights with config.yaml beside it; a yaml file;
                hf://owner/name[@revision][/file], a Hugging Face repository with config.yaml.
            weights: file or address of weights for the model that `source` names.
            device: "cpu", "cuda", ...; default: a GPU if there is one.
            batch_size: pictures that go through the model together, at most.
            options: KEY VALUE words that override the configuration.

        Raises:
            FileNotFoundError: a file is missing; the message says which one and what to do.
            DownloadError: weights cannot be downloaded; the message has address and place.
            KeyError: no such name or configuration key; the message has the nearest ones.
            ValueError: there are no weights, or they are not of this model.
        """
        cfg = model_zoo.locate(source, weights=weights, options=options)
        cfg.MODEL.DEVICE = model_zoo.choose_device(device)
        trainable = weights is None and not options
        return cls(
            Predictor.from_config(cfg, batch_size=batch_size),
            source=os.fspath(source) if trainable else None,
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        """Index -> name."""
        return self.predictor.class_names

    def predict(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        threshold: float = 0.3,
        color_order: str = "RGB",
    ) -> Detections | list[Detections]:
        """Finds objects.

        Args:
            images: one picture, or a list or tuple of pictures of any sizes. A picture is a path,
                a Pillow image of any mode, an (H, W, 3) uint8 array or a (3, H, W) uint8 tensor.
                The orientation that a camera noted (EXIF) is applied, as viewers do.
            threshold: objects scored below are left out, 0 to 1.
            color_order: channels of arrays and tensors, "RGB" or "BGR" (OpenCV); files and Pillow
                images know theirs.

        Returns:
            `Detections`, or a list of them for a list.

        Raises:
            ImageReadError: a file is absent or not an image.
            TypeError: a picture of another kind.
            ValueError: wrong shape, dtype, threshold or color order.
        """
        single = not isinstance(images, list | tuple)
        images_rgb = to_rgb([images] if single else images, color_order)
        results = [
            self._detections(image_rgb, found)
            for image_rgb, found in zip(
                images_rgb, self.predictor(images_rgb, threshold=threshold), strict=True
            )
        ]
        return results[0] if single else results

    def train(
        self,
        data: str | os.PathLike[str],
        *,
        epochs: float | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        options: Sequence[str] = (),
    ) -> tuple[Detector, Path]:
        """Fine-tunes the model on images of one's own, as `train_net.py --data DIR --model NAME`
        does, but without the report; this detector stays as it is.

        Args:
            data: folder, data.yaml, COCO JSON file or zip, see `asag.data.register_dataset`.
            epochs: passes over the training images; default: as many as suit their number.
            output_dir: folder of the run; default: output/<name of the model>.
            options: KEY VALUE words that override the configuration.

        Returns:
            A detector of the best weights, and the folder of the run. Classes are those of the
            data; what the model knew of those of equal name is kept.

        Raises:
            DatasetError: the files cannot be used.
            ValueError: the detector was not loaded by name or from a folder alone, or a key has a
                wrong value.
        """
        from ..engine.defaults import train_on  # brings the trainer along

        if self.source is None:
            raise ValueError(
                "this detector was not loaded by Detector.from_pretrained(NAME OR FOLDER) without "
                "other weights and options, so its training has no place to start from"
            )
        device = str(next(self.predictor.model.parameters()).device)
        words = [*options, "MODEL.DEVICE", device]
        if epochs is not None:
            words += ["SOLVER.EPOCHS", str(float(epochs))]
        if output_dir is not None:
            words += ["OUTPUT_DIR", os.fspath(output_dir)]
        folder = train_on(data, self.source, words)
        return Detector.from_pretrained(folder, device=device), folder

    def _detections(self, image_rgb: np.ndarray, found: Instances) -> Detections:
        return Detections(
            boxes_xyxy=found.pred_boxes.tensor.float(),
            scores=found.scores.float(),
            labels=found.pred_classes,
            class_names=self.class_names,
            image_rgb=image_rgb,
        )
