"""Object queries: learned positions, the same for every image (DETR, Section 3.2; Conditional DETR,
Sections 3.1 and 4.3).

B images, N queries, C channels.
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from torch import Tensor, nn

from ...structures import ImageSizes, Queries, Targets
from ..layers.feed_forward import make_mlp
from ..layers.init import xavier_init_matrices


@PROPOSAL_GENERATOR_REGISTRY.register()
class ObjectQueries(nn.Module):
    """N learned embeddings o_q with zero content and, optionally, reference points sigmoid(s).

    With reference points, the centers of predicted boxes are offsets from them.
    """

    @configurable
    def __init__(self, *, num_queries: int, dim: int, reference_points: str = "none") -> None:
        """
        Args:
            num_queries: N.
            dim: channels C.
            reference_points: "predicted" s = FFN(o_q); "learned" s is a parameter; "origin" s = 0,
                the center of the image; "none".
        """
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(num_queries, dim))
        self.reference_points = reference_points
        if reference_points == "predicted":
            self.point_head = make_mlp(dim, 2, 2)
            xavier_init_matrices(self.point_head)
        elif reference_points == "learned":
            # Uniform over the image.
            self.point_logits = nn.Parameter(torch.rand(num_queries, 2).logit(eps=1e-3))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        return {
            "num_queries": cfg.MODEL.PROPOSAL_GENERATOR.NUM_QUERIES,
            "dim": cfg.MODEL.DECODER.HIDDEN_DIM,
            "reference_points": cfg.MODEL.PROPOSAL_GENERATOR.REFERENCE_POINTS,
        }

    def forward(
        self,
        features: dict[str, Tensor],
        sizes: ImageSizes,
        targets: Targets | None = None,
    ) -> tuple[Queries, dict[str, Tensor]]:
        """Returns the object queries.

        Args:
            features: not used.
            sizes: of the B images.
            targets: not used.

        Returns:
            Queries (B, N) with position (1, N, C) and points_xy (1, N, 2), shared by all images,
            and no losses.
        """
        batch, shape = sizes.whwh.shape[0], self.embedding.shape
        points = self.point_coordinates()
        queries = Queries(
            content=self.embedding.new_zeros(batch, *shape),
            valid=torch.ones(
                batch, len(self.embedding), dtype=torch.bool, device=sizes.whwh.device
            ),
            position=self.embedding[None],
            points_xy=None if points is None else points[None],
            all_valid=True,
        )
        return queries, {}

    def point_coordinates(self) -> Tensor | None:
        """Returns x and y (N, 2) in shares of the image size; None without reference points."""
        if self.reference_points == "none":
            return None
        if self.reference_points == "origin":
            return self.embedding.new_full((len(self.embedding), 2), 0.5)
        if self.reference_points == "learned":
            return self.point_logits.sigmoid()
        # Positions must not be rounded to half precision.
        with torch.autocast(self.embedding.device.type, enabled=False):
            return self.point_head(self.embedding).sigmoid()
