"""Stage of a transformer decoder (DETR, supplement A.3; Conditional DETR, Section 3.1, Fig. 3).

B images, N queries, L positions of the memory, C channels.
"""

from __future__ import annotations

from torch import Tensor, nn

from ...layers.feed_forward import FeedForward, Residual
from ..sparse_rcnn.channel_weighting import ChannelMask
from .conditional_attention import SpatialQuery
from .cross_attention import CrossAttention, StageMemory


class DecoderStage(nn.Module):
    """Self-attention, cross-attention and feed-forward block; the papers differ in the two
    attentions."""

    def __init__(
        self,
        *,
        self_attention: nn.Module,
        cross_attention: CrossAttention,
        dim: int,
        ffn_dim: int,
        activation: str = "relu",
        dropout: float = 0.0,
        pre_norm: bool = False,
        first: bool = False,
    ) -> None:
        """
        Args:
            self_attention: `(query, boxes_xyxy, valid, position) -> (B, N, C)`.
            cross_attention: `(query, position, spatial, memory, mask) -> (B, N, C)`.
            dim: channels C.
            ffn_dim: inner width of the feed-forward block.
            activation: of the feed-forward block.
            dropout: rate behind every sublayer and inside of the feed-forward block.
            pre_norm: norms in front of the sublayers instead of behind.
            first: True for the first stage, whose input queries have zero content.
        """
        super().__init__()
        self.first = first
        self.self_attention = self_attention
        self.self_residual = Residual(dim=dim, dropout=dropout, pre_norm=pre_norm)
        self.cross_attention = cross_attention
        self.init_interaction(dim, ffn_dim, activation, dropout, pre_norm)

    def init_interaction(
        self, dim: int, ffn_dim: int, activation: str, dropout: float, pre_norm: bool
    ) -> None:
        """Creates the modules of `interact` beside the cross-attention."""
        self.cross_residual = Residual(dim=dim, dropout=dropout, pre_norm=pre_norm)
        self.ffn = FeedForward(
            dim=dim,
            hidden_dim=ffn_dim,
            activation=activation,
            dropout=dropout,
            pre_norm=pre_norm,
        )

    def forward(
        self,
        query: Tensor,
        position: Tensor,
        boxes_xyxy: Tensor | None,
        valid: Tensor | None,
        memory: StageMemory,
        mask: Tensor | None,
        spatial_query: SpatialQuery | None = None,
        p_s: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Updates the queries.

        Args:
            query: (B, N, C) embeddings f of the previous stage, zeros in the first.
            position: (B or 1, N, C) object queries.
            boxes_xyxy: (B, N, 4) boxes of the previous stage in pixels, for IoU-enhanced attention;
                None for others and in the first stage.
            valid: (B, N) bool; None if all queries are valid.
            memory: keys and values of this stage.
            mask: (B, 1, 1, L) bool or None.
            spatial_query: of conditional attention, shared by all stages.
            p_s: (B or 1, N, C) embedded reference points for `spatial_query`.

        Returns:
            Inputs of class head and box head, and next query, (B, N, C) each.
        """
        content = self.self_residual(
            query, lambda x: self.self_attention(x, boxes_xyxy, valid, position)
        )
        spatial = None
        if spatial_query is not None:
            spatial = spatial_query(None if self.first else query, content, p_s)
        return self.interact(content, position, spatial, memory, mask)

    def interact(
        self,
        content: Tensor,
        position: Tensor,
        spatial: Tensor | None,
        memory: StageMemory,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs cross-attention and feed-forward block; the three results are the same tensor."""
        query = self.cross_residual(
            content, lambda x: self.cross_attention(x, position, spatial, memory, mask)
        )
        query = self.ffn(query)
        return query, query, query


class TaskBranch(nn.Module):
    """Branch of one task behind the shared cross-attention: mask, projection, feed-forward block.

    Dynamic channel weighting (Eq. 4 of the IoU-enhanced attention paper) for DETR, where the mask
    is applied to one vector a query.
    """

    def __init__(self, *, dim: int, ffn_dim: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.mask = ChannelMask(dim=dim)
        self.project = nn.Linear(dim, dim)
        self.residual = Residual(dim=dim, dropout=dropout)
        self.ffn = FeedForward(dim=dim, hidden_dim=ffn_dim, activation=activation, dropout=dropout)

    def forward(self, content: Tensor, attended: Tensor) -> Tensor:
        """Computes the input (B, N, C) of a task's head from queries and attended features."""
        weighted = self.mask(content) * attended
        return self.ffn(self.residual(content, lambda _: self.project(weighted)))


class ChannelWeightedDecoderStage(DecoderStage):
    """Decoder stage with dynamic channel weighting: separate masks of the attended features for
    classification and regression (Zhao et al., supplement, Table 10)."""

    def init_interaction(
        self, dim: int, ffn_dim: int, activation: str, dropout: float, pre_norm: bool
    ) -> None:
        if pre_norm:
            raise ValueError(
                "MODEL.DECODER.PRE_NORM is True; it must be False with MODEL.DECODER.DCW True, "
                "which has its norms behind the sublayers"
            )
        sizes = {"dim": dim, "ffn_dim": ffn_dim, "activation": activation, "dropout": dropout}
        self.cls_branch = TaskBranch(**sizes)
        self.reg_branch = TaskBranch(**sizes)

    def interact(
        self,
        content: Tensor,
        position: Tensor,
        spatial: Tensor | None,
        memory: StageMemory,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs cross-attention and a branch for each task; their sum is the next query."""
        attended = self.cross_attention(content, position, spatial, memory, mask)
        cls_query = self.cls_branch(content, attended)
        reg_query = self.reg_branch(content, attended)
        return cls_query, reg_query, cls_query + reg_query
