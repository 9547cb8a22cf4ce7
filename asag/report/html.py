"""HTML elements, escaped by construction."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

VOID = {"img", "meta", "wbr"}  # elements without an end tag


class Html(str):
    """Text that is markup already; plain strings are escaped."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """Returns an element.

    Args:
        name: such as "p".
        children: `Html` unchanged, everything else as escaped text.
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
    """Concatenates parts; text is escaped."""
    return Html("".join(x if isinstance(x, Html) else _escaped(x) for x in parts))


def _escaped(value: object) -> str:
    """Escapes text for elements and quoted attributes.

    Characters that UTF-8 cannot encode, such as bytes of a file name in another encoding, become
    "?".
    """
    return html.escape(str(value).encode("utf-8", "replace").decode("utf-8"))


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    caption: str,
    wide_text: bool = False,
) -> Html:
    """Returns a table whose first column names the rows.

    Args:
        header: of every column.
        rows: cells; numbers are right-aligned.
        caption: of the table.
        wide_text: cells have words, which are left-aligned and may be broken.
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
    """Returns a section of the page, with a heading for the table of contents."""
    return tag("section", tag("h2", title), *children, id=anchor(title))


def anchor(title: str) -> str:
    """Returns the id of a section."""
    return title.lower().replace(" ", "-")


def note(*children: object) -> Html:
    """Returns a remark, such as the reason for a missing part."""
    return tag("p", *children, class_="note")


def details(summary: str, *children: object) -> Html:
    """Returns a collapsed part."""
    return tag("details", tag("summary", summary), *children)


def number(value: float, digits: int = 1) -> str:
    """Formats a number for a table; a dash if there is none."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"
