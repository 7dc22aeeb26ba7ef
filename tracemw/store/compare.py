"""Error rates and latencies of groups of traces, and whether they differ by more than chance.

This is the comparison of versions, regions, feature flags or users: one call instead of a loop over
`search_traces`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tracemw.errors import FilterError

from . import tokens
from .fields import ATTRIBUTES, Operand, metadata, resolve
from .filter import Where, compile_filter
from .grammar import fail, nearest, parse_order, refuse_unsafe
from .match import Sql
from .statistics import holm, proportions_differ, quantile, values_differ, wilson

# Below so many hits the token index leads to the traces; above, reading those of the filter's time is faster.
FEW_HITS = 5_000

_KEYS = (
    "SELECT DISTINCT m.key FROM (SELECT metadata FROM traces ORDER BY start_key DESC LIMIT 1000) AS t,"
    " json_each(t.metadata) AS m"
)
_GROUPED = ("text", "state", "number")
_NOT_GROUPED = ("request", "request_preview", "response", "response_preview")


class Reader(Protocol):
    """What traces are read from: a `Store`."""

    def read(self, sql: str, params: Sequence[Any] = ()) -> list[Any]:
        """Return the rows of a query."""
        ...


@dataclass(slots=True)
class Group:
    """The traces that have one value in common, and how they differ from the baseline.

    Attributes:
        value: The value as text; None for the traces that have none.
        count: Traces.
        rated: Those that ended as OK or ERROR; not the ones in progress, left by the client or cancelled.
        errors: Those that ended as ERROR.
        error_rate: `errors / rated`; None without rated traces.
        error_rate_low: Lower end of the 95 % interval of the error rate (Wilson's).
        error_rate_high: Upper end.
        p50_ms: Median of the execution time of all that ended; likewise `p95_ms` and `p99_ms`.
        is_baseline: The other groups are compared with this one.
        error_rate_difference: Error rate minus the baseline's; None in the baseline and without one, as all below.
        p_value: How likely so large a difference of the error rates is by chance alone (Fisher's exact test where
            errors are few, else the test for two proportions).
        significant: The difference is more than chance, at 5 %, taking into account how many groups are compared
            (Holm's method).
        p50_difference_ms: Median minus the baseline's; likewise `p95_difference_ms`.
        latency_p_value: The same for the execution times (Mann and Whitney's test, and one of the slowest 5 %).
        latency_significant: The execution times differ by more than chance.
    """

    value: str | None
    count: int
    rated: int
    errors: int
    error_rate: float | None
    error_rate_low: float | None
    error_rate_high: float | None
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    is_baseline: bool = False
    error_rate_difference: float | None = None
    p_value: float | None = None
    significant: bool | None = None
    p50_difference_ms: float | None = None
    p95_difference_ms: float | None = None
    latency_p_value: float | None = None
    latency_significant: bool | None = None


Comparison = Group


def compare(reader: Reader, by: str, filter_string: str | None = None, baseline: str | None = None) -> list[Group]:
    """Compare groups of traces.

    Args:
        reader: The store.
        by: What to group by: `version`, `region`, `route`, `user`, `name` ..., `tags.<key>`, or any key of the
            metadata, with or without `metadata.`.
        filter_string: Only these traces.
        baseline: A value of `by`: the group that the others are compared with.

    Returns:
        The baseline first, then the other groups, the largest first; nothing if no trace matches.

    Raises:
        FilterError: `by` or the filter cannot be understood, or no trace has the key or the baseline's value.
    """
    where = compile_filter(filter_string if filter_string and filter_string.strip() else None)
    operand = _operand(by)
    columns = f"{operand.sql[0]}, t.state, t.duration_ns"
    rows = reader.read(*_query(reader, where, columns, operand.sql))
    groups = _grouped(rows)
    if rows and groups.keys() == {None} and operand.token is not None:
        _check_known(reader, by, operand)
    found = [_group(value, *collected) for value, collected in groups.items()]
    found.sort(key=lambda group: (-group.count, group.value is None, group.value or ""))
    if baseline is not None and found:
        found = _compared(found, groups, by, baseline)
    return found


def _operand(by: str) -> Operand:
    """Return what to group by: a field, else a key of the metadata under this very name."""
    if not isinstance(by, str) or not by.strip():
        raise FilterError(
            "say what to group by: version, region, route, user, tags.<key>, or a key of the metadata"
        )
    refuse_unsafe(by)
    try:
        field = parse_order(by)[0].field
    except FilterError:
        return metadata(by)
    prefix = field.path[0]
    if by.strip() in (*ATTRIBUTES, "run_id") or (
        len(field.path) > 1 and prefix in ("trace", "attribute", "attributes", "span")
    ):
        operand = resolve(by, field)
        if operand.kind not in _GROUPED or operand.of_span or field.path[-1] in _NOT_GROUPED:
            fail(by, "traces cannot be grouped by this field", field.place)
        return operand
    if len(field.path) > 1 and prefix in ("tag", "tags", "metadata", "request_metadata"):
        return resolve(by, field)
    return metadata(by.strip())


def _query(reader: Reader, where: Where, columns: str, operand: Sql) -> Sql:
    """Return the query for these columns of the traces of a filter."""
    params = (*operand[1], *where.params)
    match = tokens.expression(reader.read, where)
    if match is not None and _few(reader, match):
        tables = "tokens CROSS JOIN traces AS t ON t.start_key = tokens.rowid"
        sql = f"SELECT {columns} FROM {tables} WHERE tokens MATCH ? AND ({where.sql})"
        return sql, (*operand[1], match, *where.params)
    return f"SELECT {columns} FROM traces AS t WHERE {where.sql}", params


def _few(reader: Reader, match: str) -> bool:
    hits = "SELECT count(*) FROM (SELECT 1 FROM tokens WHERE tokens MATCH ? LIMIT ?)"
    return bool(reader.read(hits, (match, FEW_HITS))[0][0] < FEW_HITS)


def _grouped(rows: Sequence[Any]) -> dict[str | None, tuple[list[str], list[int]]]:
    """Return states and durations by value."""
    by_value: defaultdict[Any, list[Any]] = defaultdict(list)
    for row in rows:
        by_value[row[0]].append(row)
    groups = {}
    for value, found in by_value.items():
        durations = [duration for _, _, duration in found if duration is not None]
        durations.sort()
        groups[None if value is None else str(value)] = [state for _, state, _ in found], durations
    return groups


def _group(value: str | None, states: Sequence[str], durations: Sequence[int]) -> Group:
    errors = states.count("ERROR")
    rated = errors + states.count("OK")
    low, high = wilson(errors, rated) if rated else (None, None)
    rate = errors / rated if rated else None
    if not durations:
        return Group(value, len(states), rated, errors, rate, low, high, None, None, None)
    p50, p95, p99 = quantile(durations, 0.5), quantile(durations, 0.95), quantile(durations, 0.99)
    return Group(value, len(states), rated, errors, rate, low, high, p50 / 1e6, p95 / 1e6, p99 / 1e6)


def _compared(
    found: list[Group], groups: dict[str | None, tuple[list[str], list[int]]], by: str, baseline: str
) -> list[Group]:
    base = next((group for group in found if group.value == baseline), None)
    if base is None:
        values = [group.value for group in found if group.value is not None]
        shown = [f"'{value}'" if len(value) <= 60 else f"'{value[:60]}...'" for value in values[:20]]
        present = ", ".join(shown) + (" ..." if len(values) > 20 else "")
        hint = f"; there is {present}" if values else ": no trace has a value"
        raise FilterError(f"no trace has {by} = '{baseline}'{hint}")
    base.is_baseline = True
    others = [group for group in found if group is not base]
    for group in others:
        _compare_with(group, base, groups[group.value][1], groups[base.value][1])
    for group, significant in zip(others, holm([group.p_value for group in others]), strict=True):
        group.significant = significant
    for group, significant in zip(others, holm([group.latency_p_value for group in others]), strict=True):
        group.latency_significant = significant
    return [base, *others]


def _compare_with(group: Group, base: Group, durations: Sequence[int], base_durations: Sequence[int]) -> None:
    if group.error_rate is not None and base.error_rate is not None:
        group.error_rate_difference = group.error_rate - base.error_rate
        group.p_value = proportions_differ(group.errors, group.rated, base.errors, base.rated)
    if (
        group.p50_ms is not None
        and base.p50_ms is not None
        and group.p95_ms is not None
        and base.p95_ms is not None
    ):
        group.p50_difference_ms = group.p50_ms - base.p50_ms
        group.p95_difference_ms = group.p95_ms - base.p95_ms
        group.latency_p_value = values_differ(durations, base_durations)


def _check_known(reader: Reader, by: str, operand: Operand) -> None:
    """Refuse a key that no trace of the store has: a typo would look like a result."""
    assert operand.token is not None
    kind, key = operand.token
    if kind == "c":
        return
    sql, params = operand.sql
    if reader.read(f"SELECT 1 FROM traces AS t WHERE {sql} IS NOT NULL LIMIT 1", params):
        return
    if kind == "t":
        raise FilterError(f"no trace has the tag '{key}'")
    keys = [row[0] for row in reader.read(_KEYS)]
    grouped = [name for name, field in ATTRIBUTES.items() if field.kind in _GROUPED and name not in _NOT_GROUPED]
    hint = "" if key in grouped else nearest(by, [*grouped, *keys])  # no typo then: nothing to mean instead
    raise FilterError(f"no trace has the metadata '{by}'{hint}")
