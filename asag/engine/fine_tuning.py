"""Starting points for training on custom data: a trained detector, or a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from detectron2.config import CfgNode

from .. import model_zoo
from ..checkpoint.packages import SCHEME, package_file
from ..config.loading import find_config, load_config, merge_options

# The default recipe for `--data`.
SMALL_DATA = "SmallData/dense_lite0.yaml"
# Keys that fine-tuning takes from this recipe: length, batch, averaging and evaluation. Learning
# rate and image sizes stay those of the detector.
_BORROWED = (
    "SOLVER.EPOCHS",
    "SOLVER.EPOCH_STEPS",
    "SOLVER.STEPS",
    "SOLVER.BY_DATA.EPOCHS",
    "SOLVER.BY_DATA.MIN_ITERS",
    "SOLVER.BY_DATA.MAX_ITERS",
    "SOLVER.LR_SCHEDULER_NAME",
    "SOLVER.WARMUP_FACTOR",
    "SOLVER.WARMUP_ITERS",
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.REFERENCE_BATCH",
    "SOLVER.SCALE_LR",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.EMA.ENABLED",
    "SOLVER.EMA.DECAY",
    "SOLVER.EMA.WARMUP",
    "TEST.EVAL_PERIOD",
    "TEST.NUM_EVALUATIONS",
    "DATALOADER.NUM_WORKERS",
)


def fine_tuning_config(
    source: str, options: Sequence[str] = (), say: Callable[[str], Any] = print
) -> tuple[CfgNode, CfgNode]:
    """Configuration for fine-tuning a trained detector.

    Args:
        source: a name of the model zoo, the folder of a run, ...; see `asag.model_zoo.locate`.
        options: KEY VALUE words, which overrule everything.
        say: called with a note when a name has no weights; training then starts as in its recipe.

    Returns:
        The configuration with the options, not frozen, MODEL.WEIGHTS pointing to the detector's;
        and the same without the options.

    Raises:
        KeyError: no such name or key.
        FileNotFoundError: a file is missing.
        ValueError: a folder or file without weights.
    """
    try:
        cfg = model_zoo.locate(source)
    except ValueError as error:
        if source not in model_zoo.names():
            raise
        say(f"note: {error}. Training starts as in its recipe")
        cfg = model_zoo.config(source)
    small = load_config(str(find_config(SMALL_DATA)))
    for key in _BORROWED:
        *parents, leaf = key.split(".")
        here, there = cfg, small
        for name in parents:
            here, there = here[name], there[name]
        here[leaf] = there[leaf]
    cfg.OUTPUT_DIR = small.OUTPUT_DIR
    cfg.LOGGING = small.LOGGING
    changed = cfg.clone()
    merge_options(changed, options)
    return changed, cfg


def learn_all_from_scratch(cfg: CfgNode, say: Callable[[str], Any] = print) -> None:
    """Unfreezes a timm backbone that starts from random weights, in place: neither random weights
    nor random statistics are worth keeping."""
    model, timm = cfg.MODEL, cfg.MODEL.TIMM
    pretrained = model.WEIGHTS or timm.WEIGHTS or timm.PRETRAINED
    if "timm" not in model.BACKBONE.NAME or pretrained:
        return
    if timm.NORM not in ("FrozenBN", "FrozenStatistics") and not model.BACKBONE.FREEZE_AT:
        return
    model.BACKBONE.FREEZE_AT, timm.NORM, cfg.SOLVER.BACKBONE_MULTIPLIER = 0, "BN", 1.0
    say(
        "note: MODEL.TIMM.WEIGHTS is empty, so the backbone learns from scratch: "
        'MODEL.BACKBONE.FREEZE_AT 0, MODEL.TIMM.NORM "BN", SOLVER.BACKBONE_MULTIPLIER 1.0'
    )


def check_start(cfg: CfgNode) -> None:
    """Raises FileNotFoundError if the package with the weights of a timm backbone is not installed;
    the message names the pip command, and the key for training without them."""
    timm = cfg.MODEL.TIMM
    if cfg.MODEL.WEIGHTS or "timm" not in cfg.MODEL.BACKBONE.NAME or "://" not in timm.WEIGHTS:
        return
    scheme, _, address = timm.WEIGHTS.partition("://")
    if scheme != SCHEME:
        return
    try:
        package_file(address)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"MODEL.TIMM.WEIGHTS {error}. Or train from scratch, which needs more images and more "
            'time: MODEL.TIMM.WEIGHTS ""'
        ) from error
