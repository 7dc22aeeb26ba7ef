"""What comes of rows that are written: once, twice, late, early, from two roots, hostile."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.store.rows import MS, START, span, trace, trace_id
from tracemw.errors import StoreError
from tracemw.store import SpanRow, Store, StoredTrace, TraceRow, bulk, open_store


@pytest.fixture(params=["memory:", "sqlite:///store.db"])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    """A store in memory and one in a file: they must not differ."""
    with open_store(request.param) as store:
        yield store


def stored(store: Store, number: int) -> StoredTrace:
    """Return a trace that must be there."""
    found = store.get(trace_id(number))
    assert found is not None
    return found


def test_what_is_written_is_read_back(store: Store) -> None:
    """Every field of a trace and of its spans comes back as it was; spans in order of their start."""
    row = trace(1, metadata={"app_version": "1", "käy \"'`.": "\n\U0001f600"}, tags={"": "", "a=b": "%"})
    store.write([row], [span(1, 2, status_message="why", scope=None), span(1), span(1, 1)])
    found = stored(store, 1)
    assert found.row == row
    assert found.spans == [span(1), span(1, 1), span(1, 2, status_message="why", scope=None)]
    assert store.get(trace_id(2)) is None


def test_without_spans(store: Store) -> None:
    """The spans are left out on request."""
    store.write([trace(1)], [span(1)])
    found = store.get(trace_id(1), spans=False)
    assert found is not None and found.spans == []


def test_nothing_to_write(store: Store) -> None:
    """An empty batch is no error."""
    store.write([], [])
    assert store.stats()["traces"] == 0


def test_a_span_written_twice_is_one(store: Store) -> None:
    """A span is known by its trace and its id: the later facts win."""
    store.write([trace(1)], [span(1), span(1, 1), span(1, 1, name="second")])
    store.write([], [span(1, 1, name="third")])
    assert [s.name for s in stored(store, 1).spans] == ["GET /items/{id}", "third"]


def test_one_span_id_in_two_traces(store: Store) -> None:
    """Span ids are unique within a trace only."""
    store.write([trace(1), trace(2)], [span(1, 9, name="a"), span(2, 9, name="b")])
    assert [s.name for s in stored(store, 1).spans] == ["a"]
    assert [s.name for s in stored(store, 2).spans] == ["b"]


def test_late_spans(store: Store) -> None:
    """A span that ends after its root is added; the root's timing and state stay."""
    store.write([trace(1)], [span(1)])
    store.write([], [span(1, 1, start_ns=START - MS, end_ns=START + 3600 * 1000 * MS, status="ERROR")])
    found = stored(store, 1)
    assert found.row == trace(1)
    assert len(found.spans) == 2


def test_spans_before_their_trace(store: Store) -> None:
    """Spans that come first make a trace in progress, which the root's facts then fill."""
    store.write([], [span(1, 2), span(1, 1)])
    early = stored(store, 1).row
    assert (early.state, early.name, early.root_span_id, early.duration_ns) == ("IN_PROGRESS", "step", None, None)
    assert early.start_ns == span(1, 1).start_ns
    store.write([trace(1)], [span(1)])
    found = stored(store, 1)
    assert found.row == trace(1)
    assert len(found.spans) == 3


def test_every_change_raises_the_revision(store: Store) -> None:
    """A rewritten trace, a late span and a patch are each a new revision; the number of the row stays."""
    revisions = []
    for change in (
        lambda: store.write([trace(1)], [span(1)]),
        lambda: store.write([trace(1, tags={"a": "b"})], []),
        lambda: store.write([], [span(1, 1)]),
        lambda: store.patch(trace_id(1), tags={"a": None}),
    ):
        change()
        revisions.append((stored(store, 1).id, stored(store, 1).revision))
    assert revisions == [(1, 1), (1, 2), (1, 3), (1, 4)]


def test_newer_facts_of_the_same_root(store: Store) -> None:
    """What is said again wins, what is not said again stays."""
    store.write([trace(1, tags={"a": "1", "b": "1"})], [])
    store.write(
        [trace(1, state="ERROR", session_id=None, user_id="joe", tags={"b": "2"}, metadata={"k": "v"})], []
    )
    assert stored(store, 1).row == trace(
        1, state="ERROR", user_id="joe", tags={"a": "1", "b": "2"}, metadata={"app_version": "1.0.0", "k": "v"}
    )


def test_a_finished_trace_does_not_start_again(store: Store) -> None:
    """A row from while the trace was in progress, written late, does not take its state or duration back."""
    store.write([trace(1)], [])
    store.write([trace(1, state="IN_PROGRESS", duration_ns=None, tags={"late": "yes"})], [])
    assert stored(store, 1).row == trace(1, tags={"late": "yes"})


def test_the_parentless_root_has_the_facts(store: Store) -> None:
    """Of a caller and a callee that share the store, the caller's facts count, in whatever order they came."""
    callee = trace(
        1,
        root_span_id="b" * 16,
        has_parent=True,
        name="GET /inner",
        start_ns=START,
        route="/inner",
        tags={"x": "b"},
    )
    caller = trace(
        1, root_span_id="a" * 16, name="GET /outer", start_ns=START + 7, session_id=None, state="STATE_UNSPECIFIED"
    )
    for number, rows in enumerate(itertools.permutations([callee, caller]), 1):
        for row in rows:
            store.write([replace(row, trace_id=trace_id(number))], [])
        assert stored(store, number).row == replace(
            caller, trace_id=trace_id(number), session_id="s-1", tags={"x": "b"}
        )


def test_the_error_of_any_root_counts(store: Store) -> None:
    """A trace has failed if one of its roots has, and keeps that when the other's facts are written again."""
    outer, inner = trace(1), trace(1, root_span_id="b" * 16, has_parent=True, state="ERROR")
    for number, rows in enumerate(itertools.permutations([outer, inner, outer, inner]), 1):
        for row in rows:
            store.write([replace(row, trace_id=trace_id(number))], [])
        assert stored(store, number).row == replace(outer, trace_id=trace_id(number), state="ERROR")


def test_an_inner_error_before_the_outer_end(store: Store) -> None:
    """The trace is in progress until its own root has ended, then shows the other's failure."""
    store.write([trace(1, state="IN_PROGRESS", duration_ns=None)], [])
    store.write([trace(1, root_span_id="b" * 16, has_parent=True, state="ERROR")], [])
    assert stored(store, 1).row.state == "IN_PROGRESS"
    store.write([trace(1)], [])
    assert stored(store, 1).row.state == "ERROR"


ROOTS = [
    trace(1, root_span_id="a" * 16, name="a", start_ns=START + 3),
    trace(1, root_span_id="b" * 16, name="b", start_ns=START + 1, has_parent=True, state="ERROR"),
    trace(1, root_span_id="c" * 16, name="c", start_ns=START + 2, has_parent=True),
]


@given(st.lists(st.one_of(st.sampled_from(ROOTS), st.integers(1, 4)), min_size=1), st.data())
def test_the_order_of_writing_does_not_matter(items: list[TraceRow | int], data: st.DataObject) -> None:
    """However rows of one trace arrive and are cut into batches, the same trace comes of them."""
    results = []
    for shuffled in (items, data.draw(st.permutations(items))):
        with open_store("memory:") as store:
            while shuffled:
                size = data.draw(st.integers(1, len(shuffled)))
                batch, shuffled = shuffled[:size], shuffled[size:]
                rows = [item for item in batch if isinstance(item, TraceRow)]
                store.write(rows, [span(1, item) for item in batch if isinstance(item, int)])
            found = stored(store, 1)
            results.append((found.row if found.row.root_span_id else found.row.state, found.spans))
    assert results[0] == results[1]


def test_patch(store: Store) -> None:
    """A patch sets and removes single facts of a stored trace; None removes."""
    store.write([trace(1, tags={"a": "1", "b": "2"})], [span(1)])
    assert store.patch(
        trace_id(1), tags={"a": None, "c": "3"}, metadata={"region": "eu"}, session_id=None, state="ERROR"
    )
    assert stored(store, 1).row == trace(
        1,
        tags={"b": "2", "c": "3"},
        metadata={"app_version": "1.0.0", "region": "eu"},
        session_id=None,
        state="ERROR",
    )
    assert not store.patch(trace_id(2), tags={"a": "b"})


def test_patch_of_what_cannot_be_changed(store: Store) -> None:
    """The times and ids of a trace are no matter of opinion."""
    store.write([trace(1)], [])
    with pytest.raises(TypeError, match="start_ns"):
        store.patch(trace_id(1), start_ns=1)


def test_patched_tags_stay(store: Store) -> None:
    """A tag set on a trace in progress is still there when its root ends."""
    store.write([], [span(1, 1)])
    store.patch(trace_id(1), tags={"reviewed": "yes"})
    store.write([trace(1)], [span(1)])
    assert stored(store, 1).row.tags == {"reviewed": "yes"}


def test_delete_by_id(store: Store) -> None:
    """Named traces are deleted with their spans; the count says how many there were."""
    store.write([trace(n) for n in range(1, 5)], [span(n) for n in range(1, 5)])
    assert store.delete(trace_ids=[trace_id(2), trace_id(3), trace_id(9)]) == 2
    assert [t.row.trace_id for t in store.search().traces] == [trace_id(4), trace_id(1)]
    assert store.stats()["spans"] == 2


def test_delete_the_oldest(store: Store) -> None:
    """Traces older than a moment are deleted, the oldest first, not more than asked for."""
    store.write([trace(n) for n in range(10)], [])
    assert store.delete(older_than_ns=START + 6 * MS, max_traces=4) == 4
    assert store.delete(older_than_ns=START + 6 * MS) == 2
    assert [t.row.trace_id for t in store.search().traces] == [trace_id(n) for n in (9, 8, 7, 6)]


def test_delete_what_a_filter_finds(store: Store) -> None:
    """A filter deletes what a search with it finds."""
    store.write([trace(n, user_id=f"u-{n % 2}") for n in range(10)], [])
    assert store.delete(filter_string="user = 'u-1'") == 5
    assert {t.row.user_id for t in store.search().traces} == {"u-0"}


def test_delete_needs_a_condition(store: Store) -> None:
    """Everything is never deleted by leaving something out."""
    with pytest.raises(ValueError, match="which traces"):
        store.delete()


def test_deleted_traces_are_not_found_by_their_words(store: Store) -> None:
    """The token index forgets with the rows, and a number is never given again."""
    store.write([trace(1)], [])
    store.delete(trace_ids=[trace_id(1)])
    store.write([trace(1, user_id="other")], [])
    assert [t.id for t in store.search("user = 'other'").traces] == [2]
    assert store.search("user = 'jane'").traces == []


HOSTILE = [
    "\0",
    "a\0b",
    "\ud800",
    "\udfff\ud800",
    "\U0001f600",
    "\x1b[31m",
    "'; DROP TABLE traces; --",
    '"',
    "\\",
    "",
]
TEXTS = st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(), max_size=20))
TRACE_TEXTS = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(
        [
            f.name
            for f in fields(TraceRow)
            if "str" in str(f.type) and f.name not in ("trace_id", "metadata", "tags")
        ],
        TEXTS,
    )
    | dict.fromkeys(["metadata", "tags"], st.dictionaries(TEXTS, TEXTS, max_size=3)),
)
SPAN_TEXTS = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(
        [f.name for f in fields(SpanRow) if "str" in str(f.type) and f.name != "trace_id"], TEXTS
    ),
)


def clean(value: Any) -> Any:
    """Return what must come back for a value."""
    if isinstance(value, dict):
        return {clean(key): clean(item) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    return "".join("\ufffd" if c == "\0" or "\ud800" <= c <= "\udfff" else c for c in value)


@given(TRACE_TEXTS, SPAN_TEXTS)
def test_hostile_text(in_trace: dict[str, Any], in_span: dict[str, Any]) -> None:
    """Any text in any field is stored and read back, with U+FFFD for NUL and lone surrogates."""
    row, below = trace(1, **in_trace), span(1, **in_span)
    with open_store("memory:") as store:
        store.write([row], [below])
        store.patch(trace_id(1), tags={"x": "y"})
        found = stored(store, 1)
        assert found.row == trace(1, **{**clean(in_trace), "tags": {**clean(in_trace.get("tags", {})), "x": "y"}})
        assert found.spans == [span(1, **clean(in_span))]
        assert store.search(include_spans=False).traces[0].row == found.row
        assert store.delete(trace_ids=[trace_id(1)]) == 1


@given(st.integers(), st.integers(), st.integers())
def test_numbers_of_any_size(start: int, duration: int, code: int) -> None:
    """A number beyond 64 bits is stored as the nearest one, and fails nothing."""
    with open_store("memory:") as store:
        store.write([trace(1, start_ns=start, duration_ns=duration, status_code=code)], [span(1, start_ns=start)])
        limit = 2**63 - 1
        assert stored(store, 1).row.start_ns == max(-limit, min(limit, start))


@given(st.floats(), st.floats(), st.floats())
def test_times_with_a_fraction(start: float, end: float, duration: float) -> None:
    """Times are whole nanoseconds, whatever came; the batch is not held up by what is no number."""
    with open_store("memory:") as store:
        rows = [trace(1, start_ns=start, duration_ns=duration)], [span(1, start_ns=start, end_ns=end)]
        store.write(*rows)
        found = stored(store, 1)
        times = (found.row.start_ns, found.row.duration_ns, found.spans[0].start_ns, found.spans[0].end_ns)
        assert all(type(time) is int and abs(time) < 2**63 for time in times)
        if math.isfinite(end) and abs(end) < 2**62:
            assert found.spans[0].end_ns == int(end)


def test_fractions_of_an_older_version(store: Store) -> None:
    """A file that has times with fractions in it is read as if it had none."""
    store.write([trace(1)], [span(1)])
    with store._writing() as connection:
        connection.execute("UPDATE traces SET start_ns = start_ns + 256.5 - start_ns, duration_ns = 3.5")
        connection.execute("UPDATE spans SET start_ns = 1.5, end_ns = 2.5")
    found = stored(store, 1)
    assert (found.row.start_ns, found.row.duration_ns) == (256, 3)
    assert (found.spans[0].start_ns, found.spans[0].end_ns) == (1, 2)
    store.write([trace(1, duration_ns=9)], [])
    assert stored(store, 1).row.start_ns == trace(1).start_ns


@pytest.mark.parametrize("bad", [{"name": None}, {"metadata": {1: object()}}, {"tags": {"a": None}}, {"route": 7}])
def test_rows_of_the_wrong_type(store: Store, bad: dict[str, Any]) -> None:
    """A row with something else than text is stored as text rather than lost, and harms no other row."""
    store.write([trace(1, **bad), trace(2)], [span(1)])
    assert stored(store, 2).row == trace(2)
    assert stored(store, 1).spans == [span(1)]


def test_a_failed_write_stores_nothing(store: Store) -> None:
    """What cannot be written at all is an error that tells not to try again, and leaves no half of it."""
    with pytest.raises(StoreError) as caught:
        store.write([trace(1), 7], [span(1)])  # type: ignore[list-item]
    assert not caught.value.retry
    assert store.stats()["traces"] == 0


def test_thirty_thousand_spans(store: Store) -> None:
    """A trace of any size is written in parts and read whole."""
    for first in range(1, 30_001, 5000):
        store.write(
            [trace(1)] if first == 1 else [], [span(1, n, name=f"s{n % 900}") for n in range(first, first + 5000)]
        )
    assert len(stored(store, 1).spans) == 30_000
    assert [t.row for t in store.search("span.name = 's899'", include_spans=False).traces] == [trace(1)]


def statements(store: Store, write: Callable[[], None]) -> int:
    """Return how many statements something takes; those that SQLite makes itself do not count."""
    found: list[str] = []
    with store._pool.connection() as connection:
        connection.set_trace_callback(found.append)
    write()
    with store._pool.connection() as connection:
        connection.set_trace_callback(None)
    return sum(not text.startswith("--") for text in found)


@pytest.mark.parametrize("variables", [None, 999])
def test_a_batch_is_few_statements(store: Store, variables: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a batch is, it is written in few statements, new or changed, delivered or not.

    Every statement gives the interpreter away, and getting it back takes up to 5 ms beside a thread that computes.
    SQLite before 3.32 takes 999 values in one.
    """
    if variables is not None:
        monkeypatch.setattr(bulk, "_variables", lambda: variables)
    traces = [trace(number) for number in range(500)]
    spans = [span(number, below) for number in range(500) for below in range(4)]
    limit = 40 if bulk._variables() > 999 else 110
    assert statements(store, lambda: store.write(traces, spans, outbox=True)) < limit
    for row in traces:
        row.tags["late"] = "yes"
    assert statements(store, lambda: store.write(traces, spans, outbox=True)) < limit
    later = [span(number, 5) for number in range(500)]
    assert statements(store, lambda: store.write([], later, outbox=True)) < limit
    assert store.read("SELECT count(*), min(revision), max(revision) FROM traces") == [(500, 3, 3)]
    assert store.read("SELECT count(*), count(DISTINCT name || span_id) FROM spans") == [(2500, 504)]
    assert store.read("SELECT count(*) FROM outbox") == [(500,)]
    assert [found.row for found in store.search("tags.late = 'yes'", max_results=500).traces] == traces[::-1]
    assert span(77, 2) in stored(store, 77).spans


def test_the_text_of_an_escape(store: Store) -> None:
    """JSON text in a tag or the metadata may have an escape of NUL in it: it is text, and stored as it is."""
    text = '{"key": "a\\u0000b"}'
    store.write([trace(1, tags={"t": text}, metadata={"m": text})], [])
    assert [found.row.tags["t"] + found.row.metadata["m"] for found in store.search().traces] == [text * 2]


def test_traces_at_the_end_of_time(store: Store) -> None:
    """Traces whose start is beyond 64 bits, or at the end of what they hold, have keys of their own.

    Those of one millisecond have keys in it, so that filters on milliseconds find them.
    """
    starts = [end for end in (2**63 - 1, 2**70, -(2**63), 1 - 2**63, -(2**70)) for _ in range(3)]
    store.write([trace(number, start_ns=start) for number, start in enumerate(starts)], [])
    store.write([trace(len(starts) + number, start_ns=start) for number, start in enumerate(starts)], [])
    keys = [key for (key,) in store.read("SELECT start_key FROM traces ORDER BY start_key")]
    assert len(set(keys)) == 2 * len(starts) == len(store.search("user = 'jane'").traces)
    assert {key // MS for key in keys} == {(2**63 - 1) // MS, -(2**63) // MS}
