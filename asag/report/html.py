"""Pieces of HTML, escaped by construction."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

VOID = {"img", "meta", "wbr"}  # elements without an end


class Html(str):
    """Text that is markup already. Plain strings become text."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element.

    Args:
        name: such as "p".
        children: `Html` as it is, everything else as escaped text.
        attributes: values are escaped; a trailing _ of the name is dropped (`class_`), others
            become hyphens; None leaves one out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escaped(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{join(*children)}</{name}>")


def join(*parts: object) -> Html:
    """Parts one behind the other, text escaped."""
    return Html("".join(x if isinstance(x, Html) else _escaped(x) for x in parts))


def _escaped(value: object) -> str:
    """Text for elements and quoted attributes; "?" for what UTF-8 cannot write, such as the bytes
    of a file name in another encoding."""
    return html.escape(str(value).encode("utf-8", "replace").decode("utf-8"))


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    caption: str,
    wide_text: bool = False,
) -> Html:
    """A table whose first column names the rows.

    Args:
        header: of every column.
        rows: cells; numbers are set to the right.
        caption: what the table shows.
        wide_text: cells hold words, which are set to the left and may break.
    """
    head = tag("tr", *(tag("th", text, scope="col") for text in header))
    body = [
        tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in rest))
        for first, *rest in rows
    ]
    content = tag(
        "table", tag("caption", caption), tag("thead", head), tag("tbody", *body),
        class_="words" if wide_text else None,
    )  # fmt: skip
    return tag("div", content, class_="scroll", tabindex="0", role="region", aria_label=caption)


def section(title: str, *children: object) -> Html:
    """A part of the page with a heading that the table of contents points to."""
    return tag("section", tag("h2", title), *children, id=anchor(title))


def anchor(title: str) -> str:
    """Id of a section."""
    return title.lower().replace(" ", "-")


def note(*children: object) -> Html:
    """A remark, such as why something is not shown."""
    return tag("p", *children, class_="note")


def details(summary: str, *children: object) -> Html:
    """Something folded away."""
    return tag("details", tag("summary", summary), *children)


def number(value: float, digits: int = 1) -> str:
    """A figure for a table; a dash where there is none."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"
