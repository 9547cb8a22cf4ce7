"""Ids of images, annotations and categories as people write them: numbers, text, or both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


def id_order(value: int | str) -> tuple[bool, int, str]:
    """Sort key of ids: whole numbers rising, then text.

    Equals Python's own order where all ids are of one kind.
    """
    return (True, 0, value) if isinstance(value, str) else (False, value, "")


def loose_id(value: object) -> str | None:
    """The form in which 7, 7.0, "7", " 7" and "007" are the same; None for what is no id."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else None
    text = str(value).strip()
    digits = text.removeprefix("-")
    if digits.isascii() and digits.isdigit():
        return ("-" if text.startswith("-") else "") + (digits.lstrip("0") or "0")
    return text


class IdIndex:
    """Finds the row of an id, also where it is written as another type than in the list.

    Attributes:
        corrected: number of ids so far that were found only by their loose form.
        example: the first of these, as written and as listed.
    """

    def __init__(self, ids: Sequence[int | str], other_names: Iterable[Sequence[str]] = ()) -> None:
        """
        Args:
            ids: the listed ids, in the order of their rows.
            other_names: further unique names of the rows, such as file names, that are tried where
                no id fits.
        """
        self._ids = list(ids)
        self._exact = {value: row for row, value in enumerate(ids)}
        self._loose = [_unique(map(loose_id, ids)), *map(_unique, other_names)]
        self._known: dict[object, int] = {}
        self.corrected = 0
        self.example: tuple[object, object] | None = None

    def find(self, value: object) -> int:
        """The row of an id; -1 where none fits, or several do."""
        row = self._exact.get(value)
        if row is not None:
            return row
        if value not in self._known:
            self._known[value] = self._find_loosely(value)
        row = self._known[value]
        if row >= 0:
            self.corrected += 1
            self.example = self.example or (value, self._ids[row])
        return row

    def _find_loosely(self, value: object) -> int:
        form = loose_id(value)
        written = value if isinstance(value, str) else None
        for position, names in enumerate(self._loose):
            row = names.get(form if position == 0 else written)
            if row is not None:
                return row
        return -1


def _unique(names: Iterable[str | None]) -> dict[str, int]:
    """name -> row, without the names that stand for several rows."""
    rows = list(names)
    counts = Counter(rows)
    return {name: row for row, name in enumerate(rows) if name is not None and counts[name] == 1}
