"""The example applications behind real servers: what a user sees who copies them."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tracemw
from tests import servers
from tests.servers import ROOT, Answer, Server

IDENTITY = {"X-Request-ID": "req-abc-123", "X-Session-ID": "s-1", "X-User-ID": "jane"}
RELEASE = {
    "APP_ENVIRONMENT": "production",
    "APP_VERSION": "1.4.0",
    "DEPLOYMENT_ID": "blue-7",
    "REGION": "eu-west-1",
}
CHAT = "example_apps.fastapi_chat.app:app"
SHOP = "example_apps.flask_shop.app:app"
QUESTION = {"question": "What is a span?"}


@dataclass
class Running:
    """A server and the store it writes to."""

    server: Server
    url: str

    def stop(self) -> None:
        """Stop the server gracefully and read its store from now on."""
        self.server.stop()
        tracemw.configure(destination=self.url)

    def only_trace(self) -> tracemw.Trace:
        """Stop the server; the one trace that its store must hold."""
        self.stop()
        traces = tracemw.search_traces()
        assert [trace.info.client_request_id for trace in traces] == ["req-abc-123"], self.server.output()
        trace = tracemw.get_trace(traces[0].info.trace_id)
        assert trace is not None
        return trace


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A store of the test's own; afterwards this process has no configuration left."""
    yield f"sqlite:///{tmp_path / 'traces.db'}"
    tracemw.configure(destination="memory:")


@contextmanager
def chat(url: str) -> Iterator[Running]:
    """The FastAPI example under uvicorn."""
    with servers.uvicorn(CHAT, env={**RELEASE, "TRACEMW_DESTINATION": url}) as server:
        yield Running(server, url)


@contextmanager
def shop(url: str) -> Iterator[Running]:
    """The Flask example under gunicorn with two workers."""
    with servers.gunicorn(SHOP, "-w", "2", env={**RELEASE, "TRACEMW_DESTINATION": url}) as server:
        yield Running(server, url)


def tree(trace: tracemw.Trace) -> dict[str, Any]:
    """The names of a trace's spans, as nested dicts."""

    def below(parent: str | None) -> dict[str, Any]:
        return {span.name: below(span.span_id) for span in trace.data.spans if span.parent_id == parent}

    return below(None)


def encloses(outer: tracemw.Span, inner: tracemw.Span) -> bool:
    """Whether one span lasted at least as long as another at both ends."""
    assert outer.end_time_ns is not None and inner.end_time_ns is not None
    return outer.start_time_ns <= inner.start_time_ns and outer.end_time_ns >= inner.end_time_ns


def check_facts(trace: tracemw.Trace) -> None:
    """What holds for every traced request: who asked, and which release answered."""
    metadata = trace.info.trace_metadata
    assert trace.info.client_request_id == "req-abc-123"
    assert metadata["mlflow.trace.session"] == "s-1"
    assert metadata["mlflow.trace.user"] == "jane"
    assert metadata["environment"] == metadata["mlflow.source.type"] == "production"
    assert metadata["app_version"] == "1.4.0"
    assert metadata["deployment_id"] == "blue-7"
    assert metadata["region"] == "eu-west-1"


def check_echo(answer: Answer, trace: tracemw.Trace) -> None:
    """The client gets both ids back."""
    assert answer.header("X-Request-ID") == "req-abc-123"
    assert answer.header("X-Trace-ID") == trace.info.trace_id


@pytest.mark.parametrize(("path", "handler"), [("/chat", "chat"), ("/ask", "ask")])
def test_chat_in_either_decorator_order(url: str, path: str, handler: str) -> None:
    """One trace: root, exactly one handler span, retrieval and generation below it, for both orders."""
    with chat(url) as running:
        answer = running.server.post(path, QUESTION, IDENTITY)
        trace = running.only_trace()
    assert answer.status == 200
    assert answer.json()["sources"][0] == "library/span"
    assert tree(trace) == {f"POST {path}": {handler: {"retrieve": {}, "generate": {}}}}
    assert trace.info.state == "OK"
    assert trace.info.tags["topic"] == "library/span"
    assert trace.info.response_preview == answer.json()["answer"]
    check_facts(trace)
    check_echo(answer, trace)


def test_chat_spans_have_types_inputs_and_outputs(url: str) -> None:
    """The spans below the handler say what they did."""
    with chat(url) as running:
        answer = running.server.post("/chat", QUESTION, IDENTITY)
        trace = running.only_trace()
    spans = {span.name: span for span in trace.data.spans}
    assert spans["retrieve"].span_type == "RETRIEVER"
    assert spans["retrieve"].inputs == QUESTION
    assert spans["retrieve"].outputs[0]["metadata"] == {"doc_uri": "library/span"}
    assert spans["generate"].span_type == "LLM"
    assert spans["generate"].outputs["choices"][0]["message"]["content"] == answer.json()["answer"]
    assert spans["generate"].attributes["output_tokens"] > 5
    assert spans["chat"].inputs == {"body": QUESTION}


def test_chat_stream_lasts_until_the_last_token(url: str) -> None:
    """A streamed answer is one trace: the generation's span and the root end with the stream."""
    with chat(url) as running:
        answer = running.server.post("/chat/stream", QUESTION, IDENTITY)
        trace = running.only_trace()
    events = answer.text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    spans = {span.name: span for span in trace.data.spans}
    assert set(spans) == {"POST /chat/stream", "chat_stream", "retrieve", "generate"}
    assert spans["generate"].outputs.startswith("You asked: What is a span?")
    assert encloses(spans["POST /chat/stream"], spans["generate"])
    assert not encloses(spans["chat_stream"], spans["generate"])
    check_facts(trace)


def test_chat_failure(url: str) -> None:
    """The client gets a 500; the trace has state ERROR and the exception on the span that raised it."""
    with chat(url) as running:
        answer = running.server.post("/index/rebuild", headers=IDENTITY)
        trace = running.only_trace()
    assert answer.status == 500
    assert trace.info.state == "ERROR"
    assert tree(trace) == {"POST /index/rebuild": {"rebuild": {"read_index": {}}}}
    failed = next(span for span in trace.data.spans if span.name == "read_index")
    event = next(event for event in failed.events if event.name == "exception")
    assert event.attributes["exception.type"] == "FileNotFoundError"
    check_facts(trace)


def test_chat_unknown_document_and_health(url: str) -> None:
    """A 404 is the client's error, not ours: state OK. Health probes leave no trace."""
    with chat(url) as running:
        assert running.server.get("/health").status == 200
        answer = running.server.get("/documents/unknown", IDENTITY)
        trace = running.only_trace()
    assert answer.status == 404
    assert (trace.info.state, tree(trace)) == ("OK", {"GET /documents/{title}": {}})


@pytest.mark.parametrize(
    ("method", "path", "body", "expected"),
    [
        (
            "POST",
            "/orders",
            b'{"item": "desk", "quantity": 2}',
            {"create_order": {"price": {}, "charge": {}}},
        ),
        ("GET", "/orders/1007", b"", {"show_order": {}}),
    ],
    ids=["trace above route", "trace below route"],
)
def test_shop_in_either_decorator_order(
    url: str, method: str, path: str, body: bytes, expected: dict[str, Any]
) -> None:
    """One trace per request from two worker processes, the same tree for both orders."""
    with shop(url) as running:
        headers = {**IDENTITY, "Content-Type": "application/json"}
        answer = running.server.request(method, path, headers, body)
        trace = running.only_trace()
    route = path.replace("1007", "<int:number>")
    assert answer.status in (200, 201)
    assert tree(trace) == {f"{method} {route}": expected}
    assert trace.info.state == "OK"
    check_facts(trace)
    check_echo(answer, trace)


def test_shop_generator_response(url: str) -> None:
    """An export that is sent while it is read is one trace with the generator's span."""
    with shop(url) as running:
        answer = running.server.get("/orders.csv?count=20", IDENTITY)
        trace = running.only_trace()
    assert len(answer.text.splitlines()) == 21
    spans = {span.name: span for span in trace.data.spans}
    assert set(spans) == {"GET /orders.csv", "export", "rows"}
    assert spans["rows"].outputs == 21
    assert encloses(spans["GET /orders.csv"], spans["rows"])
    check_facts(trace)


def test_shop_failure(url: str) -> None:
    """The client gets a 500; the trace has state ERROR and the exception."""
    with shop(url) as running:
        answer = running.server.post("/orders/1007/refund", headers=IDENTITY)
        trace = running.only_trace()
    assert answer.status == 500
    assert trace.info.state == "ERROR"
    assert tree(trace) == {"POST /orders/<int:number>/refund": {"refund": {}}}
    events = [event for span in trace.data.spans for event in span.events if event.name == "exception"]
    assert {event.attributes["exception.type"] for event in events} == {"ConnectionError"}
    check_facts(trace)


def test_shop_masks_the_card_number(url: str) -> None:
    """What looks like a secret by its key is masked before it is stored."""
    with shop(url) as running:
        running.server.post("/orders", {"item": "lamp", "card": "4111 1111 1111 1111"}, IDENTITY)
        trace = running.only_trace()
    charge = next(span for span in trace.data.spans if span.name == "charge")
    assert charge.inputs["total"] == 39.0
    assert "4111" not in str(charge.inputs["card_number"])


def test_both_applications_share_one_file(url: str) -> None:
    """A uvicorn process and two gunicorn workers write the same file at the same time: nothing is lost."""
    requests = 60
    with chat(url) as one, shop(url) as two:
        for number in range(requests):
            headers = {**IDENTITY, "X-Request-ID": f"req-{number}"}
            answer = (
                two.server.get(f"/orders/{1000 + number}", headers)
                if number % 2
                else one.server.get("/documents/span", headers)
            )
            assert answer.status == 200
        one.server.stop()
        two.stop()
        logs = one.server.output() + two.server.output()
    found = {trace.info.client_request_id for trace in tracemw.search_traces(max_results=1000)}
    assert found == {f"req-{number}" for number in range(requests)}
    assert "locked" not in logs


def test_the_demo_ends_well(tmp_path: Path) -> None:
    """It sends traffic to four real servers, finds every request, shows a tree and compares the versions."""
    command = [sys.executable, "-m", "example_apps.demo", str(tmp_path / "demo")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"All \d{3} requests are in the store", done.stdout)
    assert re.search(r"└─ .*generate", done.stdout)
    assert all(f"\n{version}" in done.stdout for version in ("1.4.0", "1.5.0"))
    assert "Look further" in done.stdout


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_no_server(tmp_path: Path, sig: signal.Signals) -> None:
    """Ctrl-C in mid-traffic: a message, an exit code, and none of its processes is left."""
    command = [sys.executable, "-m", "example_apps.demo", str(tmp_path / "demo")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        servers: list[str] = []
        while len(servers) < 4:
            servers += re.findall(r"http://127\.0\.0\.1:(\d+)", demo.stdout.readline())
        assert len(processes_of(tmp_path)) > 4  # with its own
        demo.send_signal(sig)
        _, message = demo.communicate(timeout=60)
    assert (demo.returncode, message.strip()) == (1, "demo failed: interrupted; the servers are stopped")
    assert processes_of(tmp_path) == []


def processes_of(folder: Path) -> list[int]:
    """Return the processes that were told of a folder, by their command or their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            told = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:  # it has ended, or it is another user's
            continue
        if f"{folder}/".encode() in told:
            found.append(int(process.name))
    return found
