"""Reference cases of Sparse R-CNN: the whole head, and the dynamic convolution alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asag.checkpoint import SPARSE_RCNN
from asag.modeling.layers.attention import SelfAttention
from asag.modeling.roi_heads import DynamicConvStage
from asag.modeling.roi_heads.sparse_rcnn.dynamic_conv import (
    DynamicConv,
    DynamicInteraction,
    RoIProjection,
)

from .common import Check, UnknownCase
from .refinement import FEATURES, GRAD, RefinementCase, load_case

SUITE = "sparse_rcnn"


def verify(path: Path) -> Iterator[Check]:
    """Yields the comparisons of one file; raises UnknownCase if it is no case of this suite."""
    case = torch.load(path, weights_only=True) if path.suffix == ".pt" else {}
    if not isinstance(case, dict):
        raise UnknownCase("is not a dict of tensors")
    if "pro_features_1MD" in case and "out_MD" in case:
        yield from verify_dynamic_conv(case)
    else:
        yield from RefinementCase(load_case(path), SPARSE_RCNN, make_stage).checks()


def make_stage(config: dict[str, Any]) -> DynamicConvStage:
    """Builds a stage with the sizes of a case."""
    return DynamicConvStage(
        attention=SelfAttention(
            dim=config["hidden_dim"], num_heads=config["nheads"], dropout=config["dropout"]
        ),
        interaction=DynamicInteraction(
            dim=config["hidden_dim"],
            dynamic_dim=config["dim_dynamic"],
            ffn_dim=config["dim_feedforward"],
            num_positions=config["pooler_resolution"] ** 2,
            dropout=config["dropout"],
        ),
        dim=config["hidden_dim"],
        num_logits=config["num_classes"],
        num_cls_layers=config["num_cls"],
        num_reg_layers=config["num_reg"],
        dropout=config["dropout"],
    )


def verify_dynamic_conv(case: dict[str, Any]) -> Iterator[Check]:
    """Compares dynamic convolution and projection, forward and backward."""
    config = case["config"]
    conv = DynamicConv(dim=config["hidden_dim"], dynamic_dim=config["dim_dynamic"])
    project = RoIProjection(
        dim=config["hidden_dim"], num_positions=config["pooler_resolution"] ** 2
    )
    stage = nn.Module()
    stage.interaction = nn.Module()
    stage.interaction.conv, stage.interaction.project = conv, project
    prefix = "head.head_series.0.inst_interact."
    ours = SPARSE_RCNN.to_ours({prefix + k: v for k, v in case["weights"].items()})
    stage.load_state_dict({k.removeprefix("roi_heads.stages.0."): v for k, v in ours.items()})
    query = case["pro_features_1MD"].clone().requires_grad_()
    features = case["roi_features_PMD"].clone().requires_grad_()
    output = project(conv(query[0], features.transpose(0, 1)))
    output.backward(case["grad_probe_MD"])
    yield Check("out", output, case["out_MD"], FEATURES)
    for name, leaf in (("pro_features", query), ("roi_features", features)):
        expected = case[f"grad_{name}"]
        yield Check(f"grad.{name}", leaf.grad, expected, GRAD * float(expected.abs().max()), GRAD)
