"""The ROI heads of the Sparse R-CNN family: a few stages that refine boxes one after the other.

B images, N queries, S stages, C channels, K classes, P pooled positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from torch import Tensor, nn

from ....structures import ImageSizes, Predictions, Queries
from ...layers.roi_align import PyramidRoIAlign, build_pooler
from .build import build_attention, build_interaction
from .stage import DynamicConvStage


@ROI_HEADS_REGISTRY.register()
class DynamicConvHeads(nn.Module):
    """Iterative refinement (Sparse R-CNN, Section 3.3, Fig. 3).

    Boxes are detached between stages, queries are not: each stage learns to correct the boxes it is
    given, while the query carries gradient through all stages.
    """

    @configurable
    def __init__(
        self,
        *,
        make_stage: Callable[[], DynamicConvStage],
        num_stages: int,
        pooler: PyramidRoIAlign,
        in_features: Sequence[str],
    ) -> None:
        """
        Args:
            make_stage: builds one stage; called `num_stages` times, so that no stage shares
                weights.
            num_stages: S.
            pooler: reads the features of each box.
            in_features: names of the feature maps, finest first.
        """
        super().__init__()
        if num_stages < 1:
            raise ValueError(f"MODEL.DECODER.NUM_STAGES is {num_stages}; it must be at least 1")
        self.in_features = tuple(in_features)
        self.pooler = pooler
        self.stages = nn.ModuleList(make_stage() for _ in range(num_stages))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        decoder, heads = cfg.MODEL.DECODER, cfg.MODEL.ROI_HEADS
        missing = [f for f in heads.IN_FEATURES if f not in input_shape]
        if missing:
            raise ValueError(
                f"MODEL.ROI_HEADS.IN_FEATURES names {missing}, but backbone and neck give "
                f"{sorted(input_shape)}"
            )
        channels = {input_shape[f].channels for f in heads.IN_FEATURES}
        if channels != {decoder.HIDDEN_DIM}:
            raise ValueError(
                f"MODEL.DECODER.HIDDEN_DIM is {decoder.HIDDEN_DIM}, but the features named by "
                f"MODEL.ROI_HEADS.IN_FEATURES have {sorted(channels)} channels "
                "(MODEL.FPN.OUT_CHANNELS)"
            )
        focal = cfg.MODEL.CRITERION.CLASS_LOSS == "focal"

        def make_stage() -> DynamicConvStage:
            return DynamicConvStage(
                attention=build_attention(cfg),
                interaction=build_interaction(cfg),
                dim=decoder.HIDDEN_DIM,
                num_logits=heads.NUM_CLASSES + (not focal),
                num_cls_layers=decoder.NUM_CLS_LAYERS,
                num_reg_layers=decoder.NUM_REG_LAYERS,
                activation=decoder.ACTIVATION,
                dropout=decoder.DROPOUT,
                prior_prob=decoder.PRIOR_PROB if focal else None,
            )

        return {
            "make_stage": make_stage,
            "num_stages": decoder.NUM_STAGES,
            "pooler": build_pooler(cfg, input_shape),
            "in_features": heads.IN_FEATURES,
        }

    def forward(
        self, features: dict[str, Tensor], queries: Queries, sizes: ImageSizes
    ) -> Predictions:
        """Predictions of all stages.

        Args:
            features: name -> (B, C, H, W).
            queries: with boxes and content.
            sizes: not needed, boxes are in pixels.
        """
        pyramid = self.pooler.prepare([features[f] for f in self.in_features])
        content, boxes = queries.content, queries.boxes_xyxy
        valid = queries.mask
        logits, refined = [], []
        for stage in self.stages:
            roi_features = self.pooler(pyramid, boxes)  # (B * N, C, P, P)
            roi_features = roi_features.flatten(2).transpose(1, 2)  # (B * N, P^2, C)
            stage_logits, stage_boxes, content = stage(content, boxes, roi_features, valid)
            logits.append(stage_logits)
            refined.append(stage_boxes)
            boxes = stage_boxes.detach()
        return Predictions.from_stages(queries, logits, refined)
