"""What MLflow knows about a trace, made of a row of the store: names, lengths and encodings that it takes.

Its databases refuse what does not fit a column, and then the whole trace (or the whole batch) is lost; so
everything is cut and cleaned here. Lengths are those of MLflow's tables.
"""

from __future__ import annotations

import base64
import hashlib
import json
import posixpath
import re
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import Any, Final

from tracemw.pipeline.otlp_encode import clean, clean_json
from tracemw.store.rows import SpanRow, StoredTrace, TraceRow

MAX_REQUEST_ID: Final = 50  # characters
MAX_PREVIEW: Final = 1000
MAX_IDENTITY: Final = 250
MAX_KEY: Final = 250
MAX_METADATA: Final = 8000
MAX_TAG: Final = 4096
MAX_SPAN_TYPE: Final = 500

REFUSED: Final = "tracemw.refused."  # before the name of an attribute that the server would not take
REQUEST_ID: Final = "tracemw.client_request_id"
CUT_OFF: Final = frozenset({"disconnected", "cancelled"})  # the state says the rest
NAME_TAG: Final = "mlflow.traceName"
# The server's own, which a client (or a trace that came from another server) must not set.
SERVER_TAGS: Final = frozenset({"mlflow.artifactLocation", "mlflow.trace.spansLocation"})
_METADATA_ONLY: Final = frozenset(
    {"mlflow.trace_schema.version", "mlflow.trace.session", "mlflow.trace.user", "mlflow.source.name"}
    | {"mlflow.source.type", "mlflow.source.git.branch", "mlflow.source.git.repoURL"}
)
_IDENTITIES: Final = ("session.id", "gen_ai.conversation.id", "user.id")
_OURS: Final = frozenset({"mlflow.spanInputs", "mlflow.spanOutputs"})
# Nobody makes more of these than what they are; a list of what MLflow reads, of a dozen conventions, would grow.
_PLAIN: Final = (
    ("http.", "url.", "server.", "client.", "network.", "user_agent.", "code.", "error.", "exception.")
    + ("db.", "rpc.", "messaging.", "tracemw.")
)
_JSON_STARTS: Final = ("{", "[", '"')  # of text that a server would decode, and store as something else
_NO_TAG_NAME: Final = re.compile(r"[^/\w.\- :]")


def trace_info(row: TraceRow, experiment_id: str) -> dict[str, Any]:
    """Return the body of StartTraceV3: always everything, since what is absent would be reset."""
    start_ms = row.start_ns // 1_000_000
    info: dict[str, Any] = {
        "trace_id": f"tr-{row.trace_id}",
        "trace_location": {
            "type": "MLFLOW_EXPERIMENT",
            "mlflow_experiment": {"experiment_id": experiment_id},
        },
        "request_time": timestamp(start_ms),
        "state": row.state,
        "trace_metadata": mapping(metadata(row).items(), MAX_METADATA),
        "tags": mapping(tags(row).items(), MAX_TAG),
    }
    if row.duration_ns is not None:
        milliseconds = max(0, (row.start_ns + row.duration_ns) // 1_000_000 - start_ms)
        info["execution_duration"] = f"{milliseconds // 1000}.{milliseconds % 1000:03d}s"
    if row.client_request_id:
        info["client_request_id"] = clean(row.client_request_id)[:MAX_REQUEST_ID]
    if row.request_preview:
        info["request_preview"] = cut(row.request_preview, MAX_PREVIEW)
    if row.response_preview:
        info["response_preview"] = cut(row.response_preview, MAX_PREVIEW)
    return info


def metadata(row: TraceRow) -> dict[str, str]:
    """Return a trace's metadata under MLflow's names."""
    found = {**row.metadata, "mlflow.trace_schema.version": "3"}
    if row.session_id:
        found["mlflow.trace.session"] = cut_identity(row.session_id)
    if row.user_id:
        found["mlflow.trace.user"] = cut_identity(row.user_id)
    if row.client_request_id and len(row.client_request_id) > MAX_REQUEST_ID:
        found[REQUEST_ID] = row.client_request_id
    if row.outcome in CUT_OFF:
        found["tracemw.outcome"] = row.outcome
    return found


def tags(row: TraceRow) -> dict[str, str]:
    """Return a trace's tags, its name among them (where MLflow keeps it)."""
    return {NAME_TAG: row.name, **{key: value for key, value in row.tags.items() if key not in SERVER_TAGS}}


def on_every_span(row: TraceRow) -> dict[str, str]:
    """Return attributes that each span of a trace carries.

    With the session on each span the server does not let a late one change the trace's times.
    """
    found = {}
    if row.session_id:
        found["session.id"] = verbatim(cut_identity(row.session_id))
    if row.user_id:
        found["user.id"] = verbatim(cut_identity(row.user_id))
    return found


def on_the_root(row: TraceRow) -> dict[str, str]:
    """Return attributes of the root that the server makes tags and previews of; OTLP has no place for more.

    Metadata and the client's request id become tags; where a tag and a key of the metadata have the same name, the
    tag counts. What MLflow reads from the metadata alone is left out: each tag costs its server two statements.
    """
    wanted = {key: value for key, value in metadata(row).items() if key not in _METADATA_ONLY}
    if row.client_request_id:
        wanted["client_request_id"] = row.client_request_id
    named = ((tag_name(key), value) for key, value in {**wanted, **tags(row)}.items())
    found = {f"mlflow.traceTag.{key}": verbatim(value) for key, value in mapping(named, MAX_TAG).items()}
    previews = {"mlflow.spanInputs": row.request_preview, "mlflow.spanOutputs": row.response_preview}
    for attribute, preview in previews.items():
        if preview:
            found[attribute] = json.dumps(cut(preview, MAX_PREVIEW), ensure_ascii=False)
    return found


def shown_of_the_request(row: TraceRow, span: SpanRow) -> dict[str, str]:
    """Return inputs and outputs for a root that is a request and has none: the previews, as JSON text.

    MLflow's page of a session, its judges and `trace.data.request` take those of the root; without any, the page
    takes those of the first span that has some, and shows a streaming handler's response object.
    """
    if span.span_id != row.root_span_id or span.kind != "SERVER":
        return {}
    previews = {"mlflow.spanInputs": row.request_preview, "mlflow.spanOutputs": row.response_preview}
    return {attribute: _as_json(preview) for attribute, preview in previews.items() if preview}


def type_of_the_root(row: TraceRow, span: SpanRow) -> dict[str, str]:
    """Return the type that MLflow's own roots have where nobody has named one; without it, its client says None.

    Others that have none are OpenTelemetry's: of those the server finds out a type by itself.
    """
    return {"mlflow.spanType": "UNKNOWN"} if span.span_id == row.root_span_id else {}


def _as_json(preview: str) -> str:
    if preview.startswith(_JSON_STARTS):
        try:
            json.loads(preview)
            return preview
        except (ValueError, RecursionError):
            pass
    return json.dumps(preview, ensure_ascii=False)


def span_attributes(
    span: SpanRow, defaults: Mapping[str, str] | None = None, *, decode: bool = False
) -> dict[str, Any]:
    """Return a span's attributes as the server is to read them.

    It takes JSON text in a string for what it stands for, but for numbers and booleans, so those of MLflow's own
    attributes are sent as what they are. It makes the trace's id itself; older ones would believe the attribute.

    Args:
        span: The span.
        defaults: Attributes in the place of those that it does not have.
        decode: Send all of MLflow's own attributes as what they are: older servers keep text as text.
    """
    found: dict[str, Any] = {**(defaults or {}), **json.loads(span.attributes)}
    found.pop("mlflow.traceRequestId", None)
    for key, value in found.items():
        if isinstance(value, str):
            text = clean_json(value) if value[:1] in _JSON_STARTS else value
            found[key] = _decoded(text, decode) if key.startswith("mlflow.") else text
    for key in _IDENTITIES:
        if isinstance(found.get(key), str):
            found[key] = cut_identity(found[key])
    span_type = found.get("mlflow.spanType")
    if isinstance(span_type, str):
        found["mlflow.spanType"] = cut(span_type, MAX_SPAN_TYPE)
    return found


def unread(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return attributes with those that a server may read as text under names that it does not.

    It refuses a trace for a cost that is no dictionary, and for much else, each version for other things.
    """
    found = {}
    for key, value in attributes.items():
        if key == "mlflow.spanType":
            read = not isinstance(value, str) or value.startswith(_JSON_STARTS)
        else:
            read = key not in _OURS and not key.startswith(_PLAIN)
        if read:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            key, value = f"{REFUSED}{key}", verbatim(clean(text))
        found[key] = value
    return found


def status_of(span: SpanRow) -> str:
    """Return a span's status as MLflow has it: what ended without error is OK, what was cut off stays unset."""
    if span.status != "UNSET":
        return span.status
    if '"tracemw.outcome"' not in span.attributes:
        return "OK"
    return "OK" if json.loads(span.attributes).get("tracemw.outcome") == "completed" else "UNSET"


def artifact(trace: StoredTrace) -> bytes:
    """Return a trace's spans as the file `traces.json`, which MLflow's client reads where spans are artifacts."""
    common = on_every_span(trace.row)
    spans = []
    for span in trace.spans:
        shown = {**type_of_the_root(trace.row, span), **shown_of_the_request(trace.row, span)}
        found = {**span_attributes(span, shown), **common, "mlflow.traceRequestId": f"tr-{span.trace_id}"}
        status = status_of(span)
        spans.append(
            {
                "trace_id": _base64(span.trace_id),
                "span_id": _base64(span.span_id),
                "parent_span_id": _base64(span.parent_id) if span.parent_id else None,
                "name": clean(span.name),
                "start_time_unix_nano": span.start_ns,
                "end_time_unix_nano": span.end_ns,
                "events": json.loads(span.events.replace('"time_ns":', '"time_unix_nano":')),
                "status": {"code": f"STATUS_CODE_{status}", "message": clean(span.status_message or "")},
                "attributes": {clean(key): _encoded(value) for key, value in found.items()},
            }
        )
    return json.dumps({"spans": spans}).encode()


def _encoded(value: Any) -> str:
    """Return an attribute as JSON text, which some are already."""
    return value if isinstance(value, str) and value[:1] in _JSON_STARTS else json.dumps(value)


def _base64(digits: str) -> str:
    return base64.b64encode(bytes.fromhex(digits)).decode()


def timestamp(milliseconds: int) -> str:
    """Return a time as the server writes it."""
    seconds, rest = divmod(max(0, milliseconds), 1000)
    text = datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{text}.{rest:03d}Z" if rest else f"{text}Z"


def mapping(pairs: Iterable[tuple[str, str]], max_value: int) -> dict[str, str]:
    """Return keys and values that fit; no two keys become one by being cut or cleaned."""
    found: dict[str, str] = {}
    for key, value in pairs:
        name = clean(key)
        if not name or len(name) > MAX_KEY or name in found:
            name = f"{name[: MAX_KEY - 9]}~{_digest(key)}"
        found[name] = cut(value, max_value)
    return found


def tag_name(key: str) -> str:
    """Return a name that the server takes for a tag that comes in a span; others it leaves out without a word."""
    name = _NO_TAG_NAME.sub("_", key)
    if name.startswith(("/", "..")) or posixpath.normpath(name) != name or name == ".":
        name = name.replace("/", "_").replace("..", "__")
    return name if name != "." else "_"


def cut(text: str, limit: int) -> str:
    """Return clean text of at most so many characters."""
    text = clean(text)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def cut_identity(text: str) -> str:
    """Return a session or user that fits; two that are cut stay two."""
    cleaned = clean(text)
    return cleaned if len(cleaned) <= MAX_IDENTITY else f"{cleaned[: MAX_IDENTITY - 9]}~{_digest(text)}"


def verbatim(text: str) -> str:
    """Return a string that the server reads as this text, also where it looks like JSON."""
    return json.dumps(text, ensure_ascii=False) if text[:1] in _JSON_STARTS else text


def _decoded(text: str, all: bool) -> Any:
    """Return what JSON text stands for; without `all` not objects, arrays and text like them: the server does."""
    if not all and text[:1] in ("{", "["):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if not all and isinstance(value, str) and value[:1] in _JSON_STARTS else value


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
