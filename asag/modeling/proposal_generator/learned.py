"""Learned proposals: the same boxes and features for every image (Sparse R-CNN, Section 3.2).

B images, N queries, C channels.
"""

from __future__ import annotations

import math

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from torch import Tensor, nn

from ...structures import ImageSizes, Queries, Targets
from ..layers.boxes import cxcywh_to_xyxy


def initial_boxes(kind: str, count: int) -> Tensor:
    """Returns initial boxes (N, 4), cxcywh in shares of the image.

    Args:
        kind: "image": the whole image for all (the published models). "grid": the cells of a grid,
            row by row, for the fastest training from scratch. "random": uniform centers and sizes.
            "center": at the center, a tenth of the image wide and high.
        count: N.
    """
    if kind == "image":
        return torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(count, 1)
    if kind == "center":
        return torch.tensor([0.5, 0.5, 0.1, 0.1]).repeat(count, 1)
    if kind == "random":
        return torch.rand(count, 4)
    columns = math.ceil(math.sqrt(count))
    size = torch.tensor([1 / columns, 1 / math.ceil(count / columns)])
    cell = torch.arange(count)
    centers = (torch.stack((cell % columns, cell // columns), dim=1) + 0.5) * size
    return torch.cat((centers, size.expand(count, 2)), dim=1)


@PROPOSAL_GENERATOR_REGISTRY.register()
class LearnedProposals(nn.Module):
    """N boxes and N feature vectors as parameters.

    Boxes are unconstrained and may exceed the image.
    """

    @configurable
    def __init__(self, *, num_queries: int, dim: int, box_init: str = "image") -> None:
        """
        Args:
            num_queries: N.
            dim: C.
            box_init: see `initial_boxes`.
        """
        super().__init__()
        self.boxes_cxcywh = nn.Parameter(initial_boxes(box_init, num_queries))
        self.features = nn.Parameter(torch.randn(num_queries, dim))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        return {
            "num_queries": cfg.MODEL.PROPOSAL_GENERATOR.NUM_QUERIES,
            "dim": cfg.MODEL.DECODER.HIDDEN_DIM,
            "box_init": cfg.MODEL.PROPOSAL_GENERATOR.BOX_INIT,
        }

    def forward(
        self,
        features: dict[str, Tensor],
        sizes: ImageSizes,
        targets: Targets | None = None,
    ) -> tuple[Queries, dict[str, Tensor]]:
        """Returns the learned proposals for each image.

        Args:
            features: not used.
            sizes: of the B images.
            targets: not used.

        Returns:
            Queries (B, N) and no losses.
        """
        batch, count = sizes.whwh.shape[0], len(self.features)
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
