"""Whole applications, a real MLflow server, and what goes wrong in production: read back with MLflow's client."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import servers
from tests.delivery.backends import Mlflow, Reader, mlflow_environment, mlflow_python
from tests.servers import wait_for

IDENTITY = {"X-Request-ID": "req-abc-123", "X-Session-ID": "s-1", "X-User-ID": "jane"}
RELEASE = {"APP_ENVIRONMENT": "production", "APP_VERSION": "1.4.0", "REGION": "eu-west-1"}

WORK = """
import os, sys, time
import tracemw

@tracemw.trace(span_type="LLM")
def model(question):
    return "hello " + question

@tracemw.trace
def handle(i):
    request_id = f"{sys.argv[1]}-{i}"
    tracemw.update_current_trace(client_request_id=request_id, tags={"n": str(i)}, session_id="s", user="u")
    return model(str(i))

def several(count):
    for i in range(count):
        handle(i)
"""
THEIRS = """
import sys, time, mlflow

mlflow.set_experiment(sys.argv[1])

@mlflow.trace(span_type="LLM")
def model(question):
    return "hello " + question

@mlflow.trace
def handle(i):
    mlflow.update_current_trace(
        client_request_id=f"x-{i}", tags={"n": str(i)},
        metadata={"mlflow.trace.session": "s", "mlflow.trace.user": "u"},
    )
    return model(str(i))

began = time.perf_counter()
for i in range(int(sys.argv[2])):
    handle(i)
mlflow.flush_trace_async_logging()
print(time.perf_counter() - began)
"""


def start(body: str, *args: str, **env: str) -> subprocess.Popen[str]:
    """Run a program that traces."""
    return subprocess.Popen(
        [sys.executable, "-c", WORK + textwrap.dedent(body), *args],
        env=servers.clean_environment({"PYTHONPATH": str(servers.ROOT), **env}),
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 120.0) -> str:
    """Wait for the end of a program; what it printed."""
    try:
        output, _ = process.communicate(timeout=timeout)
        return output.strip()
    finally:
        process.kill()


@pytest.fixture
def destination(mlflow_server: Mlflow, experiment: str, tmp_path: Path) -> dict[str, str]:
    """Variables of an application that delivers to the test's experiment."""
    return {
        "TRACEMW_DESTINATION": f"mlflow+{mlflow_server.url}?experiment={experiment}",
        "TRACEMW_STORE": f"sqlite:///{tmp_path}/app.db",
    }


def by_name(trace: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The spans of a trace by their names."""
    return {span["name"]: span for span in trace["spans"]}


def test_a_fastapi_application(
    destination: dict[str, str], reader: Reader, experiment: str, mlflow_server: Mlflow
) -> None:
    """Tree, types, inputs, outputs, previews, exceptions and a stream; MLflow's filters find the request."""
    with servers.uvicorn("example_apps.fastapi_chat.app:app", env={**destination, **RELEASE}) as server:
        answer = server.post("/chat", {"question": "What is a span?"}, IDENTITY)
        assert answer.status == 200
        server.post("/chat/stream", {"question": "What is a trace?"})
        assert server.post("/index/rebuild").status == 500
        wait_for(lambda: len(reader.search(experiment, spans=False)) == 3, timeout=20.0, interval=0.3)
    chat, stream, failed = reader.search(experiment)
    by_request = "client_request_id = 'req-abc-123'"
    if mlflow_server.version < (3, 6):  # has no filter for it
        by_request = "name = 'POST /chat'"
    for filter_string in (
        f"metadata.app_version = '1.4.0' AND {by_request}",
        "metadata.`mlflow.trace.session` = 's-1' AND metadata.`mlflow.trace.user` = 'jane'",
        "metadata.region = 'eu-west-1' AND tags.topic = 'library/span' AND name = 'POST /chat'",
    ):
        assert [trace["trace_id"] for trace in reader.search(experiment, filter_string)] == [chat["trace_id"]]
    assert (chat["state"], stream["state"], failed["state"]) == ("OK", "OK", "ERROR")
    assert chat["trace_id"] == answer.header("x-trace-id")
    assert chat["response_preview"] == answer.json()["answer"]
    spans = by_name(chat)
    assert list(spans) == ["POST /chat", "chat", "retrieve", "generate"]
    assert [spans[name]["parent_id"] for name in ("chat", "retrieve", "generate")] == [
        spans["POST /chat"]["span_id"], spans["chat"]["span_id"], spans["chat"]["span_id"],
    ]  # fmt: skip
    assert (spans["retrieve"]["type"], spans["generate"]["type"]) == ("RETRIEVER", "LLM")
    assert spans["retrieve"]["inputs"] == {"question": "What is a span?"}
    assert spans["generate"]["outputs"]["choices"][0]["message"]["role"] == "assistant"
    assert all(span["status"] == "OK" for span in spans.values())
    streamed = by_name(stream)["generate"]["outputs"]
    assert isinstance(streamed, str)
    root = by_name(stream)["POST /chat/stream"]  # of which MLflow's page of a session tells
    assert (root["inputs"], root["outputs"]) == ({"body": {"question": "What is a trace?"}}, streamed)
    error = by_name(failed)["read_index"]
    assert (error["status"], error["events"][0]["name"]) == ("ERROR", "exception")
    assert error["events"][0]["attributes"]["exception.message"] == "library.idx is gone"


def test_a_flask_application(destination: dict[str, str], reader: Reader, experiment: str) -> None:
    """The same behind gunicorn, with two workers that share a store, and a graceful stop at once."""
    env = {**destination, **RELEASE}
    with servers.gunicorn("example_apps.flask_shop.app:app", "--workers", "2", env=env) as server:
        order = {"item": "book", "quantity": 2, "card": "4000"}
        answers = [server.post("/orders", order, {"X-User-ID": f"u{number}"}) for number in range(20)]
        assert all(answer.status < 500 for answer in answers)
    output = finish(start("print(tracemw.flush(30))", "-", **destination))
    assert output == "True"
    drained = deliver(destination)
    assert drained["waiting"] == 0
    found = reader.search(experiment)
    assert {trace["metadata"]["mlflow.trace.user"] for trace in found} == {f"u{number}" for number in range(20)}
    assert all(len(trace["spans"]) > 1 and trace["metadata"]["app_version"] == "1.4.0" for trace in found)


def deliver(destination: dict[str, str], timeout: float = 60.0) -> dict[str, Any]:
    """Run `tracemw deliver --once` for what an application left in its store."""
    program = """
    import json
    from tracemw.pipeline.delivery import run_deliverer
    done = run_deliverer(os.environ["TRACEMW_STORE"], os.environ["TRACEMW_DESTINATION"], once=True, timeout=%r)
    print(json.dumps({"delivered": done.delivered, "waiting": done.waiting, "dead": done.dead}))
    """
    found: dict[str, Any] = json.loads(finish(start(program % timeout, "-", **destination), timeout + 30))
    return found


@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_flood_is_delivered_whole(
    destination: dict[str, str], reader: Reader, experiment: str, count: int
) -> None:
    """As many traces as fast as possible: all of them, each with both spans and its facts."""
    output = finish(start(f"several({count}); print(tracemw.flush(120))", "x", **destination), 150)
    assert output == "True"
    found = reader.search(experiment)
    assert {trace["client_request_id"] for trace in found} == {f"x-{number}" for number in range(count)}
    assert len(found) == count and all(len(trace["spans"]) == 2 for trace in found)
    assert {trace["metadata"]["mlflow.trace.session"] for trace in found} == {"s"}


@pytest.fixture
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mlflow]:
    """An MLflow server that a test may kill."""
    python = mlflow_python()
    if python is None:
        pytest.skip("no Python with MLflow")
    server = Mlflow(python, tmp_path_factory.mktemp("own"))
    yield server
    server.kill()


@pytest.mark.slow
def test_server_down_server_killed_application_killed(own_server: Mlflow, experiment: str, tmp_path: Path) -> None:
    """Down for 2,000 requests, killed in the middle of delivery, the application killed: all arrive, once."""
    env = {
        "TRACEMW_DESTINATION": f"mlflow+{own_server.url}?experiment={experiment}",
        "TRACEMW_STORE": f"sqlite:///{tmp_path}/app.db",
    }
    own_server.kill()
    stored = "tracemw.flush(delivered=False); print('stored', flush=True); time.sleep(300)"
    first = start(f"several(2000); {stored}", "a", **env)
    assert first.stdout is not None and first.stdout.readline() == "stored\n"
    own_server.start()
    reader = Reader(own_server.python, own_server.url)
    try:
        wait_for(lambda: len(reader.search(experiment, spans=False)) > 300, timeout=60.0, interval=0.2)
        own_server.kill()
        time.sleep(1.0)
        first.kill()
        first.wait()
        first.stdout.close()
        own_server.start()
        output = finish(start("several(1); print(tracemw.flush(120))", "b", **env), 150)
        assert output == "True"
        found = reader.search(experiment)
        expected = {f"a-{number}" for number in range(2000)} | {"b-0"}
        assert len(found) == 2001 and {trace["client_request_id"] for trace in found} == expected
        assert all(len(trace["spans"]) == 2 for trace in found)
    finally:
        reader.close()


PRELOADED = """
import tracemw
from flask import Flask

app = Flask(__name__)
tracemw.instrument(app)

@app.get("/work")
def work():
    return "done"

@tracemw.trace
def warm_up():
    pass

warm_up()
assert tracemw.flush(20)
"""


def test_gunicorn_that_traced_before_its_workers_were_forked(
    destination: dict[str, str], reader: Reader, experiment: str, tmp_path: Path
) -> None:
    """`--preload` with a warm-up trace: workers deliver their own, and the server stops at once."""
    (tmp_path / "preloaded.py").write_text(PRELOADED)
    options = ("--preload", "--workers", "2")
    with servers.gunicorn("preloaded:app", *options, env=destination, cwd=tmp_path) as server:
        for _ in range(30):
            assert server.get("/work").text == "done"
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 8
    assert deliver(destination)["waiting"] == 0
    names = [trace["tags"]["mlflow.traceName"] for trace in reader.search(experiment, spans=False)]
    assert sorted(names) == ["GET /work"] * 30 + ["warm_up"]


def test_uvicorn_that_is_told_to_stop(destination: dict[str, str], reader: Reader, experiment: str) -> None:
    """SIGTERM right after the last answer, as Docker and Kubernetes do: nothing is lost."""
    with servers.uvicorn("example_apps.fastapi_chat.app:app", env=destination) as server:
        for _ in range(60):
            server.get("/documents/span")
        server.stop(signal.SIGTERM)
    assert deliver(destination)["waiting"] == 0
    assert len(reader.search(experiment, spans=False)) == 60


@pytest.mark.slow
def test_delivery_is_faster_than_mlflows_own_exporter(
    mlflow_server: Mlflow, experiment: str, reader: Reader, tmp_path: Path
) -> None:
    """Complete traces per second to the same server: in full at least as many, with spans alone five times."""
    count = 300
    command = [mlflow_server.python, "-c", THEIRS, f"{experiment}-theirs", str(count)]
    env = servers.clean_environment({**mlflow_environment(), "MLFLOW_TRACKING_URI": mlflow_server.url})
    output = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=200).stdout
    found = reader.search(f"{experiment}-theirs")
    complete = [trace for trace in found if trace["client_request_id"] and len(trace["spans"]) == 2]
    theirs = len(complete) / float(output.split()[-1])
    rates = {"theirs": theirs}
    for fidelity, number in (("full", count), ("fast", 4 * count)):
        options = f"experiment={experiment}-{fidelity}&fidelity={fidelity}"
        variables = {
            "TRACEMW_DESTINATION": f"mlflow+{mlflow_server.url}?{options}",
            "TRACEMW_STORE": f"sqlite:///{tmp_path}/{fidelity}.db",
        }
        body = f"t = time.perf_counter(); several({number}); print(tracemw.flush(120), time.perf_counter() - t)"
        delivered, seconds = finish(start(body, "x", **variables), 150).split()
        assert delivered == "True"
        rates[fidelity] = number / float(seconds)
    print(rates)
    assert rates["full"] >= rates["theirs"] and rates["fast"] >= 5 * rates["theirs"], rates
