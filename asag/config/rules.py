"""Allowed values of the configuration keys, checked before anything is built.

One line a key. Rules across several keys (a divisor, an order) are checked by the components that
read these keys.
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
    """Finite numbers between two bounds, including the bounds by default.

    Attributes:
        text: description that completes "it must be ...".
        low, high: bounds.
        without_low, without_high: exclude the bound itself.
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
class OneOf:
    """A fixed set of values.

    Attributes:
        choices: the values.
    """

    choices: tuple[str, ...]

    @property
    def text(self) -> str:
        """Description that completes "it must be ..."."""
        return "one of: " + ", ".join(map(repr, self.choices))

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.choices


@dataclass(frozen=True)
class Each:
    """Lists, also nested ones, whose every element follows a rule.

    Attributes:
        item: rule of the elements.
        length: required length of the list; None allows any from `least` to `most`.
        least, most: bounds of the length.
    """

    item: Range | OneOf
    length: int | None = None
    least: int = 0
    most: float = math.inf

    @property
    def text(self) -> str:
        """Description that completes "it must be ..."."""
        if self.length is not None:
            size = f"a list of {self.length} elements"
        elif math.isfinite(self.most):
            size = f"a list of {self.least} to {self.most} elements"
        else:
            size = f"a list of {self.least} or more elements" if self.least else "a list"
        return f"{size}, each {self.item.text}"

    def __contains__(self, value: Any) -> bool:
        if not isinstance(value, list | tuple) or not self.least <= len(value) <= self.most:
            return False
        if self.length not in (None, len(value)):
            return False
        return all(element in self.item for element in _elements(value))


def _elements(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _elements(value)
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

RULES: dict[str, Range | OneOf | Each] = {
    "INPUT.FORMAT": OneOf(("RGB", "BGR")),
    "INPUT.MAX_PIXELS": COUNT,
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
    "MODEL.INFERENCE_DTYPE": OneOf(("float32", "bfloat16", "float16")),
    "MODEL.NMS_THRESH_TEST": SHARE,
    "MODEL.FPN.OUT_CHANNELS": COUNT,
    "MODEL.BACKBONE.FREEZE_AT": Range("a whole number from 0 to 5", low=0, high=5, whole=True),
    "MODEL.PROPOSAL_GENERATOR.NUM_QUERIES": COUNT,
    "MODEL.PROPOSAL_GENERATOR.BOX_INIT": OneOf(("image", "grid", "random", "center")),
    "MODEL.PROPOSAL_GENERATOR.REFERENCE_POINTS": OneOf(("none", "origin", "learned", "predicted")),
    "MODEL.PROPOSAL_GENERATOR.DPG.NUM_EXPERTS": COUNT,
    "MODEL.PROPOSAL_GENERATOR.DPG.SIZE": COUNT,
    "MODEL.PROPOSAL_GENERATOR.DPG.FC_DIM": COUNT,
    "MODEL.PROPOSAL_GENERATOR.DPG.TAU_INIT": POSITIVE,
    "MODEL.PROPOSAL_GENERATOR.DPG.TAU_FINAL": POSITIVE,
    "MODEL.PROPOSAL_GENERATOR.DPG.TAU_SHARE": SHARE,
    "MODEL.ROI_HEADS.NUM_CLASSES": COUNT,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": COUNT,
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": COUNT,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": OneOf(("ROIAlign", "ROIAlignV2")),
    "MODEL.SLIM_RESNET.BLOCKS": Each(COUNT, least=1, most=4),
    "MODEL.SLIM_RESNET.WIDTH": COUNT,
    "MODEL.SLIM_RESNET.NORM": OneOf(("BN", "GN", "SyncBN")),
    "MODEL.SWIN.EMBED_DIM": COUNT,
    "MODEL.SWIN.DEPTHS": Each(COUNT, 4),
    "MODEL.SWIN.NUM_HEADS": Each(COUNT, 4),
    "MODEL.SWIN.WINDOW_SIZE": COUNT,
    "MODEL.SWIN.DROP_PATH_RATE": RATE,
    "MODEL.TIMM.OUT_STRIDES": Each(COUNT),
    "MODEL.TIMM.NORM": OneOf(("BN", "SyncBN", "FrozenStatistics", "FrozenBN")),
    "MODEL.TIMM.DROP_PATH_RATE": RATE,
    "MODEL.DECODER.NUM_STAGES": COUNT,
    "MODEL.DECODER.HIDDEN_DIM": COUNT,
    "MODEL.DECODER.NUM_HEADS": COUNT,
    "MODEL.DECODER.FFN_DIM": COUNT,
    "MODEL.DECODER.DROPOUT": RATE,
    "MODEL.DECODER.ACTIVATION": OneOf(("relu", "gelu")),
    "MODEL.DECODER.SELF_ATTENTION": OneOf(("msa", "iou_esa", "iou", "none")),
    "MODEL.DECODER.DISENTANGLE": OneOf(("none", "half", "full")),
    "MODEL.DECODER.SPATIAL_QUERY": OneOf(("csq", "csq_c", "csq_t", "csq_p", "csq_i")),
    "MODEL.DECODER.SPATIAL_PROJECTION": OneOf(("diagonal", "single", "block", "full", "identity")),
    "MODEL.DECODER.STAGE": OneOf(("dynamic_conv", "adamixer", "deformable")),
    "MODEL.DECODER.NUM_CLS_LAYERS": COUNT_OR_NONE,
    "MODEL.DECODER.NUM_REG_LAYERS": COUNT_OR_NONE,
    "MODEL.DECODER.DYNAMIC_DIM": COUNT,
    "MODEL.DECODER.PRIOR_PROB": INSIDE_0_1,
    "MODEL.DECODER.MIN_BOX_SCALE": RATE,
    "MODEL.DECODER.MAX_BOX_SCALE": Range("above 1", low=1, without_low=True),
    "MODEL.DECODER.REFERENCE_EPS": Range(
        "above 0 and below 0.5", low=0, high=0.5, without_low=True, without_high=True
    ),
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
    "MODEL.ASAG.ANCHOR_INIT": OneOf(("random", "grid")),
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
    "MODEL.MATCHER.OT.UNIT_ROUNDING": OneOf(("floor", "round", "none")),
    "MODEL.MATCHER.OT.CAP": SHARE_ABOVE_0,
    "MODEL.MATCHER.OT.ALPHA": NOT_NEGATIVE,
    "MODEL.MATCHER.OT.REG_COST": Each(OneOf(("l1", "giou")), least=1),
    "MODEL.MATCHER.OT.SOLVER": OneOf(("auto", "exact", "sinkhorn")),
    "MODEL.MATCHER.OT.EPS_START": POSITIVE,
    "MODEL.MATCHER.OT.EPS": POSITIVE,
    "MODEL.MATCHER.OT.ITERS": COUNT,
    "MODEL.MATCHER.OT.RELAXATION": Range("between 1 and 1.7", low=1, high=1.7),
    "MODEL.MATCHER.OT.REPAIR_ROUNDS": COUNT_OR_NONE,
    "MODEL.CRITERION.CLASS_LOSS": OneOf(("focal", "softmax")),
    "MODEL.CRITERION.CLASS_WEIGHT": NOT_NEGATIVE,
    "MODEL.CRITERION.L1_WEIGHT": NOT_NEGATIVE,
    "MODEL.CRITERION.GIOU_WEIGHT": NOT_NEGATIVE,
    "MODEL.CRITERION.L1_FORMAT": OneOf(("xyxy", "cxcywh")),
    "MODEL.CRITERION.FOCAL_ALPHA": SHARE,
    "MODEL.CRITERION.FOCAL_GAMMA": NOT_NEGATIVE,
    "MODEL.CRITERION.NO_OBJECT_WEIGHT": NOT_NEGATIVE,
    "MODEL.CRITERION.AREA_WEIGHT": AT_LEAST_1,
    "MODEL.CRITERION.NORMALIZER": OneOf(("objects", "positives")),
    "MODEL.CRITERION.SCORE_EXPONENT": NOT_NEGATIVE,
    "MODEL.CRITERION.IOU_EXPONENT": NOT_NEGATIVE,
    "SOLVER.OPTIMIZER": OneOf(("ADAMW", "SGD")),
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
    "SOLVER.BY_DATA.EPOCHS": NOT_NEGATIVE,
    "SOLVER.BY_DATA.MIN_ITERS": COUNT_OR_NONE,
    "SOLVER.BY_DATA.MAX_ITERS": COUNT_OR_NONE,
    "SOLVER.EPOCH_STEPS": Each(POSITIVE),
    "SOLVER.IMS_PER_BATCH": COUNT,
    "SOLVER.REFERENCE_BATCH": COUNT,
    "SOLVER.SCALE_LR": OneOf(("none", "linear", "sqrt")),
    "SOLVER.ACCUMULATE_STEPS": COUNT,
    "SOLVER.AMP.DTYPE": OneOf(("float16", "bfloat16")),
    "SOLVER.MEMORY_CHECK": OneOf(("auto", "always", "never")),
    "SOLVER.EMA.DECAY": RATE,
    "SOLVER.EMA.WARMUP": AT_LEAST_1,
    "SOLVER.EARLY_STOP_PATIENCE": COUNT_OR_NONE,
    "TEST.DETECTIONS_PER_IMAGE": COUNT,
    "TEST.EVAL_PERIOD": COUNT_OR_NONE,
    "TEST.NUM_EVALUATIONS": COUNT_OR_NONE,
    "TEST.NUM_PICTURES": COUNT_OR_NONE,
    "TEST.AUG.MIN_SIZES": Each(COUNT, least=1),
    "TEST.AUG.MAX_SIZE": COUNT,
    "TEST.AUG.BATCH_SIZE": COUNT,
    "TEST.AUG.SIZE_RANGES": Each(NOT_NEGATIVE),
    "TEST.AUG.MERGE": OneOf(("nms", "vote")),
    "TEST.AUG.MERGE_IOU": SHARE,
    "TEST.AUG.MIN_SCORE": SHARE,
}


def check_config(cfg: CfgNode) -> None:
    """Checks the values of all keys of `RULES`, the device, the meta-architecture and the backbone.

    Raises:
        KeyError: the configuration lacks the library's keys.
        ValueError: one line for each wrong value, with key, value and allowed values.
    """
    wrong = _violations(cfg)
    for key, name, registry in (
        ("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, META_ARCH_REGISTRY),
        ("MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, BACKBONE_REGISTRY),
    ):
        if name not in registry:
            rule = OneOf(tuple(sorted(known for known, _ in registry)))
            wrong.append(f"{key} is {name!r}; it must be {rule.text}")
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError:
        device = cfg.MODEL.DEVICE
        wrong.append(
            f"MODEL.DEVICE is {device!r}; it must be one of: 'cpu', 'cuda', or a device such as "
            "'cuda:0'"
        )
    if wrong:
        raise ValueError("\n".join(wrong))


def check_section(cfg: CfgNode, section: str) -> None:
    """Checks the keys of `RULES` below a section such as "TEST.AUG"; errors as `check_config`."""
    wrong = _violations(cfg, f"{section}.")
    if wrong:
        raise ValueError("\n".join(wrong))


def _violations(cfg: CfgNode, prefix: str = "") -> list[str]:
    wrong = []
    for key, rule in RULES.items():
        if not key.startswith(prefix):
            continue
        value: Any = cfg
        for part in key.split("."):
            if part not in value:
                raise KeyError(f"the configuration has no {key}; call add_asag_config(cfg) on it")
            value = value[part]
        if value not in rule:
            wrong.append(f"{key} is {value!r}; it must be {rule.text}")
    return wrong
