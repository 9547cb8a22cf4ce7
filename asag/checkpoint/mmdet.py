"""Parameter names of MMDetection's checkpoints, and the arithmetic that goes with them.

DETR was renamed twice: the names of version 3 are written, those of 2.12 to 2.28 and those before
2.12 are read as well. Sparse R-CNN is called the same in all versions.
"""

from __future__ import annotations

from .conditional_detr import CONDITIONAL_PARTS, spatial_rules
from .detr import CLASSIFIER, OURS_ENCODER, OURS_STAGE
from .mapping import NameTable
from .packing import PackedTable
from .resnet import Rules, torchvision_rules
from .sparse_rcnn import OURS as OURS_REFINEMENT

# Files saved with mmengine 0.1 hold the mean and std of the input, which configurations say here.
_STRAY = ("data_preprocessor.",)

# Sparse R-CNN.

_HEAD = "roi_head.bbox_head.{s}."
_INTERACTION = f"{_HEAD}instance_interactive_conv."

MMDET_SPARSE_RCNN = NameTable(
    source="MMDetection's Sparse R-CNN",
    rules=(
        *torchvision_rules("backbone.", "backbone.bottom_up."),
        *(
            (f"neck.{theirs}.{i}.conv.", f"backbone.fpn_{ours}{i + 2}.")
            for i in range(4)
            for theirs, ours in (("lateral_convs", "lateral"), ("fpn_convs", "output"))
        ),
        ("rpn_head.init_proposal_features.weight", "proposal_generator.features"),
        ("rpn_head.init_proposal_bboxes.weight", "proposal_generator.boxes_cxcywh"),
        (f"{_HEAD}attention.attn.in_proj_weight", f"{OURS_REFINEMENT}attention.in_proj.weight"),
        (f"{_HEAD}attention.attn.in_proj_bias", f"{OURS_REFINEMENT}attention.in_proj.bias"),
        (f"{_HEAD}attention.attn.out_proj.", f"{OURS_REFINEMENT}attention.out_proj."),
        (f"{_HEAD}attention_norm.", f"{OURS_REFINEMENT}norm."),
        (f"{_INTERACTION}dynamic_layer.", f"{OURS_REFINEMENT}interaction.conv.dynamic_layer."),
        (f"{_INTERACTION}norm_in.", f"{OURS_REFINEMENT}interaction.conv.norm1."),
        (f"{_INTERACTION}norm_out.", f"{OURS_REFINEMENT}interaction.conv.norm2."),
        (f"{_INTERACTION}fc_layer.", f"{OURS_REFINEMENT}interaction.project.linear."),
        (f"{_INTERACTION}fc_norm.", f"{OURS_REFINEMENT}interaction.project.norm."),
        (f"{_HEAD}instance_interactive_conv_norm.", f"{OURS_REFINEMENT}interaction.norm."),
        (f"{_HEAD}ffn.layers.0.0.", f"{OURS_REFINEMENT}interaction.ffn.linear1."),
        (f"{_HEAD}ffn.layers.1.", f"{OURS_REFINEMENT}interaction.ffn.linear2."),
        (f"{_HEAD}ffn_norm.", f"{OURS_REFINEMENT}interaction.ffn.norm."),
        (f"{_HEAD}cls_fcs.", f"{OURS_REFINEMENT}cls_tower."),
        (f"{_HEAD}reg_fcs.", f"{OURS_REFINEMENT}reg_tower."),
        (f"{_HEAD}fc_cls.", f"{OURS_REFINEMENT}class_logits."),
        (f"{_HEAD}fc_reg.", f"{OURS_REFINEMENT}box_deltas."),
    ),
    theirs_only=_STRAY,
    # The logarithm of a change of size is kept within +-log(1000 / 16); boxes are never clipped.
    settings={
        "MODEL.DECODER.MIN_BOX_SCALE": 16 / 1000,
        "MODEL.DECODER.MAX_BOX_SCALE": 1000 / 16,
        "MODEL.CLIP_BOXES": False,
    },
)

# DETR and Conditional DETR.

_COMMON_RULES = (
    *torchvision_rules("backbone.", "backbone."),
    ("bbox_head.fc_cls.", f"{CLASSIFIER}."),
    ("bbox_head.reg_ffn.layers.0.0.", "roi_heads.box_coordinates.0."),
    ("bbox_head.reg_ffn.layers.1.", "roi_heads.box_coordinates.2."),
    ("bbox_head.fc_reg.", "roi_heads.box_coordinates.4."),
)


def attention_rules(theirs: str, ours: str) -> Rules:
    """Packed attention."""
    return (
        (f"{theirs}.attn.in_proj_weight", f"{ours}.in_proj.weight"),
        (f"{theirs}.attn.in_proj_bias", f"{ours}.in_proj.bias"),
        (f"{theirs}.attn.out_proj.", f"{ours}.out_proj."),
    )


def layer_rules(theirs: str, ours: str, ffn: str, norms: tuple[str, ...]) -> Rules:
    """Feed-forward network and norms of a layer."""
    return (
        (f"{theirs}{ffn}.layers.0.0.", f"{ours}ffn.linear1."),
        (f"{theirs}{ffn}.layers.1.", f"{ours}ffn.linear2."),
        *((f"{theirs}norms.{i}.", f"{ours}{norm}.") for i, norm in enumerate(norms)),
    )


def _transformer_rules(
    prefix: str, input_proj: str, head: str, self_attention: str, ffn: str, final_norm: str
) -> Rules:
    """Name rules of encoder and decoder that DETR and Conditional DETR share.

    Args:
        prefix: of encoder and decoder.
        input_proj: the 1x1 convolution in front of the encoder.
        head: prefix of the query embedding.
        self_attention, ffn: parts of a layer.
        final_norm: of the decoder.
    """
    encoder, decoder = f"{prefix}encoder.layers.{{i}}.", f"{prefix}decoder.layers.{{i}}."
    return (
        (f"{input_proj}.", "neck.input_proj."),
        (f"{head}query_embedding.weight", "proposal_generator.embedding"),
        *attention_rules(f"{encoder}{self_attention}", f"{OURS_ENCODER}self_attention"),
        *layer_rules(encoder, OURS_ENCODER, ffn, ("self_residual.norm", "ffn.norm")),
        *layer_rules(
            decoder, OURS_STAGE, ffn, ("self_residual.norm", "cross_residual.norm", "ffn.norm")
        ),
        (f"{prefix}decoder.{final_norm}.", "roi_heads.norm."),
    )


def _detr_rules(cross_attention: str, **names: str) -> Rules:
    stage, self_attention = f"{names['prefix']}decoder.layers.{{i}}.", names["self_attention"]
    return (
        *_transformer_rules(**names),
        *attention_rules(f"{stage}{self_attention}", f"{OURS_STAGE}self_attention"),
        *attention_rules(f"{stage}{cross_attention}", f"{OURS_STAGE}cross_attention"),
    )


_VERSION_3 = {
    "prefix": "",
    "input_proj": "neck.convs.0.conv",
    "head": "",
    "self_attention": "self_attn",
    "ffn": "ffn",
    "final_norm": "post_norm",
}
_VERSION_2_12 = {
    "prefix": "bbox_head.transformer.",
    "input_proj": "bbox_head.input_proj",
    "head": "bbox_head.",
    "self_attention": "attentions.0",
    "ffn": "ffns.0",
    "final_norm": "post_norm",
}
_BEFORE_2_12 = _VERSION_2_12 | {"self_attention": "self_attn", "ffn": "ffn", "final_norm": "norm"}

MMDET_DETR = NameTable(
    source="MMDetection's DETR",
    rules=(
        *_COMMON_RULES,
        *_detr_rules("cross_attn", **_VERSION_3),
        *_detr_rules("attentions.1", **_VERSION_2_12),
        *_detr_rules("multihead_attn", **_BEFORE_2_12),
    ),
    theirs_only=_STRAY,
    settings={"MODEL.CLIP_BOXES": True},
)

_STAGE = "decoder.layers.{i}."

MMDET_CONDITIONAL_DETR = PackedTable(
    NameTable(
        source="MMDetection's Conditional DETR",
        rules=(
            *_COMMON_RULES,
            *_transformer_rules(**_VERSION_3),
            *(
                (f"{_STAGE}self_attn.{theirs}_proj.", f"{OURS_STAGE}self_attention.{ours}.")
                for theirs, ours in (
                    ("qcontent", "in_proj.part0"),
                    ("kcontent", "in_proj.part1"),
                    ("v", "in_proj.part2"),
                    ("qpos", "position_proj.part0"),
                    ("kpos", "position_proj.part1"),
                    ("out", "out_proj"),
                )
            ),
            *(
                (f"{_STAGE}cross_attn.{theirs}_proj.", f"{OURS_STAGE}cross_attention.{ours}.")
                for theirs, ours in (
                    ("qcontent", "content_query"),
                    ("qpos", "object_query"),
                    ("qpos_sine", "spatial_query"),
                    ("kcontent", "content_key"),
                    ("kpos", "spatial_key"),
                    ("v", "value"),
                    ("out", "out_proj"),
                )
            ),
            *spatial_rules("decoder."),
        ),
        theirs_only=_STRAY,
        settings={"MODEL.DECODER.REFERENCE_EPS": 1e-5, "MODEL.CLIP_BOXES": True},
    ),
    parts=CONDITIONAL_PARTS,
)
