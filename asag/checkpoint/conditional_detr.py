"""Parameter names of the Conditional DETR authors' checkpoints."""

from __future__ import annotations

from .detr import COMMON_RULES, OURS_STAGE, THEIRS_STAGE
from .mapping import NameTable
from .packing import PackedTable

# Layers of the decoder's self-attention that this library keeps in one matrix.
CONDITIONAL_PARTS = (
    (r"roi_heads\.stages\.\d+\.self_attention\.in_proj", 3),
    (r"roi_heads\.stages\.\d+\.self_attention\.position_proj", 2),
)
_SELF, _CROSS = f"{OURS_STAGE}self_attention.", f"{OURS_STAGE}cross_attention."

CONDITIONAL_DETR = PackedTable(
    NameTable(
        source="the Conditional DETR release",
        rules=(
            *COMMON_RULES,
            (f"{THEIRS_STAGE}sa_qcontent_proj.", f"{_SELF}in_proj.part0."),
            (f"{THEIRS_STAGE}sa_kcontent_proj.", f"{_SELF}in_proj.part1."),
            (f"{THEIRS_STAGE}sa_v_proj.", f"{_SELF}in_proj.part2."),
            (f"{THEIRS_STAGE}sa_qpos_proj.", f"{_SELF}position_proj.part0."),
            (f"{THEIRS_STAGE}sa_kpos_proj.", f"{_SELF}position_proj.part1."),
            (f"{THEIRS_STAGE}ca_qcontent_proj.", f"{_CROSS}content_query."),
            (f"{THEIRS_STAGE}ca_qpos_proj.", f"{_CROSS}object_query."),
            (f"{THEIRS_STAGE}ca_qpos_sine_proj.", f"{_CROSS}spatial_query."),
            (f"{THEIRS_STAGE}ca_kcontent_proj.", f"{_CROSS}content_key."),
            (f"{THEIRS_STAGE}ca_kpos_proj.", f"{_CROSS}spatial_key."),
            (f"{THEIRS_STAGE}ca_v_proj.", f"{_CROSS}value."),
            (f"{THEIRS_STAGE}cross_attn.out_proj.", f"{_CROSS}out_proj."),
            (
                "transformer.decoder.query_scale.layers.0.",
                "roi_heads.spatial_query.transformation.0.",
            ),
            (
                "transformer.decoder.query_scale.layers.1.",
                "roi_heads.spatial_query.transformation.2.",
            ),
            (
                "transformer.decoder.ref_point_head.layers.0.",
                "proposal_generator.point_head.0.",
            ),
            (
                "transformer.decoder.ref_point_head.layers.1.",
                "proposal_generator.point_head.2.",
            ),
        ),
        settings={"MODEL.DECODER.REFERENCE_EPS": 1e-5},
    ),
    parts=CONDITIONAL_PARTS,
)
