"""Which numbers the configuration keys may hold, checked before anything is built.

One line a key. Rules that tie several keys together (a divisor, an order) and names out of a list
of choices stand where they are used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY


@dataclass(frozen=True)
class Range:
    """Finite numbers between two bounds, which belong to it unless said otherwise.

    Attributes:
        text: the range in words, completing "it must be ...".
        low, high: bounds.
        without_low, without_high: leave out the bound itself.
        whole: integers only.
    """

    text: str
    low: float = -math.inf
    high: float = math.inf
    without_low: bool = False
    without_high: bool = False
    whole: bool = False

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        above = value > self.low if self.without_low else value >= self.low
        below = value < self.high if self.without_high else value <= self.high
        return math.isfinite(value) and above and below


@dataclass(frozen=True)
class Each:
    """Lists, also nested ones, whose every number is in a range.

    Attributes:
        range: of the numbers.
        length: of the list; None takes any.
    """

    range: Range
    length: int | None = None

    @property
    def text(self) -> str:
        numbers = "a list" if self.length is None else f"a list of {self.length} numbers"
        return f"{numbers}, each {self.range.text}"

    def __contains__(self, value: Any) -> bool:
        if not isinstance(value, list | tuple) or self.length not in (None, len(value)):
            return False
        return all(number in self.range for number in _numbers(value))


def _numbers(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _numbers(value)
        else:
            yield value


COUNT = Range("a whole number, 1 or more", low=1, whole=True)
COUNT_OR_NONE = Range("a whole number, 0 or more", low=0, whole=True)
FINITE = Range("a number")
POSITIVE = Range("above 0", low=0, without_low=True)
NOT_NEGATIVE = Range("0 or more", low=0)
AT_LEAST_1 = Range("1 or more", low=1)
SHARE = Range("between 0 and 1", low=0, high=1)
SHARE_ABOVE_0 = Range("above 0 and at most 1", low=0, high=1, without_low=True)
RATE = Range("0 or more and below 1", low=0, high=1, without_high=True)
INSIDE_0_1 = Range("above 0 and below 1", low=0, high=1, without_low=True, without_high=True)

RULES: dict[str, Range | Each] = {
    "INPUT.CROP.SIZE": Each(POSITIVE, 2),
    "INPUT.CROP.PRE_RESIZE": Each(COUNT),
    "INPUT.CROP.PROB": SHARE,
    "INPUT.MIN_SIZE_TRAIN": Each(COUNT),
    "INPUT.MAX_SIZE_TRAIN": COUNT,
    "INPUT.MIN_SIZE_TEST": COUNT_OR_NONE,
    "INPUT.MAX_SIZE_TEST": COUNT,
    "DATALOADER.NUM_WORKERS": COUNT_OR_NONE,
    "MODEL.PIXEL_MEAN": Each(FINITE, 3),
    "MODEL.PIXEL_STD": Each(POSITIVE, 3),
    "MODEL.NMS_THRESH_TEST": SHARE,
    "MODEL.FPN.OUT_CHANNELS": COUNT,
    "MODEL.BACKBONE.FREEZE_AT": Range("a whole number from 0 to 5", low=0, high=5, whole=True),
    "MODEL.PROPOSAL_GENERATOR.NUM_QUERIES": COUNT,
    "MODEL.PROPOSAL_GENERATOR.DPG.NUM_EXPERTS": COUNT,
    "MODEL.PROPOSAL_GENERATOR.DPG.SIZE": COUNT,
    "MODEL.PROPOSAL_GENERATOR.DPG.FC_DIM": COUNT,
    "MODEL.PROPOSAL_GENERATOR.DPG.TAU_INIT": POSITIVE,
    "MODEL.PROPOSAL_GENERATOR.DPG.TAU_FINAL": POSITIVE,
    "MODEL.PROPOSAL_GENERATOR.DPG.TAU_SHARE": SHARE,
    "MODEL.ROI_HEADS.NUM_CLASSES": COUNT,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": COUNT,
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": COUNT,
    "MODEL.SLIM_RESNET.BLOCKS": Each(COUNT),
    "MODEL.SLIM_RESNET.WIDTH": COUNT,
    "MODEL.SWIN.EMBED_DIM": COUNT,
    "MODEL.SWIN.DEPTHS": Each(COUNT, 4),
    "MODEL.SWIN.NUM_HEADS": Each(COUNT, 4),
    "MODEL.SWIN.WINDOW_SIZE": COUNT,
    "MODEL.SWIN.DROP_PATH_RATE": RATE,
    "MODEL.TIMM.OUT_STRIDES": Each(COUNT),
    "MODEL.TIMM.DROP_PATH_RATE": RATE,
    "MODEL.DECODER.NUM_STAGES": COUNT,
    "MODEL.DECODER.HIDDEN_DIM": COUNT,
    "MODEL.DECODER.NUM_HEADS": COUNT,
    "MODEL.DECODER.FFN_DIM": COUNT,
    "MODEL.DECODER.DROPOUT": RATE,
    "MODEL.DECODER.NUM_CLS_LAYERS": COUNT_OR_NONE,
    "MODEL.DECODER.NUM_REG_LAYERS": COUNT_OR_NONE,
    "MODEL.DECODER.DYNAMIC_DIM": COUNT,
    "MODEL.DECODER.PRIOR_PROB": INSIDE_0_1,
    "MODEL.DECODER.NUM_AUXILIARY": COUNT_OR_NONE,
    "MODEL.DECODER.MAIN_COPY": Range("a whole number, -1 or more", low=-1, whole=True),
    "MODEL.DECODER.MIXER_GROUPS": COUNT,
    "MODEL.DECODER.MIXER_IN_POINTS": COUNT,
    "MODEL.DECODER.MIXER_OUT_POINTS": COUNT,
    "MODEL.DECODER.DEFORMABLE_POINTS": COUNT,
    "MODEL.ENCODER.NUM_LAYERS": COUNT_OR_NONE,
    "MODEL.DEFORMABLE_ENCODER.NUM_LAYERS": COUNT_OR_NONE,
    "MODEL.ASAG.COMPRESSED_DIM": COUNT,
    "MODEL.ASAG.PATCH_SIZE": COUNT,
    "MODEL.ASAG.FIXED_ANCHORS": COUNT,
    "MODEL.ASAG.PATCH_ANCHORS": COUNT,
    "MODEL.ASAG.ETA_F": Range("at most 1", high=1),
    "MODEL.ASAG.ETA_L": SHARE,
    "MODEL.ASAG.ETA_H": SHARE,
    "MODEL.ASAG.ETA_IOU": SHARE,
    "MODEL.ASAG.MIN_ANCHORS": COUNT_OR_NONE,
    "MODEL.ASAG.MAX_ANCHORS": COUNT,
    "MODEL.ASAG.MIN_SIDE": NOT_NEGATIVE,
    "MODEL.ASAG.MAX_PATCHES": COUNT_OR_NONE,
    "MODEL.ASAG.FINEST_LEVEL_TEST": Range("3, 4 or 5", low=3, high=5, whole=True),
    "MODEL.ASAG.PATCH_CAPACITY": COUNT_OR_NONE,
    "MODEL.ASAG.ANCHOR_CAPACITY": COUNT_OR_NONE,
    "MODEL.ASAG.MIN_TRAIN_PATCHES": COUNT_OR_NONE,
    "MODEL.ASAG.GT_WARMUP_ITERS": COUNT_OR_NONE,
    "MODEL.ASAG.NUM_DENOISING": COUNT_OR_NONE,
    "MODEL.ASAG.DENOISING_NOISE": NOT_NEGATIVE,
    "MODEL.ASAG.DENOISING_NOISE_DECAY": NOT_NEGATIVE,
    "MODEL.ASAG.CLASS_WEIGHT": NOT_NEGATIVE,
    "MODEL.ASAG.L1_WEIGHT": NOT_NEGATIVE,
    "MODEL.ASAG.GIOU_WEIGHT": NOT_NEGATIVE,
    "MODEL.ASAG.FFN_DIM": COUNT,
    "MODEL.ASAG.NUM_CLS_LAYERS": COUNT_OR_NONE,
    "MODEL.ASAG.NUM_REG_LAYERS": COUNT_OR_NONE,
    "MODEL.MATCHER.CLASS_COST": NOT_NEGATIVE,
    "MODEL.MATCHER.L1_COST": NOT_NEGATIVE,
    "MODEL.MATCHER.GIOU_COST": NOT_NEGATIVE,
    "MODEL.MATCHER.OT.Q": COUNT,
    "MODEL.MATCHER.OT.FIXED_K": COUNT_OR_NONE,
    "MODEL.MATCHER.OT.UNIT_STEP": NOT_NEGATIVE,
    "MODEL.MATCHER.OT.CAP": SHARE_ABOVE_0,
    "MODEL.MATCHER.OT.ALPHA": NOT_NEGATIVE,
    "MODEL.MATCHER.OT.EPS_START": POSITIVE,
    "MODEL.MATCHER.OT.EPS": POSITIVE,
    "MODEL.MATCHER.OT.ITERS": COUNT,
    "MODEL.MATCHER.OT.RELAXATION": Range("between 1 and 1.7", low=1, high=1.7),
    "MODEL.MATCHER.OT.REPAIR_ROUNDS": COUNT_OR_NONE,
    "MODEL.CRITERION.CLASS_WEIGHT": NOT_NEGATIVE,
    "MODEL.CRITERION.L1_WEIGHT": NOT_NEGATIVE,
    "MODEL.CRITERION.GIOU_WEIGHT": NOT_NEGATIVE,
    "MODEL.CRITERION.FOCAL_ALPHA": SHARE,
    "MODEL.CRITERION.FOCAL_GAMMA": NOT_NEGATIVE,
    "MODEL.CRITERION.NO_OBJECT_WEIGHT": NOT_NEGATIVE,
    "MODEL.CRITERION.AREA_WEIGHT": AT_LEAST_1,
    "MODEL.CRITERION.SCORE_EXPONENT": NOT_NEGATIVE,
    "MODEL.CRITERION.IOU_EXPONENT": NOT_NEGATIVE,
    "SOLVER.BASE_LR": POSITIVE,
    "SOLVER.MOMENTUM": RATE,
    "SOLVER.WEIGHT_DECAY": NOT_NEGATIVE,
    "SOLVER.GAMMA": POSITIVE,
    "SOLVER.WARMUP_ITERS": COUNT_OR_NONE,
    "SOLVER.MAX_ITER": COUNT,
    "SOLVER.CHECKPOINT_PERIOD": COUNT_OR_NONE,
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": POSITIVE,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": POSITIVE,
    "SOLVER.WARMUP_FACTOR": SHARE,
    "SOLVER.BACKBONE_MULTIPLIER": NOT_NEGATIVE,
    "SOLVER.EPOCHS": NOT_NEGATIVE,
    "SOLVER.EPOCH_STEPS": Each(POSITIVE),
    "SOLVER.IMS_PER_BATCH": COUNT,
    "SOLVER.REFERENCE_BATCH": COUNT,
    "SOLVER.ACCUMULATE_STEPS": COUNT,
    "SOLVER.EMA.DECAY": RATE,
    "SOLVER.EMA.WARMUP": AT_LEAST_1,
    "SOLVER.EARLY_STOP_PATIENCE": COUNT_OR_NONE,
    "TEST.DETECTIONS_PER_IMAGE": COUNT,
    "TEST.EVAL_PERIOD": COUNT_OR_NONE,
    "TEST.NUM_PICTURES": COUNT_OR_NONE,
    "TEST.AUG.MIN_SIZES": Each(COUNT),
    "TEST.AUG.MAX_SIZE": COUNT,
    "TEST.AUG.BATCH_SIZE": COUNT,
    "TEST.AUG.SIZE_RANGES": Each(NOT_NEGATIVE),
    "TEST.AUG.MERGE_IOU": SHARE,
    "TEST.AUG.MIN_SCORE": SHARE,
}

INPUT_FORMATS = ("RGB", "BGR")


def check_config(cfg: CfgNode) -> None:
    """Checks every number of a configuration, and the names that no component checks.

    Raises:
        KeyError: the library's keys are not in the configuration.
        ValueError: a line for each wrong value, with key, value and what it may be.
    """
    wrong = []
    for key, rule in RULES.items():
        value: Any = cfg
        for part in key.split("."):
            if part not in value:
                raise KeyError(f"the configuration has no {key}; call add_asag_config(cfg) on it")
            value = value[part]
        if value not in rule:
            wrong.append(f"{key} is {value!r}; it must be {rule.text}")
    if cfg.INPUT.FORMAT not in INPUT_FORMATS:
        wrong.append(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}; it must be 'RGB' or 'BGR'")
    for key, name, registry in (
        ("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, META_ARCH_REGISTRY),
        ("MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, BACKBONE_REGISTRY),
    ):
        if name not in registry:
            choices = ", ".join(sorted(known for known, _ in registry))
            wrong.append(f"{key} is {name!r}; choose one of: {choices}")
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError:
        device = cfg.MODEL.DEVICE
        wrong.append(f"MODEL.DEVICE is {device!r}; choose one of: 'cpu', 'cuda', 'cuda:0'")
    if wrong:
        raise ValueError("\n".join(wrong))
