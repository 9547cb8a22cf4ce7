"""Published checkpoints: one table of names a source."""

from .mapping import NameTable
from .sparse_rcnn import SPARSE_RCNN

__all__ = ["SPARSE_RCNN", "NameTable"]
