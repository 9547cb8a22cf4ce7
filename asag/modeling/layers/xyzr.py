"""AdaMixer's box coordinates: center, scale and aspect, (x, y, z, r).

Gao et al., "AdaMixer", CVPR 2022, Section 3.1, with the authors' units: pixels of the finest map.
z = log2 of the geometric mean of the sides, r = half of the log2 of height over width. B images, N
queries, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .boxes import at_least_float32, cxcywh_to_xyxy, xyxy_to_cxcywh
from .feed_forward import make_tower
from .init import prior_bias, xavier_init_matrices

UNIT = 4.0  # image pixels a coordinate unit: one cell of P2
EPS = 1e-7
TEMPERATURE = 10000.0
CENTER_SCALE = 1000.0  # divides x and y before they are encoded


def boxes_to_xyzr(boxes_xyxy: Tensor) -> Tensor:
    """Converts corners in pixels to (x, y, z, r), (..., 4) in at least float32."""
    x, y, w, h = (xyxy_to_cxcywh(at_least_float32(boxes_xyxy)) / UNIT).unbind(dim=-1)
    w, h = w.clamp(min=0), h.clamp(min=0)
    z = (w * h + EPS).log2() / 2
    r = (h / (w + EPS) + EPS).log2() / 2
    return torch.stack((x, y, z, r), dim=-1)


def xyzr_to_boxes(xyzr: Tensor) -> Tensor:
    """Converts (x, y, z, r) to corners in pixels, (..., 4)."""
    center, z, r = xyzr[..., :2], xyzr[..., 2], xyzr[..., 3]
    size = torch.stack(((z - r).exp2(), (z + r).exp2()), dim=-1)
    return cxcywh_to_xyxy(torch.cat((center, size), dim=-1)) * UNIT


def move_xyzr(xyzr: Tensor, delta: Tensor) -> Tensor:
    """Applies deltas to the center, in units of the box's scale, and to scale and aspect."""
    delta = at_least_float32(delta)
    center = xyzr[..., :2] + delta[..., :2] * xyzr[..., 2:3].exp2()
    return torch.cat((center, xyzr[..., 2:] + delta[..., 2:]), dim=-1)


def encode_xyzr(xyzr: Tensor, dim: int) -> Tensor:
    """Embeds coordinates (..., 4) as (..., dim), a quarter of the channels each, sine and cosine
    interleaved."""
    features = dim // 4
    pair = torch.arange(features, device=xyzr.device, dtype=xyzr.dtype).div(
        2, rounding_mode="floor"
    )
    period = TEMPERATURE ** (2 * pair / features)
    scaled = torch.cat((xyzr[..., :2] / CENTER_SCALE, xyzr[..., 2:]), dim=-1)
    angle = scaled[..., None] / period  # (..., 4, features)
    even = torch.arange(features, device=xyzr.device) % 2 == 0
    return torch.where(even, angle.sin(), angle.cos()).flatten(-2)


class XYZRPredictor(nn.Module):
    """Towers and predictors of a stage that refines (x, y, z, r)."""

    def __init__(
        self,
        *,
        dim: int,
        num_logits: int,
        num_cls_layers: int = 1,
        num_reg_layers: int = 3,
        activation: str = "gelu",
        prior_prob: float | None = 0.01,
    ) -> None:
        """
        Args:
            dim: channels C.
            num_logits: classes K, or K + 1 with a background column.
            num_cls_layers, num_reg_layers: depth of the towers.
            activation: of the towers.
            prior_prob: initial class probability; None for softmax classifiers.
        """
        super().__init__()
        self.cls_tower = make_tower(dim, num_cls_layers, activation)
        self.reg_tower = make_tower(dim, num_reg_layers, activation)
        self.class_logits = nn.Linear(dim, num_logits)
        self.box_deltas = nn.Linear(dim, 4)
        self.prior_prob = prior_prob
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initializes the parameters; predicted boxes start equal to the input boxes."""
        xavier_init_matrices(self)
        nn.init.zeros_(self.box_deltas.weight)
        nn.init.zeros_(self.box_deltas.bias)
        if self.prior_prob is not None:
            nn.init.constant_(self.class_logits.bias, prior_bias(self.prior_prob))

    def forward(self, query: Tensor, xyzr: Tensor) -> tuple[Tensor, Tensor]:
        """Predicts classes and refined boxes.

        Args:
            query: (B, N, C).
            xyzr: (B, N, 4) boxes to refine.

        Returns:
            Logits (B, N, K) and boxes (B, N, 4) xyxy in pixels, both in at least float32.
        """
        logits = self.class_logits(self.cls_tower(query))
        delta = self.box_deltas(self.reg_tower(query))
        return at_least_float32(logits), xyzr_to_boxes(move_xyzr(xyzr, delta))


def scale_of(xyzr: Tensor) -> tuple[Tensor, Tensor]:
    """Returns center and size in pixels, (..., 2) each, of (x, y, z, r) (..., 4)."""
    z, r = xyzr[..., 2], xyzr[..., 3]
    size = torch.stack(((z - r).exp2(), (z + r).exp2()), dim=-1)
    return xyzr[..., :2] * UNIT, size * UNIT
