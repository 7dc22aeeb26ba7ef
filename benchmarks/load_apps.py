"""What the servers serve under load: handlers that work for a millisecond; BENCH_PEER says what traces them.

`uvicorn --factory benchmarks.load_apps:asgi`, `gunicorn 'benchmarks.load_apps:wsgi()'`
"""

from __future__ import annotations

import os
import time
from typing import Any

ROUNDS = int(os.environ.get("BENCH_WORK", "10000"))


def work(rounds: int = ROUNDS) -> int:
    """Keep the processor busy, in Python: the same amount of work each time, not the same time."""
    total = 0
    for number in range(rounds):
        total += number & 7
    return total


def calibrate(seconds: float = 0.001) -> int:
    """Return how many rounds of the loop take that long here."""
    best = float("inf")
    for _ in range(200):
        began = time.process_time()
        work(10_000)
        best = min(best, time.process_time() - began)
    return int(seconds / best * 10_000)


SETTINGS: dict[str, dict[str, Any]] = {
    "tracemw": {"destination": "sqlite:///load.db"},
    "tracemw-unsampled": {"destination": "sqlite:///load.db", "sample_rate": 0.0},
}


def _tracemw() -> Any:
    """Return tracemw, configured as the peer says; None for the bare application."""
    from benchmarks.peers import configured

    peer = os.environ.get("BENCH_PEER", "bare")
    return None if peer == "bare" else configured(**SETTINGS[peer])


def asgi() -> Any:
    """Return a FastAPI application."""
    from fastapi import FastAPI

    app = FastAPI()

    @app.get("/users/{user_id}")
    async def user(user_id: int) -> dict[str, int]:
        return {"id": user_id, "sum": work()}

    if (tracemw := _tracemw()) is not None:
        app.add_middleware(tracemw.TraceMiddleware)

        @app.get("/spans/{number}")
        async def spans(number: int) -> dict[str, int]:
            for step in range(number):
                with tracemw.start_span("step", attributes={"step": step}):
                    pass
            return {"spans": number}

        @app.get("/stats")
        async def stats() -> Any:
            return tracemw.stats()

    return app


def wsgi() -> Any:
    """Return a Flask application."""
    from flask import Flask

    app = Flask("bench")

    @app.get("/users/<int:user_id>")
    def user(user_id: int) -> dict[str, int]:
        return {"id": user_id, "sum": work()}

    if (tracemw := _tracemw()) is not None:
        wrapped: Any = tracemw.WSGITraceMiddleware(app.wsgi_app)
        app.wsgi_app = wrapped  # type: ignore[method-assign]
    return app


if __name__ == "__main__":
    print(calibrate())
