"""The anchors of one image, written out with loops and lists: slow, and plain to read."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms

from asag.modeling.proposal_generator.asag.anchors import ProbingRules
from asag.modeling.proposal_generator.asag.network import AnchorNetwork

Anchor = tuple[float, float, float, float, float]  # cx, cy, w, h in pixels, score


def predict(network: AnchorNetwork, patch: Tensor, which: int, mlp: torch.nn.Module) -> Tensor:
    """A patch (C, side, side) -> (A, 5), the location score in the last column."""
    tokens = patch.flatten(1).T
    norm = network.tokens[which].norm
    tokens = F.layer_norm(tokens, tokens.shape, norm.weight, norm.bias)
    tokens = tokens + network.tokens[which].position
    return mlp(tokens.flatten()).view(-1, 5).sigmoid()


def fixed_anchors(network: AnchorNetwork, p5: Tensor, height: int, width: int) -> list[Anchor]:
    side = network.side
    compressed = network.compress[2](p5[None])
    rows, columns = max(round(height / 32), 1), max(round(width / 32), 1)
    whole = F.interpolate(compressed[..., :rows, :columns], (2 * side, 2 * side), mode="bilinear")[
        0
    ]
    found = []
    for y in (0, 1):
        for x in (0, 1):
            patch = whole[:, y * side : (y + 1) * side, x * side : (x + 1) * side]
            for cx, cy, w, h, score in predict(network, patch, 0, network.fixed_mlp).tolist():
                found.append((cx / 2 + x / 2, cy / 2 + y / 2, w / 2, h / 2, score))
    p6 = network.p6(whole[None].relu())[0]
    found += [tuple(x) for x in predict(network, p6, 0, network.fixed_mlp).tolist()]
    return [(x * width, y * height, w * width, h * height, s) for x, y, w, h, s in found]


def probe(
    network: AnchorNetwork,
    features: Tensor,
    level: int,
    around: list[Anchor],
    height: int,
    width: int,
    rules: ProbingRules,
) -> list[Anchor]:
    """Anchors of the patches around some anchors."""
    side, stride = network.side, 2**level
    half = side * stride / 2
    squares = torch.tensor([(x - half, y - half, x + half, y + half) for x, y, *_ in around])
    keep = nms(squares, torch.tensor([a[4] for a in around]), rules.eta_iou).tolist()
    if rules.max_patches:
        keep = keep[: rules.max_patches]
    compressed = network.compress[level - 3](features[None])[0]
    pad_x, pad_y = (max(side - n, 0) for n in (compressed.shape[2], compressed.shape[1]))
    compressed = F.pad(compressed, (0, pad_x, 0, pad_y))
    found = []
    for i in keep:
        x0 = math.floor(around[i][0] / stride - side / 2)
        y0 = math.floor(around[i][1] / stride - side / 2)
        x0 = max(min(x0, math.ceil(width / stride) - side), 0)
        y0 = max(min(y0, math.ceil(height / stride) - side), 0)
        patch = compressed[:, y0 : y0 + side, x0 : x0 + side]
        for cx, cy, w, h, score in predict(network, patch, 5 - level, network.patch_mlp).tolist():
            cx, cy = (cx * side + x0) * stride, (cy * side + y0) * stride
            outside = cx >= width or cy >= height
            found.append((cx, cy, w * side * stride, h * side * stride, 0.0 if outside else score))
    return found


def generate(
    network: AnchorNetwork, maps: list[Tensor], height: int, width: int, rules: ProbingRules
) -> list[Anchor]:
    """All anchors of an image; maps are P3, P4, P5, each (C, H, W)."""

    def small_score_nothing(anchors: list[Anchor]) -> list[Anchor]:
        limit = rules.min_side
        return [(*a[:4], 0.0 if min(a[2:4]) < limit else a[4]) for a in anchors]

    current = small_score_nothing(fixed_anchors(network, maps[2], height, width))
    everything, output, first = current, [], True
    for level in (4, 3):
        half = network.side * 2**level / 2
        selected = [
            a for a in current if rules.eta_l < a[4] < rules.eta_h and max(a[2], a[3]) < half
        ]
        if level < rules.finest_level or len(selected) < rules.min_selected:
            break
        left = [a for a in current if not rules.replace or a not in selected]
        kept = [a for a in left if a[4] > rules.eta_f]
        if first and len(kept) < rules.min_anchors:
            kept = sorted(everything, key=lambda a: -a[4])[: rules.min_anchors]
        output, first = output + kept, False
        patches = probe(network, maps[level - 3], level, selected, height, width, rules)
        current = small_score_nothing(patches)
    kept = [a for a in current if a[4] > rules.eta_f]
    if first and len(kept) < rules.min_anchors:
        kept = sorted(everything, key=lambda a: -a[4])[: rules.min_anchors]
    return sorted(output + kept, key=lambda a: -a[4])[: rules.max_anchors]
