"""IoU-enhanced self-attention: attention weights multiplied by the IoU of the queries' boxes.

Zhao et al., "IoU-Enhanced Attention for End-to-End Task Specific Object Detection", Section 3.2,
with the two attentions that its Table 1 compares. B images, N queries, C channels, H heads, D = C /
H channels of one head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers.attention import SelfAttention, attendable
from ...layers.boxes import at_least_float32, intersection_and_union


def iou_prior(boxes_xyxy: Tensor, valid: Tensor | None = None) -> Tensor:
    """Computes the IoU matrix of the queries of each image, shared by all heads.

    The diagonal is exactly 1, so that every query attends at least to itself. Boxes with an empty
    or infinite area have IoU 0 with all others.

    Args:
        boxes_xyxy: (B, N, 4) pixels, not clipped to the image.
        valid: (B, N) bool; None if all queries are valid. The column of a padded query is zero
            outside of the diagonal.

    Returns:
        (B, 1, N, N) in [0, 1], at least float32. Gradients are finite for finite areas.
    """
    boxes = at_least_float32(boxes_xyxy)
    intersection, union = intersection_and_union(boxes[:, :, None], boxes[:, None])  # (B, N, N)
    overlap = (intersection > 0) & union.isfinite()
    # Masked before the division: masking the quotient would give NaN gradients (0 * inf).
    iou = torch.where(overlap, intersection, 0) / torch.where(overlap, union, 1)
    if valid is not None:
        iou = iou.masked_fill(~attendable(valid)[:, 0], 0)
    itself = torch.eye(iou.shape[1], dtype=torch.bool, device=iou.device)
    return iou.masked_fill(itself, 1)[:, None]


def iou_weighted_softmax(scores: Tensor, prior: Tensor) -> Tensor:
    """Computes Eq. 3: exp(a_ij) I_ij, divided by its sum over j.

    The largest score among keys with I_ij > 0 is subtracted from each row, which does not change
    the quotient and avoids overflow (at scores of 89 in float32 and 12 in float16). Equal to
    softmax(a + log I), but log I has no gradient at I = 0.

    Args:
        scores: (B, H, N, N) a = q k^T / sqrt(D).
        prior: (B, 1, N, N) I, with at least one positive entry a row.

    Returns:
        (B, H, N, N), rows sum to 1.
    """
    scores = scores.masked_fill(prior <= 0, -math.inf)
    shift = scores.detach().amax(dim=-1, keepdim=True)
    weights = (scores - shift).exp() * prior
    return weights / weights.sum(dim=-1, keepdim=True)


class IoUEnhancedSelfAttention(SelfAttention):
    """Multi-head self-attention with weights multiplied by IoU before normalization.

    It has no additional parameters. Scores are divided by sqrt(D), D the width of a head, whereas
    Eq. 2 has the width of the query.
    """

    def __init__(self, *, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__(dim=dim, num_heads=num_heads, dropout=dropout)
        # The authors' code uses the default biases of linear layers, plain attention zeros.
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, boxes_xyxy: Tensor | None, valid: Tensor | None
    ) -> Tensor:
        """Mixes values (B, H, N, D) by Eq. 3, with I = 1 if there are no boxes yet (supplement,
        DETR)."""
        if boxes_xyxy is None:
            return super().mix(q, k, v, boxes_xyxy, valid)
        prior = iou_prior(boxes_xyxy, valid)
        # Only the boxes of the first stage have gradients; those of later stages are detached.
        mix = self.mix_with_gradient if prior.requires_grad else self.mix_fused
        return mix(q, k, v, prior)

    def mix_with_gradient(self, q: Tensor, k: Tensor, v: Tensor, prior: Tensor) -> Tensor:
        """Computes Eq. 3 directly, differentiable in the boxes."""
        weights = iou_weighted_softmax(self.scores(q, k), prior)
        weights = F.dropout(weights, self.dropout, self.training)
        return weights.to(v.dtype) @ v

    def mix_fused(self, q: Tensor, k: Tensor, v: Tensor, prior: Tensor) -> Tensor:
        """Computes Eq. 3 by a fused kernel with log I as additive mask, without gradient for the
        boxes."""
        dropout = self.dropout if self.training else 0.0
        bias = prior.detach().log().to(q.dtype)  # -inf where boxes do not overlap
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)

    @staticmethod
    def scores(q: Tensor, k: Tensor) -> Tensor:
        """Computes the scores q k^T / sqrt(D) (B, H, N, N), in at least float32 (Eq. 2)."""
        return at_least_float32((q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1))


class IoUAttention(nn.Module):
    """Attention with the IoU matrix as weights (Section 3.1, "IoU-MSA" of Table 1).

    The matrix is the same for all heads, so there is one head.
    """

    def __init__(self, *, dim: int, row_normalize: bool = True, dropout: float = 0.0) -> None:
        """
        Args:
            dim: channels C.
            row_normalize: divide each row of the matrix by its sum, like softmax; not specified in
                the paper.
            dropout: rate on the matrix in training.
        """
        super().__init__()
        self.row_normalize = row_normalize
        self.dropout = nn.Dropout(dropout)
        self.value_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, query: Tensor, boxes_xyxy: Tensor, valid: Tensor | None) -> Tensor:
        """Mixes the queries of each image by the IoU of their boxes.

        Args:
            query: (B, N, C).
            boxes_xyxy: (B, N, 4) input boxes of the stage.
            valid: (B, N) bool; None if all queries are valid.

        Returns:
            (B, N, C).
        """
        weights = iou_prior(boxes_xyxy, valid)[:, 0]  # (B, N, N)
        if self.row_normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        value = self.value_proj(query)
        return self.out_proj(self.dropout(weights).to(value.dtype) @ value)


class NoAttention(nn.Module):
    """No attention among the queries ("w/o MSA" of Table 1); the norm behind it is kept."""

    def forward(self, query: Tensor, boxes_xyxy: Tensor, valid: Tensor | None) -> Tensor:
        """Returns zeros (B, N, C)."""
        return torch.zeros_like(query)
