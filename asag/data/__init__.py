"""Data sets in the formats that people bring, generated shapes, the mapper and the loader."""

from asag.data.coco_layouts import CocoSplit, find_coco_splits
from asag.data.coco_report import DataChecks, DatasetReport
from asag.data.crowdhuman import register_crowdhuman
from asag.data.errors import DataIssue, DatasetError
from asag.data.formats import FoundDataset, find_dataset
from asag.data.image_io import ImageReadError, read_image
from asag.data.loader import SampleError, build_train_loader
from asag.data.mapper import SparseDetectionMapper
from asag.data.registration import RegisteredDataset, register_coco_splits, register_dataset
from asag.data.shapes import ShapesSpec, register_shapes

__all__ = [
    "CocoSplit",
    "DataChecks",
    "DataIssue",
    "DatasetError",
    "DatasetReport",
    "FoundDataset",
    "ImageReadError",
    "RegisteredDataset",
    "SampleError",
    "ShapesSpec",
    "SparseDetectionMapper",
    "build_train_loader",
    "find_coco_splits",
    "find_dataset",
    "read_image",
    "register_coco_splits",
    "register_crowdhuman",
    "register_dataset",
    "register_shapes",
]
