"""Parameter names of DETR and Conditional DETR in detrex, and the arithmetic that goes with them.

Backbones have Detectron2's names, those of the DC5 models torchvision's: both are read, and
Detectron2's are written.
"""

from __future__ import annotations

from .conditional_detr import CONDITIONAL_PARTS
from .detr import CLASSIFIER, OURS_ENCODER, OURS_STAGE
from .mapping import NameTable
from .packing import PackedTable
from .resnet import Rules, torchvision_rules

_ENCODER, _STAGE = "transformer.encoder.layers.{i}.", "transformer.decoder.layers.{i}."
# The loss of DETR keeps the weight of background among the parameters.
_STRAY = ("criterion.",)


def _layer_rules(theirs: str, ours: str, norms: tuple[str, ...]) -> Rules:
    """Feed-forward network and norms of a layer."""
    return (
        (f"{theirs}ffns.0.layers.0.0.", f"{ours}ffn.linear1."),
        (f"{theirs}ffns.0.layers.1.", f"{ours}ffn.linear2."),
        *((f"{theirs}norms.{i}.", f"{ours}{norm}.") for i, norm in enumerate(norms)),
    )


def _attention_rules(theirs: str, ours: str) -> Rules:
    """Packed attention."""
    return (
        (f"{theirs}.attn.in_proj_weight", f"{ours}.in_proj.weight"),
        (f"{theirs}.attn.in_proj_bias", f"{ours}.in_proj.bias"),
        (f"{theirs}.attn.out_proj.", f"{ours}.out_proj."),
    )


_COMMON_RULES = (
    *((f"backbone.{x}.", f"backbone.{x}.") for x in ("stem", "res2", "res3", "res4", "res5")),
    *torchvision_rules("backbone.body.", "backbone."),
    ("input_proj.", "neck.input_proj."),
    ("query_embed.weight", "proposal_generator.embedding"),
    *_attention_rules(f"{_ENCODER}attentions.0", f"{OURS_ENCODER}self_attention"),
    *_layer_rules(_ENCODER, OURS_ENCODER, ("self_residual.norm", "ffn.norm")),
    *_layer_rules(_STAGE, OURS_STAGE, ("self_residual.norm", "cross_residual.norm", "ffn.norm")),
    ("transformer.decoder.post_norm_layer.", "roi_heads.norm."),
    ("class_embed.", f"{CLASSIFIER}."),
    *((f"bbox_embed.layers.{k}.", f"roi_heads.box_coordinates.{2 * k}.") for k in (0, 1, 2)),
)

DETREX_DETR = NameTable(
    source="detrex's DETR",
    rules=(
        *_COMMON_RULES,
        *_attention_rules(f"{_STAGE}attentions.0", f"{OURS_STAGE}self_attention"),
        *_attention_rules(f"{_STAGE}attentions.1", f"{OURS_STAGE}cross_attention"),
    ),
    theirs_only=_STRAY,
    settings={"MODEL.CLIP_BOXES": True},
)

DETREX_CONDITIONAL_DETR = PackedTable(
    NameTable(
        source="detrex's Conditional DETR",
        rules=(
            *_COMMON_RULES,
            *(
                (f"{_STAGE}attentions.0.{theirs}_proj.", f"{OURS_STAGE}self_attention.{ours}.")
                for theirs, ours in (
                    ("query_content", "in_proj.part0"),
                    ("key_content", "in_proj.part1"),
                    ("value", "in_proj.part2"),
                    ("query_pos", "position_proj.part0"),
                    ("key_pos", "position_proj.part1"),
                    ("out", "out_proj"),
                )
            ),
            *(
                (f"{_STAGE}attentions.1.{theirs}_proj.", f"{OURS_STAGE}cross_attention.{ours}.")
                for theirs, ours in (
                    ("query_content", "content_query"),
                    ("query_pos", "object_query"),
                    ("query_pos_sine", "spatial_query"),
                    ("key_content", "content_key"),
                    ("key_pos", "spatial_key"),
                    ("value", "value"),
                    ("out", "out_proj"),
                )
            ),
            *(
                (f"transformer.decoder.{theirs}.layers.{k}.", f"{ours}.{2 * k}.")
                for theirs, ours in (
                    ("query_scale", "roi_heads.spatial_query.transformation"),
                    ("ref_point_head", "proposal_generator.point_head"),
                )
                for k in (0, 1)
            ),
        ),
        theirs_only=_STRAY,
        # Its inverse sigmoid stays further from the borders than the authors'.
        settings={"MODEL.DECODER.REFERENCE_EPS": 1e-3, "MODEL.CLIP_BOXES": True},
    ),
    parts=CONDITIONAL_PARTS,
)
