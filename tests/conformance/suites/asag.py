"""Reference cases of ASAG, distinguished by their keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from .asag_generator import verify_generator
from .asag_heads import verify_block, verify_decoder, verify_deformable, verify_end_to_end
from .asag_training import (
    verify_denoising,
    verify_losses,
    verify_patch_targets,
    verify_query_weights,
    verify_training_patches,
)
from .common import Check, UnknownCase

SUITE = "asag"


def verify(path: Path) -> Iterator[Check]:
    """Yields the comparisons of one file; raises UnknownCase if it is no case of this suite."""
    case = torch.load(path, weights_only=True) if path.suffix == ".pt" else None
    if not isinstance(case, dict):
        raise UnknownCase("is not a dict of tensors")
    names = set(case.get("state_dict", ()))
    inner = case.get("cases", {})
    first = set(next(iter(inner.values()), {})) if isinstance(inner, dict) else set()
    if "crop_position" in case:
        yield from verify_training_patches(case)
    elif "patch_levels" in case:
        yield from verify_patch_targets(case)
    elif {"w_pos", "w_neg", "score", "iou"} <= case.keys():
        yield from verify_query_weights(case)
    elif {"predictions", "expected_true_flip"} <= first:
        yield from verify_losses(inner)
    elif {"num_dn", "box_noise_scale"} <= first:
        yield from verify_denoising(inner)
    elif {"memory", "spatial_shapes_hw"} <= case.keys():
        yield from verify_deformable(case)
    elif any(name.startswith("neck.") for name in names) and "thresholds" in case:
        yield from verify_end_to_end(case)
    elif "P6.weight" in names:
        yield from verify_generator(case)
    elif "tokens_norm1.weight" in names:
        yield from verify_block(case)
    elif "decoder_embedding.weight" in names:
        yield from verify_decoder(case)
    else:
        raise UnknownCase(f"keys {sorted(case)} fit no case")
