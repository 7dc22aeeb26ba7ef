"""An invalid span made current inside a request does not tear its trace apart."""

from __future__ import annotations

from typing import Any

from opentelemetry import trace as otel

import tracemw
from tests.request.drive import ask
from tracemw.testing import capture_traces


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Does what older releases of OpenTelemetry do where an instrumentation has no provider."""
    with otel.use_span(otel.INVALID_SPAN):
        with tracemw.start_span("outer"), tracemw.start_span("inner"):
            pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body"})


def test_spans_below_an_invalid_one() -> None:
    """They are below the root: one trace for each request."""
    with capture_traces() as traces:
        ask(tracemw.TraceMiddleware(app))
    (trace,) = traces
    names = {span.span_id: span.name for span in trace.data.spans}
    assert {span.name: names.get(span.parent_id or "") for span in trace.data.spans} == {
        "GET": None,
        "outer": "GET",
        "inner": "outer",
    }
