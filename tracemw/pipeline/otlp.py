"""Delivery to any OpenTelemetry collector or back end: OTLP over HTTP, in protobuf.

The rows are encoded as OTLP directly. OpenTelemetry's own exporter wants the SDK's span objects, which would have
to be made up from the rows, sleeps through its retries by itself, and answers no more than "failed"; what has to
be known here is whether to wait, to split the batch, or to give up a trace. Its environment variables are read as
it reads them.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import ssl
import time
import zlib
from collections.abc import Container, Generator, Sequence
from importlib.metadata import version
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from tracemw.environment import resource_attributes
from tracemw.guard import due
from tracemw.pipeline.batches import Batches, Encoded, Result
from tracemw.pipeline.otlp_encode import Encoder
from tracemw.pipeline.target import Target
from tracemw.pipeline.transport import Connection, Endpoint, Refused, basic, tls
from tracemw.store.rows import SpanRow, StoredTrace, TraceRow

logger = logging.getLogger("tracemw")

PREFIX: Final = "OTEL_EXPORTER_OTLP_"
CREDENTIALS: Final = "the URL's user and password, or OTEL_EXPORTER_OTLP_HEADERS"
PATH: Final = "/v1/traces"
TIMEOUT: Final = 10.0  # seconds
REMEMBERED: Final = 2000  # traces of which the spans that were sent are known

# Metadata of the process, which OTLP has the Resource for; the rest is said of the request, on the root span.
_OF_THE_PROCESS: Final = frozenset({"environment", "app_version", "deployment_id", "region", "service_name"})


class Otlp:
    """A collector as a destination.

    Args:
        target: Its base URL; `/v1/traces` is added to it unless it ends so.

    Raises:
        TracemwError: The package that has OTLP's messages is not installed.
    """

    def __init__(self, target: Target) -> None:
        self._encoder = Encoder()
        self._path = _path(target.url)
        self._compression = (_variable("COMPRESSION") or "none").strip().lower()
        endpoint = Endpoint(target.url, _headers(target), _timeout(), _tls, CREDENTIALS)
        self._url = target.url
        self._connection = Connection(endpoint)
        self._batches = Batches(self._post)
        self._sent: dict[str, frozenset[int]] = {}

    def check(self) -> str:
        """Send a request without spans, which every collector takes."""
        try:
            self._post(b"")
        except Refused:
            pass  # it is there, and has an opinion on requests without spans
        return f"an OTLP receiver at {self._url}"

    def send(self, traces: Sequence[StoredTrace], suspects: Container[int]) -> Generator[Result, None, None]:
        """Send spans; of a trace that was sent before, as far as is known, only those that are new or changed."""
        items = []
        for trace in traces:
            time.sleep(0)  # lets a waiting request have the interpreter
            spans = self._unsent(trace)
            try:
                if spans:
                    items.append(Encoded(trace, self._encode(trace.row, spans)))
            except (ValueError, TypeError, KeyError, AttributeError) as exc:
                yield Result(trace, f"it cannot be encoded: {exc!r}", final=True)
            if not spans:
                yield Result(trace)
        for taken, refused in self._batches.send(items, suspects):
            for item in taken:
                if refused is None:
                    self._remember(item.trace)
                    yield Result(item.trace)
                else:
                    yield Result(item.trace, str(refused), refused.final)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _post(self, body: bytes) -> None:
        headers = {"Content-Type": "application/x-protobuf"}
        if self._compression == "gzip":
            body, headers["Content-Encoding"] = gzip.compress(body, 4), "gzip"
        elif self._compression == "deflate":
            body, headers["Content-Encoding"] = zlib.compress(body, 4), "deflate"
        answer = self._connection.request("POST", self._path, body, headers).check("spans")
        rejected, why = self._encoder.rejected(answer)
        if rejected and due("otlp rejected"):
            logger.error("%s took a request but not %d of its spans: %s", self._url, rejected, why or "no reason")

    def _encode(self, row: TraceRow, spans: Sequence[SpanRow]) -> bytes:
        def attributes_of(span: SpanRow) -> dict[str, Any]:
            attributes = attributes_as_stored(span)
            return {**facts(row), **attributes} if span.span_id == row.root_span_id else attributes

        return self._encoder.trace(spans, resource(row), attributes_of)

    def _unsent(self, trace: StoredTrace) -> list[SpanRow]:
        sent = self._sent.get(trace.row.trace_id, frozenset())
        return [span for span in trace.spans if _print(trace.row, span) not in sent]

    def _remember(self, trace: StoredTrace) -> None:
        self._sent[trace.row.trace_id] = frozenset(_print(trace.row, span) for span in trace.spans)
        if len(self._sent) > REMEMBERED:
            del self._sent[next(iter(self._sent))]


def facts(row: TraceRow) -> dict[str, str]:
    """Return what is known of a trace, as attributes of its root span."""
    found = {
        "tracemw.client_request_id": row.client_request_id,
        "session.id": row.session_id,
        "user.id": row.user_id,
        "tracemw.outcome": row.outcome,
        "tracemw.request_preview": row.request_preview,
        "tracemw.response_preview": row.response_preview,
    }
    kept = {key: value for key, value in found.items() if value is not None}
    kept |= {f"tracemw.metadata.{key}": value for key, value in row.metadata.items() if not _is_of_process(key)}
    return kept | {f"mlflow.traceTag.{key}": value for key, value in row.tags.items()}


def resource(row: TraceRow) -> dict[str, str]:
    """Return the Resource of a trace: what OTEL_RESOURCE_ATTRIBUTES says, and the metadata of its process."""
    pairs = (pair.partition("=") for pair in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "").split(","))
    found = {key.strip(): unquote(value.strip()) for key, _, value in pairs if key.strip()}
    found["telemetry.sdk.language"], found["telemetry.sdk.name"] = "python", "opentelemetry"
    found["telemetry.sdk.version"] = version("opentelemetry-sdk")
    found |= resource_attributes({key: value for key, value in row.metadata.items() if _is_of_process(key)})
    if "service.name" not in found:
        source = row.metadata.get("mlflow.source.name", "")
        name = os.path.basename(source.partition(":")[0]).removesuffix(".py")
        found["service.name"] = os.environ.get("OTEL_SERVICE_NAME") or name or "unknown_service"
    return found


def attributes_as_stored(span: SpanRow) -> dict[str, Any]:
    """Return a span's attributes."""
    found: dict[str, Any] = json.loads(span.attributes)
    return found


def _is_of_process(key: str) -> bool:
    return key in _OF_THE_PROCESS or key.startswith(("mlflow.source.", "mlflow.modelId"))


def _print(row: TraceRow, span: SpanRow) -> int:
    """Return a number that changes with the span, and for a root with what is known of its trace."""
    known = (row.client_request_id, row.session_id, row.user_id, row.request_preview, row.response_preview)
    about = (*known, *sorted(row.metadata.items()), *sorted(row.tags.items()))
    content = (span.span_id, span.parent_id, span.name, span.end_ns, span.status, span.attributes, span.events)
    return hash((content, about if span.span_id == row.root_span_id else ()))


def _path(url: str) -> str:
    """Return what is added to the endpoint: nothing where it names the place of traces already."""
    if url.endswith(PATH) or url == os.environ.get(f"{PREFIX}TRACES_ENDPOINT", "").rstrip("/"):
        return "" if urlsplit(url).path else "/"
    return PATH


def _variable(name: str) -> str | None:
    return os.environ.get(f"{PREFIX}TRACES_{name}") or os.environ.get(f"{PREFIX}{name}")


def _headers(target: Target) -> dict[str, str]:
    headers = {"User-Agent": f"tracemw/{version('tracemw')}"}
    if target.user is not None:
        headers["Authorization"] = basic(target.user, target.password or "")
    for pair in (_variable("HEADERS") or "").split(","):
        name, mark, value = pair.partition("=")
        if mark and name.strip():
            headers[unquote(name.strip()).title()] = unquote(value.strip())
    return headers


def _timeout() -> float:
    try:
        return max(0.1, float(_variable("TIMEOUT") or TIMEOUT))
    except ValueError:
        return TIMEOUT


def _tls() -> ssl.SSLContext:
    names = ("CERTIFICATE", "CLIENT_CERTIFICATE", "CLIENT_KEY")
    return tls(*((f"{PREFIX}{name}", _variable(name)) for name in names))
