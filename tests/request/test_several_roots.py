"""Several roots of one trace in one process: requests of one trusted caller, side by side or inside each other."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterable
from typing import Any

import pytest
from opentelemetry import trace as trace_api
from opentelemetry.context import Context

import tracemw
from tests.request.drive import Conversation, http_scope
from tests.request.look import named, root
from tests.servers import wait_for
from tracemw import propagation, provider, record
from tracemw.testing import capture_traces

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}


async def finish(send: Any) -> None:
    """Send the response."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body"})


def library_span(name: str) -> None:
    """Make a span in a context that knows the current span, and nothing of us."""
    context = trace_api.set_span_in_context(trace_api.get_current_span(), Context())
    provider.in_force().get_tracer("a library").start_span(name, context).end()


async def request(app: Any, path: str, headers: dict[str, str]) -> None:
    """Send a request with these headers, whose user and request id tell its path."""
    told = {**headers, "x-user-id": f"user of {path}", "x-request-id": path}
    talk, scope = Conversation(), http_scope(path, headers=[(k.encode(), v.encode()) for k, v in told.items()])
    await app(scope, talk.receive, talk.send)


def asked(app: Any, paths: Iterable[str]) -> None:
    """Send requests of one trace, all at the same time."""

    async def all_of_them() -> None:
        await asyncio.gather(*(request(app, path, CALLER) for path in paths))

    asyncio.run(all_of_them())


def by_path(trace: tracemw.Trace) -> dict[str, tracemw.Span]:
    """The roots of a trace."""
    return {span.attributes["url.path"]: span for span in trace.data.spans if "url.path" in span.attributes}


class Meeting:
    """An application of two requests: /1 begins first; which one ends first is to be said."""

    def __init__(self, ends_last: str) -> None:
        self.began, self.ended = asyncio.Event(), asyncio.Event()
        self.ends_last = ends_last

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        if path == "/2":
            await self.began.wait()
        with tracemw.start_span(f"work of {path}"):
            self.began.set()
            await asyncio.sleep(0)
            if path == self.ends_last:
                await self.ended.wait()
            tracemw.update_current_trace(tags={path: "tag"}, metadata={path: "m"})
            library_span(f"library in {path}")
        await finish(send)
        self.ended.set()


@pytest.mark.parametrize("ends_last", ["/1", "/2"])
def test_requests_of_one_trace_at_the_same_time(ends_last: str) -> None:
    """Each request has a root, facts and spans of its own; the trace has the first one's facts, and all tags."""
    with capture_traces() as traces:
        asked(tracemw.TraceMiddleware(Meeting(ends_last), trust_traceparent=True), ["/1", "/2"])
        (trace,) = traces
    assert trace.info.trace_id == f"tr-{TRACE}"
    assert trace.info.client_request_id == "/1"
    assert trace.info.trace_metadata["mlflow.trace.user"] == "user of /1"
    assert trace.info.tags["/1"] == trace.info.tags["/2"] == "tag"
    assert {"/1", "/2"} <= trace.info.trace_metadata.keys()
    roots = by_path(trace)
    assert len(trace.data.spans) == 6
    for path in ("/1", "/2"):
        facts, work = roots[path].attributes, named(trace, f"work of {path}")
        assert (facts["http.response.status_code"], facts["tracemw.chunks"]) == (200, 1)
        assert (facts["user.id"], facts["tracemw.client_request_id"]) == (f"user of {path}", path)
        assert work.parent_id == roots[path].span_id
        assert named(trace, f"library in {path}").parent_id == work.span_id


def test_an_application_that_calls_itself() -> None:
    """A request made inside of another one, with its trace: the outer one's facts are the trace's."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/outer":
            tracemw.update_current_trace(tags={"outer": "before"})
            await request(made, "/inner", propagation.outgoing_headers())
            tracemw.update_current_trace(session_id="set after the inner one", tags={"outer": "after"})
            library_span("library after")
        else:
            tracemw.update_current_trace(tags={"inner": "tag"})
            library_span("library inside")
        await finish(send)

    made = tracemw.TraceMiddleware(app, trust_traceparent=True)
    with capture_traces() as traces:
        asyncio.run(request(made, "/outer", {}))
        (trace,) = traces
    outer, inner = by_path(trace)["/outer"], by_path(trace)["/inner"]
    assert root(trace).span_id == outer.span_id
    assert inner.parent_id == outer.span_id
    assert trace.info.client_request_id == "/outer"
    assert trace.info.trace_metadata["mlflow.trace.session"] == "set after the inner one"
    assert (trace.info.tags["outer"], trace.info.tags["inner"]) == ("after", "tag")
    assert inner.attributes["user.id"] == "user of /inner"
    assert named(trace, "library inside").parent_id == inner.span_id
    assert named(trace, "library after").parent_id == outer.span_id


def test_nothing_is_kept_of_requests_that_are_over() -> None:
    """However many requests come in one trace, what is known of them is freed with them."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with tracemw.start_span("work"):
            await asyncio.sleep(0)
        await finish(send)

    with capture_traces() as traces:
        asked(tracemw.TraceMiddleware(app, trust_traceparent=True), [f"/{number}" for number in range(200)])
        (trace,) = traces
        assert len(trace.data.spans) == 400

    def is_freed() -> bool:
        gc.collect()
        known = any(key[0] == int(TRACE, 16) for key in list(record._others))
        return not known and record.record_of(int(TRACE, 16)) is None

    wait_for(is_freed)  # the writer may still have its last batch in hand


def test_a_tag_set_by_id_while_both_run() -> None:
    """`set_trace_tag` with the id of such a trace reaches the stored trace, whichever request calls it."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.01)
        trace_id = tracemw.get_active_trace_id()
        assert trace_id == f"tr-{TRACE}"
        tracemw.set_trace_tag(trace_id, scope["path"], "by id")
        await finish(send)

    with capture_traces() as traces:
        asked(tracemw.TraceMiddleware(app, trust_traceparent=True), ["/1", "/2", "/3"])
        (trace,) = traces
    assert [trace.info.tags[path] for path in ("/1", "/2", "/3")] == ["by id"] * 3
