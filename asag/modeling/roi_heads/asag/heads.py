"""ROI heads of ASAG: a refinement stage of any kind, with auxiliary copies beside it while training
(ASAG, Section 3.4).

B images, N queries, S stages, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from torch import Tensor, nn

from ....structures import ImageSizes, Queries
from ...layers.boxes import at_least_float32
from ...layers.deformable_attention import MultiScaleMemory, flatten_maps
from ...layers.roi_align import build_pooler
from ...registry import check_features
from ..sparse_rcnn.build import build_dynamic_conv_stage
from ..sparse_rcnn.heads import Reader, RefinementHeads, RoIReader, StageOutput, View
from .adamixer import AdaMixerStage
from .deformable import DeformableStage


@ROI_HEADS_REGISTRY.register()
class ParallelHeads(RefinementHeads):
    """Copies of the first stage that read the same queries, and stages that follow the main copy.

    In training all copies are supervised, each with its own matching. Inference runs the main copy
    only.
    """

    @configurable
    def __init__(
        self,
        *,
        make_stage: Callable[[], nn.Module],
        reader: Reader,
        dim: int,
        in_features: Sequence[str],
        num_stages: int = 1,
        num_auxiliary: int = 3,
        main: int = -1,
    ) -> None:
        """
        Args:
            make_stage, reader, in_features: as in `RefinementHeads`.
            dim: channels C.
            num_stages: stages in a row.
            num_auxiliary: further copies of the first stage.
            main: copy of the first stage that detects and that later stages follow.

        Raises:
            ValueError: there is no copy `main`.
        """
        copies = 1 + num_auxiliary
        if not -copies <= main < copies:
            raise ValueError(
                f"MODEL.DECODER.MAIN_COPY is {main}; it must be from {-copies} to {copies - 1} "
                f"with MODEL.DECODER.NUM_AUXILIARY {num_auxiliary}"
            )
        super().__init__(
            make_stage=make_stage,
            num_stages=copies + num_stages - 1,
            reader=reader,
            in_features=in_features,
        )
        self.num_parallel = copies
        self.main = main % copies
        # Added to the content, so that copies differ in more than their weights.
        self.embedding = nn.Parameter(torch.randn(copies, dim))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        decoder, names = cfg.MODEL.DECODER, cfg.MODEL.ROI_HEADS.IN_FEATURES
        check_features("MODEL.ROI_HEADS.IN_FEATURES", names, input_shape, decoder.HIDDEN_DIM)
        make_stage, reader = STAGES[decoder.STAGE](cfg, input_shape)
        return {
            "make_stage": make_stage,
            "reader": reader,
            "dim": decoder.HIDDEN_DIM,
            "in_features": names,
            "num_stages": decoder.NUM_STAGES,
            "num_auxiliary": decoder.NUM_AUXILIARY,
            "main": decoder.MAIN_COPY,
        }

    def first_outputs(self, queries: Queries, view: View) -> list[StageOutput]:
        """Runs the auxiliary copies while training, then the main one."""
        copies = [i for i in range(self.num_parallel) if i != self.main] if self.training else []
        return [
            self.stages[i](
                queries.content + self.embedding[i], queries.boxes_xyxy, view, queries.mask
            )
            for i in (*copies, self.main)
        ]


def read_maps(maps: Sequence[Tensor], sizes: ImageSizes) -> Callable[[Tensor], list[Tensor]]:
    """Reader of AdaMixer stages: the feature maps, the same for all boxes."""
    maps = [at_least_float32(x) for x in maps]
    return lambda boxes_xyxy: maps


def read_flattened(
    maps: Sequence[Tensor], sizes: ImageSizes
) -> Callable[[Tensor], MultiScaleMemory]:
    """Reader of deformable stages: all levels in one sequence, the same for all boxes."""
    memory = flatten_maps(maps, sizes)
    return lambda boxes_xyxy: memory


def _common(cfg: CfgNode) -> dict[str, Any]:
    decoder = cfg.MODEL.DECODER
    focal = cfg.MODEL.CRITERION.CLASS_LOSS == "focal"
    return {
        "dim": decoder.HIDDEN_DIM,
        "num_logits": cfg.MODEL.ROI_HEADS.NUM_CLASSES + (not focal),
        "dropout": decoder.DROPOUT,
        "prior_prob": decoder.PRIOR_PROB if focal else None,
    }


def _dynamic_conv(
    cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]
) -> tuple[Callable[[], nn.Module], Reader]:
    return partial(build_dynamic_conv_stage, cfg), RoIReader(build_pooler(cfg, input_shape))


def _adamixer(
    cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]
) -> tuple[Callable[[], nn.Module], Reader]:
    decoder = cfg.MODEL.DECODER

    def make_stage() -> AdaMixerStage:
        return AdaMixerStage(
            strides=[input_shape[f].stride for f in cfg.MODEL.ROI_HEADS.IN_FEATURES],
            num_heads=decoder.NUM_HEADS,
            ffn_dim=decoder.FFN_DIM,
            groups=decoder.MIXER_GROUPS,
            in_points=decoder.MIXER_IN_POINTS,
            out_points=decoder.MIXER_OUT_POINTS,
            num_cls_layers=decoder.NUM_CLS_LAYERS,
            num_reg_layers=decoder.NUM_REG_LAYERS,
            activation=decoder.ACTIVATION,
            **_common(cfg),
        )

    return make_stage, read_maps


def _deformable(
    cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]
) -> tuple[Callable[[], nn.Module], Reader]:
    decoder = cfg.MODEL.DECODER

    def make_stage() -> DeformableStage:
        return DeformableStage(
            num_heads=decoder.NUM_HEADS,
            num_levels=len(cfg.MODEL.ROI_HEADS.IN_FEATURES),
            num_points=decoder.DEFORMABLE_POINTS,
            ffn_dim=decoder.FFN_DIM,
            num_reg_layers=decoder.NUM_REG_LAYERS,
            activation=decoder.ACTIVATION,
            **_common(cfg),
        )

    return make_stage, read_flattened


STAGES: dict[str, Callable[[CfgNode, Mapping[str, ShapeSpec]], tuple]] = {
    "dynamic_conv": _dynamic_conv,
    "adamixer": _adamixer,
    "deformable": _deformable,
}
