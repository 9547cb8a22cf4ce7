"""Parameter names of the IoU-enhanced Sparse R-CNN authors' checkpoints."""

from __future__ import annotations

from .mapping import NameTable
from .sparse_rcnn import COMMON_RULES, OURS, SETTINGS, THEIRS


def _task_rules(task: str) -> tuple[tuple[str, str], ...]:
    """Name rules of the class path ("cls") or the box path ("reg") of a stage."""
    path = f"{OURS}interaction.{task}_path."
    return (
        (f"{THEIRS}inst_interact.proj_{task}1.", f"{path}mask.reduce."),
        (f"{THEIRS}inst_interact.proj_{task}2.", f"{path}mask.expand."),
        (f"{THEIRS}inst_interact.norm3_{task}.", f"{path}mask_norm."),
        (f"{THEIRS}inst_interact.out_layer_{task}.", f"{path}project.linear."),
        (f"{THEIRS}inst_interact.norm4_{task}.", f"{path}project.norm."),
        (f"{THEIRS}proj_{task}.", f"{path}query_proj."),
        (f"{THEIRS}norm_{task}.", f"{path}query_norm."),
        (f"{THEIRS}norm2_{task}.", f"{path}norm."),
        (f"{THEIRS}linear1_{task}.", f"{path}ffn.linear1."),
        (f"{THEIRS}linear2_{task}.", f"{path}ffn.linear2."),
        (f"{THEIRS}norm3_{task}.", f"{path}ffn.norm."),
    )


IOU_SPARSE_RCNN = NameTable(
    source="the IoU-enhanced Sparse R-CNN release",
    rules=(
        *COMMON_RULES,
        (f"{THEIRS}self_attn.proj_qkv.", f"{OURS}attention.in_proj."),
        *_task_rules("cls"),
        *_task_rules("reg"),
    ),
    settings=SETTINGS,
)
