"""Learned proposals: the same boxes and features for every image (Sparse R-CNN, Section 3.2).

B images, N queries, C channels.
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from torch import Tensor, nn

from ...structures import ImageSizes, Queries, Targets
from ..layers.boxes import cxcywh_to_xyxy


@PROPOSAL_GENERATOR_REGISTRY.register()
class LearnedProposals(nn.Module):
    """N boxes, at first all equal to the whole image, and N feature vectors, learned by gradient.

    Boxes are free: neither squashed nor clamped, they may leave the image.
    """

    @configurable
    def __init__(self, *, num_queries: int, dim: int) -> None:
        super().__init__()
        self.boxes_cxcywh = nn.Parameter(torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(num_queries, 1))
        self.features = nn.Parameter(torch.randn(num_queries, dim))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        return {
            "num_queries": cfg.MODEL.PROPOSAL_GENERATOR.NUM_QUERIES,
            "dim": cfg.MODEL.DECODER.HIDDEN_DIM,
        }

    def forward(
        self,
        features: dict[str, Tensor],
        sizes: ImageSizes,
        targets: Targets | None = None,
    ) -> tuple[Queries, dict[str, Tensor]]:
        """
        Args:
            features: not looked at.
            sizes: of the B images.
            targets: not needed.

        Returns:
            Queries (B, N) and no losses.
        """
        batch, count = len(sizes), len(self.features)
        boxes_xyxy = cxcywh_to_xyxy(self.boxes_cxcywh) * sizes.whwh[:, None]  # (B, N, 4)
        return (
            Queries(
                content=self.features.expand(batch, -1, -1),
                valid=torch.ones(batch, count, dtype=torch.bool, device=boxes_xyxy.device),
                boxes_xyxy=boxes_xyxy,
                all_valid=True,
            ),
            {},
        )
