"""Small things, each alone: the floor, one traced call by kind of function, capture, identity."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from benchmarks.worker import HEADERS, Measure, Watch, wsgi_environ

Call = Callable[[], Any]
BELOW = 50  # spans below one root, where what is measured is a call inside a trace


def often(call: Call, number: int) -> Watch:
    """Do it so many times."""
    with Watch() as watch:
        for _ in range(number):
            call()
    return watch


# The floor: what one span of the SDK takes when it is used as its documentation has it.


def floor_cases() -> dict[str, Call]:
    """One span with eight attributes, made current, ended, given to a batch processor whose exporter drops."""
    from opentelemetry import context, trace
    from opentelemetry.trace import SpanKind

    from benchmarks.peers import ATTRIBUTES, set_provider

    set_provider()
    tracer = trace.get_tracer("bench")

    def span() -> None:
        one = tracer.start_span("GET /users/{user_id}", kind=SpanKind.SERVER, attributes=ATTRIBUTES)
        token = context.attach(trace.set_span_in_context(one))
        context.detach(token)
        one.end()

    return {"span": span, "nothing": lambda: None}


# One traced call: ours and MLflow's, by kind of function.


@dataclass
class Functions:
    """The same functions for both libraries; each takes and returns something small."""

    trace: Callable[..., Any]
    start_span: Callable[..., Any]

    def cases(self) -> dict[str, Call]:
        """Return what calls each of them."""
        loop = asyncio.new_event_loop()

        def run(make: Callable[[], Awaitable[Any]]) -> Call:
            return lambda: loop.run_until_complete(make())  # the loop's part is in the plain case, too

        plain, plain_coroutine, plain_method = self._plain()
        traced, traced_coroutine = self.trace(plain), self.trace(plain_coroutine)
        stream, async_stream = self.trace(_stream), self.trace(_async_stream)
        return {
            "plain function": lambda: plain("what is it", 4),
            "function": lambda: traced("what is it", 4),
            "plain coroutine": run(lambda: plain_coroutine("what is it", 4)),
            "coroutine": run(lambda: traced_coroutine("what is it", 4)),
            "plain method": plain_method,
            "method": self._method(),
            "plain generator": lambda: [*_stream(5)],
            "generator": lambda: [*stream(5)],
            "plain async generator": run(lambda: _all(_async_stream(5))),
            "async generator": run(lambda: _all(async_stream(5))),
            "plain exception": _failing(_fail),
            "exception": _failing(self.trace(_fail)),
            "with": self._with,
            "nothing": lambda: None,
        }

    def _plain(self) -> tuple[Any, Any, Call]:
        def answer(question: str, k: int = 3) -> dict[str, Any]:
            return {"answer": question, "k": k}

        async def answer_later(question: str, k: int = 3) -> dict[str, Any]:
            return {"answer": question, "k": k}

        class Plain:
            def answer(self, question: str) -> str:
                return question

        one = Plain()
        return answer, answer_later, lambda: one.answer("what is it")

    def _method(self) -> Call:
        class Traced:
            @self.trace
            def answer(self, question: str) -> str:
                return question

        one = Traced()
        return lambda: one.answer("what is it")

    def _with(self) -> None:
        with self.start_span("retrieve") as span:
            span.set_inputs({"question": "what is it"})
            span.set_outputs({"answer": "this"})


def _stream(count: int) -> Iterator[str]:
    for number in range(count):
        yield f"part {number}"


async def _async_stream(count: int) -> AsyncIterator[str]:
    for number in range(count):
        yield f"part {number}"


async def _all(stream: AsyncIterator[str]) -> list[str]:
    return [part async for part in stream]


def _fail(question: str) -> None:
    raise ValueError(question)


def _failing(call: Callable[[str], None]) -> Call:
    def failing() -> None:
        try:
            call("what is it")
        except ValueError:
            return

    return failing


def tracemw_functions() -> Functions:
    """Ours."""
    from benchmarks.peers import configured

    tracemw = configured()
    return Functions(tracemw.trace, tracemw.start_span)


def mlflow_functions() -> Functions:
    """MLflow's."""
    from benchmarks.peers import configured_mlflow

    mlflow = configured_mlflow()
    return Functions(mlflow.trace, mlflow.start_span)


def measure_functions(functions: Functions) -> Measure:
    """Return what measures a case: as a trace of its own, or (`below ...`) as a span in a trace that is there."""
    cases = functions.cases()
    functions.start_span("warm").__enter__().end()

    def measure(case: str, number: int) -> Watch:
        kind, below, name = case.rpartition("below ")
        call = cases[name]
        if not below:
            return often(call, number)
        total = Watch()
        for _ in range(max(1, number // BELOW)):
            with functions.start_span("parent"):
                part = often(call, BELOW)
            total.wall, total.cpu = total.wall + part.wall, total.cpu + part.cpu
        scale = number / (max(1, number // BELOW) * BELOW)
        total.wall, total.cpu = total.wall * scale, total.cpu * scale
        return total

    return measure


# Capture, identity.


@dataclass
class Document:
    """What a retriever returns."""

    text: str
    score: float
    source: dict[str, str]


def capture_values() -> dict[str, Any]:
    """Return values of the kinds that functions take and return."""
    document = Document("the quick brown fox " * 5, 0.87, {"file": "a.md", "line": "12"})
    chat = {"model": "local", "messages": [{"role": "user", "content": "what is it? " * 20}] * 4}
    values: dict[str, Any] = {
        "None": None,
        "number": 42,
        "short text": "what is it",
        "text of 10 kB": "x" * 10_000,
        "small dict": {"question": "what is it", "k": 4},
        "dict to be redacted": {"user": "jane", "api_key": "sk-1234567890", "k": 4},
        "chat messages": chat,
        "dataclass": document,
        "20 dataclasses": [document] * 20,
        "list of 1,000 floats": [number / 7 for number in range(1000)],
        "nested 20 deep": _nested(20),
        "datetime": datetime(2025, 6, 1, 12, 30),
        "bytes of 1 MB": b"x" * 1_000_000,
        "list of 1,000,000": list(range(1_000_000)),
        "any object": object(),
    }
    try:
        from pydantic import create_model
    except ImportError:
        return values
    model: Any = create_model("Item", name=(str, ...), price=(float, ...), tags=(list[str], ...))
    return {**values, "pydantic model": model(name="chair", price=9.5, tags=["a", "b"])}


def _nested(depth: int) -> Any:
    value: Any = "bottom"
    for _ in range(depth):
        value = {"inner": [value]}
    return value


def capture_cases() -> dict[str, Call]:
    """JSON text of each kind of value, and what `json.dumps` takes where it can do it."""
    import json

    from tracemw.capture import dumps

    cases: dict[str, Call] = {}
    for name, value in capture_values().items():
        cases[name] = lambda value=value: dumps(value)  # type: ignore[misc]
        cases[f"json {name}"] = lambda value=value: json.dumps(value, default=repr)  # type: ignore[misc]
    return cases


def identity_cases() -> dict[str, Call]:
    """Headers in, ids out."""
    from tracemw.identity import IdentityReader

    reader, environ = IdentityReader(), wsgi_environ()
    bare = [(name, value) for name, value in HEADERS if not name.startswith(b"x-")]
    traceparent = (b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    invalid = [*bare, (b"x-request-id", b"a\x00b"), (b"x-user-id", b"u" * 300)]
    many = [(b"x-header-%d" % number, b"value") for number in range(50)]

    def read(headers: list[tuple[bytes, bytes]]) -> object:
        return reader.identity_of(reader.values_in_asgi(headers))

    return {
        "three headers, ASGI": lambda: read(HEADERS),
        "three headers, WSGI": lambda: reader.identity_of(reader.values_in_environ(environ)),
        "no headers: one made": lambda: read(bare),
        "with traceparent": lambda: read([*HEADERS, traceparent]),
        "fifty other headers": lambda: read([*HEADERS, *many]),
        "invalid ones": lambda: read(invalid),
        "nothing": lambda: None,
    }


def names() -> dict[str, list[str]]:
    """Return the cases that depend on what is installed."""
    return {"capture": [*capture_cases()], "identity": [*identity_cases()]}


def prepare(name: str) -> Measure:
    """Return what measures a library's cases."""
    if name == "tracemw":
        return measure_functions(tracemw_functions())
    if name == "mlflow":
        return measure_functions(mlflow_functions())
    cases = {"floor": floor_cases, "capture": capture_cases, "identity": identity_cases}[name]()
    for call in cases.values():
        call()
    return lambda case, number: often(cases[case], number)
