"""Reading weights files without running anything that is in them.

Checkpoints of PyTorch and `.pkl` files are pickles, and a pickle can call any function. What is
read here may build tensors, NumPy arrays and plain containers, nothing else; a file that asks for
more is refused before it does anything.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

# How NumPy builds an array and a number from bytes. It has moved these functions; asking it finds
# them in every version.
_NEW_ARRAY, _NEW_NUMBER = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]
# What authors leave in their files beside tensors: their command line, with paths in it, and
# figures of NumPy's.
ALLOWED: list[Any] = [
    *(argparse.Namespace, PosixPath),
    *(np.ndarray, np.dtype, _NEW_ARRAY, _NEW_NUMBER),
    *(type(np.dtype(x)) for x in ("f4", "f8", "i4", "i8", "?")),
]
if hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):  # torch 2.6 knows aliases
    ALLOWED += [
        (function, f"numpy.{core}.multiarray.{function.__name__}")
        for function in (_NEW_ARRAY, _NEW_NUMBER)
        for core in ("core", "_core")
    ]
# Entries under which weights stand, ours and Detectron2's first.
WEIGHTS_KEYS = ("model", "model_state", "state_dict")
# Entries beside the weights that this library writes for whoever loads them.
BESIDE_KEYS = ("class_names", "settings")

_ZIP, _LFS = b"PK\x03\x04", b"version https://git-lfs"
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")


class UnreadableError(ValueError):
    """A file holds no weights, or more than weights; the message names it and the way out."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"cannot read weights {path}: {reason}")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A weights file as Detectron2's checkpointer wants it.

    Formats: `.pth` and its like in both of PyTorch's, `.safetensors`, Detectron2's and Detectron's
    `.pkl`, pycls' `.pyth`.

    Returns:
        "model" (name -> tensor), what else the file holds, and "matching_heuristics" where
        Detectron2 has to find out which names belong together.

    Raises:
        UnreadableError: the file is damaged, no weights file, or holds code.
        OSError: it cannot be opened.
    """
    path = Path(path)
    with open(path, "rb") as file:
        head = file.read(1024)
    _refuse_other_files(path, head)
    if _is_safetensors(path, head):
        loaded: Any = _read_safetensors(path)
    elif path.suffix == ".pkl" and not head.startswith(_ZIP):
        loaded = _read_pickle(path)
    else:
        loaded = _read_torch(path)
    loaded = _with_weights(path, loaded)
    if path.suffix == ".pyth":
        loaded |= {"__author__": "pycls", "matching_heuristics": True}
        loaded["model"] = {
            k: v for k, v in loaded["model"].items() if not k.endswith("num_batches_tracked")
        }
    if "class_names" not in loaded and (names := _names_within(loaded) or _names_beside(path)):
        loaded["class_names"] = names
    return loaded


def _refuse_other_files(path: Path, head: bytes) -> None:
    """Raises UnreadableError for what is often found under a weights file's name."""
    start = head.lstrip()[:200].lower()
    if not head:
        raise UnreadableError(path, "it is empty; download it again")
    if head.startswith(_LFS):
        raise UnreadableError(
            path, "it is a pointer of Git LFS, not the file: run `git lfs pull` in its repository"
        )
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UnreadableError(
            path, "it is a web page, not weights: download the file behind it (on GitHub, 'Raw')"
        )


def _is_safetensors(path: Path, head: bytes) -> bool:
    # The length of a header in JSON stands in front of it.
    return path.suffix == ".safetensors" or (
        head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size
    )


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            # `tools/convert_checkpoint.py` leaves what stands beside weights as JSON.
            metadata = file.metadata() or {}
            beside = {key: json.loads(metadata[key]) for key in BESIDE_KEYS if key in metadata}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise UnreadableError(
            path, f"it is damaged or no safetensors file ({error}); download it again"
        ) from error
    return beside | {"model": weights}


def _read_torch(path: Path) -> Any:
    # Before version 2.5 nothing can be allowed beside tensors.
    allow = getattr(torch.serialization, "safe_globals", lambda _: contextlib.nullcontext())
    try:
        with allow(ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # PyTorch raises a dozen kinds
        raise UnreadableError(path, _why_unreadable(path, error)) from error


def _why_unreadable(path: Path, error: Exception) -> str:
    if refused := _REFUSED.search(str(error)):
        return _refusal(refused[1])
    with open(path, "rb") as file:
        is_zip = file.read(4) == _ZIP
    if is_zip and not zipfile.is_zipfile(path):
        return f"it is cut off after {path.stat().st_size} bytes; download it again"
    if is_zip and not any(x.endswith("data.pkl") for x in zipfile.ZipFile(path).namelist()):
        return "it is a zip archive without weights; unpack it and name the file inside"
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    # Of a file that is no pickle at all, PyTorch only says how to load it without protection.
    detail = "" if "weights_only" in first else f" ({first[:200]})"
    return f"it is damaged or no weights file{detail}; download it again"


def _refusal(name: str) -> str:
    return (
        f"it holds more than weights: it calls for {name}, which could run any code. It was not "
        "loaded, and nothing in it was run. Take a .safetensors file of the same weights; or, "
        "if you trust its authors, load it once in a sandbox with torch.load(..., "
        'weights_only=False) and save only the tensors: torch.save({"model": state_dict}, ...)'
    )


# Detectron2's pickles.


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 3 spells the bytes in a pickle of Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding!r}")
    return text.encode("latin1")


_PICKLE_GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _NEW_ARRAY,
    ("numpy.core.multiarray", "scalar"): _NEW_NUMBER,
    ("numpy.core.numeric", "_frombuffer"): np.zeros(1).__reduce_ex__(5)[0],
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _latin1,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Builds NumPy arrays and plain containers only."""

    def find_class(self, module: str, name: str) -> Any:
        known = _PICKLE_GLOBALS.get((module.replace("numpy._core", "numpy.core"), name))
        if known is None:
            raise _ForbiddenError(f"{module}.{name}")
        return known


class _ForbiddenError(Exception):
    """A pickle asks for something that is not allowed."""


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            data = _ArrayUnpickler(file, encoding="latin1").load()
    except _ForbiddenError as error:
        raise UnreadableError(path, _refusal(str(error))) from error
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        size = path.stat().st_size
        raise UnreadableError(
            path, f"its {size} bytes are cut off, damaged or no pickle ({error}); download it again"
        ) from error
    if not isinstance(data, dict):
        raise UnreadableError(path, f"it holds a {type(data).__name__}, not weights by name")
    if "model" in data and "__author__" in data:
        return data
    # Detectron's own files; its detectors have "blobs", its ImageNet weights do not.
    blobs = data.get("blobs", data)
    weights = {k: v for k, v in blobs.items() if not k.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


# What is in the file.


def _with_weights(path: Path, loaded: Any) -> dict[str, Any]:
    """Puts the weights under "model", without the prefix of distributed training."""
    if not isinstance(loaded, Mapping):
        raise UnreadableError(path, f"it holds a {type(loaded).__name__}, not weights by name")
    key = next((k for k in WEIGHTS_KEYS if isinstance(loaded.get(k), Mapping)), None)
    weights = dict(loaded if key is None else loaded[key])
    strange = [k for k, v in weights.items() if not _is_weight(v)]
    if strange or not weights:
        entries = ", ".join(str(k) for k in list(weights)[:8])
        raise UnreadableError(
            path,
            f"no tensors by name under {', '.join(WEIGHTS_KEYS)} nor on top; it has: "
            f"{entries or 'nothing'}",
        )
    if all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    weights = {k: torch.as_tensor(v) for k, v in weights.items()}
    rest = {} if key is None else {k: v for k, v in loaded.items() if k != key}
    return rest | {"model": weights}


def _is_weight(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "fiub"
    )


def _names_within(loaded: Mapping[str, Any]) -> list[str]:
    """Class names as the versions of MMDetection keep them beside weights; empty without."""
    meta = loaded.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    data = meta.get("dataset_meta")
    places = (meta, data if isinstance(data, Mapping) else {})
    found = (x.get(key) for x in places for key in ("CLASSES", "classes"))
    names = next((x for x in found if isinstance(x, list | tuple) and x), ())
    return list(names) if all(isinstance(x, str) for x in names) else []


def _names_beside(path: Path) -> list[str]:
    """Class names of a `config.json` as Hugging Face keeps it beside weights; empty without."""
    try:
        labels = json.loads((path.parent / "config.json").read_text("utf-8"))["id2label"]
        names = [str(labels[str(i)]) for i in range(len(labels))]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    # What stands there as long as nobody names them.
    return [] if all(re.fullmatch(r"LABEL_\d+", x) for x in names) else names
