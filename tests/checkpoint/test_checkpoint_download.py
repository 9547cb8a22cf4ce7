"""Weights by address, against a web server of this machine that misbehaves on demand."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from detectron2.utils.file_io import Detectron2Handler
from huggingface_hub import constants
from web_server import BODY, Page, Server

from asag.checkpoint import download as module
from asag.checkpoint.download import DownloadError, cached_path, download, local_file

SUM = hashlib.sha256(BODY).hexdigest()


def leftovers(url: str) -> list[str]:
    """Files beside a cached file, without locks."""
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
    with pytest.raises(DownloadError, match=r"3000 bytes are kept.*continues there"):
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
        ({"status": 503}, r"503 Server Error.*Without internet, bring the file to .*model\.pth"),
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
    with pytest.raises(
        DownloadError, match=r"cannot download http://127\.0\.0\.1.*Without internet"
    ):
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


COMMIT = "c" * 40


class TestHuggingFace:
    def put(self, server: Server, file: str, revision: str = "main", **options: object) -> Page:
        """A file of the repository me/net; large ones have their SHA-256 as tag."""
        body = options.setdefault("body", BODY)
        tag = hashlib.sha256(body).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"', **options.pop("headers", {})}
        return server.put(f"/me/net/resolve/{revision}/{file}", headers=headers, **options)

    def listing(self, server: Server, *files: str, revision: str = "main") -> Page:
        entries = [{"type": "file", "path": x, "size": 1, "oid": "1"} for x in files]
        path = f"/api/models/me/net/tree/{revision}?recursive=true&expand=false"
        return server.put(path, body=json.dumps(entries).encode())

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
        self.put(server, chosen)
        assert Path(local_file("hf://me/net")).name == chosen

    def test_what_is_there_needs_no_server(self, server: Server) -> None:
        self.listing(server, "model.safetensors")
        self.put(server, "model.safetensors")
        first = local_file("hf://me/net")
        server.pages.clear()
        assert local_file("hf://me/net/") == first == local_file("hf://me/net/model.safetensors")

    def test_class_names_come_along(self, server: Server) -> None:
        self.put(server, "model.safetensors")
        self.put(server, "config.json", body=b"{}")
        path = Path(local_file("hf://me/net/model.safetensors"))
        assert path.with_name("config.json").read_text() == "{}"

    def test_revision_and_file(self, server: Server) -> None:
        self.put(server, "weights/best%20one.pth", revision="v2")
        path = local_file(f"hf://me/net@v2/weights/best one.pth#sha256={SUM}")
        assert Path(path).read_bytes() == BODY
        self.listing(server, "model.safetensors", revision="v3")
        self.put(server, "model.safetensors", revision="v3", body=b"3")
        assert Path(local_file("hf://me/net@v3")).read_bytes() == b"3"

    @pytest.mark.parametrize("files", [("README.md",), ("a.pth", "b.pth")])
    def test_nothing_to_choose(self, server: Server, files: tuple) -> None:
        self.listing(server, *files)
        with pytest.raises(DownloadError, match=r"name one of its files, hf://me/net/FILE"):
            local_file("hf://me/net")

    def test_absent_repository(self, server: Server) -> None:
        server.put("/me/net/resolve/main/a.pth", status=401)
        for address in ("hf://me/net", "hf://me/net/a.pth"):
            with pytest.raises(DownloadError, match=rf"cannot get {address}: .*Without internet"):
                local_file(address)

    def test_offline(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_ENDPOINT", server.url(""))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(DownloadError, match=r"hf://me/net: .*give its path, or copy .*hub"):
            local_file("hf://me/net")

    @pytest.mark.parametrize("fragment", ["", f"#sha256={'b' * 64}"], ids=["announced", "asked"])
    def test_wrong_sums(self, server: Server, fragment: str) -> None:
        tag = {} if fragment else {"ETag": f'"{"b" * 64}"'}
        self.put(server, "a.pth", headers=tag)
        with pytest.raises(DownloadError, match=rf"SHA-256 {SUM} where bbb"):
            local_file(f"hf://me/net/a.pth{fragment}")
        assert not list(Path(constants.HF_HUB_CACHE).rglob("blobs/*"))
