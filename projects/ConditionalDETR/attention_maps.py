#!/usr/bin/env python
"""Draws the attention maps of the cross-attention heads for one query (Figs. 1 and 4).

    python projects/ConditionalDETR/attention_maps.py --image street.jpg --output maps.png \\
        --config configs/ConditionalDETR/conditional_detr_r50_50ep.yaml --weights x.pth

One column for each head; from top to bottom: spatial, content and combined attention, each a
softmax over the positions of the image. For DETR, the spatial attention is that of the whole query
with the positional part of the keys. H heads, h x w cells of the feature map.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asag.inference.figure_inputs import open_model, read_picture
from asag.modeling import SparseDetector
from asag.modeling.layers.attention import split_heads
from asag.modeling.roi_heads import DETRHeads
from asag.modeling.roi_heads.detr.conditional_attention import ConditionalCrossAttention
from asag.modeling.roi_heads.detr.cross_attention import CrossAttention
from asag.structures import ImageSizes

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

KINDS = ("spatial", "content", "combined")


@dataclass
class AttentionMaps:
    """Attention of one query in one stage.

    Attributes:
        query: its index.
        label, score: of its best class after the last stage.
        box_xyxy: (4,) its final box, pixels of the network input.
        point_xy: (2,) its reference point in pixels, None if it has none.
        maps: "spatial", "content", "combined" -> (H, h, w), each head summing to one.
    """

    query: int
    label: int
    score: float
    box_xyxy: Tensor
    point_xy: Tensor | None
    maps: dict[str, Tensor]


@torch.no_grad()
def explain(
    model: SparseDetector, image: Tensor, stage: int = -1, query: int | None = None
) -> AttentionMaps:
    """Runs the model on an image and computes the attention maps of one stage.

    Args:
        model: of the DETR family, in evaluation mode.
        image: (3, H, W) in the model's color order.
        stage: index of the stage, negative from the last.
        query: index of the query; default: the one with the highest final score.

    Raises:
        ValueError: the detector is of another kind, or there is no such stage or query.
    """
    heads = model.roi_heads
    if not isinstance(heads, DETRHeads):
        raise ValueError(
            f"the model's heads are {type(heads).__name__}; attention maps need 'DETRHeads' or "
            "'ConditionalDETRHeads'"
        )
    if not -len(heads.stages) <= stage < len(heads.stages):
        raise ValueError(f"there is no stage {stage}: the model has {len(heads.stages)}")
    attention, seen = heads.stages[stage].cross_attention, {}
    handles = [
        attention.register_forward_hook(lambda _m, args, _out: seen.update(attention=args)),
        heads.register_forward_hook(lambda _m, args, _out: seen.update(heads=args)),
    ]
    try:
        images = model.preprocess_images([{"image": image}])
        sizes = ImageSizes.from_images(images)
        predictions, _ = model.forward_stages(images.tensor, sizes)
    finally:
        for handle in handles:
            handle.remove()
    features, queries, _ = seen["heads"]
    feature = features[heads.in_feature]
    position, _ = heads.positions(feature, sizes)

    scores = predictions.logits[-1, 0].softmax(-1)[:, :-1]
    if not model.softmax:
        scores = predictions.logits[-1, 0].sigmoid()
    if query is None:
        query = int(scores.amax(dim=-1).argmax())
    if not 0 <= query < len(scores):
        raise ValueError(f"there is no query {query}: the image has {len(scores)}")
    score, label = scores[query].max(dim=-1)
    parts = score_parts(attention, seen["attention"], position)
    hw = tuple(feature.shape[-2:])
    points = queries.points_xy
    return AttentionMaps(
        query=query,
        label=int(label),
        score=float(score),
        box_xyxy=predictions.boxes_xyxy[-1, 0, query].cpu(),
        point_xy=None if points is None else (points[0, query] * sizes.whwh[0, :2]).cpu(),
        maps={k: x[0, :, query].softmax(-1).unflatten(-1, hw).cpu() for k, x in parts.items()},
    )


def score_parts(
    attention: CrossAttention, arguments: tuple[Any, ...], position: Tensor
) -> dict[str, Tensor]:
    """Computes spatial, content and combined scores, (1, H, N, L) each, as scaled by attention.

    The combined scores are the sum of the others.
    """
    query, object_query, spatial, memory, _ = arguments
    if isinstance(attention, ConditionalCrossAttention):
        c_q, p_q, c_k, p_k, _ = attention.parts(query, object_query, spatial, memory)
        scale = 1 / math.sqrt(2 * c_q.shape[-1])
        content, place = c_q @ c_k.mT * scale, p_q @ p_k.mT * scale
        return {"spatial": place, "content": content, "combined": content + place}
    q, k, _ = attention.project(query, object_query, None, memory)
    weight, _ = attention.projections()[1]
    p_k = split_heads(F.linear(position, weight), attention.num_heads)
    scale = 1 / math.sqrt(q.shape[-1])
    combined, place = q @ k.mT * scale, q @ p_k.mT * scale
    return {"spatial": place, "content": combined - place, "combined": combined}


def draw(seen: AttentionMaps, image_rgb: np.ndarray, heads: Sequence[int] | None = None) -> Figure:
    """Draws the figure; `image_rgb` is the (H, W, 3) network input, `heads` are the columns."""
    heads = range(len(seen.maps["combined"])) if heads is None else heads
    height, width = image_rgb.shape[:2]
    size = (2.4 * len(heads), 2.4 * height / width * len(KINDS) + 0.4)
    figure, rows = plt.subplots(
        len(KINDS), len(heads), figsize=size, squeeze=False, layout="constrained"
    )
    x1, y1, x2, y2 = seen.box_xyxy.tolist()
    for kind, row in zip(KINDS, rows, strict=True):
        for head, axes in zip(heads, row, strict=True):
            axes.imshow(image_rgb)
            shade = seen.maps[kind][head].numpy()
            extent = (0, width, height, 0)
            axes.imshow(shade, extent=extent, alpha=0.65, interpolation="bilinear", cmap="jet")
            axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="lime"))
            if seen.point_xy is not None:
                axes.plot(*seen.point_xy.tolist(), "+", color="white")
            axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
            if kind == KINDS[0]:
                axes.set_title(f"head {head}", fontsize=9)
        row[0].set_ylabel(kind)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="yaml file of the model")
    parser.add_argument("--weights", help="checkpoint; default: MODEL.WEIGHTS of the configuration")
    parser.add_argument("--image", required=True)
    parser.add_argument("--output", type=Path, required=True, help="image file to write")
    parser.add_argument("--stage", type=int, default=-1, help="default: the last one")
    parser.add_argument("--query", type=int, help="default: the one with the best score")
    parser.add_argument("--heads", type=int, nargs="+", help="default: all")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="KEY VALUE, last")
    given = parser.parse_args(arguments)
    try:
        cfg, model = open_model(given.config, given.options, given.weights)
        absent = [h for h in given.heads or () if not 0 <= h < cfg.MODEL.DECODER.NUM_HEADS]
        if absent:
            raise ValueError(f"no heads {absent}: the model has {cfg.MODEL.DECODER.NUM_HEADS}")
        image, image_rgb = read_picture(given.image, cfg)
        seen = explain(model, image, given.stage, given.query)
    except (OSError, KeyError, ValueError, AssertionError) as error:
        print(f"attention_maps: {error}", file=sys.stderr)
        return 1
    given.output.parent.mkdir(parents=True, exist_ok=True)
    draw(seen, image_rgb, given.heads).savefig(given.output, dpi=120)
    print(
        f"query {seen.query}, class {seen.label} with score {seen.score:.2f}, stage {given.stage}: "
        f"{given.output}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
