"""The bridge in processes of its own: nothing goes to MLflow's server, forks, the application's own provider."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.mlflow.backend import backend
from tests.mlflow.types import MLflow
from tracemw.store import open_store

PREPARE = """
import os, sys, time
import mlflow
import tracemw, tracemw.mlflow

tracemw.configure(destination=f"sqlite:///{sys.argv[1]}")
if "bridge" in sys.argv:
    assert tracemw.mlflow.bridge()
if "destination" in sys.argv:  # mlflow-tracing knows no experiment from the environment
    mlflow.tracing.set_destination(mlflow.entities.trace_location.MlflowExperimentLocation("1"))

@mlflow.trace
def work(name):
    mlflow.update_current_trace(tags={"name": name})
    return name
"""


def run(script: str, *arguments: Any, **environment: str) -> str:
    """Run a script after the preparation, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", PREPARE + script, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def stored(path: Path) -> list[Any]:
    """The traces of a store."""
    return list(open_store(f"sqlite:///{path}").search(max_results=10_000).traces)


MANY = """
started = time.perf_counter()
for number in range(50):
    work(str(number))
spent = time.perf_counter() - started
mlflow.flush_trace_async_logging()
print(spent)
"""


def test_nothing_is_asked_of_mlflow_s_server_and_nothing_sent(unbridged: MLflow, tmp_path: Path) -> None:
    """Where MLflow alone asks for the experiment and sends each trace: a trace is delivered once."""
    with backend() as server:
        variables = {"MLFLOW_TRACKING_URI": server.url, "MLFLOW_EXPERIMENT_ID": "1"}
        run(MANY, tmp_path / "bridged.db", "bridge", **variables)
        assert server.asked == []
        run(MANY, tmp_path / "alone.db", "destination", **variables)
        assert len(server.asked) > 50
    assert len(stored(tmp_path / "bridged.db")) == 50


def test_a_server_that_is_down_costs_no_time(unbridged: MLflow, tmp_path: Path) -> None:
    """Neither while traces are made nor at the end of the process."""
    variables = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_EXPERIMENT_NAME": "app"}
    assert float(run(MANY, tmp_path / "t.db", "bridge", **variables)) < 2
    assert len(stored(tmp_path / "t.db")) == 50


SETTINGS = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

if "provider" in sys.argv:
    trace.set_tracer_provider(TracerProvider())
before = trace.get_tracer_provider()

def check(name):
    work(name)
    with tracemw.start_span(f"root {name}"):
        work(f"in {name}")
    assert trace.get_tracer_provider() is before, name
    assert trace._TRACER_PROVIDER is (before if "provider" in sys.argv else None), name

check("bridged")
mlflow.set_tracking_uri(sys.argv[2])
check("tracking uri")
mlflow.set_experiment("app")
check("experiment")
mlflow.set_experiment(experiment_id="1")
check("experiment id")
mlflow.tracing.set_destination(mlflow.entities.trace_location.MlflowExperimentLocation("1"))
check("destination")
mlflow.tracing.reset()
check("reset")
mlflow.tracing.disable()
work("disabled")
mlflow.tracing.enable()
check("enabled")
assert tracemw.mlflow.bridge()
check("bridged again")
mlflow.flush_trace_async_logging(terminate=True)
check("flushed")
"""


@pytest.mark.parametrize("provider", ["", "provider"])
@pytest.mark.parametrize("mode", ["true", "false"])
def test_settings_of_mlflow_s_afterwards(unbridged: MLflow, tmp_path: Path, provider: str, mode: str) -> None:
    """They do not break the bridge, and the application's global provider is never touched.

    Also where MLflow was told to share that provider: it would set it to None with a new experiment.
    """
    with backend() as server:
        run(SETTINGS, tmp_path / "t.db", server.url, "bridge", provider, MLFLOW_USE_DEFAULT_TRACER_PROVIDER=mode)
        assert not [asked for asked in server.asked if "/traces" in asked]
    traces = stored(tmp_path / "t.db")
    names = ["bridged", "tracking uri", "experiment", "experiment id", "destination", "reset", "enabled"]
    names += ["bridged again", "flushed"]
    assert sorted(t.row.tags["name"] for t in traces) == sorted(names + [f"in {name}" for name in names])
    assert {len(t.spans) for t in traces if t.row.tags["name"].startswith("in ")} == {2}


FORK = """
from opentelemetry import context

for number in range(5):
    work(f"before {number}")
with mlflow.start_span("open") as span:
    left = mlflow.start_span_no_context("left open")
    pid = os.fork()
    if pid == 0:
        work("in the child's copy")
        del left  # not to be ended here
        context.attach(context.Context())
        for number in range(5):
            with tracemw.start_span("root"):
                work(f"child {number}")
        os._exit(0 if tracemw.flush(10) else 1)
    assert os.waitpid(pid, 0)[1] == 0
left.end()
for number in range(5):
    work(f"after {number}")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork(unbridged: MLflow, tmp_path: Path) -> None:
    """All that either process has traced is there, once; what the parent had open is the parent's to end."""
    run(FORK, tmp_path / "t.db", "bridge")
    traces = stored(tmp_path / "t.db")
    named = sorted(t.row.tags["name"] for t in traces if t.row.name != "open")
    assert named == sorted([f"{when} {n}" for when in ("before", "child", "after") for n in range(5)])
    (parent,) = [t for t in traces if t.row.name == "open"]
    assert sorted(s.name for s in parent.spans) == ["left open", "open", "work"]
    assert parent.row.state == "OK"


LATE = """
work("before")
outer = mlflow.start_span_no_context("begun before")
assert tracemw.mlflow.bridge()
work("after")
outer.end()
mlflow.flush_trace_async_logging()
"""


def test_bridged_after_the_first_span(unbridged: MLflow, tmp_path: Path) -> None:
    """What MLflow had begun goes where it would have gone; what comes then is ours."""
    with backend() as server:
        run(LATE, tmp_path / "t.db", "destination", MLFLOW_TRACKING_URI=server.url)
        assert len([asked for asked in server.asked if asked.endswith("mlflow/traces")]) == 2
    assert [t.row.tags["name"] for t in stored(tmp_path / "t.db")] == ["after"]


GLOBAL = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
trace.set_tracer_provider(TracerProvider())
mlflow.tracing.set_destination(mlflow.entities.trace_location.MlflowExperimentLocation("1"))
work("before")
assert not tracemw.mlflow.bridge()
work("after")
print(mlflow.get_last_active_trace_id())
"""


def test_mlflow_s_exporter_on_the_global_provider(unbridged: MLflow, tmp_path: Path) -> None:
    """That cannot be taken away again: the bridge says so and changes nothing."""
    with backend() as server:
        printed = run(
            GLOBAL,
            tmp_path / "t.db",
            "destination",
            MLFLOW_TRACKING_URI=server.url,
            MLFLOW_USE_DEFAULT_TRACER_PROVIDER="false",
        )
    assert printed.startswith("tr-")


JOINED = """
import json
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tests.request.drive import ask, http_scope

exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)

async def app(scope, receive, send):
    with mlflow.start_span("theirs"):
        with trace.get_tracer("app").start_as_current_span("plain"):
            work("x")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})

ask(tracemw.TraceMiddleware(app))
ask(tracemw.TraceMiddleware(app, exclude=["/"]))
work("outside")
exported = exporter.get_finished_spans()
json.dump([[s.name, s.context.span_id, s.parent and s.parent.span_id] for s in exported], sys.stdout)
"""


def test_the_application_s_own_provider(unbridged: MLflow, tmp_path: Path) -> None:
    """Joined, its exporters get whole trees; of an excluded request what they got without us: its own spans."""
    exported = json.loads(run(JOINED, tmp_path / "t.db", "bridge", PYTHONPATH=str(Path(__file__).parents[2])))
    names = {span_id: name for name, span_id, _ in exported}
    found = [(name, names.get(parent)) for name, _, parent in exported]
    tree = [("work", "plain"), ("plain", "theirs"), ("theirs", "GET"), ("GET", None)]
    assert found == [*tree, ("plain", None), ("work", None)]
    assert sorted(len(t.spans) for t in stored(tmp_path / "t.db")) == [1, 4]


ADOPTED = """
import asyncio, json
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from tests.request.drive import ask, http_scope

trace.set_tracer_provider(TracerProvider())

from fastapi import FastAPI

app = FastAPI()
app.add_middleware(tracemw.TraceMiddleware)

@mlflow.trace
@app.get("/items/{number}")
async def item(number: int):
    return work(str(number))

caller = [(b"traceparent", b"00-" + b"ab" * 16 + b"-" + b"cd" * 8 + b"-01")]
assert ask(app, http_scope("/items/7", headers=caller)).body == b'"7"'
"""


def test_a_root_of_fastapi_s_own(unbridged: MLflow, tmp_path: Path) -> None:
    """Adopted, as newer versions open it where there is a global provider: MLflow's spans are below it."""
    pytest.importorskip("fastapi")
    run(ADOPTED, tmp_path / "t.db", "bridge", PYTHONPATH=str(Path(__file__).parents[2]))
    (trace,) = stored(tmp_path / "t.db")
    names, root = {span.span_id: span.name for span in trace.spans}, "GET /items/{number}"
    parents = {span.name: names.get(span.parent_id) for span in trace.spans}
    assert parents == {root: None, "item": root, "work": "item"}
    assert trace.row.tags["name"] == "7"


CURRENT = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from tests.request.drive import ask, http_scope

trace.set_tracer_provider(TracerProvider())

from fastapi import FastAPI

app = FastAPI()
app.add_middleware(tracemw.TraceMiddleware)
api = mlflow if "bridge" in sys.argv else tracemw

@app.get("/")
async def handler():
    with trace.get_tracer("fastapi").start_as_current_span("fastapi.endpoint"):  # as its newer versions do
        current = api.get_current_active_span()
        current.set_attribute("key", "value")
        api.get_current_active_span().set_inputs({"asked": 1})
        with trace.get_tracer("app").start_as_current_span("own"):
            api.get_current_active_span().set_attribute("key", "of its own")
    print(current.name)

ask(app)
"""


@pytest.mark.parametrize("way", ["bridge", "ours"])
def test_a_framework_s_inner_span_is_not_the_current_one(unbridged: MLflow, tmp_path: Path, way: str) -> None:
    """What a handler sets on the current span is stored, on the nearest span above that is kept."""
    pytest.importorskip("fastapi")
    printed = run(CURRENT, tmp_path / "t.db", way, PYTHONPATH=str(Path(__file__).parents[2]))
    (trace,) = stored(tmp_path / "t.db")
    spans = {span.name: json.loads(span.attributes) for span in trace.spans}
    assert spans.keys() == {"GET /", "own"} and printed.strip().startswith("GET")
    assert (spans["GET /"]["key"], json.loads(spans["GET /"]["mlflow.spanInputs"])) == ("value", {"asked": 1})
    assert spans["own"]["key"] == "of its own"


ALONE = """
import json
from mlflow.tracing import provider, trace_manager
from opentelemetry import context, trace
from tests.request.drive import ask

seen = {}

@tracemw.trace
def ours():
    return mlflow.get_current_active_span()

async def app(scope, receive, send):
    seen["outside"] = mlflow.get_current_active_span() is None
    with mlflow.start_span("theirs") as span:
        seen["span"] = type(span).__module__
        seen["root"] = span.parent_id is None
        seen["same"] = ours() is span
        seen["hidden"] = trace.get_current_span() is not span._span
        seen["trace"] = span.trace_id != tracemw.get_active_trace_id()
        work("x")
        with trace_manager.InMemoryTraceManager.get_instance().get_trace(span.trace_id) as found:
            seen["tags"] = dict(found.info.tags)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})

ask(tracemw.TraceMiddleware(app))
mlflow.flush_trace_async_logging()
assert tracemw.flush()
seen["provider"] = type(provider.provider.get()).__module__
seen["context"] = type(provider.mlflow_runtime_context).__module__
seen["trace function"] = mlflow.trace.__module__
json.dump(seen, sys.stdout)
"""


def test_without_the_bridge_mlflow_is_not_disturbed(unbridged: MLflow, tmp_path: Path) -> None:
    """Its traces and ours are apart, each goes its own way, and nothing of MLflow's is replaced."""
    with backend() as server:
        printed = run(
            ALONE,
            tmp_path / "t.db",
            "destination",
            MLFLOW_TRACKING_URI=server.url,
            PYTHONPATH=str(Path(__file__).parents[2]),
        )
        assert [asked for asked in server.asked if "/traces" in asked]
    assert json.loads(printed) == {
        "outside": True,
        "span": "mlflow.entities.span",
        "root": True,
        "same": True,
        "hidden": True,
        "trace": True,
        "tags": {"mlflow.traceName": "theirs", "name": "x"},
        "provider": "opentelemetry.sdk.trace",
        "context": "opentelemetry.context.contextvars_context",
        "trace function": "mlflow.tracing.fluent",
    }
    (trace,) = stored(tmp_path / "t.db")
    assert sorted(s.name for s in trace.spans) == ["GET", "ours"]


def test_tracing_imports_no_mlflow() -> None:
    """Who does not use it does not load it, though `tracemw.mlflow` is imported."""
    script = """
import sys
import tracemw, tracemw.mlflow
with tracemw.start_span("x"):
    pass
assert tracemw.flush()
assert "mlflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_mlflow_is_not_installed() -> None:
    """The error names the extra."""
    script = """
import sys
sys.modules["mlflow"] = None
import tracemw, tracemw.mlflow
try:
    tracemw.mlflow.bridge()
except tracemw.errors.TracemwError as exc:
    print(exc)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, timeout=60, capture_output=True, text=True)
    assert "pip install 'tracemw[mlflow]'" in done.stdout
