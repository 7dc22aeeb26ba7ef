"""What code inside a request that is not recorded finds: whose it is, and nothing that would be recorded."""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Generator, Iterator
from typing import Any
from wsgiref.util import FileWrapper

import pytest
from opentelemetry import propagate
from opentelemetry import trace as otel

import tracemw
from tests.request.drive import Conversation, ask, ask_wsgi, environ, http_scope
from tracemw.logging import TraceContextFilter
from tracemw.request import KEY
from tracemw.testing import capture_traces

HEADERS = [(b"x-request-id", b"r-1"), (b"x-session-id", b"s-1"), (b"x-user-id", b"claimed")]
OPTIONS: dict[str, dict[str, Any]] = {"excluded": {"exclude": ["/", "/*"]}, "not sampled": {"sample_rate": 0.0}}


@pytest.fixture(params=OPTIONS)
def options(request: Any) -> Iterator[dict[str, Any]]:
    """Options by which nothing is recorded."""
    with capture_traces() as traces:
        yield OPTIONS[request.param]
        assert list(traces) == []


def whose() -> tuple[Any, ...]:
    """What the code that runs knows of its request."""
    now = tracemw.current_request
    return now.client_request_id, now.session_id, now.user_id, now.trace_id


async def answer(send: Any) -> None:
    """The smallest response."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x"})


def test_ids(options: dict[str, Any]) -> None:
    """The headers tell whose request it is; from the response on server code wins, and what code sets always."""
    seen: list[Any] = []
    before = tracemw.stats()["failures"]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(whose())
        scope["account"] = "jane"
        await answer(send)
        seen.append(whose())
        tracemw.update_current_trace(user="root", session_id="s-2", client_request_id="r-2", tags={"a": "b"})
        seen.append(whose())

    ask(tracemw.TraceMiddleware(app, user=lambda scope: scope["account"], **options), http_scope(headers=HEADERS))
    assert seen == [
        ("r-1", "s-1", "claimed", None),
        ("r-1", "s-1", "jane", None),
        ("r-2", "s-2", "root", None),
    ]
    assert tracemw.stats()["failures"] == before


def test_ids_on_wsgi(options: dict[str, Any]) -> None:
    """Likewise; and the server's access line, written after all, still has them."""
    seen: list[Any] = []

    def app(env: Any, start_response: Any) -> Any:
        seen.append(whose())
        env["account"] = "jane"
        start_response("200 OK", [])
        env.pop("account")
        yield b"x"
        seen.append(whose())

    env = environ(HTTP_X_REQUEST_ID="r-1", HTTP_X_SESSION_ID="s-1", HTTP_X_USER_ID="claimed")
    ask_wsgi(tracemw.WSGITraceMiddleware(app, user=lambda env: env["account"], **options), env).read()
    assert seen == [("r-1", "s-1", "claimed", None), ("r-1", "s-1", "jane", None)]
    assert str(env[KEY]) == "trace_id=- client_request_id=r-1 session_id=s-1 user_id=jane"


def test_facts_do_not_make_a_claim_true(options: dict[str, Any]) -> None:
    """Who sets other facts of the trace has not said whose request it is: server code still wins."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        tracemw.update_current_trace(metadata={"a": "b"}, tags={"c": "d"})
        tracemw.update_current_trace(metadata={"mlflow.trace.session": "s-2"})
        await answer(send)
        seen.append(whose())

    ask(tracemw.TraceMiddleware(app, user=lambda scope: "jane", **options), http_scope(headers=HEADERS))
    assert seen == [("r-1", "s-2", "jane", None)]


def test_the_user_is_asked_for_once(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """However often somebody wants to know, and though the `user` option writes log lines with the user's id."""
    asked: list[Any] = []
    caplog.handler.addFilter(TraceContextFilter())

    def user(scope: Any) -> None:
        asked.append(scope["path"])
        logging.warning("who is it?")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answer(send)
        for _ in range(3):
            logging.warning("it is %s", tracemw.current_request.user_id)

    ask(tracemw.TraceMiddleware(app, user=user, **options), http_scope(headers=HEADERS))
    assert asked == ["/"]
    assert [record.user_id for record in caplog.records] == ["claimed"] * 4  # type: ignore[attr-defined]


def test_the_user_is_known_afterwards(options: dict[str, Any]) -> None:
    """Also where nobody wanted to know it while the request ran."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answer(send)

    scope = http_scope(headers=HEADERS)
    ask(tracemw.TraceMiddleware(app, user=lambda scope: "jane", **options), scope)
    assert scope[KEY].record.user_id == "jane"


def test_the_user_of_an_error_page(options: dict[str, Any]) -> None:
    """An application that begins its answer anew may know the user only then."""

    def app(env: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        env["account"] = "jane"
        start_response("500 Oops", [], (ValueError, ValueError("boom"), None))
        return [b""]

    env = environ(HTTP_X_USER_ID="claimed")
    middleware = tracemw.WSGITraceMiddleware(app, user=lambda env: env.get("account"), **options)
    assert ask_wsgi(middleware, env).headers[-1][0] == "X-Request-Id"
    assert env[KEY].user_id == "jane"


@pytest.mark.parametrize("given", [b"", b"  ", b"x" * 129, b"a\nb", b"\xff"])
def test_a_request_id_is_made(given: bytes, options: dict[str, Any]) -> None:
    """Where none came that can be used, one is made: the same inside, on the response, and ever after."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(tracemw.current_request.client_request_id)
        await answer(send)
        seen.append(tracemw.current_request.client_request_id)

    for headers in ([(b"x-request-id", given)], []):
        seen.clear()
        response = ask(tracemw.TraceMiddleware(app, **options), http_scope(headers=headers))
        assert seen == [response.headers[b"x-request-id"].decode()] * 2
        assert len(seen[0]) == 32


def test_several_headers_by_precedence(options: dict[str, Any]) -> None:
    """Where several headers may tell the request's id, the first one in the setting wins here, too."""
    headers = [(b"x-other-id", b"second"), (b"x-first-id", b"first")]
    app = tracemw.TraceMiddleware(
        lambda scope, receive, send: answer(send), request_id_header=["X-First-ID", "X-Other-ID"], **options
    )
    assert ask(app, http_scope(headers=headers)).headers[b"x-request-id"] == b"first"


@pytest.mark.parametrize("of_the_application", [None, b"mine"])
def test_headers(of_the_application: bytes | None, options: dict[str, Any]) -> None:
    """The response gets the request's id once, and nothing where that is switched off."""
    sent = [] if of_the_application is None else [(b"X-Request-Id", of_the_application)]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": iter(sent)})
        await send({"type": "http.response.body", "body": b"x"})

    response = ask(tracemw.TraceMiddleware(app, **options), http_scope(headers=HEADERS))
    assert response.sent[0]["headers"] == (sent or [(b"x-request-id", b"r-1")])
    quiet = ask(tracemw.TraceMiddleware(app, response_headers=False, **options), http_scope(headers=HEADERS))
    assert list(quiet.sent[0]["headers"]) == sent


def test_services_that_are_called(options: dict[str, Any]) -> None:
    """They get a `traceparent` that says that nothing is sampled: one for the request, another for the next."""
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(2):
            carrier: dict[str, str] = {}
            propagate.inject(carrier)
            seen.append(carrier["traceparent"])
        assert not otel.get_current_span().is_recording()
        assert repr(otel.get_current_span())
        await answer(send)

    middleware = tracemw.TraceMiddleware(app, **options)
    ask(middleware)
    ask(middleware)
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert all(one.endswith("-00") for one in seen)


def test_a_second_middleware_inside(options: dict[str, Any]) -> None:
    """It takes part in the request that is there: it opens none, and its `user` is asked as well."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answer(send)
        seen.append(whose())

    inner = tracemw.TraceMiddleware(app, user=lambda scope: "jane")
    response = ask(tracemw.TraceMiddleware(inner, **options), http_scope(headers=HEADERS))
    assert seen == [("r-1", "s-1", "jane", None)]
    assert [name for name, _ in response.sent[0]["headers"]] == [b"x-request-id"]

    def wsgi(env: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return [b"x"]

    inner_wsgi = tracemw.WSGITraceMiddleware(wsgi, user=lambda env: "jane")
    said = ask_wsgi(tracemw.WSGITraceMiddleware(inner_wsgi, **options), environ(HTTP_X_REQUEST_ID="r-1"))
    assert said.headers == [("X-Request-Id", "r-1")]


VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="")


def test_a_body_that_is_made_later_is_inside(options: dict[str, Any]) -> None:
    """Parts of a WSGI body and its `close` run in the request's context, and leave nothing on the thread."""
    seen: list[Any] = []

    class Body:
        def __iter__(self) -> Iterator[bytes]:
            for part in (b"a", b"b"):
                seen.append(tracemw.current_request.client_request_id)
                VARIABLE.set("changed")
                yield part

        def __len__(self) -> int:
            return 2

        def close(self) -> None:
            seen.append(("closed", tracemw.current_request.client_request_id))

    def app(env: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return Body()

    said = ask_wsgi(tracemw.WSGITraceMiddleware(app, **options), environ(HTTP_X_REQUEST_ID="r-1"))
    assert len(said.body) == 2
    assert said.read() == b"ab"
    assert seen == ["r-1", "r-1", ("closed", "r-1")]
    assert [VARIABLE.get(), bool(tracemw.current_request)] == ["", False]


def test_a_list_of_its_own_kind(options: dict[str, Any]) -> None:
    """A list with a `close` is no mere list: it runs inside, once."""
    seen: list[Any] = []

    class Parts(list[bytes]):
        def close(self) -> None:
            seen.append(tracemw.current_request.client_request_id)

    def app(env: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return Parts([b"a", b"b"])

    said = ask_wsgi(tracemw.WSGITraceMiddleware(app, **options), environ(HTTP_X_REQUEST_ID="r-1"))
    assert said.read() == b"ab"
    said.body.close()
    assert seen == ["r-1"]


def test_a_body_that_is_there_is_left_alone(options: dict[str, Any]) -> None:
    """A list is what the application returned, and a file stays one that the server may hand to the kernel."""
    parts, file = [b"a", b"b"], open(__file__, "rb")
    bodies = {"/parts": parts, "/file": FileWrapper(file)}

    def app(env: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return bodies[env["PATH_INFO"]]

    middleware = tracemw.WSGITraceMiddleware(app, **options)
    with file:
        for path, body in bodies.items():
            env = environ(path) | {"wsgi.file_wrapper": FileWrapper}
            assert ask_wsgi(middleware, env).body is body


def test_a_file_of_a_function(options: dict[str, Any]) -> None:
    """Also where the server's `wsgi.file_wrapper` is a function, not a class."""
    made: list[Any] = []

    def wrapper(file: Any) -> Any:
        made.append(iter([b"x"]))
        return made[-1]

    def app(env: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return env["wsgi.file_wrapper"](None)

    said = ask_wsgi(tracemw.WSGITraceMiddleware(app, **options), environ() | {"wsgi.file_wrapper": wrapper})
    assert said.body is made[0]


def test_dropped(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """A request that nobody waits for any more may be closed by the garbage collector, in whatever context."""

    class Never:
        def __await__(self) -> Generator[None, None, None]:
            yield

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await Never()

    conversation = Conversation()
    coroutine = tracemw.TraceMiddleware(app, **options)(http_scope(), conversation.receive, conversation.send)
    contextvars.copy_context().run(coroutine.send, None)
    with caplog.at_level(logging.WARNING):
        coroutine.close()
    assert caplog.records == []
