"""Parameter names of DETR and Conditional DETR in Hugging Face's `transformers`.

Two spellings are read. Published files keep the names that these models were introduced with, and
`save_pretrained` writes them until today; version 5 calls the modules themselves otherwise, which
is what `torch.save(model.state_dict())` shows. Written are the published names, which every version
reads.

The backbone is timm's or transformers' own ResNet, under names of their own: a table each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .conditional_detr import spatial_rules
from .detr import CLASSIFIER, OURS_ENCODER, OURS_STAGE
from .mapping import NameTable
from .packing import PackedTable
from .resnet import Rules, torchvision_rules, transformers_rules

_BODY = "model.backbone.conv_encoder.model."
_ENCODER, _STAGE = "model.encoder.layers.{i}.", "model.decoder.layers.{i}."

# What DETR and Conditional DETR share beside the backbone.
_COMMON_RULES = (
    ("model.input_projection.", "neck.input_proj."),
    ("model.query_position_embeddings.weight", "proposal_generator.embedding"),
    *(
        (f"{_ENCODER}self_attn.{x}_proj.", f"{OURS_ENCODER}self_attention.in_proj.part{k}.")
        for k, x in enumerate("qkv")
    ),
    (f"{_ENCODER}self_attn.out_proj.", f"{OURS_ENCODER}self_attention.out_proj."),
    (f"{_ENCODER}self_attn_layer_norm.", f"{OURS_ENCODER}self_residual.norm."),
    (f"{_ENCODER}fc1.", f"{OURS_ENCODER}ffn.linear1."),
    (f"{_ENCODER}fc2.", f"{OURS_ENCODER}ffn.linear2."),
    (f"{_ENCODER}final_layer_norm.", f"{OURS_ENCODER}ffn.norm."),
    (f"{_STAGE}self_attn.out_proj.", f"{OURS_STAGE}self_attention.out_proj."),
    (f"{_STAGE}self_attn_layer_norm.", f"{OURS_STAGE}self_residual.norm."),
    (f"{_STAGE}encoder_attn.out_proj.", f"{OURS_STAGE}cross_attention.out_proj."),
    (f"{_STAGE}encoder_attn_layer_norm.", f"{OURS_STAGE}cross_residual.norm."),
    (f"{_STAGE}fc1.", f"{OURS_STAGE}ffn.linear1."),
    (f"{_STAGE}fc2.", f"{OURS_STAGE}ffn.linear2."),
    (f"{_STAGE}final_layer_norm.", f"{OURS_STAGE}ffn.norm."),
    ("model.decoder.layernorm.", "roi_heads.norm."),
    ("class_labels_classifier.", f"{CLASSIFIER}."),
    *((f"bbox_predictor.layers.{k}.", f"roi_heads.box_coordinates.{2 * k}.") for k in (0, 1, 2)),
)

_DETR_RULES = (
    *_COMMON_RULES,
    *(
        (f"{_STAGE}{theirs}.{x}_proj.", f"{OURS_STAGE}{ours}.in_proj.part{k}.")
        for theirs, ours in (("self_attn", "self_attention"), ("encoder_attn", "cross_attention"))
        for k, x in enumerate("qkv")
    ),
)

_CONDITIONAL_RULES = (
    *_COMMON_RULES,
    *(
        (f"{_STAGE}{theirs}_proj.", f"{OURS_STAGE}{ours}.")
        for theirs, ours in (
            ("sa_qcontent", "self_attention.in_proj.part0"),
            ("sa_kcontent", "self_attention.in_proj.part1"),
            ("sa_v", "self_attention.in_proj.part2"),
            ("sa_qpos", "self_attention.position_proj.part0"),
            ("sa_kpos", "self_attention.position_proj.part1"),
            ("ca_qcontent", "cross_attention.content_query"),
            ("ca_qpos", "cross_attention.object_query"),
            ("ca_qpos_sine", "cross_attention.spatial_query"),
            ("ca_kcontent", "cross_attention.content_key"),
            ("ca_kpos", "cross_attention.spatial_key"),
            ("ca_v", "cross_attention.value"),
        )
    ),
    *spatial_rules("model.decoder."),
)

# Part of a published name -> what version 5 calls the module.
_MODULE_NAMES = (
    ("backbone.conv_encoder.", "backbone."),
    ("_attn.out_proj.", "_attn.o_proj."),
    ("{i}.fc", "{i}.mlp.fc"),
    *(
        (f"{{i}}.{short}_{x}{kind}", f"{{i}}.{attention}.{x}{end}")
        for short, attention in (("sa", "self_attn"), ("ca", "encoder_attn"))
        for x, kind, end in (
            ("q", "content_proj.", "_content_proj."),
            ("k", "content_proj.", "_content_proj."),
            ("q", "pos_proj.", "_pos_proj."),
            ("k", "pos_proj.", "_pos_proj."),
            ("q", "pos_sine_proj.", "_pos_sine_proj."),
            ("v", "_proj.", "_proj."),
        )
    ),
)

_DETR_PARTS = (
    (r"neck\.layers\.\d+\.self_attention\.in_proj", 3),
    (r"roi_heads\.stages\.\d+\.(self|cross)_attention\.in_proj", 3),
)
_CONDITIONAL_PARTS = (
    *_DETR_PARTS,
    (r"roi_heads\.stages\.\d+\.self_attention\.position_proj", 2),
)


def _module_name(published: str) -> str:
    for old, new in _MODULE_NAMES:
        published = published.replace(old, new)
    return published


def _table(
    backbone: str, model: str, rules: Rules, parts: tuple, settings: Mapping[str, Any]
) -> PackedTable:
    body = torchvision_rules if backbone == "timm" else transformers_rules
    published = (*body(_BODY, "backbone."), *rules)
    alternatives = tuple((_module_name(theirs), ours) for theirs, ours in published)
    source = f"transformers' {model} on a ResNet of {backbone}"
    names = NameTable(source=source, rules=(*published, *alternatives), settings=settings)
    return PackedTable(names, parts)


_DETR = ("DETR", _DETR_RULES, _DETR_PARTS, {})
_CONDITIONAL = (
    "Conditional DETR",
    _CONDITIONAL_RULES,
    _CONDITIONAL_PARTS,
    {"MODEL.DECODER.REFERENCE_EPS": 1e-5},
)

TRANSFORMERS_DETR = _table("timm", *_DETR)
TRANSFORMERS_DETR_RESNET = _table("transformers", *_DETR)
TRANSFORMERS_CONDITIONAL_DETR = _table("timm", *_CONDITIONAL)
TRANSFORMERS_CONDITIONAL_DETR_RESNET = _table("transformers", *_CONDITIONAL)
