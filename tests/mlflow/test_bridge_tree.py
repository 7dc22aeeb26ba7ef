"""Spans of MLflow's, of ours and of OpenTelemetry's in one tree, in requests and outside."""

from __future__ import annotations

import asyncio
import contextvars
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tracemw.mlflow
from tests.adapters.trees import get, root, tree, trees, wsgi_get
from tests.mlflow.types import MLflow
from tests.request.drive import ask, http_scope
from tracemw.testing import capture_traces


def asgi(handle: Any) -> Any:
    """A plain ASGI application that answers with what `handle` returns, traced."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = handle()
        if asyncio.iscoroutine(body):
            body = await body
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(body).encode()})

    return tracemw.TraceMiddleware(app)


def test_one_tree_under_the_request_s_root(mlflow: MLflow) -> None:
    """Decorator, block, span without context, and ours: each is below the one that was current."""

    @mlflow.trace(span_type="RETRIEVER", attributes={"index": "docs", "k": 3})
    def search(query: str) -> list[str]:
        with tracemw.start_span("ours"):
            with mlflow.start_span("block", span_type="LLM") as span:
                span.set_inputs({"query": query})
                span.set_outputs(["a"])
                later = mlflow.start_span_no_context("detached", inputs={"x": 1})
                child = mlflow.start_span_no_context("child", parent_span=later)
                child.end()
                later.end(outputs=2)
        return ["a"]

    with capture_traces() as traces:
        assert ask(asgi(lambda: search("q"))).status == 200
    (trace,) = traces
    assert tree(trace) == {"GET": {"search": {"ours": {"block": {"detached": {"child": {}}}}}}}
    (span,) = trace.search_spans(name="search")
    assert (span.span_type, span.inputs, span.outputs) == ("RETRIEVER", {"query": "q"}, ["a"])
    assert (span.get_attribute("index"), span.get_attribute("k")) == ("docs", 3)
    assert span.get_attribute("mlflow.spanFunctionName") == "search"
    (block,) = trace.search_spans(name="block")
    assert (block.span_type, block.inputs, block.outputs) == ("LLM", {"query": "q"}, ["a"])
    assert trace.info.request_preview == '{"query": "q"}'
    assert trace.info.response_preview == '["a"]'


def test_our_own_traced_function_below_mlflow_s_and_above(mlflow: MLflow) -> None:
    """Both decorators, in either order, on functions that call each other and on one function."""

    @tracemw.trace
    @mlflow.trace
    def both() -> int:
        return 1

    @mlflow.trace
    def theirs() -> int:
        return ours()

    @tracemw.trace
    def ours() -> int:
        return both()

    with capture_traces(span_name_suffixes=False) as traces:
        theirs()
        ours()
    assert trees(traces) == [{"theirs": {"ours": {"both": {"both": {}}}}}, {"ours": {"both": {"both": {}}}}]


def test_a_request_without_mlflow_s_spans_is_as_ever(mlflow: MLflow) -> None:
    """The bridge adds nothing to it."""
    with capture_traces() as traces:
        ask(asgi(lambda: "plain"))
    (trace,) = traces
    assert tree(trace) == {"GET": {}}
    theirs = [key for key in root(trace).attributes if key.startswith("mlflow.")]
    assert theirs == ["mlflow.traceRequestId"]


def test_traces_begun_outside_of_requests_come_to_us(mlflow: MLflow) -> None:
    """A root of MLflow's is a trace in our store: state, previews, times, process metadata, the last id."""

    @mlflow.trace(name="job", span_type="CHAIN")
    def job(number: int) -> int:
        if number < 0:
            raise ValueError("negative")
        return number * 2

    with capture_traces(metadata={"team": "search"}) as traces:
        assert job(4) == 8
        last = mlflow.get_last_active_trace_id()
        with pytest.raises(ValueError, match="negative"):
            job(-1)
    good, bad = traces
    assert good.info.trace_id == last
    assert (good.info.state, bad.info.state) == ("OK", "ERROR")
    assert (good.info.request_preview, good.info.response_preview) == ('{"number": 4}', "8")
    assert good.info.tags["mlflow.traceName"] == "job"
    assert good.info.trace_metadata["team"] == "search"
    assert good.info.execution_duration is not None
    (event,) = root(bad).events
    assert event.attributes["exception.message"] == "negative"
    assert root(bad).status.description == "ValueError: negative"


def test_coroutines_keep_their_own_spans(mlflow: MLflow) -> None:
    """Tasks of one request run interleaved, and each span has its own task's parent."""

    @mlflow.trace
    async def leaf(name: str) -> str:
        await asyncio.sleep(0)
        with mlflow.start_span(f"in {name}"):
            await asyncio.sleep(0)
        return name

    @mlflow.trace
    async def branch(name: str) -> str:
        await asyncio.sleep(0)
        return await leaf(name)

    async def handle() -> list[str]:
        return await asyncio.gather(*(branch(name) for name in "abc"))

    with capture_traces(span_name_suffixes=False) as traces:
        ask(asgi(handle))
    (trace,) = traces
    for name in "abc":
        (span,) = trace.search_spans(name=f"in {name}")
        leaf_span = next(s for s in trace.data.spans if s.span_id == span.parent_id)
        branch_span = next(s for s in trace.data.spans if s.span_id == leaf_span.parent_id)
        assert (leaf_span.name, leaf_span.inputs) == ("leaf", {"name": name})
        assert (branch_span.name, branch_span.inputs) == ("branch", {"name": name})
        assert branch_span.parent_id == root(trace).span_id


def test_threads_that_carry_the_context(mlflow: MLflow) -> None:
    """`contextvars.copy_context` carries MLflow's current span, as MLflow has it, and so do our helpers."""

    @mlflow.trace
    def work(name: str) -> str:
        return name

    def handle() -> str:
        with mlflow.start_span("parent"):
            with ThreadPoolExecutor(1) as pool:
                pool.submit(contextvars.copy_context().run, work, "copied").result()
            with tracemw.ContextThreadPoolExecutor(1) as ours:
                ours.submit(work, "ours").result()
            thread = threading.Thread(target=tracemw.propagate(work), args=("propagated",))
            thread.start()
            thread.join()
        return "done"

    with capture_traces(span_name_suffixes=False) as traces:
        ask(asgi(handle))
    (trace,) = traces
    (parent,) = trace.search_spans(name="parent")
    found = {s.inputs["name"]: s.parent_id for s in trace.search_spans(name="work")}
    assert found == dict.fromkeys(("copied", "ours", "propagated"), parent.span_id)


def test_a_thread_without_the_context_begins_a_trace_of_its_own(mlflow: MLflow) -> None:
    """As with MLflow alone."""

    @mlflow.trace
    def work() -> None:
        pass

    with capture_traces() as traces:
        with mlflow.start_span("parent"):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
    assert sorted(map(str, trees(traces))) == ["{'parent': {}}", "{'work': {}}"]


def test_what_is_current_afterwards_is_what_was_before(mlflow: MLflow) -> None:
    """Also when the block raises, and for OpenTelemetry's own view of it."""
    from opentelemetry import context, trace

    before = context.get_current()
    with capture_traces():
        with pytest.raises(KeyError):
            with mlflow.start_span("outer") as outer:
                assert trace.get_current_span() is outer._span
                with mlflow.start_span("inner"):
                    raise KeyError("x")
    assert context.get_current() is before
    assert mlflow.get_current_active_span() is None


def test_wsgi(mlflow: MLflow) -> None:
    """The same in a Flask view, and in the generator that it streams."""
    pytest.importorskip("flask")
    from flask import Flask

    app = Flask("site")
    tracemw.instrument(app)

    @mlflow.trace
    def part(number: int) -> str:
        return str(number)

    @app.get("/items/<int:number>")
    def item(number: int) -> Any:
        part(number)
        return (part(n) for n in range(2))

    with capture_traces(span_name_suffixes=False) as traces:
        assert wsgi_get(app, "/items/7") == (200, b"01")
    (trace,) = traces
    assert [s.inputs["number"] for s in trace.search_spans(name="part")] == [7, 0, 1]
    assert {s.parent_id for s in trace.search_spans(name="part")} == {root(trace).span_id}


def test_fastapi_handler(mlflow: MLflow) -> None:
    """The guide's example: the decorator below the route, the trace updated inside."""
    pytest.importorskip("fastapi")
    from fastapi import FastAPI

    app = FastAPI()
    app.add_middleware(tracemw.TraceMiddleware)

    @app.get("/items/{number}")
    @mlflow.trace(span_type="AGENT")
    async def item(number: int) -> dict[str, int]:
        mlflow.update_current_trace(tags={"kind": "item"})
        return {"answer": number}

    with capture_traces() as traces:
        assert get(app, "/items/3").body == b'{"answer":3}'
    (trace,) = traces
    assert tree(trace) == {"GET /items/{number}": {"item": {}}}
    assert trace.info.tags["kind"] == "item"
    assert (trace.info.request_preview, trace.info.response_preview) == ('{"number": 3}', '{"answer": 3}')


def test_a_handler_s_exception_that_the_framework_answers(mlflow: MLflow) -> None:
    """It is on the handler's span; on the root only when the answer is a 5xx."""
    pytest.importorskip("fastapi")
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse

    app = FastAPI()
    app.add_middleware(tracemw.TraceMiddleware)

    @app.exception_handler(LookupError)
    async def answer(request: Any, exc: Exception) -> Any:
        return JSONResponse({}, status_code=int(str(exc.args[0])))

    @app.get("/fail/{code}")
    @mlflow.trace
    def fail(code: int) -> None:
        raise LookupError(code)

    with capture_traces() as traces:
        assert (get(app, "/fail/404").status, get(app, "/fail/503").status) == (404, 503)
    gone, broken = traces
    assert (gone.info.state, broken.info.state) == ("OK", "ERROR")
    for trace, on_root in ((gone, 0), (broken, 1)):
        (span,) = trace.search_spans(name="fail")
        assert (span.status.status_code, len(span.events)) == ("ERROR", 1)
        assert len(root(trace).events) == on_root


Node = tuple[str, list[Any]]
nodes: st.SearchStrategy[Node] = st.recursive(
    st.tuples(st.sampled_from(["ours", "theirs", "detached", "otel"]), st.just([])),
    lambda below: st.tuples(st.sampled_from(["ours", "theirs", "otel"]), st.lists(below, max_size=3)),
    max_leaves=8,
)


@given(forest=st.lists(nodes, min_size=1, max_size=3), request=st.booleans())
def test_any_nesting_is_one_tree(forest: list[Node], request: bool) -> None:
    """However spans of MLflow's, ours and OpenTelemetry's are put into one another."""
    mlflow = pytest.importorskip("mlflow")
    from opentelemetry.trace import use_span

    from tracemw import provider

    number = iter(range(1000))

    def build(node: Node) -> dict[str, Any]:
        kind, below = node
        name = f"{kind} {next(number)}"
        if kind == "ours":
            with tracemw.start_span(name):
                inner = [build(one) for one in below]
        elif kind == "theirs":
            with mlflow.start_span(name):
                inner = [build(one) for one in below]
        elif kind == "detached":
            mlflow.start_span_no_context(name).end()
            inner = []
        else:
            with use_span(provider.tracer().start_span(name), end_on_exit=True):
                inner = [build(one) for one in below]
        return {name: {key: value for one in inner for key, value in one.items()}}

    def handle() -> str:
        return json.dumps({key: value for one in map(build, forest) for key, value in one.items()})

    assert tracemw.mlflow.bridge()
    try:
        with capture_traces() as traces:
            if request:
                wanted = {"GET": json.loads(ask(asgi(handle)).body)}
            else:
                with tracemw.start_span("root"):
                    wanted = {"root": json.loads(handle())}
    finally:
        tracemw.mlflow.unbridge()
    assert trees(traces) == [wanted]


def test_excluded_unsampled_and_switched_off(mlflow: MLflow, caplog: pytest.LogCaptureFixture) -> None:
    """Where nothing is recorded, nothing of MLflow's is either, and nothing is complained of."""
    seen: list[Any] = []

    @mlflow.trace
    def work() -> int:
        mlflow.update_current_trace(tags={"a": "b"})
        with mlflow.start_span("inner") as span:
            span.set_inputs(1)
            seen.append(mlflow.get_current_active_span())
        mlflow.start_span_no_context("detached", inputs=1).end()
        return 1

    with capture_traces() as traces:
        for options, path in (({"exclude": ["/health"]}, "/health"), ({"sample_rate": 0.0}, "/")):
            app = tracemw.TraceMiddleware(asgi(work).app, **options)
            assert ask(app, http_scope(path)).body == b"1"
        tracemw.disable()
        work()
        tracemw.enable()
        with tracemw.context(enabled=False):
            work()
    assert list(traces) == []
    assert seen == [None] * 4
    assert [r.getMessage() for r in caplog.records if r.levelname != "DEBUG"] == []


def test_unsampled_traces_of_mlflow_s_own(mlflow: MLflow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below a root that was left out nothing is recorded; `sampling_ratio_override` and its variable count."""

    @mlflow.trace
    def inner() -> None:
        pass

    def rates() -> list[Any]:
        always = mlflow.trace(inner, name="always", sampling_ratio_override=1.0)
        never = mlflow.trace(inner, name="never", sampling_ratio_override=0.0)
        with capture_traces(span_name_suffixes=False) as traces:
            for call in (always, never, inner):
                for _ in range(5):
                    call()
        return trees(traces)

    assert rates() == [{"always": {"inner": {}}}] * 5 + [{"inner": {}}] * 5
    monkeypatch.setenv("MLFLOW_TRACE_SAMPLING_RATIO", "0")
    assert rates() == [{"always": {"inner": {}}}] * 5
