"""Feature extractors of timm: creation, selection of feature maps, access to stages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn


def create_extractor(
    name: str, pretrained: bool, drop_path_rate: float, options: Mapping[str, Any]
) -> nn.Module:
    """Creates a feature extractor of timm with all of its feature maps.

    Args:
        name: of a timm model.
        pretrained: let timm download its weights.
        drop_path_rate: stochastic depth rate of the last block, 0 to 1.
        options: further arguments of the timm model.

    Raises:
        ImportError: timm is not installed.
        ValueError: the name is unknown, the network is unsuitable as a backbone, or it has no
            weights.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            "MODEL.BACKBONE.NAME names a backbone of timm, which is not installed: pip install timm"
        ) from error
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(
            f"MODEL.TIMM.NAME is {name!r}, which timm {timm.__version__} does not know; {hint}"
            "timm.list_models() names them all"
        )
    options = dict(options)
    if drop_path_rate:
        options["drop_path_rate"] = drop_path_rate
    if timm.get_pretrained_cfg_value(name, "fixed_input_size"):
        options.setdefault("dynamic_img_size", True)
    try:
        return timm.create_model(name, features_only=True, pretrained=pretrained, **options)
    except TypeError as error:
        hint = (
            "set MODEL.TIMM.DROP_PATH_RATE to 0.0"
            if "drop_path_rate" in str(error)
            else "choose another network: detectors need one that takes images of any size"
        )
        raise ValueError(f"MODEL.TIMM.NAME is {name!r}: {error}; {hint}") from error
    except Exception as error:  # timm and its downloads raise many types
        reason = f"{type(error).__name__}: {error}"
        if pretrained:
            raise ValueError(
                f"MODEL.TIMM.PRETRAINED: timm gets no weights of {name} ({reason}). Without "
                "internet, name a file in MODEL.TIMM.WEIGHTS, or set MODEL.TIMM.PRETRAINED to False"
            ) from error
        raise ValueError(
            f"MODEL.TIMM.NAME {name!r}: timm makes no feature extractor of it ({reason}); choose "
            "another network"
        ) from error


def map_positions(name: str, strides: Sequence[int], requested: Sequence[int]) -> dict[int, int]:
    """Finds feature maps by stride.

    Args:
        name: of the network.
        strides: of all of its maps.
        requested: strides to find.

    Returns:
        Stride, ascending -> position of its last map.

    Raises:
        ValueError: a requested stride is missing or repeated, or none is requested.
    """
    available = {stride: i for i, stride in enumerate(strides) if stride & (stride - 1) == 0}
    missing = [x for x in requested if x not in available]
    if missing or not requested or len(set(requested)) < len(requested):
        raise ValueError(
            f"MODEL.TIMM.OUT_STRIDES is {tuple(requested)}, but {name} has maps of strides "
            f"{', '.join(map(str, available))}; choose different ones among these"
        )
    return {stride: available[stride] for stride in sorted(requested)}


def module_name(body: nn.Module, published: str) -> str | None:
    """Returns the name in an extractor of the module `published` of the network; None if missing.

    An extractor may hold the network as "model", or write the first dot as an underscore.
    """
    names = {name for name, _ in body.named_modules()}
    spellings = (published, f"model.{published}", published.replace(".", "_", 1))
    return next((x for x in spellings if x in names), None)


def drop_behind(body: nn.Module, last: str) -> None:
    """Removes the modules behind the map `last`: distributed training does not support parameters
    without gradients."""
    name = module_name(body, last) or ""
    if name and isinstance(body, nn.ModuleDict):
        keys = list(body)
        for key in keys[keys.index(name.partition(".")[0]) + 1 :]:
            del body[key]
    elif name.startswith("blocks.") and isinstance(body.blocks, nn.Sequential):
        del body.blocks[int(name.split(".")[1]) + 1 :]


def modules_up_to(body: nn.Module, freeze_at: int) -> list[tuple[str, nn.Module]]:
    """Returns names and modules that `MODEL.BACKBONE.FREEZE_AT` freezes, in order of use.

    Raises:
        ValueError: the stages of this network are not modules.
    """
    if freeze_at < 1:
        return []
    info, modules = body.feature_info, list(body.named_modules())
    ends = [module_name(body, x) for x in info.module_name()]
    if None in ends:
        raise ValueError(
            f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}, but a {type(body).__name__} of timm cannot "
            "be frozen in part; set it to 0"
        )
    inside = [x for x, stride in zip(ends, info.reduction(), strict=True) if stride <= 2**freeze_at]
    if inside:
        last = f"{inside[-1]}."
        end = max(i for i, (x, _) in enumerate(modules) if f"{x}.".startswith(last)) + 1
    else:  # modules in front of the stages or blocks
        first = re.sub(r"[._]\d+$", "", ends[0])
        end = next(i for i, (x, _) in enumerate(modules) if x.startswith(first))
    return modules[:end]
