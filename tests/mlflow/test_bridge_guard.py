"""What the bridge rests on: internals of MLflow's, tried with the installed version; and what if one is gone."""

from __future__ import annotations

import gc
import logging
import threading
from typing import Any

import pytest

import tracemw.mlflow
from tests.adapters.trees import tree, trees
from tests.mlflow.test_bridge_tree import asgi
from tests.mlflow.types import MLflow
from tests.request.drive import ask
from tracemw import _mlflow_internals as internals
from tracemw import opening, stamps
from tracemw.testing import capture_traces

NEEDED = [(module, path) for module, paths in internals.NEEDED.items() for path in paths]
WANTED = [(module, path) for module, paths in internals.WANTED.items() for path in paths]
# Not in every version or distribution.
SINCE = {"mlflow.tracing.context": (3, 11)}
FULL_ONLY = ("mlflow.tracking.client",)


def version(mlflow: MLflow) -> tuple[int, ...]:
    """The installed version."""
    return tuple(int(part) for part in mlflow.__version__.split(".")[:2])


@pytest.mark.parametrize(("module", "path"), NEEDED)
def test_canary_what_is_needed(unbridged: MLflow, module: str, path: str) -> None:
    """Fails loudly with a version of MLflow's that has moved something."""
    internals.find(module, path)


@pytest.mark.parametrize(("module", "path"), WANTED)
def test_canary_what_is_wanted(unbridged: MLflow, module: str, path: str) -> None:
    """Likewise, for what only costs a detail."""
    if version(unbridged) < SINCE.get(module, (0,)):
        pytest.skip("came later")
    if module in FULL_ONLY and not hasattr(unbridged, "MlflowClient"):
        pytest.skip("not in mlflow-tracing")
    internals.find(module, path)


def test_canary_the_marks_of_a_traced_function(unbridged: MLflow) -> None:
    """MLflow's wrappers are marked, and known by the module they come from."""
    from tracemw import _mlflow_handlers as handlers

    def plain() -> None:
        pass

    work: Any = unbridged.trace(plain)
    assert handlers.is_wrapper(work) and handlers.is_traced(work)
    assert work.__wrapped__ is plain
    assert not handlers.is_traced(plain)


def test_canary_the_scope_of_spans(mlflow: MLflow) -> None:
    """MLflow's API asks for its tracer by a name, which tells its spans from others when they are stored."""
    from tracemw._mlflow_tracer import SCOPE
    from tracemw.pipeline.encode import MLFLOW_SCOPE

    with mlflow.start_span("x") as span:
        assert span._span.instrumentation_scope.name == SCOPE == MLFLOW_SCOPE


def snapshot(mlflow: MLflow) -> dict[str, Any]:
    """All that the bridge replaces, as it is now."""
    from mlflow.tracing import fluent, provider, trace_manager  # type: ignore[import-not-found,unused-ignore]

    return {
        "provider": {name: vars(provider)[name] for name in vars(provider) if not name.startswith("__")},
        "isolated": provider.provider._isolated_tracer_provider,
        "once": provider.provider._isolated_tracer_provider_once._done,
        "fluent": vars(fluent)["create_mlflow_span"],
        "table": trace_manager.InMemoryTraceManager._instance,
        "functions": {name: getattr(mlflow, name) for name in mlflow.__all__ if callable(getattr(mlflow, name))},
        "lookups": list(stamps.lookups),
        "roots": opening.local_roots,
    }


def test_again_and_undone(unbridged: MLflow) -> None:
    """Bridging twice changes nothing more; undone, everything is as it was."""
    before = snapshot(unbridged)
    assert tracemw.mlflow.bridge()
    bridged = snapshot(unbridged)
    assert bridged != before
    assert tracemw.mlflow.bridge()
    assert snapshot(unbridged) == bridged
    tracemw.mlflow.unbridge()
    assert snapshot(unbridged) == before
    tracemw.mlflow.unbridge()


def test_many_threads_bridge(unbridged: MLflow) -> None:
    """It is done once, and all are told so."""
    told: list[bool] = []
    threads = [threading.Thread(target=lambda: told.append(tracemw.mlflow.bridge())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == [True] * 8
    assert len(stamps.lookups) == 1
    tracemw.mlflow.unbridge()


def refused(mlflow: MLflow, caplog: pytest.LogCaptureFixture) -> str:
    """Bridge and be refused, with nothing changed; return what was said."""
    before = snapshot(mlflow)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "tracemw"):
        assert tracemw.mlflow.bridge() is False
    assert snapshot(mlflow) == before
    (said,) = [record.getMessage() for record in caplog.records if record.name == "tracemw"]
    return said


def test_refusals(
    unbridged: MLflow, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version that is too old, that misses something, or that does something else than we think."""
    from mlflow.entities.span import LiveSpan  # type: ignore[import-not-found,unused-ignore]
    from mlflow.tracing import fluent, provider

    with monkeypatch.context() as patch:
        patch.setattr(unbridged, "__version__", "3.9.2")
        assert "version 3.9.2 is too old, it takes 3.10 or newer" in refused(unbridged, caplog)
    with monkeypatch.context() as patch:
        patch.delattr(provider, "mlflow_runtime_context")
        with caplog.at_level(logging.WARNING, "tracemw"):
            assert tracemw.mlflow.bridge() is False
        assert "has no mlflow.tracing.provider.mlflow_runtime_context" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(fluent, "get_current_otel_span", lambda: None)
        assert "tried out, it is wrong in: current span" in refused(unbridged, caplog)
    with monkeypatch.context() as patch:
        patch.setattr(fluent, "with_active_span", 5)
        assert "internals are not as we know them" in refused(unbridged, caplog)
    assert LiveSpan.__module__ == "mlflow.entities.span"
    assert tracemw.mlflow.bridge()
    tracemw.mlflow.unbridge()


def test_trying_it_out_leaves_nothing(unbridged: MLflow) -> None:
    """No trace is stored, no last trace's id set, no setting read for good, nothing current afterwards."""
    from opentelemetry import context

    from tracemw import config

    before, last = context.get_current(), tracemw.get_last_active_trace_id()
    settings, theirs = config._state.settings, unbridged.get_last_active_trace_id()
    with capture_traces() as traces:
        tracemw.mlflow.bridge()
        gc.collect()
        assert list(traces) == []
    assert context.get_current() is before
    assert (tracemw.get_last_active_trace_id(), unbridged.get_last_active_trace_id()) == (last, theirs)
    assert config._state.settings is settings
    tracemw.mlflow.unbridge()


def test_a_failure_of_ours_is_not_the_application_s(
    mlflow: MLflow, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a span cannot be begun or ended, the function runs all the same, and the failure is counted."""
    from tracemw import _mlflow_spans, guard, scope

    @mlflow.trace
    def work(number: int) -> float:
        return 1 / number

    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("a defect")

    monkeypatch.setattr(guard, "_failures", {})
    with capture_traces() as traces:
        for module, name in (
            (scope, "open_scope"),
            (scope, "end_span"),
            (_mlflow_spans, "encoded"),
            (_mlflow_spans, "record_exception"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, broken)
                assert work(1) == 1
                with pytest.raises(ZeroDivisionError):
                    work(0)
        assert len(traces) >= 1
    assert len(guard.failures()) >= 4


class TestClient:
    """`MlflowClient`, which names spans by their ids: in the distributions of MLflow that have it."""

    @pytest.fixture
    def client(self, mlflow: MLflow, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
        """A client whose server is not there."""
        if not hasattr(mlflow, "MlflowClient"):
            pytest.skip("mlflow-tracing has no client")
        return mlflow.MlflowClient("http://127.0.0.1:9")

    def test_a_trace_of_a_client(self, client: Any) -> None:
        """Begun, filled and ended by ids alone."""
        with capture_traces() as traces:
            trace_id = client.start_trace("root", span_type="CHAIN", inputs={"a": 1}, tags={"t": "1"}).trace_id
            parent = self.root_of(client, trace_id)
            child = client.start_span("child", trace_id, parent, inputs={"x": 1}).span_id
            gc.collect()
            client.set_trace_tag(trace_id, "by", "id")
            client.end_span(trace_id, child, outputs=2)
            client.end_trace(trace_id, outputs=3, status="ERROR")
        (trace,) = traces
        assert tree(trace) == {"root": {"child": {}}}
        assert trace.info.trace_id == trace_id
        assert (trace.info.state, trace.info.tags["t"], trace.info.tags["by"]) == ("ERROR", "1", "id")
        assert trace.search_spans(name="child")[0].outputs == 2

    @staticmethod
    def root_of(client: Any, trace_id: str) -> str:
        """The root's id, as a client that has kept the trace's alone would find it."""
        from tracemw._mlflow_table import Manager

        found: str = Manager.get_instance().get_root_span_id(trace_id)
        return found

    def test_in_a_request(self, client: Any, mlflow: MLflow) -> None:
        """A client's trace is a part of the request's; its end is not the request's."""

        def handle() -> str:
            outer = client.start_trace("outer")
            inner = client.start_trace("inner")
            client.end_trace(inner.trace_id)
            with tracemw.start_span("ours"):
                client.end_trace(outer.trace_id)
            client.end_trace(outer.trace_id)
            return "x"

        with capture_traces() as traces:
            assert ask(asgi(handle)).status == 200
        (trace,) = traces
        assert tree(trace) == {"GET": {"outer": {}, "inner": {}, "ours": {}}}

    def test_below_a_span_of_mlflow_s(self, client: Any, mlflow: MLflow) -> None:
        """There MLflow refuses to begin a trace, as ever."""
        with capture_traces() as traces:
            with mlflow.start_span("root"):
                with pytest.raises(mlflow.MlflowException, match="Another trace is already set"):
                    client.start_trace("second")
        assert trees(traces) == [{"root": {}}]

    def test_too_many(self, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Traces that no client ends do not fill the memory: the oldest is ended."""
        from tracemw import _mlflow_spans as spans

        monkeypatch.setattr(spans, "HELD_TRACES", 3)
        with capture_traces() as traces:
            ids = [client.start_trace(f"trace {n}").trace_id for n in range(5)]
            assert sorted(trace.info.trace_id for trace in traces) == sorted(ids[:2])
            for trace_id in ids[2:]:
                client.end_trace(trace_id)
            assert len(traces) == 5
        assert not spans.held


