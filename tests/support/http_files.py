"""A file server on 127.0.0.1 that resumes, cuts connections, ignores ranges or answers nonsense, as a test asks."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer(ThreadingHTTPServer):
    """Serves `files` (path → bytes) and keeps `served`: a pair (first byte, bytes sent) for each answer with a body."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.served: list[tuple[int, int]] = []
        self.cut_after: int | None = None
        self.ignores_ranges = False
        self.has_etags = True
        self.web_page = False

    def handle_error(self, request, client_address):
        """A client that hangs up early is what some tests are about; the default prints a traceback."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server: FileServer = self.server
        body = server.files.get(self.path.lstrip("/"))
        if server.web_page:
            body = b"<html>log in first</html>"
        if body is None:
            self.send_error(404, "Not Found")
            return
        etag = f'"{hashlib.md5(body).hexdigest()}"'
        start = self._start(etag)
        if start >= len(body) > 0:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if server.has_etags:
            self.send_header("ETag", etag)
        self.send_header("Content-Type", "text/html" if server.web_page else "application/octet-stream")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        sent = body[start : None if server.cut_after is None else start + server.cut_after]
        server.served.append((start, len(sent)))
        self.wfile.write(sent)
        self.close_connection = True

    def _start(self, etag: str) -> int:
        asked = self.headers.get("Range")
        if asked is None or self.server.ignores_ranges or self.headers.get("If-Range", etag) != etag:
            return 0
        return int(asked.removeprefix("bytes=").removesuffix("-"))

    def log_message(self, *args):
        """Nothing is printed."""


@contextmanager
def serving() -> Iterator[FileServer]:
    with FileServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
