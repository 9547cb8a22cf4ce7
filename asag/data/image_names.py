"""Finding the image files of a split, also where names almost fit.

Annotations travel between machines: names come with backslashes, percent-encoding, other letter
case, another Unicode form, the folders of another machine or the address of a server. Such a name
is accepted if exactly one file fits it.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from PIL import Image

SPLIT_WORDS = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_ALL_SPLIT_WORDS = {word for words in SPLIT_WORDS.values() for word in words}
_SAMPLE = 50  # names that are looked up to choose a folder
_MAX_NEAREST = 5000  # names among which the nearest is looked for
_ADDRESS = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+:(?://[^/?#]*)?")
_DRIVE = re.compile(r"^[A-Za-z]:(?=[/\\])")
_LOCAL_FILES = re.compile(r"/data/local-files/?\?d=([^&]+)")  # Label Studio
_NO_IMAGES = {
    "MPEG",
    "HDF5",
    "GRIB",
    "BUFR",
    "WMF",
    "EPS",
    "PDF",
}  # known to Pillow, not read by it
_SERVER, _MACHINE = "the address of a server", "the folder of another machine"
_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
_TIFF = (".tif", ".tiff")


@dataclass(frozen=True)
class ImageFiles:
    """The files of a list of image names.

    Attributes:
        root: folder that the names are relative to.
        paths: one a name; "" where no file fits.
        notes: sentences about names that fit a file in another form only.
        hint: about the first name without a file: the nearest one, or the several that fit.
    """

    root: Path
    paths: list[str]
    notes: tuple[str, ...]
    hint: str


def find_images(roots: Sequence[Path], names: Sequence[str]) -> ImageFiles:
    """Find the files of image names in the folder that holds most of them.

    Args:
        roots: folders that the names may be relative to, likeliest first.
        names: as the annotations write them.
    """
    root = _best_root(roots, names)
    exact = present_files(root, names)
    paths = [os.path.join(root, x) if ok else "" for x, ok in zip(names, exact, strict=True)]
    if all(exact):
        return ImageFiles(root, paths, (), "")
    index = FileIndex(root)
    missing = [row for row, ok in enumerate(exact) if not ok]
    found = {row: index.find(names[row]) for row in missing}
    # A file that two names would share was surely meant by one of them only.
    uses = Counter(os.path.normpath(x) for x in {*paths} if x)
    uses.update(_distinct_uses(root, names, found))
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row, relative in found.items():
        path = os.path.join(root, relative) if relative else ""
        if path and uses[os.path.normpath(path)] == 1:
            paths[row] = path
            groups[_difference(names[row], relative)].append((names[row], relative))
    notes = tuple(_note(kind, pairs) for kind, pairs in groups.items())
    first = next((names[row] for row in missing if not paths[row]), None)
    return ImageFiles(root, paths, notes, "" if first is None else index.describe(first))


def present_files(root: Path, names: Sequence[str]) -> list[bool]:
    """Returns True for every name that is a file; broken links and folders are none.

    Each folder is listed once, which is fast on network storage as well.
    """
    rows_of_folder: dict[str, list[int]] = defaultdict(list)
    for row, name in enumerate(names):
        rows_of_folder[os.path.dirname(name)].append(row)
    present = [False] * len(names)
    for folder, rows in rows_of_folder.items():
        files = _files_in(os.path.join(root, folder))
        for row in rows:
            present[row] = os.path.basename(names[row]) in files
    return present


def printable(name: str) -> str:
    """The name as any terminal and file can take it: JSON can hold half a character."""
    return name.encode("utf-8", "backslashreplace").decode()


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Suffixes, in lower case, of the image files that Pillow can read."""
    Image.init()
    kinds = Image.OPEN.keys() - _NO_IMAGES
    return frozenset(suffix for suffix, kind in Image.EXTENSION.items() if kind in kinds)


def walk(root: Path, max_depth: int = 100) -> Iterator[tuple[str, list[str]]]:
    """Every folder below a root, relative to it, with its files.

    Linked folders are followed, each folder once. Hidden folders and those that archives from a
    Mac bring along are left out.

    Args:
        root: starting folder, itself included.
        max_depth: folders below it that are entered at most, one inside the other.
    """
    seen = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:
            subfolders.clear()
            continue
        seen.add(place)
        subfolders[:] = sorted(x for x in subfolders if x[0] != "." and x != "__MACOSX")
        relative = os.path.relpath(folder, root)
        relative = "" if relative == "." else relative
        if relative and relative.count(os.sep) + 1 >= max_depth:
            subfolders.clear()
        yield relative, sorted(x for x in files if x[:2] != "._")


def split_word(folder: str) -> str | None:
    """The split that a folder is named for ("train2017" is "train"), or None."""
    word = re.sub(r"[\d_-]+$", "", folder.casefold())
    return next((split for split, words in SPLIT_WORDS.items() if word in words), None)


@dataclass
class FileIndex:
    """All files below a folder, found by names that fit in another form."""

    root: Path
    _by_name: dict[str, list[str]] = field(init=False)
    _by_stem: dict[str, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self._by_name, self._by_stem = defaultdict(list), defaultdict(list)
        suffixes = image_suffixes()
        for folder, files in walk(self.root):
            for file in files:
                stem, suffix = os.path.splitext(_form(file))
                path = os.path.join(folder, file)
                if not os.path.isfile(os.path.join(self.root, path)):  # a broken link
                    continue
                self._by_name[stem + suffix].append(path)
                if suffix in suffixes:
                    self._by_stem[stem].append(path)

    def find(self, name: str) -> str | None:
        """The only file that fits best, relative to the root; None if there is none or several."""
        candidates = self.candidates(name)
        return candidates[0] if len(candidates) == 1 else None

    def candidates(self, name: str) -> list[str]:
        """The files that fit equally well: those that share most folders with the name."""
        for parts in _readings(name):
            fitting = [x for x in self._fitting(parts[-1]) if not _of_another_split(x, parts)]
            if fitting:
                scores = [_score(x.split(os.sep), parts) for x in fitting]
                best = max(scores)
                return [x for x, score in zip(fitting, scores, strict=True) if score == best]
        return []

    def _fitting(self, base: str) -> list[str]:
        form = _form(base)
        if form in self._by_name:
            return self._by_name[form]
        stem, suffix = os.path.splitext(form)
        for family in (_JPEG, _TIFF):
            if suffix in family:
                others = self._by_stem.get(stem, [])
                return [x for x in others if os.path.splitext(_form(x))[1] in family]
        known = suffix in image_suffixes()
        return [] if known else self._by_stem.get(form, [])

    def describe(self, name: str) -> str:
        """Says why a name has no file, with the nearest one there is."""
        with contextlib.suppress(OSError, ValueError):  # no link, or a name no file can have
            return f"it links to {printable(os.readlink(self.root / name))}, which is not there"
        several = self.candidates(name)
        if len(several) > 1:
            return f"several files fit: {', '.join(printable(x) for x in several[:3])}"
        if several:
            return f"{printable(several[0])} would fit several names"
        if not self._by_name:
            return "the folder holds no files"
        names = list(self._by_name)[:_MAX_NEAREST]
        base = _readings(name)[0][-1] if _readings(name) else name
        near = difflib.get_close_matches(_form(base)[:200], names, n=1, cutoff=0.5)
        if near:
            return f"the nearest name there is {printable(self._by_name[near[0]][0])!r}"
        return f"files there are named like {printable(next(iter(self._by_name.values()))[0])!r}"


def _best_root(roots: Sequence[Path], names: Sequence[str]) -> Path:
    """The root that holds most of a sample of names; by other forms only if no root holds half."""
    sample = names[:: max(1, len(names) // _SAMPLE)]
    counts = [sum(present_files(root, sample)) for root in roots]
    best = max(counts)
    if 2 * best >= len(sample) or len(roots) == 1:
        return roots[counts.index(best)]
    indexes = [FileIndex(root) for root in roots]
    counts = [sum(index.find(name) is not None for name in sample) for index in indexes]
    return roots[counts.index(max(counts))]


def _files_in(folder: str) -> set[str]:
    try:
        with os.scandir(folder or ".") as entries:
            return {entry.name for entry in entries if _is_file(entry)}
    except (OSError, ValueError):  # ValueError: a name that no folder can have
        return set()


def _is_file(entry: os.DirEntry) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a loop of links
        return False


def _distinct_uses(
    root: Path, names: Sequence[str], found: dict[int, str | None]
) -> dict[str, int]:
    """Number of different names that want a file, by path."""
    wanting: dict[str, set[str]] = defaultdict(set)
    for row, relative in found.items():
        if relative:
            wanting[os.path.normpath(os.path.join(root, relative))].add(names[row])
    return {path: len(different) for path, different in wanting.items()}


def _form(name: str) -> str:
    """The form in which letter case and Unicode form do not count."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    return unicodedata.normalize("NFKC", folded).strip()


def _readings(name: str) -> list[list[str]]:
    """The parts of the path that a name may mean, likeliest first."""
    local = _LOCAL_FILES.search(name)
    address = _ADDRESS.match(name) if "://" in name or name.startswith("file:") else None
    if local:
        name = local[1]
    elif address:
        name = re.sub(r"[?#].*$", "", name[address.end() :])
    name = _DRIVE.sub("", name)
    decoded = unquote(name)
    texts = (name, decoded, unquote(decoded), unquote(name.replace("+", " ")))
    readings = []
    for text in dict.fromkeys(texts):
        parts = [x for x in re.split(r"[/\\]", text) if x not in ("", ".", "..")]
        if parts:
            readings.append(parts)
    return readings


def _of_another_split(path: str, parts: Sequence[str]) -> bool:
    """Returns True for a file in the folder of a split that the name does not mention.

    An image of the same name there is another image.
    """
    named = {split_word(part) for part in parts[:-1]}
    folders = PurePosixPath(path).parts[:-1]
    return any(split_word(x) not in {None, *named} for x in folders)


def _score(path: Sequence[str], parts: Sequence[str]) -> tuple[int, int]:
    """Number of last parts that two paths share, in form and exactly."""
    return (
        _common_end([_form(x) for x in path], [_form(x) for x in parts]),
        _common_end(path, parts),
    )


def _common_end(a: Sequence[str], b: Sequence[str]) -> int:
    count = 0
    for x, y in zip(reversed(a), reversed(b), strict=False):
        if x != y:
            break
        count += 1
    return count


def _difference(name: str, path: str) -> str:
    """The kinds of difference between a name and the file that it was matched to."""
    kinds = []
    if "://" in name or name.startswith("file:") or _LOCAL_FILES.search(name):
        kinds.append(_SERVER)
    elif name.startswith("/") or _DRIVE.match(name):
        kinds.append(_MACHINE)
    if "\\" in name and "\\" not in path:
        kinds.append("backslashes")
    readings = _readings(name)
    fitting = [r for r in readings if _form(r[-1]) == _form(os.path.basename(path))]
    parts = fitting[0] if fitting else readings[0]
    if parts != readings[0]:
        kinds.append("percent-encoding")
    base, file = parts[-1], os.path.basename(path)
    if base != file:
        nfc = [unicodedata.normalize("NFC", x) for x in (base, file)]
        if nfc[0] == nfc[1]:
            kinds.append("the Unicode form")
        elif _form(base) == _form(file):
            kinds.append("letter case")
        else:
            kinds.append("the suffix")
    elsewhere = bool(kinds) and kinds[0] in (_SERVER, _MACHINE)
    folders = [_form(x) for x in path.split(os.sep)[:-1]]
    if not elsewhere and folders != [_form(x) for x in parts[:-1]]:
        kinds.append("the folder")
    return " and ".join(dict.fromkeys(kinds)) or "the form of the path"


def _note(kind: str, pairs: Sequence[tuple[str, str]]) -> str:
    name, path = pairs[0]
    show = ascii if "Unicode" in kind else repr
    return (
        f"{len(pairs)} image name(s) fit exactly one file but for {kind} "
        f"({show(printable(name))} is {show(printable(path))})"
    )
