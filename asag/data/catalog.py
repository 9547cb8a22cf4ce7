"""Registered data sets: loading them, and checks that say what to change."""

from __future__ import annotations

import difflib
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts

from .errors import DatasetError
from .image_check import inspect_images


def check_registered(cfg: CfgNode, *, need_train: bool = True) -> None:
    """Raises ValueError unless every name of DATASETS.TRAIN and DATASETS.TEST is registered.

    Args:
        cfg: the two keys.
        need_train: whether an empty DATASETS.TRAIN is an error.
    """
    if need_train and not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty; name a data set, or pass --data DIR")
    known = DatasetCatalog.list()
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=3)
                hint = f"did you mean {' or '.join(close)}? " if close else ""
                raise ValueError(
                    f"DATASETS.{key}: no data set is called {name!r}; {hint}"
                    "For files of your own pass --data DIR."
                )


def load_train_dicts(cfg: CfgNode) -> list[dict[str, Any]]:
    """Dataset dicts of all of DATASETS.TRAIN; images without objects are dropped if
    DATALOADER.FILTER_EMPTY_ANNOTATIONS says so.

    Raises:
        ValueError: a name is not registered, or its files are not there.
    """
    check_registered(cfg)
    try:
        return get_detection_dataset_dicts(
            list(cfg.DATASETS.TRAIN), filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        )
    except FileNotFoundError as error:
        raise ValueError(
            f"DATASETS.TRAIN = {tuple(cfg.DATASETS.TRAIN)}: {error}. Data sets of Detectron2 are "
            "looked for below the folder in the environment variable DETECTRON2_DATASETS "
            "(default ./datasets)."
        ) from error


def check_images(cfg: CfgNode) -> None:
    """Decodes all images of DATASETS.TRAIN and DATASETS.TEST.

    Raises:
        DatasetError: with every image that cannot be read, or has more than INPUT.MAX_PIXELS.
        ValueError: a name is not registered.
    """
    check_registered(cfg, need_train=False)
    names = dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    paths = [entry["file_name"] for name in names for entry in DatasetCatalog.get(name)]
    facts = inspect_images(paths, decode=True, max_pixels=cfg.INPUT.MAX_PIXELS)
    issues = [x.issue(path) for path, x in zip(paths, facts, strict=True) if x.error]
    if issues:
        raise DatasetError(issues)


def class_names(dataset_name: str) -> list[str]:
    """Names of the classes; empty when the data set does not know them before it is loaded."""
    return list(MetadataCatalog.get(dataset_name).get("thing_classes", []))


def check_classes(cfg: CfgNode) -> None:
    """Raises ValueError when the head has another number of classes than a data set.

    Call it once the training set is loaded: some data sets learn their classes from the file.
    """
    heads = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            names = class_names(name)
            if names and len(names) != heads:
                shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
                raise ValueError(
                    f"MODEL.ROI_HEADS.NUM_CLASSES is {heads}, but data set {name!r} of "
                    f"DATASETS.{key} has {len(names)} classes ({shown}); set "
                    f"MODEL.ROI_HEADS.NUM_CLASSES {len(names)}"
                )
