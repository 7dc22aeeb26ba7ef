"""A long run: requests of all kinds, none of them lost, and no memory kept.

    python -m benchmarks.soak                    200,000 requests, a few minutes
    python -m benchmarks.soak --requests 20000   fewer

Ends with exit code 1 if a request is unaccounted for, or memory grows.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import tracemw
from tracemw import pipeline

AT_ONCE = 100  # requests under way at any time
TURN = 2_000  # requests between two looks
WARM_UP = 0.2  # share of the requests after which memory has to stay
NOISE = 8 * 2**20  # bytes that memory may differ by: pages of SQLite, what the allocator keeps

Send = Callable[[Any], Awaitable[None]]
random_ = random.Random(1)


class Failed(Exception):
    """What a request fails with."""


@tracemw.trace
def work(number: int) -> int:
    """A traced function."""
    return number + 1


# What the applications do, by the path.


async def asgi(scope: Any, receive: Any, send: Send) -> None:
    """Answers, streams, fails, waits for ever or goes on after its response."""
    kind = scope["path"]
    work(1)
    if kind == "/fails":
        raise Failed
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if kind in ("/stream", "/left", "/cancelled"):
        for i in range(3):
            with tracemw.start_span("part"):
                await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": b"x" * 100, "more_body": True})
            if kind == "/left" and i == 1:
                assert (await receive())["type"] == "http.disconnect"
                return
            if kind == "/cancelled" and i == 1:
                await asyncio.Event().wait()
    await send({"type": "http.response.body", "body": b"end"})
    if kind == "/background":
        await asyncio.sleep(0.001)
        tracemw.update_current_trace(tags={"late": "yes"})
        work(2)


def wsgi(environ: Any, start_response: Any) -> Any:
    """Answers, streams or fails."""
    kind = environ["PATH_INFO"]
    work(1)
    if kind == "/fails":
        raise Failed
    start_response("200 OK", [])
    return parts() if kind in ("/stream", "/left", "/dropped") else [b"end"]


def parts() -> Iterator[bytes]:
    """A body."""
    for _ in range(3):
        with tracemw.start_span("part"):
            pass
        yield b"x" * 100


ASGI_KINDS = ("/", "/", "/", "/stream", "/left", "/cancelled", "/fails", "/background", "/health", "/sampled")
WSGI_KINDS = ("/", "/stream", "/left", "/dropped", "/fails", "/health")


class Site:
    """The applications with the middlewares around them, and a server that sends requests."""

    def __init__(self) -> None:
        self.asgi = tracemw.TraceMiddleware(asgi)
        self.sampled = tracemw.TraceMiddleware(asgi, sample_rate=0.5)
        self.wsgi = tracemw.WSGITraceMiddleware(wsgi)
        self.sent: Counter[str] = Counter()

    async def send_many(self, number: int) -> None:
        """Send so many requests, `AT_ONCE` at a time."""
        for _ in range(0, number, AT_ONCE):
            await asyncio.gather(*(self._send() for _ in range(AT_ONCE)))

    async def _send(self) -> None:
        if random_.random() < 0.3:
            self._send_wsgi(random_.choice(WSGI_KINDS))
        else:
            await self._send_asgi(random_.choice(ASGI_KINDS))

    async def _send_asgi(self, kind: str) -> None:
        self.sent[f"asgi {kind}"] += 1
        cancelled = asyncio.Event()
        scope = {"type": "http", "method": "GET", "path": kind, "headers": [(b"x-user-id", b"jane")]}

        async def receive() -> Any:
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message.get("body") and kind == "/cancelled":
                cancelled.set()
            await asyncio.sleep(0)

        app = self.sampled if kind == "/sampled" else self.asgi
        task = asyncio.ensure_future(app(scope, receive, send))
        if kind == "/cancelled":
            await cancelled.wait()
            for _ in range(10):
                await asyncio.sleep(0)
            task.cancel()
        try:
            await task
        except (Failed, asyncio.CancelledError):
            pass

    def _send_wsgi(self, kind: str) -> None:
        self.sent[f"wsgi {kind}"] += 1
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": kind, "HTTP_X_USER_ID": "jane"}
        try:
            body: Any = self.wsgi(environ, lambda status, headers: None)
        except Failed:
            return
        if kind in ("/left", "/dropped"):
            next(iter(body))
        else:
            for _ in body:
                pass
        if kind != "/dropped" and hasattr(body, "close"):
            body.close()


def memory() -> int:
    """Bytes of this process that are in memory, after a collection."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def soak(requests: int, folder: Path, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Send requests of all kinds.

    Args:
        requests: How many.
        folder: Where the store is made.
        say: Called with a line now and then.

    Returns:
        `unaccounted` and `grown_bytes`, both of which should be nothing, and what they are made of.
    """
    tracemw.configure(destination=f"sqlite:///{folder}/soak.db")
    site = Site()
    samples: list[tuple[int, int]] = []
    began = time.perf_counter()
    for done in range(TURN, requests + 1, TURN):
        asyncio.run(site.send_many(TURN))
        tracemw.flush()  # what waits to be written is not what is looked for
        samples.append((done, memory()))
        say(f"{done:>8} requests {samples[-1][1] / 2**20:7.1f} MiB {time.perf_counter() - began:6.0f} s")
    stats = tracemw.stats()
    sink: Any = pipeline.current().sink
    stored = sink.store.stats()["traces"]
    counted = {name: stats.get(name, 0) for name in ("excluded", "sampled_out", "dropped", "held_back_dropped")}
    sent = sum(site.sent.values())
    return {
        "requests": sent,
        "stored": stored,
        **counted,
        "unaccounted": sent - stored - counted["excluded"] - counted["sampled_out"] - counted["dropped"],
        "failures": stats["failures"],
        "grown_bytes": grown(samples),
        "mib": [round(samples[int(len(samples) * WARM_UP)][1] / 2**20, 1), round(samples[-1][1] / 2**20, 1)],
        "seconds": round(time.perf_counter() - began, 1),
        "kinds": dict(sorted(site.sent.items())),
    }


def grown(samples: list[tuple[int, int]]) -> int:
    """Bytes by which memory grew after the warm-up: the median of the last quarter against that of the first."""
    after = [size for _, size in samples[int(len(samples) * WARM_UP) :]]
    quarter = max(1, len(after) // 4)
    return sorted(after[-quarter:])[quarter // 2] - sorted(after[:quarter])[quarter // 2]


def main(arguments: list[str] | None = None) -> int:
    """Run it and say how it went."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=200_000)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = soak(chosen.requests, Path(folder), lambda line: print(line, file=sys.stderr))
        tracemw.shutdown()
    print(json.dumps(found, indent=2))
    return 0 if found["unaccounted"] == 0 and found["grown_bytes"] < NOISE and not found["failures"] else 1


if __name__ == "__main__":
    sys.exit(main())
