"""Parameter names of the Sparse R-CNN authors' checkpoints."""

from __future__ import annotations

from .mapping import NameTable

THEIRS, OURS = "head.head_series.{s}.", "roi_heads.stages.{s}."

# What the baseline shares with the IoU-enhanced variant.
COMMON_RULES = (
    ("backbone.", "backbone."),
    ("init_proposal_features.weight", "proposal_generator.features"),
    ("init_proposal_boxes.weight", "proposal_generator.boxes_cxcywh"),
    (f"{THEIRS}self_attn.out_proj.", f"{OURS}attention.out_proj."),
    (f"{THEIRS}inst_interact.dynamic_layer.", f"{OURS}interaction.conv.dynamic_layer."),
    (f"{THEIRS}inst_interact.norm1.", f"{OURS}interaction.conv.norm1."),
    (f"{THEIRS}inst_interact.norm2.", f"{OURS}interaction.conv.norm2."),
    (f"{THEIRS}norm1.", f"{OURS}norm."),
    (f"{THEIRS}cls_module.", f"{OURS}cls_tower."),
    (f"{THEIRS}reg_module.", f"{OURS}reg_tower."),
    (f"{THEIRS}class_logits.", f"{OURS}class_logits."),
    (f"{THEIRS}bboxes_delta.", f"{OURS}box_deltas."),
)

# What both releases compute with: only growth is bounded, and Detectron2 clips the final boxes.
SETTINGS = {
    "MODEL.DECODER.MIN_BOX_SCALE": 0.0,
    "MODEL.DECODER.MAX_BOX_SCALE": 100000 / 16,
    "MODEL.CLIP_BOXES": True,
}

SPARSE_RCNN = NameTable(
    source="the Sparse R-CNN release",
    rules=(
        *COMMON_RULES,
        (f"{THEIRS}self_attn.in_proj_weight", f"{OURS}attention.in_proj.weight"),
        (f"{THEIRS}self_attn.in_proj_bias", f"{OURS}attention.in_proj.bias"),
        (f"{THEIRS}inst_interact.out_layer.", f"{OURS}interaction.project.linear."),
        (f"{THEIRS}inst_interact.norm3.", f"{OURS}interaction.project.norm."),
        (f"{THEIRS}norm2.", f"{OURS}interaction.norm."),
        (f"{THEIRS}linear1.", f"{OURS}interaction.ffn.linear1."),
        (f"{THEIRS}linear2.", f"{OURS}interaction.ffn.linear2."),
        (f"{THEIRS}norm3.", f"{OURS}interaction.ffn.norm."),
    ),
    settings=SETTINGS,
)
