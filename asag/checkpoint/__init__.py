"""Published checkpoints: one table of names a source."""

from .iou_sparse_rcnn import IOU_SPARSE_RCNN
from .mapping import NameTable
from .sparse_rcnn import SPARSE_RCNN

__all__ = ["IOU_SPARSE_RCNN", "SPARSE_RCNN", "NameTable"]
