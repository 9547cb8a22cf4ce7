"""Loading weights that others published, under their own names."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor

from .asag import ASAG
from .conditional_detr import CONDITIONAL_DETR
from .detr import CLASSIFIER, DETR, keep_used_classes
from .iou_sparse_rcnn import IOU_SPARSE_RCNN
from .mapping import NameTable
from .packing import PackedTable
from .sparse_rcnn import SPARSE_RCNN
from .swin import swin_to_ours

DETECTORS: tuple[NameTable | PackedTable, ...] = (
    SPARSE_RCNN,
    IOU_SPARSE_RCNN,
    DETR,
    CONDITIONAL_DETR,
    ASAG,
)

# Parameters that only a Swin Transformer by itself has: the authors' name, torchvision's name.
_SWIN_MARKS = ("patch_embed.norm.weight", "features.1.0.attn.relative_position_bias_table")


def to_library_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames a published state dict if its layout is known; otherwise returns it as it is.

    Args:
        state: parameter name -> tensor of a whole detector, or of a Swin Transformer.
    """
    if any(mark in state for mark in _SWIN_MARKS):
        return swin_to_ours(state)
    for table in DETECTORS:
        if table.covers(state):
            return table.to_ours(state)
    return dict(state)


class PublishedCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, which also reads checkpoints of the papers' authors and ImageNet
    weights of Swin Transformers."""

    def _load_file(self, filename: str) -> dict[str, Any]:
        # Some authors leave their command line in the file.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = super()._load_file(filename)
        # Files with matching heuristics are Detectron2's own business.
        if not loaded.get("matching_heuristics", False):
            loaded["model"] = to_library_names(loaded["model"])
            classifier = self.model.state_dict().get(f"{CLASSIFIER}.bias")
            if classifier is not None:
                loaded["model"] = keep_used_classes(loaded["model"], len(classifier))
        return loaded
