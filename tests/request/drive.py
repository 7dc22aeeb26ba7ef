"""Drives ASGI and WSGI applications by hand, message by message, as a server would."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

Message = dict[str, Any]


def http_scope(
    path: str = "/", method: str = "GET", headers: Iterable[tuple[bytes, bytes]] = (), **more: Any
) -> Any:
    """An ASGI HTTP scope."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("utf-8", "replace"),
        "query_string": b"",
        "root_path": "",
        "headers": list(headers),
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 80),
        **more,
    }


def websocket_scope(path: str = "/ws") -> Any:
    """An ASGI WebSocket scope."""
    scope = http_scope(path)
    del scope["method"]
    return {**scope, "type": "websocket", "scheme": "ws", "subprotocols": []}


class Conversation:
    """One ASGI connection: what the application receives, and what it sent."""

    def __init__(self, messages: Iterable[Message] = ({"type": "http.request"},)) -> None:
        self.incoming = list(messages)
        self.sent: list[Message] = []
        self.on_send: Callable[[Message], Awaitable[None]] | None = None

    async def receive(self) -> Message:
        """Return the next message; after the last one, wait for ever as a silent client would."""
        if not self.incoming:
            await asyncio.Event().wait()
        return self.incoming.pop(0)

    async def send(self, message: Any) -> None:
        """Keep what the application sends."""
        self.sent.append(dict(message))
        if self.on_send is not None:
            await self.on_send(message)

    @property
    def status(self) -> int:
        """Status of the response."""
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        """Headers of the response."""
        return dict(self.sent[0]["headers"])

    @property
    def body(self) -> bytes:
        """The whole body."""
        return b"".join(m.get("body", b"") for m in self.sent if m["type"] == "http.response.body")


def ask(
    app: Any, scope: Any | None = None, messages: Iterable[Message] = ({"type": "http.request"},)
) -> Conversation:
    """Send one request to an ASGI application and return the conversation."""
    conversation = Conversation(messages)
    asyncio.run(app(http_scope() if scope is None else scope, conversation.receive, conversation.send))
    return conversation


def environ(path: str = "/", method: str = "GET", **more: Any) -> dict[str, Any]:
    """A WSGI environ, as wsgiref makes it."""
    from wsgiref.util import setup_testing_defaults

    made: dict[str, Any] = {"PATH_INFO": path, "REQUEST_METHOD": method, **more}
    setup_testing_defaults(made)
    return made


class WSGIAnswer:
    """What a WSGI application answered; `body` is the iterable as the server gets it."""

    def __init__(self) -> None:
        self.status = ""
        self.headers: list[tuple[str, str]] = []
        self.body: Any = None
        self.written: list[bytes] = []

    def start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        """The server's side of `start_response`."""
        self.status, self.headers = status, headers
        return self.written.append

    def read(self) -> bytes:
        """Consume and close the body, as a server does."""
        try:
            return b"".join(self.body)
        finally:
            if hasattr(self.body, "close"):
                self.body.close()


def ask_wsgi(app: Any, env: dict[str, Any] | None = None) -> WSGIAnswer:
    """Call a WSGI application; the body is not consumed yet."""
    answer = WSGIAnswer()
    answer.body = app(environ() if env is None else env, answer.start_response)
    return answer
