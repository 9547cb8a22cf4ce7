#!/usr/bin/env python3
"""Renames a detector's weights from one published layout to another.

    python tools/convert_checkpoint.py model_final.pth model.safetensors --to transformers-detr
    python tools/convert_checkpoint.py pytorch_model.bin detr.pth --to asag
    python tools/convert_checkpoint.py asag_a.pth deployed.pth --to asag --keep-copy 2

Training and prediction read every layout directly (MODEL.WEIGHTS); convert weights for other
programs. The layout of IN is recognized by its tensor names. Values do not change.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asag.checkpoint.asag import keep_copy
from asag.checkpoint.layouts import (
    LAYOUTS,
    OURS,
    TRANSFORMERS,
    ConversionError,
    convert,
)
from asag.checkpoint.reading import read_checkpoint
from asag.files import atomic_writer

import safetensors.torch
import torch
from torch import Tensor

SAFETENSORS, PICKLES = ".safetensors", (".pth", ".pt", ".bin")
LISTED = 20  # at most, in a message


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parse(arguments)
    try:
        check_suffix(args.output)
        loaded = read_checkpoint(args.input)
        state, source, left_out = rename(loaded, args)
        needed = dict(LAYOUTS[source].settings) or loaded.get("settings", {})
        entries = beside(loaded.get("class_names"), needed, args.to)
        notes = write(args.output, state, args.to, entries) + other_arithmetic(needed, args.to)
    except ConversionError as error:
        hint = " --partial leaves them out." if error.names and not args.partial else ""
        print(f"convert_checkpoint: {args.input}: {error}.{hint}", file=sys.stderr)
        return 2
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {len(state)} tensors, {source} -> {args.to}{notes}")
    if left_out:
        more = f", and {len(left_out) - LISTED} more" * (len(left_out) > LISTED)
        print(f"left out: {', '.join(left_out[:LISTED])}{more}")
    return 0


def rename(
    loaded: Mapping[str, Any], args: argparse.Namespace
) -> tuple[dict[str, Tensor], str, list[str]]:
    """Renames the weights.

    Returns:
        The renamed weights, the layout that they had, and the names that were left out.

    Raises:
        ConversionError: see `convert`.
    """
    if args.keep_copy is None:
        return convert(weights(loaded), args.to, partial=args.partial)
    ours, source, left_out = convert(weights(loaded), OURS, partial=args.partial)
    kept = keep_copy(ours, args.keep_copy)
    state, _, unnamed = convert(kept, args.to, partial=args.partial)
    return state, source, sorted((*left_out, *unnamed))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    width = max(map(len, LAYOUTS))
    listing = "\n".join(f"  {name:{width}}  {table.source}" for name, table in LAYOUTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f"layouts:\n{listing}\n\n"
        "Class names are kept where IN, or a config.json beside it, tells them and OUT has a place "
        "for them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", metavar="IN", type=Path, help=".pth, .pt, .bin or .safetensors")
    parser.add_argument(
        "output", metavar="OUT", type=Path, help="likewise; its suffix selects the file format"
    )
    parser.add_argument("--to", required=True, choices=LAYOUTS, metavar="LAYOUT", help="see below")
    parser.add_argument(
        "--partial",
        action="store_true",
        help="leave out tensors that have no place in a layout, and list them",
    )
    parser.add_argument(
        "--keep-copy",
        type=int,
        metavar="K",
        help="of ASAG's parallel decoder heads, keep number K alone, counted from 0, for a model "
        "with MODEL.DECODER.NUM_AUXILIARY 0; most published numbers were taken with 2",
    )
    return parser.parse_args(arguments)


def check_suffix(path: Path) -> None:
    """Raises ValueError unless the suffix names a format that can be written."""
    if path.suffix not in (SAFETENSORS, *PICKLES):
        raise ValueError(
            f"{path}: the suffix {path.suffix!r} names no format; choose one of "
            f"{', '.join((SAFETENSORS, *PICKLES))}"
        )


def weights(loaded: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Returns the weights that evaluation uses: the averaged ones if the checkpoint has them."""
    average = loaded.get("ema")
    averaged = isinstance(average, Mapping) and average.keys() == loaded["model"].keys()
    return average if averaged else loaded["model"]


def beside(
    class_names: Sequence[str] | None, settings: Mapping[str, Any], layout: str
) -> dict[str, Any]:
    """Returns the entries of the file beside the weights.

    Args:
        class_names: of the input.
        settings: configuration values that its weights need, by key; only the layout of this
            library has a place for them.
        layout: of the output.
    """
    found: dict[str, Any] = {"class_names": list(class_names)} if class_names else {}
    return found | ({"settings": dict(settings)} if settings and layout == OURS else {})


def other_arithmetic(settings: Mapping[str, Any], layout: str) -> str:
    """Describes the settings of the weights that models of the layout compute otherwise."""
    theirs = LAYOUTS[layout].settings
    wrong = [f"{k} {v}" for k, v in settings.items() if layout != OURS and theirs.get(k, v) != v]
    if not wrong:
        return ""
    return (
        f"; these weights need {', '.join(wrong)}, but {LAYOUTS[layout].source} computes otherwise"
    )


def write(path: Path, state: Mapping[str, Tensor], layout: str, entries: Mapping[str, Any]) -> str:
    """Writes the file atomically.

    transformers expects pickled weights at the top level of the file, all others in its entry
    "model".

    Args:
        path: its suffix selects the format.
        state: tensors by name.
        layout: of the names.
        entries: see `beside`.

    Returns:
        A note about the class names for the user.
    """
    # Slices of a packed matrix share its memory, and a file would store all of it for each slice.
    state = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in state.items()}
    flat = path.suffix != SAFETENSORS and layout.startswith(TRANSFORMERS)
    with atomic_writer(path, "wb") as file:
        if path.suffix == SAFETENSORS:
            metadata = {key: json.dumps(value) for key, value in entries.items()}
            file.write(safetensors.torch.save(state, {"format": "pt", **metadata}))
        else:
            torch.save(state if flat else {"model": state, **entries}, file)
    if "class_names" not in entries:
        return ""
    kept = "left out: this format has no place for them" if flat else "kept"
    return f"; {len(entries['class_names'])} class names {kept}"


if __name__ == "__main__":
    sys.exit(main())
