"""A web server of this machine that misbehaves on demand, for tests of downloads."""

from __future__ import annotations

from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BODY = bytes(range(256)) * 40


@dataclass
class Page:
    """Answers of the server to one path.

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
        if self.headers.get("If-Range", page.headers.get("ETag")) != page.headers.get("ETag"):
            asked = None
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
        if self.command == "GET":
            self.wfile.write(body[: page.cuts.pop(0)] if page.cuts else body)

    do_HEAD = do_GET

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
