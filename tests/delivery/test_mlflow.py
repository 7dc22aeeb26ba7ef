"""Delivery to a real MLflow server, read back with MLflow's own client."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.delivery.backends import HttpServer, Mlflow, Proxy, Reader, Reply, Request
from tests.delivery.rows import fill, span_row, trace_row
from tests.servers import wait_for
from tracemw import guard
from tracemw.pipeline import delivery
from tracemw.pipeline.delivery import Deliverer, run_deliverer
from tracemw.pipeline.transport import Connection, Endpoint
from tracemw.store import SpanRow, Store, TraceRow

Deliver = Callable[..., delivery.Delivered]


@pytest.fixture
def deliver(store: Store, mlflow_server: Mlflow, experiment: str) -> Deliver:
    """Delivers what is in the store to the test's experiment."""

    def run(url: str = mlflow_server.url, options: str = "") -> delivery.Delivered:
        destination = f"mlflow+{url}?experiment={experiment}{options}"
        return run_deliverer(store.url, destination, once=True, timeout=60.0)

    return run


def own(number: int, **changes: Any) -> TraceRow:
    """A trace whose ids no other test has."""
    return trace_row(random.getrandbits(31), start_ns=time.time_ns() + number * 1_000_000, **changes)


def write(store: Store, row: TraceRow, *spans: SpanRow) -> TraceRow:
    """Queue a trace for delivery."""
    store.write([row], list(spans) or [span_row(row, 1)], outbox=True)
    return row


def test_a_trace_arrives_as_it_was(store: Store, deliver: Deliver, reader: Reader, experiment: str) -> None:
    """Identity, state, previews, metadata, tags; the tree with types, inputs, outputs, status and events."""
    row = own(
        0, name="POST /chat", state="ERROR", status_code=500, outcome="error", session_id="s-1", user_id="jane",
        client_request_id="r-1", request_preview="hi", response_preview="ho", tags={"tier": "gold"},
        metadata={"app_version": "1.4.0", "environment": "test", "mlflow.source.name": "app:app"},
    )  # fmt: skip
    api = {"mlflow.spanType": '"LLM"', "mlflow.spanInputs": '{"q": "hi"}', "mlflow.spanOutputs": '{"a": [1, "2"]}'}
    exception = {"exception.type": "ValueError", "exception.message": "boom", "exception.stacktrace": "Traceback"}
    failed = [{"name": "exception", "time_ns": row.start_ns, "attributes": exception}]
    write(
        store, row,
        span_row(row, 1, status="ERROR", status_message="ValueError: boom", events=failed),
        span_row(row, 2, name="answer", attributes={**api, "model": "m", "tokens": 12, "cost": 0.5}),
        span_row(row, 3, name="answer", attributes={"mlflow.spanType": '"TOOL"', "mlflow.spanOutputs": "42"}),
    )  # fmt: skip
    assert deliver().delivered == 1
    (found,) = reader.search(experiment)
    assert (found["trace_id"], found["state"]) == (f"tr-{row.trace_id}", "ERROR")
    assert (found["client_request_id"], found["request_preview"], found["response_preview"]) == ("r-1", "hi", "ho")
    identity = {"mlflow.trace.session": "s-1", "mlflow.trace.user": "jane"}
    assert found["metadata"].items() >= {**row.metadata, **identity}.items()
    assert found["tags"].items() >= {"tier": "gold", "mlflow.traceName": "POST /chat"}.items()
    assert found["request_time"] == row.start_ns // 1_000_000
    root, llm, tool = sorted(found["spans"], key=lambda span: span["span_id"])
    assert (root["name"], root["parent_id"], root["status"], root["message"]) == (
        "POST /chat", None, "ERROR", "ValueError: boom",
    )  # fmt: skip
    assert root["type"] == "UNKNOWN"  # as MLflow's own roots have it
    assert root["events"] == [{"name": "exception", "attributes": exception}]
    assert [(span["name"], span["type"], span["status"]) for span in (llm, tool)] == [
        ("answer", "LLM", "OK"), ("answer", "TOOL", "OK"),
    ]  # fmt: skip
    assert (llm["inputs"], llm["outputs"], tool["outputs"]) == ({"q": "hi"}, {"a": [1, "2"]}, 42)
    assert llm["parent_id"] == tool["parent_id"] == root["span_id"]
    expected = {"model": "m", "tokens": 12, "cost": 0.5, "session.id": "s-1", "user.id": "jane"}
    assert llm["attributes"].items() >= expected.items()


def needs_fast(server: Mlflow) -> None:
    """Leave a test out with a server that makes no tags of attributes."""
    if server.version < (3, 13):
        pytest.skip("fidelity=fast needs MLflow 3.13")


@pytest.mark.parametrize("options", ["", "&fidelity=fast"])
def test_mlflows_filters_find_it(
    store: Store, mlflow_server: Mlflow, deliver: Deliver, reader: Reader, experiment: str, options: str
) -> None:
    """By version, request id, session and user; where only spans travel, the first two are tags."""
    if options:
        needs_fast(mlflow_server)
    rows = [
        own(number, metadata={"app_version": f"1.{number}"}, client_request_id=f"r-{number}",
            session_id=f"s-{number}", user_id=f"u-{number}")
        for number in range(3)
    ]  # fmt: skip
    for row in rows:
        write(store, row)
    assert deliver(options=options) == delivery.Delivered(3, 0, 0, None)
    fast = bool(options)
    filters = [
        "tags.app_version = '1.1'" if fast else "metadata.app_version = '1.1'",
        "tags.client_request_id = 'r-1'" if fast else "client_request_id = 'r-1'",
        "metadata.`mlflow.trace.session` = 's-1'",
        "metadata.`mlflow.trace.user` = 'u-1'",
    ]
    if mlflow_server.version < (3, 6):  # it knows no such filter
        filters.remove("client_request_id = 'r-1'")
    for filter_string in filters:
        found = reader.search(experiment, filter_string, spans=False)
        assert [trace["trace_id"] for trace in found] == [f"tr-{rows[1].trace_id}"], filter_string


def test_nothing_is_there_twice(store: Store, deliver: Deliver, reader: Reader, experiment: str) -> None:
    """A trace that changes after its delivery is delivered again, whole, and replaces what was there."""
    row = write(store, own(0, tags={"a": "1"}))
    assert deliver().delivered == 1
    store.patch(row.trace_id, tags={"a": "2", "b": "3"}, outbox=True, state="ERROR")
    store.write([], [span_row(row, 5, name="late", end_ns=row.start_ns + 5 * 10**9)], outbox=True)
    assert deliver().delivered == 1
    (found,) = reader.search(experiment)
    assert sorted(span["name"] for span in found["spans"]) == ["GET /items/{id}", "late"]
    assert (found["state"], found["tags"]["a"], found["tags"]["b"]) == ("ERROR", "2", "3")
    assert found["duration"] < 100 and found["client_request_id"] == row.client_request_id


@pytest.mark.parametrize("outcome", ["disconnected", "cancelled"])
def test_a_request_that_was_cut_off_is_neither(
    store: Store, deliver: Deliver, reader: Reader, experiment: str, outcome: str
) -> None:
    """State unspecified, also though the server would make OK of the root's status."""
    row = own(0, state="STATE_UNSPECIFIED", outcome=outcome)
    write(store, row, span_row(row, 1, attributes={"tracemw.outcome": outcome}))
    assert deliver().delivered == 1
    (found,) = reader.search(experiment, f"metadata.`tracemw.outcome` = '{outcome}'")
    assert found["state"] == "STATE_UNSPECIFIED"
    assert found["spans"][0]["status"] == "UNSET"


def test_fifty_wild_traces_among_fifty_plain_ones(
    store: Store, deliver: Deliver, reader: Reader, experiment: str
) -> None:
    """NULs, surrogates, over-long keys and values: all hundred are delivered, cleaned."""
    wild = "a\0b\ud800c"
    long = "x" * 20_000
    for number in range(50):
        write(store, own(number))
        row = own(
            number, name=wild + long, client_request_id=wild + "r" * 100, session_id=wild + long, user_id=long,
            request_preview=wild + long, response_preview=wild, tags={wild: wild, long: long, "": "empty"},
            metadata={wild: wild, long + "1": long, long + "2": ""},
        )  # fmt: skip
        text = json.dumps({"messages": [{"role": "user", "content": wild}], wild: wild})
        attributes = {"mlflow.spanInputs": text, "mlflow.spanType": json.dumps(long), wild: wild, "big": 2**70}
        event = {"name": wild, "time_ns": row.start_ns, "attributes": {wild: wild}}
        write(store, row, span_row(row, 1, name=wild, attributes=attributes, events=[event], status_message=wild))
    assert deliver() == delivery.Delivered(100, 0, 0, None)
    found = reader.search(experiment)
    assert len(found) == 100 and all(len(trace["spans"]) == 1 for trace in found)
    changed = [trace for trace in found if trace["client_request_id"].startswith("a\ufffdb\ufffdc")]
    assert len(changed) == 50
    assert "\0" not in json.dumps(found) and all(len(trace["metadata"]) >= 3 for trace in changed)


def test_attributes_that_the_server_cannot_read_cost_no_trace(
    store: Store, deliver: Deliver, reader: Reader, experiment: str
) -> None:
    """A cost that is no dictionary, a session's over-long name: they arrive as text under other names, or cut."""
    bad: list[tuple[str, Any]] = [
        ("mlflow.llm.cost", 1.5), ("mlflow.llm.cost", "free"), ("mlflow.llm.cost", [1]),
        ("openinference.span.kind", ["LLM"]), ("gen_ai.operation.name", {"a": 1}), ("mlflow.spanType", ["x"]),
        ("mlflow.spanType", '"[1]"'), ("mlflow.chat.tokenUsage", {"input_tokens": "x", "output_tokens": None}),
        ("session.id", "s" * 400), ("gen_ai.conversation.id", "s" * 400), ("user.id", "s" * 400),
    ]  # fmt: skip
    more = {"mlflow.spanInputs": '{"q": 1}', "http.route": "/x"}
    for number in range(33):
        key, value = bad[number % len(bad)]
        row = own(number, session_id=None, user_id=None)
        write(store, row, span_row(row, 1, attributes={**more, key: value}))
    assert deliver() == delivery.Delivered(33, 0, 0, None)
    found = reader.search(experiment)
    spans = [span for trace in found for span in trace["spans"]]
    assert len(found) == len(spans) == 33
    assert all(span["inputs"] == {"q": 1} and span["attributes"]["http.route"] == "/x" for span in spans)
    said = {str(span["attributes"].get("tracemw.refused.mlflow.llm.cost")) for span in spans}
    assert said <= {"None", "1.5", "free", "[1]"}  # older servers take some of them


def test_ten_refused_of_two_hundred(
    store: Store, deliver: Deliver, reader: Reader, experiment: str, proxy: Proxy
) -> None:
    """Through a proxy that refuses their spans: 190 arrive, nothing of the ten, and later these too."""
    rows = [write(store, own(number)) for number in range(200)]
    bad = [bytes.fromhex(row.trace_id) for row in rows[3::20]]

    def judge(request: Request) -> Reply | None:
        refused = request.path == "/v1/traces" and any(id in request.body for id in bad)
        return Reply(400, b"not these") if refused else None

    proxy.judge = judge
    assert deliver(proxy.url) == delivery.Delivered(190, 0, 10, None)
    assert {letter.reason for letter in store.outbox_dead()} == {"spans: HTTP 400 not these"}
    expected = {f"tr-{row.trace_id}" for row in rows} - {f"tr-{id.hex()}" for id in bad}
    assert {trace["trace_id"] for trace in reader.search(experiment, spans=False)} == expected
    proxy.judge = lambda request: None
    assert store.outbox_redeliver() == 10
    assert deliver(proxy.url).delivered == 10
    found = reader.search(experiment)
    assert len(found) == 200 and all(trace["spans"] for trace in found)


def test_facts_that_are_refused_cost_their_trace(
    store: Store, mlflow_server: Mlflow, deliver: Deliver, reader: Reader, experiment: str, proxy: Proxy
) -> None:
    """Its spans are not sent either (to older servers they go first)."""
    rows = [write(store, own(number)) for number in range(10)]
    proxy.judge = lambda request: Reply(400, b"no") if rows[4].trace_id.encode() in request.body else None
    assert deliver(proxy.url) == delivery.Delivered(9, 0, 1, None)
    assert len(reader.search(experiment, spans=False)) == (9 if mlflow_server.version >= (3, 7) else 10)


def test_a_trace_delivered_before_is_not_taken_back(
    store: Store, deliver: Deliver, reader: Reader, experiment: str, proxy: Proxy
) -> None:
    """If its spans are refused later on, what the server has stays there."""
    row = write(store, own(0))
    assert deliver().delivered == 1
    store.patch(row.trace_id, tags={"a": "b"}, outbox=True)
    write(store, own(1))
    id = bytes.fromhex(row.trace_id)
    proxy.judge = lambda request: Reply(400, b"no") if id in request.body else None
    assert deliver(proxy.url) == delivery.Delivered(1, 0, 1, None)
    found = {trace["trace_id"]: len(trace["spans"]) for trace in reader.search(experiment)}
    assert len(found) == 2 and found[f"tr-{row.trace_id}"] == 1


def test_a_tag_deleted_after_delivery_stays_there(
    store: Store, deliver: Deliver, reader: Reader, experiment: str
) -> None:
    """The server adds what it is told to what it has; 3.4 refuses to be told less, so it is told its own."""
    row = write(store, own(0, tags={"keep": "1", "gone": "2"}))
    assert deliver().delivered == 1
    store.patch(row.trace_id, tags={"gone": None, "keep": "3"}, outbox=True)
    assert deliver() == delivery.Delivered(1, 0, 0, None)
    (found,) = reader.search(experiment)
    assert found["tags"].items() >= {"keep": "3", "gone": "2"}.items()


def test_the_server_goes_away_in_the_middle(
    store: Store, reader: Reader, experiment: str, proxy: Proxy
) -> None:
    """After half of the facts: when it is back, all are there, once."""
    rows = [write(store, own(number)) for number in range(150)]
    seen: list[str] = []

    def judge(request: Request) -> Reply | None:
        seen.append(request.path)
        if len(seen) == 80:
            threading.Thread(target=proxy.off).start()
        return None

    proxy.judge = judge
    made = Deliverer(lambda: store, f"mlflow+{proxy.url}?experiment={experiment}")
    try:
        made.notify()
        wait_for(lambda: made.stats()["problem"], timeout=20.0)
        proxy.on()
        assert made.wait_delivered(30)
    finally:
        made.close()
    found = reader.search(experiment)
    assert sorted(trace["trace_id"] for trace in found) == sorted(f"tr-{row.trace_id}" for row in rows)
    assert all(trace["client_request_id"] and len(trace["spans"]) == 1 for trace in found)


def test_a_trace_that_continues_a_callers(
    store: Store, mlflow_server: Mlflow, deliver: Deliver, reader: Reader, experiment: str
) -> None:
    """The caller's facts count, whoever is first; the spans of both make one tree."""
    if mlflow_server.version < (3, 6):
        pytest.skip("this server keeps the spans of a trace as one file")
    outer = own(0, client_request_id="outer", name="outer")
    inner = own(5, trace_id=outer.trace_id, has_parent=True, client_request_id="inner", name="inner")
    parts = [(outer, span_row(outer, 1)), (inner, span_row(inner, 1, parent_id=outer.root_span_id))]
    for order in (parts, parts[::-1]):
        for row, span in order:
            store.delete(trace_ids=[outer.trace_id])
            write(store, row, span)
            assert deliver().delivered == 1
        (found,) = reader.search(experiment)
        assert (found["client_request_id"], found["tags"]["mlflow.traceName"]) == ("outer", "outer")
        assert {span["name"]: span["parent_id"] for span in found["spans"]} == {
            "outer": None, "inner": outer.root_span_id,
        }  # fmt: skip


def test_spans_alone_carry_what_they_can(
    store: Store, mlflow_server: Mlflow, deliver: Deliver, reader: Reader, experiment: str
) -> None:
    """Fidelity fast: previews, session, user, tags; metadata and request id as tags."""
    needs_fast(mlflow_server)
    row = own(0, session_id="s", user_id="u", tags={"t": '{"x": 1}'}, client_request_id="c" * 80)
    write(store, row, span_row(row, 1), span_row(row, 2))
    assert deliver(options="&fidelity=fast").delivered == 1
    (found,) = reader.search(experiment)
    expected = {
        "t": '{"x": 1}', "client_request_id": "c" * 80, "app_version": "1.4.0",
        "mlflow.traceName": "GET /items/{id}",
    }  # fmt: skip
    assert found["tags"].items() >= expected.items()
    assert found["metadata"].items() >= {"mlflow.trace.session": "s", "mlflow.trace.user": "u"}.items()
    assert row.request_preview in found["request_preview"]
    assert len(found["spans"]) == 2


# The server and the experiment.


def test_many_processes_make_one_experiment(mlflow_server: Mlflow, experiment: str) -> None:
    """Whoever is late finds the one that another made."""

    def check(_: int) -> tuple[bool, str]:
        return delivery.check(f"mlflow+{mlflow_server.url}?experiment={experiment}")

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(check, range(6)))
    assert all(ok for ok, _ in answers), answers
    assert f"experiment {experiment}" in answers[0][1] and "MLflow 3." in answers[0][1]


def test_a_deleted_experiment_is_said_to_be_one(
    store: Store, mlflow_server: Mlflow, deliver: Deliver, experiment: str
) -> None:
    """The traces wait for it to be restored, or for another name."""
    write(store, own(0))
    assert deliver().delivered == 1
    found = post(mlflow_server.url, f"get-by-name?experiment_name={experiment}")
    post(mlflow_server.url, "delete", {"experiment_id": found["experiment"]["experiment_id"]})
    write(store, own(1))
    destination = f"mlflow+{mlflow_server.url}?experiment={experiment}"
    left = run_deliverer(store.url, destination, once=True, timeout=1.0)
    assert (left.waiting, left.dead) == (1, 0) and "is deleted: restore it" in (left.problem or "")


def post(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """Ask the server's API for experiments."""
    connection = Connection(Endpoint(url))
    try:
        method, data = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
        kind = {"Content-Type": "application/json"}
        answer = connection.request(method, f"/api/2.0/mlflow/experiments/{path}", data, kind)
        return json.loads(answer.check("experiments").body or b"{}")
    finally:
        connection.close()


@pytest.fixture
def pretender() -> Iterator[Callable[[dict[str, Reply]], HttpServer]]:
    """Makes servers that answer what they are told to, by path."""
    made: list[HttpServer] = []

    def make(answers: dict[str, Reply]) -> HttpServer:
        made.append(HttpServer(lambda request: answers.get(request.path.partition("?")[0], Reply(404))))
        return made[-1]

    yield make
    for each in made:
        each.off()


BY_NAME = "/api/2.0/mlflow/experiments/get-by-name"


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"/version": Reply(200, b"3.3.2")}, "runs MLflow 3.3.2, traces need 3.4 or newer: update the server"),
        ({"/version": Reply(200, b"2.22.0")}, "runs MLflow 2.22.0"),
        ({"/version": Reply(200, b"<html>hello</html>")}, "is no MLflow server"),
        ({}, "is no MLflow server: it has no /version"),
        ({"/version": Reply(401, b"log in")}, "HTTP 401 log in"),
        ({"/version": Reply(302, headers={"Location": "https://sso"})}, "HTTP 302 to https://sso"),
        ({"/version": Reply(503)}, "HTTP 503"),
        ({"/version": Reply(200, b"3.9.0"), BY_NAME: Reply(200, b"<x>")}, "is no JSON"),
        ({"/version": Reply(200, b"3.9.0"), BY_NAME: Reply(200, b"{}")}, "has no 'experiment'"),
        ({"/version": Reply(500, b"starting")}, "HTTP 500 starting"),
        ({"/version": Reply(200, b"3.9.0"), BY_NAME: Reply(500, b"no database")}, "HTTP 500 no database"),
        ({"/version": Reply(200, b"3.9.0"), BY_NAME: Reply(400, b"too long")}, "HTTP 400 too long"),
    ],
)
def test_what_is_no_server_for_us_is_said(
    store: Store, pretender: Callable[[dict[str, Reply]], HttpServer], answers: dict[str, Reply], message: str
) -> None:
    """Too old, something else, behind a log-in: traces wait, and doctor can tell why."""
    server = pretender(answers)
    ok, text = delivery.check(f"mlflow+{server.url}")
    assert not ok and message in text
    fill(store, 3)
    left = run_deliverer(store.url, f"mlflow+{server.url}", once=True, timeout=0.3)
    assert (left.waiting, left.dead, left.delivered) == (3, 0, 0) and message in (left.problem or "")


def test_trouble_at_the_first_contact_is_waited_out(
    store: Store, mlflow_server: Mlflow, experiment: str, proxy: Proxy
) -> None:
    """A 500 to the look for the experiment is the server's: no traceback, growing pauses, then all arrives."""
    proxy.judge = lambda request: Reply(500, b"not ready") if "experiments" in request.path else None
    write(store, own(0))
    swallowed = guard.failures().get("Deliverer.step", 0)
    made = Deliverer(lambda: store, f"mlflow+{proxy.url}?experiment={experiment}")
    try:
        assert not made.wait_delivered(1.5)
        assert "HTTP 500 not ready" in made.stats()["problem"] and len(proxy.seen) <= 10
        proxy.judge = lambda request: None
        assert made.wait_delivered(20)
        assert made.stats()["problem"] is None
        assert guard.failures().get("Deliverer.step", 0) == swallowed
    finally:
        made.close()


@pytest.mark.parametrize("path", ["/v1/traces", "/api/3.0/mlflow/traces"])
@pytest.mark.parametrize("body", [b"<html>log in</html>", b"\xff\xff\xff", b'{"trace": {"trace_info": {}}}'])
def test_only_mlflows_own_answer_is_an_acknowledgement(
    store: Store, deliver: Deliver, reader: Reader, experiment: str, proxy: Proxy, path: str, body: bytes
) -> None:
    """A page to log in at comes with status 200, too: what was sent to it waits, and arrives afterwards."""
    if path == "/v1/traces" and body.startswith(b"{"):
        pytest.skip("an answer of OTLP")
    rows = [write(store, own(number)) for number in range(3)]
    proxy.judge = lambda request: Reply(200, body) if request.path == path else None
    left = run_deliverer(store.url, f"mlflow+{proxy.url}?experiment={experiment}", once=True, timeout=0.5)
    assert (left.delivered, left.waiting, left.dead) == (0, 3, 0) and "answers so" in (left.problem or "")
    proxy.judge = lambda request: None
    assert deliver(proxy.url) == delivery.Delivered(3, 0, 0, None)
    assert [len(trace["spans"]) for trace in reader.search(experiment)] == [1] * len(rows)


def test_a_file_store_is_refused(store: Store, pretender: Callable[[dict[str, Reply]], HttpServer]) -> None:
    """It answers 501 to spans; the message says how to start the server instead."""
    server = pretender(
        {
            "/version": Reply(200, b"3.4.0"),
            BY_NAME: Reply(200, b'{"experiment": {"experiment_id": "1", "lifecycle_stage": "active"}}'),
            "/v1/traces": Reply(501, b"REST OTLP span logging is not supported by FileStore"),
        }
    )
    fill(store, 3)
    left = run_deliverer(store.url, f"mlflow+{server.url}?experiment=x", once=True, timeout=0.3)
    assert (left.waiting, left.dead) == (3, 0)
    assert "keeps its data in files" in (left.problem or "") and "--backend-store-uri" in (left.problem or "")


@pytest.mark.parametrize(
    ("env", "credentials", "expected"),
    [
        ({"USERNAME": "u", "PASSWORD": "p"}, "", "Basic dTpw"),
        ({"TOKEN": "t"}, "", "Bearer t"),
        ({"TOKEN": " t\n"}, "", "Bearer t"),
        ({"TOKEN": "t", "USERNAME": "u", "PASSWORD": "p"}, "", "Basic dTpw"),
        ({"TOKEN": "t"}, "u:p@", "Basic dTpw"),
        ({}, "", None),
    ],
)  # fmt: skip
def test_who_we_are(
    proxy: Proxy, experiment: str, monkeypatch: pytest.MonkeyPatch,
    env: dict[str, str], credentials: str, expected: str | None,
) -> None:  # fmt: skip
    """MLflow's own variables; a name in the URL counts before them, a name and a password before a token."""
    for name, value in env.items():
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
    url = proxy.url.replace("//", f"//{credentials}")
    assert delivery.check(f"mlflow+{url}?experiment={experiment}")[0]
    assert {request.headers.get("Authorization") for request in proxy.seen} == {expected}
    assert all("X-MLFLOW-WORKSPACE" not in request.headers for request in proxy.seen)
    monkeypatch.setenv("MLFLOW_WORKSPACE", "team a")
    delivery.check(f"mlflow+{url}")
    assert proxy.seen[-1].headers["X-MLFLOW-WORKSPACE"] == "team%20a"


def test_the_experiment_of_the_environment(
    store: Store, mlflow_server: Mlflow, reader: Reader, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID where the URL names none, else the default one."""
    destination = f"mlflow+{mlflow_server.url}"
    assert delivery.check(destination)[1].endswith("experiment Default")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")
    assert delivery.check(destination)[1].endswith("experiment 0")
    row = write(store, own(0))
    assert run_deliverer(store.url, destination, once=True, timeout=20.0).delivered == 1
    assert f"tr-{row.trace_id}" in {trace["trace_id"] for trace in reader.search("Default", spans=False)}
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", experiment)
    assert delivery.check(destination)[1].endswith(f"experiment {experiment}")
