"""Stored traces as people and programs read them: a line, a tree, a dictionary."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Final

from tracemw.store.rows import SpanRow, StoredTrace, TraceRow
from tracemw.terminal import Column, Screen, cut, safe, safe_lines, table, width

if TYPE_CHECKING:
    from tracemw.store.compare import Group

INPUTS: Final = "mlflow.spanInputs"
OUTPUTS: Final = "mlflow.spanOutputs"
_SHOWN_ELSEWHERE: Final = frozenset({INPUTS, OUTPUTS, "mlflow.spanType", "mlflow.traceRequestId"})
_OUTCOMES: Final = frozenset({"disconnected", "cancelled", "interrupted"})
_FACT: Final = 24  # cells of a fact in a line of its own, and of a name of one, on a terminal
_PREFIX: Final = 12  # cells of a trace id that are left on a narrow terminal: enough to tell traces apart

_COLUMNS: Final = (
    Column("STARTED", spare=1),
    Column("STATUS"),
    Column("TOOK", right=True),
    Column("NAME", least=12, weight=1),
    Column("VERSION", least=7, weight=2, spare=3),
    Column("USER", least=8, weight=2, spare=4),
    Column("SESSION", least=8, weight=3, spare=5),
    Column("REQUEST ID", least=12, weight=4, spare=2),
    Column("TRACE ID", least=_PREFIX, weight=5),
)
STATE_STYLES: Final = {"OK": "green", "ERROR": "red", "IN_PROGRESS": "cyan"}


def duration(nanoseconds: float | None) -> str:
    """Return a duration as people say it: `350 µs`, `12.3 ms`, `1.24 s`, `2 m 05 s`."""
    if nanoseconds is None:
        return "-"
    if nanoseconds < 0:  # it ended before it began, as whoever timed it said
        return f"-{duration(-nanoseconds)}"
    for limit, unit, digits in ((1e6, "µs", 0), (1e9, "ms", 1), (60e9, "s", 2)):
        scaled = nanoseconds / {"µs": 1e3, "ms": 1e6, "s": 1e9}[unit]
        if nanoseconds < limit and round(scaled) < 1000:
            return f"{scaled:.{digits if scaled < 100 else 0}f} {unit}"
    minutes, seconds = divmod(round(nanoseconds / 1e9), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} m" if hours else f"{minutes} m {seconds:02} s"


def moment(nanoseconds: int, *, milliseconds: bool = False) -> str:
    """Return a time in the local time zone."""
    try:
        text = datetime.fromtimestamp(nanoseconds // 1_000_000_000).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return str(nanoseconds)
    return f"{text}.{nanoseconds // 1_000_000 % 1000:03}" if milliseconds else text


def status(row: TraceRow) -> str:
    """Return how a trace went, in a few letters."""
    if row.state == "IN_PROGRESS":
        return "running"
    word = "-" if row.state == "STATE_UNSPECIFIED" else row.state
    if row.outcome in _OUTCOMES:
        word = row.outcome or word
    return word if row.status_code is None else f"{word} {row.status_code}"


def listing(screen: Screen, traces: Sequence[StoredTrace], *, headline: bool = True) -> list[str]:
    """Return the lines of a table of traces."""
    rows = [trace.row for trace in traces]
    cells = [
        (
            moment(row.start_ns),
            status(row),
            duration(row.duration_ns),
            row.name,
            row.metadata.get("app_version", ""),
            row.user_id or "",
            row.session_id or "",
            row.client_request_id or "",
            f"tr-{row.trace_id}",
        )
        for row in rows
    ]
    styles = [["dim", STATE_STYLES.get(row.state, "yellow"), "", "bold", "", "", "", "", "dim"] for row in rows]
    lines = table(screen, _COLUMNS, cells, styles)
    return lines if headline else lines[1:]


def one_line(screen: Screen, row: TraceRow) -> str:
    """Return a trace as a line of its own, for a list that goes on."""
    facts = [f"{name}={value}" for name, value in (("user", row.user_id), ("session", row.session_id)) if value]
    before = moment(row.start_ns, milliseconds=True), f"{status(row):<9}", f"{duration(row.duration_ns):>8}"
    after = [*map(safe, facts), f"tr-{row.trace_id}"]
    if screen.columns is not None:
        after = [cut(fact, _FACT) for fact in after[:-1]] + [cut(after[-1], screen.columns // 3)]
    name = screen.fit(safe(row.name), sum(width(part) + 2 for part in (*before, *after)))
    parts = [
        screen.paint(before[0], "dim"),
        screen.paint(before[1], STATE_STYLES.get(row.state, "yellow")),
        before[2],
        screen.paint(name, "bold"),
        *after[:-1],
        screen.paint(after[-1], "dim"),
    ]
    return "  ".join(parts)


# Groups of traces.


_MEASURES: Final = (  # what there is no room for is left out, the least telling first
    ("TRACES", 0), ("ERRORS", 3), ("ERROR %", 0), ("95 % INTERVAL", 6), ("P50", 4), ("P95", 1), ("P99", 5),
    ("ERROR % DIFF", 0), ("P50 DIFF", 7), ("P95 DIFF", 2),
)  # fmt: skip


def comparison(screen: Screen, by: str, groups: Sequence[Group]) -> list[str]:
    """Return the lines of a table of groups; `*` marks a difference from the baseline that is more than chance."""
    columns = [Column(safe(by).upper(), least=10, weight=1)]
    columns += [Column(title, right=True, spare=spare) for title, spare in _MEASURES]
    rows, styles = [], []
    for group in groups:
        name = "(none)" if group.value is None else group.value
        rate, low, high = (_percent(v) for v in (group.error_rate, group.error_rate_low, group.error_rate_high))
        times = [duration(None if v is None else v * 1e6) for v in (group.p50_ms, group.p95_ms, group.p99_ms)]
        rows.append((
            f"{name} (baseline)" if group.is_baseline else name, str(group.count), str(group.errors), rate,
            "-" if group.error_rate is None else f"{low} - {high}", *times,
            _difference(group.error_rate_difference, 100, " pp", group.significant),
            _difference(group.p50_difference_ms, 1, " ms", group.latency_significant),
            _difference(group.p95_difference_ms, 1, " ms", group.latency_significant),
        ))  # fmt: skip
        styles.append(["bold"] + [""] * 7 + [
            _judged(group.error_rate_difference, group.significant),
            *[_judged(group.p50_difference_ms, group.latency_significant)] * 2,
        ])  # fmt: skip
    return table(screen, columns, rows, styles)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def _difference(value: float | None, scale: float, unit: str, significant: bool | None) -> str:
    return "" if value is None else f"{value * scale:+.2f}{unit}{' *' if significant else '  '}"


def _judged(value: float | None, significant: bool | None) -> str:
    return "" if not significant or value is None else "red" if value > 0 else "green"


# One trace as a tree.


def tree(screen: Screen, trace: StoredTrace, *, attributes: bool = False, full: bool = False) -> Iterator[str]:
    """Yield the lines of a whole trace: its facts, and its spans with what went in, out and wrong.

    Args:
        attributes: Show the spans' other attributes, too.
        full: Do not cut values to the terminal's width.
    """
    wide = Screen(None, screen.colour, screen.unicode) if full else screen
    yield from _facts(wide, trace)
    if not trace.spans:
        yield "(no span of it has ended yet)" if trace.row.state == "IN_PROGRESS" else "(no spans)"
    told_below = _told_below(trace.spans)
    for span, lead, body in _walk(screen, trace):
        yield lead + _headline(wide, span, trace.row, len(lead))
        for line in _details(wide, span, len(body), attributes, span.span_id in told_below and not full):
            yield screen.paint(body, "dim") + line


def _facts(screen: Screen, trace: StoredTrace) -> Iterator[str]:
    row = trace.row
    yield _named(screen, row.name, [
        (status(row), STATE_STYLES.get(row.state, "yellow")),
        (duration(row.duration_ns), ""),
        (moment(row.start_ns, milliseconds=True), "dim"),
    ])  # fmt: skip
    facts = {
        "trace id": f"tr-{row.trace_id}",
        "request id": row.client_request_id,
        "session": row.session_id,
        "user": row.user_id,
        "request": row.request_preview,
        "response": row.response_preview,
        **{f"tag {key}": value for key, value in sorted(row.tags.items())},
        **dict(sorted(row.metadata.items())),
    }
    shown = [(_label(screen, name), safe(value)) for name, value in facts.items() if value is not None]
    margin = min(max(width(name) for name, _ in shown), 28)
    for name, value in shown:
        blank = " " * (margin - width(name))
        yield f"  {screen.paint(name + blank, 'dim')}  {screen.fit(value, max(margin, width(name)) + 4)}"
    yield ""


def _walk(screen: Screen, trace: StoredTrace) -> Iterator[tuple[SpanRow, str, str]]:
    """Yield each span with what stands before its first line and before its others.

    Without recursion: spans may be nested a thousand deep, and parents may be missing or form a circle.
    """
    branch, last, pipe, blank = ("├─ ", "└─ ", "│  ", "   ") if screen.unicode else ("|- ", "`- ", "|  ", "   ")
    known = {span.span_id for span in trace.spans}
    children: dict[str | None, list[SpanRow]] = {}
    for span in trace.spans:
        parent = span.parent_id if span.parent_id in known and span.parent_id != span.span_id else None
        children.setdefault(parent, []).append(span)
    seen: set[str] = set()
    tops = [*children.get(None, []), *trace.spans]  # after the roots, whatever hangs on no root
    tops.sort(key=lambda span: span.span_id != trace.row.root_span_id)
    for top in tops:
        stack = [(top, "", "")]
        while stack:
            span, lead, body = stack.pop()
            if span.span_id in seen:
                continue
            seen.add(span.span_id)
            below = [child for child in children.get(span.span_id, []) if child.span_id not in seen]
            yield span, lead, body + (pipe if below else blank)
            for child in reversed(below):
                is_last = child is below[-1]
                stack.append((child, body + (last if is_last else branch), body + (blank if is_last else pipe)))


def _headline(screen: Screen, span: SpanRow, trace: TraceRow, used: int) -> str:
    parts = [(duration(span.end_ns - span.start_ns), "cyan")]
    if span.span_type and span.span_type != "UNKNOWN":
        parts.insert(0, (safe(span.span_type), "dim"))
    if span.status == "ERROR":
        parts.append(("ERROR", "red"))
    elif span.kind not in ("INTERNAL", "SERVER"):
        parts.append((span.kind.lower(), "dim"))
    if span.start_ns > trace.start_ns + (trace.duration_ns or 0) and trace.duration_ns is not None:
        parts.append(("after the response", "dim"))
    return _named(screen, span.name, parts, used)


def _named(screen: Screen, name: str, parts: Sequence[tuple[str, str]], used: int = 0) -> str:
    """Return a name and, behind what of it fits, texts with their styles."""
    shown = screen.fit(safe(name), used + sum(width(text) + 2 for text, _ in parts))
    return "  ".join([screen.paint(shown, "bold"), *(screen.paint(text, style) for text, style in parts)])


def _told_below(spans: Sequence[SpanRow]) -> set[str]:
    """Return the spans whose exception came up from a child, which has the stack trace as well."""
    failed = {span.span_id: _errors(span) for span in spans if span.events != "[]"}
    return {
        span.parent_id
        for span in spans
        if span.parent_id is not None and failed.get(span.span_id, set()) & failed.get(span.parent_id, set())
    }


def _errors(span: SpanRow) -> set[tuple[str, str]]:
    found = [event.get("attributes") or {} for event in _list(span.events) if event.get("name") == "exception"]
    return {
        (str(one.get("exception.type")).rpartition(".")[2], str(one.get("exception.message"))) for one in found
    }


def _details(screen: Screen, span: SpanRow, used: int, attributes: bool, told_below: bool) -> Iterator[str]:
    found = _object(span.attributes)
    for label, key in (("in ", INPUTS), ("out", OUTPUTS)):
        if key in found:
            yield _value(screen, label, found[key], used)
    if attributes:
        for key in sorted(found.keys() - _SHOWN_ELSEWHERE):
            yield _value(screen, _label(screen, key), found[key], used)
    events = _list(span.events)
    failed = [event for event in events if event.get("name") == "exception"]
    for event in events:
        if event not in failed:
            offset = duration(event.get("time_ns", span.start_ns) - span.start_ns)
            name = _label(screen, str(event.get("name")))
            yield _value(screen, f"{name} +{offset}", event.get("attributes") or "", used)
    for event in failed:
        lines = _exception(screen, event.get("attributes") or {}, used)
        yield from list(lines)[:1] if told_below else lines
    if span.status == "ERROR" and span.status_message and not failed:
        yield screen.paint(screen.fit(safe(span.status_message), used), "red")


def _exception(screen: Screen, attributes: dict[str, Any], used: int) -> Iterator[str]:
    kind, message = (
        str(attributes.get("exception.type", "exception")),
        str(attributes.get("exception.message", "")),
    )
    yield screen.paint(screen.fit(safe(f"{kind}: {message}"), used), "red")
    for line in safe_lines(str(attributes.get("exception.stacktrace", "")).strip("\n")):
        if line:
            yield screen.paint(screen.fit(f"  {line}", used), "dim")


def _label(screen: Screen, name: str) -> str:
    return safe(name) if screen.columns is None else cut(safe(name), max(_FACT, screen.columns // 2))


def _value(screen: Screen, label: str, value: Any, used: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"{screen.paint(label, 'dim')}  {screen.fit(safe(text), used + width(label) + 2)}" if text else label


# For programs.


def as_dict(trace: StoredTrace, *, spans: bool = False) -> dict[str, Any]:
    """Return a trace as a dictionary for JSON."""
    row = trace.row
    found: dict[str, Any] = {
        "trace_id": f"tr-{row.trace_id}",
        "name": row.name,
        "start_time": _iso(row.start_ns),
        "start_time_ns": row.start_ns,
        "duration_ms": None if row.duration_ns is None else row.duration_ns / 1e6,
        "state": row.state,
        "outcome": row.outcome,
        "method": row.method,
        "route": row.route,
        "status_code": row.status_code,
        "client_request_id": row.client_request_id,
        "session_id": row.session_id,
        "user_id": row.user_id,
        "request_preview": row.request_preview,
        "response_preview": row.response_preview,
        "metadata": row.metadata,
        "tags": row.tags,
    }
    if spans:
        found["spans"] = [_span_dict(span) for span in trace.spans]
    return found


def _span_dict(span: SpanRow) -> dict[str, Any]:
    attributes = _object(span.attributes)
    return {
        "span_id": span.span_id,
        "parent_id": span.parent_id,
        "name": span.name,
        "span_type": span.span_type or "UNKNOWN",
        "kind": span.kind,
        "start_time_ns": span.start_ns,
        "end_time_ns": span.end_ns,
        "duration_ms": (span.end_ns - span.start_ns) / 1e6,
        "status": span.status,
        "status_message": span.status_message,
        "inputs": _decoded(attributes.get(INPUTS)),
        "outputs": _decoded(attributes.get(OUTPUTS)),
        "attributes": {key: value for key, value in attributes.items() if key not in (INPUTS, OUTPUTS)},
        "events": _list(span.events),
        "links": _list(span.links),
    }


def _iso(nanoseconds: int) -> str | None:
    try:
        return datetime.fromtimestamp(nanoseconds // 1_000_000_000, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S") + (
            f".{nanoseconds // 1_000_000 % 1000:03}Z"
        )
    except (ValueError, OverflowError, OSError):
        return None


def _decoded(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _object(text: str) -> dict[str, Any]:
    found = _decoded(text)
    return found if isinstance(found, dict) else {}


def _list(text: str) -> list[dict[str, Any]]:
    found = _decoded(text)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []
