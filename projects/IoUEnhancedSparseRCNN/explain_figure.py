#!/usr/bin/env python
"""Draws the effect of IoU-enhanced attention and channel weighting on one query.

    python projects/IoUEnhancedSparseRCNN/explain_figure.py --image street.jpg --output why.png \\
        --config configs/IoUEnhancedSparseRCNN/iou_sparse_rcnn_r50_100pro_3x.yaml --weights x.pth

Top: attention of the query to the other queries, from the scores of this checkpoint normalized
without and with the IoU prior. Bottom, if the model has channel weighting: both channel masks and
the strength of the masked features in the box. B images, N queries, C channels, R = B * N, P
pooled positions.
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
from asag.modeling.roi_heads import ChannelWeightedInteraction, IoUEnhancedSelfAttention
from asag.modeling.roi_heads.sparse_rcnn.iou_esa import iou_prior, iou_weighted_softmax

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

CHOSEN = "yellow"
TASKS = {"cls": "classification", "reg": "regression"}


@dataclass
class Explanation:
    """Attention and channel masks of one query in one stage.

    Attributes:
        query: its index.
        boxes_xyxy: (N, 4) input boxes of the stage, pixels of the network input.
        plain, enhanced: (N,) the query's attention, mean of the heads, without and with the prior.
        overlap: (N,) IoU of the query's box with every box.
        masks: task -> (C,) channel mask; empty without channel weighting.
        strength: task -> (P, P) mean over channels of the masked box features.
    """

    query: int
    boxes_xyxy: Tensor
    plain: Tensor
    enhanced: Tensor
    overlap: Tensor
    masks: dict[str, Tensor]
    strength: dict[str, Tensor]

    @property
    def wasted(self) -> float:
        """Share of the plain attention on boxes without any overlap."""
        return float(self.plain[self.overlap == 0].sum())


class Recorder:
    """Records inputs and output of modules during one forward pass."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.inputs: dict[str, tuple] = {}
        self.output: dict[str, Any] = {}
        self._hooks = [m.register_forward_hook(self._keep(name)) for name, m in modules.items()]

    def _keep(self, name: str):
        def hook(_: nn.Module, inputs: tuple, output: Any) -> None:
            self.inputs[name], self.output[name] = inputs, output

        return hook

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


@torch.no_grad()
def explain(
    model: SparseDetector, image: Tensor, stage: int = -1, query: int | None = None
) -> Explanation:
    """Runs the model on an image and computes attention and masks of one stage.

    Args:
        model: with IoU-enhanced attention, in evaluation mode.
        image: (3, H, W) in the model's color order.
        stage: index of the stage, negative from the last.
        query: index of the query; default: the one with the highest final score.

    Raises:
        ValueError: the attention is of another kind, or there is no such stage or query.
    """
    stages = model.roi_heads.stages
    if not -len(stages) <= stage < len(stages):
        raise ValueError(f"there is no stage {stage}: the model has {len(stages)}")
    attention, interaction = stages[stage].attention, stages[stage].interaction
    if not isinstance(attention, IoUEnhancedSelfAttention):
        raise ValueError(
            f"stage {stage} has {type(attention).__name__}; the figure needs a model with "
            "MODEL.DECODER.SELF_ATTENTION 'iou_esa'"
        )
    modules: dict[str, nn.Module] = {"heads": model.roi_heads, "attention": attention}
    if isinstance(interaction, ChannelWeightedInteraction):
        for task in TASKS:
            path = getattr(interaction, f"{task}_path")
            modules |= {f"mask_{task}": path.mask, f"seen_{task}": path.mask_activation}
    with Recorder(modules) as seen:
        model([{"image": image}])
    if query is None:
        query = int(seen.output["heads"].logits[-1, 0].amax(dim=-1).argmax())
    content, boxes, valid = seen.inputs["attention"]
    if not 0 <= query < content.shape[1]:
        raise ValueError(f"there is no query {query}: the image has {content.shape[1]}")
    q, k, _ = attention.project(content)
    scores, prior = attention.scores(q, k), iou_prior(boxes, valid)
    weights = [iou_weighted_softmax(scores, p) for p in (torch.ones_like(prior), prior)]
    plain, enhanced = (w[0, :, query].mean(dim=0).cpu() for w in weights)
    tasks = [task for task in TASKS if f"mask_{task}" in modules]
    return Explanation(
        query=query,
        boxes_xyxy=boxes[0].cpu(),
        plain=plain,
        enhanced=enhanced,
        overlap=prior[0, 0, query].cpu(),
        masks={t: seen.output[f"mask_{t}"][0, query].cpu() for t in tasks},
        strength={t: _square(seen.output[f"seen_{t}"][query].mean(dim=-1)).cpu() for t in tasks},
    )


def _square(positions: Tensor) -> Tensor:
    side = math.isqrt(len(positions))
    return positions.view(side, side)


def draw(explanation: Explanation, image_rgb: np.ndarray) -> Figure:
    """Draws the figure; `image_rgb` is the (H, W, 3) network input."""
    rows = 2 if explanation.masks else 1
    figure = plt.figure(figsize=(12, 5 * rows), layout="constrained")
    upper, *lower = figure.subfigures(rows, 1) if rows > 1 else [figure]
    wasted = f"{100 * explanation.wasted:.0f}% of it on boxes that do not overlap"
    left, right = upper.subplots(1, 2)
    _draw_attention(left, image_rgb, explanation, explanation.plain)
    left.set_title(f"attention without IoU\n{wasted}")
    _draw_attention(right, image_rgb, explanation, explanation.enhanced)
    right.set_title("attention times IoU, normalized")
    if lower:
        _draw_masks(lower[0], image_rgb, explanation)
    return figure


def _draw_attention(axes: Axes, image_rgb: np.ndarray, seen: Explanation, weights: Tensor) -> None:
    """Draws every other box with redness and opacity proportional to its attention."""
    axes.imshow(image_rgb)
    axes.set_axis_off()
    # The query's own weight is not drawn, so it must not determine the scale.
    others = [i for i in weights.argsort().tolist() if i != seen.query]
    top = max((float(weights[i]) for i in others), default=0.0) or 1.0
    for i in others:
        share = float(weights[i]) / top
        _add_box(axes, seen.boxes_xyxy[i], plt.cm.autumn(1 - share), 1 + 2 * share, share)
    _add_box(axes, seen.boxes_xyxy[seen.query], CHOSEN, 3, 1)
    height, width = image_rgb.shape[:2]
    axes.set(xlim=(0, width), ylim=(height, 0))


def _add_box(axes: Axes, box: Tensor, color: object, width: float, alpha: float) -> None:
    x1, y1, x2, y2 = box.tolist()
    axes.add_patch(
        Rectangle(
            (x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=width, alpha=alpha
        )
    )


def _draw_masks(figure: Figure, image_rgb: np.ndarray, seen: Explanation) -> None:
    """Draws the masks (channels ordered by their difference), and the features in the box."""
    axes = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    order = (seen.masks["cls"] - seen.masks["reg"]).argsort()
    for task, name in TASKS.items():
        axes[0].plot(seen.masks[task][order].numpy(), label=name)
    axes[0].set(ylim=(0, 1), xlabel="channel, sorted by the difference", title="channel masks")
    axes[0].legend()
    height, width = image_rgb.shape[:2]
    x1, y1, x2, y2 = seen.boxes_xyxy[seen.query].tolist()
    for panel, (task, name) in zip(axes[1:], TASKS.items(), strict=True):
        panel.imshow(image_rgb)
        strength = seen.strength[task].numpy()
        panel.imshow(strength, extent=(x1, x2, y2, y1), alpha=0.6, interpolation="bilinear")
        shown = (max(x1, 0), min(x2, width), min(y2, height), max(y1, 0))
        if shown[0] < shown[1] and shown[3] < shown[2]:
            panel.set(xlim=shown[:2], ylim=shown[2:])
        panel.set_axis_off()
        panel.set_title(f"features for {name}")


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
    parser.add_argument("options", nargs="*", metavar="KEY VALUE", help="overrides")
    given = parser.parse_args(arguments)
    try:
        cfg, model = open_model(given.config, given.options, given.weights)
        image, image_rgb = read_picture(given.image, cfg)
        explanation = explain(model, image, given.stage, given.query)
    except (OSError, KeyError, ValueError, AssertionError) as error:
        print(f"explain_figure: {error}", file=sys.stderr)
        return 1
    draw(explanation, image_rgb).savefig(given.output, dpi=120, bbox_inches="tight")
    print(f"query {explanation.query} of stage {given.stage}: {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
