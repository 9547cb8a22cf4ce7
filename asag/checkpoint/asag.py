"""Parameter names of the ASAG authors' checkpoints (decoders A and S)."""

from __future__ import annotations

from .mapping import NameTable

GENERATOR, BLOCK = "proposal_generator.generator.network.", "proposal_generator.block."
THEIRS, OURS = "decoder.head_series.{k}.", "roi_heads.stages.{k}."
MIXER = "decoder.bbox_head.{k}."

GENERATOR_RULES = (
    ("anchor_generator.compress.", f"{GENERATOR}compress."),
    ("anchor_generator.P6.", f"{GENERATOR}p6."),
    ("anchor_generator.layernorm.{i}.", f"{GENERATOR}tokens.{{i}}.norm."),
    ("anchor_generator.pos_embedding.{i}.weight", f"{GENERATOR}tokens.{{i}}.position"),
    *(
        (f"anchor_generator.{theirs}.layers.{i}.", f"{GENERATOR}{ours}.{2 * i}.")
        for theirs, ours in (("proj_all", "fixed_mlp"), ("proj_patch", "patch_mlp"))
        for i in range(3)
    ),
)

ASAG = NameTable(
    source="the ASAG release",
    rules=(*GENERATOR_RULES,),
)
