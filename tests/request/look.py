"""Looking at traces."""

from __future__ import annotations

from pathlib import Path

import tracemw
from tracemw.errors import StoreError
from tracemw.store import open_store


def root(trace: tracemw.Trace) -> tracemw.Span:
    """The root span of a trace."""
    return next(span for span in trace.data.spans if span.parent_id is None)


def duration(trace: tracemw.Trace) -> int:
    """Milliseconds that the root took."""
    taken = trace.info.execution_duration
    assert taken is not None
    return taken


def took(span: tracemw.Span) -> float:
    """Milliseconds that a span took."""
    return (ended(span) - span.start_time_ns) / 1e6


def ended(span: tracemw.Span) -> int:
    """When a span ended."""
    assert span.end_time_ns is not None
    return span.end_time_ns


def named(trace: tracemw.Trace, name: str) -> tracemw.Span:
    """The one span of this name."""
    (found,) = [span for span in trace.data.spans if span.name == name]
    return found


def names(trace: tracemw.Trace) -> list[str]:
    """Names of all spans, the root's first."""
    return [root(trace).name, *sorted(span.name for span in trace.data.spans if span.parent_id is not None)]


def parents(trace: tracemw.Trace) -> dict[str, str | None]:
    """Span name -> name of its parent."""
    by_id = {span.span_id: span.name for span in trace.data.spans}
    return {span.name: by_id[span.parent_id] if span.parent_id else None for span in trace.data.spans}


def stored(path: Path) -> list[tracemw.Trace]:
    """All finished traces of a store that others write, oldest first; none while it is not there yet."""
    try:
        store = open_store(f"sqlite:///{path}", create=False)
        found = store.search(max_results=5000, include_spans=True).traces
    except StoreError:
        return []
    store.close()
    traces = [tracemw.Trace.from_stored(one, suffixes=False) for one in found if one.row.state != "IN_PROGRESS"]
    return sorted(traces, key=lambda trace: root(trace).start_time_ns)
