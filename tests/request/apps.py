"""Applications for real servers; the store is where TRACEMW_DESTINATION says."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar
from typing import Any

from fastapi import BackgroundTasks, FastAPI, Request, WebSocket
from fastapi.responses import FileResponse, StreamingResponse
from flask import Flask, request
from flask import send_file as flask_file
from opentelemetry import trace as otel

import tracemw
import tracemw.logging

PARTS = 50
PAUSE = 0.02

seen: ContextVar[str] = ContextVar("seen", default="nothing")
FILE = os.environ.get("FILE", "")

if os.environ.get("LOG_IDS"):
    tracemw.logging.install("uvicorn.access", append=True)


def ids() -> dict[str, Any]:
    """What the running code is told of its request, and what an earlier one has left behind."""
    before = seen.get()
    seen.set(str(tracemw.current_request.client_request_id))
    return {
        "request": tracemw.current_request.client_request_id,
        "trace": tracemw.current_request.trace_id,
        "span": f"{otel.get_current_span().get_span_context().trace_id:032x}",
        "before": before,
    }


async def async_parts() -> AsyncIterator[bytes]:
    """A slow stream with a span in each part."""
    for i in range(PARTS):
        with tracemw.start_span(f"part {i}"):
            await asyncio.sleep(PAUSE)
        yield b"x" * 100


def sync_parts() -> Iterator[bytes]:
    """The same without a coroutine."""
    for i in range(PARTS):
        with tracemw.start_span(f"part {i}"):
            time.sleep(PAUSE)
        yield b"x" * 100


fastapi_app = FastAPI()
fastapi_app.add_middleware(tracemw.TraceMiddleware, exclude=["/quiet"])


@fastapi_app.get("/ids")
@fastapi_app.get("/quiet")
async def fastapi_ids() -> dict[str, Any]:
    """Tell the ids."""
    return ids()


@fastapi_app.post("/upload")
async def fastapi_upload(request: Request) -> dict[str, Any]:
    """Read the whole body."""
    return {"size": len(await request.body()), **ids()}


@fastapi_app.get("/stream/{kind}")
async def fastapi_stream(kind: str) -> StreamingResponse:
    """Send parts slowly."""
    return StreamingResponse(async_parts() if kind == "async" else sync_parts())


@fastapi_app.get("/file")
async def fastapi_file() -> FileResponse:
    """Send a file."""
    return FileResponse(FILE)


@fastapi_app.get("/broken")
async def fastapi_broken() -> None:
    """Fail."""
    raise ValueError("boom")


@fastapi_app.get("/task")
async def fastapi_task(tasks: BackgroundTasks) -> dict[str, Any]:
    """Go on after the response."""
    tasks.add_task(time.sleep, 0.3)
    return {}


@fastapi_app.websocket("/socket")
async def fastapi_socket(socket: WebSocket) -> None:
    """Echo until the client goes."""
    await socket.accept()
    while True:
        text = await socket.receive_text()
        with tracemw.start_span("message"):
            await socket.send_text(text)


flask_app = Flask(__name__)
flask_app.logger.setLevel(logging.CRITICAL)
flask_app.wsgi_app = tracemw.WSGITraceMiddleware(  # type: ignore[method-assign]
    flask_app.wsgi_app, exclude=["/quiet"]
)


@flask_app.get("/ids")
@flask_app.get("/quiet")
def flask_ids() -> dict[str, Any]:
    """Tell the ids, after a while."""
    time.sleep(float(request.args.get("sleep", 0)))
    return ids()


@flask_app.post("/upload")
def flask_upload() -> dict[str, Any]:
    """Read the whole body."""
    return {"size": len(request.get_data()), **ids()}


@flask_app.get("/stream/<kind>")
def flask_stream(kind: str) -> Any:
    """Send parts slowly."""
    return flask_app.response_class(sync_parts())


@flask_app.get("/file")
def flask_send_file() -> Any:
    """Send a file."""
    return flask_file(FILE)


@flask_app.get("/broken")
def flask_broken() -> str:
    """Fail."""
    raise ValueError("boom")


@flask_app.get("/empty/<int:status>")
def flask_empty(status: int) -> Any:
    """Answer without a body."""
    return "", status
