"""ROI heads of DETR and Conditional DETR: decoder stages over one feature map.

B images, N queries, L positions of the feature map, S stages, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from torch import Tensor, nn

from ....structures import ImageSizes, Predictions, Queries
from ...layers.attention import SelfAttention
from ...layers.boxes import at_least_float32, cxcywh_to_xyxy
from ...layers.feed_forward import make_mlp
from ...layers.init import prior_bias, xavier_init_matrices
from ...layers.position_encoding import FeaturePositions, inverse_sigmoid, sine_embedding
from ..sparse_rcnn.iou_esa import IoUEnhancedSelfAttention
from .conditional_attention import (
    ConditionalCrossAttention,
    ConditionalSelfAttention,
    IoUEnhancedConditionalSelfAttention,
    SpatialQuery,
)
from .cross_attention import DETRCrossAttention
from .decoder_stage import ChannelWeightedDecoderStage, DecoderStage


@ROI_HEADS_REGISTRY.register()
class DETRHeads(nn.Module):
    """Decoder stages with shared class and box heads.

    Keys and values of all stages are projected at once, and the heads run once for all stages. The
    stages pass on the embedding before the final norm.
    """

    SETTINGS: ClassVar[dict[str, str]] = {"MODEL.DECODER.REFERENCE_EPS": "reference_eps"}

    @configurable
    def __init__(
        self,
        *,
        make_stage: Callable[[int], DecoderStage],
        num_stages: int,
        dim: int,
        num_logits: int,
        in_feature: str,
        positions: FeaturePositions,
        prior_prob: float | None = None,
        offsets: bool = False,
        box_feedback: bool = False,
        spatial_query: SpatialQuery | None = None,
        reference_eps: float = 1e-5,
    ) -> None:
        """
        Args:
            make_stage: builds the stage of an index, starting from 0.
            num_stages: S.
            dim: channels C.
            num_logits: K, or K + 1 with a background column.
            in_feature: name of the feature map.
            positions: position embedding of its cells.
            prior_prob: initial probability of sigmoid classifiers; None for softmax.
            offsets: box centers are offsets from the reference points of the queries (Eq. 1),
                initially zero.
            box_feedback: pass the boxes of the previous stage to each stage.
            spatial_query: of conditional attention, shared by all stages.
            reference_eps: reference points are kept this far from the borders of the image, in
                shares of its size, before boxes are offset from their logits.
        """
        super().__init__()
        self.in_feature = in_feature
        self.positions = positions
        self.dim = dim
        self.offsets = offsets
        self.box_feedback = box_feedback
        self.reference_eps = reference_eps
        self.stages = nn.ModuleList(make_stage(i) for i in range(num_stages))
        self.spatial_query = spatial_query
        self.norm = nn.LayerNorm(dim)
        self.class_logits = nn.Linear(dim, num_logits)
        self.box_coordinates = make_mlp(dim, 4, 3)
        self._init_weights(prior_prob)

    def _init_weights(self, prior_prob: float | None) -> None:
        xavier_init_matrices(self.stages)
        for stage in self.stages:
            for attention in (stage.self_attention, stage.cross_attention):
                if hasattr(attention, "init_weights"):
                    attention.init_weights()
        if prior_prob is not None:
            nn.init.constant_(self.class_logits.bias, prior_bias(prior_prob))
        if self.offsets:
            nn.init.zeros_(self.box_coordinates[-1].weight)
            nn.init.zeros_(self.box_coordinates[-1].bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        decoder, heads = cfg.MODEL.DECODER, cfg.MODEL.ROI_HEADS
        if decoder.SELF_ATTENTION not in ("msa", "iou_esa"):
            raise ValueError(
                f"MODEL.DECODER.SELF_ATTENTION is {decoder.SELF_ATTENTION!r}; it must be one of: "
                f"'msa', 'iou_esa' with MODEL.ROI_HEADS.NAME {cls.__name__!r}"
            )
        (feature, shape) = _single_feature(heads.IN_FEATURES, input_shape, decoder.HIDDEN_DIM)
        focal = cfg.MODEL.CRITERION.CLASS_LOSS == "focal"
        make_stage = ChannelWeightedDecoderStage if decoder.DCW else DecoderStage

        def make(index: int) -> DecoderStage:
            first = index == 0
            return make_stage(
                **cls.make_attentions(cfg, first),
                dim=decoder.HIDDEN_DIM,
                ffn_dim=decoder.FFN_DIM,
                activation=decoder.ACTIVATION,
                dropout=decoder.DROPOUT,
                pre_norm=decoder.PRE_NORM,
                first=first,
            )

        return {
            "make_stage": make,
            "num_stages": decoder.NUM_STAGES,
            "dim": decoder.HIDDEN_DIM,
            "num_logits": heads.NUM_CLASSES + (not focal),
            "in_feature": feature,
            "positions": FeaturePositions(
                dim=decoder.HIDDEN_DIM, stride=shape.stride if cfg.MODEL.EXACT_PADDING else None
            ),
            "prior_prob": decoder.PRIOR_PROB if focal else None,
            "offsets": cfg.MODEL.PROPOSAL_GENERATOR.REFERENCE_POINTS != "none",
            "box_feedback": decoder.SELF_ATTENTION == "iou_esa",
            "reference_eps": decoder.REFERENCE_EPS,
        }

    @classmethod
    def make_attentions(cls, cfg: CfgNode, first: bool) -> dict[str, nn.Module]:
        """Builds self- and cross-attention of one stage."""
        options = _attention_options(cfg)
        enhanced = cfg.MODEL.DECODER.SELF_ATTENTION == "iou_esa"
        return {
            "self_attention": (IoUEnhancedSelfAttention if enhanced else SelfAttention)(**options),
            "cross_attention": DETRCrossAttention(**options),
        }

    def forward(
        self, features: dict[str, Tensor], queries: Queries, sizes: ImageSizes
    ) -> Predictions:
        """Returns the predictions of all stages.

        Args:
            features: name -> (B, C, H, W).
            queries: with content and position, and reference points if boxes are offsets.
            sizes: of the B images.
        """
        feature = features[self.in_feature]
        memory = feature.flatten(2).transpose(1, 2)  # (B, L, C)
        spatial_keys, mask = self.positions(feature, sizes)
        if mask is not None:
            mask = mask[:, None, None]  # (B, 1, 1, L)
        attentions = [stage.cross_attention for stage in self.stages]
        memories = attentions[0].project_memory(attentions, memory, spatial_keys)

        query, position, boxes = queries.content, queries.position, None
        valid = None if queries.all_valid else queries.valid
        conditions = self.conditions(queries)
        cls_queries, reg_queries = [], []
        for stage, stage_memory in zip(self.stages, memories, strict=True):
            cls_query, reg_query, query = stage(
                query, position, boxes, valid, stage_memory, mask, *conditions
            )
            cls_queries.append(cls_query)
            reg_queries.append(reg_query)
            if self.box_feedback:
                boxes = self.predict_boxes(self.norm(reg_query), queries, sizes).detach()

        classes = self.norm(torch.stack(cls_queries))  # (S, B, N, C)
        shared = cls_queries[0] is reg_queries[0]
        regions = classes if shared else self.norm(torch.stack(reg_queries))
        return Predictions(
            at_least_float32(self.class_logits(classes)),
            self.predict_boxes(regions, queries, sizes),
            queries.valid,
        )

    def conditions(self, queries: Queries) -> tuple[SpatialQuery | None, Tensor | None]:
        """Returns the additional arguments of stages with conditional attention: the spatial query
        and the embedded reference points p_s (Eq. 5)."""
        if self.spatial_query is None:
            return None, None
        p_s = sine_embedding(at_least_float32(queries.points_xy), self.dim)
        return self.spatial_query, p_s.to(queries.content.dtype)

    def predict_boxes(self, embedding: Tensor, queries: Queries, sizes: ImageSizes) -> Tensor:
        """Predicts boxes (..., B, N, 4), xyxy in pixels, from normalized embeddings (..., B, N, C)
        (Eq. 1)."""
        coordinates = at_least_float32(self.box_coordinates(embedding))
        if self.offsets:
            points = inverse_sigmoid(queries.points_xy, self.reference_eps)
            center = coordinates[..., :2] + points
            coordinates = torch.cat((center, coordinates[..., 2:]), dim=-1)
        return cxcywh_to_xyxy(coordinates.sigmoid()) * sizes.whwh[:, None]


@ROI_HEADS_REGISTRY.register()
class ConditionalDETRHeads(DETRHeads):
    """Decoder of DETR with conditional cross-attention."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        decoder = cfg.MODEL.DECODER
        if decoder.PRE_NORM:
            raise ValueError(
                "MODEL.DECODER.PRE_NORM is True; it must be False with MODEL.ROI_HEADS.NAME "
                "'ConditionalDETRHeads', whose spatial queries are defined on normalized embeddings"
            )
        if cfg.MODEL.PROPOSAL_GENERATOR.REFERENCE_POINTS == "none":
            raise ValueError(
                "MODEL.PROPOSAL_GENERATOR.REFERENCE_POINTS is 'none'; it must be one of: 'origin', "
                "'learned', 'predicted' with MODEL.ROI_HEADS.NAME 'ConditionalDETRHeads'"
            )
        spatial_query = SpatialQuery(
            dim=decoder.HIDDEN_DIM,
            num_heads=decoder.NUM_HEADS,
            kind=decoder.SPATIAL_QUERY,
            projection=decoder.SPATIAL_PROJECTION,
            num_stages=decoder.NUM_STAGES,
        )
        return super().from_config(cfg, input_shape) | {"spatial_query": spatial_query}

    @classmethod
    def make_attentions(cls, cfg: CfgNode, first: bool) -> dict[str, nn.Module]:
        options = _attention_options(cfg)
        enhanced = cfg.MODEL.DECODER.SELF_ATTENTION == "iou_esa"
        attention = IoUEnhancedConditionalSelfAttention if enhanced else ConditionalSelfAttention
        return {
            "self_attention": attention(**options),
            "cross_attention": ConditionalCrossAttention(**options, first=first),
        }


def _attention_options(cfg: CfgNode) -> dict[str, Any]:
    decoder = cfg.MODEL.DECODER
    return {
        "dim": decoder.HIDDEN_DIM,
        "num_heads": decoder.NUM_HEADS,
        "dropout": decoder.DROPOUT,
    }


def _single_feature(
    names: list[str], shapes: dict[str, ShapeSpec], dim: int
) -> tuple[str, ShapeSpec]:
    """Returns name and shape of the feature map of a transformer decoder; raises ValueError if it
    does not exist."""
    if len(names) != 1 or names[0] not in shapes:
        raise ValueError(
            f"MODEL.ROI_HEADS.IN_FEATURES is {list(names)}; it must be a list of one of "
            f"{sorted(shapes)}"
        )
    if shapes[names[0]].channels != dim:
        raise ValueError(
            f"MODEL.DECODER.HIDDEN_DIM is {dim}; it must be the number of channels of the feature "
            f"{names[0]!r}, which has {shapes[names[0]].channels}"
        )
    return names[0], shapes[names[0]]
