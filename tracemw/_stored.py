"""Rows of the store -> entities."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tracemw._span_entities import REQUEST_ID, Link, Span, SpanEvent, decoded, shown_status
from tracemw._trace_info import COST, LOCAL_EXPERIMENT, TOKEN_USAGE, TraceInfo, TraceLocation, TraceState
from tracemw.store.rows import SpanRow, StoredTrace, TraceRow


def info_of(row: TraceRow, spans: Sequence[Span]) -> TraceInfo:
    """What is known about the trace; tokens and costs are added up over `spans`."""
    metadata = {"mlflow.trace.session": row.session_id, "mlflow.trace.user": row.user_id, **row.metadata}
    for key, read in ((TOKEN_USAGE, _tokens), (COST, _cost)):
        if key not in metadata and (total := _total(spans, read)):
            metadata[key] = json.dumps(total)
    return TraceInfo(
        trace_id=f"tr-{row.trace_id}",
        trace_location=TraceLocation.from_experiment_id(LOCAL_EXPERIMENT),
        request_time=row.start_ns // 1_000_000,
        state=TraceState(row.state),
        request_preview=row.request_preview,
        response_preview=row.response_preview,
        client_request_id=row.client_request_id,
        execution_duration=None if row.duration_ns is None else row.duration_ns // 1_000_000,
        trace_metadata={key: value for key, value in metadata.items() if value is not None},
        tags={"mlflow.traceName": row.name, **row.tags},
    )


def spans_of(stored: StoredTrace, suffixes: bool) -> list[Span]:
    """The spans: the root first, then in order of their start, parents before their children."""
    depth = _depths(stored.spans)
    root_id = _root_id(stored)
    rows = sorted(stored.spans, key=lambda row: (row.span_id != root_id, row.start_ns, depth[row.span_id]))
    names = [row.name for row in rows]
    return [
        _span(row, name, stored.row.outcome if row.span_id == root_id else None)
        for row, name in zip(rows, _numbered(names) if suffixes else names, strict=True)
    ]


def _root_id(stored: StoredTrace) -> str | None:
    """The root that the trace's facts are of; else a span without a parent, else the earliest without one here."""
    ids = {row.span_id for row in stored.spans}
    if stored.row.root_span_id in ids:
        return stored.row.root_span_id
    tops = [row for row in stored.spans if row.parent_id not in ids]
    return min(tops, key=lambda row: (row.parent_id is not None, row.start_ns)).span_id if tops else None


def _depths(rows: Sequence[SpanRow]) -> dict[str, int]:
    """How far below the top each span is: a clock may give a parent and its child the same start."""
    parents = {row.span_id: row.parent_id for row in rows}
    depths: dict[str, int] = {}
    for span_id in parents:
        path: list[str] = []
        at: str | None = span_id
        while at in parents and at not in depths and at not in path:
            path.append(at)
            at = parents[at]
        above = depths.get(at, -1) if at is not None else -1
        depths.update({below: above + up for up, below in enumerate(reversed(path), 1)})
    return depths


def _span(row: SpanRow, name: str, outcome: str | None) -> Span:
    trace_id, attributes = f"tr-{row.trace_id}", json.loads(row.attributes)
    end = row.end_ns or None
    return Span(
        trace_id=trace_id,
        span_id=row.span_id,
        parent_id=row.parent_id,
        name=name,
        original_name=row.name,
        start_time_ns=row.start_ns,
        end_time_ns=end,
        status=shown_status(row.status, row.status_message, end, attributes.get("tracemw.outcome", outcome)),
        attributes={REQUEST_ID: trace_id, **decoded(attributes, row.scope)},
        events=[
            SpanEvent(event["name"], event["time_ns"], event.get("attributes") or {})
            for event in json.loads(row.events)
        ],
        links=[
            Link(f"tr-{link['trace_id']}", link["span_id"], link.get("attributes") or None)
            for link in json.loads(row.links)
        ],
        kind=row.kind,
        scope=row.scope,
    )


def _numbered(names: list[str]) -> list[str]:
    """The names; those that occur more than once with their number."""
    count, used = Counter(names), Counter[str]()
    numbered: list[str] = []
    for name in names:
        used[name] += 1
        numbered.append(f"{name}_{used[name]}" if count[name] > 1 else name)
    return numbered


# Tokens and costs. A span that calls a model, and one around it that repeats the numbers, count once.

_GEN_AI: Final = {
    "input_tokens": ("input_tokens", "prompt_tokens"),
    "output_tokens": ("output_tokens", "completion_tokens"),
}


def _tokens(attributes: Mapping[str, Any]) -> dict[str, float] | None:
    """The tokens of one span: as MLflow records them, else by OpenTelemetry's conventions."""
    usage = _numbers(attributes.get("mlflow.chat.tokenUsage"))
    if usage:
        return usage
    for kind, names in _GEN_AI.items():
        for name in names:
            count = attributes.get(f"gen_ai.usage.{name}")
            if isinstance(count, int):
                usage.setdefault(kind, count)
    return {**usage, "total_tokens": sum(usage.values())} if usage else None


def _cost(attributes: Mapping[str, Any]) -> dict[str, float] | None:
    return _numbers(attributes.get("mlflow.llm.cost")) or None


def _numbers(value: object) -> dict[str, float]:
    if not isinstance(value, dict):
        return {}
    return {key: number for key, number in value.items() if isinstance(number, (int, float))}


def _total(spans: Sequence[Span], read: Any) -> dict[str, float]:
    own = {span.span_id: read(span.attributes) for span in spans}
    parents = {span.span_id: span.parent_id for span in spans}
    total: Counter[str] = Counter()
    for span_id, numbers in own.items():
        if numbers and not _is_covered(parents.get(span_id), parents, own):
            total.update(numbers)
    return dict(total)


def _is_covered(span_id: str | None, parents: Mapping[str, str | None], own: Mapping[str, object]) -> bool:
    """True if a span or one above it has numbers of its own."""
    for _ in parents:  # at most as many steps as there are spans: parents may form a circle
        if span_id is None or span_id not in parents:
            return False
        if own[span_id]:
            return True
        span_id = parents[span_id]
    return False
