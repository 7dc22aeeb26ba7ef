"""Pages of a search, their order and tokens; the token index against reading every row; what is new."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.store.rows import MS, START, span, trace, trace_id
from tracemw.errors import FilterError
from tracemw.store import Cursor, Store, StoredTrace, TraceRow, open_store, reader, tokens
from tracemw.store.filter import Where


@pytest.fixture
def store() -> Iterator[Store]:
    """An empty store in memory."""
    with open_store("memory:") as store:
        yield store


def numbers(traces: list[StoredTrace]) -> list[int]:
    """Return the numbers of traces."""
    return [int(t.row.trace_id, 16) for t in traces]


def pages(store: Store, filter_string: str | None, order_by: list[str] | None, size: int) -> list[int]:
    """Return the numbers of all traces of a search, read page by page."""
    found: list[int] = []
    token = None
    while True:
        page = store.search(filter_string, order_by, size, token)
        assert len(page.traces) == size or page.token is None
        found += numbers(page.traces)
        token = page.token
        if token is None:
            return found


def test_newest_first(store: Store) -> None:
    """Without an order, the trace that started last comes first, whenever it was written."""
    store.write([trace(n) for n in (3, 1, 5)], [])
    store.write([trace(n) for n in (4, 2)], [])
    assert numbers(store.search().traces) == [5, 4, 3, 2, 1]


def test_spans_on_request(store: Store) -> None:
    """Spans come with their traces, or are left out."""
    store.write([trace(1), trace(2)], [span(1), span(1, 1), span(2)])
    assert [len(t.spans) for t in store.search().traces] == [1, 2]
    assert [len(t.spans) for t in store.search(include_spans=False).traces] == [0, 0]


def test_traces_of_one_moment(store: Store) -> None:
    """Traces that started in the same nanosecond are all there, once; their starts are as written."""
    for first in range(0, 600, 100):
        store.write([trace(n, start_ns=START) for n in range(first, first + 100)], [])
    found = pages(store, None, None, 7)
    assert sorted(found) == list(range(600))
    assert sorted(pages(store, "user = 'jane'", None, 7)) == list(range(600))
    assert sorted(pages(store, f"timestamp_ms = {START // MS}", None, 50)) == list(range(600))
    assert {t.row.start_ns for t in store.search(max_results=600).traces} == {START}


def test_a_moved_start(store: Store) -> None:
    """A trace whose root turns out to have started earlier is found where it belongs, by words too."""
    store.write([trace(n) for n in range(5)], [])
    store.write([], [span(9, 1, start_ns=START + 100 * MS)])
    assert numbers(store.search().traces)[0] == 9
    store.write([trace(9, start_ns=START - MS)], [])
    assert numbers(store.search().traces) == numbers(store.search("user = 'jane'").traces) == [4, 3, 2, 1, 0, 9]


ORDERS = [
    None,
    ["timestamp_ms ASC"],
    ["timestamp_ms DESC"],
    ["execution_time DESC"],
    ["execution_time ASC", "name DESC"],
    ["session ASC", "timestamp_ms ASC"],
    ["metadata.a DESC"],
]
NAMES = st.sampled_from(["a", "b"])
ROWS = st.lists(
    st.tuples(
        st.integers(0, 5), st.sampled_from([None, MS, 2 * MS]), NAMES, st.sampled_from([None, "x", "y"]), NAMES
    ),
    max_size=25,
)


@given(
    ROWS, st.sampled_from(ORDERS), st.integers(1, 6), st.sampled_from([None, "name = 'a'", "NOT metadata.a = 'b'"])
)
def test_pages_are_the_whole(
    values: list[tuple[int, int | None, str, str | None, str]],
    order: list[str] | None,
    size: int,
    text: str | None,
) -> None:
    """Read in pages of any size, a search in any order has the same traces in the same order as read at once."""
    with open_store("memory:") as store:
        store.write(
            [
                trace(
                    n, start_ns=START + ms * MS, duration_ns=took, name=name, session_id=session, metadata={"a": a}
                )
                for n, (ms, took, name, session, a) in enumerate(values)
            ],
            [],
        )
        at_once = numbers(store.search(text, order, 1000).traces)
        assert pages(store, text, order, size) == at_once
        assert len(at_once) == len(set(at_once))
        if text is None:
            assert len(at_once) == len(values)


def test_pages_while_traces_come_and_go(store: Store) -> None:
    """New traces and deleted ones between two pages neither repeat nor skip one that was there all the time."""
    store.write([trace(n) for n in range(10)], [])
    first = store.search(max_results=4)
    store.write([trace(n) for n in range(20, 25)], [])
    store.delete(trace_ids=[trace_id(6), trace_id(5)])
    assert numbers(first.traces) + numbers(store.search(page_token=first.token).traces) == [
        9,
        8,
        7,
        6,
        4,
        3,
        2,
        1,
        0,
    ]


def test_no_further_page(store: Store) -> None:
    """The last page has no token, also if it is full."""
    store.write([trace(n) for n in range(4)], [])
    assert store.search(max_results=4).token is None
    assert store.search(max_results=3).token is not None


def test_a_token_of_another_search(store: Store) -> None:
    """A token belongs to its filter and order."""
    store.write([trace(n) for n in range(4)], [])
    token = store.search("user = 'jane'", ["timestamp_ms ASC"], 2).token
    assert token is not None
    assert numbers(store.search("user = 'jane'", ["timestamp_ms ASC"], 2, token).traces) == [2, 3]
    for text, order in (
        ("user = 'joe'", ["timestamp_ms ASC"]),
        ("user = 'jane'", None),
        (None, ["timestamp_ms ASC"]),
    ):
        with pytest.raises(FilterError, match="page_token"):
            store.search(text, order, 2, token)


def forged(*place: object) -> str:
    """Return a token with the right fingerprint and a made-up place."""
    return reader.token_of(list(place), [None, []])


@pytest.mark.parametrize(
    "token",
    ["", "x", "\ud800", "bm90IGpzb24", base64.urlsafe_b64encode(json.dumps({"a": 1}).encode()).decode(),
     forged(), forged(1, 2), forged([1]), forged({}), forged(2**63), forged(-(10**30)), forged("\ud800"),
     "W" * 100_000],
)  # fmt: skip
def test_what_is_no_token(store: Store, token: str) -> None:
    """Anything else is an error of the caller's that says what to do."""
    with pytest.raises(FilterError, match="leave it out"):
        store.search(page_token=token)


def steps(store: Store, filter_string: str) -> int:
    """Return how many instructions SQLite takes for a search, in tens."""
    taken = 0

    def step() -> int:
        nonlocal taken
        taken += 1
        return 0

    with store._pool.connection() as connection:  # the only one of a store in memory
        connection.set_progress_handler(step, 10)
    assert not store.search(filter_string, include_spans=False).traces
    with store._pool.connection() as connection:
        connection.set_progress_handler(None, 0)
    return taken


@pytest.mark.parametrize(
    "slow", ["span.attributes.k LIKE 'x%'", "span.status != 'OK'", "request LIKE 'x%'", "end_time < 5"]
)
@pytest.mark.parametrize("narrow", ["user = 'u-7'", f"timestamp < {START // MS + 5}"])
def test_what_narrows_a_search_comes_first(store: Store, slow: str, narrow: str) -> None:
    """A condition that reads every trace or span reads only those that an index or a time leaves."""
    if "user" in narrow and not tokens.supported():
        pytest.skip("needs FTS5")
    store.write([trace(n, user_id=f"u-{n}") for n in range(1000)], [span(n) for n in range(1000)])
    alone = steps(store, slow)
    assert 0 < steps(store, f"{slow} AND {narrow}") < alone / 10
    assert 0 < steps(store, f"{narrow} AND {slow}") < alone / 10


@pytest.mark.parametrize("token", [5, 1.5, b"abc", True, ["x"]])
def test_a_token_of_another_type(store: Store, token: Any) -> None:
    """What is no text is no token either."""
    with pytest.raises(FilterError, match="leave it out"):
        store.search(page_token=token)


@pytest.mark.parametrize("order", [5, 0, 1.5, True, object()])
def test_an_order_of_another_type(store: Store, order: Any) -> None:
    """The message says what an order is."""
    with pytest.raises(FilterError, match="order_by is a list such as"):
        store.search(order_by=order)


def test_an_order_that_can_be_read_once(store: Store) -> None:
    """Any iterable of texts is an order, and its pages go on."""
    store.write([trace(n) for n in range(3)], [])
    page = store.search(None, iter(["timestamp ASC"]), 2)  # type: ignore[arg-type]
    assert numbers(page.traces) == [0, 1]
    assert numbers(store.search(None, ["timestamp ASC"], 2, page.token).traces) == [2]


@pytest.mark.parametrize("number", [2**31, 2**63 - 1, 2**63, 10**30])
def test_pages_of_any_size(store: Store, number: int) -> None:
    """A page larger than any number of traces is all of them."""
    store.write([trace(n) for n in range(4)], [])
    assert len(store.search(max_results=number).traces) == 4


@pytest.mark.parametrize("number", [1.5, 10.0, "10", True, None])
def test_pages_of_what_is_no_number(store: Store, number: Any) -> None:
    """A page has a whole number of traces."""
    with pytest.raises(FilterError, match="must be a whole number"):
        store.search(max_results=number)


@pytest.mark.parametrize("number", [0, -1])
def test_pages_of_nothing(store: Store, number: int) -> None:
    """A page has one trace at least."""
    with pytest.raises(FilterError, match="max_results"):
        store.search(max_results=number)


KEYS = st.one_of(
    st.sampled_from(["k", "K", "a=b", "^k", "%6b", '"', "", " ", "é", "É", "x" * 201, "#"]), st.text()
)
PAIRS = st.dictionaries(KEYS, KEYS, max_size=4)


@pytest.mark.skipif(not tokens.supported(), reason="needs FTS5")
@given(st.lists(PAIRS, min_size=1, max_size=5), st.data())
def test_words_find_what_reading_finds(many: list[dict[str, str]], data: st.DataObject) -> None:
    """A word finds exactly the traces with that key and value, whatever characters are in them."""
    rows = [trace(n, metadata=pairs) for n, pairs in enumerate(many)]
    pairs = [pair for metadata in many for pair in metadata.items()]
    key, value = data.draw(st.one_of(st.sampled_from(pairs), st.tuples(KEYS, KEYS))) if pairs else ("k", "v")
    with open_store("memory:") as store:
        store.write(rows, [])
        stored = [t.row for t in reversed(store.search().traces)]
        key, value = (s.replace("\0", "\ufffd") for s in (key, value))
        expected = [int(row.trace_id, 16) for row in stored if row.metadata.get(key) == value]
        with store._reading() as connection:
            match = f'"{tokens.token("m", key, value)}"'
            ids, _ = reader.page(connection, Where("1", (), match), None, 100, None)
            found = numbers(reader.by_ids(connection, ids, False))
        assert sorted(found) == expected


@given(st.tuples(KEYS, KEYS), st.tuples(KEYS, KEYS))
def test_different_pairs_have_different_words(first: tuple[str, str], second: tuple[str, str]) -> None:
    """No two pairs share a word, and a word is one to FTS5: no blank or quote, nothing it folds."""
    word = tokens.token("m", *first)
    assert (word == tokens.token("m", *second)) == (first == second)
    assert not {c for c in word if c.isascii()} & set(' "\0\t\nABCDEFGHIJKLMNOPQRSTUVWXYZ')


FILTERS = [
    "state = 'ERROR'",
    "user = 'u1' AND NOT session = 's0'",
    "metadata.a = 'X' OR tags.a = 'x'",
    "span.name = 'n1'",
    "span.name = 'n1' AND span.type = 'T1'",
    "span.type = 'UNKNOWN'",
    "status_code = 500",
    "name IN ('a', 'b') AND metadata.a = 'x'",
]
SMALL = st.integers(0, 1)
TRACES = st.builds(
    lambda n, error, user, session, meta, tag: trace(
        n,
        state="ERROR" if error else "OK",
        status_code=500 if error else 200,
        name="ab"[session],
        user_id=f"u{user}",
        session_id=f"s{session}",
        metadata={"a": "xX"[meta]},
        tags={"a": "xX"[tag]},
    ),
    st.integers(0, 3), SMALL, SMALL, SMALL, SMALL, SMALL,
)  # fmt: skip
SPANS = st.builds(
    lambda of, number, name, kind: span(of, number, name=f"n{name}", span_type=f"T{kind}" if kind else None),
    st.integers(0, 4), st.integers(1, 3), SMALL, SMALL,
)  # fmt: skip
STEPS = st.lists(
    st.one_of(
        st.tuples(st.lists(TRACES, max_size=3), st.lists(SPANS, max_size=4)),
        st.tuples(st.integers(0, 4), st.sampled_from(["x", "X", None])),
        st.integers(0, 4),
    ),
    max_size=6,
)


@given(STEPS)
def test_the_index_follows_every_change(steps: list[object]) -> None:
    """After any writing, patching and deleting, a search with the index finds what one without it does."""
    with open_store("memory:") as store:
        for step in steps:
            if isinstance(step, int):
                store.delete(trace_ids=[trace_id(step)])
            elif isinstance(step, tuple) and isinstance(step[0], int):
                store.patch(trace_id(step[0]), tags={"a": step[1]}, metadata={"a": step[1]})
            elif isinstance(step, tuple):
                store.write(*step)
        with_index = [numbers(store.search(text).traces) for text in FILTERS]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tokens, "current", lambda connection: False)
            assert [numbers(store.search(text).traces) for text in FILTERS] == with_index


def test_a_trace_with_many_kinds_of_spans(store: Store) -> None:
    """Beyond the words that a trace has for its spans, their names are still found."""
    store.write([trace(1)], [span(1, n, name=f"n{n}") for n in range(1, 40)])
    store.write([trace(2)], [span(2, n, name=f"m{n}") for n in range(1, 10)])
    store.write([], [span(1, n, name=f"n{n}", span_type=f"T{n}") for n in range(40, 300)])
    for text, expected in (("n5", [1]), ("n299", [1]), ("m5", [2]), ("n300", [])):
        assert numbers(store.search(f"span.name = '{text}'").traces) == expected
    assert numbers(store.search("span.type = 'T299'").traces) == [1]
    store.delete(trace_ids=[trace_id(1)])
    assert store.search("span.name = 'n299'").traces == []


def finished(number: int) -> TraceRow:
    """Return a finished trace."""
    return trace(number)


def unfinished(number: int) -> TraceRow:
    """Return a trace in progress."""
    return trace(number, state="IN_PROGRESS", duration_ns=None)


def test_changes(store: Store) -> None:
    """Each trace is told of once, when it has finished, also if others that came later finished before."""
    store.write([finished(1)], [])
    nothing, cursor = store.changes()
    assert nothing == []
    store.write([unfinished(2), finished(3)], [span(3)])
    found, cursor = store.changes(cursor)
    assert numbers(found) == [3] and len(found[0].spans) == 1
    assert store.changes(cursor) == ([], cursor)
    store.write([finished(2), unfinished(4)], [])
    found, cursor = store.changes(cursor)
    assert numbers(found) == [2]
    store.delete(trace_ids=[trace_id(4)])
    assert store.changes(cursor)[1].pending == frozenset()


def test_changes_from_the_beginning(store: Store) -> None:
    """From 0 on, everything is told of, a few rows at a time."""
    store.write([finished(n) for n in range(5)], [])
    found, cursor = store.changes(0, limit=3)
    assert numbers(found) == [0, 1, 2]
    assert numbers(store.changes(cursor)[0]) == [3, 4]
    assert cursor == Cursor(3)


def test_changes_after_unfinished_ones(store: Store) -> None:
    """What was in progress when somebody began to look is told of when it finishes."""
    store.write([unfinished(1)], [])
    _, cursor = store.changes()
    store.write([finished(1)], [])
    assert numbers(store.changes(cursor)[0]) == [1]


def test_stats(store: Store) -> None:
    """The store knows how much it holds, from when to when, and what waits."""
    store.write([trace(1), trace(3)], [span(1), span(3)], outbox=True)
    found = store.stats()
    assert found.pop("size_bytes") > 0
    assert found == {
        "traces": 2, "spans": 2, "oldest_ns": START + MS, "newest_ns": START + 3 * MS, "file_bytes": 0,
        "waiting": 2, "dead": 0, "oldest_waiting_ns": START + MS, "purged": 0, "purged_undelivered": 0,
    }  # fmt: skip


def test_read_does_not_write(store: Store) -> None:
    """A query given as SQL reads rows."""
    store.write([trace(1)], [])
    assert store.read("SELECT name FROM traces WHERE trace_id = ?", [trace_id(1)]) == [("GET /items/{id}",)]
