"""Reference cases of IoU-enhanced Sparse R-CNN: the head, the attention and the channel masks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asag.checkpoint import IOU_SPARSE_RCNN
from asag.modeling.roi_heads.sparse_rcnn.channel_weighting import ChannelWeightedInteraction
from asag.modeling.roi_heads.sparse_rcnn.iou_esa import (
    IoUEnhancedSelfAttention,
    iou_prior,
    iou_weighted_softmax,
)
from asag.modeling.roi_heads.sparse_rcnn.stage import DynamicConvStage

from .common import Check, UnknownCase
from .refinement import FEATURES, GRAD, RefinementCase, load_case

SUITE = "iou_sparse_rcnn"

PREFIX, OUR_PREFIX = "head.head_series.0.", "roi_heads.stages.0."
EXACT = 1e-5  # a single module, float32
BIG_LOGITS = 1e-3  # scores of several hundred, float32, relative


def verify(path: Path) -> Iterator[Check]:
    """Yields the comparisons of one file; raises UnknownCase if it is no case of this suite."""
    case = torch.load(path, weights_only=True) if path.suffix == ".pt" else {}
    if not isinstance(case, dict):
        raise UnknownCase("is not a dict of tensors")
    if "iou_BLL" in case:
        yield from verify_attention(case)
    elif "mask_cls_MD" in case:
        yield from verify_channel_weighting(case)
    else:
        yield from RefinementCase(load_case(path), IOU_SPARSE_RCNN, make_stage).checks()


def make_stage(config: dict[str, Any]) -> DynamicConvStage:
    """Builds a stage with the sizes of a case."""
    return DynamicConvStage(
        attention=IoUEnhancedSelfAttention(
            dim=config["hidden_dim"], num_heads=config["nheads"], dropout=config["dropout"]
        ),
        interaction=make_interaction(config, ffn_dim=config["dim_feedforward"]),
        dim=config["hidden_dim"],
        num_logits=config["num_classes"],
        num_cls_layers=config["num_cls"],
        num_reg_layers=config["num_reg"],
        dropout=config["dropout"],
    )


def make_interaction(config: dict[str, Any], *, ffn_dim: int) -> ChannelWeightedInteraction:
    """Builds dynamic convolution and the two task paths with the sizes of a case."""
    return ChannelWeightedInteraction(
        dim=config["hidden_dim"],
        dynamic_dim=config["dim_dynamic"],
        ffn_dim=ffn_dim,
        num_positions=config["pooler_resolution"] ** 2,
        dropout=config.get("dropout", 0.0),
    )


def load_part(module: nn.Module, part: str, weights: dict[str, Tensor], theirs: str) -> list[str]:
    """Loads published weights of one part of a stage; returns the names missing in the case."""
    ours = IOU_SPARSE_RCNN.to_ours({f"{PREFIX}{theirs}{k}": v for k, v in weights.items()})
    state = {k.removeprefix(f"{OUR_PREFIX}{part}."): v for k, v in ours.items()}
    missing, unexpected = module.load_state_dict(state, strict=False)
    if unexpected:
        raise KeyError(f"weights without a place in {type(module).__name__}: {unexpected}")
    return missing


def part_gradients(module: nn.Module, part: str, theirs: str) -> dict[str, Tensor]:
    """Returns the gradients of one part of a stage under their published names."""
    ours = {f"{OUR_PREFIX}{part}.{k}": p.grad for k, p in module.named_parameters()}
    return {
        k.removeprefix(f"{PREFIX}{theirs}"): v for k, v in IOU_SPARSE_RCNN.to_theirs(ours).items()
    }


def verify_attention(case: dict[str, Any]) -> Iterator[Check]:
    """Compares IoU matrix, weights, output and gradients of both forms of the attention."""
    config, boxes = case["config"], case["boxes_xyxy"]
    attention = IoUEnhancedSelfAttention(dim=config["d_model"], num_heads=config["nhead"])
    missing = load_part(attention, "attention", case["weights"], "self_attn.")
    if missing:
        raise UnknownCase(f"weights lack {missing}")
    yield Check("iou", iou_prior(boxes)[:, 0], case["iou_BLL"], EXACT)
    for name, learned in (("defined", True), ("fused", False)):
        query = case["query_LBE"].transpose(0, 1).clone().requires_grad_()
        attention.zero_grad(set_to_none=True)
        # Boxes that require a gradient select the explicit form.
        output = attention(query, boxes.clone().requires_grad_(learned), None).transpose(0, 1)
        yield Check(f"{name}.output", output, case["output_LBE"], EXACT)
        yield Check(f"{name}.output_f64", output, case["output_LBE_f64"], EXACT)
        output.backward(case["grad_probe_LBE"])
        expected = case["grad_query_LBE"].transpose(0, 1)
        yield Check(f"{name}.grad.query", query.grad, expected, EXACT, GRAD)
        gradients = part_gradients(attention, "attention", "self_attn.")
        for key, grad in case["grad_weights"].items():
            yield Check(f"{name}.grad.{key}", gradients[key], grad, EXACT, GRAD)
        big = case["big_query_LBE"].transpose(0, 1)
        output = attention(big, boxes.clone().requires_grad_(learned), None).transpose(0, 1)
        expected = case["big_output_LBE_f64"]
        atol = BIG_LOGITS * float(expected.abs().max())
        yield Check(f"{name}.big_output", output, expected, atol, BIG_LOGITS)
    for prefix, dtype, atol in (("", torch.float32, EXACT), ("big_", torch.float64, EXACT)):
        query = case[f"{prefix}query_LBE"].transpose(0, 1).to(dtype)
        weights = attention_weights(attention.to(dtype), query, boxes.to(dtype))
        yield Check(f"{prefix}weights", weights, case[f"{prefix}attn_weights_BHLL_f64"], atol)


@torch.no_grad()
def attention_weights(
    attention: IoUEnhancedSelfAttention, query: Tensor, boxes_xyxy: Tensor
) -> Tensor:
    """Computes the weights (B, H, N, N) of Eq. 3."""
    q, k, _ = attention.project(query)
    return iou_weighted_softmax(attention.scores(q, k), iou_prior(boxes_xyxy))


def verify_channel_weighting(case: dict[str, Any]) -> Iterator[Check]:
    """Compares channel masks and object features of both tasks, forward and backward."""
    module = make_interaction(case["config"], ffn_dim=8)
    load_part(module, "interaction", case["weights"], "inst_interact.")
    query = case["pro_features_1MD"].clone().requires_grad_()
    features = case["roi_features_PMD"].clone().requires_grad_()
    filtered = module.conv(query[0], features.transpose(0, 1))
    outputs = []
    for task, path in (("cls", module.cls_path), ("reg", module.reg_path)):
        yield Check(f"mask_{task}", path.mask(query[0]), case[f"mask_{task}_MD"], EXACT)
        outputs.append(path.object_feature(query, filtered)[0])
        yield Check(f"out_{task}", outputs[-1], case[f"out_{task}_MD"], FEATURES)
    torch.stack(outputs).backward(case["grad_probe_2MD"])
    for name, leaf in (("pro_features", query), ("roi_features", features)):
        expected = case[f"grad_{name}"]
        yield Check(f"grad.{name}", leaf.grad, expected, GRAD * float(expected.abs().max()), GRAD)
