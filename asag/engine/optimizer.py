"""Optimisers with one parameter group per distinct (learning rate, weight decay).

A group per parameter, as Detectron2 builds them, costs one kernel launch per parameter and step;
merged groups let the fused and foreach implementations do their work.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from ..modeling.registry import check_choice

# Detectron2 keeps a feature pyramid inside of the backbone module, but no author of this family
# counts it as backbone when it comes to learning rates.
BACKBONE_PREFIX, PYRAMID_PREFIX = "backbone.", "backbone.fpn_"


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    base_lr: float,
    weight_decay: float,
    backbone_multiplier: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups trainable parameters by learning rate; frozen ones and repetitions are left out.

    The weight decay holds for every parameter, norms, biases and embeddings included, as in the
    code of all authors of this family. Detectron2's SOLVER.WEIGHT_DECAY_NORM,
    SOLVER.WEIGHT_DECAY_BIAS and SOLVER.BIAS_LR_FACTOR are therefore not read.

    Args:
        named_parameters: of the model without any wrapper, so that the backbone's names start with
            "backbone.".
        base_lr: learning rate of everything but the backbone.
        weight_decay: of every parameter.
        backbone_multiplier: learning rate of the backbone as a multiple of `base_lr`.

    Returns:
        One group for each distinct learning rate, in the order in which they first occur.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    seen: set[int] = set()
    for name, parameter in named_parameters:
        if not parameter.requires_grad or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        own = name.startswith(BACKBONE_PREFIX) and not name.startswith(PYRAMID_PREFIX)
        multiplier = backbone_multiplier if own else 1.0
        groups.setdefault(base_lr * multiplier, []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "weight_decay": weight_decay}
        for lr, parameters in groups.items()
    ]


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW (betas 0.9 and 0.999) or SGD (SOLVER.MOMENTUM, SOLVER.NESTEROV) of SOLVER.*.

    AdamW is fused where torch has that for the parameters' device. Gradient clipping is not part of
    the optimiser; see `asag.engine.step`.

    Raises:
        ValueError: an unknown SOLVER.OPTIMIZER, or a model without trainable parameters.
    """
    solver = cfg.SOLVER
    check_choice("SOLVER.OPTIMIZER", solver.OPTIMIZER, ("ADAMW", "SGD"))
    groups = parameter_groups(
        model.named_parameters(),
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        backbone_multiplier=solver.BACKBONE_MULTIPLIER,
    )
    if not groups:
        raise ValueError("the model has no trainable parameter; lower MODEL.BACKBONE.FREEZE_AT")
    if solver.OPTIMIZER == "SGD":
        return torch.optim.SGD(
            groups, lr=solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV
        )
    try:
        return torch.optim.AdamW(groups, lr=solver.BASE_LR, fused=True)
    except RuntimeError:  # this torch has no fused kernel for the device
        return torch.optim.AdamW(groups, lr=solver.BASE_LR)
