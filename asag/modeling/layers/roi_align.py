"""RoIAlign over a feature pyramid, with the level assigned by the size of a box (FPN, Lin et al.,
CVPR 2017, Eq. 1; Mask R-CNN, He et al., ICCV 2017).

B images, N boxes an image, R = B * N, C channels, P pooled side, H_l x W_l cells of level l.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import Tensor, nn
from torchvision.ops import roi_align

from .boxes import at_least_float32, box_area
from .exporting import is_exporting

CANONICAL_SIZE, CANONICAL_LEVEL = 224, 4

# Epsilon of the level rule, in torchvision's pooler (used with the legacy alignment) and in
# Detectron2's.
LEVEL_EPS = {"ROIAlign": 1e-6, "ROIAlignV2": 1e-8}


@dataclass
class FlatPyramid:
    """All cells of a feature pyramid as rows of one table, channels last.

    Attributes:
        table: (sum of B * H_l * W_l, C), level by level, image by image, row by row.
        first: (L,) first row of each level.
        height, width: (L,) cells of each level.
    """

    table: Tensor
    first: Tensor
    height: Tensor
    width: Tensor

    @classmethod
    def from_maps(cls, maps: Sequence[Tensor]) -> FlatPyramid:
        """Creates the table from one map (B, C, H_l, W_l) a level."""
        rows = [x.permute(0, 2, 3, 1).flatten(0, 2) for x in maps]
        device = maps[0].device
        count = torch.tensor([0, *(len(x) for x in rows[:-1])], device=device)
        height, width = (torch.tensor([x.shape[i] for x in maps], device=device) for i in (2, 3))
        return cls(torch.cat(rows), count.cumsum(0), height, width)


class PyramidRoIAlign(nn.Module):
    """Batched RoIAlign with the results of Detectron2's `ROIPooler`, but without its loop over the
    levels, which synchronizes host and device (24 times in six stages).

    Two methods, both with static shapes and without synchronization:

    - "kernel" (on a GPU): torchvision's kernel gets all boxes on every level. Boxes of other levels
      are moved out of the map, where the kernel returns zero at once, and the levels are summed.
    - "gather" (on a CPU): a pooled value is a weighted sum of a few cells, so pooling is a lookup
      of weighted rows in one table of all levels. Its inner loops run along the channels, those of
      the CPU kernel across them. `tools/benchmarks/benchmark_roi_align.py`
      compares the two.
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
            strides: pixels a cell of each level, consecutive powers of two.
            output_size: P.
            sampling_ratio: samples a bin and direction, 1 or more: an adaptive number has no
                static shape.
            aligned: half-pixel correction (ROIAlignV2); False is the legacy alignment.
            level_eps: added inside the logarithm of the level rule.

        Raises:
            ValueError: `strides` do not double from level to level.
        """
        super().__init__()
        levels = [int(math.log2(s)) for s in strides]
        consecutive = list(range(levels[0], levels[0] + len(levels)))
        if [2**x for x in levels] != list(strides) or levels != consecutive:
            raise ValueError(
                "MODEL.ROI_HEADS.IN_FEATURES names features of the strides "
                f"{list(strides)}; they must be powers of two that double from level to level"
            )
        self.strides = tuple(strides)
        self.min_level, self.max_level = levels[0], levels[-1]
        self.output_size = output_size
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.level_eps = level_eps

    def assign_levels(self, boxes_xyxy: Tensor) -> Tensor:
        """Returns the level index (...) of boxes (..., 4) in pixels; the finest for degenerate and
        NaN boxes."""
        size = box_area(boxes_xyxy).clamp(min=0).sqrt()
        level = torch.floor(CANONICAL_LEVEL + torch.log2(size / CANONICAL_SIZE + self.level_eps))
        level = level.clamp(self.min_level, self.max_level).nan_to_num(self.min_level)
        return level.long() - self.min_level

    def prepare(
        self, features: Sequence[Tensor], method: str | None = None
    ) -> list[Tensor] | FlatPyramid:
        """Prepares features that several calls of `forward` read.

        Args:
            features: one (B, C, H_l, W_l) map a level.
            method: "kernel", "gather", or None: chosen by the device, and "kernel" in an export,
                which has an operator for it.

        Returns:
            Features for `forward`.
        """
        # RoIAlign works in at least float32; converted once for all stages.
        maps = [at_least_float32(x) for x in features]
        if method is None:
            on_cpu = maps[0].device.type == "cpu" and not is_exporting()
            method = "gather" if on_cpu else "kernel"
        return maps if method == "kernel" else FlatPyramid.from_maps(maps)

    def forward(self, features: Sequence[Tensor] | FlatPyramid, boxes_xyxy: Tensor) -> Tensor:
        """Pools the features of each box.

        Args:
            features: one (B, C, H_l, W_l) map a level, or the result of `prepare`.
            boxes_xyxy: (B, N, 4) in pixels, not clipped to the image. No gradient flows to them.

        Returns:
            (R, C, P, P) in at least float32, images one after the other.
        """
        pyramid = features if isinstance(features, FlatPyramid) else self.prepare(features)
        # Boxes are rounded to float32 for any features, as Detectron2's `Boxes` does.
        boxes = boxes_xyxy.detach().float()
        batch, count = boxes.shape[:2]
        image = torch.arange(batch, device=boxes.device).repeat_interleave(count)
        boxes, level = boxes.flatten(0, 1), self.assign_levels(boxes).flatten()
        if isinstance(pyramid, FlatPyramid):
            return self._gather(pyramid, boxes.to(pyramid.table.dtype), level, image)
        return self._kernel(pyramid, boxes.to(pyramid[0].dtype), level, image)

    def _kernel(self, maps: list[Tensor], boxes: Tensor, level: Tensor, image: Tensor) -> Tensor:
        rois = torch.cat((image[:, None].to(boxes.dtype), boxes), dim=1)  # (R, 5)
        # The kernel returns zeros for a box beyond the map without reading any cell.
        outside = torch.cat((rois[:, :1], torch.full_like(boxes, -1e6)), dim=1)
        return sum(
            roi_align(
                x,
                torch.where((level == i)[:, None], rois, outside),
                output_size=self.output_size,
                spatial_scale=1.0 / stride,
                sampling_ratio=self.sampling_ratio,
                aligned=self.aligned,
            )
            for i, (x, stride) in enumerate(zip(maps, self.strides, strict=True))
        )

    def _gather(self, pyramid: FlatPyramid, boxes: Tensor, level: Tensor, image: Tensor) -> Tensor:
        height, width = pyramid.height[level], pyramid.width[level]
        scaled = boxes / boxes.new_tensor(self.strides)[level, None]
        rows, row_weights = self._taps(scaled[:, 1], scaled[:, 3], height)  # (R, P, T)
        columns, column_weights = self._taps(scaled[:, 0], scaled[:, 2], width)
        corner = pyramid.first[level] + image * height * width
        rows = corner[:, None, None] + rows * width[:, None, None]
        index = rows[:, :, None, :, None] + columns[:, None, :, None, :]  # (R, P, P, T, T)
        weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
        pooled = F.embedding_bag(
            index.flatten(3).flatten(0, 2),
            pyramid.table,
            per_sample_weights=weights.flatten(3).flatten(0, 2),
            mode="sum",
        )  # (R * P * P, C)
        side = self.output_size
        return pooled.view(len(boxes), side, side, -1).permute(0, 3, 1, 2)

    def _taps(self, low: Tensor, high: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the cells that the bins of an axis read, and their weights, (R, P, T) each with
        T = 2 cells a sample.

        Args:
            low, high: (R,) ends of the boxes in cells.
            cells: (R,) length of the axis.
        """
        if self.aligned:
            low, high = low - 0.5, high - 0.5
        extent = high - low if self.aligned else (high - low).clamp(min=1)
        bins, samples = self.output_size, self.sampling_ratio
        step = (extent / bins)[:, None]
        bin_, sample = (
            torch.arange(n, dtype=low.dtype, device=low.device) for n in (bins, samples)
        )
        # In the kernel's order of operations, for equal rounding: (R, P, samples).
        start = (low[:, None] + bin_ * step)[..., None]
        at = (start + ((sample + 0.5) * step / samples)[:, None]).flatten(1)
        # Samples more than a cell beyond the map are zero; nearer ones read its border.
        inside = (at >= -1) & (at <= cells[:, None])
        last = (cells[:, None] - 1).to(at.dtype)
        at = torch.minimum(at.clamp(min=0), last).nan_to_num(0)
        below = at.floor()
        above, share = torch.minimum(below + 1, last), at - below
        index = torch.stack((below, above), dim=-1).long()
        weight = torch.stack((1 - share, share), dim=-1) * inside[..., None] / samples
        return (x.unflatten(1, (bins, samples)).flatten(2) for x in (index, weight))


def build_pooler(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> PyramidRoIAlign:
    """Builds RoIAlign on `MODEL.ROI_HEADS.IN_FEATURES` by `MODEL.ROI_BOX_HEAD.POOLER_*`."""
    box_head = cfg.MODEL.ROI_BOX_HEAD
    return PyramidRoIAlign(
        strides=[input_shape[name].stride for name in cfg.MODEL.ROI_HEADS.IN_FEATURES],
        output_size=box_head.POOLER_RESOLUTION,
        sampling_ratio=box_head.POOLER_SAMPLING_RATIO,
        aligned=box_head.POOLER_TYPE == "ROIAlignV2",
        level_eps=LEVEL_EPS[box_head.POOLER_TYPE],
    )
