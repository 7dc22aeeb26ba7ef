"""Sample traces and filter strings for the tests of the filter language."""

from __future__ import annotations

import json
from typing import Any

from tracemw.store import SpanRow, TraceRow

MS = 1_000_000
NOW = 1_780_000_000_000 * MS  # 2026-05-28


def make_trace(number: int, **facts: Any) -> TraceRow:
    """A trace's row; `number` is its id and, in minutes, its age."""
    row: dict[str, Any] = {
        "trace_id": f"{number:032x}", "root_span_id": None, "has_parent": False, "name": "x",
        "start_ns": NOW - number * 60_000 * MS, "duration_ns": None, "state": "OK", "outcome": None,
        "method": None, "route": None, "status_code": None, "client_request_id": None, "session_id": None,
        "user_id": None, "request_preview": None, "response_preview": None, "metadata": {}, "tags": {},
    }  # fmt: skip
    return TraceRow(**{**row, **facts})


def make_span(trace_id: str, **facts: Any) -> SpanRow:
    """A span's row; `attributes` and `events` may be given as values."""
    row: dict[str, Any] = {
        "trace_id": trace_id, "span_id": "1" * 16, "parent_id": None, "name": "x", "span_type": None,
        "kind": "INTERNAL", "start_ns": NOW, "end_ns": NOW, "status": "UNSET", "status_message": None,
        "attributes": {}, "events": [], "links": "[]", "scope": None,
    }  # fmt: skip
    row |= facts
    for name in ("attributes", "events"):
        if not isinstance(row[name], str):
            row[name] = json.dumps(row[name], ensure_ascii=False, separators=(",", ":"))
    return SpanRow(**row)


def sample_rows() -> tuple[list[TraceRow], list[SpanRow]]:
    """Four traces, a to d, newest first: fine, failed, left by the client, in progress."""
    a = make_trace(
        1, name="a", duration_ns=12_900_000, outcome="completed", method="GET", route="/items/{id}",
        status_code=200, client_request_id="req-1", session_id="s-1", user_id="jané",
        request_preview="How is the weather?", response_preview="100% fine", tags={
            "flag": "on", "dotted.key": "x",
            "mlflow.linkedPrompts": '[{"name": "greet", "version": "2"}, 5, {}]',
        },
        metadata={
            "environment": "prod", "app_version": "1.0.0", "deployment_id": "blue", "region": "eu",
            "mlflow.source.type": "production", "ключ": "значение", "note": "it's", "mlflow.sourceRun": "r1",
        },
    )  # fmt: skip
    b = make_trace(
        61, trace_id=f"{2:032x}", name="b", duration_ns=1500 * MS, state="ERROR", outcome="error", method="POST",
        route="/orders", status_code=503, client_request_id="req-2", session_id="s-1", user_id="bob",
        tags={"flag": "off", "quo`te": "y", 'it\'s "quoted" \\': "z", "mlflow.linkedPrompts": "no json"},
        metadata={
            "environment": "prod", "app_version": "2.0.0", "region": "us", "mlflow.source.type": "production",
        },
    )  # fmt: skip
    c = make_trace(180, trace_id=f"{3:032x}", name="c", duration_ns=3 * MS, state="STATE_UNSPECIFIED",
                   outcome="disconnected")  # fmt: skip
    d = make_trace(240, trace_id=f"{4:032x}", name="d", state="IN_PROGRESS")
    inputs = json.dumps(
        {"query": "Paris or Zürich", "quote": 'say "hi"'}
    )  # escapes, in a string that is escaped again
    error = {"name": "exception", "time_ns": NOW, "attributes": {"exception.type": "ValueError"}}
    spans = [
        make_span(a.trace_id, span_id="a1", name="GET /items/{id}", attributes={"tracemw.outcome": "completed"}),
        make_span(a.trace_id, span_id="a2", name="search", span_type="RETRIEVER", start_ns=NOW - 6 * MS,
                  attributes={"mlflow.spanType": '"RETRIEVER"', "mlflow.spanInputs": inputs}),
        make_span(a.trace_id, span_id="a3", name="generate", span_type="LLM", attributes={
            "model": "gpt-4", "tokens": 120, "cached": True, 'llm."x"': "q"}),
        make_span(b.trace_id, span_id="b1", name="POST /orders", status="ERROR", events=[error]),
        make_span(b.trace_id, span_id="b2", name="search", span_type="RETRIEVER", status="ERROR",
                  start_ns=NOW - 1000 * MS, status_message="down",
                  attributes={"mlflow.spanType": '"RETRIEVER"', "place": "東京"}),
        make_span(b.trace_id, span_id="b3", name="generate", span_type="LLM"),
        make_span(c.trace_id, span_id="c1", name="GET /slow", attributes={"tracemw.outcome": "disconnected"}),
    ]  # fmt: skip
    return [a, b, c, d], spans


# Filter strings, whether MLflow 3.17.2 accepts them (its parser, then the checks of its SQLAlchemy store), and
# whether we do. Where we accept more it is an extension; where less, the string is a slip that MLflow overlooks.
FILTERS: list[tuple[str, bool, bool]] = [
    ("status = 'OK'", True, True),
    ("trace.status = 'OK'", True, True),
    ('attributes.status = "OK"', True, True),
    ("attribute.status != 'ERROR'", True, True),
    ("`status` = 'OK'", True, True),
    ("\"status\" = 'OK'", True, True),
    ("`trace`.`status` = 'OK'", True, True),
    ("status='OK'and name='x'", True, True),
    ("status = 'OK' name = 'x'", True, True),
    ("status = 'OK' AND", True, True),
    ("AND status = 'OK'", True, True),
    ("status IN ('OK', 'ERROR')", True, True),
    ("status in ('OK',)", True, True),
    ('status NOT IN ("OK", "ERROR")', True, True),
    ("status like 'O%'", True, True),
    ("status ILIKE 'o%'", True, True),
    ("status RLIKE '^O'", True, True),
    ("name = 'it''s'", True, True),
    ("name = 'it\\'s'", True, True),
    ('name = "it\'s"', True, True),
    ("name = 'C:\\'", True, True),
    ("name LIKE'x%'", True, True),
    ("name IS NOT NULL", True, True),
    ("request_id IN ('tr-1')", True, True),
    ("client_request_id LIKE 'a%'", True, True),
    ("run_id = 'r'", True, True),
    ("prompt = 'n/1'", True, True),
    ("timestamp > 100", True, True),
    ("trace.timestamp_ms >= 100.5", True, True),
    ("timestamp_ms > '100'", True, True),
    ("timestamp_ms > -100", True, True),
    ("execution_time_ms > 500 AND execution_time < 1e3", True, True),
    ("end_time_ms <= 100", True, True),
    ("tags.x = 'y' AND tag.x != 'z'", True, True),
    ("tags.`x.y` = 'z'", True, True),
    ("tags.\"x.y\" = 'z'", True, True),
    ("tags.'x' = 'z'", True, True),
    ("tags.x.y = 'z'", True, True),
    ("tags.`` = 'x'", True, True),
    ("tags.order = ''", True, True),
    ("tags.x IS NULL", True, True),
    ("tags.`x y` is not null", True, True),
    ("metadata.`mlflow.source.type` = 'production' AND metadata.app_version = '1.0.0'", True, True),
    ("request_metadata.ключ RLIKE 'a|b'", True, True),
    ("metadata.`mlflow.trace.session` IS NOT NULL", True, True),
    ("span.name IN ('a', 'b') AND span.type = 'TOOL'", True, True),
    ("span.status != 'OK'", True, True),
    ("span.content ILIKE '%x%'", True, True),
    ("span.attributes.`x.y` = 'y'", True, True),
    ("span.attributes.x LIKE '%y%'", True, True),
    ("trace.text LIKE '%x%'", True, True),
    ("feedback.quality = 'good'", True, True),
    ("feedback.score >= 0.5", True, True),
    ("expectation.a IS NULL", True, True),
    ("issue.id = 'i'", True, True),
    # Wrong for both.
    ("Status = 'OK'", False, False),
    ("TRACE.status = 'OK'", False, False),
    ("trace_name = 'x'", False, False),
    ("param.x = 'y'", False, False),
    ("spans.name = 'x'", False, False),
    ("span.kind = 'x'", False, False),
    ("span.name > 'a'", False, False),
    ("span.type = 5", False, False),
    ("span.content = 'x'", False, False),
    ("span.attributes. = 'x'", False, False),
    ("text = 'x'", False, False),
    ("status = OK", False, False),
    ("status = `OK`", False, False),
    ("status = 1", False, False),
    ("status > 'OK'", False, False),
    ("status IN ()", False, False),
    ("status IN 'OK'", False, False),
    ("timestamp_ms LIKE '1%'", False, False),
    ("timestamp_ms IN (1, 2)", False, False),
    ("tags.x = 1", False, False),
    ("tags.x > '1'", False, False),
    ("tags.x-y = 'z'", False, False),
    ("tags.1 = 'z'", False, False),
    ("tags = 'z'", False, False),
    ("metadata.x = 5", False, False),
    ("metadata.x > 5", False, False),
    ("prompt = 'n'", False, False),
    ("prompt LIKE 'n/%'", False, False),
    ("feedback.score > '0.5'", False, False),
    ("feedback.quality = 1", False, False),
    ("name == 'x'", False, False),
    ("name <> 'x'", False, False),
    ("name BETWEEN 'a' AND 'b'", False, False),
    ("status IS 'OK'", False, False),
    ("status = NULL", False, False),
    ("'OK' = status", False, False),
    ("1 = 1", False, False),
    ("hello", False, False),
    ("   ", False, False),
    ("status = 'OK';", False, False),
    ("status = 'OK'; status = 'ERROR'", False, False),
    ("name = 'unclosed", False, False),
    ("name = 'a' -- comment", False, False),
    ("name = 'a' /* comment */", False, False),
    ("tags.a-b = 'x'", False, False),
    ("span.attributes.tokens RLIKE 5", False, False),
    ("span.attributes.tokens NOT ILIKE 1e5", False, False),
    ("span.attributes.tokens CONTAINS 5", False, False),
    ("tags.1a = 'x'", True, True),
    ("span.attributes.1a = 'x'", True, True),
    ("metadata.`a-b` = 'x'", True, True),
    ("name RLIKE '(a+)+b'", True, True),
    ("name RLIKE 'a*a*a*b'", True, True),
    ("name RLIKE '(?i)^get .*items.*$'", True, True),
    ("name RLIKE '(?=.*a)(?=.*b)'", True, True),
    ("name RLIKE '(a)(b*)*\\1'", True, True),
    # Extensions.
    ("status = 'OK' OR name = 'x'", False, True),
    ("(status = 'OK')", False, True),
    ("NOT status = 'OK'", False, True),
    ("name NOT LIKE 'a%'", False, True),
    ("name IN ('x', 'y')", False, True),
    ("tags.x IN ('a')", False, True),
    ("metadata.x NOT IN ('a', 'b')", False, True),
    ("client_request_id IS NULL", False, True),
    ("name CONTAINS 'x'", False, True),
    ("execution_time > 500ms", False, True),
    ("timestamp > now - 1h", False, True),
    ("trace_id = 'tr-1'", False, True),
    ("session = 's' AND user_id = 'u'", False, True),
    ("environment = 'prod' AND version = '1'", False, True),
    ("route = '/x' AND method = 'GET' AND status_code >= 500", False, True),
    ("span.execution_time > 1s", False, True),
    ("span.attributes.x > 5", False, True),
    ("span.attributes.x IS NULL", False, True),
    ("text LIKE '%x%'", False, True),  # MLflow takes it with the prefix `trace.` only
    # Slips that MLflow overlooks.
    ("tags. = 'x'", True, False),
    ("status = ('OK', 'ERROR')", True, False),  # its database refuses it then
    ("name LIKE ('a')", True, False),
    ("timestamp_ms = 'x'", True, False),
    ("execution_time > 'slow'", True, False),
    ("metadata.`a``b` = 'x'", True, False),
    ("name RLIKE '('", True, False),
    ("issue.name = 'x'", True, False),
]
