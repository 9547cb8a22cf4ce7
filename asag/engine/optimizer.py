"""Optimizers with one parameter group per distinct (learning rate, weight decay), and gradient
clipping.

One group per parameter, as Detectron2 builds them, costs a kernel launch per parameter and step;
merged groups are updated by the fused and foreach implementations in a few launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..modeling.registry import check_choice

Clipper = Callable[[Sequence[nn.Parameter]], Tensor]
"""Changes gradients in place and returns the total norm that they had before."""

# Detectron2 keeps the feature pyramid inside of the backbone module, but the published recipes of
# this family do not train it with the backbone's learning rate.
BACKBONE_PREFIX, PYRAMID_PREFIX = "backbone.", "backbone.fpn_"


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    base_lr: float,
    weight_decay: float,
    backbone_multiplier: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups trainable parameters by learning rate; frozen and repeated ones are skipped.

    The weight decay applies to every parameter, norms, biases and embeddings included, as in the
    official implementations of this family. Detectron2's SOLVER.WEIGHT_DECAY_NORM,
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


def build_optimizer(
    cfg: CfgNode, model: nn.Module, *, clip_in_step: bool = True
) -> torch.optim.Optimizer:
    """Builds AdamW (betas 0.9 and 0.999) or SGD (SOLVER.MOMENTUM, SOLVER.NESTEROV) from SOLVER.*.

    AdamW is fused where torch has a fused kernel for the device of the parameters.

    Args:
        cfg: SOLVER.{OPTIMIZER, BASE_LR, BACKBONE_MULTIPLIER, WEIGHT_DECAY, CLIP_GRADIENTS}.
        model: the detector, not wrapped.
        clip_in_step: clip the gradients at the start of every `step()`, as any training loop needs
            it; False: the caller clips (`build_clipper`).

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
    optimizer = _new_optimizer(solver, groups)
    clip = build_clipper(cfg) if clip_in_step else None
    if clip is not None:
        parameters = [p for group in groups for p in group["params"]]

        def clip_gradients(*_: Any) -> None:
            clip(parameters)

        optimizer.register_step_pre_hook(clip_gradients)
        # GradScaler lets a fused optimizer unscale the gradients in its kernel, which is after the
        # clipping; without this attribute it unscales them first.
        optimizer._step_supports_amp_scaling = False
    return optimizer


def _new_optimizer(solver: CfgNode, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if solver.OPTIMIZER == "SGD":
        return torch.optim.SGD(
            groups, lr=solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV
        )
    try:
        return torch.optim.AdamW(groups, lr=solver.BASE_LR, fused=True)
    except RuntimeError:  # this torch has no fused kernel for the device
        return torch.optim.AdamW(groups, lr=solver.BASE_LR)


@torch.no_grad()
def gradient_norm(parameters: Sequence[nn.Parameter], norm_type: float = 2.0) -> Tensor:
    """Computes the norm of all gradients together in a few kernels, without changing them.

    Returns:
        0-dim tensor on the gradients' device; zero if there are none.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros((), device=parameters[0].device)
    norms = torch.stack(torch._foreach_norm(gradients, norm_type))
    return torch.linalg.vector_norm(norms, norm_type)


def build_clipper(cfg: CfgNode) -> Clipper | None:
    """Builds the gradient clipping of SOLVER.CLIP_GRADIENTS.*.

    With FULL_MODEL (the default, as in the official implementations of this family) all gradients
    are scaled together so that their norm is at most CLIP_VALUE. Without it, CLIP_TYPE has the
    meaning of Detectron2: "norm" clips the norm of each parameter, "value" clamps every element.

    Returns:
        None if CLIP_GRADIENTS.ENABLED is False.

    Raises:
        ValueError: an unknown CLIP_TYPE, FULL_MODEL together with "value", or a CLIP_VALUE that is
            not positive.
    """
    c = cfg.SOLVER.CLIP_GRADIENTS
    if not c.ENABLED:
        return None
    if c.CLIP_TYPE == "full_model":
        raise ValueError(
            "SOLVER.CLIP_GRADIENTS.CLIP_TYPE is 'full_model'; write CLIP_TYPE 'norm' and "
            "FULL_MODEL True instead"
        )
    check_choice("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", c.CLIP_TYPE, ("norm", "value"))
    if c.FULL_MODEL and c.CLIP_TYPE == "value":
        raise ValueError(
            "SOLVER.CLIP_GRADIENTS.FULL_MODEL is True, but CLIP_TYPE 'value' clamps single "
            "elements; set FULL_MODEL False, or CLIP_TYPE 'norm'"
        )
    limit, norm_type = float(c.CLIP_VALUE), float(c.NORM_TYPE)
    if not limit > 0:
        raise ValueError(f"SOLVER.CLIP_GRADIENTS.CLIP_VALUE is {limit}; it must be positive")

    def full_model(parameters: Sequence[nn.Parameter]) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, limit, norm_type)

    def norm(parameters: Sequence[nn.Parameter]) -> Tensor:
        total = gradient_norm(parameters, norm_type)
        for parameter in parameters:
            nn.utils.clip_grad_norm_(parameter, limit, norm_type)
        return total

    def value(parameters: Sequence[nn.Parameter]) -> Tensor:
        total = gradient_norm(parameters, norm_type)
        nn.utils.clip_grad_value_(parameters, limit)
        return total

    return full_model if c.FULL_MODEL else {"norm": norm, "value": value}[c.CLIP_TYPE]
