"""Swin Transformer (Liu et al., ICCV 2021) with a feature pyramid.

B images, H x W input, C channels of a stage. The blocks are torchvision's: they pad a map to whole
windows before they shift it, as the authors' detectors do, which supports any input size. (timm 1.0
shifts first, so that opposite borders attend to each other if a map is not a multiple of the
window.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer

PATCH_SIZE = 4
NUM_STAGES = 4


class Swin(Backbone):
    """Swin Transformer with a norm behind each of its four stages, outputs "stage1" to "stage4".

    Padding at the right and bottom takes part in the attention of windows that it shares with the
    image, so outputs depend slightly on the amount of padding in a batch.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        drop_path_rate: float = 0.2,
        freeze_at: int = 0,
    ) -> None:
        """
        Args:
            embed_dim: channels of the first stage, doubled in each following stage.
            depths, num_heads: blocks and attention heads of the four stages.
            window_size: side of a window in tokens.
            drop_path_rate: stochastic depth rate of the last block; falls linearly to 0 at the
                first block.
            freeze_at: 1 freezes the patch embedding, 2 to 5 also the first 1 to 4 stages.

        Raises:
            ValueError: `num_heads` do not divide the channels of their stages.
        """
        super().__init__()
        _check_heads(embed_dim, num_heads)
        body = SwinTransformer(
            patch_size=[PATCH_SIZE, PATCH_SIZE],
            embed_dim=embed_dim,
            depths=list(depths),
            num_heads=list(num_heads),
            window_size=[window_size, window_size],
            stochastic_depth_prob=drop_path_rate,
            num_classes=1,
        )
        # Patch embedding and merging at even indices, stages at odd ones; torchvision's names.
        self.features = body.features
        self.channels = [embed_dim * 2**i for i in range(NUM_STAGES)]
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels)
        frozen = min(freeze_at, 1) + max(2 * freeze_at - 3, 0)
        self.features[:frozen].requires_grad_(False)

    @property
    def size_divisibility(self) -> int:
        return PATCH_SIZE * 2 ** (NUM_STAGES - 1)

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            f"stage{i + 1}": ShapeSpec(channels=c, stride=PATCH_SIZE * 2**i)
            for i, c in enumerate(self.channels)
        }

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Computes the feature maps.

        Args:
            images: (B, 3, H, W) of any size.

        Returns:
            name -> (B, C, H / stride, W / stride), sides rounded up.
        """
        height, width = images.shape[-2:]
        x = F.pad(images, (0, -width % PATCH_SIZE, 0, -height % PATCH_SIZE))
        outputs = {}
        for i, norm in enumerate(self.norms):
            x = self.features[2 * i + 1](self.features[2 * i](x))  # (B, H / stride, W / stride, C)
            outputs[f"stage{i + 1}"] = norm(x).permute(0, 3, 1, 2).contiguous()
        return outputs


def _check_heads(embed_dim: int, num_heads: Sequence[int]) -> None:
    for i, heads in enumerate(num_heads):
        if (embed_dim * 2**i) % heads:
            raise ValueError(
                f"MODEL.SWIN.NUM_HEADS is {tuple(num_heads)}; its numbers must divide the channels "
                f"of their stages, but stage {i + 1} has {embed_dim * 2**i} "
                f"(MODEL.SWIN.EMBED_DIM {embed_dim})"
            )


@BACKBONE_REGISTRY.register()
def build_swin_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Builds a Swin Transformer by `MODEL.SWIN` with Detectron2's feature pyramid, outputs p2 to
    p6."""
    swin = cfg.MODEL.SWIN
    return FPN(
        bottom_up=Swin(
            embed_dim=swin.EMBED_DIM,
            depths=swin.DEPTHS,
            num_heads=swin.NUM_HEADS,
            window_size=swin.WINDOW_SIZE,
            drop_path_rate=swin.DROP_PATH_RATE,
            freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        ),
        in_features=[f"stage{i + 1}" for i in range(NUM_STAGES)],
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
