"""Square patches of feature maps: suppression, placement and cropping for all images at once.

ASAG (Fu et al., ICCV 2023), Section 3.2. B images, A anchors, P patches, C channels. A patch has
`side` x `side` = T cells, which become its tokens. Corners are (column, row) in cells of the map
that a patch is cropped from.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...layers.boxes import box_iou
from ...layers.exporting import is_exporting

_PICKS_BETWEEN_CHECKS = 16


def greedy_nms(
    boxes_xyxy: Tensor,
    scores: Tensor,
    candidates: Tensor,
    *,
    iou_threshold: float,
    limit: int | None = None,
    static: bool = False,
) -> tuple[Tensor, Tensor]:
    """Non-maximum suppression for all images at once: each round picks the best box of every image.

    Args:
        boxes_xyxy: (B, A, 4).
        scores: (B, A), finite.
        candidates: (B, A) bool mask of the boxes that take part.
        iou_threshold: a pick suppresses boxes with a larger IoU.
        limit: largest number of picks an image; None is no limit.
        static: always run `limit` rounds, without synchronization.

    Returns:
        Indices (B, P) in descending order of score, and a mask (B, P) of the picks. P is the
        largest number of picks of an image, or `limit` if `static`.

    Raises:
        ValueError: `static` without a limit.
    """
    if static and limit is None:
        raise ValueError("limit is None; static suppression needs a number")
    if static and _OPERATOR is not None and torch.compiler.is_compiling() and not is_exporting():
        return _OPERATOR(boxes_xyxy, scores, candidates, iou_threshold, limit)
    left = scores.masked_fill(~candidates, -torch.inf)
    suppresses = _suppression(boxes_xyxy, iou_threshold, all_pairs=static)
    indices, taken = [], []
    while limit is None or len(indices) < limit:
        check = not static and len(indices) % _PICKS_BETWEEN_CHECKS == 0
        if check and not bool((left > -torch.inf).any()):
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
    """Registers static suppression as an operator; None before torch 2.4.

    The compiler would unroll its rounds, which takes minutes without making it faster.
    """
    if not hasattr(torch.library, "custom_op"):
        return None
    operator = torch.library.custom_op("asag::greedy_nms", _static_nms, mutates_args=())
    operator.register_fake(_static_nms_shapes)
    return operator


_OPERATOR = _nms_operator()


def _suppression(
    boxes_xyxy: Tensor, iou_threshold: float, all_pairs: bool
) -> Callable[[Tensor], Tensor]:
    """Returns a function from picks (B, 1) to masks (B, A) of the boxes they suppress: themselves
    and all boxes that overlap them by more than the threshold.

    With `all_pairs` the IoUs are computed beforehand: this needs more memory but leaves only a
    lookup to each pick, which is better for static shapes and exported graphs.
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
    """Returns the columns and rows (B, 1, 2) of the unpadded images in a map of this stride."""
    return (whwh[:, None, :2] / stride).ceil()


def pull_inside(corner: Tensor, cells: Tensor, side: int) -> Tensor:
    """Moves corners (B, P, 2) up and left until patches end inside of the image; may become
    negative."""
    return torch.minimum(corner, cells - side)


def centered_corners(center_xy: Tensor, whwh: Tensor, stride: int, side: int) -> Tensor:
    """Returns corners (B, P, 2), int64, of patches around centers (B, P, 2) in pixels.

    Patches are moved inside of the image; if it has fewer than `side` cells, the corner is 0 and
    the patch includes padding.
    """
    corner = (center_xy / stride - side / 2).floor()
    return pull_inside(corner, map_cells(whwh, stride), side).long().clamp(min=0)


def crop_patches(features: Tensor, corner: Tensor, side: int) -> Tensor:
    """Crops patches from feature maps by one gather.

    Args:
        features: (B, C, H, W), padded with zeros at the right and bottom to at least `side` cells.
        corner: (B, P, 2) int64.
        side: side of a patch in cells.

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
    """Resizes the valid part of each feature map to `size` x `size`.

    Bilinear like `F.interpolate` with align_corners=False, computed by two products with hat
    functions, so that images of different sizes need no loop.

    Args:
        features: (B, C, H, W).
        whwh: (B, 4) sizes of the unpadded images.
        stride: pixels a cell; the image covers round(size / stride) cells, halves to even.
        size: side of the result in cells.

    Returns:
        (B, C, size, size).
    """
    extent = (whwh[:, :2] / stride).round().clamp(min=1)  # (B, 2)
    columns = _hat_weights(extent[:, 0], features.shape[-1], size).to(features.dtype)
    rows = _hat_weights(extent[:, 1], features.shape[-2], size).to(features.dtype)
    return rows[:, None] @ features @ columns[:, None].transpose(-1, -2)


def _hat_weights(extent: Tensor, cells: int, samples: int) -> Tensor:
    """Returns the weights (B, samples, cells) of the cells in each sample along one axis."""
    extent = extent.clamp(max=cells)[:, None]
    sample = torch.arange(samples, device=extent.device, dtype=extent.dtype) + 0.5
    position = sample * (extent / samples) - 0.5  # (B, samples)
    position = torch.minimum(position.clamp(min=0), extent - 1)[..., None]
    cell = torch.arange(cells, device=extent.device, dtype=extent.dtype)
    return (1 - (position - cell).abs()).clamp(min=0)
