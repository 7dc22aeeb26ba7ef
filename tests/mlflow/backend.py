"""What of an MLflow server a client needs to believe that it is one; it takes note of every request."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

EXPERIMENT = {
    "experiment_id": "1",
    "name": "app",
    "artifact_location": "mlflow-artifacts:/1",
    "lifecycle_stage": "active",
}


class Backend(ThreadingHTTPServer):
    """The server; `asked` has the method and path of each request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Backend

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        body: Any = {}
        if "/experiments/" in path:
            body = {"experiment": EXPERIMENT, "experiment_id": "1"}
        elif path.endswith("/traces"):
            body = {"trace": {"trace_info": {"trace_id": "tr-1", "tags": {}, "trace_metadata": {}}}}
        answer = b"3.10.0" if path == "/version" else json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PATCH = do_DELETE = _answer

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def backend() -> Iterator[Backend]:
    """A server that runs during the block."""
    server = Backend()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
