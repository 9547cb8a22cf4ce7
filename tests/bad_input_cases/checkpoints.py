"""Malformed weights files: damaged, of other content or models, or with executable code."""

from __future__ import annotations

import functools
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from asag.checkpoint.checkpointer import AtomicCheckpointer

from .common import Case, expect

FILE = "model.pth"
READ = "cannot read weights"


class Runs:
    """Content of a malicious file: creates a folder when it is unpickled without restriction."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, ("ran",)


def cases(seed: int) -> list[Case]:
    """Returns all cases; the seed selects the positions of truncation and change."""
    rng = np.random.default_rng(seed)
    return [*_damaged(rng), *_not_weights(rng), *_packages(), *_code(), *_other_contents()]


@functools.cache
def model() -> nn.Module:
    """Builds a model that is small enough to be written dozens of times."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def use(folder: Path, name: str = FILE) -> str:
    """Loads the file as training loads MODEL.WEIGHTS; no code in it may run."""
    try:
        AtomicCheckpointer(model(), str(folder)).load(str(folder / name))
    finally:
        expect(not Path("ran").exists(), "the code in it ran")
    return ""


def _written(content: bytes, name: str = FILE) -> Callable[[Path], str]:
    def run(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return use(folder, name)

    return run


def _saved(content: Any, **options: Any) -> Callable[[Path], str]:
    def run(folder: Path) -> str:
        torch.save(content() if callable(content) else content, folder / FILE, **options)
        return use(folder)

    return run


def _error(
    title: str, name: str, happens: str, run: Callable[[Path], str], says: str, remedy: str
) -> Case:
    return Case("checkpoints", title, name, happens, run, (FILE.split(".")[0], says), remedy)


def _damaged(rng: np.random.Generator) -> Iterator[Case]:
    happens = "names the file; download it again"
    for zipped in (True, False):
        for i, share in enumerate(np.sort(rng.uniform(0.02, 0.98, size=6))):

            def run(folder: Path, z: bool = zipped, s: float = share) -> str:
                state = {"model": model().state_dict()}
                torch.save(state, folder / FILE, _use_new_zipfile_serialization=z)
                content = (folder / FILE).read_bytes()
                (folder / FILE).write_bytes(content[: int(len(content) * s)])
                return use(folder)

            name = f"{'new' if zipped else 'old'} format, place {i}, after {share:.0%}"
            yield _error("cut off", name, happens, run, READ, "download it again")
    for name, says in (("model.pkl", "cut off"), ("model.safetensors", "damaged")):

        def run(folder: Path, n: str = name) -> str:
            content = pickle.dumps({"model": {"0.weight": np.zeros(9)}, "__author__": "me"})
            if n.endswith("safetensors"):
                header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}})
                content = len(header).to_bytes(8, "little") + header.encode() + bytes(16)
            (folder / n).write_bytes(content[:-10])
            return use(folder, n)

        yield _error("cut off", name, happens, run, says, "download it again")


def _not_weights(rng: np.random.Generator) -> Iterator[Case]:
    happens = "says what it is and where to get the weights"
    page = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
    for name, content, says, remedy in (
        ("empty", b"", "it is empty", "download it again"),
        ("web page", page, "it is a web page", "download the file behind it"),
        ("web page after blanks", b"\n\n " + page, "it is a web page", "download the file"),
        (
            "XML",
            b"<?xml version='1.0'?><Error>AccessDenied</Error>",
            "it is a web page",
            "download",
        ),
        ("LFS pointer", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS", "git lfs pull"),
        ("garbage", rng.bytes(2000), READ, "download it again"),
        ("text", b"see README for the weights\n", READ, "download it again"),
        ("JSON", b'{"model": {}}', READ, "download it again"),
        ("zip mark and garbage", b"PK\x03\x04" + rng.bytes(500), READ, "download it again"),
    ):
        yield _error("no weights file", name, happens, _written(content), says, remedy)

    def absent(folder: Path) -> str:
        return use(folder)

    def is_folder(folder: Path) -> str:
        (folder / FILE).mkdir()
        return use(folder)

    happens = "names the file"
    for name, run in (("absent", absent), ("a folder", is_folder)):
        yield _error("no weights file", name, happens, run, FILE, "MODEL.WEIGHTS")


def _packages() -> Iterator[Case]:
    """Addresses of files in Python packages; yacs is one that is there."""
    for name, address, says, remedy in (
        ("not installed", "no-such-package/a.pth", "is not installed", "pip install no-such"),
        ("no such file", "yacs/no/such.pth", "no file no/such.pth", "weights in it: none"),
        ("no path", "yacs", "package://yacs", "write package://PACKAGE/PATH"),
    ):

        def run(folder: Path, address: str = address) -> str:
            AtomicCheckpointer(model(), str(folder)).load(f"package://{address}")
            return ""

        happens = "names the package and what is needed"
        says = (address.partition("/")[0], says)
        yield Case("checkpoints", "file of a package", name, happens, run, says, remedy)


def _code() -> Iterator[Case]:
    happens = "refused and not run; take a .safetensors file"
    said = "could run any code"
    remedy = "Take a .safetensors file"
    weights = {"model": {"0.weight": torch.zeros(3)}, "extra": Runs()}
    for name, options in (("new format", {}), ("old format", {"old": True})):
        legacy = {"_use_new_zipfile_serialization": not options.get("old", False)}
        run = _saved(weights, **legacy)
        yield _error("code in the pickle", name, happens, run, said, remedy)
    content = pickle.dumps({"model": {"a": np.zeros(2)}, "__author__": Runs()})
    run = _written(content, "model.pkl")
    yield _error("code in the pickle", ".pkl", happens, run, said, remedy)
    run = _written(pickle.dumps(Runs()), "model.pkl")
    yield _error("code in the pickle", "nothing else", happens, run, said, remedy)


def _other_contents() -> Iterator[Case]:
    happens = "lists what the file holds"
    for name, content, says in (
        ("a list", [torch.zeros(2)], "it holds a list"),
        ("a tensor", torch.zeros(3), "it holds a Tensor"),
        ("a number", 3, "it holds a int"),
        ("an empty object", {}, "it has: nothing"),
        ("an empty model", {"model": {}}, "it has: nothing"),
        ("an optimizer", {"state": {}, "param_groups": []}, "it has: state, param_groups"),
        ("text in the model", {"model": {"a": "b"}}, "it has: a"),
        ("a model in a model", {"model": {"model": {"a": torch.zeros(1)}}}, "it has: model"),
    ):
        remedy = "weights by name" if "holds" in says else "tensors by name under"
        yield _error("other contents", name, happens, _saved(content), says, remedy)

    happens, said = "names what it holds and what the model has", "Take the configuration"
    for name, other in (
        ("another model", lambda: {"model": nn.LSTM(2, 3).state_dict()}),
        ("names of another model", lambda: {"model": _renamed("stage.")}),
    ):
        yield _error("another model", name, happens, _saved(other), FILE, said)
    run = _saved(lambda: {"model": {k: torch.zeros(7) for k in model().state_dict()}})
    yield _error("another model", "all shapes differ", happens, run, FILE, said)

    def half() -> dict[str, Any]:
        state = model().state_dict()
        return {"model": {name: state[name] for name in list(state)[:2]}}

    happens = "what fits is loaded, and the log lists the rest"
    yield Case("checkpoints", "part of the model", "first layer", happens, _saved(half))
    wrapped = _saved(lambda: {"state_dict": _renamed("module.")})
    happens = "the prefix is dropped"
    yield Case("checkpoints", "names of distributed training", "module.", happens, wrapped)


def _renamed(prefix: str) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in model().state_dict().items()}
