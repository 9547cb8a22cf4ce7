"""Parameter names of the DETR authors' checkpoints, and their classes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .mapping import NameTable
from .resnet import torchvision_rules

THEIRS_ENCODER, OURS_ENCODER = "transformer.encoder.layers.{i}.", "neck.layers.{i}."
THEIRS_STAGE, OURS_STAGE = "transformer.decoder.layers.{i}.", "roi_heads.stages.{i}."

# Category numbers of COCO that no object has; the published classifiers have a column for them.
UNUSED_CATEGORIES = (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
PUBLISHED_COLUMNS = 91
CLASSIFIER = "roi_heads.class_logits"

# What DETR and Conditional DETR share.
COMMON_RULES = (
    *torchvision_rules("backbone.0.body.", "backbone."),
    ("input_proj.", "neck.input_proj."),
    ("query_embed.weight", "proposal_generator.embedding"),
    (f"{THEIRS_ENCODER}self_attn.in_proj_weight", f"{OURS_ENCODER}self_attention.in_proj.weight"),
    (f"{THEIRS_ENCODER}self_attn.in_proj_bias", f"{OURS_ENCODER}self_attention.in_proj.bias"),
    (f"{THEIRS_ENCODER}self_attn.out_proj.", f"{OURS_ENCODER}self_attention.out_proj."),
    (f"{THEIRS_ENCODER}norm1.", f"{OURS_ENCODER}self_residual.norm."),
    (f"{THEIRS_ENCODER}linear1.", f"{OURS_ENCODER}ffn.linear1."),
    (f"{THEIRS_ENCODER}linear2.", f"{OURS_ENCODER}ffn.linear2."),
    (f"{THEIRS_ENCODER}norm2.", f"{OURS_ENCODER}ffn.norm."),
    ("transformer.encoder.norm.", "neck.norm."),
    (f"{THEIRS_STAGE}self_attn.out_proj.", f"{OURS_STAGE}self_attention.out_proj."),
    (f"{THEIRS_STAGE}norm1.", f"{OURS_STAGE}self_residual.norm."),
    (f"{THEIRS_STAGE}norm2.", f"{OURS_STAGE}cross_residual.norm."),
    (f"{THEIRS_STAGE}linear1.", f"{OURS_STAGE}ffn.linear1."),
    (f"{THEIRS_STAGE}linear2.", f"{OURS_STAGE}ffn.linear2."),
    (f"{THEIRS_STAGE}norm3.", f"{OURS_STAGE}ffn.norm."),
    ("transformer.decoder.norm.", "roi_heads.norm."),
    ("class_embed.", f"{CLASSIFIER}."),
    ("bbox_embed.layers.0.", "roi_heads.box_coordinates.0."),
    ("bbox_embed.layers.1.", "roi_heads.box_coordinates.2."),
    ("bbox_embed.layers.2.", "roi_heads.box_coordinates.4."),
)

DETR = NameTable(
    source="the DETR release",
    rules=(
        *COMMON_RULES,
        (f"{THEIRS_STAGE}self_attn.in_proj_weight", f"{OURS_STAGE}self_attention.in_proj.weight"),
        (f"{THEIRS_STAGE}self_attn.in_proj_bias", f"{OURS_STAGE}self_attention.in_proj.bias"),
        (
            f"{THEIRS_STAGE}multihead_attn.in_proj_weight",
            f"{OURS_STAGE}cross_attention.in_proj.weight",
        ),
        (
            f"{THEIRS_STAGE}multihead_attn.in_proj_bias",
            f"{OURS_STAGE}cross_attention.in_proj.bias",
        ),
        (f"{THEIRS_STAGE}multihead_attn.out_proj.", f"{OURS_STAGE}cross_attention.out_proj."),
    ),
)


def keep_used_classes(state: Mapping[str, Tensor], num_columns: int) -> dict[str, Tensor]:
    """Turns the published classifiers' columns, one for each category number up to 90, into those
    of the 80 contiguous classes; a background column stays behind them.

    Args:
        state: under this library's names; returned as it is unless exactly this makes it fit.
        num_columns: of the model's classifier.
    """
    names = (f"{CLASSIFIER}.weight", f"{CLASSIFIER}.bias")
    if any(name not in state for name in names):
        return dict(state)
    columns = len(state[names[1]])
    kept = [i for i in range(columns) if i not in UNUSED_CATEGORIES]
    published = columns in (PUBLISHED_COLUMNS, PUBLISHED_COLUMNS + 1)
    if not published or len(kept) != num_columns:
        return dict(state)
    return dict(state) | {name: state[name][kept] for name in names}
