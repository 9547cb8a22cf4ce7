"""Data sets in COCO format, the generated shapes, the mapper and the resumable loader."""

from asag.data.coco_folder import (
    CocoSplit,
    RegisteredFolder,
    find_coco_splits,
    register_coco_folder,
    register_coco_splits,
)
from asag.data.coco_report import DatasetReport
from asag.data.crowdhuman import register_crowdhuman
from asag.data.errors import DataIssue, DatasetError
from asag.data.image_io import ImageReadError, read_image
from asag.data.loader import SampleError, build_train_loader
from asag.data.mapper import SparseDetectionMapper
from asag.data.shapes import ShapesSpec, register_shapes

__all__ = [
    "CocoSplit",
    "DataIssue",
    "DatasetError",
    "DatasetReport",
    "ImageReadError",
    "RegisteredFolder",
    "SampleError",
    "ShapesSpec",
    "SparseDetectionMapper",
    "build_train_loader",
    "find_coco_splits",
    "read_image",
    "register_coco_folder",
    "register_coco_splits",
    "register_crowdhuman",
    "register_shapes",
]
