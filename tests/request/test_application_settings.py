"""Options of a middleware hold for its application: what the process has set is the rest's."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import BackgroundTasks, FastAPI

import tracemw
from tests.request.drive import ask, ask_wsgi, environ, http_scope
from tracemw.errors import SettingError
from tracemw.testing import capture_traces


@tracemw.trace
def answer(question: str, iban: str) -> str:
    """A traced function."""
    return question.upper()


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Calls it."""
    answer("why?", iban="DE02120300000000202051")
    await send({"type": "http.response.start", "status": 500 if scope["path"] == "/fails" else 200, "headers": []})
    await send({"type": "http.response.body"})


def wsgi_app(env: Any, start_response: Any) -> Any:
    """Calls it, too."""
    answer("why?", iban="DE02120300000000202051")
    start_response("200 OK", [])
    return []


def test_secrets_of_one_application() -> None:
    """`redact` of a middleware masks in its requests' spans and query strings, and nowhere else."""
    with capture_traces() as traces:
        mine = tracemw.TraceMiddleware(app, redact=["iban"])
        ask(mine, http_scope(query_string=b"iban=DE02120300000000202051"))
        ask_wsgi(tracemw.WSGITraceMiddleware(wsgi_app, redact=["iban"]), environ()).read()
        ask(tracemw.TraceMiddleware(app))
    first, second, other = traces
    assert "DE02" not in first.to_json()
    assert "DE02" not in second.to_json()
    assert "DE02" in other.to_json()


def test_capture_of_one_application() -> None:
    """`capture_inputs`, `capture_outputs` and `span_processors` hold for the middleware that has them."""

    def mark(span: Any) -> None:
        span.set_attribute("team", "search")

    with capture_traces() as traces:
        ask(tracemw.TraceMiddleware(app, capture_inputs=False, capture_outputs=False, span_processors=[mark]))
        ask(tracemw.TraceMiddleware(app))
    mine, other = ((trace.search_spans(name="answer"))[0] for trace in traces)
    assert (mine.inputs, mine.outputs, mine.attributes["team"]) == (None, None, "search")
    assert other.outputs == "WHY?"
    assert "team" not in other.attributes


def test_kept_errors_of_one_application() -> None:
    """`keep_errors` of a middleware keeps its failed requests whole, at any rate."""
    with capture_traces() as traces:
        middleware = tracemw.TraceMiddleware(app, sample_rate=0.0, keep_errors=True)
        ask(middleware, http_scope("/fails"))
        ask(middleware, http_scope("/works"))
    assert [len(trace.data.spans) for trace in traces] == [2]


def test_metadata_of_one_application() -> None:
    """`metadata` of a middleware is on its traces."""
    with capture_traces() as traces:
        ask(tracemw.TraceMiddleware(app, metadata={"team": "search"}))
        ask(tracemw.TraceMiddleware(app))
    assert [trace.info.trace_metadata.get("team") for trace in traces] == ["search", None]


@pytest.mark.parametrize("middleware", [tracemw.TraceMiddleware, tracemw.WSGITraceMiddleware])
@pytest.mark.parametrize("option", [{"destination": "none:"}, {"max_age": 5}, {"span_name_suffixes": False}])
def test_what_holds_for_the_process(middleware: Any, option: dict[str, Any]) -> None:
    """What one application cannot have for itself is refused, with the place where it belongs."""
    with pytest.raises(SettingError, match=r"whole process: give it to tracemw\.configure"):
        middleware(app, **option)


def test_work_after_the_response_is_not_its_preview() -> None:
    """A traced background task does not become what the request's previews tell of."""
    fastapi_app = FastAPI()
    fastapi_app.add_middleware(tracemw.TraceMiddleware)

    @fastapi_app.get("/x")
    def handler(tasks: BackgroundTasks) -> str:
        tasks.add_task(answer, "why?", iban="x")
        return "done"

    with capture_traces() as traces:
        ask(fastapi_app, http_scope("/x"))
    assert (traces[0].info.request_preview, traces[0].info.response_preview) == ("GET /x", "200")
    assert traces[0].search_spans(name="answer")
