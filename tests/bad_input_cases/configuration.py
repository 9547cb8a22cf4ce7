"""Malformed configurations: out-of-range numbers, unknown names and keys, broken files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from asag import load_config
from asag.config.rules import RULES, OneOf, Range, check_config
from asag.engine import Trainer
from asag.inference.tta import check_test_augmentation

from .common import ROOT, Case, expect

CONDITIONAL = "ConditionalDETR/conditional_detr_tiny.yaml"
TINY = "SparseRCNN/sparse_rcnn_tiny.yaml"
WRONG = "no-such-choice"
FREE = ("MODEL.META_ARCHITECTURE", "SparseDetector")
TIMM = ("MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.TIMM.NAME", "test_resnet")

# Keys whose value is a name, with a configuration that reads them. All other keys are tried with
# the tiny Sparse R-CNN.
CONFIGS = {
    "MODEL.PROPOSAL_GENERATOR.REFERENCE_POINTS": CONDITIONAL,
    "MODEL.DECODER.SPATIAL_QUERY": CONDITIONAL,
    "MODEL.DECODER.SPATIAL_PROJECTION": CONDITIONAL,
    "MODEL.MATCHER.OT.SOLVER": "DynamicSparseRCNN/dynamic_sparse_rcnn_tiny.yaml",
    "MODEL.MATCHER.OT.UNIT_ROUNDING": "DynamicSparseRCNN/dynamic_sparse_rcnn_tiny.yaml",
    "MODEL.DECODER.STAGE": "ASAG/asag_tiny.yaml",
    "MODEL.ASAG.ANCHOR_INIT": "ASAG/asag_tiny.yaml",
}
CHOICES = (
    *CONFIGS,
    "MODEL.META_ARCHITECTURE",
    "MODEL.BACKBONE.NAME",
    "MODEL.NECK.NAME",
    "MODEL.PROPOSAL_GENERATOR.NAME",
    "MODEL.PROPOSAL_GENERATOR.BOX_INIT",
    "MODEL.ROI_HEADS.NAME",
    "MODEL.MATCHER.NAME",
    "MODEL.CRITERION.NAME",
    "MODEL.CRITERION.CLASS_LOSS",
    "MODEL.CRITERION.L1_FORMAT",
    "MODEL.CRITERION.NORMALIZER",
    "MODEL.DECODER.SELF_ATTENTION",
    "MODEL.DECODER.ACTIVATION",
    "MODEL.DECODER.DISENTANGLE",
    "MODEL.SLIM_RESNET.NORM",
    "MODEL.INFERENCE_DTYPE",
    "MODEL.DEVICE",
    "SOLVER.OPTIMIZER",
    "SOLVER.SCALE_LR",
    "SOLVER.LR_SCHEDULER_NAME",
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE",
    "INPUT.RANDOM_FLIP",
    "INPUT.MIN_SIZE_TRAIN_SAMPLING",
)


def cases(seed: int) -> list[Case]:
    """Returns all cases; the seed selects the keys with a value of the wrong type."""
    rng = np.random.default_rng(seed)
    return [*_numbers(), *_types(rng), *_choices(), *_lists(), *_keys(rng), *_files()]


def train(cfg: CfgNode) -> Trainer:
    """Runs the command line up to the first step, on one empty image."""
    check_config(cfg)
    check_test_augmentation(cfg)
    record = {"file_name": "none.png", "image_id": 1, "height": 64, "width": 64, "annotations": []}
    trainer = Trainer(cfg, dataset_dicts=[record])
    trainer.build_train_loader(cfg, [record], seed=0)
    return trainer


def overridden(config: str, *words: str) -> Callable[[Path], str]:
    """Makes a case of overrides on the command line."""

    def run(folder: Path) -> str:
        fixed = ("MODEL.DEVICE", "cpu", "DATASETS.TEST", "()", "OUTPUT_DIR", str(folder))
        train(load_config(str(ROOT / "configs" / config), [*fixed, *words]))
        return ""

    return run


@functools.cache
def _tiny() -> CfgNode:
    return load_config(str(ROOT / "configs" / TINY))


def _outside(rule: Range) -> Iterator[tuple[str, Any]]:
    """Returns values outside of a range, each with the expected message."""
    if np.isfinite(rule.low):
        step = 1 if rule.whole else 0.5
        yield "number below its range", type(step)(rule.low) - step
        if rule.without_low:
            yield "number at an excluded end of its range", type(step)(rule.low)
    if np.isfinite(rule.high):
        step = 1 if rule.whole else 0.5
        yield "number above its range", type(step)(rule.high) + step
        if rule.without_high:
            yield "number at an excluded end of its range", type(step)(rule.high)
    if rule.whole:
        yield "fraction where a whole number is needed", max(rule.low, 0) + 1.5
    yield "NaN", float("nan")
    yield "infinite number", float("inf")
    yield "text where a number is needed", "many"
    yield "true where a number is needed", True


def _numbers() -> Iterator[Case]:
    for key, rule in RULES.items():
        if isinstance(rule, OneOf) or isinstance(getattr(rule, "item", None), OneOf):
            continue  # see `_choices`
        if isinstance(rule, Range):
            values = list(_outside(rule))
        else:
            default = functools.reduce(getattr, key.split("."), _tiny())
            length = rule.length or max(len(default), 1)
            good = list(default) if len(default) == length else [1] * length
            values = [(title, [*good[:-1], value]) for title, value in _outside(rule.item)]
            if rule.length is not None:
                values.append(("list of another length", [*good, good[-1]]))
            values.append(("number where a list is needed", good[-1]))
        for title, value in values:

            def run(folder: Path, k: str = key, v: Any = value) -> str:
                *parents, leaf = k.split(".")
                node = functools.reduce(getattr, parents, _tiny())
                before = node[leaf]
                node[leaf] = v  # yacs checks the types of files only
                try:
                    check_config(_tiny())
                finally:
                    node[leaf] = before
                return ""

            happens = "names key, value and range"
            name = f"{key} = {value!r}"
            yield Case("configuration", title, name, happens, run, (f"{key} is ",), "it must be")


def _types(rng: np.random.Generator) -> Iterator[Case]:
    keys = [key for key, rule in RULES.items() if isinstance(rule, Range)]
    for key in rng.choice(keys, size=6, replace=False).tolist():
        for value in ("many", "[1, 2]"):
            run = overridden(TINY, key, value)
            says = (key, "the command line")
            title, happens = "override of another type", "names key and types"
            yield Case("configuration", title, f"{key} {value}", happens, run, says, "first type")


def _choices() -> Iterator[Case]:
    for key in CHOICES:
        # The architectures of the papers fix some names; SparseDetector accepts any.
        free = () if key == "MODEL.META_ARCHITECTURE" else FREE
        run = overridden(CONFIGS.get(key, TINY), *free, key, WRONG)
        happens = "names the key and the choices"
        title = "name that is not among the choices"
        yield Case("configuration", title, key, happens, run, (key, WRONG), "one of")
    for key, words in {
        "SOLVER.AMP.DTYPE": ("SOLVER.AMP.ENABLED", "True"),
        "TEST.AUG.MERGE": ("TEST.AUG.ENABLED", "True"),
        "INPUT.CROP.TYPE": ("INPUT.CROP.ENABLED", "True"),
        "MODEL.TIMM.NORM": TIMM,
    }.items():
        run = overridden(TINY, key, WRONG, *words)
        happens = "names the key and the choices"
        title = "name that is not among the choices"
        yield Case("configuration", title, key, happens, run, (key, WRONG), "one of")


def _lists() -> Iterator[Case]:
    rows = [
        ("MODEL.ROI_HEADS.IN_FEATURES", "['p2', 'p9']", TINY, ("p9",), "p3"),
        ("MODEL.ROI_HEADS.IN_FEATURES", "[]", TINY, (), "HIDDEN_DIM"),
        ("MODEL.ENCODER.IN_FEATURE", "res9", CONDITIONAL, ("res9",), "it must be one of"),
        ("INPUT.FORMAT", "XYZ", TINY, ("XYZ",), "must be one of: 'RGB', 'BGR'"),
        ("MODEL.DECODER.SELF_ATTENTION", "iou", TINY, ("iou",), "set MODEL.META_ARCHITECTURE"),
        ("MODEL.MATCHER.OT.REG_COST", "('l3',)", CONFIGS["MODEL.MATCHER.OT.SOLVER"], ("l3",), "of"),
        ("MODEL.DECODER.NUM_HEADS", "7", TINY, ("7",), "it must divide"),
        ("SOLVER.IMS_PER_BATCH", "3", TINY, ("3", "ACCUMULATE_STEPS"), "multiple"),
        ("SOLVER.STEPS", "(9, 5)", TINY, (), "must rise"),
        ("MODEL.TIMM.NAME", "no-such-choice", TINY, (WRONG,), "timm.list_models()"),
        ("MODEL.TIMM.OUT_STRIDES", "(4, 8, 16, 32, 64)", TINY, ("64",), "choose different"),
        ("MODEL.PIXEL_MEAN", "[0, 0, 0]", TINY, ("test_resnet",), "set MODEL.PIXEL_MEAN"),
    ]
    for key, value, config, says, remedy in rows:
        words = [key, value]
        if key.startswith(("MODEL.TIMM", "MODEL.PIXEL")):
            words = [*TIMM, *words]
        if key == "SOLVER.IMS_PER_BATCH":
            words += ["SOLVER.ACCUMULATE_STEPS", "2"]
        if key == "SOLVER.STEPS":
            words += ["SOLVER.EPOCHS", "0", "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"]
        run = overridden(config, *words)
        happens = "names the key and what would fit"
        title = "values that do not fit each other"
        yield Case("configuration", title, f"{key} {value}", happens, run, (key, *says), remedy)


def _keys(rng: np.random.Generator) -> Iterator[Case]:
    keys = [key for key in RULES if len(key.rpartition(".")[2]) > 2]
    for key in rng.choice(keys, size=8, replace=False).tolist():
        place = int(rng.integers(key.rfind(".") + 2, len(key)))
        for title, wrong in {
            "a letter less": key[:place] + key[place + 1 :],
            "a letter more": key[:place] + "X" + key[place:],
        }.items():
            run = overridden(TINY, wrong, "1")
            happens = "names the key and the nearest ones"
            says = (f"unknown configuration key {wrong}",)
            yield Case(
                "configuration", "misspelt key", f"{key}, {title}", happens, run, says, "mean"
            )
    for name, words, says, remedy in (
        ("key without value", ("SEED",), "SEED", "pairs KEY VALUE"),
        ("key below a value", ("SEED.MORE", "1"), "SEED.MORE", "unknown configuration key"),
        ("value and key below", ("SEED", "1", "SEED.MORE", "1"), "SEED.MORE", "unknown"),
        ("a section", ("SOLVER", "1"), "SOLVER", "unknown configuration key"),
        ("no key", ("", "1"), "", "unknown configuration key"),
    ):
        run = overridden(TINY, *words)
        yield Case("configuration", "override", name, "names it", run, (says,), remedy)


def _files() -> Iterator[Case]:
    contents: dict[str, tuple[bytes, str]] = {
        "empty": (b"", "NoneType"),
        "list": (b"- a\n- b\n", "list"),
        "text": (b"just words\n", "str"),
        "tab": (b"MODEL:\n\tDEVICE: cpu\n", "line 2"),
        "open bracket": (b"INPUT:\n  MIN_SIZE_TRAIN: (1, [2\n  X: ]\n", ""),
        "no text": (b"\xff\xfe\x00\x01\x02", ""),
        "JSON cut off": (b'{"MODEL": {"DEVICE": ', "line 1"),
        "base missing": (b"_BASE_: absent.yaml\n", "absent.yaml"),
        "base of itself": (b"_BASE_: wrong.yaml\n", ""),
        "code": (b"MODEL: !!python/object/apply:os.mkdir ['ran']\n", ""),
        "two documents": (b"SEED: 1\n---\nSEED: 2\n", ""),
    }
    for name, (content, says) in contents.items():

        def run(folder: Path, c: bytes = content) -> str:
            (folder / "wrong.yaml").write_bytes(c)
            try:
                load_config(str(folder / "wrong.yaml"))
            finally:
                expect(not Path("ran").exists(), "the code in it ran")
            return ""

        happens = "names the file and the place"
        title = "file that is no configuration"
        yield Case("configuration", title, name, happens, run, ("wrong.yaml", says), "Fix the file")
    for name, content, says in (
        ("unknown key", b"MODEL:\n  DEVICES: cpu\n", "MODEL.DEVICES"),
        ("value for a section", b"SOLVER: 5\n", "unknown configuration key SOLVER"),
        ("section for a value", b"SEED: {A: 1}\n", "unknown configuration key SEED.A"),
    ):

        def run(folder: Path, c: bytes = content) -> str:
            (folder / "wrong.yaml").write_bytes(c)
            load_config(str(folder / "wrong.yaml"))
            return ""

        happens = "names key and file"
        title = "unknown key in a file"
        yield Case("configuration", title, name, happens, run, (says, "wrong.yaml"), "unknown")
