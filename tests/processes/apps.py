"""Small applications for servers in tests. With WARM_UP set, a trace is recorded when the module is imported."""

from __future__ import annotations

import os
from typing import Any

from fastapi import FastAPI
from flask import Flask

import tracemw


@tracemw.trace
def work(number: int) -> int:
    """A traced function."""
    return number + 1


if os.environ.get("WARM_UP"):
    with tracemw.start_span("warm-up"):
        work(0)

fastapi_app = FastAPI()
fastapi_app.add_middleware(tracemw.TraceMiddleware)


@fastapi_app.get("/work/{number}")
async def fastapi_work(number: int) -> dict[str, Any]:
    """Do some traced work."""
    return {"answer": work(number), "pid": os.getpid()}


flask_app = Flask(__name__)
flask_app.wsgi_app = tracemw.WSGITraceMiddleware(flask_app.wsgi_app)  # type: ignore[method-assign]


@flask_app.get("/work/<int:number>")
def flask_work(number: int) -> dict[str, Any]:
    """Do some traced work."""
    return {"answer": work(number), "pid": os.getpid()}
