"""New traces go into the file by one statement; whatever it cannot take goes the other way, to the same end."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.store.rows import MS, START, span, trace, trace_id, words_are
from tracemw.errors import StoreError
from tracemw.store import SpanRow, Store, TraceRow, arrivals, bulk, open_store, tokens, writer

pytestmark = pytest.mark.skipif(not tokens.supported(), reason="Python's SQLite has no FTS5")

SPANS = "SELECT trace_id, s.* FROM spans AS s JOIN traces AS t ON s.trace = t.id ORDER BY trace_id, span_id"
OUTBOX = "SELECT trace_id, attempts, due_ns = 0, dead FROM outbox JOIN traces ON trace = id ORDER BY trace_id"


@pytest.fixture
def store() -> Iterator[Store]:
    """A store in a file."""
    with open_store("sqlite:///store.db") as store:
        yield store


def content(store: Store) -> list[Any]:
    """Return all that is in a store, but for the numbers of rows, which nobody may rely on within a batch."""
    with store._pool.connection() as connection:
        connection.execute("CREATE VIRTUAL TABLE temp.terms USING fts5vocab(main, tokens, row)")
        terms = connection.execute("SELECT term, doc FROM temp.terms").fetchall()
        connection.execute("DROP TABLE temp.terms")
    traces = store.read("SELECT * FROM traces ORDER BY trace_id")
    spans = store.read(SPANS)
    return [terms, [row[1:] for row in traces], [row[:1] + row[3:] for row in spans], store.read(OUTBOX)]


def refused(*arguments: object) -> None:
    """Stand for `arrivals.insert` where it is not to be used."""
    raise AssertionError("these rows are not for the one statement")


numbers = st.integers(0, 3)
texts = st.sampled_from(["", "a", "b", "k=v k=v", "\N{NO-BREAK SPACE}", "d0", "0.5", "\0", "\ud800"])
starts = st.sampled_from([START, START, START + 1, START + MS - 1, -1, 2**63 - 1, 2**70, -(2**70)])
traces = st.builds(
    lambda number, **changes: trace(number, **changes),
    number=numbers, start_ns=starts, has_parent=st.booleans(),
    root_span_id=st.sampled_from([None, "f" * 16, "e" * 16]),
    state=st.sampled_from(["OK", "ERROR", "IN_PROGRESS"]),
    duration_ns=st.sampled_from([None, 0, 5 * MS, -1, 2**64]),
    user_id=texts, status_code=st.sampled_from([None, 0, 200, True]),
    tags=st.sampled_from([{}, {"": "", "a": "k=v k=v"}, {"d0": "\N{NO-BREAK SPACE}"}, {"\0": "a"}]),
)  # fmt: skip
spans = st.builds(
    lambda of, number, **changes: span(of, number, **changes),
    of=numbers, number=numbers, name=texts, attributes=st.sampled_from(["{}", '{"a":1}', '{"a":"\\u0000"}', "no"]),
)  # fmt: skip
batches = st.lists(st.tuples(st.lists(traces, max_size=3), st.lists(spans, max_size=4), st.booleans()), max_size=4)


@settings(max_examples=300)
@given(batches)
def test_both_ways_lead_to_the_same_end(
    written: list[tuple[list[TraceRow], list[SpanRow], bool]],
) -> None:
    """Whether batches of any rows go the short way where they can, or all the long one: the file says the same."""
    with open_store("memory:") as short, open_store("memory:") as long:
        for rows in written:
            short.write(rows[0], rows[1], outbox=rows[2])
            with mock.patch.object(arrivals, "fit", return_value=False):
                long.write(rows[0], rows[1], outbox=rows[2])
        assert content(short) == content(long)
        for store in (short, long):  # a word that was indexed twice would be left
            store.delete(trace_ids=[trace_id(number) for number in range(4)])
            assert content(store)[0] == []


@given(st.lists(traces, max_size=3), st.lists(spans, max_size=4))
def test_no_word_twice(traces: list[TraceRow], spans: list[SpanRow]) -> None:
    """A document has each word once: FTS5 takes a word out once for every time that it is told to."""
    column = arrivals._COLUMNS.index("document")
    try:
        made = arrivals.of_rows(traces, spans, False)
    except ValueError:  # they are cleaned first
        return
    for arrival in made:
        words = json.loads(f"[[0,{arrival.text}]")[0][column].split(" ")
        assert len(words) == len(set(words))


@given(traces, st.lists(spans, max_size=3), st.booleans())
def test_what_is_made_ready_can_be_read_again(one: TraceRow, more: list[SpanRow], queue: bool) -> None:
    """Traces that cannot go the short way after all go the long one with nothing lost, added or changed."""
    for each in more:
        each.trace_id = one.trace_id
    try:
        made = arrivals.of_rows([one], more, queue)
    except ValueError:  # they are cleaned first
        return
    assert arrivals.rows_of(made) == ([one], more)
    if len(more) == 1:
        assert [arrivals.of_root(one, more[0], False)] == arrivals.of_rows([one], more, False)


@settings(max_examples=200)
@given(
    st.lists(traces, max_size=4),
    st.lists(st.tuples(st.lists(traces, max_size=2), st.lists(spans, max_size=3)), max_size=2),
)
def test_what_was_made_ready_before(
    roots: list[TraceRow], written: list[tuple[list[TraceRow], list[SpanRow]]]
) -> None:
    """Traces that were made ready by others are as good as their rows, whatever else is there of them."""
    with open_store("memory:") as ready, open_store("memory:") as plain:
        for rows in [([], []), *written]:
            made, roots_made, their_spans = [], [], []
            for number, root in enumerate(roots):
                one = span(0, 7 + number)
                one.trace_id = root.trace_id
                try:
                    made.append(arrivals.of_root(root, one, True))
                except ValueError:  # nobody can make that ready
                    continue
                roots_made.append(root)
                their_spans.append(one)
            ready.write(rows[0], rows[1], made, outbox=True)
            with mock.patch.object(arrivals, "fit", return_value=False):
                plain.write([*roots_made, *rows[0]], [*their_spans, *rows[1]], outbox=True)
            assert content(ready) == content(plain)


class Text(str):
    """A text of its own kind."""


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (Text("plain"), "plain"),
        (Text("a\0b"), "a\N{REPLACEMENT CHARACTER}b"),
        (1.5, "1.5"),
        (("a", 1), "('a', 1)"),
    ],
)
def test_texts_of_another_kind(store: Store, given: Any, kept: str) -> None:
    """What is no plain text is stored as the text that it is or has, and nobody makes it ready as it is."""
    rows = [trace(1, request_preview=given, tags={"t": given} if isinstance(given, str) else {})]
    with pytest.raises(ValueError):
        arrivals.of_root(rows[0], span(1), False)
    store.write(rows, [span(1)])
    assert store.read("SELECT request_preview, typeof(request_preview) FROM traces") == [(kept, "text")]
    assert len(store.search(f'request_preview = "{kept}"').traces) == 1


@pytest.mark.parametrize("given", [HTTPStatus.OK, 2**64, -(2**64), True])
def test_numbers_of_another_kind(store: Store, given: int) -> None:
    """What is no plain number of 64 bits is stored as the nearest one."""
    rows = [trace(1, status_code=given)]
    with pytest.raises(ValueError):
        arrivals.of_root(rows[0], span(1), False)
    store.write(rows, [span(1)])
    nearest = max(1 - 2**63, min(2**63 - 1, int(given)))
    assert store.read("SELECT status_code, typeof(status_code) FROM traces") == [(nearest, "integer")]


def test_new_traces_take_one_statement(store: Store) -> None:
    """A batch of new traces, as that of most requests, is one statement: each gives the interpreter away."""
    found: set[str] = set()  # SQLite tells of a statement once more whenever its trigger begins
    with store._pool.connection() as connection:
        connection.set_trace_callback(found.add)
    store.write([trace(number) for number in range(30)], [span(number) for number in range(30)], outbox=True)
    assert sum(not text.startswith("--") for text in found) == 1  # the others are FTS5's own
    assert store.read("SELECT count(*), min(revision), max(revision) FROM traces") == [(30, 1, 1)]
    assert store.read("SELECT count(*) FROM outbox") == [(30,)]
    assert words_are(store, 30)
    one = store.get(trace_id(7))
    assert one is not None and (one.row, one.spans) == (trace(7), [span(7)])


def test_pairs_that_equal_those_before(store: Store) -> None:
    """Tags and metadata are kept as they are given, though those of the trace before may be equal, or the same."""
    given = {"b": "1", "a": "2"}
    store.write([trace(1, tags=given, metadata=given)], [])
    given["a"] = "3"
    store.write([trace(2, tags=given, metadata=given)], [])
    store.write([trace(3, tags={"a": "3", "b": "1"}, metadata={"a": "3", "b": "1"})], [])
    found = [store.get(trace_id(number)) for number in (1, 2, 3)]
    wanted = [[("b", "1"), ("a", "2")], [("b", "1"), ("a", "3")], [("a", "3"), ("b", "1")]]
    assert [list(one.row.tags.items()) for one in found if one] == wanted
    assert [list(one.row.metadata.items()) for one in found if one] == wanted
    assert len(store.search("tag.a = '3' AND metadata.a = '3'").traces) == 2


def test_a_trace_that_another_process_has_begun(store: Store) -> None:
    """What came of a trace from elsewhere is kept, and merged with what comes now."""
    with open_store("sqlite:///store.db") as other:
        other.write([trace(2, tags={"from": "there"})], [span(2, 1)])
    store.write([trace(1), trace(2, tags={"to": "here"})], [span(1), span(2)])
    found = store.get(trace_id(2))
    assert found is not None and found.row.tags == {"from": "there", "to": "here"}
    assert found.spans == [span(2), span(2, 1)]
    assert store.stats()["traces"] == 2


def test_two_roots_of_one_trace(store: Store) -> None:
    """The failure of a root whose facts do not count is noted, so that the trace stays one that failed."""
    inner = trace(1, root_span_id="e" * 16, has_parent=True, state="ERROR")
    store.write([trace(1), inner], [span(1), span(1, 1)])
    assert store.read("SELECT other_error, state, root_span_id FROM traces") == [(1, "ERROR", span(1).span_id)]
    store.write([trace(1)], [])
    assert store.read("SELECT other_error, state FROM traces") == [(1, "ERROR")]


def test_a_key_that_is_taken(store: Store) -> None:
    """Traces that start in the same nanosecond have keys of their own, whichever process they come from."""
    with open_store("sqlite:///store.db") as other:
        other.write([trace(1)], [])
    store.write([trace(2, start_ns=START + MS), trace(3, start_ns=START + MS)], [])
    assert store.read("SELECT start_key - start_ns FROM traces ORDER BY trace_id") == [(0,), (1,), (2,)]
    assert len(store.search("user = 'jane'").traces) == 3


def test_what_was_written_a_moment_ago_is_not_tried(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of a trace that this process has written goes the other way at once."""
    store.write([], [span(1, 1)])
    monkeypatch.setattr(arrivals, "insert", refused)
    store.write([trace(1)], [span(1)])
    found = store.get(trace_id(1))
    assert found is not None and found.spans == [span(1), span(1, 1)]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory for traces that were written does not grow; what fell out of it is tried, and merged."""
    monkeypatch.setattr(arrivals, "REMEMBERED", 10)
    with open_store("memory:") as store:
        for number in range(100):
            store.write([trace(number)], [span(number)])
        assert len(store._recent._newer) + len(store._recent._older) < 25
        with mock.patch.object(arrivals, "insert", refused):
            store.write([], [span(90, 1)])
        store.write([trace(0, tags={"late": "yes"})], [])
        assert len(store.search("tags.late = 'yes'").traces) == 1
        assert store.stats()["traces"] == 100


@pytest.mark.parametrize("variables", [None, 999, 200])
def test_any_number_of_rows(store: Store, variables: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows a batch has, and however few values SQLite takes in a statement, all are stored."""
    if variables is not None:
        monkeypatch.setattr(bulk, "_variables", lambda: variables)
    number = 0
    for size in (1, 7, 8, 9, 24, 25, arrivals.MOST, arrivals.MOST + 1, 300):
        batch = range(number, number + size)
        store.write([trace(n) for n in batch if n % 3], [span(n, below) for n in batch for below in range(n % 4)])
        number += size
    expected = [n for n in range(number) if n % 3 or n % 4]
    assert store.read("SELECT count(*) FROM traces") == [(len(expected),)]
    assert store.read("SELECT count(*) FROM spans") == [(sum(n % 4 for n in range(number)),)]


def test_a_locked_file_is_waited_for(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another process has the file locked, the writer waits, and one that may not wait is told."""
    monkeypatch.setattr(writer, "write", refused)  # it takes more statements, not what is to be done about a lock
    store.write([trace(1)], [])
    other = sqlite3.connect("store.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked by another process") as caught:
        store.write([trace(2)], [], patient=lambda: False)
    assert caught.value.retry
    release = threading.Timer(0.2, other.execute, ["ROLLBACK"])
    release.start()
    store.write([trace(3)], [span(3)])
    release.join()
    other.close()
    assert store.stats()["traces"] == 2


def test_what_cannot_be_written_leaves_nothing(store: Store) -> None:
    """A row that is refused takes the others of its statement with it, and what was there stays as it was."""
    store.write([trace(1, start_ns=START + 9 * MS)], [span(1)])
    before = content(store), store.read("SELECT * FROM sqlite_sequence")
    new = [trace(number) for number in (2, 3, 4)]
    spans = [span(number) for number in (2, 3, 4)]
    taken = [trace(5, trace_id=trace_id(1))], [trace(5, start_ns=START + 9 * MS)]
    for traces, more in [([*new, *taken[0]], spans), ([*new, *taken[1]], spans), (new, [*spans, span(3)])]:
        with store._pool.connection() as connection, pytest.raises(sqlite3.IntegrityError):
            arrivals.insert(connection, arrivals.of_rows(traces, more, True))
        assert not connection.in_transaction
        assert (content(store), store.read("SELECT * FROM sqlite_sequence")) == before


def test_traces_of_one_moment(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a clock is coarse, many traces of a batch start together; they are written by one statement, too."""
    monkeypatch.setattr(writer, "write", refused)
    store.write([trace(number, start_ns=START) for number in range(9)], [])
    assert store.read("SELECT start_key FROM traces ORDER BY trace_id") == [(START + n,) for n in range(9)]


def test_more_of_a_large_batch(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes late for one of many traces, which were written the other way, goes that way at once."""
    store.write([trace(number) for number in range(arrivals.MOST + 1)], [])
    monkeypatch.setattr(arrivals, "insert", refused)
    store.write([], [span(7, 1)])
    assert store.read("SELECT count(*) FROM spans") == [(1,)]


def test_no_statement_is_too_long(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A statement has no more rows than are fast, whether a trace has one span or many."""
    rows_in_one, insert = [], arrivals.insert

    def noting(connection: sqlite3.Connection, made: list[arrivals.Arrival]) -> None:
        rows_in_one.append(sum(len(json.loads(f"[[0,{arrival.text}]")) for arrival in made))
        insert(connection, made)

    monkeypatch.setattr(arrivals, "insert", noting)
    sizes = 1, arrivals.MOST // 2, arrivals.MOST // 2 + 1, arrivals.MOST, arrivals.MOST + 1
    for number in sizes:
        batch = range(1000 * number, 1000 * number + number)
        store.write([trace(n) for n in batch], [span(n, below) for n in batch for below in (0, 1)])
        store.write([trace(n + 500) for n in batch], [])
    assert rows_in_one == [2, 1, arrivals.MOST, arrivals.MOST // 2, arrivals.MOST // 2 + 1, arrivals.MOST]
    assert store.stats()["traces"] == 2 * sum(sizes)


def test_one_statement_is_prepared(store: Store) -> None:
    """Batches of different sizes share one statement: to prepare it takes longer than to use it."""
    found: set[str] = set()
    with store._pool.connection() as connection:
        connection.set_trace_callback(found.add)
    for number in range(40):
        store.write([trace(100 * number + n) for n in range(number)], [])
    assert len({text.partition("json_each(")[0] for text in found if "arrivals" in text}) == 1
