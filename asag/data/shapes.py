"""A generated detection data set that needs no download: shapes on textured ground.

Every image is a pure function of (spec, split, index): the same pixels and the same annotation
bytes on every run. It is made on first use below `$DETECTRON2_DATASETS/shapes` (default
`./datasets/shapes`).

`shapes_train`, `shapes_val`: five classes told apart by outline only; color, texture, size,
rotation and stretch carry no information. `shapes_crowd_train`, `shapes_crowd_val`: heaps of
overlapping discs of one class, with regions of tiny discs to ignore (`iscrowd`).
"""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from asag.data.coco_json import read_coco_table
from asag.data.registration import dataset_dicts
from asag.data.shapes_drawing import OUTLINES, draw_scene

GENERATOR_VERSION = 5  # raise it when the same spec would give other pixels
ANNOTATION_FILE = "_annotations.coco.json"


@dataclass(frozen=True)
class ShapesSpec:
    """Specification of a generated data set.

    Attributes:
        name: prefix of the registered names and of the cache folder.
        class_names: outlines to draw, out of `shapes_drawing.OUTLINES`.
        height: of every image, pixels.
        width: of every image, pixels.
        objects: least and largest number of objects drawn in an image that has any.
        sizes: least and largest diameter relative to the shorter image side; log-uniform between
            them.
        empty: share of images without any object.
        min_visible: share of an object that must stay uncovered; objects hidden further are not
            drawn.
        heaps: 0 places objects freely; else they gather around this many points.
        ignore: share of images with one region of tiny objects, annotated as crowd.
        images: number of images of each split.
        seed: of the whole set.
        evaluator: `evaluator_type` of the metadata: "coco" or "crowdhuman".
    """

    name: str = "shapes"
    class_names: tuple[str, ...] = ("circle", "square", "triangle", "star", "ring")
    height: int = 128
    width: int = 160
    objects: tuple[int, int] = (4, 14)
    sizes: tuple[float, float] = (0.18, 0.9)
    empty: float = 0.04
    min_visible: float = 0.6
    heaps: int = 0
    ignore: float = 0.0
    images: tuple[tuple[str, int], ...] = (("train", 1000), ("val", 200))
    seed: int = 0
    evaluator: str = "coco"

    def __post_init__(self) -> None:
        unknown = set(self.class_names) - set(OUTLINES)
        if unknown or not self.class_names:
            known = ", ".join(OUTLINES)
            raise ValueError(f"ShapesSpec.class_names {sorted(unknown)} unknown; choose of {known}")
        if not 1 <= self.objects[0] <= self.objects[1]:
            raise ValueError(f"ShapesSpec.objects = {self.objects}: need 1 <= least <= largest")
        if not 0 < self.sizes[0] <= self.sizes[1] <= 1:
            raise ValueError(f"ShapesSpec.sizes = {self.sizes}: need 0 < least <= largest <= 1")
        if min(self.height, self.width) < 32:
            raise ValueError(f"ShapesSpec: {self.height}x{self.width} is below 32 pixels a side")

    @property
    def folder(self) -> str:
        """Name of the cache folder; differs for every difference in the pixels."""
        content = json.dumps([GENERATOR_VERSION, asdict(self)], sort_keys=True)
        return f"{self.name}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"


STANDARD = ShapesSpec()
CROWD = ShapesSpec(
    name="shapes_crowd",
    class_names=("circle",),
    objects=(16, 56),
    sizes=(0.12, 0.35),
    min_visible=0.15,
    heaps=3,
    ignore=0.2,
    images=(("train", 500), ("val", 100)),
    seed=1,
    evaluator="crowdhuman",
)


def shapes_root() -> Path:
    """Cache folder of all generated data sets."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "shapes"


def register_shapes(spec: ShapesSpec, root: Path | None = None) -> None:
    """Register `<spec.name>_<split>` for every split; images are made when a split is first loaded.

    Args:
        spec: what to draw.
        root: cache folder; default `shapes_root()`. Registering a name again replaces it.
    """
    root = root or shapes_root()
    for split, _ in spec.images:
        name = f"{spec.name}_{split}"
        for catalog in (DatasetCatalog, MetadataCatalog):
            if name in catalog:
                catalog.remove(name)
        folder = root / spec.folder / split
        DatasetCatalog.register(name, lambda split=split: load_shapes(spec, split, root))
        MetadataCatalog.get(name).set(
            json_file=str(folder / ANNOTATION_FILE),
            image_root=str(folder),
            evaluator_type=spec.evaluator,
            thing_classes=list(spec.class_names),
            thing_dataset_id_to_contiguous_id={k + 1: k for k in range(len(spec.class_names))},
        )


def load_shapes(spec: ShapesSpec, split: str, root: Path) -> list[dict]:
    """Detectron2's dataset dicts of one split, made first if need be."""
    folder = make_shapes(spec, split, root)
    return dataset_dicts(read_coco_table(folder / ANNOTATION_FILE, (folder,)))


def make_shapes(spec: ShapesSpec, split: str, root: Path) -> Path:
    """Make one split unless it is there, and return its folder.

    The folder appears at once and complete, so several processes may call this at the same time:
    the first to finish wins and the others drop their copy.

    Raises:
        KeyError: the spec has no such split.
        OSError: the cache folder cannot be written.
    """
    num_images = dict(spec.images)[split]
    folder = root / spec.folder / split
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{split}-", dir=folder.parent))
    try:
        scratch.chmod(0o755)  # mkdtemp's folders are private; a shared cache should be readable
        _write_split(spec, split, num_images, scratch)
        try:
            os.rename(scratch, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _write_split(spec: ShapesSpec, split: str, num_images: int, folder: Path) -> None:
    split_number = [name for name, _ in spec.images].index(split)
    images, annotations = [], []
    for index in range(num_images):
        rng = np.random.default_rng([spec.seed, split_number, index])
        scene = draw_scene(
            rng,
            height=spec.height,
            width=spec.width,
            class_names=spec.class_names,
            objects=spec.objects if rng.random() >= spec.empty else (0, 0),
            sizes=spec.sizes,
            min_visible=spec.min_visible,
            heaps=spec.heaps,
            ignore_region=rng.random() < spec.ignore,
        )
        file_name = f"{index:06d}.png"
        Image.fromarray(scene.pixels).save(folder / file_name, compress_level=1)
        images.append(
            {"id": index + 1, "file_name": file_name, "height": spec.height, "width": spec.width}
        )
        for (x, y, w, h), label, crowd in zip(
            scene.boxes_xywh, scene.labels, scene.iscrowd, strict=True
        ):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": label + 1,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(crowd),
                }
            )
    content = {
        "info": {"description": f"generated shapes, split {split}", "spec": asdict(spec)},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(spec.class_names)],
    }
    (folder / ANNOTATION_FILE).write_text(json.dumps(content, sort_keys=True))


register_shapes(STANDARD)
register_shapes(CROWD)
