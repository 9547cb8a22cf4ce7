"""Weights by address: a file on disk, or one that is downloaded once and kept.

| address | what it is |
|---|---|
| `path/model.pth` | a file |
| `https://host/path/model.pth` | a file of a web server |
| `https://.../model.pth#sha256=<64 hex digits>` | the same, with the sum it must have |
| `hf://owner/name`, `hf://owner/name@revision/file` | a file of a Hugging Face repository |
| `package://name/path/in/it` | a file of an installed Python package |
| `detectron2://...` and other schemes | what Detectron2's `PathManager` makes of them |

Downloads are kept below $FVCORE_CACHE (default `~/.torch/iopath_cache`), by host and path; a file
that is there is never asked for again. What an interrupted download left stays beside it as
`*.part`, and the next one goes on from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from email.message import Message
from glob import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from detectron2.utils.file_io import Detectron2Handler, PathManager
from iopath.common.file_io import file_lock, get_cache_dir
from tqdm import tqdm

from .packages import SCHEME as PACKAGE
from .packages import package_file

ATTEMPTS = 3  # connections in a row that bring nothing new
RETRY_WAIT_S = 1.0  # before the second attempt; doubled from then on
TIMEOUT_S = 30.0
CHUNK = 1 << 20  # bytes
# What a repository without a file name in the address is searched for.
PREFERRED_FILES = ("model.safetensors", "pytorch_model.bin")

# `torch.hub` names files after the first digits of their sum; eight decimal digits are a date.
_HUB_NAME = re.compile(r"-(?!\d{8}\.)([0-9a-f]{8,64})\.\w+$")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HF = re.compile(r"(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<file>.+))?")

logger = logging.getLogger(__name__)


class DownloadError(OSError):
    """A file could not be had from where its address points; the message says what to do."""


class _Interrupted(Exception):
    """The connection broke; what arrived is kept."""


def local_file(address: str) -> str:
    """Path of the file at an address, which is downloaded if it is not there yet.

    Args:
        address: see the head of this module.

    Raises:
        FileNotFoundError: no such file on disk.
        DownloadError: the file cannot be had, or is not the one that its sum promises.
        ValueError: the address is malformed.
    """
    scheme, separator, rest = address.partition("://")
    if scheme == "hf" and separator:
        return str(_from_hugging_face(rest))
    if scheme == PACKAGE and separator:
        return str(package_file(rest))
    if f"{scheme}{separator}" == Detectron2Handler.PREFIX:
        address = Detectron2Handler.S3_DETECTRON2_PREFIX + rest
    if address.startswith(("http://", "https://")):
        return str(download(address))
    path = PathManager.get_local_path(address) if separator else address
    if not os.path.isfile(path):
        hint = "this kind of address is not known" if separator else "check MODEL.WEIGHTS"
        raise FileNotFoundError(f"no weights file {address}: {hint}")
    return path


def download(url: str) -> Path:
    """The file at a URL, from the cache if it is there.

    Its length is checked, and its SHA-256 where it is known: from the URL's fragment, from a file
    name such as `resnet50-0676ba61.pth`, or from the header with which Hugging Face announces it.
    A file that fails is removed.

    Raises:
        DownloadError: see `local_file`.
        ValueError: the URL names no file, or has another fragment than `#sha256=...`.
    """
    url, _, fragment = url.partition("#")
    sums = []
    if fragment:
        kind, _, digest = fragment.lower().partition("=")
        if kind != "sha256" or not _SHA256.fullmatch(digest):
            raise ValueError(f"{url}#{fragment}: only #sha256=<64 hex digits> may follow a URL")
        sums.append(digest)
    target = cached_path(url)
    if found := _HUB_NAME.search(target.name):
        sums.append(found[1])
    with file_lock(str(target)):  # of several processes one downloads
        if target.is_file():
            if not fragment or not _wrong_sum(target, sums):
                return target
            target.unlink()
        logger.info(f"downloading {url} to {target}")
        part, announced = _fetch(url, target)
        if wrong := _wrong_sum(part, sums + announced):
            part.unlink()
            raise DownloadError(
                f"{url} has {wrong}; the file was removed. Try again; if that does not help, "
                "either the file was replaced or the sum in the address is not its own"
            )
        os.replace(part, target)
    return target


def cached_path(url: str) -> Path:
    """Where a download is kept.

    Raises:
        ValueError: the URL ends without a file name.
    """
    parts = urlsplit(url)
    path = [unquote(x) for x in parts.path.split("/") if x not in ("", ".", "..")]
    if not path or parts.path.endswith("/"):
        raise ValueError(f"{url} names no file")
    root = Path(get_cache_dir())
    if not url.startswith(Detectron2Handler.S3_DETECTRON2_PREFIX):  # these share Detectron2's cache
        root /= parts.netloc.replace(":", "_")
    if parts.query:
        path.insert(-1, hashlib.sha256(parts.query.encode()).hexdigest()[:16])
    return root.joinpath(*(x.replace("/", "_") for x in path))


# Hugging Face.


def _from_hugging_face(address: str) -> Path:
    """The file of a repository; what is loaded of its `config.json` (class names) comes along."""
    url = hugging_face_url(address)
    is_new = not cached_path(url.partition("#")[0]).is_file()
    path = download(url)
    if is_new and path.name in PREFERRED_FILES:
        with contextlib.suppress(DownloadError):  # not every repository has one
            download(f"{url.rpartition('/')[0]}/config.json")
    return path


def hugging_face_url(address: str) -> str:
    """URL of a file in a repository.

    Args:
        address: `owner/name[@revision][/file]`, perhaps with `#sha256=...`. Without a file:
            model.safetensors, else pytorch_model.bin, else the only *.pth. $HF_ENDPOINT replaces
            https://huggingface.co.

    Raises:
        DownloadError: the repository cannot be read, or has no such file or several.
        ValueError: malformed.
    """
    address, hash_mark, fragment = address.partition("#")
    found = _HF.fullmatch(address.rstrip("/"))
    if not found:
        raise ValueError(f"hf://{address}: write hf://owner/name, perhaps with @revision or /file")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    revision = found["revision"] or "main"
    base = f"{endpoint}/{found['repo']}/resolve/{revision}/"
    file = found["file"] or _default_file(endpoint, found["repo"], revision, base)
    return base + quote(file) + hash_mark + fragment


def _default_file(endpoint: str, repo: str, revision: str, base: str) -> str:
    for file in PREFERRED_FILES:  # without a network, what was downloaded before is enough
        if cached_path(base + file).is_file():
            return file
    listing = f"{endpoint}/api/models/{repo}/revision/{revision}"
    try:
        with _open(listing, _Redirects()) as reply:
            files = [x["rfilename"] for x in json.load(reply)["siblings"]]
    except (_Interrupted, ValueError, KeyError) as error:
        raise DownloadError(f"cannot list the files of hf://{repo}: {error}") from error
    chosen = [x for x in PREFERRED_FILES if x in files][:1] or _ending(files, ".pth")
    if len(chosen) != 1:
        shown = ", ".join(_ending(files, (".safetensors", ".bin", ".pth", ".pt"))[:10])
        raise DownloadError(
            f"hf://{repo} has neither {' nor '.join(PREFERRED_FILES)}, and {len(chosen)} files "
            f"*.pth; name one of its files, hf://{repo}/FILE. Weights in it: {shown or 'none'}"
        )
    return chosen[0]


def _ending(files: Sequence[str], suffix: str | tuple[str, ...]) -> list[str]:
    return [x for x in files if x.endswith(suffix)]


# The transfer.


@dataclass(frozen=True)
class _Remote:
    """What a server says about a file.

    Attributes:
        version: changes when the file does.
        size: of the whole file in bytes; None if it is not told.
        start: first byte of the reply.
        sha256: list of known sums, of at most one.
    """

    version: str
    size: int | None
    start: int
    sha256: list[str]

    @classmethod
    def read(cls, headers: Message, redirects: Sequence[Message]) -> _Remote:
        length = headers.get("Content-Length")
        size, start = int(length) if length else None, 0
        if found := re.match(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", "")):
            start, size = int(found[1]), int(found[2])
        linked = [x["X-Linked-Etag"] for x in (*redirects, headers) if "X-Linked-Etag" in x]
        sums = [x.strip('"').lower() for x in linked]
        tag = headers.get("ETag") or headers.get("Last-Modified") or ""
        version = hashlib.sha256(f"{sums} {tag} {size}".encode()).hexdigest()[:12]
        return cls(version, size, start, [x for x in sums if _SHA256.fullmatch(x)])


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections and keeps their headers: the sum may stand there."""

    def __init__(self) -> None:
        self.headers: list[Message] = []

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        self.headers.append(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _fetch(url: str, target: Path) -> tuple[Path, list[str]]:
    """Brings the whole file into a part-file beside `target`, over several connections if need be.

    Returns:
        The part-file, and the sums that the server announced.
    """
    failures, arrived = 0, _arrived(target)
    while True:
        try:
            return _transfer(url, target)
        except _Interrupted as error:
            before, arrived = arrived, _arrived(target)
            failures = failures + 1 if arrived <= before else 1
            if failures >= ATTEMPTS:
                kept = f" {arrived} bytes are kept, and the next attempt goes on from there." * (
                    arrived > 0
                )
                raise DownloadError(
                    f"cannot download {url}: {error}.{kept} Without internet, bring the file to "
                    f"{target}, or name its path instead of the address"
                ) from error
            time.sleep(RETRY_WAIT_S * 2 ** (failures - 1))


def _transfer(url: str, target: Path) -> tuple[Path, list[str]]:
    """One connection of `_fetch`. Raises _Interrupted when it breaks."""
    begun = next(iter(_parts(target)), None)
    offset = begun.stat().st_size if begun else 0
    redirects = _Redirects()
    with _open(url, redirects, offset) as reply:
        remote = _Remote.read(reply.headers, redirects.headers)
        if reply.headers.get_content_type() == "text/html":
            raise DownloadError(
                f"{url} is a web page, not a file: take the address behind its download button"
            )
        part = target.with_name(f"{target.name}.{remote.version}.part")
        continues = begun is not None and reply.status == http.client.PARTIAL_CONTENT
        if continues and (part != begun or remote.start != offset):
            begun.unlink()
            raise _Interrupted("the file changed while it was downloaded")
        for old in _parts(target):
            if not (continues and old == part):
                old.unlink()
        _copy(reply, part, remote.size)
    size = part.stat().st_size
    if remote.size is not None and size > remote.size:
        part.unlink()
        raise DownloadError(
            f"{url} was announced with {remote.size} bytes, and {size} came; the file was removed"
        )
    if remote.size is not None and size < remote.size:
        raise _Interrupted(f"the connection ended after {size} of {remote.size} bytes")
    return part, remote.sha256


def _copy(reply: Any, part: Path, size: int | None) -> None:
    """Appends a reply to a part-file."""
    done = part.stat().st_size if part.exists() else 0
    bar = tqdm(total=size, initial=done, unit="B", unit_scale=True, disable=None, desc="weights")
    with open(part, "ab") as file, bar:
        while True:
            try:
                chunk = reply.read(CHUNK)
            except (OSError, http.client.HTTPException) as error:
                raise _Interrupted(f"the connection broke: {error}") from error
            if not chunk:
                return
            file.write(chunk)
            bar.update(len(chunk))


def _open(url: str, redirects: _Redirects, offset: int = 0) -> Any:
    """The reply to a request for a file from byte `offset` on.

    Raises:
        _Interrupted: another attempt may help.
        DownloadError: none will.
    """
    headers = {"User-Agent": "asag", "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    request = urllib.request.Request(url, headers=headers)
    try:
        return urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and offset:
            for part in _parts(cached_path(url)):
                part.unlink()
            raise _Interrupted("the file is shorter than what was there of it") from error
        if error.code in (408, 429) or error.code >= 500:
            raise _Interrupted(f"the server says {error.code} {error.reason}") from error
        raise DownloadError(f"{url}: {_refusal(error)}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise _Interrupted(f"no connection to {urlsplit(url).netloc}: {reason}") from error


def _refusal(error: urllib.error.HTTPError) -> str:
    if error.code in (401, 403):
        return (
            f"the server refuses it ({error.code}): it is private, asks for a consent, or does not "
            "exist. Download it by hand and name its path"
        )
    if error.code in (404, 410):
        return f"no such file ({error.code}); check the address"
    return f"the server says {error.code} {error.reason}"


def _parts(target: Path) -> list[Path]:
    """What earlier attempts left of a file."""
    return sorted(target.parent.glob(f"{escape(target.name)}.*.part"))


def _arrived(target: Path) -> int:
    return sum(x.stat().st_size for x in _parts(target))


def _wrong_sum(file: Path, sums: Sequence[str]) -> str:
    """Which of the sums, whole or their first digits, a file fails; empty if none."""
    if not sums:
        return ""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    found = digest.hexdigest()
    wrong = [x for x in sums if not found.startswith(x)]
    return f"SHA-256 {found} where {wrong[0]} was expected" if wrong else ""
