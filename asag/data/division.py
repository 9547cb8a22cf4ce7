"""Dividing a single split into training and evaluation images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath

import numpy as np

from asag.data.coco_table import CocoTable
from asag.data.errors import DataIssue, DatasetError

SEED = 0
# Roboflow names the augmented copies of `x.jpg` `x_jpg.rf.<hash>.jpg`, each with its own hash.
_ROBOFLOW = re.compile(r"(.+)\.rf\.[0-9A-Za-z]{6,}$")


def divide_table(
    table: CocoTable, val_fraction: float, *, seed: int = SEED
) -> tuple[CocoTable, CocoTable]:
    """Divide the images of a table into a training and an evaluation table.

    Images are divided by class, the rarest first, so that every class keeps its share of images on
    both sides as far as it has enough (iterative stratification: Sechidis et al., On the
    stratification of multi-label data, ECML 2011). Copies of one source image stay together. The
    result depends on names, boxes and seed, not on the order of the images.

    Args:
        table: all images.
        val_fraction: share of images for evaluation, in (0, 1).
        seed: of the random order.

    Raises:
        ValueError: the fraction is out of range.
        DatasetError: there is only one image, or one source image with its copies.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction:g}; it must lie between 0 and 1")
    groups = source_groups(table.file_names)
    names = sorted(set(groups))
    if len(names) < 2:
        what = "image" if len(groups) < 2 else f"source image with {len(groups)} copies"
        problem = f"1 {what} cannot be divided into training and evaluation"
        raise DatasetError([DataIssue(str(table.source), problem, "add images")])
    number = {name: i for i, name in enumerate(names)}
    group_of = np.array([number[name] for name in groups])
    in_val = _stratified(_class_counts(table, group_of, len(names)), group_of, val_fraction, seed)
    is_val = in_val[group_of]
    every = np.ones(len(table.boxes_xywh), dtype=bool)
    if len(names) < len(groups):
        note = f"augmented copies stay together: {len(groups)} images of {len(names)} sources"
        table = replace(table, notes=(*table.notes, note))
    how = f"val_fraction {val_fraction:g}, seed {seed}"
    kept, total = int(is_val.sum()), len(is_val)
    train = table.select(
        ~is_val, every, f"{total - kept} of {total} images, the others are for evaluation ({how})"
    )
    val = table.select(is_val, every, f"{kept} of {total} images, kept for evaluation ({how})")
    return train, val


def source_groups(file_names: Sequence[str]) -> list[str]:
    """The name of the source image of each file: its own, but for Roboflow's augmented copies."""
    groups = []
    for name in file_names:
        stem = PurePosixPath(name.replace("\\", "/")).stem
        found = _ROBOFLOW.fullmatch(stem)
        groups.append(f"{found[1]}.rf" if found else name)
    return groups


def _class_counts(table: CocoTable, group_of: np.ndarray, num_groups: int) -> np.ndarray:
    """(groups, K) number of images of a group that have a class."""
    listed = table.box_image >= 0
    has = np.zeros((len(table.image_ids), len(table.class_names)), dtype=bool)
    has[table.box_image[listed], table.box_class[listed]] = True
    counts = np.zeros((num_groups, len(table.class_names)), dtype=np.int64)
    np.add.at(counts, group_of, has)
    return counts


def _stratified(
    counts: np.ndarray, group_of: np.ndarray, val_fraction: float, seed: int
) -> np.ndarray:
    """(groups,) bool, True for evaluation."""
    rng = np.random.default_rng(seed)
    sizes = np.bincount(group_of, minlength=len(counts))
    shares = np.array([1 - val_fraction, val_fraction])
    wanted = counts.sum(axis=0)[None] * shares[:, None]  # (2, K) images of a class still to come
    wanted_images = sizes.sum() * shares  # (2,) images still to come
    side = np.full(len(counts), -1)
    order = rng.permutation(len(counts))

    def assign(groups: np.ndarray, label: int | None) -> None:
        for group in groups.tolist():
            by_class = np.zeros(2) if label is None else wanted[:, label]
            # The side that lacks most of the class; where both lack the same, most images.
            to_val = tuple((by_class[i], wanted_images[i]) for i in (0, 1))
            chosen = int(to_val[1] > to_val[0])
            side[group] = chosen
            wanted[chosen] -= counts[group]
            wanted_images[chosen] -= sizes[group]

    left = counts.copy()
    while left.any():
        totals = left.sum(axis=0)
        label = int(np.where(totals > 0, totals, np.iinfo(np.int64).max).argmin())
        groups = order[left[order, label] > 0]
        assign(groups, label)
        left[groups] = 0
    assign(order[side[order] < 0], None)
    for empty in (0, 1):
        if not (side == empty).any():  # too few images for the fraction: one is better than none
            side[order[np.argmin(sizes[order])]] = empty
    return side == 1
