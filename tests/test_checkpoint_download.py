"""Weights by address, against a web server of this machine that misbehaves on demand."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from detectron2.utils.file_io import Detectron2Handler

from asag.checkpoint import download as module
from asag.checkpoint.download import DownloadError, cached_path, download, local_file

BODY = bytes(range(256)) * 40
SUM = hashlib.sha256(BODY).hexdigest()


@dataclass
class Page:
    """What the server answers to one path.

    Attributes:
        cuts: bytes after which one connection each breaks.
        status: in place of the body.
        ranges: whether requests for a part get one.
        requested: `Range` headers that came.
    """

    body: bytes = BODY
    headers: dict[str, str] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    status: int = 200
    ranges: bool = True
    sized: bool = True
    requested: list[str | None] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        page = self.server.pages.get(self.path, Page(status=404))
        asked = self.headers.get("Range")
        page.requested.append(asked)
        start, status = 0, page.status
        if asked and page.ranges and status == 200:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            status = 206 if start < len(page.body) else 416
        body = page.body[start:] if status in (200, 206) else b"no"
        self.send_response(status)
        if status == 206:
            end, size = len(page.body) - 1, len(page.body)
            self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
        if page.sized:
            self.send_header("Content-Length", str(len(body)))
        for key, value in page.headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[: page.cuts.pop(0)] if page.cuts else body)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages: dict[str, Page] = {}

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    def put(self, path: str, **options: object) -> Page:
        self.pages[path] = Page(**options)
        return self.pages[path]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(module, "RETRY_WAIT_S", 0.0)
    with Server() as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url(""))
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def leftovers(url: str) -> list[str]:
    """What lies beside a cached file, locks aside."""
    folder = cached_path(url).parent
    return sorted(x.name for x in folder.iterdir() if x.suffix != ".lock")


def test_is_downloaded_once(server: Server) -> None:
    page = server.put("/a/model.pth")
    url = server.url("/a/model.pth")
    path = Path(local_file(url))
    assert path.read_bytes() == BODY and path == cached_path(url)
    assert local_file(url) == str(path)
    assert page.requested == [None]
    assert leftovers(url) == ["model.pth"]


def test_hosts_and_queries_do_not_share_a_file() -> None:
    urls = [
        "https://one.org/x/model.pth",
        "https://two.org/x/model.pth",
        "https://one.org/x/model.pth?v=1",
        "https://one.org/x/model.pth?v=2",
    ]
    paths = [cached_path(x) for x in urls]
    assert len(set(paths)) == 4 and {x.name for x in paths} == {"model.pth"}


def test_detectron2_files_stay_where_detectron2_keeps_them(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = server.url("/detectron2/")
    monkeypatch.setattr(Detectron2Handler, "S3_DETECTRON2_PREFIX", prefix)
    server.put("/detectron2/ImageNet/R-50.pkl")
    path = Path(local_file("detectron2://ImageNet/R-50.pkl"))
    assert path == Path(module.get_cache_dir()) / "detectron2/ImageNet/R-50.pkl"
    assert path.read_bytes() == BODY


@pytest.mark.parametrize("etag", [{"ETag": '"v1"'}, {}], ids=["etag", "no etag"])
def test_broken_connections_are_resumed(server: Server, etag: dict) -> None:
    page = server.put("/model.pth", cuts=[3000, 2000], headers=etag)
    assert download(server.url("/model.pth")).read_bytes() == BODY
    assert page.requested == [None, "bytes=3000-", "bytes=5000-"]
    assert leftovers(server.url("/model.pth")) == ["model.pth"]


def test_the_next_run_goes_on_where_this_one_stopped(server: Server) -> None:
    url = server.url("/model.pth")
    page = server.put("/model.pth", cuts=[3000, 0, 0, 0])
    with pytest.raises(DownloadError, match=r"3000 of 10240 bytes.*goes on from there"):
        download(url)
    assert not cached_path(url).exists()
    page.cuts.clear()
    assert download(url).read_bytes() == BODY
    assert page.requested[-1] == "bytes=3000-"


def test_servers_without_ranges_start_over(server: Server) -> None:
    page = server.put("/model.pth", cuts=[3000], ranges=False)
    assert download(server.url("/model.pth")).read_bytes() == BODY
    assert page.requested == [None, "bytes=3000-"]


def test_pieces_of_two_versions_are_not_joined(server: Server) -> None:
    url = server.url("/model.pth")
    server.put("/model.pth", cuts=[3000, 0, 0, 0], headers={"ETag": '"old"'})
    with pytest.raises(DownloadError):
        download(url)
    new = BODY[::-1]
    server.put("/model.pth", body=new, headers={"ETag": '"new"'})
    assert download(url).read_bytes() == new
    assert leftovers(url) == ["model.pth"]


def test_a_shorter_new_version_is_taken_from_its_start(server: Server) -> None:
    url = server.url("/model.pth")
    server.put("/model.pth", cuts=[3000, 0, 0, 0])
    with pytest.raises(DownloadError):
        download(url)
    server.put("/model.pth", body=BODY[:1000])
    assert download(url).read_bytes() == BODY[:1000]


def test_length_may_be_untold(server: Server) -> None:
    server.put("/model.pth", sized=False)
    assert download(server.url("/model.pth")).read_bytes() == BODY


@pytest.mark.parametrize(
    "path", [f"/model.pth#sha256={SUM}", f"/net-{SUM[:8]}.pth", "/model-20211011.pth"]
)
def test_right_sums(server: Server, path: str) -> None:
    server.put(path.partition("#")[0])
    assert download(server.url(path)).read_bytes() == BODY


@pytest.mark.parametrize("path", [f"/model.pth#sha256={'0' * 64}", "/net-0123abcd.pth"])
def test_wrong_sums(server: Server, path: str) -> None:
    server.put(path.partition("#")[0])
    with pytest.raises(DownloadError, match=rf"{SUM} where 0.* was expected; the file was removed"):
        download(server.url(path))
    assert leftovers(server.url(path).partition("#")[0]) == []


def test_a_kept_file_that_fails_the_asked_sum_is_replaced(server: Server) -> None:
    url = server.url("/model.pth")
    server.put("/model.pth", body=b"old")
    assert download(url).read_bytes() == b"old"
    server.put("/model.pth")
    assert download(f"{url}#sha256={SUM}").read_bytes() == BODY


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ({"status": 404}, r"no such file \(404\); check the address"),
        ({"status": 403}, r"refuses it \(403\).*Download it by hand"),
        ({"status": 503}, r"the server says 503.*Without internet, bring the file to"),
        ({"headers": {"Content-Type": "text/html; charset=utf-8"}}, "is a web page, not a file"),
    ],
)
def test_refusals_say_what_to_do(server: Server, page: dict, message: str) -> None:
    server.put("/model.pth", **page)
    with pytest.raises(DownloadError, match=message):
        download(server.url("/model.pth"))
    assert leftovers(server.url("/model.pth")) == []


def test_passing_trouble_is_tried_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    page = server.put("/model.pth", status=503)
    monkeypatch.setattr(module.time, "sleep", lambda _: setattr(page, "status", 200))
    assert download(server.url("/model.pth")).read_bytes() == BODY


def test_offline(server: Server) -> None:
    url = server.url("/model.pth")
    server.shutdown()
    server.server_close()
    with pytest.raises(DownloadError, match=r"no connection to 127\.0\.0\.1.*Without internet"):
        download(url)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("https://host.org/model.pth#md5=3", "only #sha256="),
        ("https://host.org/folder/", "names no file"),
        ("hf://owner", r"write hf://owner/name"),
    ],
)
def test_malformed_addresses(server: Server, address: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        local_file(address)


def test_files_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(b"x")
    assert local_file(str(tmp_path / "x.pth")) == str(tmp_path / "x.pth")
    with pytest.raises(FileNotFoundError, match=r"no weights file absent\.pth"):
        local_file("absent.pth")
    with pytest.raises(FileNotFoundError, match="this kind of address is not known"):
        local_file("strange://x.pth")


class TestHuggingFace:
    def listing(self, server: Server, *files: str, revision: str = "main") -> Page:
        body = json.dumps({"siblings": [{"rfilename": x} for x in files]}).encode()
        return server.put(f"/api/models/me/net/revision/{revision}", body=body)

    @pytest.mark.parametrize(
        ("files", "chosen"),
        [
            (("a.pth", "pytorch_model.bin", "model.safetensors"), "model.safetensors"),
            (("a.pth", "pytorch_model.bin", "README.md"), "pytorch_model.bin"),
            (("README.md", "a.pth"), "a.pth"),
        ],
    )
    def test_default_file(self, server: Server, files: tuple, chosen: str) -> None:
        self.listing(server, *files)
        server.put(f"/me/net/resolve/main/{chosen}")
        assert Path(local_file("hf://me/net")).name == chosen

    def test_what_is_there_needs_no_listing(self, server: Server) -> None:
        listing = self.listing(server, "model.safetensors")
        server.put("/me/net/resolve/main/model.safetensors")
        assert local_file("hf://me/net") == local_file("hf://me/net/")
        assert len(listing.requested) == 1

    def test_class_names_come_along(self, server: Server) -> None:
        server.put("/me/net/resolve/main/model.safetensors")
        config = server.put("/me/net/resolve/main/config.json", body=b"{}")
        path = Path(local_file("hf://me/net/model.safetensors"))
        assert path.with_name("config.json").read_text() == "{}"
        local_file("hf://me/net/model.safetensors")
        assert len(config.requested) == 1

    def test_revision_and_file(self, server: Server) -> None:
        server.put("/me/net/resolve/v2/weights/best%20one.pth")
        path = local_file(f"hf://me/net@v2/weights/best one.pth#sha256={SUM}")
        assert path.endswith("me/net/resolve/v2/weights/best one.pth")
        self.listing(server, "model.safetensors", revision="v3")
        server.put("/me/net/resolve/v3/model.safetensors", body=b"3")
        assert Path(local_file("hf://me/net@v3")).read_bytes() == b"3"

    @pytest.mark.parametrize("files", [("README.md",), ("a.pth", "b.pth")])
    def test_nothing_to_choose(self, server: Server, files: tuple) -> None:
        self.listing(server, *files)
        with pytest.raises(DownloadError, match=r"name one of its files, hf://me/net/FILE"):
            local_file("hf://me/net")

    def test_absent_repository(self, server: Server) -> None:
        server.put("/api/models/me/net/revision/main", status=401)
        with pytest.raises(DownloadError, match=r"me/net.*refuses it \(401\)"):
            local_file("hf://me/net")

    def test_announced_sum_is_checked(self, server: Server) -> None:
        """It stands in the reply that redirects to where the file lies."""
        path = "/me/net/resolve/main/model.safetensors"
        place = {"Location": server.url("/cdn/1")}
        server.put(path, status=302, headers=place | {"X-Linked-Etag": f'"{SUM}"'})
        server.put("/cdn/1", cuts=[4000])
        assert Path(local_file("hf://me/net/model.safetensors")).read_bytes() == BODY
        assert server.pages["/cdn/1"].requested == [None, "bytes=4000-"]

        other = "/me/net/resolve/main/other.pth"
        server.put(other, status=302, headers=place | {"X-Linked-Etag": f'"{"a" * 64}"'})
        with pytest.raises(DownloadError, match="where aaaa"):
            local_file("hf://me/net/other.pth")
