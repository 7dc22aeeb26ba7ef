"""How much work of ours is on the way of a request: counted, not timed, so that every machine counts the same.

    python -m tests.budget            what each scenario takes, and its budget
    python -m tests.budget --places   the same with the functions
    python -m tests.budget --record   make that the budget; commit it with the change that needs it

Counted are the calls of our functions and those that our functions make (of the SDK, of the framework, of C), and
the lines of ours that run. What others do inside of such a call is not counted: it depends on their versions.
From one Python to the next the counts differ by one in a hundred.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Final

import tracemw
from tracemw import pipeline as pipelines
from tracemw.pipeline.local import StoreSink
from tracemw.pipeline.writer import Pipeline
from tracemw.settings import Settings

FILE: Final = Path(__file__).with_name("budget.json")
# Two names of one folder; see tests/test_packaging.py.
OURS: Final = tuple(
    {os.path.dirname(str(tracemw.__file__)) + os.sep, os.path.realpath(os.path.dirname(tracemw.__file__)) + os.sep}
    | {os.path.realpath(os.path.join(os.path.dirname(tracemw.__file__), "adapters")) + os.sep}
)
WARM_UP: Final = 20
REPEATS: Final = 5

Operation = Callable[[], object]
Counts = dict[str, dict[str, Any]]  # of each scenario: calls, lines, calls by module


def calls_of(operation: Operation) -> Counter[str]:
    """Return how often each function of ours was called, and what else our functions called, under their names."""
    found: Counter[str] = Counter()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            if is_ours(frame):
                if frame.f_code.co_name[0] != "<":  # comprehensions are no functions since Python 3.12
                    found[place(frame)] += 1
            elif frame.f_back is not None and is_ours(frame.f_back):
                found[f"{place(frame.f_back)} calls others"] += 1
        elif event == "c_call" and is_ours(frame):
            found[f"{place(frame)} calls others"] += 1

    sys.setprofile(profile)
    try:
        operation()
    finally:
        sys.setprofile(None)
    return found


def lines_of(operation: Operation) -> Counter[str]:
    """Return how many lines of each function of ours ran."""
    found: Counter[str] = Counter()

    def trace_lines(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            found[place(frame)] += 1
        return trace_lines

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        return trace_lines if is_ours(frame) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        operation()
    finally:
        sys.settrace(before)
    return found


def is_ours(frame: FrameType) -> bool:
    """True for code of the package."""
    return frame.f_code.co_filename.startswith(OURS)


def place(frame: FrameType) -> str:
    """Return the module and the function that a frame belongs to."""
    return f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"


def least(count: Callable[[Operation], Counter[str]], operation: Operation) -> Counter[str]:
    """Return the smallest of several counts: now and then something is due, such as a look at the clock."""
    return min((count(operation) for _ in range(REPEATS)), key=lambda found: found.total())


# The scenarios.

HEADERS: Final = [
    (b"host", b"api.example.com"), (b"x-request-id", b"req-1"), (b"x-session-id", b"s-1"), (b"x-user-id", b"jane"),
]  # fmt: skip


def scope() -> dict[str, Any]:
    """A request as an ASGI server hands it on."""
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "GET",
        "scheme": "http", "path": "/users/42", "raw_path": b"/users/42", "query_string": b"", "root_path": "",
        "headers": list(HEADERS), "server": ("127.0.0.1", 8000), "client": ("127.0.0.1", 50000), "state": {},
    }  # fmt: skip


def environ() -> dict[str, Any]:
    """A request as a WSGI server hands it on."""
    return {
        "REQUEST_METHOD": "GET", "SCRIPT_NAME": "", "PATH_INFO": "/users/42", "QUERY_STRING": "",
        "SERVER_NAME": "127.0.0.1", "SERVER_PORT": "8000", "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": "127.0.0.1", "wsgi.version": (1, 0), "wsgi.url_scheme": "http", "wsgi.input": None,
        "wsgi.errors": sys.stderr, "wsgi.multithread": False, "wsgi.multiprocess": True, "wsgi.run_once": False,
        "HTTP_HOST": "api.example.com", "HTTP_X_REQUEST_ID": "req-1", "HTTP_X_SESSION_ID": "s-1",
        "HTTP_X_USER_ID": "jane",
    }  # fmt: skip


async def receive() -> dict[str, Any]:
    """The request's body: none."""
    return {"type": "http.request", "body": b"", "more_body": False}


async def send(message: Any) -> None:
    """Where the response goes."""


async def plain_asgi(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI application without a framework."""
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def plain_wsgi(environ: Any, start_response: Any) -> list[bytes]:
    """A WSGI application without a framework."""
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]


def asgi_request(app: Any) -> Operation:
    """Return what sends one request; the event loop's own work is outside of what counts."""
    loop = asyncio.new_event_loop()

    def ask() -> None:
        async def one() -> None:
            await app(scope(), receive, send)

        loop.run_until_complete(one())

    return ask


def wsgi_request(app: Any) -> Operation:
    """Return what sends one request and reads the response, as a server does."""

    def ask() -> None:
        body = app(environ(), lambda status, headers, exc_info=None: None)
        for _part in body:
            pass
        if hasattr(body, "close"):
            body.close()

    return ask


def awaited(make: Callable[[], Awaitable[Any]]) -> Operation:
    """Return what awaits a coroutine that never waits."""
    loop = asyncio.new_event_loop()

    async def one() -> None:
        await make()

    return lambda: loop.run_until_complete(one())


def fastapi_app() -> Any:
    """A FastAPI application, with its middleware inside the stack."""
    from fastapi import FastAPI

    app = FastAPI()

    @app.get("/users/{user_id}")
    async def user(user_id: int) -> dict[str, int]:
        return {"id": user_id}

    app.add_middleware(tracemw.TraceMiddleware)
    return app


def flask_app() -> Any:
    """A Flask application."""
    from flask import Flask

    app = Flask("budget")

    @app.get("/users/<int:user_id>")
    def user(user_id: int) -> dict[str, int]:
        return {"id": user_id}

    middleware: Any = tracemw.WSGITraceMiddleware(app.wsgi_app)
    app.wsgi_app = middleware  # type: ignore[method-assign]
    return app


@tracemw.trace
def answer(question: str, k: int = 3) -> dict[str, Any]:
    """A traced function."""
    return {"answer": question, "k": k}


@tracemw.trace
async def answer_later(question: str, k: int = 3) -> dict[str, Any]:
    """A traced coroutine function."""
    return {"answer": question, "k": k}


def below_a_root(operation: Operation) -> Operation:
    """Return the operation inside a trace that is there."""
    tracemw.start_span("root").__enter__()
    return operation


def made_ready() -> Operation:
    """Return what makes the root of a request ready for the store."""
    pipeline = Pipeline(StoreSink("memory:", None, Settings()), Settings())
    pipeline._idle = False  # the writer stays away
    before = pipelines.use(pipeline)
    asgi_request(tracemw.TraceMiddleware(plain_asgi))()
    pipelines.use(before)
    root = pipeline._roots._raw.pop()
    assert root.record is not None and root.span is not None
    return functools.partial(pipeline._make_ready, root.record, root.span)


SCENARIOS: Final[dict[str, Callable[[], Operation]]] = {
    "ASGI request": lambda: asgi_request(tracemw.TraceMiddleware(plain_asgi)),
    "ASGI request, not sampled": lambda: asgi_request(tracemw.TraceMiddleware(plain_asgi, sample_rate=0.0)),
    "ASGI request, excluded": lambda: asgi_request(tracemw.TraceMiddleware(plain_asgi, exclude=["/users/*"])),
    "WSGI request": lambda: wsgi_request(tracemw.WSGITraceMiddleware(plain_wsgi)),
    "WSGI request, not sampled": lambda: wsgi_request(
        tracemw.WSGITraceMiddleware(plain_wsgi, sample_rate=0.0)
    ),
    "root made ready": made_ready,
    "FastAPI request": lambda: asgi_request(fastapi_app()),
    "Flask request": lambda: wsgi_request(flask_app()),
    "call, a trace of its own": lambda: lambda: answer("what is it", k=4),
    "call inside a trace": lambda: below_a_root(lambda: answer("what is it", k=4)),
    "awaited call inside a trace": lambda: below_a_root(awaited(lambda: answer_later("what is it", k=4))),
}
MORE: Final = 1.02  # what a Python may need more than the one that the budget was recorded with
MORE_WITH_FRAMEWORK: Final = 1.05  # a newer version of it may use our adapter in another way
LESS: Final = 0.85  # below this share of it, the budget guards nothing any more


def counted() -> tuple[Counts, dict[str, Counter[str]]]:
    """Count every scenario in this process, which is configured for it.

    Returns:
        The counts, and where each scenario's calls were made.
    """
    tracemw.configure(destination="none:")
    counts: Counts = {}
    places: dict[str, Counter[str]] = {}
    for name, make in SCENARIOS.items():
        operation = make()
        for _ in range(WARM_UP):
            operation()
        calls, lines = least(calls_of, operation), least(lines_of, operation)
        counts[name] = {"calls": calls.total(), "lines": lines.total(), "modules": by_module(calls)}
        places[name] = calls
    return counts, places


def by_module(calls: Counter[str]) -> dict[str, int]:
    """Return how many of the calls each module of ours is part of."""
    found: Counter[str] = Counter()
    for where, number in calls.items():
        found[where.partition(".")[0]] += number
    return dict(sorted(found.items()))


def limits(name: str, allowed: Mapping[str, int]) -> dict[str, range]:
    """Return between what a scenario's calls and lines have to be."""
    more = MORE_WITH_FRAMEWORK if name.startswith(("FastAPI", "Flask")) else MORE
    return {what: range(int(allowed[what] * LESS), int(allowed[what] * more) + 1) for what in ("calls", "lines")}


def budget() -> Counts:
    """Return the stored budget."""
    stored: Counts = json.loads(FILE.read_text()) if FILE.exists() else {}
    return stored


def main() -> None:
    """Print the counts as a table or, for the test, as JSON; record them if told to."""
    counts, places = counted()
    if "--json" in sys.argv:
        print(json.dumps(counts))
        return
    stored = budget()
    print(f"{'':30}{'calls':>12}{'lines':>12}   (budget)")
    for name, found in counts.items():
        allowed = stored.get(name, {})
        print(f"{name:30}" + "".join(f"{found[w]:6} ({allowed.get(w, 0)})".rjust(12) for w in ("calls", "lines")))
        if "--places" in sys.argv:
            print("\n".join(f"    {number:4} {where}" for where, number in sorted(places[name].items())))
    if "--record" in sys.argv:
        lines = (f" {json.dumps(name)}: {json.dumps(found)}" for name, found in counts.items())
        FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")  # a scenario in a line: a change is one in a diff
        print(f"recorded in {FILE}")


if __name__ == "__main__":
    main()
