"""Iterative refinement of boxes, and the ROI heads of the Sparse R-CNN family.

B images, N queries, S stages, C channels, K classes, P pooled positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from torch import Tensor, nn

from ....structures import ImageSizes, Predictions, Queries
from ...layers.roi_align import PyramidRoIAlign, build_pooler
from ...registry import check_features
from .build import build_dynamic_conv_stage

View = Any
"""Input of a stage beside the queries: pooled features, feature maps or a flattened memory."""

Reader = Callable[[Sequence[Tensor], ImageSizes], Callable[[Tensor], View]]
"""(maps, sizes) -> a function from boxes (B, N, 4) to the view of a stage at these boxes."""

StageOutput = tuple[Tensor, Tensor, Tensor]
"""Logits (B, N, K), boxes (B, N, 4) xyxy in pixels, and content (B, N, C) for the next stage."""


class RefinementHeads(nn.Module):
    """Stages that refine boxes one after the other (Sparse R-CNN, Section 3.3, Fig. 3).

    Boxes are detached between stages, content is not: each stage learns to correct the boxes it
    receives, while the content carries the gradient through all stages.
    """

    num_parallel = 1
    """Number of entries of `stages` that are parallel first stages; later ones refine further."""

    def __init__(
        self,
        *,
        make_stage: Callable[[], nn.Module],
        num_stages: int,
        reader: Reader,
        in_features: Sequence[str],
    ) -> None:
        """
        Args:
            make_stage: builds one stage `(content, boxes_xyxy, view, mask) -> StageOutput`; called
                `num_stages` times, so that stages share no weights.
            num_stages: S.
            reader: makes the views of the stages.
            in_features: names of the feature maps, finest first.
        """
        super().__init__()
        self.reader = reader
        self.in_features = tuple(in_features)
        self.stages = nn.ModuleList(make_stage() for _ in range(num_stages))

    def forward(
        self, features: dict[str, Tensor], queries: Queries, sizes: ImageSizes
    ) -> Predictions:
        """Returns the predictions of all stages; those of the proposal generator come first.

        Args:
            features: name -> (B, C, H, W).
            queries: with boxes and content.
            sizes: of the B images.
        """
        read = self.reader([features[f] for f in self.in_features], sizes)
        outputs = self.first_outputs(queries, read(queries.boxes_xyxy))
        for stage in self.stages[self.num_parallel :]:
            _, boxes, content = outputs[-1]
            boxes = boxes.detach()
            outputs.append(stage(content, boxes, read(boxes), queries.mask))
        logits, boxes, _ = zip(*outputs, strict=True)
        return Predictions.from_stages(queries, logits, boxes)

    def first_outputs(self, queries: Queries, view: View) -> list[StageOutput]:
        """Runs the first stage; the next one continues from the last output of the list."""
        return [self.stages[0](queries.content, queries.boxes_xyxy, view, queries.mask)]


class RoIReader(nn.Module):
    """Reader of stages with dynamic convolution: pooled features of every box."""

    def __init__(self, pooler: PyramidRoIAlign) -> None:
        super().__init__()
        self.pooler = pooler

    def forward(self, maps: Sequence[Tensor], sizes: ImageSizes) -> Callable[[Tensor], Tensor]:
        """Returns a function from boxes (B, N, 4) to features (B * N, P, C)."""
        pyramid = self.pooler.prepare(maps)

        def read(boxes_xyxy: Tensor) -> Tensor:
            return self.pooler(pyramid, boxes_xyxy).flatten(2).transpose(1, 2)

        return read


@ROI_HEADS_REGISTRY.register()
class DynamicConvHeads(RefinementHeads):
    """ROI heads of Sparse R-CNN: refinement stages with dynamic convolution."""

    # Adds construction from a configuration, `DynamicConvHeads(cfg, input_shape)`.
    __init__ = configurable(RefinementHeads.__init__)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        decoder, names = cfg.MODEL.DECODER, cfg.MODEL.ROI_HEADS.IN_FEATURES
        check_features("MODEL.ROI_HEADS.IN_FEATURES", names, input_shape, decoder.HIDDEN_DIM)
        return {
            "make_stage": partial(build_dynamic_conv_stage, cfg),
            "num_stages": decoder.NUM_STAGES,
            "reader": RoIReader(build_pooler(cfg, input_shape)),
            "in_features": names,
        }
