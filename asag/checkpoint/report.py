"""Report of loaded weights: which tensors were loaded, renamed, left out or kept random."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate
from torch import nn

COLUMNS = ("loaded", "fresh", "other shape", "left out")
LISTED = 5  # names, at most, that stand behind the table

BATCH_COUNTER = ".num_batches_tracked"  # which no result depends on
# What a model computes by itself when it is built.
_COMPUTED = (BATCH_COUNTER, ".relative_position_index")

_IMAGE_CLASSIFIER = re.compile(r"(^|\.)(fc\d*|head|classifier)[._]")

ShapeMismatch = tuple[str, Sequence[int], Sequence[int]]
"""Name, shape in the file, shape in the model."""


@dataclass(frozen=True)
class LoadReport:
    """Destinations of the tensors of a file.

    Attributes:
        address: what was loaded.
        layout: whose names the file has.
        loaded: tensors of the model that came from the file.
        renamed: how many of them have another name in the file.
        fresh: those that are not in the file and keep their random start.
        other_shape: those that are in the file with another shape, and keep theirs too.
        left_out: tensors of the file that the model has no place for.
        fresh_classes: classes of the data whose rows of the loaded classifiers are fresh.
    """

    address: str
    layout: str
    loaded: Collection[str]
    renamed: int
    fresh: Collection[str]
    other_shape: Sequence[ShapeMismatch]
    left_out: Collection[str]
    fresh_classes: int = 0

    @property
    def complete(self) -> bool:
        """True if file and model hold the same tensors."""
        return not (self.fresh or self.other_shape or self.left_out)

    @property
    def backbone_only(self) -> bool:
        """True if the file held a whole backbone, perhaps with an image classifier on it, and
        nothing else: how training usually starts."""
        return (
            not self.other_shape
            and not self.interrupted
            and all(x.startswith("backbone.") for x in self.loaded)
            and all(_IMAGE_CLASSIFIER.search(x) for x in self.left_out)
        )

    @property
    def interrupted(self) -> list[str]:
        """Fresh tensors whose equals in other blocks came from the file, sorted: a file of a
        shallower network, or one that lost tensors."""
        loaded = {_without_numbers(x) for x in self.loaded}
        return sorted(x for x in self.fresh if _without_numbers(x) in loaded)

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.fresh) + len(self.other_shape)
        text = (
            f"weights {self.address} ({self.layout}): {len(self.loaded)} of the model's {total} "
            f"tensors loaded, {self.renamed} of them under other names in the file"
        )
        if self.fresh_classes:
            text += f"; in these, rows of {self.fresh_classes} class(es) start fresh"
        if self.complete:
            return f"{text}; nothing{' else' * bool(self.fresh_classes)} fresh, nothing left out"
        lines = [
            f"{text}; {len(self.fresh)} start fresh (at random), {len(self.other_shape)} because "
            f"of another shape; {len(self.left_out)} of the file left out",
            self._table(),
        ]
        for name, given, expected in self.other_shape[:LISTED]:
            lines.append(f"{name}: {tuple(given)} in the file, {tuple(expected)} in the model")
        if len(self.other_shape) > LISTED:
            lines.append(f"... and {len(self.other_shape) - LISTED} more of another shape")
        if self.interrupted:
            lines.append(
                f"fresh, though others of their kind were loaded: {_some(self.interrupted)}"
            )
        if self.left_out:
            lines.append(f"left out: {_some(sorted(self.left_out))}")
        return "\n".join(lines)

    def _table(self) -> str:
        wrong = [name for name, _, _ in self.other_shape]
        columns = [
            Counter(part_of(x) for x in names)
            for names in (self.loaded, self.fresh, wrong, self.left_out)
        ]
        parts = sorted(set().union(*columns))
        rows = [(part, *(column[part] or "" for column in columns)) for part in parts]
        return tabulate(rows, headers=("part of the model", *COLUMNS))


def part_of(name: str) -> str:
    """The part of a detector that a parameter belongs to: two steps of its path, numbers as *."""
    *path, _ = name.split(".")
    return _without_numbers(".".join(path[:2])) or name


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")


@dataclass
class LoadedFile:
    """State of a weights file while it is loaded.

    Attributes:
        address: as it was asked for.
        names: of its tensors, as they stand in it.
        layout: whose names these are.
        published: whether they are those of a whole detector, as its authors publish it.
        fresh_classes: see `LoadReport`.
    """

    address: str = ""
    names: frozenset[str] = frozenset()
    layout: str = ""
    published: bool = False
    fresh_classes: int = 0

    def report(self, model: nn.Module, incompatible: Any) -> LoadReport:
        """Returns the result of loading.

        Args:
            model: it was loaded into this.
            incompatible: what the checkpointer found: `missing_keys`, `unexpected_keys`,
                `incorrect_shapes`.
        """
        missing, wrong = set(incompatible.missing_keys), list(incompatible.incorrect_shapes)
        there = [(name, id(x)) for name, x in model.named_parameters(remove_duplicate=False)]
        filled = {x for name, x in there if name not in missing}
        # A parameter with two names needs one of them only.
        second = {name for name, x in there if x in filled} & missing
        names = {x for x in model.state_dict() if not x.endswith(_COMPUTED)} - second
        other = {name for name, _, _ in wrong}
        loaded = names - missing - other
        return LoadReport(
            address=self.address,
            layout=self.layout,
            loaded=loaded,
            renamed=len(loaded - self.names),
            fresh=names & missing - other,
            other_shape=wrong,
            left_out=list(incompatible.unexpected_keys),
            fresh_classes=self.fresh_classes,
        )
