"""Fine-tuning on other classes: classifier rows are assigned by class name.

A class that the weights know keeps its row, whatever its number; a new class starts as in a fresh
model. K classes of the data, R rows of a classifier: one a class, and one for background behind
them where the loss is a softmax.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from tabulate import tabulate
from torch import Tensor

from .class_names import loose_name
from .detr import PUBLISHED_COLUMNS

# Every classifier of every stage, copy and proposal generator is called this.
_HEAD = re.compile(r"(.*\.)?class_logits\.(weight|bias)")
LISTED = 40  # classes, at most, that the table lists


def class_heads(names: Iterable[str]) -> list[str]:
    """Names of the parameters that have one row a class."""
    return [name for name in names if _HEAD.fullmatch(name)]


def coco_row_names(rows: int) -> list[str | None] | None:
    """Class of every row of a classifier trained on COCO; None where a row has none.

    Published classifiers have a row for each of the 80 classes, or for each category number up to
    90; a background row may follow. Other numbers of rows are not COCO's: None.
    """
    things = {x["id"]: x["name"] for x in COCO_CATEGORIES if x["isthing"]}
    if rows in (len(things), len(things) + 1):
        return list(things.values())
    if rows in (PUBLISHED_COLUMNS, PUBLISHED_COLUMNS + 1):
        return [things.get(i) for i in range(PUBLISHED_COLUMNS)]
    return None


@dataclass(frozen=True)
class ClassTransfer:
    """Sources of the classifier rows of the data's classes.

    Attributes:
        data_names: K classes of the data.
        file_names: classes of the file by row; None for rows of no class. Empty if the file tells
            no names.
        rows: for each class of the data its row in the file; None starts anew.
    """

    data_names: tuple[str, ...]
    file_names: tuple[str | None, ...]
    rows: tuple[int | None, ...]

    @classmethod
    def by_name(cls, data_names: Sequence[str], file_names: Sequence[str | None]) -> ClassTransfer:
        """Pairs classes of equal name; capitals, Unicode form, white space, `_` and `-` do not
        count, unless only they tell two classes of the file apart."""
        exact: dict[str, int] = {}
        loose: dict[str, int] = {}
        for row, name in enumerate(file_names):
            if name is not None:
                exact.setdefault(name, row)
                loose.setdefault(loose_name(name), row)
        rows = [exact.get(x, loose.get(loose_name(x))) for x in data_names]
        return cls(tuple(data_names), tuple(file_names), tuple(rows))

    @property
    def is_identity(self) -> bool:
        """True if every row stays where it is."""
        return self.rows == tuple(range(len(self.file_names)))

    @property
    def all_new(self) -> bool:
        """True if no class of the data is known."""
        return all(row is None for row in self.rows)

    def fill(self, fresh: Tensor, trained: Tensor) -> Tensor:
        """Rows for the model: those of known classes (and of background, where both have one) from
        the file, the others as they are in the fresh model.

        Args:
            fresh: (K or K + 1, ...) of the model.
            trained: (R, ...) of the file.
        """
        if self.all_new:
            return fresh
        filled = fresh.clone()
        pairs = [(k, row) for k, row in enumerate(self.rows) if row is not None]
        if len(fresh) > len(self.rows) and len(trained) > len(self.file_names):
            pairs.append((len(self.rows), len(self.file_names)))
        targets, sources = zip(*pairs, strict=True)
        filled[list(targets)] = trained[list(sources)].to(filled)
        return filled

    def describe(self) -> str:
        """A sentence, and a table of classes with their origin."""
        if not self.file_names:
            return (
                "the file names no classes, and its classifiers have other numbers of rows than "
                f"the {len(self.data_names)} classes of the data need: all of them start anew"
            )
        known = sum(row is not None for row in self.rows)
        used = set(self.rows)
        unused = [x for i, x in enumerate(self.file_names) if i not in used and x is not None]
        text = (
            f"{known} of {len(self.rows)} classes of the data are known to the weights and keep "
            f"their rows of the classifiers, {len(self.rows) - known} start anew"
        )
        if unused:
            shown = ", ".join(unused[:8]) + (", ..." if len(unused) > 8 else "")
            text += f"; {len(unused)} of the file's are not in the data: {shown}"
        origin = ["new" if r is None else f"row {r}, {self.file_names[r]}" for r in self.rows]
        table = list(zip(range(len(origin)), self.data_names, origin, strict=True))
        lines = tabulate(table[:LISTED], headers=("class", "of the data", "from the file"))
        more = f"\n... and {len(table) - LISTED} more" if len(table) > LISTED else ""
        return f"{text}\n{lines}{more}"


def adopt_classes(
    state: Mapping[str, Tensor],
    fresh: Mapping[str, Tensor],
    data_names: Sequence[str],
    file_names: Sequence[str | None] | None,
) -> tuple[dict[str, Tensor], ClassTransfer | None]:
    """Fits the classifiers in a checkpoint to the classes of the data.

    Args:
        state: weights to load, under this library's names.
        fresh: those of the model as it was built.
        data_names: K class names.
        file_names: by row; None where the file tells none. Names that fit no classifier are passed
            over.

    Returns:
        Weights that fit the model, and what was done; None where there was nothing to do: no
        classifiers, the same classes, or an equal number without names.
    """
    # If the model has another number of classes than the data, the check of the shapes reports it.
    heads = [
        name
        for name in class_heads(state)
        if name in fresh
        and len(fresh[name]) - len(data_names) in (0, 1)
        and fresh[name].shape[1:] == state[name].shape[1:]
    ]
    if not heads:
        return dict(state), None
    fits = file_names and all(len(state[x]) - len(file_names) in (0, 1) for x in heads)
    if not fits:
        other = [x for x in heads if len(state[x]) != len(fresh[x])]
        kept = {name: value for name, value in state.items() if name not in other}
        unknown = ClassTransfer(tuple(data_names), (), (None,) * len(data_names))
        return kept, unknown if other else None
    transfer = ClassTransfer.by_name(data_names, file_names)
    if transfer.is_identity and all(len(state[x]) == len(fresh[x]) for x in heads):
        return dict(state), None
    return dict(state) | {x: transfer.fill(fresh[x], state[x]) for x in heads}, transfer
