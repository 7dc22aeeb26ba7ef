"""OTLP: the standard variables, the Resource, and what the root span says of its trace."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from tests.delivery.backends import Collector, Reply, certificate
from tests.delivery.rows import span_row, trace_row
from tracemw import guard
from tracemw.pipeline.otlp import Otlp, facts, resource
from tracemw.pipeline.target import parse
from tracemw.pipeline.transport import Unavailable
from tracemw.store import StoredTrace, TraceRow

PREFIX = "OTEL_EXPORTER_OTLP_"


@pytest.fixture(autouse=True)
def _fresh_log() -> Iterator[None]:
    """Messages that were logged by other tests are due again."""
    guard._last_logged.clear()
    yield


def send(url: str, row: TraceRow | None = None) -> list[str | None]:
    """Send one trace; return the reasons of refusals."""
    row = row or trace_row(1)
    destination = Otlp(parse(f"otlp+{url}"))
    try:
        trace = StoredTrace(row, [span_row(row, 1), span_row(row, 2)], 1, 1)
        return [result.reason for result in destination.send([trace], ())]
    finally:
        destination.close()


def attributes(message: Any) -> dict[str, str]:
    """Attributes of a protobuf message, as text."""
    return {item.key: item.value.string_value for item in message.attributes}


@pytest.mark.parametrize(
    ("path", "asked_for"),
    [
        ("", "/v1/traces"),
        ("/", "/v1/traces"),
        ("/tenant", "/tenant/v1/traces"),
        ("/own/v1/traces", "/own/v1/traces"),
    ],
)
def test_the_path_of_traces_is_added_to_the_endpoint(collector: Collector, path: str, asked_for: str) -> None:
    """As the standard variable OTEL_EXPORTER_OTLP_ENDPOINT has it."""
    assert send(collector.url + path) == [None]
    assert collector.seen[0].path == asked_for


def test_an_endpoint_for_traces_is_used_as_it_is(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As OTEL_EXPORTER_OTLP_TRACES_ENDPOINT has it."""
    monkeypatch.setenv(f"{PREFIX}TRACES_ENDPOINT", f"{collector.url}/ingest")
    assert send(f"{collector.url}/ingest") == [None]
    assert collector.seen[0].path == "/ingest"


@pytest.mark.parametrize("compression", ["gzip", "deflate", "none", ""])
def test_compression(collector: Collector, monkeypatch: pytest.MonkeyPatch, compression: str) -> None:
    """None without OTEL_EXPORTER_OTLP_COMPRESSION, as the specification says."""
    monkeypatch.setenv(f"{PREFIX}COMPRESSION", compression)
    assert send(collector.url) == [None]
    sent = collector.seen[0].headers.get("Content-Encoding")
    assert sent == (compression if compression in ("gzip", "deflate") else None)
    assert len(collector.spans) == 2


def test_headers(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those for traces count before those for all signals; they are URL-encoded."""
    monkeypatch.setenv(f"{PREFIX}HEADERS", "x-tenant=all")
    send(collector.url)
    monkeypatch.setenv(f"{PREFIX}TRACES_HEADERS", "x-tenant=shop%201, authorization=Bearer%20abc,broken")
    send(collector.url)
    first, second = (request.headers for request in collector.seen)
    assert (first["X-Tenant"], "Authorization" in first) == ("all", False)
    assert (second["X-Tenant"], second["Authorization"]) == ("shop 1", "Bearer abc")


def test_timeout(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """In seconds, as OpenTelemetry's Python exporter reads it."""
    monkeypatch.setenv(f"{PREFIX}TIMEOUT", "0.2")
    collector.judge = lambda request: __import__("time").sleep(1.0)
    with pytest.raises(Unavailable, match="no answer in time"):
        send(collector.url)


def test_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collector with a certificate of its own, one that asks for the client's."""
    pem, key = certificate(tmp_path)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(pem))
    tls.load_cert_chain(pem, key)
    tls.verify_mode = ssl.CERT_REQUIRED
    server = Collector(tls)
    try:
        with pytest.raises(Unavailable, match="not trusted"):
            send(server.url)
        monkeypatch.setenv(f"{PREFIX}CERTIFICATE", str(pem))
        with pytest.raises(Unavailable):
            send(server.url)
        monkeypatch.setenv(f"{PREFIX}CLIENT_CERTIFICATE", str(pem))
        monkeypatch.setenv(f"{PREFIX}CLIENT_KEY", str(key))
        assert send(server.url) == [None]
    finally:
        server.off()


def test_the_resource_has_semantic_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment, version, deployment and region under the conventions' names, and a service name always."""
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "k8s.pod.name=web-1, team=a%20b,service.version=0")
    metadata = {
        "environment": "prod", "app_version": "1.2", "deployment_id": "d1", "region": "eu",
        "mlflow.source.git.commit": "abc", "mlflow.source.name": "/srv/shop.py", "customer": "x",
    }  # fmt: skip
    found = resource(trace_row(1, metadata=metadata))
    expected = {
        "deployment.environment.name": "prod", "service.version": "1.2", "deployment.id": "d1",
        "cloud.region": "eu", "vcs.ref.head.revision": "abc", "service.name": "shop", "k8s.pod.name": "web-1",
        "team": "a b", "telemetry.sdk.language": "python",
    }  # fmt: skip
    assert found.items() >= expected.items()
    assert not any("customer" in key for key in found)
    assert resource(trace_row(1, metadata={"service_name": "orders"}))["service.name"] == "orders"
    assert resource(trace_row(1, metadata={}))["service.name"] == "unknown_service"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "named")
    assert resource(trace_row(1, metadata={}))["service.name"] == "named"


def test_the_root_says_what_is_known_of_the_trace(collector: Collector) -> None:
    """Request id, session, user, metadata of the request, tags and previews; other spans say nothing of it."""
    row = trace_row(1, session_id="s", user_id="u", tags={"a": "b"}, metadata={"customer": "x", "region": "eu"})
    assert send(collector.url, row) == [None]
    root, child = collector.spans
    expected = {
        "tracemw.client_request_id": "request-1", "session.id": "s", "user.id": "u",
        "tracemw.outcome": "completed", "tracemw.metadata.customer": "x", "mlflow.traceTag.a": "b",
        "tracemw.request_preview": "GET /items/1", "tracemw.response_preview": "200", "http.request.method": "GET",
    }  # fmt: skip
    assert attributes(root) == expected
    assert attributes(child) == {}
    assert attributes(collector.requests[0].resource_spans[0].resource)["cloud.region"] == "eu"


def test_what_the_span_says_itself_counts() -> None:
    """Facts that are not known are left out."""
    unknown = ("client_request_id", "outcome", "request_preview", "response_preview")
    assert facts(trace_row(1, metadata={}, **dict.fromkeys(unknown))) == {}


def test_spans_that_a_collector_drops_are_logged(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    """A partial success must not be sent again (the others were kept); it is told of."""
    answer = ExportTraceServiceResponse()
    answer.partial_success.rejected_spans = 2
    answer.partial_success.error_message = "too old"
    collector.judge = lambda request: Reply(200, answer.SerializeToString())
    with caplog.at_level(logging.ERROR, "tracemw"):
        assert send(collector.url) == [None]
    assert "not 2 of its spans: too old" in caplog.text


@pytest.mark.parametrize("body", [b"{}", b'{"partialSuccess": null}', b""])
def test_answers_of_other_kinds_are_fine(collector: Collector, body: bytes) -> None:
    """Not every receiver answers in protobuf."""
    collector.judge = lambda request: Reply(202, body)
    assert send(collector.url) == [None]


def test_a_partial_success_in_json_is_told_of(collector: Collector, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever it brings for a terminal is harmless in the log."""
    body = b'{"partialSuccess": {"rejectedSpans": "2", "errorMessage": "too \\u001b[31mold"}}'
    collector.judge = lambda request: Reply(200, body, {"Content-Type": "application/json"})
    with caplog.at_level(logging.ERROR, "tracemw"):
        assert send(collector.url) == [None]
    assert "not 2 of its spans: too \ufffd[31mold" in caplog.text


@pytest.mark.parametrize("body", [b"<html>log in</html>", b"\xff\xff\xff", b"[]", b'{"partialSuccess'])
def test_what_is_no_answer_of_a_receiver_is_no_acknowledgement(collector: Collector, body: bytes) -> None:
    """It is somebody's between us and the receiver, who may let us through later: the traces wait."""
    collector.judge = lambda request: Reply(200, body)
    with pytest.raises(Unavailable, match="no receiver of OTLP answers so, HTTP 200"):
        send(collector.url)


def test_an_empty_web_page_is_no_acknowledgement(collector: Collector) -> None:
    """An empty message is one of success, but not as HTML."""
    collector.judge = lambda request: Reply(200, b"", {"Content-Type": "text/html; charset=utf-8"})
    with pytest.raises(Unavailable, match="no receiver of OTLP"):
        send(collector.url)
