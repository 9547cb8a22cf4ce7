"""Classes of an evaluation split, matched with those of the training split."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from asag.checkpoint.class_names import match_names, shown_difference
from asag.data.coco_table import CocoTable
from asag.data.errors import DataIssue


def with_common_classes(
    train: CocoTable, val: CocoTable
) -> tuple[CocoTable, CocoTable, list[DataIssue]]:
    """Training and evaluation tables with the same classes, matched by name.

    Order and ids are those of the training table. Where formats declare no classes, those of both
    tables count.

    Returns:
        Both tables, and an issue if the evaluation split has boxes of undeclared classes.
    """
    if not train.classes_declared and not val.classes_declared:
        rows = match_names(val.class_names, train.class_names)
        new = [name for name, row in zip(val.class_names, rows, strict=True) if row is None]
        train = _with_classes(train, sorted({*train.class_names, *new}))
    val, issues = _with_classes_of(train, val)
    return train, val, issues


def _with_classes(table: CocoTable, names: Sequence[str]) -> CocoTable:
    """A table of undeclared classes with more of them; category ids count from 1."""
    new_label = np.array([names.index(name) for name in table.class_names], dtype=np.int64)
    return replace(
        table,
        class_names=tuple(names),
        category_ids=tuple(range(1, len(names) + 1)),
        box_class=new_label[table.box_class],
    )


def _with_classes_of(train: CocoTable, val: CocoTable) -> tuple[CocoTable, list[DataIssue]]:
    """The evaluation table with the training table's class order and ids.

    Classes that only the training split declares are added, unused ones that only the evaluation
    split declares are left out, both with a note.
    """
    if (train.class_names, train.category_ids) == (val.class_names, val.category_ids):
        return val, []
    rows = match_names(val.class_names, train.class_names)
    counts = np.bincount(val.box_class, minlength=len(rows)).tolist()
    extra = {n: c for n, r, c in zip(val.class_names, rows, counts, strict=True) if r is None}
    used = {name: count for name, count in extra.items() if count}
    matched = {row for row in rows if row is not None}
    lacking = [name for row, name in enumerate(train.class_names) if row not in matched]
    if used or not matched:
        return val, [_message(train, val, lacking, used or extra)]
    notes = list(val.notes)
    respelled = [
        shown_difference(name, train.class_names[row])
        for name, row in zip(val.class_names, rows, strict=True)
        if row is not None and name != train.class_names[row]
    ]
    if respelled:
        notes.append(f"classes spelled differently in the training split: {', '.join(respelled)}")
    if lacking and val.classes_declared:
        notes.append(f"classes that only the training split declares: {', '.join(lacking)}")
    if extra:
        notes.append(f"unused classes that the training split lacks are left out: {list(extra)}")
    # A class without a row in the training split has no boxes here, so its number is never used.
    new_label = np.array([-1 if row is None else row for row in rows], dtype=np.int64)
    relabeled = replace(
        val,
        class_names=train.class_names,
        category_ids=train.category_ids,
        box_class=new_label[val.box_class],
        repairs=val.repairs
        if not val.classes_declared
        else (*val.repairs, "category ids or their order differ from the training file's"),
        notes=tuple(notes),
    )
    return relabeled, []


def _message(
    train: CocoTable, val: CocoTable, lacking: Sequence[str], extra: dict[str, int]
) -> DataIssue:
    parts = [f"lacks {list(lacking)}"] * bool(lacking) + [f"adds {list(extra)}"]
    problem = f"its classes differ from those of {train.source.name}: it {' and '.join(parts)}"
    counted = [f"{count} box(es) of {name!r}" for name, count in extra.items() if count]
    if counted:
        problem += f"; {', '.join(counted)} could never be found"
    near = {name: difflib.get_close_matches(name, lacking, n=1) for name in extra}
    hints = [f"{name!r} resembles {found[0]!r}" for name, found in near.items() if found]
    problem += f" ({', '.join(hints)})" if hints else ""
    remedy = (
        "declare the same category names in both splits (a class may have no boxes), or take the "
        "annotations of other classes out of the evaluation split"
    )
    return DataIssue(str(val.source), problem, remedy)
