"""Malformed odgt files of CrowdHuman."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from asag.data.crowdhuman import load_crowdhuman

from .common import Case, expect

FILE = "annotation_train.odgt"
LINES = 3
REMEDY = "fix or remove the line"


def cases(seed: int) -> list[Case]:
    """Returns all cases; the seed selects the broken line and the position of truncation."""
    rng = np.random.default_rng(seed)
    return [*_lines(rng), *_boxes(rng), *_files(), *_images()]


def record(number: int) -> dict[str, Any]:
    """Returns a valid line: a person, and a region to ignore."""
    return {
        "ID": f"image,{number}",
        "gtboxes": [
            {"tag": "person", "fbox": [-3, 4, 20, 30], "extra": {"ignore": 0}},
            {"tag": "mask", "fbox": [10, 4, 20, 30], "extra": {"ignore": 1}},
        ],
    }


def use(folder: Path, lines: list[bytes], image: bytes | None = None) -> str:
    """Loads a file of these lines, with valid images unless the last one is given."""
    (folder / FILE).write_bytes(b"\n".join(lines))
    for number in range(LINES):
        Image.new("RGB", (40, 30)).save(folder / f"image,{number}.jpg")
    if image is not None:
        (folder / f"image,{LINES - 1}.jpg").write_bytes(image)
    found = load_crowdhuman(folder / FILE, folder)
    boxes = sum(len(image["annotations"]) for image in found)
    said = sum(len(json.loads(line)["gtboxes"]) for line in lines if line.strip())
    expect(boxes == said, f"{boxes} of {said} boxes are left")
    return ""


def _broken(title: str, name: str, happens: str, row: int, line: bytes, *says: str) -> Case:
    def run(folder: Path) -> str:
        lines = [json.dumps(record(number)).encode() for number in range(LINES)]
        lines[row] = line
        return use(folder, lines)

    return Case("CrowdHuman", title, name, happens, run, (f"{FILE}:{row + 1}", *says), REMEDY)


def _lines(rng: np.random.Generator) -> Iterator[Case]:
    happens = "names the line; fix or remove it"
    text = json.dumps(record(1)).encode()
    for i, share in enumerate(np.sort(rng.uniform(0.05, 0.95, size=5))):
        row, content = int(rng.integers(LINES)), text[: int(len(text) * share)]
        yield _broken(
            "line cut off", f"place {i}, after {share:.0%}", happens, row, content, "not JSON"
        )
    for name, content, says in (
        ("two objects", text + text, "not JSON"),
        ("web page", b"<!DOCTYPE html>", "not JSON"),
        ("no text", b"\xff\xfe\xfd{", "not text"),
        ("100000 brackets", b"[" * 100_000, "not JSON"),
        ("a number of 5000 digits", b'{"ID": ' + b"9" * 5000 + b"}", "not JSON"),
        ("list", b"[1, 2]", "a JSON list, expected an object"),
        ("text", b'"ID"', "a JSON str, expected an object"),
    ):
        row = int(rng.integers(LINES))
        yield _broken("line that is no object", name, happens, row, content, says)
    for key in ("ID", "gtboxes"):
        values = {"null": None, "number": 5, "object": {}} | ({"empty": ""} if key == "ID" else {})
        for name, value in values.items():
            row = int(rng.integers(LINES))
            content = json.dumps(record(row) | {key: value}).encode()
            yield _broken("wrong ID or boxes", f"{key}: {name}", happens, row, content, f"`{key}`")
        row = int(rng.integers(LINES))
        content = json.dumps({k: v for k, v in record(row).items() if k != key}).encode()
        yield _broken("wrong ID or boxes", f"no {key}", happens, row, content, f"`{key}`")
    twice = json.dumps(record(0)).encode()
    says = "ID 'image,0' is already on line 1"
    yield _broken("ID twice", "on lines 1 and 3", "names both lines", 2, twice, says)


def _boxes(rng: np.random.Generator) -> Iterator[Case]:
    happens = "names line, image and value"
    nan, inf = float("nan"), float("inf")
    values: dict[str, Any] = {
        "NaN": [nan, 4, 20, 30],
        "infinite": [1, 4, inf, 30],
        "three numbers": [1, 2, 3],
        "text": "1 2 3 4",
        "numbers as text": ["1", "2", "3", "4"],
        "null": None,
        "huge": [10**399, 2, 3, 4],
    }
    for name, value in values.items():
        row = int(rng.integers(LINES))
        content = record(row)
        content["gtboxes"][0]["fbox"] = value
        line, says = json.dumps(content).encode(), (f"image,{row}", "`fbox` is")
        yield _broken("box that is not four finite numbers", name, happens, row, line, *says)
    for name, box, says in (
        ("null", None, "entry None"),
        ("list", [1, 2, 3, 4], "entry [1, 2, 3, 4]"),
        ("extra is a list", {"tag": "person", "fbox": [1, 2, 3, 4], "extra": []}, "`extra` is []"),
        ("no fbox", {"tag": "person"}, "`fbox` is None"),
    ):
        row = int(rng.integers(LINES))
        content = record(row)
        content["gtboxes"].append(box)
        line = json.dumps(content).encode()
        yield _broken("entry that is no box", name, happens, row, line, f"image,{row}", says)

    def flat(folder: Path) -> str:
        content = record(0)
        content["gtboxes"][0]["fbox"] = [1, 2, 0, -5]
        return use(folder, [json.dumps(content).encode()])

    happens = "kept for the evaluation as the benchmark does, and logged"
    yield Case("CrowdHuman", "box without a size", "0 x -5", happens, flat)


def _files() -> Iterator[Case]:
    def absent(folder: Path) -> str:
        load_crowdhuman(folder / FILE, folder)
        return ""

    def empty(folder: Path) -> str:
        return use(folder, [b"", b"  "])

    def blanks(folder: Path) -> str:
        return use(folder, [b"", json.dumps(record(0)).encode(), b" \t", b""])

    says = (FILE, "cannot be read")
    happens = "names the file"
    yield Case("CrowdHuman", "no file", "odgt", happens, absent, says, "DETECTRON2_DATASETS")
    says = (FILE, "is empty")
    yield Case("CrowdHuman", "empty file", "odgt", happens, empty, says, "download it")
    yield Case("CrowdHuman", "blank lines", "odgt", "skipped", blanks)


def _images() -> Iterator[Case]:
    happens = "names the image; replace it or unpack all archives"
    lines = [json.dumps(record(number)).encode() for number in range(LINES)]
    named = f"image,{LINES - 1}.jpg"
    contents = {"empty": b"", "web page": b"<html>", "garbage": b"\xff\xd8\xff\xe0"}
    for name, content in contents.items():

        def run(folder: Path, c: bytes = content) -> str:
            return use(folder, lines, c)

        yield Case("CrowdHuman", "not an image", name, happens, run, (named,), "replace it")

    def missing(folder: Path) -> str:
        content = record(0) | {"ID": "gone"}
        return use(folder, [*lines, json.dumps(content).encode()])

    yield Case("CrowdHuman", "no image", "one", happens, missing, ("gone.jpg",), "unpack all")

    def none_there(folder: Path) -> str:
        (folder / FILE).write_bytes(b"\n".join(lines))
        load_crowdhuman(folder / FILE, folder / "Images")
        return ""

    says = ("Images", "none of the 3 images")
    yield Case("CrowdHuman", "no image", "none", happens, none_there, says, "unpack the archives")
    caches = {"garbage": b"\xff\x00", "cut off": b'{"image,0.jpg": [40', "list": b"[]"}
    for name, cache in caches.items():

        def damaged(folder: Path, c: bytes = cache) -> str:
            (folder / "cache").mkdir()
            (folder / "cache" / "annotation_train_image_sizes.json").write_bytes(c)
            return use(folder, lines)

        yield Case("CrowdHuman", "damaged cache of sizes", name, "made anew", damaged)
