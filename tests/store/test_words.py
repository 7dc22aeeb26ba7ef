"""The short words of the token index: with them a search finds what it finds without the index."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.store.rows import MS, START, span, trace, trace_id
from tests.store.test_search import steps
from tracemw.errors import FilterError
from tracemw.store import SpanRow, Store, open_store, tokens
from tracemw.store.filter import compile_filter

KEYS = ["k", "a.b", "mlflow.spanType", "mlflow.x", 'q"uo', "é", "b\\s", ",", ' "', "x" * 250, "tracemw.outcome"]
TEXTS = st.one_of(
    st.sampled_from(
        ["x", "X", "3", "3.0", "0.1", "true", "null", "", " ", ",", "[]", '["x"]', '{"k": "x"}', '{"k":"x"}',
         '"x"', '"3"', "1e3", "1000", "-0.0", "completed", "disconnected", "a\\", "\x7f", "\\u0041", "東京", "😀",
         "x" * 200, "x" * 201, "9223372036854775808", "123456789012345678", "Inf", "1_000"]
    ),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5),
)  # fmt: skip
NUMBERS = st.one_of(
    st.sampled_from(
        [0, 1, 3, 3.0, 0.1, 0.30000000000000004, 1e3, 1e15, 1e16, 1e22, 1e300, -3, 2**53, 2**63 - 1, 2**63, 2**70,
         -(2**63), 10**18, 10**18 - 1, 10**400, 5e-324, 0.123456789012345678, -0.0]
    ),
    st.integers(-(2**64), 2**64), st.floats(allow_nan=False, allow_infinity=False),
)  # fmt: skip
SCALARS = st.one_of(TEXTS, NUMBERS, st.booleans(), st.none())
VALUES = st.one_of(
    SCALARS, st.lists(SCALARS, max_size=2), st.dictionaries(st.sampled_from(KEYS), SCALARS, max_size=2)
)


def dumped(separators: tuple[str, str] | None, ascii_only: bool) -> Callable[[dict[str, Any]], str]:
    """Return a function that makes JSON text, of whatever form."""

    def dump(attributes: dict[str, Any]) -> str:
        made = {
            key: json.dumps(value) if key.startswith("mlflow.") and not isinstance(value, str) else value
            for key, value in attributes.items()
        }
        return json.dumps(made, separators=separators, ensure_ascii=ascii_only)

    return dump


FORMS = st.sampled_from(
    [dumped((",", ":"), False), dumped((",", ":"), True), dumped(None, True), dumped((" ,", " :"), False)]
)
ATTRIBUTES = st.builds(
    lambda form, attributes: form(attributes), FORMS, st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5)
)
DOUBLED = ATTRIBUTES.map(lambda text: text[:-1] + (", " if len(text) > 2 else "") + '"k": "y", "k":"x"}')
JSON_TEXTS = st.one_of(ATTRIBUTES, ATTRIBUTES, DOUBLED, st.sampled_from(["[1]", "3", '"k"', '{"k":"a\\u0000b"}']))


def literal(value: Any) -> list[str]:
    """Return ways to write a value in a filter."""
    if isinstance(value, bool):
        return [repr(json.dumps(value))]
    if isinstance(value, (int, float)):
        plain = format(value, "f") if isinstance(value, float) else str(value)
        return [plain, f"'{value}'", f"'{plain}'"]
    if isinstance(value, str):
        return ["'" + value.replace("\\", "\\\\").replace("'", "''") + "'"] if "\0" not in value else []
    return ["'" + json.dumps(value, separators=(",", ":"), ensure_ascii=False).replace("'", "''") + "'"]


@pytest.fixture
def store() -> Iterator[Store]:
    """An empty store in memory."""
    with open_store("memory:") as store:
        yield store


def same(store: Store, filter_string: str) -> None:
    """Check that the index leads to the very traces that SQL alone finds."""
    try:
        where = compile_filter(filter_string, now_ns=START)
    except FilterError:  # a number that is too long
        return
    alone = store.read(f"SELECT t.id FROM traces AS t WHERE {where.sql} ORDER BY 1", where.params)
    if where.match is not None and tokens.supported():
        tables = "tokens JOIN traces AS t ON t.start_key = tokens.rowid"
        sql = f"SELECT t.id FROM {tables} WHERE tokens MATCH ? AND {where.sql} ORDER BY 1"
        assert store.read(sql, (where.match, *where.params)) == alone, (filter_string, where.match)


def pairs(texts: list[str]) -> list[tuple[str, Any]]:
    """Return keys and values of attributes, those of MLflow as they are and decoded."""
    found = []
    for attributes in map(json.loads, texts):
        for key, value in attributes.items() if isinstance(attributes, dict) else ():
            found.append((key, value))
            if key.startswith("mlflow.") and isinstance(value, str):
                try:
                    found.append((key, json.loads(value)))
                except ValueError:
                    pass
    return found


@given(st.lists(JSON_TEXTS, min_size=1, max_size=4), st.tuples(st.sampled_from(KEYS), SCALARS))
def test_attributes(texts: list[str], other: tuple[str, Any]) -> None:
    """Whatever the attributes of spans are, `=` and IN find the same traces through the index as by reading."""
    with open_store("memory:") as store:
        store.write([], [span(n, attributes=text) for n, text in enumerate(texts)])
        for key, value in [other, *pairs(texts)]:
            for written in literal(value):
                same(store, f"span.attributes.`{key}` = {written}")
            same(store, f"span.attributes.`{key}` IN ({', '.join(literal(value)[-1:])})")
        for status in ("OK", "UNSET", "ERROR"):
            same(store, f"span.status = '{status}'")


VERSIONS = st.one_of(SCALARS, st.sampled_from(["1", 1, 1.0]))
PROMPTS = st.one_of(
    st.sampled_from(
        ["", "[", "3", '[{"name": "a"}]', '{"p": {"name": "a", "version": "1"}}',
         '[{"name": "a\\u0000", "version": 1}]', '[{"name": "a", "name": "b", "version": "1"}]']
    ),
    st.lists(
        st.one_of(st.fixed_dictionaries({"name": SCALARS, "version": VERSIONS}), SCALARS), max_size=3
    ).map(json.dumps),
)  # fmt: skip
TIMES = st.sampled_from([None, 0, 1, MS - 1, MS, 12_900_000, 1023 * MS, 1024 * MS, 10**7 * MS, -1, -MS, -5 * MS])
FACTS = st.tuples(TIMES, TIMES, st.one_of(st.none(), TEXTS), PROMPTS)


@given(st.lists(FACTS, min_size=1, max_size=4))
def test_facts_of_traces(facts: list[tuple[int | None, int | None, str | None, str]]) -> None:
    """Durations, ends, previews and prompts are found through the index as by reading."""
    with open_store("memory:") as store:
        rows = [
            trace(n, duration_ns=duration, start_ns=START + (shift or 0), request_preview=text,
                  response_preview=text, tags={"mlflow.linkedPrompts": prompts})
            for n, (duration, shift, text, prompts) in enumerate(facts)
        ]  # fmt: skip
        spans = [span(n, end_ns=span(n).start_ns + (facts[n][0] or 0)) for n in range(len(facts))]
        store.write(rows, spans)
        for duration, shift, text, prompts in facts:
            ms = (duration or 0) // MS
            for wanted in (ms, ms + 1, f"{ms}.5", f"{ms}.9ms" if ms >= 0 else ms):
                same(store, f"execution_time = {wanted}")
                same(store, f"span.execution_time = {wanted}")
            for end in range(-1, 2):
                same(store, f"end_time = {(START + (shift or 0)) // MS + ms + end}")
            for written in literal(text) if text is not None else ():
                same(store, f"request = {written} OR response IN ({written})")
            for prompt in named(prompts):
                for written in literal(prompt):
                    same(store, f"prompt = {written}")


def named(text: str) -> list[str]:
    """Return the prompts that a tag may name."""
    found = ["a/1", "a/1.0"]
    try:
        prompts = json.loads(text)
    except ValueError:
        return found
    for prompt in prompts if isinstance(prompts, list) else ():
        if isinstance(prompt, dict):
            name, version = (
                json.dumps(part) if isinstance(part, (bool, type(None))) else str(part)
                for part in (prompt.get("name"), prompt.get("version"))
            )
            found.append(f"{name}/{version}")
    return [name for name in found if name.count("/") == 1]


@pytest.mark.parametrize(
    ("tag", "prompt"),
    [
        ('{"p": {"name": "a", "version": "1"}, "p": {"name": "b", "version": "2"}}', "b/2"),
        ('[{"name": "a", "version": 100000000000000000000}]', "a/1.0e+20"),
    ],
)
def test_prompts_that_sql_reads_differently(store: Store, tag: str, prompt: str) -> None:
    """An object with a key twice and a version beyond 64 bits are found as SQL writes them."""
    store.write([trace(1, tags={"mlflow.linkedPrompts": tag})], [])
    same(store, f"prompt = '{prompt}'")
    assert len(store.search(f"prompt = '{prompt}'").traces) == 1


def test_the_longest_duration(store: Store) -> None:
    """A duration beyond 64 bits is the longest one, in a filter as in the store."""
    store.write([trace(1, duration_ns=2**70)], [])
    same(store, "duration = '9999999999999.5ms'")
    assert len(store.search("duration = '9999999999999.5ms'").traces) == 1


def test_a_nul_however_it_is_escaped(store: Store) -> None:
    """Text that SQLite may end at a NUL is found as SQL sees it, here with an escape within the escape of it."""
    store.write([], [span(1, attributes='{"mlflow.x":"\\"a\\\\u0\\u003000b\\""}')])
    same(store, "span.attributes.`mlflow.x` = 'a'")


ANY_SPAN = st.builds(
    lambda of, number, name, status, kind, text, late: span(
        of, number, name=name, status=status, span_type=kind, attributes=text, start_ns=START + of * MS + late
    ),
    st.integers(0, 3), st.integers(0, 3), st.sampled_from(["a", "b"]), st.sampled_from(["UNSET", "OK", "ERROR"]),
    st.sampled_from([None, "UNKNOWN", "LLM"]), JSON_TEXTS, st.sampled_from([0, -7 * MS, 5]),
)  # fmt: skip
AFTERWARDS = [
    "span.type = 'UNKNOWN'", "span.status = 'OK'", "span.status = 'UNSET'", "duration = 7", "prompt = 'a/1'",
    "span.name = 'a' AND NOT span.type = 'LLM'", "span.execution_time = 0",
]  # fmt: skip
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.lists(st.integers(0, 3).map(trace), max_size=2), st.lists(ANY_SPAN, max_size=3)),
        st.tuples(st.integers(0, 3), PROMPTS),
        st.integers(0, 3),
    ),
    max_size=6,
)


@given(CHANGES)
def test_every_change(changes: list[Any]) -> None:
    """Late and changed spans, moved starts, patches, deletions: the index follows, and keeps nothing at last."""
    with open_store("memory:") as store:
        written: list[SpanRow] = []
        for change in changes:
            if isinstance(change, int):
                store.delete(trace_ids=[trace_id(change)])
            elif isinstance(change[0], int):
                store.patch(trace_id(change[0]), tags={"mlflow.linkedPrompts": change[1]}, duration_ns=7 * MS)
            else:
                store.write(*change)
                written += change[1]
        for key, value in pairs([row.attributes for row in written]):
            for text in literal(value)[:1]:
                same(store, f"span.attributes.`{key}` = {text} AND span.name = 'a'")
        for text in AFTERWARDS:
            same(store, text)
        store.delete(trace_ids=[trace_id(n) for n in range(4)])
        if tokens.supported():
            with store._pool.connection() as connection:
                connection.execute("CREATE VIRTUAL TABLE temp.left USING fts5vocab(main, tokens, row)")
                assert connection.execute("SELECT term FROM temp.left").fetchall() == []


@pytest.mark.skipif(not tokens.supported(), reason="needs FTS5")
def test_a_word_that_a_span_and_its_trace_share(store: Store) -> None:
    """The duration of both is one word: it goes with the trace, and no merging of the index brings it back."""
    random = Random(3)

    def some() -> tuple[int, int, int]:
        n = random.randrange(40)
        duration = random.choice([0, MS, 7 * MS, random.randrange(200) * MS])
        return n, START + n * MS - random.choice([0, 0, 500]), duration

    for _ in range(600):
        traces = [trace(n, start_ns=start, duration_ns=duration) for n, start, duration in (some(), some())]
        spans = [
            span(n, random.randrange(5), name=f"n{random.randrange(9)}", start_ns=start, end_ns=start + duration)
            for n, start, duration in (some(), some(), some())
        ]
        store.write(traces[: random.randrange(3)], spans[: random.randrange(4)])
        store.patch(trace_id(random.randrange(40)), duration_ns=random.choice([MS, 7 * MS]))
        if not random.randrange(4):
            store.delete(trace_ids=[trace_id(random.randrange(40))])
    with store._pool.connection() as connection:
        connection.execute("CREATE VIRTUAL TABLE temp.there USING fts5vocab(main, tokens, instance)")
        there = set(connection.execute("SELECT term, doc FROM temp.there"))
    rows = store.read("SELECT start_key, words, trace_id FROM traces")
    wanted = set()
    for key, words, trace_id_ in rows:
        found = store.get(trace_id_)
        assert found is not None
        wanted |= {(word, key) for word in tokens.document(found.row, words).split()}  # all ASCII
    assert there == wanted


EQUALITIES = [
    "span.attributes.k = 'x'", "span.attributes.k = 3", "span.attributes.k IN ('x', 'y')", "span.status = 'UNSET'",
    "span.type = 'AGENT'", "span.execution_time = 77", "execution_time = 77", "end_time = 5", "request = 'x'",
    "response IN ('x', 'y')", "prompt = 'a/1'", "NOT name = 'x' AND span.attributes.k = 'x'",
]  # fmt: skip


@pytest.mark.skipif(not tokens.supported(), reason="needs FTS5")
@pytest.mark.parametrize("filter_string", EQUALITIES)
def test_equality_reads_no_rows(store: Store, filter_string: str) -> None:
    """What no trace has is known without reading traces or spans."""
    store.write([trace(n) for n in range(1000)], [span(n, attributes='{"k":"z","n":3}') for n in range(1000)])
    assert 0 < steps(store, filter_string) < steps(store, "request LIKE 'nothing%'") / 10


def test_more_words_than_a_trace_has(store: Store) -> None:
    """A trace with too many attributes, names and durations for its words is still found by each."""
    for n in range(0, 3000, 100):
        store.write([], [many(number) for number in range(n, n + 100)])
    store.write([trace(2)], [span(2, 1, attributes='{"k":"v7"}')])
    for text, ids in (
        ("span.attributes.k = 'v2999'", [1]), ("span.attributes.k = 'v7'", [2, 1]), ("span.name = 'n2998'", [1]),
        ("span.execution_time = 2997", [1]), ("span.attributes.k = 'v3000'", []), ("span.status = 'ERROR'", []),
    ):  # fmt: skip
        assert [int(found.row.trace_id, 16) for found in store.search(text).traces] == ids
    assert store.read("SELECT max(length(words)) FROM traces")[0][0] < 10_000


def many(number: int) -> SpanRow:
    """Return a span that has no value in common with others."""
    return span(
        1, number + 1, name=f"n{number}", attributes=f'{{"k":"v{number}"}}', start_ns=START,
        end_ns=START + number * MS,
    )  # fmt: skip


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1" * 5000, '"\\ud800"', '"a\\u0000b"', '{"a":[{}]}'])
def test_what_cannot_be_read(store: Store, value: str) -> None:
    """No attribute keeps a span from being stored."""
    store.write([trace(1)], [span(1, attributes=f'{{"k":{value}}}'), span(1, 1, attributes="[" * 100_000)])
    assert [len(found.spans) for found in store.search("span.name = 'step'").traces] == [2]
