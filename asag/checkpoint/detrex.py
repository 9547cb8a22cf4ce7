"""Parameter names of DETR and Conditional DETR in detrex, and the arithmetic that goes with them.

Layers are built and named like MMDetection's. Backbones have Detectron2's names, those of the DC5
models torchvision's: both are read, and Detectron2's are written.
"""

from __future__ import annotations

from .conditional_detr import CONDITIONAL_PARTS, spatial_rules
from .detr import CLASSIFIER, OURS_ENCODER, OURS_STAGE
from .mapping import NameTable
from .mmdet import attention_rules, layer_rules
from .packing import PackedTable
from .resnet import torchvision_rules

_ENCODER, _STAGE = "transformer.encoder.layers.{i}.", "transformer.decoder.layers.{i}."
# The loss of DETR keeps the weight of background among the parameters.
_STRAY = ("criterion.",)

_COMMON_RULES = (
    *((f"backbone.{x}.", f"backbone.{x}.") for x in ("stem", "res2", "res3", "res4", "res5")),
    *torchvision_rules("backbone.body.", "backbone."),
    ("input_proj.", "neck.input_proj."),
    ("query_embed.weight", "proposal_generator.embedding"),
    *attention_rules(f"{_ENCODER}attentions.0", f"{OURS_ENCODER}self_attention"),
    *layer_rules(_ENCODER, OURS_ENCODER, "ffns.0", ("self_residual.norm", "ffn.norm")),
    *layer_rules(
        _STAGE, OURS_STAGE, "ffns.0", ("self_residual.norm", "cross_residual.norm", "ffn.norm")
    ),
    ("transformer.decoder.post_norm_layer.", "roi_heads.norm."),
    ("class_embed.", f"{CLASSIFIER}."),
    *((f"bbox_embed.layers.{k}.", f"roi_heads.box_coordinates.{2 * k}.") for k in (0, 1, 2)),
)

DETREX_DETR = NameTable(
    source="detrex's DETR",
    rules=(
        *_COMMON_RULES,
        *attention_rules(f"{_STAGE}attentions.0", f"{OURS_STAGE}self_attention"),
        *attention_rules(f"{_STAGE}attentions.1", f"{OURS_STAGE}cross_attention"),
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
            *spatial_rules("transformer.decoder."),
        ),
        theirs_only=_STRAY,
        # Its inverse sigmoid stays further from the borders than the authors'.
        settings={"MODEL.DECODER.REFERENCE_EPS": 1e-3, "MODEL.CLIP_BOXES": True},
    ),
    parts=CONDITIONAL_PARTS,
)
