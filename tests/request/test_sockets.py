"""WebSockets: one root from the handshake to the close, which says how it was closed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI, WebSocket
from starlette.websockets import WebSocketDisconnect

import tracemw
from tests.request.drive import Conversation, ask, websocket_scope
from tests.request.look import duration, names, parents, root
from tracemw.testing import capture_traces

CONNECT = {"type": "websocket.connect"}
Application = Callable[[WebSocket], Any]


def app_with(endpoint: Application) -> FastAPI:
    """An application with one socket."""
    app = FastAPI()
    app.add_middleware(tracemw.TraceMiddleware)
    app.add_api_websocket_route("/rooms/{room}", endpoint)
    return app


def talk(app: Any, *messages: dict[str, Any]) -> Conversation:
    """Connect, send messages, and return what came back; what the application raises goes to the server."""
    conversation = Conversation([CONNECT, *messages])
    try:
        asyncio.run(app(websocket_scope("/rooms/1"), conversation.receive, conversation.send))
    except (WebSocketDisconnect, ValueError) as exc:
        conversation.sent.append({"type": "raised", "what": type(exc).__name__})
    return conversation


def left_with(code: int, reason: str = "") -> dict[str, Any]:
    """What a server says when the client has gone."""
    return {"type": "websocket.disconnect", "code": code, "reason": reason}


async def echo(socket: WebSocket) -> None:
    """Echo until the client goes; as most applications do, without catching that."""
    await socket.accept()
    while True:
        text = await socket.receive_text()
        with tracemw.start_span("message"):
            await socket.send_text(text)


@pytest.mark.parametrize(
    ("code", "state", "outcome"),
    [
        (1000, "OK", "completed"),
        (1001, "OK", "completed"),
        (1005, "OK", "completed"),
        (4001, "OK", "completed"),
        (1012, "OK", "completed"),
        (1006, "STATE_UNSPECIFIED", "disconnected"),
        (1002, "ERROR", "error"),
        (1011, "ERROR", "error"),
    ],
)
def test_how_a_connection_ends(code: int, state: str, outcome: str) -> None:
    """The code decides; that the framework tells the application by an exception is no error."""
    with capture_traces(span_name_suffixes=False) as traces:
        conversation = talk(app_with(echo), {"type": "websocket.receive", "text": "a"}, left_with(code, "bye"))
    (trace,) = traces
    attributes = root(trace).attributes
    assert conversation.sent[1] == {"type": "websocket.send", "text": "a"}
    assert names(trace) == ["WS /rooms/{room}", "message"]
    assert parents(trace)["message"] == "WS /rooms/{room}"
    assert attributes["tracemw.websocket.close_code"] == code
    assert attributes["tracemw.websocket.close_reason"] == "bye"
    assert attributes["tracemw.websocket.messages_received"] == 1
    assert attributes["tracemw.websocket.messages_sent"] == 1
    assert attributes["http.response.status_code"] == 101
    assert attributes["tracemw.websocket.accept_ms"] >= 0
    assert (trace.info.state, attributes["tracemw.outcome"]) == (state, outcome)
    assert root(trace).events == []


@pytest.mark.parametrize(
    ("code", "status", "outcome"),
    [
        (1000, "OK", None),
        (1001, "OK", None),
        (1005, "OK", None),
        (4001, "OK", None),
        (1006, "UNSET", "disconnected"),
        (1011, "ERROR", None),
        (1002, "ERROR", None),
    ],
)
def test_the_handler_that_a_close_ends(code: int, status: str, outcome: str | None) -> None:
    """The usual loop ends with `WebSocketDisconnect`: an error on its span only where it is one on the root."""

    @tracemw.trace
    async def handler(socket: WebSocket) -> None:
        await echo(socket)

    with capture_traces() as traces:
        talk(app_with(handler), {"type": "websocket.receive", "text": "a"}, left_with(code))
    (trace,) = traces
    span = next(span for span in trace.data.spans if span.name == "handler")
    assert span.status.status_code.value == status
    assert span.attributes.get("tracemw.outcome") == outcome
    assert [event.name for event in span.events] == (["exception"] if status == "ERROR" else [])
    assert (root(trace).status.status_code.value == "ERROR") == (status == "ERROR")


def test_headers_of_the_handshake() -> None:
    """The accepted handshake tells the ids; not where that is switched off."""
    with capture_traces() as traces:
        conversation = talk(app_with(echo), left_with(1000))
        told = dict(conversation.sent[0]["headers"])
        silent = ask(
            tracemw.TraceMiddleware(app_with(echo), response_headers=False, exclude=[]), websocket_scope()
        )
    assert told[b"x-trace-id"].decode() == traces[0].info.trace_id
    assert [name for message in silent.sent for name, _ in message.get("headers", [])] == []


async def refuse(socket: WebSocket) -> None:
    """Close before accepting."""
    await socket.close(1008)


async def deny(socket: WebSocket) -> None:
    """Answer the handshake with a response of one's own."""
    await socket.send({"type": "websocket.http.response.start", "status": 401, "headers": []})
    await socket.send({"type": "websocket.http.response.body", "body": b"who"})


async def fail(socket: WebSocket) -> None:
    """Fail before accepting."""
    raise ValueError("boom")


async def fail_later(socket: WebSocket) -> None:
    """Fail in the middle."""
    await socket.accept()
    raise ValueError("boom")


async def ask_server_to_close(socket: WebSocket) -> None:
    """Close oneself."""
    await socket.accept()
    await socket.close(1000, "done")


@pytest.mark.parametrize(
    ("endpoint", "status", "state", "code"),
    [
        (refuse, 403, "OK", None),
        (deny, 401, "OK", None),
        (fail, None, "ERROR", None),
        (fail_later, 101, "ERROR", None),
        (ask_server_to_close, 101, "OK", 1000),
    ],
)
def test_handshakes_and_failures(endpoint: Application, status: int | None, state: str, code: int | None) -> None:
    """A refused handshake is its status, and as little an error as a 403; what the application raises is one."""
    with capture_traces() as traces:
        talk(app_with(endpoint))
    (trace,) = traces
    attributes = root(trace).attributes
    assert attributes.get("http.response.status_code") == status
    assert trace.info.state == state
    assert attributes.get("tracemw.websocket.close_code") == code
    assert [event.name for event in root(trace).events] == ["exception"] * (state == "ERROR")


def test_clean_up_after_the_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """The root lasts until the close; what goes on then is in the trace and holds nothing up."""
    monkeypatch.setattr("tracemw.request.GRACE", 0.02)
    seen = []

    async def lingering(socket: WebSocket) -> None:
        await socket.accept()
        with pytest.raises(WebSocketDisconnect):
            await socket.receive_text()
        await asyncio.sleep(0.3)
        seen.append(len(traces))

    with capture_traces() as traces:
        talk(app_with(lingering), left_with(1000))
    assert seen == [1]
    assert names(traces[0]) == ["WS /rooms/{room}", "background work"]
    assert duration(traces[0]) < 250


@pytest.mark.parametrize("message", [{}, {"code": None}, {"code": "odd"}])
def test_a_server_that_says_nothing_of_the_code(message: dict[str, Any]) -> None:
    """A server may send no code, or one that is none: the trace is there."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        assert (await receive())["type"] == "websocket.disconnect"

    with capture_traces() as traces:
        ask(tracemw.TraceMiddleware(app), websocket_scope(), [{"type": "websocket.disconnect", **message}])
    (trace,) = traces
    assert trace.info.state == "OK"
    if "odd" not in message.values():
        assert root(trace).attributes["tracemw.websocket.close_code"] == 1005


def test_a_server_that_raises_in_send() -> None:
    """Sending to nobody raises since ASGI 2.4: the client had gone."""

    async def endpoint(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text("to nobody")

    async def send(message: Any) -> None:
        if message["type"] == "websocket.send":
            raise OSError("gone")

    conversation = Conversation([CONNECT])
    with capture_traces() as traces, pytest.raises((OSError, WebSocketDisconnect)):
        asyncio.run(app_with(endpoint)(websocket_scope("/rooms/1"), conversation.receive, send))
    assert root(traces[0]).attributes["tracemw.outcome"] == "disconnected"
