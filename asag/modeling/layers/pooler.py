"""Which RoIAlign a configuration asks for."""

from __future__ import annotations

from collections.abc import Mapping

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec

from ..registry import check_choice
from .roi_align import PyramidRoIAlign

# Epsilon of the level rule: torchvision's pooler, which goes with the legacy alignment, and
# Detectron2's.
LEVEL_EPS = {"ROIAlign": 1e-6, "ROIAlignV2": 1e-8}


def build_pooler(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> PyramidRoIAlign:
    """RoIAlign on the maps of `MODEL.ROI_HEADS.IN_FEATURES`, by `MODEL.ROI_BOX_HEAD.POOLER_*`."""
    box_head = cfg.MODEL.ROI_BOX_HEAD
    check_choice("MODEL.ROI_BOX_HEAD.POOLER_TYPE", box_head.POOLER_TYPE, tuple(LEVEL_EPS))
    return PyramidRoIAlign(
        strides=[input_shape[name].stride for name in cfg.MODEL.ROI_HEADS.IN_FEATURES],
        output_size=box_head.POOLER_RESOLUTION,
        sampling_ratio=box_head.POOLER_SAMPLING_RATIO,
        aligned=box_head.POOLER_TYPE == "ROIAlignV2",
        level_eps=LEVEL_EPS[box_head.POOLER_TYPE],
    )
