"""The long run of `benchmarks/soak.py`, short; and what has to stay bounded."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import pytest

import tracemw
from tests.request.drive import Conversation, ask_wsgi, http_scope
from tests.request.look import root
from tests.servers import clean_environment
from tracemw.testing import capture_traces

ROOT = Path(__file__).resolve().parents[2]


def test_every_request_is_accounted_for() -> None:
    """Stored, excluded, sampled out and dropped are together what was sent; nothing of ours failed."""
    command = [sys.executable, "-m", "benchmarks.soak", "--requests", "6000"]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=120)
    found = json.loads(done.stdout)
    assert found["requests"] == 6000
    assert found["unaccounted"] == 0
    assert found["failures"] == {}
    assert found["stored"] > 4000


async def hello(scope: Any, receive: Any, send: Any) -> None:
    """The smallest application."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body"})


def wsgi_hello(env: Any, start_response: Any) -> Any:
    """The smallest application."""
    start_response("200 OK", [])
    return [b"x"]


async def send(message: Any) -> None:
    """A server that takes everything."""


async def fails(scope: Any, receive: Any, send: Any) -> None:
    """One that raises."""
    raise ValueError("boom")


def wsgi_parts(env: Any, start_response: Any) -> Any:
    """One whose body is made later, and its headers with it."""
    start_response("200 OK", [])
    yield b"x"


def wsgi_silent(env: Any, start_response: Any) -> Any:
    """One that does not answer."""
    return [b""]


@pytest.mark.parametrize(
    "options", [{}, {"exclude": ["*"]}, {"sample_rate": 0.0}], ids=["", "excluded", "sampled out"]
)
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("app", [hello, fails, wsgi_hello, wsgi_parts, wsgi_silent], ids=lambda app: app.__name__)
def test_requests_are_freed_at_once(app: Any, second: bool, options: dict[str, Any]) -> None:
    """Nothing of a request waits for the garbage collector: it may have failed, be excluded, pass us twice."""
    wsgi = app.__name__.startswith("wsgi")
    kind: Any = tracemw.WSGITraceMiddleware if wsgi else tracemw.TraceMiddleware
    middleware = kind(kind(app, user=lambda carrier: "jane") if second else app, **options)
    carrier: Any = {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "socket": Socket()} if wsgi else http_scope()
    with capture_traces():
        run(middleware, wsgi, {**carrier})  # makes what the first request needs
        gc.collect()
        gc.disable()
        try:
            run(middleware, wsgi, carrier)
            kept = weakref.ref(carrier["tracemw.request"]), weakref.ref(carrier.setdefault("socket", Socket()))
            del carrier
            assert [one() for one in kept] == [None, None]
        finally:
            gc.enable()


class Socket:
    """What a server has put into the environ."""


def run(middleware: Any, wsgi: bool, carrier: Any) -> None:
    """Serve one request."""
    if wsgi:
        ask_wsgi(middleware, carrier).read()
        return
    try:  # not with asyncio, whose tasks keep their exceptions
        middleware(carrier, None, send).send(None)
    except (ValueError, StopIteration):
        pass


def test_many_open_streams() -> None:
    """However many requests are open at once, and for however long: each is recorded when it ends."""
    number = 1500

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await go_on.wait()
        await send({"type": "http.response.body"})

    async def serve() -> None:
        middleware = tracemw.TraceMiddleware(app)

        async def one() -> None:
            conversation = Conversation()
            await middleware(http_scope(), conversation.receive, conversation.send)

        tasks = [asyncio.create_task(one()) for _ in range(number)]
        await asyncio.sleep(0)
        assert len(traces) == 0
        go_on.set()
        await asyncio.gather(*tasks)

    go_on = asyncio.Event()  # of no loop until somebody waits for it
    with capture_traces() as traces:
        asyncio.run(serve())
    assert len(traces) == number


def test_a_stream_of_many_parts() -> None:
    """An endless stream keeps nothing of its parts."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(20_000):
            await send({"type": "http.response.body", "body": b"%1000d" % number, "more_body": True})
            if number in (1_000, 19_000):
                sizes.append(tracemalloc.get_traced_memory()[0])
        await send({"type": "http.response.body"})

    sizes: list[int] = []
    tracemalloc.start()
    try:
        with capture_traces() as traces:
            asyncio.run(tracemw.TraceMiddleware(app, capture_response_body=True)(http_scope(), None, send))  # type: ignore[arg-type]
    finally:
        tracemalloc.stop()
    assert sizes[1] - sizes[0] < 200_000  # of 18,000,000 bytes in between
    assert root(traces[0]).attributes["tracemw.chunks"] == 20_001
    assert root(traces[0]).attributes["http.response.body.size"] == 20_000_000
