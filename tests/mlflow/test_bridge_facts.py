"""What MLflow's functions say about a trace is in our record, and what we know is seen by MLflow's functions."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import warnings
from typing import Any

import pytest

import tracemw
from tests.adapters.trees import root, tree
from tests.mlflow.test_bridge_tree import asgi
from tests.mlflow.types import MLflow
from tests.request.drive import ask, http_scope
from tracemw.testing import capture_traces

HEADERS = [(b"x-session-id", b"from-header"), (b"x-user-id", b"jane"), (b"x-request-id", b"r-1")]


def test_update_current_trace_of_mlflow_s(mlflow: MLflow) -> None:
    """All that it takes, below a span of MLflow's, below one of ours, and directly in the request."""

    def handle() -> str:
        mlflow.update_current_trace(tags={"a": "root"}, client_request_id="mine")
        with tracemw.start_span("ours"):
            mlflow.update_current_trace(metadata={"m": "ours", "mlflow.trace.session": "s"}, state="ERROR")
            with mlflow.start_span("theirs"):
                mlflow.update_current_trace(
                    tags={"b": "theirs"},
                    metadata={"mlflow.trace.user": "u"},
                    request_preview="asked",
                    response_preview="answered",
                    model_id="m-1",
                )
        return "done"

    with capture_traces() as traces:
        ask(asgi(handle), http_scope(headers=HEADERS))
    (trace,) = traces
    info = trace.info
    assert info.tags == {"mlflow.traceName": "GET", "a": "root", "b": "theirs"}
    assert info.client_request_id == "mine"
    metadata = info.trace_metadata
    assert (metadata["m"], metadata["mlflow.modelId"]) == ("ours", "m-1")
    assert (metadata["mlflow.trace.session"], metadata["mlflow.trace.user"]) == ("s", "u")
    assert (info.request_preview, info.response_preview, info.state) == ("asked", "answered", "ERROR")
    assert tree(trace) == {"GET": {"ours": {"theirs": {}}}}


def test_session_and_user_as_arguments(mlflow: MLflow) -> None:
    """Where this MLflow has them (since 3.12); what code says wins over the header."""
    import inspect

    if "session_id" not in inspect.signature(mlflow.update_current_trace).parameters:
        pytest.skip("came with 3.12")
    with capture_traces() as traces:
        ask(
            asgi(lambda: mlflow.update_current_trace(session_id="s", user="u")),
            http_scope(headers=HEADERS),
        )
    metadata = traces[0].info.trace_metadata
    assert (metadata["mlflow.trace.session"], metadata["mlflow.trace.user"]) == ("s", "u")


def test_ours_inside_of_mlflow_s(mlflow: MLflow) -> None:
    """`tracemw.update_current_trace` works in a function with `@mlflow.trace`, in a request or not."""

    @mlflow.trace
    def work() -> None:
        tracemw.update_current_trace(tags={"from": "ours"}, session_id="s")
        assert tracemw.get_active_trace_id() == mlflow.get_active_trace_id()
        span = tracemw.get_current_active_span()
        assert span is not None and span.name == "work"
        span.set_attribute("k", 1)

    with capture_traces() as traces:
        work()
        ask(asgi(work))
    for trace in traces:
        assert trace.info.tags["from"] == "ours"
        assert trace.info.trace_metadata["mlflow.trace.session"] == "s"
        assert trace.search_spans(name="work")[0].get_attribute("k") == 1


def test_mlflow_sees_what_we_know(mlflow: MLflow) -> None:
    """The trace's tags, metadata and ids, by MLflow's own table; the root's name and parent."""
    from tracemw._mlflow_table import Manager

    seen: dict[str, Any] = {}

    def handle() -> None:
        tracemw.update_current_trace(tags={"a": "b"})
        span = mlflow.get_current_active_span()
        seen["name"], seen["parent"], seen["id"] = span.name, span.parent_id, span.trace_id
        with Manager.get_instance().get_trace(span.trace_id) as trace:
            seen["tags"], seen["metadata"] = trace.info.tags, trace.info.trace_metadata
            seen["request"] = trace.info.client_request_id
            seen["spans"] = [s.name for s in trace.span_dict.values()]
        mlflow.set_trace_tag(span.trace_id, "set", "by id")
        mlflow.delete_trace_tag(span.trace_id, "a")

    with capture_traces(metadata={"team": "search"}) as traces:
        ask(asgi(handle), http_scope(headers=HEADERS))
    (trace,) = traces
    assert (seen["name"], seen["parent"], seen["id"]) == ("GET", None, trace.info.trace_id)
    assert seen["tags"] == {"a": "b"}
    assert seen["metadata"]["mlflow.trace.session"] == "from-header"
    assert seen["metadata"]["team"] == "search"
    assert seen["request"] == "r-1"
    assert seen["spans"] == ["GET"]
    assert trace.info.tags == {"mlflow.traceName": "GET", "set": "by id"}


def test_the_request_s_root_as_mlflow_s_current_span(mlflow: MLflow, caplog: pytest.LogCaptureFixture) -> None:
    """What is set on it is on the root; it ends with the request, whoever calls `end`."""

    def handle() -> None:
        span = mlflow.get_current_active_span()
        span.set_attribute("number", 5)
        span.set_attributes({"text": "x", "things": {"password": "p", "n": 1}})
        span.set_inputs({"asked": 1})
        span.add_event(mlflow.entities.SpanEvent("noted", attributes={"k": "v"}))
        span.end(outputs={"answered": 2})
        assert mlflow.get_current_active_span() is span

    with capture_traces() as traces:
        ask(asgi(handle))
    (trace,) = traces
    span = root(trace)
    assert tree(trace) == {"GET": {}}
    assert span.get_attribute("number") == 5
    assert (span.get_attribute("text"), span.get_attribute("things")) == ("x", {"password": "[REDACTED]", "n": 1})
    assert (span.inputs, span.outputs) == ({"asked": 1}, {"answered": 2})
    assert (trace.info.request_preview, trace.info.response_preview) == ('{"asked": 1}', '{"answered": 2}')
    assert [event.name for event in span.events] == ["noted"]
    assert span.attributes["http.response.status_code"] == 200


def test_each_look_at_the_root_finds_it(mlflow: MLflow) -> None:
    """However often MLflow asks what is current where no span of its own is, whoever holds it."""

    def handle() -> None:
        ids = {mlflow.get_current_active_span().trace_id, mlflow.get_active_trace_id()}
        for number in range(3):
            mlflow.update_current_trace(tags={str(number): "set"})
            mlflow.get_current_active_span().set_attribute(str(number), "set")
        assert ids == {mlflow.get_active_trace_id()}

    with capture_traces() as traces:
        ask(asgi(handle))
        with tracemw.start_span("outside"):
            handle()
    for trace in traces:
        assert all(trace.info.tags[str(number)] == "set" for number in range(3))
        assert all(root(trace).get_attribute(str(number)) == "set" for number in range(3))


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("how", ["directly", "thread", "task"])
def test_an_update_after_the_response(mlflow: MLflow, before: bool, how: str) -> None:
    """It changes the trace as inside, with no span of MLflow's around it, whoever carries the context.

    What is current then has ended: it takes nothing any more, and spans may begin below it.
    """
    seen: list[Any] = []

    def later(tags: dict[str, str]) -> None:
        mlflow.update_current_trace(tags=tags)
        ended = mlflow.get_current_active_span()
        ended.set_attribute("too", "late")
        mlflow.start_span_no_context("below", parent_span=ended).end()
        seen.append((ended.name, mlflow.get_active_trace_id()))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if before:
            mlflow.update_current_trace(tags={"early": "yes"})
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})
        for late in ({"late": "yes"}, {"later": "yes"}):
            if how == "thread":
                await asyncio.get_running_loop().run_in_executor(None, contextvars.copy_context().run, later, late)
            elif how == "task":
                await asyncio.create_task(asyncio.to_thread(later, late))
            else:
                later(late)

    with capture_traces() as traces:
        ask(tracemw.TraceMiddleware(app))
    (trace,) = traces
    tags = trace.info.tags
    assert (tags["late"], tags["later"], "early" in tags) == ("yes", "yes", before)
    assert seen == [("GET", trace.info.trace_id)] * 2
    assert tree(trace) == {"GET": {"below_1": {}, "below_2": {}}}
    assert root(trace).get_attribute("too") is None


def test_refused_as_mlflow_refuses(mlflow: MLflow) -> None:
    """A state that is none, a preview that is no text: MLflow's own error, and nothing is changed."""
    with capture_traces() as traces:
        with mlflow.start_span("root"):
            with pytest.raises(mlflow.MlflowException, match="State must be"):
                mlflow.update_current_trace(state="MAYBE", tags={"a": "b"})
            with pytest.raises(mlflow.MlflowException, match="must be a string"):
                mlflow.update_current_trace(request_preview=5)
    assert traces[0].info.tags == {"mlflow.traceName": "root"}


def test_an_invalid_session_is_left_out(mlflow: MLflow, caplog: pytest.LogCaptureFixture) -> None:
    """As in our own `update_current_trace`: said, not shortened."""
    with capture_traces() as traces:
        with mlflow.start_span("root"):
            mlflow.update_current_trace(metadata={"mlflow.trace.session": "x" * 300, "kept": "y"})
    assert "mlflow.trace.session" not in traces[0].info.trace_metadata
    assert traces[0].info.trace_metadata["kept"] == "y"
    assert "session" in caplog.text


def test_values_that_are_no_text(mlflow: MLflow) -> None:
    """They are stored as their text."""
    with capture_traces() as traces:
        with mlflow.start_span("root"):
            mlflow.update_current_trace(tags={"n": 5}, metadata={"none": None})
    assert traces[0].info.tags["n"] == "5"
    assert traces[0].info.trace_metadata["none"] == "None"


def test_mlflow_tracing_context(mlflow: MLflow) -> None:
    """What it says of the traces begun inside is said of our request's, too; later words win (since 3.11)."""
    if not hasattr(mlflow.tracing, "context"):
        pytest.skip("came with 3.11")

    @mlflow.trace
    def outer() -> None:
        mlflow.update_current_trace(tags={"late": "wins"})
        inner()

    @mlflow.trace
    def inner() -> None:
        pass

    def handle() -> None:
        with mlflow.tracing.context(session_id="s", tags={"t": "1", "late": "loses"}, metadata={"m": "2"}):
            outer()
        with mlflow.tracing.context(enabled=False):
            outer()

    with capture_traces() as traces:
        ask(asgi(handle))
        handle()
    assert [tree(trace) for trace in traces] == [{"GET": {"outer": {"inner": {}}}}, {"outer": {"inner": {}}}]
    for trace in traces:
        assert (trace.info.tags["t"], trace.info.tags["late"]) == ("1", "wins")
        assert trace.info.trace_metadata["m"] == "2"
        assert trace.info.trace_metadata["mlflow.trace.session"] == "s"


def test_our_context_around_mlflow_s_traces(mlflow: MLflow) -> None:
    """`tracemw.context` says what traces of MLflow's have in common, too."""
    with capture_traces() as traces:
        with tracemw.context(session_id="s", tags={"t": "1"}):
            with mlflow.start_span("root"):
                pass
    assert traces[0].info.tags["t"] == "1"
    assert traces[0].info.trace_metadata["mlflow.trace.session"] == "s"


def test_after_the_root_has_ended(mlflow: MLflow) -> None:
    """A background task's update patches the stored trace, and its spans are added to it."""
    pytest.importorskip("fastapi")
    from fastapi import BackgroundTasks, FastAPI

    from tests.adapters.trees import get

    app = FastAPI()
    app.add_middleware(tracemw.TraceMiddleware)

    @mlflow.trace
    def later() -> None:
        mlflow.update_current_trace(tags={"late": "yes"})

    def handler(tasks: Any) -> str:
        tasks.add_task(later)
        return "x"

    handler.__annotations__["tasks"] = BackgroundTasks
    app.get("/")(handler)
    with capture_traces() as traces:
        assert get(app, "/").status == 200
    (trace,) = traces
    assert trace.info.tags["late"] == "yes"
    assert [s.name for s in trace.data.spans if s.name == "later"] == ["later"]


def test_redaction_and_bounds(mlflow: MLflow) -> None:
    """Inputs and outputs of MLflow's spans are recorded within our bounds; secrets are masked before that."""

    class Fails:
        def __str__(self) -> str:
            raise RuntimeError("no text")

    @mlflow.trace(attributes={"api_key": "secret", "max_tokens": 5})
    def work(password: str, text: str, thing: Any) -> dict[str, Any]:
        loop: dict[str, Any] = {}
        loop["me"] = loop
        return loop

    with capture_traces() as traces:
        work("secret", "x" * 5_000_000, Fails())
    span = root(traces[0])
    assert span.inputs["password"] == "[REDACTED]"
    assert (span.get_attribute("api_key"), span.get_attribute("max_tokens")) == ("[REDACTED]", 5)
    assert len(span.inputs["text"]) < 1_000_000
    assert "secret" not in traces[0].to_json()


def test_span_processors(mlflow: MLflow) -> None:
    """Both MLflow's and ours see MLflow's spans before they are stored, and may change them."""

    def mask(span: Any) -> None:
        span.set_inputs({"masked": True})

    def count(span: Any) -> None:
        span.set_attribute("counted", 1)

    @mlflow.trace
    def work(number: int) -> int:
        return number

    with capture_traces(span_processors=[count]) as traces:
        with mlflow.tracing.configure(span_processors=[mask]):
            ask(asgi(lambda: work(7)))
    (trace,) = traces
    (span,) = trace.search_spans(name="work")
    assert (span.inputs, span.get_attribute("counted")) == ({"masked": True}, 1)
    assert trace.info.request_preview == '{"masked": true}'


def test_status(mlflow: MLflow) -> None:
    """OK unless an error is recorded; what comes last counts, an exception after OK too."""
    with capture_traces() as traces:
        with mlflow.start_span("plain") as span:
            assert span.status.status_code == "UNSET"
        assert span.status.status_code == "OK"
        with mlflow.start_span("set") as span:
            span.set_status("ERROR")
        with mlflow.start_span("taken back") as span:
            span.set_status("ERROR")
            span.set_status("OK")
        with pytest.raises(ValueError):
            with mlflow.start_span("after") as span:
                span.set_status("OK")
                assert span.status.status_code == "OK"
                raise ValueError("x")
        with mlflow.start_span("recorded") as span:
            span.record_exception("by text")
    states = {trace.info.tags["mlflow.traceName"]: trace.info.state.value for trace in traces}
    assert states == {"plain": "OK", "set": "ERROR", "taken back": "OK", "after": "ERROR", "recorded": "ERROR"}


@pytest.mark.parametrize("trusted", [False, True])
def test_a_caller_s_trace_is_linked_never_continued(
    mlflow: MLflow, trusted: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever the caller is: nothing is lost, nothing raised; that a trusted one is not continued is said once."""
    from tracemw import guard

    monkeypatch.setattr(guard, "_last_logged", {})

    @mlflow.trace
    def work() -> str:
        mlflow.update_current_trace(tags={"a": "b"})
        return "ok"

    caller = [(b"traceparent", b"00-" + b"ab" * 16 + b"-" + b"cd" * 8 + b"-01")]
    app = tracemw.TraceMiddleware(asgi(work).app, trust_traceparent=trusted)
    with caplog.at_level(logging.WARNING), capture_traces() as traces:
        for _ in range(2):
            assert ask(app, http_scope(headers=caller)).body == b"ok"
    assert len(traces) == 2
    for trace in traces:
        assert tree(trace) == {"GET": {"work": {}}}
        assert trace.info.tags["a"] == "b"
        assert trace.info.trace_id != "tr-" + "ab" * 16
        (link,) = root(trace).links
        assert (link.trace_id, link.span_id) == ("tr-" + "ab" * 16, "cd" * 8)
    assert len([r for r in caplog.records if "trust_traceparent" in r.getMessage()]) == trusted


def test_mlflow_s_own_way_to_take_up_a_caller_s_trace(mlflow: MLflow) -> None:
    """In a request it changes nothing: the trace is the request's. Outside, ours continues the caller's."""
    if not hasattr(mlflow.tracing, "set_tracing_context_from_http_request_headers"):
        pytest.skip("came with 3.9")
    caller = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}

    def handle() -> str:
        with mlflow.tracing.set_tracing_context_from_http_request_headers(caller):
            with mlflow.start_span("inside"):
                mlflow.update_current_trace(tags={"a": "b"})
                sent: str = mlflow.tracing.get_tracing_context_headers_for_http_request()["traceparent"]
        return sent

    with capture_traces() as traces:
        sent = ask(asgi(handle)).body.decode()
        handle()
    in_request, outside = traces
    assert tree(in_request) == {"GET": {"inside": {}}}
    (span,) = in_request.search_spans(name="inside")
    assert sent.split("-")[1:3] == [in_request.info.trace_id.removeprefix("tr-"), span.span_id]
    assert outside.info.trace_id == "tr-" + "ab" * 16
    assert [s.parent_id for s in outside.data.spans] == ["cd" * 8]
    assert in_request.info.tags["a"] == outside.info.tags["a"] == "b"


def test_a_plain_opentelemetry_trace(mlflow: MLflow) -> None:
    """Of a trace that nobody of us records MLflow's functions say nothing, and raise nothing."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import use_span

    foreign = TracerProvider(shutdown_on_exit=False).get_tracer("app").start_span("foreign")
    with capture_traces() as traces:
        with use_span(foreign):
            mlflow.update_current_trace(tags={"a": "b"})
            with mlflow.start_span("ours"):
                mlflow.update_current_trace(tags={"c": "d"})
    (trace,) = traces
    assert trace.info.tags == {"mlflow.traceName": "ours", "c": "d"}


def test_links(mlflow: MLflow) -> None:
    """Links of MLflow's spans are stored (since 3.13)."""
    import inspect

    if "links" not in inspect.signature(mlflow.start_span).parameters:
        pytest.skip("came with 3.13")
    link = mlflow.entities.Link(trace_id="tr-" + "ab" * 16, span_id="cd" * 8)
    with capture_traces() as traces:
        with mlflow.start_span("root", links=[link]):
            pass
    (found,) = root(traces[0]).links
    assert (found.trace_id, found.span_id) == ("tr-" + "ab" * 16, "cd" * 8)


def test_a_destination_of_mlflow_s_costs_no_span(mlflow: MLflow, caplog: pytest.LogCaptureFixture) -> None:
    """Where traces go is our setting; an experiment named for a function below another loses it in MLflow."""
    location = mlflow.entities.trace_location.MlflowExperimentLocation("5")

    @mlflow.trace(trace_destination=location)
    def work() -> int:
        return 1

    with capture_traces() as traces:
        ask(asgi(work))
        work()
    assert [tree(trace) for trace in traces] == [{"GET": {"work": {}}}, {"work": {}}]
    assert caplog.records == []


def test_imported_traces(mlflow: MLflow) -> None:
    """`mlflow.log_trace` and `mlflow.add_trace` make traces of ours."""
    warnings.simplefilter("ignore", FutureWarning)  # that log_trace will go
    with capture_traces() as traces:
        mlflow.log_trace(name="logged", request={"a": 1}, response="b", tags={"t": "1"})
        with mlflow.start_span("root") as target:
            with mlflow.start_span("child") as span:
                span.set_inputs({"x": 1})
            mlflow.add_trace(mlflow.entities.Trace.from_dict(traces[0].to_dict()), target=target)
    logged, merged = traces
    assert tree(logged) == {"logged": {}}
    assert (root(logged).inputs, root(logged).outputs) == ({"a": 1}, "b")
    assert logged.info.tags["t"] == "1"
    assert tree(merged) == {"root": {"child": {}, "logged": {}}}


def test_instrumentations_that_mlflow_hands_its_tracer_to(mlflow: MLflow) -> None:
    """They end their spans with OpenTelemetry's API: these are traces of ours, too, or below the current span."""
    from tracemw._mlflow_tracer import BridgedProvider

    made = BridgedProvider()
    tracer = made.get_tracer("instrumentation")
    assert made.get_tracer("instrumentation") is tracer

    def work() -> None:
        with tracer.start_as_current_span("agent", attributes={"text": "5"}):
            mlflow.update_current_trace(tags={"a": "b"})
            with mlflow.start_span("inside"):
                pass

    with capture_traces() as traces:
        work()
        ask(asgi(work))
        with pytest.raises(ValueError):
            with tracer.start_as_current_span("failing"):
                raise ValueError("x")
    alone, in_request, failed = traces
    assert (tree(alone), tree(in_request)) == ({"agent": {"inside": {}}}, {"GET": {"agent": {"inside": {}}}})
    assert alone.info.tags["a"] == in_request.info.tags["a"] == "b"
    assert root(alone).get_attribute("text") == "5"
    assert (alone.info.state, failed.info.state) == ("OK", "ERROR")
    assert len(root(failed).events) == 1


def test_instrumentations_that_tell_mlflow_of_their_spans(mlflow: MLflow) -> None:
    """MLflow's integrations with agents register spans of another provider: a root among them begins a trace."""
    from opentelemetry import trace as otel
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

    from tracemw import provider
    from tracemw._mlflow_spans import LiveSpan
    from tracemw._mlflow_table import Manager
    from tracemw._mlflow_tracer import BridgedTracer

    class Integration(SpanProcessor):
        """As MLflow has it, in short."""

        def on_start(self, span: Any, parent_context: Any = None) -> None:
            BridgedTracer("integration").span_processor.on_start(span, parent_context)
            Manager.get_instance().register_span(LiveSpan(span, f"tr-{span.context.trace_id:032x}"))

    theirs = TracerProvider(shutdown_on_exit=False)
    theirs.add_span_processor(Integration())
    provider.add_processor(theirs)
    tracer = theirs.get_tracer("agents")
    with capture_traces() as traces:
        with tracer.start_as_current_span("agent"):
            ids = otel.get_current_span().get_span_context()
            found = Manager.get_instance().get_span_from_id(f"tr-{ids.trace_id:032x}", f"{ids.span_id:016x}")
            found.set_inputs({"a": 1})
            with tracer.start_as_current_span("tool"):
                mlflow.update_current_trace(tags={"a": "b"})
    (trace,) = traces
    assert tree(trace) == {"agent": {"tool": {}}}
    assert trace.info.tags["a"] == "b"
    assert root(trace).inputs == {"a": 1}
