"""One refinement stage of any kind, with auxiliary copies beside it while training (ASAG, Section
3.4); or several in a row.

B images, N queries, S stages, C channels, K classes, P pooled positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from torch import Tensor, nn

from ....structures import ImageSizes, Predictions, Queries
from ...layers.boxes import at_least_float32
from ...layers.roi_align import PyramidRoIAlign, build_pooler
from ...registry import check_choice, check_features
from ..sparse_rcnn.build import build_attention, build_interaction
from ..sparse_rcnn.stage import DynamicConvStage
from .adamixer import AdaMixerStage
from .deformable import DeformableStage, read_memory

View = Any
"""What the stages of one kind read: pooled features, maps or a flattened memory."""

Reader = Callable[[Sequence[Tensor], ImageSizes], Callable[[Tensor], View]]
"""(maps, sizes) -> a function from boxes (B, N, 4) to what a stage at these boxes reads."""


@ROI_HEADS_REGISTRY.register()
class ParallelHeads(nn.Module):
    """Copies of the first stage that see the same queries, and stages that follow the main copy.

    All copies are supervised, each with its own matching; one is used for detection, the others
    vanish. Boxes are detached between stages, content is not.
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
            make_stage: builds one stage `(content, boxes_xyxy, view, mask) -> (logits, boxes,
                content)`.
            reader: makes what the stages read.
            dim: channels C.
            in_features: names of the feature maps, finest first.
            num_stages: stages in a row.
            num_auxiliary: further copies of the first stage.
            main: copy of the first stage that detects and that later stages follow.

        Raises:
            ValueError: a number is out of range; the message names its configuration key.
        """
        super().__init__()
        copies = 1 + num_auxiliary
        if num_stages < 1:
            raise ValueError(f"MODEL.DECODER.NUM_STAGES is {num_stages}; it must be at least 1")
        if num_auxiliary < 0:
            raise ValueError(f"MODEL.DECODER.NUM_AUXILIARY is {num_auxiliary}; it must be >= 0")
        if not -copies <= main < copies:
            raise ValueError(
                f"MODEL.DECODER.MAIN_COPY is {main}, but there are {copies} copies "
                "(MODEL.DECODER.NUM_AUXILIARY plus one)"
            )
        self.reader = reader
        self.in_features = tuple(in_features)
        self.copies = copies
        self.main = main % copies
        self.stages = nn.ModuleList(make_stage() for _ in range(copies + num_stages - 1))
        # What tells the copies apart, beside their weights.
        self.embedding = nn.Parameter(torch.randn(copies, dim))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        decoder, names = cfg.MODEL.DECODER, cfg.MODEL.ROI_HEADS.IN_FEATURES
        check_choice("MODEL.DECODER.STAGE", decoder.STAGE, tuple(STAGES))
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

    def forward(
        self, features: dict[str, Tensor], queries: Queries, sizes: ImageSizes
    ) -> Predictions:
        """Predictions: while training of the auxiliary copies, the main one and those that follow;
        else without the auxiliary ones. The generator's own come first.

        Args:
            features: name -> (B, C, H, W).
            queries: with boxes and content.
            sizes: of the B images.
        """
        read = self.reader([features[f] for f in self.in_features], sizes)
        boxes = queries.boxes_xyxy
        view = read(boxes)
        order = [i for i in range(self.copies) if i != self.main] if self.training else []
        outputs = [
            self.stages[i](queries.content + self.embedding[i], boxes, view, queries.mask)
            for i in (*order, self.main)
        ]
        for stage in self.stages[self.copies :]:
            _, boxes, content = outputs[-1]
            boxes = boxes.detach()
            outputs.append(stage(content, boxes, read(boxes), queries.mask))
        logits, refined, _ = zip(*outputs, strict=True)
        return Predictions.from_stages(queries, logits, refined)


class RoIReader:
    """Pooled features of every box, for dynamic convolution."""

    def __init__(self, pooler: PyramidRoIAlign) -> None:
        self.pooler = pooler

    def __call__(self, maps: Sequence[Tensor], sizes: ImageSizes) -> Callable[[Tensor], Tensor]:
        pyramid = self.pooler.prepare(maps)

        def read(boxes_xyxy: Tensor) -> Tensor:
            """(B, N, 4) -> (B * N, P, C)."""
            return self.pooler(pyramid, boxes_xyxy).flatten(2).transpose(1, 2)

        return read


def read_maps(maps: Sequence[Tensor], sizes: ImageSizes) -> Callable[[Tensor], list[Tensor]]:
    """The maps themselves, wherever the boxes are (AdaMixer)."""
    maps = [at_least_float32(x) for x in maps]
    return lambda boxes_xyxy: maps


def read_flattened(maps: Sequence[Tensor], sizes: ImageSizes) -> Callable[[Tensor], View]:
    """All levels in one sequence, wherever the boxes are (deformable attention)."""
    memory = read_memory(maps, sizes)
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
    decoder = cfg.MODEL.DECODER

    def make_stage() -> DynamicConvStage:
        return DynamicConvStage(
            attention=build_attention(cfg),
            interaction=build_interaction(cfg),
            num_cls_layers=decoder.NUM_CLS_LAYERS,
            num_reg_layers=decoder.NUM_REG_LAYERS,
            activation=decoder.ACTIVATION,
            **_common(cfg),
        )

    return make_stage, RoIReader(build_pooler(cfg, input_shape))


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
