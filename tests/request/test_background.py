"""What runs after the response: in the trace, but neither in the root's duration nor in its state."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import tracemw
from tests.request.drive import Conversation, ask, http_scope
from tests.request.look import duration, ended, named, names, root, took
from tracemw.testing import capture_traces

WORK = "background work"


async def hello(scope: Any, receive: Any, send: Any) -> None:
    """The smallest response."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


@tracemw.trace
def traced_task(fails: bool = False) -> None:
    """A background task that is traced."""
    time.sleep(0.1)
    if fails:
        raise RuntimeError("in the task")


def task(fails: bool = False) -> None:
    """One that is not."""
    time.sleep(0.1)
    if fails:
        raise RuntimeError("in the task")


async def async_task(fails: bool = False) -> None:
    """Likewise, a coroutine."""
    await asyncio.sleep(0.1)
    if fails:
        raise RuntimeError("in the task")


def starlette_app(function: Callable[..., Any], fails: bool) -> Any:
    """A Starlette application whose response has a task."""

    def handler(request: Any) -> Response:
        return JSONResponse({}, background=BackgroundTask(function, fails))

    app = Starlette(routes=[Route("/x", handler)])
    app.add_middleware(tracemw.TraceMiddleware)
    return app


def fastapi_app(function: Callable[..., Any], fails: bool) -> Any:
    """The same with FastAPI's way to add tasks."""
    app = FastAPI()
    app.add_middleware(tracemw.TraceMiddleware)

    @app.get("/x")
    async def handler(tasks: BackgroundTasks) -> dict[str, Any]:
        tasks.add_task(function, fails)
        return {}

    return app


def send(app: Any) -> None:
    """Send a request; a task that fails makes the application raise."""
    try:
        ask(app, http_scope("/x"))
    except RuntimeError as exc:
        assert str(exc) == "in the task"


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("function", [traced_task, task, async_task])
@pytest.mark.parametrize("made", [starlette_app, fastapi_app])
def test_tasks_of_frameworks(made: Any, function: Callable[..., Any], fails: bool) -> None:
    """A task is a span below the root, traced or not, with its exception; the root tells of the response alone."""
    with capture_traces() as traces:
        send(made(function, fails))
    (trace,) = traces
    assert trace.info.state == "OK"
    assert root(trace).name == "GET /x"
    assert root(trace).attributes["tracemw.outcome"] == "completed"
    assert root(trace).events == []
    work = "traced_task" if function is traced_task else WORK
    assert names(trace) == ["GET /x", work]
    span = named(trace, work)
    assert span.parent_id == root(trace).span_id
    assert span.start_time_ns >= ended(root(trace))
    assert took(span) >= 90
    assert [event.attributes["exception.message"] for event in span.events] == ["in the task"] * fails
    assert span.status.status_code == ("ERROR" if fails else "OK")


def test_an_exception_beside_traced_work() -> None:
    """What failed is told where no span of its own tells of it, though other spans were made."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await hello(scope, receive, send)
        with tracemw.start_span("index"):
            await asyncio.sleep(0.1)
            tracemw.update_current_trace(tags={"late": "yes"})
        raise RuntimeError("in the background")

    with capture_traces() as traces, pytest.raises(RuntimeError):
        ask(tracemw.TraceMiddleware(app))
    (trace,) = traces
    assert trace.info.state == "OK"
    assert named(trace, "index").start_time_ns >= ended(root(trace))
    assert trace.info.tags["late"] == "yes"
    assert {named(trace, name).parent_id for name in ("index", WORK)} == {root(trace).span_id}
    assert len(named(trace, WORK).events) == 1


def test_an_application_that_returns_makes_no_span() -> None:
    """Without work after the response there is no span for it, also where the thread had to wait."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await hello(scope, receive, send)
        time.sleep(0.01)  # as a busy machine would; nothing else runs in the meantime

    with capture_traces() as traces:
        ask(tracemw.TraceMiddleware(app))
    assert [names(trace) for trace in traces] == [["GET"]]


def test_clean_up_of_dependencies() -> None:
    """What a FastAPI dependency does after its `yield` is work after the response, too."""

    async def session() -> Any:
        yield "session"
        await asyncio.sleep(0.3)

    app = FastAPI()
    app.add_middleware(tracemw.TraceMiddleware)

    @app.get("/x")
    async def handler(given: str = Depends(session)) -> str:
        return given

    with capture_traces() as traces:
        ask(app, http_scope("/x"))
    (trace,) = traces
    assert (duration(trace) < 250) == (WORK in names(trace))  # some versions clean up first


def test_tasks_below_a_base_http_middleware() -> None:
    """`BaseHTTPMiddleware` runs the application in another task: its tasks are found all the same."""

    class Passing(BaseHTTPMiddleware):
        async def dispatch(self, request: Any, call_next: Any) -> Any:
            return await call_next(request)

    app = starlette_app(async_task, False)
    app.add_middleware(Passing)
    with capture_traces() as traces:
        send(app)
    (trace,) = traces
    assert names(trace) == ["GET /x", WORK]
    assert named(trace, WORK).start_time_ns >= ended(root(trace))


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Roots wait less long than they do."""
    monkeypatch.setattr("tracemw.request.GRACE", 0.02)
    yield


@pytest.mark.parametrize("status", [200, 503])
def test_a_task_that_never_ends_blocks_nothing(short_grace: None, status: int) -> None:
    """The trace is complete without it, whatever the status; a cancelled task is told as that, and is no error."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body"})
        await asyncio.Event().wait()

    async def serve() -> None:
        conversation = Conversation()
        middleware = tracemw.TraceMiddleware(app)
        task = asyncio.create_task(middleware(http_scope(), conversation.receive, conversation.send))
        await asyncio.sleep(0.3)
        assert [names(trace) for trace in traces] == [["GET"]]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with capture_traces() as traces:
        asyncio.run(serve())
    (trace,) = traces
    assert trace.info.state == ("OK" if status == 200 else "ERROR")
    assert duration(trace) < 250
    assert named(trace, WORK).attributes["tracemw.outcome"] == "cancelled"


@pytest.mark.parametrize("status", [200, 503])
def test_a_root_that_waits_ended_with_its_response(status: int) -> None:
    """A 503 may yet get an exception, so its root is kept open; it lasts no longer than the response for that."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body"})
        sent.append(time.time_ns())
        await asyncio.sleep(0.1)

    sent: list[int] = []
    with capture_traces() as traces:
        ask(tracemw.TraceMiddleware(app))
    (trace,) = traces
    assert ended(root(trace)) <= sent[0] + 20_000_000  # two clocks


def test_a_span_that_ends_late_and_one_that_never_does() -> None:
    """A child that ends after the root lands in the trace; one that never ends does not hold it up."""
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        tracemw.start_span_no_context("never ends", parent_span=tracemw.get_current_active_span())
        late = tracemw.start_span_no_context("late", parent_span=tracemw.get_current_active_span())
        await hello(scope, receive, send)
        seen.append(len(traces))
        await asyncio.sleep(0.01)
        late.end()

    with capture_traces() as traces:
        ask(tracemw.TraceMiddleware(app))
    assert seen == [1]
    assert names(traces[0]) == ["GET", "late"]
    assert ended(named(traces[0], "late")) > ended(root(traces[0]))
