"""One peer in a process of its own: answers each number on stdin with the microseconds a request then took.

    python -m benchmarks.worker FRAMEWORK PEER
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
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


async def ask_asgi(app: Any, number: int) -> float:
    """Send requests; returns seconds."""
    began = time.perf_counter()
    for _ in range(number):
        await app(asgi_scope(), _receive, _send)
    return time.perf_counter() - began


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


def ask_wsgi(app: Any, number: int) -> float:
    """Send requests; returns seconds."""
    began = time.perf_counter()
    for _ in range(number):
        body = app(wsgi_environ(), _start_response)
        for _part in body:
            pass
        if hasattr(body, "close"):
            body.close()
    return time.perf_counter() - began


def main(framework: str, peer: str) -> None:
    """Serve the numbers on stdin."""
    silence()
    app = PEERS[framework][peer][1]()
    loop = asyncio.new_event_loop()

    def ask(number: int) -> float:
        return loop.run_until_complete(ask_asgi(app, number)) if framework == "fastapi" else ask_wsgi(app, number)

    ask(300)
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        number = int(line)
        print(ask(number) / number * 1e6, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
