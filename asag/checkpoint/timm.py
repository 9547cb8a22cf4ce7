"""ImageNet weights of timm's networks: timm's own names, and EfficientNet-PyTorch's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from .mapping import NameTable
from .report import BATCH_COUNTER

# Where a detector keeps timm's network.
_BODY = re.compile(r"backbone\.(bottom_up\.)?body\.")
# A parameter that only EfficientNet-PyTorch's layout has.
EFFICIENTNET_MARK = "_conv_stem.weight"
_BLOCK = re.compile(r"blocks\.(\d+)\.(\d+)\.")


def body_prefix(model_names: Iterable[str]) -> str | None:
    """Prefix of the parameters of a detector's timm network; None if it has none."""
    return next((found[0] for name in model_names if (found := _BODY.match(name))), None)


def holds_timm_network(state: Mapping[str, Tensor], model_names: Iterable[str]) -> bool:
    """True if most of the detector's timm network is in the state, under timm's names or
    EfficientNet-PyTorch's."""
    names = _body_names(model_names)
    if not names:
        return False
    found = to_body_names(state, names).keys() & names
    return 2 * len(found) > len(names)


def timm_to_ours(state: Mapping[str, Tensor], model_names: Iterable[str]) -> dict[str, Tensor]:
    """Renames a network's weights to those of a detector's backbone, without the image classifier.

    Args:
        state: timm's or EfficientNet-PyTorch's names -> tensors.
        model_names: of the detector that shall have them.

    Raises:
        ValueError: the detector has no network of timm.
    """
    model_names = list(model_names)
    prefix = body_prefix(model_names)
    if prefix is None:
        raise ValueError(
            "these are the weights of a network of timm, but the model has none; set "
            "MODEL.BACKBONE.NAME to build_timm_fpn_backbone or build_timm_backbone, and "
            "MODEL.TIMM.NAME"
        )
    renamed = to_body_names(state, _body_names(model_names))
    return {f"{prefix}{name}": value for name, value in renamed.items()}


def to_body_names(state: Mapping[str, Tensor], body_names: Iterable[str]) -> dict[str, Tensor]:
    """Renames a network's weights to the names of a feature extractor of timm.

    The two differ in that an extractor may replace the first dot of a name by an underscore
    (`stages.0.` -> `stages_0.`). What lies behind the extractor's last part, such as the
    classifier, is left out; what lies in one of its parts stays, known to it or not.

    Args:
        state: timm's or EfficientNet-PyTorch's names -> tensors.
        body_names: parameters and buffers of the extractor.
    """
    body_names = list(body_names)
    if EFFICIENTNET_MARK in state:
        table = NameTable(
            source="EfficientNet-PyTorch", rules=efficientnet_rules(stage_depths(body_names))
        )
        unknown = set(table.unknown(state))
        state = table.to_ours({k: v for k, v in state.items() if k not in unknown})
    parts = {name.partition(".")[0] for name in body_names}
    published = {spelling: part for part in parts for spelling in _spellings(part)}
    renamed = {}
    for name, value in state.items():
        first, _, rest = name.partition(".")
        second, _, rest_of_two = rest.partition(".")
        if first in parts:
            renamed[name] = value
        elif part := published.get(f"{first}.{second}"):
            renamed[f"{part}.{rest_of_two}"] = value
    return renamed


def _spellings(part: str) -> list[str]:
    """Names with one dot that an extractor may have written with an underscore."""
    return [f"{part[: x.start()]}.{part[x.end() :]}" for x in re.finditer("_", part)]


def _body_names(model_names: Iterable[str]) -> set[str]:
    names = {name for name in model_names if not name.endswith(BATCH_COUNTER)}
    prefix = body_prefix(names)
    if prefix is None:
        return set()
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


# EfficientNet-PyTorch.


def stage_depths(names: Iterable[str]) -> list[int]:
    """Blocks of each stage of an EfficientNet in timm's names."""
    last: dict[int, int] = {}
    for name in names:
        if found := _BLOCK.match(name):
            stage, block = int(found[1]), int(found[2])
            last[stage] = max(block, last.get(stage, 0))
    return [last[stage] + 1 for stage in sorted(last)]


def efficientnet_rules(depths: Sequence[int]) -> tuple[tuple[str, str], ...]:
    """The names of EfficientNet-PyTorch, which numbers blocks through all stages -> timm's.

    Args:
        depths: blocks of each stage; those of the first expand nothing.
    """
    attention = (("_se_reduce.", "se.conv_reduce."), ("_se_expand.", "se.conv_expand."))
    unexpanded = (
        ("_depthwise_conv.", "conv_dw."),
        ("_bn1.", "bn1."),
        ("_project_conv.", "conv_pw."),
        ("_bn2.", "bn2."),
    )
    expanded = (
        ("_expand_conv.", "conv_pw."),
        ("_bn0.", "bn1."),
        ("_depthwise_conv.", "conv_dw."),
        ("_bn1.", "bn2."),
        ("_project_conv.", "conv_pwl."),
        ("_bn2.", "bn3."),
    )
    places = [(stage, block) for stage, depth in enumerate(depths) for block in range(depth)]
    return (
        ("_conv_stem.", "conv_stem."),
        ("_bn0.", "bn1."),
        *(
            (f"_blocks.{i}.{theirs}", f"blocks.{stage}.{block}.{ours}")
            for i, (stage, block) in enumerate(places)
            for theirs, ours in (*(expanded if stage else unexpanded), *attention)
        ),
        ("_conv_head.", "conv_head."),
        ("_bn1.", "bn2."),
        ("_fc.", "classifier."),
    )
