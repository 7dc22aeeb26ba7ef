"""What a test looks at of a trace."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tracemw
from tests.request.drive import Conversation, ask, http_scope


def tree(trace: tracemw.Trace) -> dict[str, Any]:
    """Names of spans in one another, but for that of a response's aftermath: a busy machine may make one."""
    spans = [span for span in trace.data.spans if span.name != "background work"]
    ids = {span.span_id for span in spans}
    assert all(span.parent_id is None or span.parent_id in ids for span in spans), "an orphan"

    def below(parent: str | None) -> dict[str, Any]:
        return {span.name: below(span.span_id) for span in spans if span.parent_id == parent}

    return below(None)


def trees(traces: Iterable[tracemw.Trace]) -> list[dict[str, Any]]:
    """The trees of all traces."""
    return [tree(trace) for trace in traces]


def root(trace: tracemw.Trace) -> tracemw.Span:
    """The root span."""
    return next(span for span in trace.data.spans if span.parent_id is None)


def exceptions(trace: tracemw.Trace) -> dict[str, int]:
    """Span name -> how many exceptions are recorded on it."""
    found = {s.name: sum(event.name == "exception" for event in s.events) for s in trace.data.spans}
    return {name: number for name, number in found.items() if number}


def get(app: Any, path: str, method: str = "GET", **scope: Any) -> Conversation:
    """Send one request to an ASGI application; what it raises, a server would log."""
    try:
        return ask(app, http_scope(path, method, **scope))
    except Exception:
        return Conversation()


def wsgi_get(app: Any, path: str, method: str = "GET", **environ: Any) -> tuple[int, bytes]:
    """Send one request to a WSGI application and close the response."""
    from werkzeug.test import Client

    response = Client(app).open(path, method=method, **environ)
    try:
        return response.status_code, response.get_data()
    finally:
        response.close()
