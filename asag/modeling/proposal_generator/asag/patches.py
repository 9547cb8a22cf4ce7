"""Square patches of feature maps: choosing, placing and cutting them, for all images at once.

ASAG (Fu et al., ICCV 2023), Section 3.2. B images, A anchors, P patches, C channels. A patch has
`side` x `side` = T cells, which become its tokens. Corners are (column, row) in cells of the map
that a patch is cut from.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...layers.boxes import box_iou
from ...layers.exporting import is_exporting

_PICKS_BETWEEN_LOOKS = 16


def greedy_nms(
    boxes_xyxy: Tensor,
    scores: Tensor,
    candidates: Tensor,
    *,
    iou_threshold: float,
    limit: int | None = None,
    static: bool = False,
) -> tuple[Tensor, Tensor]:
    """Non-maximum suppression in every image at once: each round picks every image's best box.

    Args:
        boxes_xyxy: (B, A, 4).
        scores: (B, A), finite.
        candidates: (B, A) bool, which boxes take part.
        iou_threshold: a pick suppresses what overlaps it by more.
        limit: most picks an image; None picks until nothing is left.
        static: always `limit` rounds, without a look at the data from the host.

    Returns:
        Indices (B, P) in falling order of score, and (B, P) bool which of them are picks: P is the
        largest number of picks of an image, or `limit` when static.

    Raises:
        ValueError: static without a limit.
    """
    if static and limit is None:
        raise ValueError("static suppression needs a limit of picks")
    if static and _OPERATOR is not None and torch.compiler.is_compiling() and not is_exporting():
        return _OPERATOR(boxes_xyxy, scores, candidates, iou_threshold, limit)
    left = scores.masked_fill(~candidates, -torch.inf)
    suppresses = _suppression(boxes_xyxy, iou_threshold, all_pairs=static)
    indices, taken = [], []
    while limit is None or len(indices) < limit:
        look = not static and len(indices) % _PICKS_BETWEEN_LOOKS == 0
        if look and not bool((left > -torch.inf).any()):
            break
        best, index = left.max(dim=1, keepdim=True)  # (B, 1)
        indices.append(index)
        taken.append(best > -torch.inf)
        left = left.masked_fill(suppresses(index), -torch.inf)
    if not indices:
        empty = scores.new_zeros(len(scores), 0)
        return empty.long(), empty.bool()
    index, valid = torch.cat(indices, dim=1), torch.cat(taken, dim=1)
    if not static:
        width = int(valid.sum(dim=1).max())
        index, valid = index[:, :width], valid[:, :width]
    return index, valid


def _static_nms(
    boxes_xyxy: Tensor, scores: Tensor, candidates: Tensor, iou_threshold: float, limit: int
) -> tuple[Tensor, Tensor]:
    return greedy_nms(
        boxes_xyxy, scores, candidates, iou_threshold=iou_threshold, limit=limit, static=True
    )


def _static_nms_shapes(
    boxes_xyxy: Tensor, scores: Tensor, candidates: Tensor, iou_threshold: float, limit: int
) -> tuple[Tensor, Tensor]:
    index = scores.new_empty((scores.shape[0], limit), dtype=torch.long)
    return index, torch.empty_like(index, dtype=torch.bool)


def _nms_operator() -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Static suppression as one operator, for the compiler: it would write out every round, and
    take minutes for what is a few kernels a round anyway. None before torch 2.4."""
    if not hasattr(torch.library, "custom_op"):
        return None
    operator = torch.library.custom_op("asag::greedy_nms", _static_nms, mutates_args=())
    operator.register_fake(_static_nms_shapes)
    return operator


_OPERATOR = _nms_operator()


def _suppression(
    boxes_xyxy: Tensor, iou_threshold: float, all_pairs: bool
) -> Callable[[Tensor], Tensor]:
    """A function from picks (B, 1) to (B, A) bool, what they suppress: themselves and all that they
    overlap by more than the threshold.

    All pairs at once cost memory and leave a lookup to each pick; that pays where the number of
    picks is fixed, and an exported graph holds every one of them.
    """
    count = boxes_xyxy.shape[1]
    # An empty box does not overlap itself.
    itself = torch.eye(count, dtype=torch.bool, device=boxes_xyxy.device)
    if not all_pairs:

        def one_row(pick: Tensor) -> Tensor:
            chosen = boxes_xyxy.gather(1, pick[..., None].expand(-1, -1, 4))
            return (box_iou(boxes_xyxy, chosen) > iou_threshold) | itself[pick[:, 0]]

        return one_row
    pairs = box_iou(boxes_xyxy[:, :, None], boxes_xyxy[:, None]) > iou_threshold
    pairs = pairs | itself  # (B, A, A)
    return lambda pick: pairs.gather(1, pick[..., None].expand(-1, -1, count))[:, 0]


def map_cells(whwh: Tensor, stride: int) -> Tensor:
    """(B, 1, 2) columns and rows that the unpadded images cover in a map of this stride."""
    return (whwh[:, None, :2] / stride).ceil()


def pull_inside(corner: Tensor, cells: Tensor, side: int) -> Tensor:
    """Moves corners (B, P, 2) up and left until patches end with the image; may go below zero."""
    return torch.minimum(corner, cells - side)


def centered_corners(center_xy: Tensor, whwh: Tensor, stride: int, side: int) -> Tensor:
    """Corners (B, P, 2) int64 of patches around centers (B, P, 2) in pixels, inside the image.

    Where the image has fewer than `side` cells the corner is 0 and the patch runs into the padding.
    """
    corner = (center_xy / stride - side / 2).floor()
    return pull_inside(corner, map_cells(whwh, stride), side).long().clamp(min=0)


def crop_patches(features: Tensor, corner: Tensor, side: int) -> Tensor:
    """Cuts patches out of maps in one gather.

    Args:
        features: (B, C, H, W); zeros are added right and below up to `side` cells.
        corner: (B, P, 2) int64.
        side: cells of a patch's side.

    Returns:
        (B, P, T, C), tokens row by row.
    """
    height, width = features.shape[-2:]
    features = F.pad(features, (0, max(side - width, 0), 0, max(side - height, 0)))
    cells = torch.arange(side, device=corner.device)
    columns = (corner[..., 0, None] + cells)[..., None, :]  # (B, P, 1, side)
    rows = (corner[..., 1, None] + cells)[..., None]  # (B, P, side, 1)
    image = torch.arange(corner.shape[0], device=corner.device).view(-1, 1, 1, 1)
    return features.permute(0, 2, 3, 1)[image, rows, columns].flatten(2, 3)


def resize_valid(features: Tensor, whwh: Tensor, stride: int, size: int) -> Tensor:
    """Resizes the part of each map that its image covers to `size` x `size`.

    Bilinear without half-pixel alignment of corners, as `F.interpolate` does, written as two
    products with hat functions: every image has its own extent and needs no loop.

    Args:
        features: (B, C, H, W).
        whwh: (B, 4) sizes of the unpadded images.
        stride: pixels a cell; the image covers round(size / stride) cells, halves to even.
        size: cells of the result's side.

    Returns:
        (B, C, size, size).
    """
    extent = (whwh[:, :2] / stride).round().clamp(min=1)  # (B, 2)
    columns = _hat_weights(extent[:, 0], features.shape[-1], size).to(features.dtype)
    rows = _hat_weights(extent[:, 1], features.shape[-2], size).to(features.dtype)
    return rows[:, None] @ features @ columns[:, None].transpose(-1, -2)


def _hat_weights(extent: Tensor, cells: int, samples: int) -> Tensor:
    """(B, samples, cells): how much each cell adds to each sample along one axis."""
    extent = extent.clamp(max=cells)[:, None]
    sample = torch.arange(samples, device=extent.device, dtype=extent.dtype) + 0.5
    position = sample * (extent / samples) - 0.5  # (B, samples)
    position = torch.minimum(position.clamp(min=0), extent - 1)[..., None]
    cell = torch.arange(cells, device=extent.device, dtype=extent.dtype)
    return (1 - (position - cell).abs()).clamp(min=0)
