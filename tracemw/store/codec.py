"""Rows of the tables <-> the store's plain values."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

from .rows import SpanRow, TraceRow

T = TypeVar("T")

PROMOTED = {
    "environment": "environment",
    "app_version": "version",
    "deployment_id": "deployment",
    "region": "region",
}
"""Metadata key -> column of `traces` that repeats it, so that groups are counted from an index."""

TRACE_FIELDS = tuple(field.name for field in fields(TraceRow))
TRACE_COLUMNS = (*TRACE_FIELDS, *PROMOTED.values())
SPAN_FIELDS = tuple(field.name for field in fields(SpanRow))
SPAN_COLUMNS = SPAN_FIELDS[1:]  # the trace's id is replaced by the number of its row

_INT64 = 2**63 - 1
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_UNWANTED = {0: _REPLACEMENT} | dict.fromkeys(range(0xD800, 0xE000), _REPLACEMENT)


def json_encoder(*, allow_nan: bool, default: Callable[[Any], Any] | None = None) -> Callable[[Any], str]:
    """Return a function that makes compact JSON text, as `JSONEncoder.encode` does in three times the time.

    That one prepares anew for every text, which counts where they are short. A value that holds itself raises
    RecursionError.
    """
    encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=allow_nan, separators=(",", ":"), default=default)
    make, join = getattr(json.encoder, "c_make_encoder", None), "".join
    if make is None:
        return encoder.encode
    quote = json.encoder.encode_basestring
    chunks = make(None, encoder.default, quote, None, ":", ",", False, False, allow_nan)
    return lambda value: join(chunks(value, 0))


_texts = json_encoder(allow_nan=True)


class Unclean(ValueError):
    """A text holds a NUL, a value is neither text nor an integer nor None, or an integer is beyond 64 bits.

    SQLite would take some of that, but as another value than the one that was indexed. Lone surrogates make
    Python's driver raise by itself.
    """


def of_latest(make: Callable[[dict[str, str]], T]) -> Callable[[dict[str, str]], T]:
    """Have a function remember what it made last: most traces in a row have the process's metadata, and no tags.

    Args:
        make: Takes texts alone, and raises for all else: 1, 1.0 and True are equal.
    """
    latest: tuple[dict[str, str], list[str], T] | None = None

    def of(pairs: dict[str, str]) -> T:
        nonlocal latest
        known = latest
        if known is None or known[0] != pairs or known[1] != [*pairs]:  # dictionaries are equal in any order
            latest = known = dict(pairs), [*pairs], make(pairs)
        return known[2]

    return of


def trace_values(row: TraceRow) -> tuple[Any, ...]:
    """Return the values of `TRACE_COLUMNS`."""
    metadata, promoted = _metadata(row.metadata)
    values = (
        row.trace_id, row.root_span_id, 1 if row.has_parent else 0, row.name, row.start_ns, row.duration_ns,
        row.state, row.outcome, row.method, row.route, row.status_code, row.client_request_id, row.session_id,
        row.user_id, row.request_preview, row.response_preview,
    )  # fmt: skip
    return *_checked(values), metadata, _tags(row.tags), *promoted


@of_latest
def _metadata(pairs: dict[str, str]) -> tuple[str, tuple[str | None, ...]]:
    return _json(pairs), tuple(map(pairs.get, PROMOTED))


@of_latest
def _tags(pairs: dict[str, str]) -> str:
    return _json(pairs)


def _json(pairs: dict[str, str]) -> str:
    if any("\0" in key or "\0" in value for key, value in pairs.items()):
        raise Unclean
    return _texts(pairs)


def trace_row(values: Sequence[Any]) -> TraceRow:
    """Return the trace of the values of `TRACE_FIELDS`."""
    row = TraceRow(*values)
    row.has_parent = bool(row.has_parent)
    if row.start_ns.__class__ is float:  # an older version stored fractions as they came
        row.start_ns = within(row.start_ns)
    if row.duration_ns.__class__ is float:
        row.duration_ns = within(row.duration_ns)
    row.metadata = json.loads(values[16])
    row.tags = json.loads(values[17])
    return row


def span_values(row: SpanRow) -> tuple[Any, ...]:
    """Return the values of `SPAN_COLUMNS`."""
    return _checked(
        (
            row.span_id, row.parent_id, row.name, row.span_type, row.kind, row.start_ns, row.end_ns,
            row.status, row.status_message, row.attributes, row.events, row.links, row.scope,
        )
    )  # fmt: skip


def span_row(trace_id: str, values: Sequence[Any]) -> SpanRow:
    """Return the span of the values of `SPAN_COLUMNS`."""
    row = SpanRow(trace_id, *values)
    if row.start_ns.__class__ is float or row.end_ns.__class__ is float:
        row.start_ns, row.end_ns = within(row.start_ns), within(row.end_ns)
    return row


def _checked(values: tuple[Any, ...]) -> tuple[Any, ...]:
    for value in values:
        kind = value.__class__
        if kind is str:
            if "\0" in value:
                raise Unclean
        elif kind is int:
            if not -_INT64 <= value <= _INT64:
                raise Unclean
        elif value is not None:
            raise Unclean
    return values


def within(value: Any) -> int:
    """Return the nearest integer of 64 bits; 0 for what is no number."""
    try:
        return max(-_INT64, min(_INT64, int(value)))
    except OverflowError:  # infinite
        return _INT64 if value > 0 else -_INT64
    except ValueError:  # float("nan")
        return 0


def cleaned_traces(rows: Iterable[TraceRow]) -> list[TraceRow]:
    """Return the rows with everything replaced that SQLite or a reader of the file would stumble over."""
    return [replace(row, **_cleaned(row)) for row in rows]


def cleaned_spans(rows: Iterable[SpanRow]) -> list[SpanRow]:
    """Return the rows with everything replaced that SQLite or a reader of the file would stumble over."""
    return [replace(row, **_cleaned(row)) for row in rows]


def clean(text: str) -> str:
    """Return the text with U+FFFD for NUL characters and lone surrogates.

    SQL functions end a text at its first NUL, PostgreSQL behind an MLflow server refuses it, and a lone surrogate
    has no UTF-8.
    """
    return str.translate(text, _UNWANTED)  # of a subclass of `str`, too: a plain text


def _cleaned(row: TraceRow | SpanRow) -> dict[str, Any]:
    return {field.name: _value(getattr(row, field.name), str(field.type)) for field in fields(row)}


def _value(value: Any, kind: str) -> Any:
    """Return the nearest value that the column of a field of this type can take."""
    if value is None:
        return {"str": "", "int": 0, "bool": False, "dict[str, str]": {}}.get(kind)
    if kind == "dict[str, str]":
        return {clean(_told(key)): clean(_told(item)) for key, item in dict(value).items() if item is not None}
    return clean(_told(value)) if kind.startswith("str") else within(value)


def _told(value: Any) -> str:
    return value if isinstance(value, str) else str(value)
