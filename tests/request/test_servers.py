"""Requests through real servers: connections that are kept, bodies that stream, clients that leave."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import tracemw
from tests import servers
from tests.request.apps import PARTS
from tests.request.look import duration, names, parents, root, stored
from tests.servers import Server, wait_for

FASTAPI = "tests.request.apps:fastapi_app"
FLASK = "tests.request.apps:flask_app"
GUNICORNS = {"sync": [], "gthread": ["--worker-class", "gthread", "--threads", "4"]}
LARGE = b"x" * 200_000  # above 64 KiB uvicorn pauses reading, and resumes it in the request's context


class Site:
    """A running server and the store that its traces go to."""

    def __init__(self, server: Server, store: Path) -> None:
        self.server = server
        self.store = store

    def traces(self, number: int) -> list[tracemw.Trace]:
        """The traces, once there are so many of them."""
        wait_for(lambda: len(stored(self.store)) >= number)
        return stored(self.store)


@contextmanager
def serve(kind: str, folder: Path, *options: str, **env: str) -> Iterator[Site]:
    """Run an application with uvicorn or one of gunicorn's workers."""
    content = folder / "content.txt"
    content.write_bytes(b"content " * 20_000)
    env = {"TRACEMW_DESTINATION": f"sqlite:///{folder}/t.db", "FILE": str(content), **env}
    if kind == "uvicorn":
        started = servers.uvicorn(FASTAPI, *options, env=env)
    else:
        started = servers.gunicorn(FLASK, *GUNICORNS[kind], *options, env=env)
    with started as server:
        yield Site(server, folder / "t.db")


def ask_on(connection: http.client.HTTPConnection, method: str, path: str, number: int, body: bytes = b"") -> Any:
    """Send a request on a connection that is kept; returns the answer's JSON."""
    connection.request(method, path, body, {"X-Request-ID": f"r-{number}"})
    return json.loads(connection.getresponse().read())


@pytest.mark.parametrize("kind", ["uvicorn", "sync", "gthread"])
def test_a_connection_that_is_kept(kind: str, tmp_path: Path) -> None:
    """Nothing of one request is in the next one of its connection, though a large body came in between."""
    with serve(kind, tmp_path) as site:
        connection = http.client.HTTPConnection("127.0.0.1", site.server.port, timeout=20)
        answers = [ask_on(connection, "POST", "/upload", 0, LARGE)]
        answers += [ask_on(connection, "GET", "/ids", i) for i in range(1, 5)]
        answers += [ask_on(connection, "GET", "/quiet", 5)]
        connection.close()
        traces = site.traces(5)
    assert answers[0]["size"] == len(LARGE)
    assert [answer["request"] for answer in answers] == [f"r-{i}" for i in range(6)]
    assert len({answer["trace"] for answer in answers}) == 6
    assert answers[5]["trace"] is None
    assert [trace.info.trace_id for trace in traces] == [answer["trace"] for answer in answers[:5]]
    assert [answer["span"] for answer in answers[:5]] == [a["trace"].removeprefix("tr-") for a in answers[:5]]
    # Closing what the upload has opened may take long enough to be told of, as work after the response.
    spans = [[span for span in trace.data.spans if span.name != "background work"] for trace in traces]
    assert [[span.parent_id for span in of_trace] for of_trace in spans] == [[None]] * 5
    if kind != "uvicorn":  # which has no context for each request
        assert {answer["before"] for answer in answers} == {"nothing"}


@pytest.mark.parametrize(
    ("kind", "path"), [("uvicorn", "async"), ("uvicorn", "sync"), ("sync", "sync"), ("gthread", "sync")]
)
def test_streams(kind: str, path: str, tmp_path: Path) -> None:
    """The root lasts as long as the body, tells of its parts, and has the spans made in it as its children."""
    with serve(kind, tmp_path) as site:
        answer = site.server.get(f"/stream/{path}")
        (trace,) = site.traces(1)
    assert len(answer.body) == PARTS * 100
    assert answer.header("x-trace-id") == trace.info.trace_id
    attributes = root(trace).attributes
    assert attributes["http.response.body.size"] == PARTS * 100
    assert PARTS <= attributes["tracemw.chunks"] <= PARTS + 1
    assert 20 <= attributes["tracemw.ttfb_ms"] < duration(trace) / 2
    assert duration(trace) >= PARTS * 20
    assert trace.info.state == "OK"
    tree = parents(trace)
    assert [tree[f"part {i}"] for i in range(PARTS)] == [root(trace).name] * PARTS


@pytest.mark.parametrize(
    ("kind", "path"), [("uvicorn", "async"), ("uvicorn", "sync"), ("sync", "sync"), ("gthread", "sync")]
)
def test_a_client_that_leaves(kind: str, path: str, tmp_path: Path) -> None:
    """A stream that nobody reads to its end is `disconnected`: no success and no error."""
    with serve(kind, tmp_path) as site:
        with site.server.open("GET", f"/stream/{path}") as response:
            assert len(response.read(300)) == 300
        (trace,) = site.traces(1)
        assert "Traceback" not in site.server.output()
    attributes = root(trace).attributes
    assert attributes["tracemw.outcome"] == "disconnected"
    assert attributes["http.response.status_code"] == 200
    assert 3 <= attributes["tracemw.chunks"] < PARTS
    assert trace.info.state == "STATE_UNSPECIFIED"
    assert root(trace).events == []
    assert {parent for name, parent in parents(trace).items() if name.startswith("part")} == {root(trace).name}


@pytest.mark.parametrize("kind", ["uvicorn", "sync", "gthread"])
def test_early_answers(kind: str, tmp_path: Path) -> None:
    """What is answered before or without a handler is a trace, and has our headers: 404, 405, 500, HEAD."""
    with serve(kind, tmp_path) as site:
        asked = [
            ("GET", "/nowhere"),
            ("DELETE", "/ids"),
            ("GET", "/broken"),
            ("OPTIONS", "/ids"),
            ("HEAD", "/ids"),
        ]
        answers = [site.server.request(method, path) for method, path in asked]
        answers.append(site.server.get("/file"))
        traces = site.traces(6)
    told = {trace.info.trace_id: trace for trace in traces}
    for answer in answers:
        span = root(told[answer.header("x-trace-id") or ""])
        assert span.attributes["http.response.status_code"] == answer.status
        assert [name.lower() for name, _ in answer.headers].count("x-request-id") == 1
        assert [name.lower() for name, _ in answer.headers].count("server-timing") == 1
    assert [answer.status for answer in answers[:3]] == [404, 405, 500]
    assert len(answers[5].body) == 160_000
    assert [told[answer.header("x-trace-id") or ""].info.state for answer in answers[:3]] == ["OK", "OK", "ERROR"]
    outcomes = {root(trace).attributes["tracemw.outcome"] for trace in traces}
    assert outcomes == {"completed", "error"}


@pytest.mark.parametrize("kind", ["sync", "gthread"])
def test_files_go_past_us(kind: str, tmp_path: Path) -> None:
    """gunicorn still hands a file to the kernel, and the root knows its size."""
    with serve(kind, tmp_path) as site:
        assert len(site.server.get("/file").body) == 160_000
        (trace,) = site.traces(1)
    assert root(trace).attributes["http.response.body.size"] == 160_000
    assert root(trace).attributes["tracemw.outcome"] == "completed"


@pytest.mark.parametrize("kind", ["sync", "gthread"])
def test_a_client_that_leaves_a_file(kind: str, tmp_path: Path) -> None:
    """A file that was sent in part only is `disconnected`; the root knows how much the server took of it."""
    size = 64 << 20  # more than the sockets' buffers hold
    with (tmp_path / "large").open("wb") as file:
        file.truncate(size)
    with serve(kind, tmp_path, FILE=str(tmp_path / "large")) as site:
        with site.server.open("GET", "/file") as response:
            assert response.read(10) == b"\0" * 10
        (trace,) = site.traces(1)
        assert len(site.server.get("/file").body) == size
        whole = site.traces(2)[1]
    attributes = root(trace).attributes
    assert (attributes["tracemw.outcome"], trace.info.state) == ("disconnected", "STATE_UNSPECIFIED")
    assert 10 <= attributes["http.response.body.size"] < size
    assert root(whole).attributes["tracemw.outcome"] == "completed"
    assert root(whole).attributes["http.response.body.size"] == size


@pytest.mark.parametrize("kind", ["sync", "gthread"])
@pytest.mark.parametrize("status", [204, 304])
def test_answers_without_a_body(kind: str, status: int, tmp_path: Path) -> None:
    """204 and 304 are complete."""
    with serve(kind, tmp_path) as site:
        assert site.server.get(f"/empty/{status}").status == status
        (trace,) = site.traces(1)
    assert root(trace).attributes["tracemw.outcome"] == "completed"


def test_threads_do_not_mix(tmp_path: Path) -> None:
    """Requests that run at once on threads of one worker have their own ids and traces."""
    with serve("gthread", tmp_path) as site, ThreadPoolExecutor(8) as clients:

        def ask(number: int) -> Any:
            return site.server.get("/ids?sleep=0.02", {"X-Request-ID": f"r-{number}"}).json()

        answers = list(clients.map(ask, range(60)))
        traces = site.traces(60)
    assert [answer["request"] for answer in answers] == [f"r-{i}" for i in range(60)]
    assert {answer["before"] for answer in answers} == {"nothing"}
    told = {trace.info.trace_id: trace.info.client_request_id for trace in traces}
    assert told == {answer["trace"]: answer["request"] for answer in answers}


def test_a_background_task_under_uvicorn(tmp_path: Path) -> None:
    """The client has its answer, the root its end; the task is a span of the trace."""
    with serve("uvicorn", tmp_path) as site:
        site.server.get("/task")
        (trace,) = wait_for(lambda: [t for t in stored(site.store) if len(t.data.spans) == 2])
    assert names(trace) == ["GET /task", "background work"]
    assert duration(trace) < 250
    assert trace.info.state == "OK"


@pytest.mark.slow
def test_a_request_that_gunicorn_ends(tmp_path: Path) -> None:
    """A worker that takes too long is ended by gunicorn: the request is an error with its route and exception."""
    with serve("sync", tmp_path, "--timeout", "1") as site:
        with suppress(ConnectionError), site.server.open("GET", "/ids?sleep=30") as response:
            assert response.status == 500  # as newer gunicorns answer; older ones cut the connection
        (trace,) = site.traces(1)
    span = root(trace)
    assert (span.name, trace.info.state) == ("GET /ids", "ERROR")
    assert (span.attributes["tracemw.outcome"], span.attributes["error.type"]) == ("error", "SystemExit")
    (event,) = span.events
    assert event.attributes["exception.type"] == "SystemExit"
    assert "flask_ids" in event.attributes["exception.stacktrace"]
    assert 900 <= duration(trace) < 20_000


def test_gunicorn_access_log(tmp_path: Path) -> None:
    """gunicorn's access line, written outside of any span, has the ids from the environ."""
    line = "%(s)s %({tracemw.request}e)s"
    with serve("sync", tmp_path, "--access-logfile", "-", "--access-logformat", line) as site:
        hostile: list[tuple[str, str | bytes]] = [
            ("X-Request-ID", "r-1"),
            ("X-User-ID", b'jane"\xc2\x85'),
            ("X-Session-ID", "s 1"),
        ]
        answer = site.server.get("/ids", hostile)
        trace_id = answer.header("x-trace-id")
        site.server.get("/quiet", {"X-Request-ID": "r-2"})
        wait_for(lambda: "client_request_id=r-2" in site.server.output())
        written = site.server.output()
    assert f'200 trace_id={trace_id} client_request_id=r-1 session_id="s 1" user_id=-\n' in written
    assert "200 trace_id=- client_request_id=r-2 session_id=- user_id=-\n" in written


def test_uvicorn_access_log(tmp_path: Path) -> None:
    """uvicorn's access line has the ids at its end, streams' and errors' too."""
    with serve("uvicorn", tmp_path, LOG_IDS="1") as site:
        for path in ("/ids", "/broken"):
            site.server.get(path, {"X-Request-ID": f"r-{path[1:]}"})
        wait_for(lambda: "r-broken" in site.server.output())
        written = site.server.output()
        told = {trace.info.client_request_id: trace.info.trace_id for trace in site.traces(2)}
    for path, status in (("ids", 200), ("broken", 500)):
        (line,) = re.findall(rf'"GET /{path} HTTP/1.1" {status} .*', written)
        assert f"trace_id={told[f'r-{path}']} client_request_id=r-{path}" in line


@pytest.mark.parametrize("ending", ["close", "break off"])
def test_a_socket_under_uvicorn(ending: str, tmp_path: Path) -> None:
    """Messages, close code, and whether the client said good-bye."""
    connect: Any = pytest.importorskip("websockets.sync.client").connect
    with serve("uvicorn", tmp_path) as site:
        with connect(f"ws://127.0.0.1:{site.server.port}/socket") as client:
            for text in ("a", "b"):
                client.send(text)
                assert client.recv() == text
            if ending == "break off":
                client.socket.shutdown(socket.SHUT_RDWR)
        (trace,) = site.traces(1)
    attributes = root(trace).attributes
    assert root(trace).name == "WS /socket"
    assert attributes["http.response.status_code"] == 101
    assert attributes["tracemw.websocket.messages_received"] == 2
    assert attributes["tracemw.websocket.messages_sent"] == 2
    code = attributes["tracemw.websocket.close_code"]
    assert code in ((1000,) if ending == "close" else (1005, 1006))  # which one, is the server's to say
    assert trace.info.state == ("STATE_UNSPECIFIED" if code == 1006 else "OK")
    assert parents(trace)["message"] == "WS /socket"


def test_gevent(tmp_path: Path) -> None:
    """Greenlets of one thread have their own ids and traces, and streams nest."""
    GUNICORNS["gevent"] = ["--worker-class", "gevent"]
    with serve("gevent", tmp_path) as site, ThreadPoolExecutor(8) as clients:

        def ask(number: int) -> Any:
            return site.server.get("/ids?sleep=0.05", {"X-Request-ID": f"r-{number}"}).json()

        answers = list(clients.map(ask, range(40)))
        site.server.get("/stream/sync")
        traces = site.traces(41)
    assert [answer["request"] for answer in answers] == [f"r-{i}" for i in range(40)]
    assert {answer["before"] for answer in answers} == {"nothing"}
    stream = next(trace for trace in traces if len(trace.data.spans) > 1)
    assert set(list(parents(stream).values())[1:]) == {root(stream).name}


def test_a_test_client_that_closes_nothing() -> None:
    """Werkzeug's test client leaves responses open: a trace is there when its body is complete."""
    command = [sys.executable, "-c", CLIENT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["completed", "completed", "1", "2"]


CLIENT = """
from flask import Flask
import tracemw
from tracemw.testing import capture_traces

app = Flask("x")
app.wsgi_app = tracemw.WSGITraceMiddleware(app.wsgi_app)

@app.get("/")
def index():
    return {"a": 1}

with capture_traces() as traces:
    client = app.test_client()
    first = client.get("/")
    seen = len(traces)
    client.get("/")
    print(*(t.data.spans[0].attributes["tracemw.outcome"] for t in traces), seen, len(traces))
"""
