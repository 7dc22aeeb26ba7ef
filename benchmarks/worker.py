"""One subject in a process of its own: answers each line on stdin with the microseconds an operation then took.

    python -m benchmarks.worker GROUP NAME

A line is a number of operations and, where the subject has several, which one; the answer has the time by the
wall's clock and by the processor's (of all threads of the process).
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.peers import PEERS, silence

HEADERS = [
    (b"host", b"api.example.com"),
    (b"user-agent", b"python-httpx/0.28"),
    (b"accept", b"*/*"),
    (b"accept-encoding", b"gzip, deflate"),
    (b"connection", b"keep-alive"),
    (b"x-request-id", b"req-abc-123"),
    (b"x-session-id", b"session-1"),
    (b"x-user-id", b"jane"),
]


class Watch:
    """Measures what is done inside it: seconds of the wall's clock and of the processor's."""

    wall = cpu = 0.0

    def __enter__(self) -> Watch:
        self._cpu, self._wall = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall = time.perf_counter() - self._wall
        self.cpu = time.process_time() - self._cpu


Measure = Callable[[str, int], Watch]


def asgi_scope() -> dict[str, Any]:
    """A fresh scope, as uvicorn makes it."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 50000),
        "scheme": "http",
        "method": "GET",
        "root_path": "",
        "path": "/users/42",
        "raw_path": b"/users/42",
        "query_string": b"",
        "headers": list(HEADERS),
        "state": {},
    }


async def _receive() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


async def _send(message: Any) -> None:
    if message["type"] == "http.response.start":
        assert message["status"] == 200, message


async def ask_asgi(app: Any, number: int, afterwards: Callable[[], object] = bool) -> Watch:
    """Send requests to an ASGI application."""
    with Watch() as watch:
        for _ in range(number):
            await app(asgi_scope(), _receive, _send)
        afterwards()
    return watch


def wsgi_environ() -> dict[str, Any]:
    """A fresh environ, as gunicorn makes it."""
    environ: dict[str, Any] = {
        "REQUEST_METHOD": "GET",
        "SCRIPT_NAME": "",
        "PATH_INFO": "/users/42",
        "QUERY_STRING": "",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "8000",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": "127.0.0.1",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": None,
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": False,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
    }
    for name, value in HEADERS:
        environ["HTTP_" + name.decode().upper().replace("-", "_")] = value.decode()
    return environ


def _start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
    assert status.startswith("200"), status


def ask_wsgi(app: Any, number: int) -> Watch:
    """Send requests to a WSGI application."""
    with Watch() as watch:
        for _ in range(number):
            body = app(wsgi_environ(), _start_response)
            for _part in body:
                pass
            if hasattr(body, "close"):
                body.close()
    return watch


def stored() -> None:
    """Wait until the writer thread has stored what was queued: else its work would be done between the rounds."""
    import tracemw

    tracemw.flush(delivered=False)


def requests(framework: str, peer: str) -> Measure:
    """Return what sends requests to a peer's application."""
    app = PEERS[framework][peer][1]()
    if framework == "flask":
        return lambda case, number: ask_wsgi(app, number)
    loop = asyncio.new_event_loop()
    afterwards = stored if peer.endswith("-stored") else bool
    return lambda case, number: loop.run_until_complete(ask_asgi(app, number, afterwards))


def main(group: str, name: str) -> None:
    """Serve the lines on stdin. What the subject prints does not get between the answers."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    silence()
    if group in PEERS:
        measure = requests(group, name)
        measure("", 300)
    else:
        measure = importlib.import_module(f"benchmarks.{group}").prepare(name)
    gc.collect()
    gc.freeze()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        number, _, case = line.strip().partition(" ")
        watch = measure(case, int(number))
        print(watch.wall / int(number) * 1e6, watch.cpu / int(number) * 1e6, file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
