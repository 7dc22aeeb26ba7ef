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


@pytest.mark.parametrize("app", [hello, fails, wsgi_hello], ids=lambda app: app.__name__)
def test_requests_are_freed_at_once(app: Any) -> None:
    """Nothing of a request waits for the garbage collector, not even where it failed."""
    gc.collect()
    gc.disable()
    try:
        with capture_traces():
            traces = []
            if app is wsgi_hello:
                env: dict[str, Any] = {"REQUEST_METHOD": "GET"}
                ask_wsgi(tracemw.WSGITraceMiddleware(app), env).read()
                traces.append(weakref.ref(env["tracemw.request"]))
                del env
            else:
                scope = http_scope()
                try:  # not with asyncio, whose tasks keep their exceptions
                    tracemw.TraceMiddleware(app)(scope, None, send).send(None)  # type: ignore[arg-type]
                except (ValueError, StopIteration):
                    pass
                traces.append(weakref.ref(scope["tracemw.request"]))
                del scope
            assert [trace() for trace in traces] == [None]
    finally:
        gc.enable()


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
