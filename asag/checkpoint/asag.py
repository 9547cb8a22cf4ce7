"""Parameter names of the ASAG authors' checkpoints (decoders A and S)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .mapping import NameTable
from .resnet import Rules, torchvision_rules

GENERATOR, BLOCK = "proposal_generator.generator.network.", "proposal_generator.block."
OURS = "roi_heads.stages.{k}."
MIXER, DYNAMIC = "decoder.bbox_head.{k}.", "decoder.head_series.{k}."
# Sequential modules of linear layers with an activation between them, which has no weights.
_MLP = tuple((i, 2 * i) for i in range(3))

NECK_RULES = tuple(
    (f"neck.{theirs}.{i}.0.", f"backbone.fpn_{ours}{i + 2}.")
    for i in range(4)
    for theirs, ours in (("inner_blocks", "lateral"), ("layer_blocks", "output"))
)

GENERATOR_RULES = (
    ("anchor_generator.compress.", f"{GENERATOR}compress."),
    ("anchor_generator.P6.", f"{GENERATOR}p6."),
    ("anchor_generator.layernorm.{i}.", f"{GENERATOR}tokens.{{i}}.norm."),
    ("anchor_generator.pos_embedding.{i}.weight", f"{GENERATOR}tokens.{{i}}.position"),
    *(
        (f"anchor_generator.{theirs}.layers.{i}.", f"{GENERATOR}{ours}.{j}.")
        for theirs, ours in (("proj_all", "fixed_mlp"), ("proj_patch", "patch_mlp"))
        for i, j in _MLP
    ),
)


def _predictor_rules(theirs: str, ours: str) -> tuple[tuple[str, str], ...]:
    return (
        (f"{theirs}cls_fcs.", f"{ours}predictor.cls_tower."),
        (f"{theirs}reg_fcs.", f"{ours}predictor.reg_tower."),
        (f"{theirs}fc_cls.", f"{ours}predictor.class_logits."),
        (f"{theirs}fc_reg.", f"{ours}predictor.box_deltas."),
    )


def _attention_rules(theirs: str, name: str, ours: str) -> tuple[tuple[str, str], ...]:
    return (
        (f"{theirs}{name}.in_proj_weight", f"{ours}in_proj.weight"),
        (f"{theirs}{name}.in_proj_bias", f"{ours}in_proj.bias"),
        (f"{theirs}{name}.out_proj.", f"{ours}out_proj."),
    )


BLOCK_RULES = (
    ("rpn.iof_tau", f"{BLOCK}attention.attention.tau"),
    ("rpn.roi.", f"{BLOCK}project."),
    ("rpn.tokens_norm1.", f"{BLOCK}project_norm."),
    ("rpn.tokens_norm3.", f"{BLOCK}attention.norm."),
    ("rpn.tokens_proj.layers.0.", f"{BLOCK}ffn.linear1."),
    ("rpn.tokens_proj.layers.1.", f"{BLOCK}ffn.linear2."),
    ("rpn.tokens_norm2.", f"{BLOCK}ffn.norm."),
    *_attention_rules("rpn.", "attn", f"{BLOCK}attention.attention."),
    *_predictor_rules("rpn.", BLOCK),
)

MIXER_RULES = (
    (f"{MIXER}iof_tau", f"{OURS}attention.attention.tau"),
    *_attention_rules(MIXER, "attention", f"{OURS}attention.attention."),
    (f"{MIXER}attention_norm.", f"{OURS}attention.norm."),
    (f"{MIXER}ffn.layers.0.", f"{OURS}ffn.linear1."),
    (f"{MIXER}ffn.layers.1.", f"{OURS}ffn.linear2."),
    (f"{MIXER}ffn_norm.", f"{OURS}ffn.norm."),
    (f"{MIXER}sampling_n_mixing.sampling_offset_generator.0.", f"{OURS}sampling.offsets."),
    (f"{MIXER}sampling_n_mixing.norm.", f"{OURS}norm."),
    (
        f"{MIXER}sampling_n_mixing.adaptive_mixing.parameter_generator.0.",
        f"{OURS}mixing.generator.",
    ),
    (f"{MIXER}sampling_n_mixing.adaptive_mixing.out_proj.", f"{OURS}mixing.out_proj."),
    *_predictor_rules(MIXER, OURS),
)

DYNAMIC_RULES = (
    *_attention_rules(DYNAMIC, "self_attn", f"{OURS}attention."),
    (f"{DYNAMIC}inst_interact.dynamic_layer.", f"{OURS}interaction.conv.dynamic_layer."),
    (f"{DYNAMIC}inst_interact.norm1.", f"{OURS}interaction.conv.norm1."),
    (f"{DYNAMIC}inst_interact.norm2.", f"{OURS}interaction.conv.norm2."),
    (f"{DYNAMIC}inst_interact.out_layer.", f"{OURS}interaction.project.linear."),
    (f"{DYNAMIC}inst_interact.norm3.", f"{OURS}interaction.project.norm."),
    (f"{DYNAMIC}linear1.", f"{OURS}interaction.ffn.linear1."),
    (f"{DYNAMIC}linear2.", f"{OURS}interaction.ffn.linear2."),
    (f"{DYNAMIC}norm1.", f"{OURS}norm."),
    (f"{DYNAMIC}norm2.", f"{OURS}interaction.norm."),
    (f"{DYNAMIC}norm3.", f"{OURS}interaction.ffn.norm."),
    (f"{DYNAMIC}cls_module.", f"{OURS}cls_tower."),
    (f"{DYNAMIC}reg_module.", f"{OURS}reg_tower."),
    (f"{DYNAMIC}class_logits.", f"{OURS}class_logits."),
    (f"{DYNAMIC}bboxes_delta.", f"{OURS}box_deltas."),
)


def _table(decoder: str, rules: Rules) -> NameTable:
    return NameTable(
        source=f"the ASAG release, decoder {decoder}",
        rules=(
            *torchvision_rules("backbone.0.body.", "backbone.bottom_up."),
            *NECK_RULES,
            *GENERATOR_RULES,
            *BLOCK_RULES,
            ("decoder.decoder_embedding.weight", "roi_heads.embedding"),
            *rules,
        ),
        # How far the warm-up has come; weights without it count as past it.
        ours_only=("proposal_generator.steps",),
    )


# A table a decoder: a norm of ours has the same name in both, and another one in either of theirs.
ASAG_A = _table("A", MIXER_RULES)
ASAG_S = _table("S", DYNAMIC_RULES)


def keep_copy(state: Mapping[str, Tensor], copy: int) -> dict[str, Tensor]:
    """The deployed model: of the copies of the decoder stage, only number `copy` stays.

    Args:
        state: weights of this library, trained with `MODEL.DECODER.NUM_AUXILIARY` copies.
        copy: index; most published numbers were taken with 2, the main copy is the last one.

    Returns:
        Weights for `MODEL.DECODER.NUM_AUXILIARY` 0.

    Raises:
        ValueError: there is no such copy, or these are no weights of a decoder with copies.
    """
    if "roi_heads.embedding" not in state:
        raise ValueError(
            "there are no copies of a decoder stage in these weights; ASAG's have some"
        )
    copies = len(state["roi_heads.embedding"])
    if not 0 <= copy < copies:
        raise ValueError(
            f"there is no copy {copy}; these weights have {copies} (0 to {copies - 1})"
        )
    kept = {}
    for name, value in state.items():
        if name == "roi_heads.embedding":
            kept[name] = value[copy : copy + 1]
        elif name.startswith("roi_heads.stages."):
            index, rest = name.removeprefix("roi_heads.stages.").split(".", 1)
            if int(index) == copy:
                kept[f"roi_heads.stages.0.{rest}"] = value
            elif int(index) >= copies:
                kept[f"roi_heads.stages.{int(index) - copies + 1}.{rest}"] = value
        else:
            kept[name] = value
    return kept
