"""Matching class names that differ in form only."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence


def loose_name(name: str) -> str:
    """The form in which letter case, Unicode form, white space, `_` and `-` do not count."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return " ".join(re.split(r"[\s_-]+", folded)).strip()


def shown_difference(name: str, other: str) -> str:
    """Two spellings of a name, with escapes where they look the same."""
    nfc = [unicodedata.normalize("NFC", x) for x in (name, other)]
    show = ascii if nfc[0] == nfc[1] else repr
    return f"{show(name)} is {show(other)}"


def match_names(names: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """Pairs names one to one with known ones.

    Args:
        names: unique names.
        known: unique names.

    Returns:
        For each name the index of the known one that is equal, or else the only one left that
        differs in form only; None where there is none.
    """
    index = {name: row for row, name in enumerate(known)}
    rows = [index.get(name) for name in names]
    taken = set(rows)
    left = {row: loose_name(name) for name, row in index.items() if row not in taken}
    forms = [None if row is not None else loose_name(x) for x, row in zip(names, rows, strict=True)]
    known_forms, own_forms = Counter(left.values()), Counter(forms)
    loose = {form: row for row, form in left.items() if known_forms[form] == 1}
    return [
        loose.get(form) if row is None and own_forms[form] == 1 else row
        for row, form in zip(rows, forms, strict=True)
    ]
