"""Published checkpoints: one table of names a source."""

from .conditional_detr import CONDITIONAL_DETR
from .detr import DETR
from .iou_sparse_rcnn import IOU_SPARSE_RCNN
from .mapping import NameTable
from .packing import PackedTable
from .sparse_rcnn import SPARSE_RCNN

__all__ = [
    "CONDITIONAL_DETR",
    "DETR",
    "IOU_SPARSE_RCNN",
    "SPARSE_RCNN",
    "NameTable",
    "PackedTable",
]
