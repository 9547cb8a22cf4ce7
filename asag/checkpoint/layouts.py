"""The layouts that whole detectors are published in: recognized by their names, and converted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from .asag import ASAG_A, ASAG_S
from .conditional_detr import CONDITIONAL_DETR
from .detr import DETR
from .detrex import DETREX_CONDITIONAL_DETR, DETREX_DETR
from .iou_sparse_rcnn import IOU_SPARSE_RCNN
from .mapping import NameTable
from .mmdet import MMDET_CONDITIONAL_DETR, MMDET_DETR, MMDET_SPARSE_RCNN
from .packing import PackedTable
from .sparse_rcnn import SPARSE_RCNN
from .transformers_detr import (
    TRANSFORMERS_CONDITIONAL_DETR,
    TRANSFORMERS_CONDITIONAL_DETR_RESNET,
    TRANSFORMERS_DETR,
    TRANSFORMERS_DETR_RESNET,
)

OURS = "asag"
TRANSFORMERS = "transformers-"

_COMPONENTS = ("backbone.", "neck.", "proposal_generator.", "roi_heads.")

LAYOUTS: dict[str, NameTable | PackedTable] = {
    "authors-sparse-rcnn": SPARSE_RCNN,
    "authors-iou-sparse-rcnn": IOU_SPARSE_RCNN,
    "authors-detr": DETR,
    "authors-conditional-detr": CONDITIONAL_DETR,
    "authors-asag-a": ASAG_A,
    "authors-asag-s": ASAG_S,
    "mmdet-sparse-rcnn": MMDET_SPARSE_RCNN,
    "mmdet-detr": MMDET_DETR,
    "mmdet-conditional-detr": MMDET_CONDITIONAL_DETR,
    "detrex-detr": DETREX_DETR,
    "detrex-conditional-detr": DETREX_CONDITIONAL_DETR,
    f"{TRANSFORMERS}detr": TRANSFORMERS_DETR,
    f"{TRANSFORMERS}detr-resnet": TRANSFORMERS_DETR_RESNET,
    f"{TRANSFORMERS}conditional-detr": TRANSFORMERS_CONDITIONAL_DETR,
    f"{TRANSFORMERS}conditional-detr-resnet": TRANSFORMERS_CONDITIONAL_DETR_RESNET,
    OURS: NameTable(source="this library", rules=tuple((name, name) for name in _COMPONENTS)),
}
"""Name of a layout -> its table. Foreign ones come first: of a file that holds a backbone alone,
nobody could say whose it is."""


class ConversionError(ValueError):
    """Tensors that have no place in a layout."""

    def __init__(self, message: str, names: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.names = tuple(names)


def recognize(names: Iterable[str]) -> str | None:
    """The layout that has a place for each of these names; None where there is none."""
    names = list(names)
    return next((layout for layout, table in LAYOUTS.items() if table.covers(names)), None)


def closest_layout(names: Iterable[str]) -> tuple[str, list[str]]:
    """The layout that has a place for most of these names, and the names without one.

    Raises:
        ConversionError: no layout knows any of the names.
    """
    names = list(names)
    unknown = {layout: table.unknown(names) for layout, table in LAYOUTS.items()}
    layout = min(unknown, key=lambda x: len(unknown[x]))
    if len(unknown[layout]) == len(names):
        raise ConversionError(
            f"no known layout has names like {_some(names) or 'those of an empty file'}; known are "
            f"{', '.join(LAYOUTS)}",
            names,
        )
    return layout, unknown[layout]


def convert(
    state: Mapping[str, Tensor], target: str, *, partial: bool = False
) -> tuple[dict[str, Tensor], str, list[str]]:
    """Renames a detector's weights from the layout they are found to be in to another.

    Args:
        state: parameter name -> tensor.
        target: a key of `LAYOUTS`.
        partial: leave out what has no place in either layout instead of refusing. What a layout
            can do without (`ours_only`) is left out in any case.

    Returns:
        The renamed weights, the layout that `state` is in, and what was left out, sorted.

    Raises:
        ConversionError: the layout of `state` is unknown; names have no place; or a part of a
            matrix is missing. The message names them and the way out.
        ValueError: `target` is no layout.
    """
    if target not in LAYOUTS:
        raise ValueError(f"no layout {target!r}; choose one of {', '.join(LAYOUTS)}")
    source, unknown = closest_layout(state)
    if unknown and not partial:
        raise _no_place(unknown, len(state), source)
    known = {name: value for name, value in state.items() if name not in set(unknown)}
    try:
        ours = LAYOUTS[source].to_ours(known)
    except KeyError as error:  # a part of a packed matrix
        raise ConversionError(f"incomplete: {error.args[0]}") from error
    dispensable = set(LAYOUTS[target].ours_only)
    unnamed = LAYOUTS[target].unnamed(ours)
    wrong = [name for name in unnamed if name not in dispensable]
    if len(unnamed) == len(ours) or (wrong and not partial):
        raise _no_place(wrong, len(ours), target)
    kept = {name: value for name, value in ours.items() if name not in set(unnamed)}
    return LAYOUTS[target].to_theirs(kept), source, sorted((*unknown, *unnamed))


def _no_place(names: list[str], total: int, layout: str) -> ConversionError:
    return ConversionError(
        f"{len(names)} of {total} tensors have no place in the layout {layout!r} "
        f"({LAYOUTS[layout].source}): {_some(names)}",
        names,
    )


def _some(names: list[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
