"""How cost grows: spans, attributes, payload, streams at the same time, rows in the store.

As worker: NAME is what grows, the case is how much of it there is. `python -m benchmarks.growth` prints one JSON
value for what is no time of a worker: the memory of open streams, the store at several sizes.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import tracemalloc
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from benchmarks.worker import Measure, Watch, _receive, _send, asgi_scope

SIZES: dict[str, list[int]] = {
    "spans": [1, 10, 100, 1000],
    "spans-stored": [1, 10, 100, 1000],
    "attributes": [1, 10, 100, 1000],
    "payload": [100, 1_000, 10_000, 100_000, 1_000_000],
    "streams": [1, 10, 100, 1000],
}
UNITS = {
    "spans": "span in a request",
    "spans-stored": "span in a request, encoded and stored too",
    "attributes": "attribute set on a span",
    "payload": "character of an argument",
    "streams": "stream at the same time, of 10 parts",
}
PARTS = 10  # of one stream
STORE_SIZES = [1_000, 10_000, 100_000]


def _app(handler: Any, **settings: Any) -> Any:
    """Return an ASGI application, traced: no framework, so that only what grows is seen."""
    from benchmarks.peers import configured

    tracemw = configured(**settings)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await handler(tracemw, send)

    return tracemw.TraceMiddleware(app)


async def _finish(send: Any) -> None:
    await send({"type": "http.response.body", "body": b"done"})


def _in_turn(app_of: Any, **settings: Any) -> Measure:
    """Return what measures requests one after the other; `app_of(size)` is their handler."""
    loop = asyncio.new_event_loop()
    apps: dict[str, Any] = {}

    async def ask(app: Any, number: int) -> None:
        for _ in range(number):
            await app(asgi_scope(), _receive, _send)

    def measure(case: str, number: int) -> Watch:
        import tracemw

        if case not in apps:
            apps[case] = _app(app_of(int(case)), **settings)
            loop.run_until_complete(ask(apps[case], 3))
            tracemw.flush(delivered=False)
        with Watch() as watch:
            loop.run_until_complete(ask(apps[case], number))
            if settings:
                tracemw.flush(delivered=False)
        return watch

    return measure


def _spans(size: int) -> Any:
    import tracemw

    @tracemw.trace
    def step(number: int) -> int:
        return number

    async def handler(_: Any, send: Any) -> None:
        for number in range(size):
            step(number)
        await _finish(send)

    return handler


def _attributes(size: int) -> Any:
    names = [f"key.{number}" for number in range(size)]

    async def handler(tracemw: Any, send: Any) -> None:
        with tracemw.start_span("one") as span:
            for name in names:
                span.set_attribute(name, "value")
        await _finish(send)

    return handler


def _payload(size: int) -> Any:
    import tracemw

    document = {"text": "x" * size}

    @tracemw.trace
    def read(document: dict[str, str]) -> int:
        return len(document)

    async def handler(_: Any, send: Any) -> None:
        read(document)
        await _finish(send)

    return handler


def _streams() -> Measure:
    """Return what measures streams: as many at the same time as the case says, their parts in turn."""
    loop = asyncio.new_event_loop()
    import tracemw

    @tracemw.trace
    async def parts() -> AsyncIterator[str]:
        for number in range(PARTS):
            await asyncio.sleep(0)
            yield f"part {number}"

    async def handler(_: Any, send: Any) -> None:
        async for part in parts():
            await send({"type": "http.response.body", "body": part.encode(), "more_body": True})
        await _finish(send)

    app = _app(handler)

    async def ask(size: int) -> None:
        await asyncio.gather(*(app(asgi_scope(), _receive, _send) for _ in range(size)))

    def measure(case: str, number: int) -> Watch:
        with Watch() as watch:
            for _ in range(number):
                loop.run_until_complete(ask(int(case)))
        return watch

    loop.run_until_complete(ask(10))
    return measure


def prepare(name: str) -> Measure:
    """Return what measures one kind of growth."""
    if name == "streams":
        return _streams()
    if name == "spans-stored":
        return _in_turn(_spans, destination="sqlite:///growth.db")
    return _in_turn({"spans": _spans, "attributes": _attributes, "payload": _payload}[name])


async def _open_streams(app: Any, number: int) -> float:
    """Return the bytes that one open stream takes."""
    gate, waiting = asyncio.Event(), []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            waiting.append(message)
            await gate.wait()

    tracemalloc.start()
    tasks = [asyncio.create_task(app(asgi_scope(), _receive, send)) for _ in range(number)]
    while len(waiting) < number:
        await asyncio.sleep(0)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    gate.set()
    await asyncio.gather(*tasks)
    return held / number


def stream_memory(number: int = 1000) -> dict[str, float]:
    """Return the kilobytes that one open stream takes in all, and the same application's without tracing."""

    async def handler(_: Any, send: Any) -> None:
        await _finish(send)

    traced = _app(handler)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(_open_streams(traced, 10))
    bare = loop.run_until_complete(_open_streams(traced.app, number))
    with_us = loop.run_until_complete(_open_streams(traced, number))
    return {"bare_kb": bare / 1024, "traced_kb": with_us / 1024}


def store_growth(size: int) -> dict[str, float]:
    """Return how the store does with so many traces: writing, asking, bytes."""
    from benchmarks.store import ingest, median
    from tracemw.store import open_store

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "store.db")
        store = open_store(f"sqlite:///{path}")
        rate, _ = ingest(lambda traces, spans: store.write(traces, spans), size, 512)
        search = partial(store.search, max_results=50, include_spans=False)
        row = {
            "traces": size,
            "spans_per_s": rate,
            "latest_ms": median(search),
            "filter_ms": median(partial(search, "metadata.app_version = '1.7.0'")),
        }
        store.close()
        return {**row, "bytes_per_trace": os.path.getsize(path) / size}


if __name__ == "__main__":
    sizes = STORE_SIZES[:2] if "--quick" in sys.argv else STORE_SIZES
    print(json.dumps({"streams": stream_memory(), "store": [store_growth(size) for size in sizes]}))
