"""A request's root is a span like others to those who ask for the last trace, or process spans."""

from __future__ import annotations

from typing import Any

import tracemw
from tests.request.drive import ask, ask_wsgi
from tracemw.testing import capture_traces


async def asgi_app(scope: Any, receive: Any, send: Any) -> None:
    """The smallest application."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body"})


def wsgi_app(environ: Any, start_response: Any) -> Any:
    """The smallest application."""
    start_response("200 OK", [])
    return []


def test_the_last_trace() -> None:
    """`get_last_active_trace_id` tells the trace of the request that ended last."""
    with capture_traces() as traces:
        ask(tracemw.TraceMiddleware(asgi_app))
        assert tracemw.get_last_active_trace_id() == traces[0].info.trace_id
        ask_wsgi(tracemw.WSGITraceMiddleware(wsgi_app)).read()
        assert tracemw.get_last_active_trace_id(thread_local=True) == traces[1].info.trace_id


def test_span_processors_see_roots() -> None:
    """What `span_processors` put onto spans is on the roots of requests, too."""

    def mark(span: Any) -> None:
        span.set_attribute("team", "search")

    with capture_traces(span_processors=[mark]) as traces:
        ask(tracemw.TraceMiddleware(asgi_app))
    assert traces[0].data.spans[0].attributes["team"] == "search"
