"""RoIAlign over a feature pyramid: each box reads the level that fits its size (Lin et al., 2017,
Eq. 1).

B images, N boxes an image, R = B * N, C channels, P pooled side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from .boxes import at_least_float32, box_area

CANONICAL_SIZE, CANONICAL_LEVEL = 224, 4


class PyramidRoIAlign(nn.Module):
    """Batched RoIAlign with the numbers of Detectron2's `ROIPooler`.

    `ROIPooler` asks the device once a level how many boxes belong there, which stalls a GPU 24
    times in six stages. Here every level sees all boxes, those of other levels moved out of the
    map, where the
    kernel returns zero at once, and the levels are summed: static shapes and no synchronisation. On
    a CPU, where asking is free, each level gets only its own boxes (`compact`).
    """

    def __init__(
        self,
        *,
        strides: Sequence[int],
        output_size: int = 7,
        sampling_ratio: int = 2,
        aligned: bool = True,
        level_eps: float = 1e-8,
    ) -> None:
        """
        Args:
            strides: pixels a cell of each level, ascending powers of two.
            output_size: P.
            sampling_ratio: samples a bin and direction.
            aligned: half-pixel correction (RoIAlign V2); False gives the legacy alignment.
            level_eps: added inside the logarithm of the level rule.

        Raises:
            ValueError: strides are not consecutive powers of two.
        """
        super().__init__()
        levels = [int(math.log2(s)) for s in strides]
        if [2**x for x in levels] != list(strides) or levels != list(
            range(levels[0], levels[0] + len(levels))
        ):
            raise ValueError(
                "RoIAlign needs feature strides that double from level to level, got "
                f"{list(strides)}; check MODEL.ROI_HEADS.IN_FEATURES"
            )
        self.strides = tuple(strides)
        self.min_level, self.max_level = levels[0], levels[-1]
        self.output_size = output_size
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.level_eps = level_eps

    def assign_levels(self, boxes_xyxy: Tensor) -> Tensor:
        """(...) index into the pyramid of boxes (..., 4) in pixels; degenerate boxes read the
        finest."""
        size = box_area(boxes_xyxy).clamp(min=0).sqrt()
        level = torch.floor(CANONICAL_LEVEL + torch.log2(size / CANONICAL_SIZE + self.level_eps))
        return level.clamp(self.min_level, self.max_level).long() - self.min_level

    def forward(
        self, features: Sequence[Tensor], boxes_xyxy: Tensor, compact: bool | None = None
    ) -> Tensor:
        """
        Args:
            features: one (B, C, H_l, W_l) map a level.
            boxes_xyxy: (B, N, 4) in pixels, not clipped to the image. No gradient flows to them.
            compact: give each level only its own boxes. Default: on CPU outside of compilation.

        Returns:
            (R, C, P, P) in at least float32, images one after the other.
        """
        batch, count = boxes_xyxy.shape[:2]
        dtype = at_least_float32(features[0]).dtype
        image = torch.arange(batch, device=boxes_xyxy.device).repeat_interleave(count)
        # Boxes are rounded to float32 whatever the features, as Detectron2's `Boxes` does.
        boxes = boxes_xyxy.detach().float().reshape(-1, 4)
        level = self.assign_levels(boxes)
        rois = torch.cat((image[:, None].to(dtype), boxes.to(dtype)), dim=1)  # (R, 5)
        if compact is None:
            compact = rois.device.type == "cpu" and not torch.compiler.is_compiling()
        pool = self._pool_compact if compact else self._pool_static
        return pool([x.to(dtype) for x in features], rois, level)

    def _align(self, features: Tensor, rois: Tensor, stride: int) -> Tensor:
        return roi_align(
            features,
            rois,
            output_size=self.output_size,
            spatial_scale=1.0 / stride,
            sampling_ratio=self.sampling_ratio,
            aligned=self.aligned,
        )

    def _pool_compact(self, features: list[Tensor], rois: Tensor, level: Tensor) -> Tensor:
        pooled = features[0].new_zeros(
            len(rois), features[0].shape[1], self.output_size, self.output_size
        )
        for i, (x, stride) in enumerate(zip(features, self.strides, strict=True)):
            # Also without boxes: every level stays in the graph, as distributed training needs.
            chosen = (level == i).nonzero(as_tuple=True)[0]
            pooled = pooled.index_copy(0, chosen, self._align(x, rois[chosen], stride))
        return pooled

    def _pool_static(self, features: list[Tensor], rois: Tensor, level: Tensor) -> Tensor:
        # A box beyond the map samples zeros only: the kernel leaves before it reads anything.
        outside = torch.cat((rois[:, :1], rois.new_full((len(rois), 4), -1e6)), dim=1)
        pooled = None
        for i, (x, stride) in enumerate(zip(features, self.strides, strict=True)):
            part = self._align(x, torch.where((level == i)[:, None], rois, outside), stride)
            pooled = part if pooled is None else pooled + part
        return pooled
