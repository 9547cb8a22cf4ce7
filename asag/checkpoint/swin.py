"""ImageNet weights of Swin Transformers: the authors' release and torchvision's."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .mapping import NameTable

OURS = "backbone.bottom_up."
# Patch merging closes a stage in the authors' layout and stands between the stages in ours.
_STAGES = tuple((f"layers.{i}.", f"{OURS}features.{2 * i + 1}.") for i in range(4))
_MERGES = tuple((f"layers.{i}.downsample.", f"{OURS}features.{2 * i + 2}.") for i in range(3))

SWIN_IMAGENET = NameTable(
    source="the Swin Transformer release",
    rules=(
        ("patch_embed.proj.", f"{OURS}features.0.0."),
        ("patch_embed.norm.", f"{OURS}features.0.2."),
        *_MERGES,
        *(
            (f"{theirs}blocks.{{j}}.{name}", f"{ours}{{j}}.{name}")
            for theirs, ours in _STAGES
            for name in ("norm1.", "norm2.", "attn.")
        ),
        *((f"{theirs}blocks.{{j}}.mlp.fc1.", f"{ours}{{j}}.mlp.0.") for theirs, ours in _STAGES),
        *((f"{theirs}blocks.{{j}}.mlp.fc2.", f"{ours}{{j}}.mlp.3.") for theirs, ours in _STAGES),
    ),
)

SWIN_TORCHVISION = NameTable(
    source="torchvision's Swin Transformer", rules=(("features.", f"{OURS}features."),)
)

# The classifier and its norm have no place in a detector, and these buffers follow from the window.
_CLASSIFIER = ("norm.", "head.")
_BUFFERS = ("relative_position_index", "attn_mask")


def swin_to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames ImageNet weights of either layout to a detector's backbone.

    The norms behind the four stages are new in a detector: no weight names them.

    Args:
        state: published name -> tensor, the file's "model" entry where it has one.

    Raises:
        KeyError: the names are of neither layout; the message lists some.
    """
    kept = {
        name: value
        for name, value in state.items()
        if not name.startswith(_CLASSIFIER) and not name.endswith(_BUFFERS)
    }
    table = SWIN_TORCHVISION if SWIN_TORCHVISION.covers(kept) else SWIN_IMAGENET
    return table.to_ours(kept)
