"""A file server on this machine that fails in the ways that real ones do."""

import contextlib
import threading
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer(ThreadingHTTPServer):
    """Serves `files` ({'/name': content}).

    Attributes:
        ranges: Whether it sends the rest of a file when asked to.
        modified: When its files were changed, in seconds of the epoch.
        faults: What befalls the next answers, one each: a number of bytes after which the
            connection breaks, 'stall' to send half and then nothing, an HTTP status, or None.
        asked: The Range of every request so far, None where there was none.
    """

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), Handler)
        self.files = {}
        self.ranges, self.modified = True, 0.0
        self.content_type = 'application/octet-stream'
        self.faults, self.asked = [], []
        self.closing = threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients hang up on answers that they do not want: nothing to report."""

    def url(self, name: str) -> str:
        return f'http://127.0.0.1:{self.server_port}/{name}'


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        content = server.files.get(self.path)
        asked = self.headers.get('Range')
        server.asked.append(asked)
        fault = server.faults.pop(0) if server.faults else None
        if content is None or fault in (403, 503):
            self.send_error(fault or 404)
            return
        since = self.headers.get('If-Unmodified-Since')
        if since and server.modified > parsedate_to_datetime(since).timestamp():
            self.send_error(412)
            return
        start = 0
        if asked and server.ranges:
            start = int(asked.removeprefix('bytes=').removesuffix('-'))
            if start >= len(content):
                self.send_response(416)
                self.send_header('Content-Range', f'bytes */{len(content)}')
                self.end_headers()
                return
            self.send_response(206)
            self.send_header('Content-Range', f'bytes {start}-{len(content) - 1}/{len(content)}')
        else:
            self.send_response(200)
        self.send_header('Content-Length', str(len(content) - start))
        self.send_header('Content-Type', server.content_type)
        self.end_headers()
        rest = content[start:]
        if fault == 'stall':
            self.wfile.write(rest[: len(rest) // 2])
            server.closing.wait()
        else:
            self.wfile.write(rest[:fault])

    def log_message(self, *args) -> None:
        pass


@contextlib.contextmanager
def running() -> Iterator[FileServer]:
    """A server that runs in a thread until the block ends."""
    server = FileServer()
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.02))
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
