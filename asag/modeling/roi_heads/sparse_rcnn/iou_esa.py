"""IoU-enhanced self-attention: queries listen to queries whose boxes overlap theirs.

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
    """The IoU matrix of the queries of each image, shared by all heads.

    The diagonal is exactly 1, so that every query has somebody to listen to: itself. Boxes without
    area, or too large to have a finite one, overlap nobody else.

    Args:
        boxes_xyxy: (B, N, 4) pixels, not clipped to the image.
        valid: (B, N) bool, or None where every query is real. The column of a padded query is zero
            outside of the diagonal.

    Returns:
        (B, 1, N, N) in [0, 1], at least float32. Its gradient is finite where areas are.
    """
    boxes = at_least_float32(boxes_xyxy)
    intersection, union = intersection_and_union(boxes[:, :, None], boxes[:, None])  # (B, N, N)
    overlap = (intersection > 0) & union.isfinite()
    # Both sides of the division are chosen first: a quotient that is thrown away afterwards would
    # still put 0 * inf into the gradient.
    iou = torch.where(overlap, intersection, 0) / torch.where(overlap, union, 1)
    if valid is not None:
        iou = iou.masked_fill(~attendable(valid)[:, 0], 0)
    itself = torch.eye(iou.shape[1], dtype=torch.bool, device=iou.device)
    return iou.masked_fill(itself, 1)[:, None]


def iou_weighted_softmax(scores: Tensor, prior: Tensor) -> Tensor:
    """Eq. 3: exp(a_ij) I_ij, divided by its sum over j.

    Each row is shifted by its largest score among keys with I_ij > 0, which leaves the quotient as
    it is and keeps the exponential below 1: unshifted, a score of 89 overflows float32 and one of
    12 overflows float16. Equal to softmax(a + log I), but log I has no gradient where I = 0.

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
    """Multi-head self-attention whose weights are multiplied by IoU before they are normalized.

    No parameters are added. The scores are divided by sqrt(D), the width of a head, although Eq. 2
    writes the width of the query.
    """

    def __init__(self, *, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__(dim=dim, num_heads=num_heads, dropout=dropout)
        # The authors start these biases like those of any linear layer, plain attention at zero.
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, boxes_xyxy: Tensor | None, valid: Tensor | None
    ) -> Tensor:
        """Mixes values (B, H, N, D) by Eq. 3; with I = 1 where there are no boxes yet (supplement,
        DETR)."""
        if boxes_xyxy is None:
            return super().mix(q, k, v, boxes_xyxy, valid)
        prior = iou_prior(boxes_xyxy, valid)
        # Only the first stage's boxes are learned; those of later stages arrive detached.
        mix = self.mix_with_gradient if prior.requires_grad else self.mix_fused
        return mix(q, k, v, prior)

    def mix_with_gradient(self, q: Tensor, k: Tensor, v: Tensor, prior: Tensor) -> Tensor:
        """Eq. 3 as it is written, differentiable in the boxes."""
        weights = iou_weighted_softmax(self.scores(q, k), prior)
        weights = F.dropout(weights, self.dropout, self.training)
        return weights.to(v.dtype) @ v

    def mix_fused(self, q: Tensor, k: Tensor, v: Tensor, prior: Tensor) -> Tensor:
        """Eq. 3 in one kernel, with log I as an additive mask; no gradient flows to the boxes."""
        dropout = self.dropout if self.training else 0.0
        bias = prior.detach().log().to(q.dtype)  # -inf where boxes do not overlap
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)

    @staticmethod
    def scores(q: Tensor, k: Tensor) -> Tensor:
        """q k^T / sqrt(D) of two (B, H, N, D), (B, H, N, N) in at least float32 (Eq. 2)."""
        return at_least_float32((q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1))


class IoUAttention(nn.Module):
    """The IoU matrix in place of the attention matrix (Section 3.1, "IoU-MSA" of Table 1).

    All heads would share the one matrix, so there are none: values are projected, mixed, projected.
    """

    def __init__(self, *, dim: int, row_normalize: bool = True, dropout: float = 0.0) -> None:
        """
        Args:
            dim: channels C.
            row_normalize: divide each row of the matrix by its sum, as softmax would; the paper
                does not say.
            dropout: rate on the matrix while training.
        """
        super().__init__()
        self.row_normalize = row_normalize
        self.dropout = nn.Dropout(dropout)
        self.value_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, query: Tensor, boxes_xyxy: Tensor, valid: Tensor | None) -> Tensor:
        """
        Args:
            query: (B, N, C).
            boxes_xyxy: (B, N, 4) boxes that entered the stage.
            valid: (B, N) bool, or None where every query is real.

        Returns:
            (B, N, C).
        """
        weights = iou_prior(boxes_xyxy, valid)[:, 0]  # (B, N, N)
        if self.row_normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        value = self.value_proj(query)
        return self.out_proj(self.dropout(weights).to(value.dtype) @ value)


class NoAttention(nn.Module):
    """Queries do not see each other ("w/o MSA" of Table 1); the norm behind the attention stays."""

    def forward(self, query: Tensor, boxes_xyxy: Tensor, valid: Tensor | None) -> Tensor:
        """Zeros (B, N, C), to be added to the query."""
        return torch.zeros_like(query)
