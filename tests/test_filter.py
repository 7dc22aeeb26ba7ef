"""The filter language: what it means, what it refuses, and that text never becomes SQL."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from tests.filter_data import FILTERS, MS, NOW, make_span, make_trace, sample_rows
from tracemw.errors import FilterError
from tracemw.store import Store, open_store
from tracemw.store.filter import compile_filter, compile_order, register_functions
from tracemw.store.match import MAX_SUBJECT, check_regex


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    """A store with the sample traces."""
    with open_store("memory:") as opened:
        opened.write(*sample_rows())
        yield opened


def found(store: Store, filter_string: str) -> set[str]:
    """Names of the traces that match; with and without the token index, which must not matter."""
    where = compile_filter(filter_string, now_ns=NOW)
    plain = {name for (name,) in store.read(f"SELECT t.name FROM traces AS t WHERE {where.sql}", where.params)}
    if where.match is not None:
        tables = "tokens JOIN traces AS t ON t.start_key = tokens.rowid"
        sql = f"SELECT t.name FROM {tables} WHERE tokens MATCH ? AND {where.sql}"
        assert {name for (name,) in store.read(sql, (where.match, *where.params))} == plain
    return plain


ALL = {"a", "b", "c", "d"}


@pytest.mark.parametrize(
    ("filter_string", "names"),
    [
        # Attributes, under every prefix.
        ("status = 'OK'", "a"),
        ("trace.status = 'OK'", "a"),
        ("attributes.status = 'OK' AND attribute.name = 'a'", "a"),
        ("status != 'OK'", "bcd"),
        ("status = 'TRACE_STATUS_UNSPECIFIED'", "c"),
        ("state = 'error'", "b"),
        ("status IN ('OK', 'ERROR')", "ab"),
        ("status NOT IN ('OK', 'ERROR')", "cd"),
        ("name = 'a'", "a"),
        ("name LIKE 'A'", ""),
        ("name ILIKE 'A'", "a"),
        ("name RLIKE '^[ab]$'", "ab"),
        ("tags.`mlflow.traceName` = 'a'", "a"),
        (f"request_id = 'tr-{1:032x}'", "a"),
        (f"trace_id = '{1:032x}'", "a"),
        (f"request_id IN ('tr-{1:032x}', '{2:032x}')", "ab"),
        ("request_id LIKE 'tr-%1'", "a"),
        ("client_request_id = 'req-1'", "a"),
        ("client_request_id IS NULL", "cd"),
        ("session = 's-1' AND session_id = 's-1'", "ab"),
        ("user = 'jané' OR user_id = 'bob'", "ab"),
        ("metadata.`mlflow.trace.session` = 's-1'", "ab"),
        ('metadata."mlflow.trace.user" = \'bob\'', "b"),
        ("environment = 'prod'", "ab"),
        ("version = '1.0.0' AND app_version = '1.0.0' AND metadata.app_version = '1.0.0'", "a"),
        ("deployment = 'blue'", "a"),
        ("metadata.deployment_id = 'blue' AND deployment_id = 'blue'", "a"),
        ("region != 'eu'", "b"),
        ("route = '/items/{id}'", "a"),
        ("method IN ('GET', 'POST')", "ab"),
        ("status_code >= 500", "b"),
        ("status_code = '200'", "a"),
        ("status_code IN (200, 503)", "ab"),
        ("status_code NOT IN (200)", "b"),
        ("outcome = 'disconnected'", "c"),
        ("request CONTAINS 'WEATHER'", "a"),
        ("request_preview LIKE '%weather%'", "a"),
        ("response CONTAINS '100%'", "a"),
        ("response_preview CONTAINS '1_0'", ""),
        # Tags and metadata.
        ("tags.flag = 'on'", "a"),
        ("tag.flag != 'on'", "b"),
        ("tags.flag IN ('on', 'off')", "ab"),
        ("tags.flag IS NULL", "cd"),
        ("tags.flag IS NOT NULL", "ab"),
        ("NOT tags.flag = 'on'", "bcd"),
        ("tags.`dotted.key` = 'x'", "a"),
        ("tags.dotted.key = 'x'", "a"),
        ("tags.'dotted.key' = 'x'", "a"),
        ('tags."quo`te" = \'y\'', "b"),
        ("""tags.`it's "quoted" \\` = 'z'""", "b"),
        ("metadata.ключ = 'значение'", "a"),
        ("metadata.ключ ILIKE 'ЗНАЧ%'", "a"),
        ("metadata.ключ LIKE 'ЗНАЧ%'", ""),
        ("request_metadata.`mlflow.source.type` = 'production'", "ab"),
        ("metadata.note = 'it''s'", "a"),
        ("metadata.note = \"it's\"", "a"),
        (r"metadata.note = 'it\'s'", "a"),
        ("run_id = 'r1'", "a"),
        ("prompt = 'greet/2'", "a"),
        ("prompt = 'greet/1'", ""),
        # Durations and times: whole milliseconds, as MLflow has them (a took 12.9 ms, b 1.5 s).
        ("execution_time = 12", "a"),
        ("execution_time_ms > 12", "b"),
        ("execution_time >= 12ms", "ab"),
        ("execution_time > 12.5", "b"),
        ("execution_time > 12.5ms", "ab"),
        ("execution_time != 12", "bc"),
        ("duration < 1s", "ac"),
        ("duration >= 1.5s AND duration <= 1500 AND duration = '1500ms'", "b"),
        ("duration < 1m30s", "abc"),
        ("duration > 100us AND duration < '2 min'", "abc"),
        ("duration IS NULL", "d"),
        (f"timestamp_ms = {NOW // MS - 60_000}", "a"),
        (f"timestamp > {NOW // MS - 60_001} AND timestamp < '{NOW // MS - 59_999}'", "a"),
        ("timestamp >= now - 1m", "a"),
        ("timestamp > now-1h30m", "ab"),
        ("timestamp < now() - 1h AND timestamp > 'now - 2h'", "b"),
        ("timestamp < now", "abcd"),
        ("timestamp >= '2026-01-01T00:00:00Z'", "abcd"),
        ("timestamp < '2026-01-01T02:00:00+02:00'", ""),
        (f"end_time = {NOW // MS - 60_000 + 12}", "a"),
        # Spans: conditions joined by AND and OR speak of one span, NOT of the whole trace.
        ("span.name = 'search'", "ab"),
        ("span.name = 'search' AND span.status = 'ERROR'", "b"),
        ("span.name = 'search' AND NOT span.status = 'ERROR'", "a"),
        ("span.name = 'generate' AND span.type = 'RETRIEVER'", ""),
        ("(span.name = 'generate' OR span.name = 'search') AND (span.type = 'RETRIEVER' OR name = 'b')", "ab"),
        ("NOT span.name = 'search'", "cd"),
        ("NOT (span.name = 'search' AND span.status = 'ERROR')", "acd"),
        ("span.type = 'UNKNOWN'", "abc"),
        ("span.status = 'OK'", "ab"),
        ("span.status = 'UNSET'", "c"),
        ("span.execution_time > 5ms", "ab"),
        ("span.attributes.model = 'gpt-4'", "a"),
        ("span.attributes.model LIKE 'gpt%'", "a"),
        ("span.attributes.tokens > 100", "a"),
        ("span.attributes.tokens > 100 AND span.name = 'search'", ""),
        ("span.attributes.tokens = 120", "a"),
        ("span.attributes.tokens = '120'", "a"),
        ("span.attributes.tokens IN (119, 120)", "a"),
        ("span.attributes.cached = 'true'", "a"),
        ("span.attributes.`llm.\"x\"` = 'q'", "a"),
        ("span.attributes.mlflow.spanType = 'RETRIEVER'", "ab"),
        ("span.attributes.`mlflow.spanInputs` CONTAINS 'paris'", "a"),
        ("span.attributes.missing IS NOT NULL", ""),
        ("span.attributes.missing != 'x'", ""),
        ("span.content LIKE '%Paris%'", "a"),
        ("span.content LIKE '%paris%'", ""),
        ("text LIKE '%weather%'", "a"),
        ("trace.text ILIKE '%ZÜRICH%'", "a"),
        ("text CONTAINS 'Zürich'", "a"),
        ('text CONTAINS \'say "hi"\'', "a"),
        ("text CONTAINS 'ValueError'", "b"),
        ("text LIKE '%weather%' AND span.name = 'search'", ""),
        ("text CONTAINS '東京'", "b"),
        # What the store does not have.
        ("feedback.quality = 'good'", ""),
        ("feedback.score > 0.5", ""),
        ("expectation.answer IS NULL", "abcd"),
        ("issue.id = 'i-1'", ""),
        # Connectives.
        ("name = 'a' OR name = 'b' AND status = 'OK'", "a"),
        ("(name = 'a' OR name = 'b') AND status = 'ERROR'", "b"),
        ("NOT NOT name = 'a'", "a"),
        ("NOT (name = 'a' OR name = 'b') AND NOT name = 'c'", "d"),
        ("name = 'a' status = 'OK'", "a"),
        ("and name = 'a' AND AND status = 'OK' and", "a"),
        ("name='a'OR name='b'", "ab"),
        ("name NOT LIKE 'a%' AND name NOT ILIKE 'B' AND name NOT CONTAINS 'c' AND name NOT RLIKE 'x'", "d"),
    ],
)  # fmt: skip
def test_meaning(store: Store, filter_string: str, names: str) -> None:
    """A filter finds these of the four sample traces."""
    assert found(store, filter_string) == set(names)


@pytest.mark.parametrize("filter_string", [None, ""])
def test_no_filter(filter_string: str | None) -> None:
    """No filter is all traces."""
    assert compile_filter(filter_string).sql == "1"


def test_long_lists(store: Store) -> None:
    """A list may be longer than SQLite has parameters."""
    names = ", ".join(f"'n{number}'" for number in range(5000))
    assert found(store, f"name IN ({names}, 'a')") == {"a"}
    assert found(store, f"name NOT IN ({names}, 'a')") == ALL - {"a"}


def test_local_time() -> None:
    """A date or time without an offset is local."""
    local = datetime(2026, 1, 31, 9, 30).astimezone(timezone.utc).timestamp()
    assert compile_filter("timestamp >= '2026-01-31T09:30:00'").params == (int(local) * 10**9,)
    midnight = datetime(2026, 1, 31).astimezone(timezone.utc).timestamp()
    assert compile_filter("timestamp >= '2026-01-31'").params == (int(midnight) * 10**9,)


def test_now_is_the_clock() -> None:
    """`now` is the time at which the filter is compiled."""
    before = time.time_ns()
    (limit,) = compile_filter("timestamp > now").params
    assert before - 2 * MS <= int(limit) <= time.time_ns() + 2 * MS


# MLflow's verdict.


@pytest.mark.parametrize(("filter_string", "mlflow", "ours"), FILTERS)
def test_mlflow_verdict(store: Store, filter_string: str, mlflow: bool, ours: bool) -> None:
    """What MLflow 3.17 accepts is accepted; what it refuses is refused, but for our extensions."""
    try:
        store.search(filter_string) if filter_string.strip() else compile_filter(filter_string)
        accepted = True
    except FilterError:
        accepted = False
    assert accepted == ours


# Errors.


@pytest.mark.parametrize(
    ("filter_string", "message", "column", "width"),
    [
        ("stauts = 'OK'", "unknown field 'stauts'; did you mean 'status'?", 0, 6),
        ("name = 'x' AND Status = 'OK'", "unknown field 'Status'; did you mean 'status'?", 15, 6),
        ("tgas.x = 'y'", "unknown field 'tgas.x'; did you mean 'tags.x'?", 0, 6),
        ("span.nam = 'y'", "unknown field 'span.nam'; did you mean 'name'?", 0, 8),
        ("span.foo.bar = 'y'", "an attribute is written span.attributes.`foo.bar`", 0, 12),
        ("mlflow.source.type = 'y'", "a key of the metadata is written metadata.`mlflow.source.type`", 0, 18),
        ("feature = 'on'", "a key of the metadata is written metadata.feature, a tag tags.feature", 0, 7),
        ("tags = 'on'", "a key is missing: tags.<key>", 0, 4),
        ("tags. = 'on'", "a key is missing after the dot", 4, 1),
        ("tags.feature-flag = 'on'", "goes into backticks: tags.`feature-flag`", 12, 1),
        ("status = OK", "this field holds text: put the value into quotes, 'OK'", 9, 2),
        ("metadata.n = 5", "put the value into quotes, '5'", 13, 1),
        ("metadata.app_version = 1.0.0", "text goes into quotes", 23, 1),
        ("metadata.n > 5", "metadata.n cannot be compared by >; use one of =, !=, LIKE", 11, 1),
        ("timestamp LIKE '1%'", "timestamp cannot be compared by LIKE", 10, 4),
        ("text = 'x'", "text cannot be compared by =; use one of LIKE, ILIKE, CONTAINS", 5, 1),
        ("text NOT LIKE 'x'", "write NOT before the field: NOT text LIKE ...", 9, 4),
        ("name == 'x'", "unknown operator ==; write =", 5, 2),
        ("name <> 'x'", "unknown operator <>; write !=", 5, 2),
        ("name =~ 'x'", "unknown operator =~; write RLIKE", 5, 2),
        ("name LIK 'x'", "did you mean 'LIKE'?", 5, 3),
        ("name BETWEEN 'a' AND 'b'", "write field >= low AND field <= high", 5, 7),
        ("name = 'x' && status = 'OK'", "write AND", 11, 2),
        ("name = 'x' || status = 'OK'", "write OR", 11, 2),
        ("name = 'x';", "only one expression is allowed", 10, 1),
        ("name = 'x", "what begins here has no closing '", 7, 1),
        ("name = NULL", "write IS NULL or IS NOT NULL", 7, 4),
        ("name IN ()", "the list is empty", 5, 2),
        ("name IN ('a' 'b')", "expected ',' or ')'", 13, 3),
        ("name IN ('a'", "the string ends where ',' or ')' is expected", 12, 1),
        ("(name = 'a'", "the string ends where ')' is expected", 11, 1),
        ("name = 'a' OR name = 'b' status = 'OK'", "AND is missing", 25, 6),
        ("NOT name = 'a' status = 'OK'", "AND or OR is missing", 15, 6),
        ("execution_time > 'abc'", "expected a duration: 500ms, 1.5s, 2m", 17, 5),
        ("execution_time > 5parsecs", "the units of a duration are ns, us, ms, s, m, h, d, w", 17, 8),
        ("timestamp > 1h", "a duration is no time: write now - 1h", 12, 2),
        ("timestamp > '2026-13-01'", "expected a time: now - 1h, '2026-01-31'", 12, 12),
        ("status_code = 'abc'", "expected a number", 14, 5),
        ("span.attributes.n > 'abc'", "expected a number", 20, 5),
        ("name RLIKE '('", "not a regular expression: missing )", 11, 3),
        ("prompt = 'x'", "a prompt is written 'name/version'", 9, 3),
        ("feedback.score > '0.5'", "> needs a number without quotes", 17, 5),
        ("name = 'a\x00b'", "no stored text contains this character", 9, 1),
        ("name = '\ud800'", "no stored text contains this character", 8, 1),
        ("'OK' = status", "expected a field or '('", 0, 4),
    ],
)
def test_error_points_at_the_place(filter_string: str, message: str, column: int, width: int) -> None:
    """A wrong filter is told with what to do, its line, and carets below the place."""
    with pytest.raises(FilterError) as caught:
        compile_filter(filter_string)
    said, line, pointer = str(caught.value).split("\n")
    assert message in said
    assert line == "  " + re.sub("[\x00\ud800]", "\N{REPLACEMENT CHARACTER}", filter_string)
    assert (len(pointer) - len(pointer.lstrip()) - 2, pointer.count("^")) == (column, width)


def test_error_in_a_long_text() -> None:
    """Of a long string or one of several lines, the part around the place is shown."""
    long = " AND ".join(["status = 'OK'"] * 50) + "\nAND nmae = 'x'\n" + "AND status = 'OK'" * 20
    with pytest.raises(FilterError) as caught:
        compile_filter(long)
    assert str(caught.value).split("\n")[1:] == ["  AND nmae = 'x'", "      ^^^^"]
    with pytest.raises(FilterError) as caught:
        compile_filter(long.replace("\n", " ").replace("AND", "AND "))
    _, line, pointer = str(caught.value).split("\n")
    assert line.startswith("  ...") and line.endswith("...") and len(line) < 120
    assert line[pointer.index("^") : pointer.rindex("^") + 1] == "nmae"


@pytest.mark.parametrize(
    "filter_string",
    [
        "name = '" + "x" * 200_000 + "'",
        " AND ".join(["name = 'x'"] * 300),
        "NOT " * 100 + "name = 'x'",
        "name LIKE '" + "x" * 2000 + "'",
        "name RLIKE '" + "x" * 2000 + "'",
        "execution_time > 1" + "0" * 500,
        "   ",
        "\n",
    ],
)
def test_limits(filter_string: str) -> None:
    """What is too long, too deep or blank is refused in words."""
    with pytest.raises(FilterError):
        compile_filter(filter_string)


def test_not_text() -> None:
    """A filter or order of another type is refused in words."""
    with pytest.raises(FilterError, match="a filter is text, not int"):
        compile_filter(5)  # type: ignore[arg-type]
    with pytest.raises(FilterError, match="order_by holds text, not int"):
        compile_order([5])  # type: ignore[list-item]


def test_deepest_filter_runs(store: Store) -> None:
    """SQLite takes what the limits let pass."""
    text = "name = 'a' AND span.name = 'x'"
    for number in range(9):
        text = f"NOT ({text} OR tags.x = '{number}')"
    store.search(text)
    store.search("(" * 200 + "name = 'a'" + ")" * 200)
    store.search(" OR ".join(["text LIKE '%é\"%'"] * 50))
    store.search(" AND ".join(f"tags.k{number} = 'v'" for number in range(250)))


def test_huge_numbers(store: Store) -> None:
    """Numbers beyond 64 bits are compared as the nearest ones."""
    assert found(store, "timestamp < 99999999999999999999999") == ALL
    assert found(store, "timestamp > 1e300") == set()
    assert found(store, "execution_time > -1e300") == {"a", "b", "c"}
    assert found(store, "status_code < 1e300") == {"a", "b"}
    assert found(store, "status_code > 1e-300") == {"a", "b"}


# Regular expressions.


EXPLOSIVE = ["(a+)+$", "(a|aa)+b", r"(\w+\s?)*$", "(a?){30}b", "(x{1,5}|a)*y", "(?:a|ab)+c", "(?:a{1,9}){9}b"]
POLYNOMIAL = ["a*a*b", "a*a*a*a*b", ".*.*.*!", r"(\w*)(\d*)(\w*)!", "a{0,99}a{0,99}a{0,99}b", ".*?.*?.*?!"]
GOING_BACK = [r"(a)(b*)*\1", "(?=a*b*)c", "(?:a{99}b?){99}", "(?<=a)b+c*"]


@pytest.mark.parametrize("pattern", EXPLOSIVE + POLYNOMIAL + GOING_BACK)
def test_no_expression_hangs(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an engine that tries all ways would take for ever on is found, or ended with what to do."""
    monkeypatch.setattr("tracemw.store.match.MAX_SECONDS", 0.5)
    with open_store("memory:") as store:
        store.write([make_trace(1, name="a" * MAX_SUBJECT + "c"), make_trace(2, name="a" * 99 + " ")], [])
        began = time.monotonic()
        try:
            store.search(f"name RLIKE '{pattern}'")
        except FilterError as exc:
            assert "RLIKE takes too long" in str(exc)
        assert time.monotonic() - began < 20


def test_an_expression_that_takes_too_long_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names RLIKE and says what to do."""
    monkeypatch.setattr("tracemw.store.match.MAX_SECONDS", 0.2)
    with open_store("memory:") as store:
        store.write([make_trace(1, name="a" * 5000 + "!")], [])
        with pytest.raises(FilterError, match="RLIKE takes too long"):
            store.search("name RLIKE '(a+)+$'")


@pytest.mark.parametrize(
    "pattern", [".*foo.*", "^(GET|POST) /x", "(ab){3}", "(?:foo|bar)+", r"\(a+\)+", "[(a+)]+", "(a+)?", "(?i)x"]
)
def test_usual_expressions(pattern: str) -> None:
    """Usual ones are not."""
    assert check_regex(pattern) is None


def test_regex_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow expression is ended after some seconds, with an error; texts are searched up to a limit."""
    monkeypatch.setattr("tracemw.store.match.MAX_SECONDS", 0.2)
    connection = sqlite3.connect(":memory:")
    register_functions(connection)
    assert connection.execute("SELECT ? REGEXP 'z'", ("a" * MAX_SUBJECT + "z",)).fetchone() == (0,)
    assert connection.execute("SELECT NULL REGEXP 'z'").fetchone() == (None,)
    connection.execute("CREATE TABLE x (v)")
    connection.executemany("INSERT INTO x VALUES (?)", [("0" * 9000 + "1",)] * 500)
    began = time.monotonic()
    with pytest.raises(sqlite3.OperationalError):
        connection.execute("SELECT count(*) FROM x WHERE v REGEXP '(0+)+$'").fetchall()
    assert time.monotonic() - began < 30
    connection.close()


def test_a_search_after_one_that_took_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each query has its own time: the one after a query that was ended is not ended for it."""
    monkeypatch.setattr("tracemw.store.match.MAX_SECONDS", 0.2)
    with open_store("memory:") as store:
        store.write([make_trace(1, name="a" * 3000)], [])
        with pytest.raises(FilterError, match="takes too long"):
            store.search("name RLIKE '(a|aa)+b(a*)*c'")
        assert len(store.search("name RLIKE 'aaa'").traces) == 1


# Orders.


@pytest.mark.parametrize(
    ("order_by", "names"),
    [
        (None, "abcd"),
        ([], "abcd"),
        (["timestamp_ms DESC"], "abcd"),
        ("timestamp", "dcba"),
        (["attributes.timestamp ASC"], "dcba"),
        (["execution_time DESC"], "bacd"),
        (["execution_time"], "cabd"),
        (["status", "name DESC"], "bdac"),
        ("status, name DESC", "bdac"),
        (["tags.flag"], "bacd"),
        (["tags.`flag` DESC"], "abcd"),
        (["metadata.`mlflow.source.type`", "name desc"], "badc"),
        (["request_id DESC"], "dcba"),
        (["experiment_id"], "abcd"),
        (["trace.end_time"], "dcba"),
        (["""tags.`it's "quoted" \\` DESC"""], "bacd"),
        (["version DESC"], "bacd"),
        (["status_code"], "abcd"),
    ],
)
def test_order(store: Store, order_by: Any, names: str) -> None:
    """Traces come in this order; those without a value last, ties newest first."""
    assert "".join(trace.row.name for trace in store.search(order_by=order_by).traces) == names


@pytest.mark.parametrize(
    ("order_by", "message"),
    [
        (["stauts"], "did you mean 'status'?"),
        (["status descending"], "unexpected descending"),
        (["status DESC DESC"], "unexpected DESC"),
        (["span.name"], "traces cannot be ordered by this field"),
        (["text"], "traces cannot be ordered by this field"),
        (["status", "trace.status DESC"], "twice"),
        ([""], "blank"),
        (["status; DROP TABLE traces"], "only one expression"),
    ],
)
def test_wrong_order(order_by: list[str], message: str) -> None:
    """A wrong order is refused as a wrong filter is."""
    with pytest.raises(FilterError, match=re.escape(message)):
        compile_order(order_by)


# Text is never SQL.

_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
_HOSTILE = st.sampled_from(["'", '"', "`", "'; DROP TABLE traces; --", "' OR '1'='1", '$."x"', "$", *"*%_?[]\\éK"])
_ANY = st.one_of(_TEXT, st.lists(st.one_of(_TEXT, _HOSTILE), max_size=4).map("".join))


@given(_ANY, _ANY, st.sampled_from(["=", "!=", "LIKE", "ILIKE", "CONTAINS"]))
def test_text_is_a_parameter(key: str, value: str, operator: str) -> None:
    """The SQL of a filter is one of a few, whatever the key and the value."""
    key, value = key.replace("`", ""), value.replace("'", "")
    known = set()
    for plain_key in ("plain", '"'):
        for plain_value in ("plain", "É"):
            known.add(compile_filter(f"tags.`{plain_key}` {operator} '{plain_value}'").sql)
    assume(key != "mlflow.traceName")  # the name is a column
    assert compile_filter(f"tags.`{key}` {operator} '{value}'").sql in known
    terms = compile_order(f"tags.`{key}`").terms
    assert re.sub("x'[0-9a-f]*'", "x''", terms[1][0]) in {
        re.sub("x'[0-9a-f]*'", "x''", compile_order(f"tags.`{plain}`").terms[1][0]) for plain in ("plain", '"')
    }


@given(st.dictionaries(_ANY, _ANY, min_size=1, max_size=3), _ANY)
def test_hostile_keys_and_values_are_found(tags: dict[str, str], other: str) -> None:
    """Any key and value is found by itself, by CONTAINS and by LIKE, and by nothing else."""
    with open_store("memory:") as store:
        store.write([make_trace(1, name="x", tags=tags, metadata=tags)], [])
        for key, value in tags.items():
            field = key.replace("`", "")
            if field != key:
                continue
            literal = "'" + value.replace("\\'", "\\\\''").replace("'", "''") + "'"
            if value.endswith("\\") or "\\'" in value:  # a backslash before a quote keeps the quote
                continue
            for namespace in ("tags", "metadata"):
                if namespace == "tags" and key == "mlflow.traceName":
                    continue
                assert found(store, f"{namespace}.`{field}` = {literal}") == {"x"}
                assert found(store, f"{namespace}.`{field}` CONTAINS {literal}") == {"x"}
                assert found(store, f"NOT {namespace}.`{field}` IN ({literal})") == set()
                if other != value and "'" not in other and not other.endswith("\\"):
                    assert found(store, f"{namespace}.`{field}` = '{other}'") == set()


_PIECES = st.sampled_from(
    [
        "name",
        "status",
        "tags.x",
        "span.name",
        "text",
        "timestamp",
        "AND",
        "OR",
        "NOT",
        "IN",
        "=",
        "!=",
        ">",
        "LIKE",
    ]
    + ["RLIKE", "CONTAINS", "IS", "NULL", "'a'", '"b"', "`c`", "5", "5ms", "now", "1h", *"(),.;-"]
)


@given(st.one_of(st.text(max_size=60), st.lists(_PIECES, max_size=12).map(" ".join)))
@example("`")
@example("name RLIKE '\\")
def test_any_text(store: Store, text: str) -> None:
    """Any text at all compiles to SQL that runs, or is a FilterError with its place."""
    try:
        where = compile_filter(text)
    except FilterError as error:
        said, *place = str(error).split("\n")
        assert said.isprintable() and len(place) in (0, 2)
        return
    store.read(f"SELECT count(*) FROM traces AS t WHERE {where.sql}", where.params)


@given(st.text(max_size=30))
def test_any_order(store: Store, text: str) -> None:
    """Any order at all is sorted by, or is a FilterError."""
    try:
        store.search(order_by=[text])
    except FilterError:
        pass


# Generated filters against an evaluation in Python.

Row = dict[str, Any]
_WORDS = ["a", "A", "ab", "b%", "é", "É_"]
_LEAVES = [
    ("name", None, "name"),
    ("session", None, "session_id"),
    ("tags.k", "tags", "k"),
    ("metadata.`d.k`", "metadata", "d.k"),
    ("version", "metadata", "app_version"),
    ("span.name", "span", "name"),
    ("span.type", "span", "span_type"),
]


def _like(pattern: str, text: str, fold: bool) -> bool:
    regex = "".join({"%": ".*", "_": "."}.get(c, re.escape(c)) for c in pattern)
    return re.fullmatch(regex, text, re.DOTALL | (re.IGNORECASE if fold else 0)) is not None


def _holds(operator: str, actual: Any, wanted: Any) -> bool:
    if operator == "IS NULL":
        return actual is None
    if operator == "IS NOT NULL":
        return actual is not None
    if actual is None:
        return False
    tests: dict[str, Callable[[], bool]] = {
        "=": lambda: bool(actual == wanted),
        "!=": lambda: bool(actual != wanted),
        "LIKE": lambda: _like(wanted, actual, False),
        "ILIKE": lambda: _like(wanted, actual, True),
        "NOT LIKE": lambda: not _like(wanted, actual, False),
        "CONTAINS": lambda: wanted.casefold() in actual.casefold(),
        "IN": lambda: actual in wanted,
        "NOT IN": lambda: actual not in wanted,
        ">": lambda: bool(actual > wanted),
        "<=": lambda: bool(actual <= wanted),
    }
    return tests[operator]()


def _evaluate(node: Any, trace: Any, span: Any) -> bool:
    """What a filter says of a trace, if its conditions on spans are about this span (None: about no span)."""
    kind = node[0]
    if kind == "not":
        return not any(_evaluate(node[1], trace, one) for one in [None, *trace["spans"]])
    if kind in ("and", "or"):
        return (all if kind == "and" else any)([_evaluate(item, trace, span) for item in node[1]])
    _, _, table, key, operator, wanted = node
    if table == "span":
        return span is not None and _holds(operator, span[key], wanted)
    actual = trace[key] if table is None else trace[table].get(key)
    return _holds(operator, actual, wanted)


def _leaf(draw: st.DrawFn) -> Any:
    if draw(st.integers(0, 4)) == 0:
        operator = draw(st.sampled_from(["=", "!=", ">", "<="]))
        limit = draw(st.integers(0, 4))
        return "leaf", f"duration {operator} {limit}ms", None, "ms", operator, limit
    field, table, key = draw(st.sampled_from(_LEAVES))
    operator = draw(
        st.sampled_from(
            ["=", "!=", "LIKE", "ILIKE", "NOT LIKE", "CONTAINS", "IN", "NOT IN", "IS NULL", "IS NOT NULL"]
        )
    )
    if operator.startswith("IS"):
        return "leaf", f"{field} {operator}", table, key, operator, None
    if operator.endswith("IN"):
        wanted = draw(st.lists(st.sampled_from(_WORDS), min_size=1, max_size=3))
        listed = ", ".join(f"'{word}'" for word in wanted)
        return "leaf", f"{field} {operator} ({listed})", table, key, operator, wanted
    word = draw(st.sampled_from([*_WORDS, "%a%", "_"]))
    return "leaf", f"{field} {operator} '{word}'", table, key, operator, word


@st.composite
def _node(draw: st.DrawFn, depth: int = 3) -> Any:
    choice = draw(st.integers(0, 5)) if depth else 0
    if choice <= 2:
        return _leaf(draw)
    if choice == 3:
        return "not", draw(_node(depth - 1))
    items = [draw(_node(depth - 1)) for _ in range(draw(st.integers(2, 3)))]
    return "and" if choice == 4 else "or", items


def _written(node: Any) -> str:
    if node[0] == "leaf":
        return str(node[1])
    if node[0] == "not":
        return f"NOT ({_written(node[1])})"
    return f" {node[0].upper()} ".join(f"({_written(item)})" for item in node[1])


_WORD = st.sampled_from(_WORDS)
_SPAN = st.fixed_dictionaries({"name": _WORD, "span_type": _WORD})
_TRACE = st.fixed_dictionaries(
    {
        "session_id": st.none() | _WORD,
        "ms": st.none() | st.integers(0, 4),
        "tags": st.dictionaries(st.just("k"), _WORD),
        "metadata": st.dictionaries(st.sampled_from(["d.k", "app_version"]), _WORD),
        "spans": st.lists(_SPAN, max_size=2),
    }
)


@given(st.lists(_TRACE, min_size=1, max_size=6), st.lists(_node(), min_size=1, max_size=8))
def test_generated_filters(traces: list[Row], nodes: list[Any]) -> None:
    """Any valid filter finds exactly the traces that an evaluation in Python finds."""
    with open_store("memory:") as store:
        written = []
        for number, trace in enumerate(traces, 1):
            trace["name"] = f"{_WORDS[number % len(_WORDS)]}"
            row = make_trace(number, name=trace["name"], session_id=trace["session_id"], tags=trace["tags"],
                             metadata=trace["metadata"], duration_ns=None if trace["ms"] is None
                             else trace["ms"] * MS + 999_999)  # fmt: skip
            spans = [dict(span, span_id=f"{index:016x}") for index, span in enumerate(trace["spans"], 1)]
            written.append((row, spans))
        store.write(
            [row for row, _ in written],
            [make_span(row.trace_id, **span) for row, spans in written for span in spans],
        )
        for node in nodes:
            text = _written(node)
            expected = {
                row.trace_id
                for (row, _), trace in zip(written, traces, strict=True)
                if any(_evaluate(node, trace, span) for span in [None, *trace["spans"]])
            }
            where = compile_filter(text)
            rows = store.read(f"SELECT t.trace_id FROM traces AS t WHERE {where.sql}", where.params)
            assert {trace_id for (trace_id,) in rows} == expected, text
            assert {trace.row.trace_id for trace in store.search(text).traces} == expected, text


def test_lark_is_imported_on_first_use() -> None:
    """The parser library is loaded by the first filter, not by the store."""
    code = (
        "import sys, tracemw.store.filter as f; assert 'lark' not in sys.modules;"
        "f.compile_filter(\"status = 'OK'\"); assert 'lark' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_json_of_the_sample() -> None:
    """The sample's spans hold JSON, as the encoder writes it."""
    for span in sample_rows()[1]:
        assert isinstance(json.loads(span.attributes), dict)
