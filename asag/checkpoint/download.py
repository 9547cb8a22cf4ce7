"""Weights by address: a file on disk, or one that is downloaded once and kept.

| address | source |
|---|---|
| `path/model.pth` | a file |
| `https://host/path/model.pth` | a file of a web server |
| `https://.../model.pth#sha256=<64 hex digits>` | the same, with the sum it must have |
| `hf://owner/name`, `hf://owner/name@revision/file` | a file of a Hugging Face repository |
| `package://name/path/in/it` | a file of an installed Python package |
| `detectron2://...` and other schemes | what Detectron2's `PathManager` makes of them |

Files of web servers are kept below $FVCORE_CACHE (default `~/.torch/iopath_cache`), by host and
path; one that is there is never asked for again. What an interrupted download left stays beside it
as `*.part`, and the next one continues there. Files of Hugging Face are kept where its own library
keeps them ($HF_HOME).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote, urlsplit

import pooch
from detectron2.utils.file_io import Detectron2Handler, PathManager
from iopath.common.file_io import file_lock, get_cache_dir
from tqdm import tqdm

from .packages import SCHEME as PACKAGE
from .packages import package_file

# Imported late: huggingface_hub and requests take a second, and most runs download nothing.
if TYPE_CHECKING:
    import requests

ATTEMPTS = 3  # connections in a row that bring nothing new
RETRY_WAIT_S = 1.0  # before the second attempt; doubled from then on
TIMEOUT_S = 30.0
CHUNK = 1 << 13  # bytes; at most as much is lost when a connection breaks
PASSING = (408, 416, 429, 500, 502, 503, 504)  # answers after which another attempt may help
# What a repository without a file name in the address is searched for.
PREFERRED_FILES = ("model.safetensors", "pytorch_model.bin")

# `torch.hub` and MMDetection name files after the first digits of their sum; eight decimal digits
# are a date.
_HUB_NAME = re.compile(r"-(?!\d{8}\.)([0-9a-f]{8,64})\.\w+$")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HF = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<file>.+))?")


logger = logging.getLogger(__name__)
pooch.get_logger().setLevel(logging.WARNING)  # downloads are announced here


class DownloadError(OSError):
    """A file could not be had from where its address points; the message says what to do."""


def local_file(address: str) -> str:
    """Path of the file at an address, which is downloaded if it is not there yet.

    Args:
        address: see the head of this module.

    Raises:
        FileNotFoundError: no such file on disk.
        DownloadError: the file cannot be had, or is not the one that its sum promises.
        ValueError: the address is malformed.
    """
    scheme, separator, _ = address.partition("://")
    if separator and scheme in RESOLVERS:
        return str(RESOLVERS[scheme](address))
    path = PathManager.get_local_path(address) if separator else address
    if not os.path.isfile(path):
        hint = "this kind of address is not known" if separator else "check MODEL.WEIGHTS"
        raise FileNotFoundError(f"no weights file {address}: {hint}")
    return path


def split_sum(address: str) -> tuple[str, str | None]:
    """Address and sum of `ADDRESS#sha256=SUM`. Raises ValueError for other fragments."""
    address, mark, fragment = address.partition("#")
    kind, _, known = fragment.lower().partition("=")
    if mark and (kind != "sha256" or not _SHA256.fullmatch(known)):
        raise ValueError(
            f"{address}#{fragment}: only #sha256=<64 hex digits> may follow an address"
        )
    return address, known or None


def check_sum(file: Path, expected: str, address: str) -> None:
    """Raises DownloadError, and removes the file, unless its SHA-256 begins with these digits."""
    found = pooch.file_hash(str(file))
    if not found.startswith(expected):
        file.unlink()
        raise DownloadError(
            f"{address} has SHA-256 {found} where {expected} was expected; the file was removed. "
            "Try again; if that does not help, either the file was replaced or the sum in the "
            "address is not its own"
        )


# Web servers.


def download(url: str) -> Path:
    """The file at a URL, from the cache if it is there.

    Its length is checked, and its SHA-256 where it is known: from the URL's fragment, or the first
    digits from a file name such as `resnet50-0676ba61.pth`. A file that fails is removed.

    Raises:
        DownloadError: see `local_file`.
        ValueError: the URL names no file, or has another fragment than `#sha256=...`.
    """
    url, known = split_sum(url)
    target = cached_path(url)
    digits = _HUB_NAME.search(target.name)
    downloader = ResumingDownloader(target, [x for x in (known, digits and digits[1]) if x])
    with file_lock(str(target)):  # of several processes one downloads
        pooch.retrieve(url, known, target.name, target.parent, downloader=downloader)
    return target


def detectron2_file(address: str) -> Path:
    """A file of Detectron2's own server, in Detectron2's own cache; raises what `download` does."""
    path = address.removeprefix(Detectron2Handler.PREFIX)
    return download(Detectron2Handler.S3_DETECTRON2_PREFIX + path)


def cached_path(url: str) -> Path:
    """Returns the path at which a download is kept.

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


class ResumingDownloader(pooch.HTTPDownloader):
    """Pooch's downloader that keeps what arrived when a connection breaks, and continues there."""

    def __init__(self, target: Path, sums: Sequence[str]) -> None:
        """
        Args:
            target: the file; what has arrived of it is kept beside it until it is complete.
            sums: first digits of the SHA-256 that it must have.
        """
        super().__init__(chunk_size=CHUNK, timeout=TIMEOUT_S)
        self.target, self.sums = target, sums
        self.part, self.version = (target.with_name(target.name + x) for x in (".part", ".version"))
        self.size: int | None = None

    def __call__(self, url: str, output_file: str, _pooch: Any, check_only: bool = False) -> None:
        """Downloads, over several connections if need be. Raises DownloadError."""
        import requests

        logger.info(f"downloading {url} to {self.target}")
        failures = 0
        try:
            while True:
                before = self.arrived
                try:
                    self._continue(url)
                    break
                except requests.RequestException as error:
                    failures = 1 if self.arrived > before else failures + 1
                    status = getattr(error.response, "status_code", PASSING[0])
                    if failures >= ATTEMPTS or status not in PASSING:
                        raise DownloadError(self._explain(url, error)) from error
                time.sleep(RETRY_WAIT_S * 2 ** (failures - 1))
            for expected in self.sums:
                check_sum(self.part, expected, url)
            os.replace(self.part, output_file)
        finally:
            if not self.arrived:
                self.part.unlink(missing_ok=True)
                self.version.unlink(missing_ok=True)

    @property
    def arrived(self) -> int:
        """Bytes that are kept of an incomplete file."""
        return self.part.stat().st_size if self.part.is_file() else 0

    def _continue(self, url: str) -> None:
        """One connection, from the end of what has arrived. Raises requests' errors."""
        import requests

        bar = tqdm(total=1, unit="B", unit_scale=True, disable=None, desc="weights")
        with open(self.part, "ab") as file, bar:
            headers = {"User-Agent": "asag", "Accept-Encoding": "identity"}
            if offset := file.tell():
                headers["Range"] = f"bytes={offset}-"
                if self.version.is_file():  # the end of a new file must not be joined to an old one
                    headers["If-Range"] = self.version.read_text("utf-8")
            hooks = {"response": lambda reply, **_: self._inspect(reply, file)}
            self.kwargs |= {"headers": headers, "hooks": hooks}
            self.progressbar = bar
            super().__call__(url, file, None)
        if self.size not in (None, self.arrived):
            raise requests.ConnectionError(f"{self.arrived} of {self.size} bytes arrived")

    def _inspect(self, reply: requests.Response, file: BinaryIO) -> None:
        """Looks at the head of a reply before its body is written."""
        if reply.status_code not in (200, 206, 416):
            return
        if reply.headers.get("Content-Type", "").startswith("text/html"):
            raise DownloadError(
                f"{reply.url} is a web page, not a file: take the address of its download button"
            )
        if reply.status_code != 206:  # the server sends all of it, or has less than there is
            file.truncate(0)
        length = reply.headers.get("Content-Length")
        self.size = file.seek(0, os.SEEK_END) + int(length) if length else None
        tag = reply.headers.get("ETag", "W/")
        version = reply.headers.get("Last-Modified", "") if tag.startswith("W/") else tag
        self.version.write_text(version, "utf-8") if version else self.version.unlink(True)

    def _explain(self, url: str, error: requests.RequestException) -> str:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            return f"{url}: the server refuses it ({status}). Download it by hand and give its path"
        if status in (404, 410):
            return f"{url}: no such file ({status}); check the address"
        reason = getattr(error.args[0], "reason", error) if error.args else error
        kept = f" {self.arrived} bytes are kept, and the next attempt continues there."
        return (
            f"cannot download {url}: {reason}.{kept * (self.arrived > 0)} Without internet, bring "
            f"the file to {self.target}, or give its path instead of the address"
        )


# Hugging Face.


def hugging_face_file(address: str) -> Path:
    """A file of a repository; beside a model's, `config.json` (class names) is fetched as well.

    Args:
        address: `hf://owner/name[@revision][/file]`, perhaps with `#sha256=...`. Without a file:
            model.safetensors, else pytorch_model.bin, else the only *.pth. $HF_ENDPOINT replaces
            https://huggingface.co.

    Raises:
        DownloadError: the repository cannot be read, or has no such file or several.
        ValueError: malformed.
    """
    address, known = split_sum(address)
    found = _HF.fullmatch(address.rstrip("/"))
    if not found:
        raise ValueError(f"{address}: write hf://owner/name, perhaps with @revision or /file")
    from huggingface_hub import constants, errors, try_to_load_from_cache

    repo, revision, file = found.group("repo", "revision", "file")
    names = (file,) if file else PREFERRED_FILES
    cached = (try_to_load_from_cache(repo, name, revision=revision) for name in names)
    path = next((Path(x) for x in cached if isinstance(x, str)), None)
    try:
        path = path or _from_hub(repo, revision, file)
    except DownloadError:
        raise
    except (OSError, errors.HTTPError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DownloadError(
            f"cannot get {address}: {reason} Without internet, bring the file here and give its "
            f"path, or copy what another machine has below {constants.HF_HUB_CACHE}"
        ) from error
    if known:
        check_sum(path.resolve(), known, address)
    return path


def _from_hub(repo: str, revision: str | None, file: str | None) -> Path:
    from huggingface_hub import HfApi, errors, hf_hub_download

    place = {"revision": revision, "endpoint": os.environ.get("HF_ENDPOINT")}
    if file is None:
        files = HfApi(endpoint=place["endpoint"]).list_repo_files(repo, revision=revision)
        chosen = [x for x in PREFERRED_FILES if x in files][:1]
        chosen = chosen or [x for x in files if x.endswith(".pth")]
        if len(chosen) != 1:
            shown = [x for x in files if x.endswith((".safetensors", ".bin", ".pth", ".pt"))][:10]
            raise DownloadError(
                f"hf://{repo} has neither {' nor '.join(PREFERRED_FILES)}, and {len(chosen)} files "
                f"*.pth; name one of its files, hf://{repo}/FILE. Weights in it: "
                f"{', '.join(shown) or 'none'}"
            )
        file = chosen[0]
    path = Path(hf_hub_download(repo, file, **place))
    blob = path.resolve()
    if _SHA256.fullmatch(blob.name):  # large files lie under their sum
        check_sum(blob, blob.name, f"hf://{repo}/{file}")
    if path.name in PREFERRED_FILES:
        with contextlib.suppress(errors.EntryNotFoundError):  # not every repository has one
            hf_hub_download(repo, str(PurePosixPath(file).with_name("config.json")), **place)
    return path


RESOLVERS: dict[str, Callable[[str], Path]] = {
    "http": download,
    "https": download,
    "hf": hugging_face_file,
    Detectron2Handler.PREFIX.removesuffix("://"): detectron2_file,
    PACKAGE: lambda address: package_file(address.partition("://")[2]),
}
"""Scheme of an address -> function from the whole address to the file."""
