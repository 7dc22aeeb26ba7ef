"""Delivery to an MLflow server over HTTP, without MLflow's package.

Spans go in OTLP requests, many traces in one; each trace's facts, which OTLP has no place for, by StartTraceV3.
Both are upserts, so a trace may be sent again. A server of MLflow 3.4 or newer is needed (OTLP came with it), on a
database: the file store has no OTLP. What changed since: 3.6 reads spans from its database (before, from an
artifact of each trace), 3.7 takes compressed requests and JSON text as attributes, 3.13 makes tags of the root's
attributes.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import ssl
import threading
import time
from collections import deque
from collections.abc import Container, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from queue import SimpleQueue
from typing import Any, Final
from urllib.parse import quote, urlencode, urlsplit

from tracemw.guard import due
from tracemw.pipeline import mlflow_facts as facts
from tracemw.pipeline.batches import Batches, Encoded, Result
from tracemw.pipeline.otlp_encode import Encoder
from tracemw.pipeline.target import Target
from tracemw.pipeline.transport import Answer, Connection, Endpoint, Refused, Unavailable, Unfit, basic, tls
from tracemw.store.rows import SpanRow, StoredTrace

OLDEST: Final = (3, 4)
SPANS_IN_STORE: Final = (3, 6)
COMPRESSION: Final = (3, 7)
JSON_TEXT: Final = (3, 7)
FACTS_FIRST: Final = (3, 7)  # 3.6 says of each trace at once that its spans are there
FINALIZED: Final = (3, 12)
TAGS_IN_SPANS: Final = (3, 13)
GROUP: Final = 100  # traces whose facts are sent before their spans follow in one request
THREADS: Final = 4  # connections for the facts: small requests that wait for the server's disk
GZIP_LEVEL: Final = 4
CREDENTIALS: Final = (
    "the URL's user and password, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
)
API: Final = "/api/3.0/mlflow/traces"

_JSON: Final = {"Content-Type": "application/json"}
_PROTOBUF: Final = {"Content-Type": "application/x-protobuf"}

logger = logging.getLogger("tracemw")


class Mlflow:
    """An MLflow server as a destination.

    Args:
        target: The server's URL; options `experiment` (a name, made if it is not there) and `fidelity`.

    Raises:
        TracemwError: The package that has OTLP's messages is not installed.
    """

    def __init__(self, target: Target) -> None:
        self._wants_fast = target.options.get("fidelity") == "fast"
        self._encoder = Encoder()
        self._server = Server(target, self._encoder)
        self._batches = Batches(self._server.post_spans, partial(self._encode, plainer=True))

    @property
    def fast(self) -> bool:
        """True where everything goes in the spans, as far as they have a place for it."""
        return self._wants_fast and self._server.version >= TAGS_IN_SPANS

    def check(self) -> str:
        """Look at the server's version, and find or make the experiment."""
        text = self._server.connect()
        if self._wants_fast and not self.fast:
            text += "; fidelity=fast needs 3.13 or newer, so traces are delivered in full"
            if due("mlflow fidelity"):
                logger.warning("%s", text)
        return text

    def send(self, traces: Sequence[StoredTrace], suspects: Container[int]) -> Generator[Result, None, None]:
        """Send facts and spans, a group of traces at a time."""
        if self._server.experiment is None:
            self.check()
        try:
            for start in range(0, len(traces), GROUP):
                yield from self._send(traces[start : start + GROUP], suspects)
        except (Unavailable, Unfit):
            self._server.experiment = None  # whoever answers the next time may be another server
            raise

    def close(self) -> None:
        """Close the connections."""
        self._server.close()

    def _send(self, traces: Sequence[StoredTrace], suspects: Container[int]) -> Iterator[Result]:
        """Send a group: facts, spans, and the facts of those whose facts the server would make from the spans."""
        facts_first = not self.fast and self._server.version >= FACTS_FIRST
        before = [trace for trace in traces if is_settled(trace)] if facts_first else []
        refused: set[int] = set()
        for result in self._server.post_facts(before):
            if result.reason is not None:
                refused.add(result.trace.id)
                yield result
        told = {trace.id for trace in before}
        after = []
        items = self._encoded([trace for trace in traces if trace.id not in refused])
        for result in self._post(items, suspects):
            if result.reason is None and not self.fast and result.trace.id not in told:
                after.append(result.trace)
            else:
                yield result
        yield from self._server.post_facts(after)

    def _post(self, items: Iterable[Encoded | Result], suspects: Container[int]) -> Iterator[Result]:
        """Post spans; take back the facts of a trace that had nothing but them."""
        encoded = []
        for item in items:
            if isinstance(item, Encoded):
                encoded.append(item)
            else:
                self._server.take_back(item.trace)
                yield item
        for taken, refusal in self._batches.send(encoded, suspects):
            if refusal is not None:
                self._server.take_back(taken[0].trace)
                yield Result(taken[0].trace, str(refusal), refusal.final)
            else:
                yield from (Result(item.trace) for item in taken)

    def _encoded(self, traces: Iterable[StoredTrace]) -> Iterator[Encoded | Result]:
        for trace in traces:
            time.sleep(0)  # lets a waiting request have the interpreter
            try:
                yield Encoded(trace, self._encode(trace))
            except (ValueError, TypeError, KeyError, AttributeError) as exc:
                yield Result(trace, f"it cannot be encoded: {exc!r}", final=True)

    def _encode(self, trace: StoredTrace, plainer: bool = False) -> bytes:
        row, spans = trace.row, trace.spans
        common = facts.on_every_span(row)
        decode = self._server.version < JSON_TEXT

        def attributes_of(span: SpanRow) -> dict[str, Any]:
            shown = {} if self.fast else facts.shown_of_the_request(row, span)
            shown = {**facts.type_of_the_root(row, span), **shown}
            found = facts.span_attributes(span, shown, decode=decode)
            if plainer:
                found = facts.unread(found)
            if self.fast and span.span_id == row.root_span_id:
                found = {**facts.on_the_root(row), **found}
            return {**found, **common}

        if self.fast and row.has_parent:  # the server takes tags from a span without parent only
            spans = [replace(s, parent_id=None) if s.span_id == row.root_span_id else s for s in spans]
        return self._encoder.trace(spans, {}, attributes_of, facts.status_of)


def is_settled(trace: StoredTrace) -> bool:
    """True where spans that come after a trace's facts leave them as they are.

    The facts may then go first, which takes the server half the time: it inserts them instead of merging them.
    It changes the times of a trace for spans outside of them and the state for one that is no outcome, and who
    else may have told of a trace with a remote parent shows only once the trace is there.
    """
    row = trace.row
    if row.has_parent or row.duration_ns is None or row.state not in ("OK", "ERROR"):
        return False
    start, end = (time // 1_000_000 for time in (row.start_ns, row.start_ns + row.duration_ns))
    return all(start <= span.start_ns // 1_000_000 and span.end_ns // 1_000_000 <= end for span in trace.spans)


class Server:
    """What we ask of an MLflow server.

    Attributes:
        version: Of the server, major and minor; nothing before `connect`.
        experiment: Id of the experiment, None before `connect`.
    """

    def __init__(self, target: Target, encoder: Encoder) -> None:
        self._encoder = encoder
        self.url = target.url
        self.version: tuple[int, ...] = ()
        self.experiment: str | None = None
        name = target.options.get("experiment") or os.environ.get("MLFLOW_EXPERIMENT_NAME")
        self._fixed = None if name else os.environ.get("MLFLOW_EXPERIMENT_ID")
        self._name = name or "Default"
        endpoint = Endpoint(target.url, _headers(target), context=_tls, credentials=CREDENTIALS)
        self._connections = [Connection(endpoint) for _ in range(THREADS)]
        self._made: set[int] = set()  # traces of which the server has the facts alone, by us

    def connect(self) -> str:
        """Look at the server's version, and find or make the experiment; return a line about it.

        Raises:
            Unavailable: There is no answer, or one that says it has trouble of its own.
            Unfit: It is too old, is no MLflow server, or lets us not in.
        """
        try:
            return self._connect()
        except Refused as exc:  # there is no trace in this that could be at fault
            raise (Unfit if exc.final else Unavailable)(str(exc)) from exc

    def _connect(self) -> str:
        found = self._version()
        self.version = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
        if self.version < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise Unfit(f"{self.url} runs MLflow {found}, traces need {oldest} or newer: update the server")
        self.experiment = self._fixed or self._find_experiment(self._name)
        return f"MLflow {found} at {self.url}, experiment {self._fixed or self._name}"

    def close(self) -> None:
        """Close the connections."""
        for connection in self._connections:
            connection.close()

    def _version(self) -> str:
        answer = self._connections[0].request("GET", "/version")
        if answer.status == 404:
            raise Unfit(f"{self.url} is no MLflow server: it has no /version")
        text = answer.check(f"asking {self.url} for its version").text
        if not re.match(r"\d+\.\d+", text):
            raise Unfit(f"{self.url} is no MLflow server: it says it is version {text[:40]!r}")
        return text

    def _find_experiment(self, name: str) -> str:
        path = "/api/2.0/mlflow/experiments/"
        for _ in range(2):
            query = urlencode({"experiment_name": name})
            answer = self._connections[0].request("GET", f"{path}get-by-name?{query}")
            if answer.status != 404:
                found = _part(answer.check(f"looking for the experiment {_short(name)}"), "experiment")
                if found.get("lifecycle_stage") == "deleted":
                    raise Unfit(f"the experiment {name!r} is deleted: restore it, or name another one")
                return str(found["experiment_id"])
            body = json.dumps({"name": name}).encode()
            answer = self._connections[0].request("POST", f"{path}create", body, _JSON)
            if b"RESOURCE_ALREADY_EXISTS" not in answer.body:  # another process may have been faster
                return str(_part(answer.check(f"making the experiment {_short(name)}"), "experiment_id"))
        raise Unavailable(f"the experiment {_short(name)} is neither found nor made")

    def post_spans(self, body: bytes) -> None:
        """Post spans of many traces: all are taken, or none."""
        headers = {**_PROTOBUF, "x-mlflow-experiment-id": self.experiment or ""}
        if self.version >= COMPRESSION:
            body, headers["Content-Encoding"] = gzip.compress(body, GZIP_LEVEL), "gzip"
        answer = self._connections[0].request("POST", "/v1/traces", body, headers)
        if answer.status == 501:
            raise Unfit(
                f"the MLflow server {self.url} keeps its data in files, which have no place for spans: start it "
                "with --backend-store-uri sqlite:///mlflow.db, or another database"
            )
        if answer.status == 404:
            raise Unavailable(f"the experiment {self.experiment} is not there: {answer.text}")
        self._encoder.rejected(answer.check("spans"))

    def post_facts(self, traces: Sequence[StoredTrace]) -> Iterator[Result]:
        """Post the facts of traces over a few connections; yield results in the order in which they come."""
        pending, results = deque(traces), SimpleQueue[Result | Exception | None]()
        self._made.clear()
        workers = [
            threading.Thread(target=self._work, args=(connection, pending, results), daemon=True)
            for connection in self._connections[: len(traces)]
        ]
        for worker in workers:
            worker.start()
        trouble: Exception | None = None
        try:
            for _ in workers:
                while (result := results.get()) is not None:
                    if isinstance(result, Result):
                        yield result
                    else:
                        trouble = trouble or result
        finally:
            pending.clear()
            for worker in workers:  # who stops early must not find a connection in use the next time
                worker.join()
        if trouble is not None:
            raise trouble

    def _work(
        self, connection: Connection, pending: deque[StoredTrace], results: SimpleQueue[Result | Exception | None]
    ) -> None:
        try:
            while pending:
                try:
                    trace = pending.popleft()
                except IndexError:  # another thread was faster
                    break
                results.put(self._post_facts(connection, trace))
        except Exception as exc:  # told to the thread that waits for the results
            pending.clear()
            results.put(exc)
        finally:
            results.put(None)

    def _post_facts(self, connection: Connection, trace: StoredTrace) -> Result:
        try:
            info = facts.trace_info(trace.row, self.experiment or "")
            if trace.row.has_parent and self._is_told(connection, info):
                return Result(trace)
            answer = connection.request("POST", API, _facts(info), _JSON)
            if answer.status == 500 and b"blank-out" in answer.body:  # 3.4 wants all that it has once more
                answer = connection.request("POST", API, _facts(self._with_theirs(connection, info)), _JSON)
            if answer.status == 404 and b"no longer exists" not in answer.body:
                raise Unavailable(f"the experiment {self.experiment} is not there: {answer.text}")
            told = _part(answer.check("the trace's facts"), "trace", "trace_info")
            if not isinstance(told, dict) or told.get("trace_id") != info["trace_id"]:
                raise Unavailable(f"the trace's facts: no MLflow server answers so: {answer.text[:100]}")
            if self.version < SPANS_IN_STORE:
                self._put_artifact(connection, trace, told)
        except Refused as exc:
            return Result(trace, str(exc), exc.final)
        if b"mlflow.trace.spansLocation" not in answer.body:
            self._made.add(trace.id)
        return Result(trace)

    def _put_artifact(self, connection: Connection, trace: StoredTrace, told: Any) -> None:
        """Store the spans where servers before 3.6 read them."""
        found = told.get("tags", {}).get("mlflow.artifactLocation", "")
        location = urlsplit(found)
        if location.scheme != "mlflow-artifacts":
            raise Unfit(
                f"{self.url} keeps spans as artifacts and does not serve them ({found}): "
                "update it to MLflow 3.6 or newer, or start it with --serve-artifacts"
            )
        path = f"/api/2.0/mlflow-artifacts/artifacts/{quote(location.path.strip('/'))}/traces.json"
        answer = connection.request("PUT", path, facts.artifact(trace), _JSON)
        _json(answer.check("the spans' artifact"))

    def _is_told(self, connection: Connection, info: Mapping[str, Any]) -> bool:
        """True where the service that called ours has told its facts of their common trace: they count."""
        answer = connection.request("GET", f"{API}/{info['trace_id']}")
        if answer.status != 200:
            return False
        found = _json(answer).get("trace", {}).get("trace_info", {})
        if self.version >= FINALIZED:
            told = found.get("trace_metadata", {}).get("mlflow.trace.infoFinalized") == "true"
        else:
            told = facts.NAME_TAG in found.get("tags", {})
        return bool(told and found.get("request_time") != info["request_time"])

    def _with_theirs(self, connection: Connection, info: dict[str, Any]) -> dict[str, Any]:
        """Return facts with the tags and metadata that the server has of the trace, and we do not."""
        answer = connection.request("GET", f"{API}/{info['trace_id']}").check("the trace's facts")
        theirs = _part(answer, "trace", "trace_info")
        return {**info, **{name: {**theirs.get(name, {}), **info[name]} for name in ("tags", "trace_metadata")}}

    def take_back(self, trace: StoredTrace) -> None:
        """Delete the facts of a trace whose spans were refused, if the server has nothing else of it."""
        if trace.id not in self._made:
            return
        body = json.dumps({"experiment_id": self.experiment, "request_ids": [f"tr-{trace.row.trace_id}"]}).encode()
        self._connections[0].request("POST", f"{API}/delete-traces", body, _JSON)


def _facts(info: Mapping[str, Any]) -> bytes:
    return json.dumps({"trace": {"trace_info": info}}, ensure_ascii=False).encode()


def _json(answer: Answer) -> Any:
    """Return what an answer says; a page to log in at, or to accept terms, comes with status 200, too."""
    try:
        return json.loads(answer.body)
    except (ValueError, RecursionError):
        raise Unavailable(f"no MLflow server answers so: {answer.text[:100]!r} is no JSON") from None


def _part(answer: Answer, *names: str) -> Any:
    found = _json(answer)
    for name in names:
        if not isinstance(found, dict) or name not in found:
            raise Unavailable(f"no MLflow server answers so: {answer.text[:100]!r} has no {name!r}")
        found = found[name]
    return found


def _short(name: str) -> str:
    return repr(name if len(name) <= 60 else f"{name[:59]}…")


def _headers(target: Target) -> dict[str, str]:
    """Return what every request carries; MLflow's own variables say who we are."""
    headers = {"User-Agent": f"tracemw/{version('tracemw')}"}
    user = target.user or os.environ.get("MLFLOW_TRACKING_USERNAME")
    password = target.password if target.user else os.environ.get("MLFLOW_TRACKING_PASSWORD")
    token, workspace = os.environ.get("MLFLOW_TRACKING_TOKEN", "").strip(), os.environ.get("MLFLOW_WORKSPACE")
    if user and password is not None:
        headers["Authorization"] = basic(user, password)
    elif token:
        headers["Authorization"] = f"Bearer {token}"
    if workspace:
        headers["X-MLFLOW-WORKSPACE"] = quote(workspace)
    return headers


def _tls() -> ssl.SSLContext:
    """Return TLS settings as MLflow's own variables have them."""
    names = ("MLFLOW_TRACKING_SERVER_CERT_PATH", "MLFLOW_TRACKING_CLIENT_CERT_PATH")
    context = tls(*((name, os.environ.get(name)) for name in names))
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").strip().lower() in ("true", "1"):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
