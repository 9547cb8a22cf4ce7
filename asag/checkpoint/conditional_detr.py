"""Parameter names of the Conditional DETR authors' checkpoints."""

from __future__ import annotations

from .detr import COMMON_RULES, OURS_STAGE, THEIRS_STAGE
from .mapping import NameTable
from .packing import PackedTable
from .resnet import Rules

_SELF, _CROSS = f"{OURS_STAGE}self_attention.", f"{OURS_STAGE}cross_attention."
# Layers of the decoder's self-attention that this library keeps in one matrix.
CONDITIONAL_PARTS = (
    (r"roi_heads\.stages\.\d+\.self_attention\.in_proj", 3),
    (r"roi_heads\.stages\.\d+\.self_attention\.position_proj", 2),
)


def spatial_rules(decoder: str) -> Rules:
    """Networks of the spatial queries and of the reference points, which are called the same
    everywhere, below the prefix of a decoder."""
    return tuple(
        (f"{decoder}{theirs}.layers.{k}.", f"{ours}.{2 * k}.")
        for theirs, ours in (
            ("query_scale", "roi_heads.spatial_query.transformation"),
            ("ref_point_head", "proposal_generator.point_head"),
        )
        for k in (0, 1)
    )


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
            *spatial_rules("transformer.decoder."),
        ),
        settings={"MODEL.DECODER.REFERENCE_EPS": 1e-5},
    ),
    parts=CONDITIONAL_PARTS,
)
