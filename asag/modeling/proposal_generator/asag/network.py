"""Network of the Adaptive Sparse Anchor Generator, which predicts a few anchors from a patch.

ASAG (Fu et al., ICCV 2023), Section 3.2 and Fig. 4. B images, P patches of T = side x side
tokens, C channels after compression, A anchors of a patch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...layers.init import xavier_init_matrices
from .patches import crop_patches, resize_valid

P5_STRIDE = 32


class PatchTokens(nn.Module):
    """Norm over a whole patch and learned position embedding, (..., T, C) -> (..., T * C)."""

    def __init__(self, *, channels: int, side: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((side * side, channels))
        self.position = nn.Parameter(torch.zeros(side * side, channels))

    def forward(self, tokens: Tensor) -> Tensor:
        return (self.norm(tokens) + self.position).flatten(-2)


def _compression(dim: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(dim, dim // 2, 1), nn.GELU(), nn.Conv2d(dim // 2, channels, 3, padding=1)
    )


def _mlp(in_dim: int, hidden_dim: int, num_anchors: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim),
        nn.GELU(),
        nn.Linear(hidden_dim, hidden_dim),
        nn.GELU(),
        nn.Linear(hidden_dim, 5 * num_anchors),
    )


class AnchorNetwork(nn.Module):
    """Compression of the features, tokens of the patches and two MLPs.

    The outputs of an anchor are center and size relative to the patch (0 to 1) and the location
    *logit*. There are no prior boxes.
    """

    def __init__(
        self,
        *,
        dim: int,
        channels: int = 8,
        fixed_anchors: int = 50,
        patch_anchors: int = 20,
        side: int = 15,
        anchor_init: str = "random",
    ) -> None:
        """
        Args:
            dim: channels of the pyramid.
            channels: C.
            fixed_anchors: anchors of each P5 quadrant and of P6 (n1).
            patch_anchors: anchors of each probed patch (n2).
            side: side of a patch in cells.
            anchor_init: "random", as in the authors' code, starts all anchors near half of the
                patch; "grid" spreads them over the patch, for training from scratch on little data
                (not in the paper).
        """
        super().__init__()
        self.side = side
        in_dim, hidden_dim = side * side * channels, 125 * channels
        self.compress = nn.ModuleList(_compression(dim, channels) for _ in range(3))  # P3, P4, P5
        self.p6 = nn.Conv2d(channels, channels, 3, stride=2, padding=2, dilation=2)
        self.tokens = nn.ModuleList(
            PatchTokens(channels=channels, side=side) for _ in range(3)
        )  # P5, P4, P3
        self.fixed_mlp = _mlp(in_dim, hidden_dim, fixed_anchors)
        self.patch_mlp = _mlp(in_dim, hidden_dim, patch_anchors)
        # The authors' code initializes all parameters with two dimensions by Xavier, including
        # weight and bias of the norms over patches.
        xavier_init_matrices(self)
        for tokens in self.tokens:
            nn.init.zeros_(tokens.position)
        if anchor_init == "grid":
            for mlp in (self.fixed_mlp, self.patch_mlp):
                _start_on_grid(mlp[-1])

    def fixed(self, p5: Tensor, whwh: Tensor, flips: bool) -> tuple[Tensor, Tensor]:
        """Predicts the anchors of the fixed part, P6 and the quadrants of P5.

        Args:
            p5: (B, dim, H, W) map of stride 32.
            whwh: (B, 4) sizes of the unpadded images.
            flips: also predict from P6 flipped horizontally, vertically and both ways (training).

        Returns:
            P6 (B, 1 or 4, A, 5), and the quadrants of P5 (B, 4, A, 5): top left, top right, bottom
            left, bottom right.
        """
        whole = resize_valid(self.compress[2](p5), whwh, P5_STRIDE, 2 * self.side)
        p6 = self.p6(whole.relu())  # (B, C, side, side)
        views = [p6, p6.flip(-1), p6.flip(-2), p6.flip(-1, -2)] if flips else [p6]
        quadrants = whole.unflatten(-2, (2, -1)).unflatten(-1, (2, -1))
        quadrants = quadrants.permute(0, 2, 4, 3, 5, 1).flatten(1, 2)  # (B, 4, side, side, C)
        patches = torch.stack(views, dim=1).permute(0, 1, 3, 4, 2)
        tokens = torch.cat((patches, quadrants), dim=1).flatten(2, 3)
        raw = _anchors(self.fixed_mlp(self.tokens[0](tokens)))
        return raw[:, : len(views)], raw[:, len(views) :]

    def probe(self, compressed: Tensor, corner: Tensor, level: int) -> Tensor:
        """Predicts the anchors of patches of P4 or P3.

        Args:
            compressed: (B, C, H, W) map of the level.
            corner: (B, P, 2) int64 cells.
            level: 4 or 3.

        Returns:
            (B, P, A, 5).
        """
        tokens = self.tokens[5 - level](crop_patches(compressed, corner, self.side))
        return _anchors(self.patch_mlp(tokens))


def _anchors(output: Tensor) -> Tensor:
    """Converts outputs (..., 5 A) to anchors (..., A, 5) with boxes by a sigmoid."""
    raw = output.unflatten(-1, (-1, 5))
    return torch.cat((raw[..., :4].sigmoid(), raw[..., 4:]), dim=-1)


@torch.no_grad()
def _start_on_grid(last: nn.Linear) -> None:
    """Sets the biases to anchors on a square grid, each with twice the sides of its cell."""
    anchors = last.bias.view(-1, 5)
    cells = math.ceil(len(anchors) ** 0.5)
    index = torch.arange(len(anchors), device=last.bias.device)
    centers = torch.stack((index % cells, index // cells), dim=1).add(0.5) / cells
    anchors[:, :2] = centers.logit()
    anchors[:, 2:4] = torch.tensor(2 / max(cells, 3)).logit()
