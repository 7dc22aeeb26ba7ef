"""What surrounds requests: the server's lifespan, its context, the application's own provider."""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any
from wsgiref.util import FileWrapper

import pytest
from opentelemetry.sdk.trace import Tracer as SDKTracer

import tracemw
from tests.request.drive import ask, ask_wsgi, environ, http_scope
from tests.request.look import root
from tests.servers import clean_environment
from tracemw import config, pipeline, provider
from tracemw.errors import StoreError
from tracemw.pipeline.writer import Pipeline
from tracemw.store.rows import SpanRow, TraceRow
from tracemw.testing import capture_traces


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers, and takes part in the lifespan."""
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body"})


LIFESPAN = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]


class Stuck:
    """A store that cannot be written."""

    def write(self, traces: Sequence[TraceRow], spans: Sequence[SpanRow]) -> None:
        """Refuse."""
        raise StoreError("the disk is full", retry=True)


def test_shutdown_stores_what_waits() -> None:
    """When the server stops, what was recorded is stored before the application says that it has stopped."""
    with capture_traces():
        made = tracemw.TraceMiddleware(app)
        ask(made)
        ask(made, {"type": "lifespan"}, LIFESPAN)
        stats = tracemw.stats()
    assert (stats["queued"], stats["spooled"]) == (0, 0)
    assert stats["written_traces"] == 1


def test_shutdown_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that cannot be written holds the server's shutdown up for the deadline and no longer."""
    monkeypatch.setattr(config, "EXIT_FLUSH", 0.2)
    stuck = Pipeline(Stuck(), config.settings())
    before = pipeline.use(stuck)
    try:
        made = tracemw.TraceMiddleware(app)
        ask(made)
        began = time.monotonic()
        answer = ask(made, {"type": "lifespan"}, LIFESPAN)
        assert time.monotonic() - began < 2
    finally:
        pipeline.use(before)
        stuck.sink = None
        stuck.close(0.1)
    assert [message["type"] for message in answer.sent] == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]


class Slow:
    """A store whose disk does not answer until it is told to."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.written = 0

    def write(self, traces: Sequence[TraceRow], spans: Sequence[SpanRow]) -> None:
        """Wait."""
        assert self.go_on.wait(60)
        self.written += len(traces)


def test_no_request_waits_for_the_store() -> None:
    """While the store does not answer, requests do; what they recorded is stored when it does."""
    store = Slow()
    slow = Pipeline(store, config.settings())
    before = pipeline.use(slow)
    try:
        made = tracemw.TraceMiddleware(app)
        answers = [ask(made) for _ in range(50)]  # none of which would be there
        assert [answer.status for answer in answers] == [200] * 50
        assert store.written == 0
        store.go_on.set()
        assert slow.flush(30)
    finally:
        pipeline.use(before)
        store.go_on.set()
        slow.close(1)
    assert store.written == 50


def test_an_application_without_a_lifespan() -> None:
    """One that refuses the lifespan refuses it as it does without us."""

    async def refusing(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"

    with capture_traces(), pytest.raises(AssertionError):
        ask(tracemw.TraceMiddleware(refusing), {"type": "lifespan"}, LIFESPAN)


variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nothing")


def test_context_variables_travel_up_on_asgi() -> None:
    """What the application sets in a context variable is seen outside of us: no task of our own is in between."""

    async def setting(scope: Any, receive: Any, send: Any) -> None:
        variable.set("set inside")
        await app(scope, receive, send)

    async def outside(scope: Any, receive: Any, send: Any) -> None:
        await tracemw.TraceMiddleware(setting)(scope, receive, send)
        seen.append((variable.get(), asyncio.current_task() is tasks[0]))

    async def serve() -> None:
        tasks.append(asyncio.current_task())
        await outside(http_scope(), None, send)

    async def send(message: Any) -> None:
        return None

    tasks: list[Any] = []
    seen: list[Any] = []
    with capture_traces():
        asyncio.run(serve())
    assert seen == [("set inside", True)]


def test_a_file_wrapper_that_is_no_class() -> None:
    """A server may offer a function (uWSGI): it gets back the very object that it has made."""
    made = []

    def wrapper(file: Any, size: int = 8192) -> Any:
        made.append(FileWrapper(file, size))
        return made[-1]

    def sends(env: Any, start_response: Any) -> Any:
        start_response("200 OK", [("Content-Length", "7")])
        return env["wsgi.file_wrapper"](open(__file__, "rb"))

    with capture_traces() as traces:
        env: dict[str, Any] = {**environ(), "wsgi.file_wrapper": wrapper}
        answer = ask_wsgi(tracemw.WSGITraceMiddleware(sends), env)
        assert answer.body is made[0]
        answer.body.close()
    assert root(traces[0]).attributes["http.response.body.size"] == 7


def test_a_request_that_is_left_out_makes_no_span(monkeypatch: pytest.MonkeyPatch) -> None:
    """Excluded and unsampled requests do not even ask for a span."""
    with capture_traces():
        tracer = type(provider.tracer())
        made = [
            tracemw.TraceMiddleware(app, exclude=["/"]),
            tracemw.TraceMiddleware(app, sample_rate=0.0),
        ]
        asked: list[Any] = []
        for kind in {tracer, SDKTracer}:
            monkeypatch.setattr(kind, "start_span", lambda *args, **options: asked.append(args))
        for one in made:
            assert ask(one).status == 200
        assert asked == []
        assert ask(tracemw.TraceMiddleware(app)).status == 200
    assert len(asked) == 1


PROVIDER = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
import tracemw

calls = []

class Provider(TracerProvider):
    def shutdown(self):
        calls.append("shutdown")
        super().shutdown()

provider = Provider(shutdown_on_exit=False)
trace.set_tracer_provider(provider)
tracemw.configure(destination="memory:", set_global=True)
for i in range(3):
    with tracemw.start_span("work"):
        pass
    tracemw.configure(destination="memory:")
tracemw.shutdown()
assert trace.get_tracer_provider() is provider
assert calls == []
assert len(provider._active_span_processor._span_processors) == 1
with trace.get_tracer("application").start_as_current_span("still works") as span:
    assert span.is_recording()
"""


def test_the_application_s_provider_is_left_alone() -> None:
    """It is neither replaced nor reset nor shut down, and gets one processor of ours, however often."""
    done = subprocess.run(
        [sys.executable, "-c", PROVIDER], env=clean_environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
