"""The store at scale: how fast rows go in, and how long the questions people ask take.

    python benchmarks/store.py                       300,000 traces, 1,000,000 spans
    python benchmarks/store.py --traces 30000        a tenth of it
    python benchmarks/store.py --keep /tmp/b.db      use the file again if it is there

Each question is asked of the store, and of plain SQLite tables with the same rows and an index on the start:
machines differ, the ratio does not. Times are medians, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any

from tracemw.store import SpanRow, Store, TraceRow, open_store

SECOND = 1_000_000_000
END = 1_750_000_000 * SECOND
ROUTES = [
    f"/api/{name}/{{id}}" for name in ("users", "orders", "items", "chat", "search", "cart", "pay", "health")
]
STEPS = ["retrieve", "embed", "rerank", "generate", "db.query", "cache.get", "http.get"]
TYPES = ["RETRIEVER", "EMBEDDING", "RERANKER", "LLM", "TOOL", None]
NEEDLE = {"needle": "1", "mlflow.linkedPrompts": '[{"name": "qa", "version": "3"}]'}
TEXT = "the quick brown fox jumps over the lazy dog and asks the model a question about its order number ".split()

Batch = tuple[list[TraceRow], list[SpanRow]]


def batches(traces: int, size: int) -> Iterator[Batch]:
    """Yield realistic rows, about `size` spans at a time; 10 spans for every 3 traces."""
    random.seed(7)
    step = 7 * 24 * 3600 * SECOND // traces
    rows: list[TraceRow] = []
    spans: list[SpanRow] = []
    for number in range(traces):
        row, below = trace(number, END - (traces - number) * step + random.randrange(step))
        rows.append(row)
        spans.extend(below)
        if len(spans) >= size:
            yield rows, spans
            rows, spans = [], []
    yield rows, spans


def trace(number: int, start: int) -> tuple[TraceRow, list[SpanRow]]:
    """Return one trace and its spans."""
    trace_id, root_id = f"{random.getrandbits(128):032x}", f"{random.getrandbits(64):016x}"
    canary = random.random() < 0.1
    failed = random.random() < (0.05 if canary else 0.02)
    duration = int(random.lognormvariate(4, 1) * 1_000_000) * (2 if canary else 1)
    route = random.choice(ROUTES)
    question, answer = " ".join(random.choices(TEXT, k=12)), " ".join(random.choices(TEXT, k=25))
    row = TraceRow(
        trace_id, root_id, False, f"POST {route}", start, duration, "ERROR" if failed else "OK",
        "error" if failed else "completed", "POST", route, 500 if failed else 200, f"req-{number:08d}",
        f"s-{number // 7}", f"u-{random.randrange(5000)}", question, answer,
        {
            "app_version": "1.7.0" if canary else random.choice(["1.5.0", "1.6.0", "1.6.1"]),
            "region": random.choices(["eu", "us", "ap"], [4, 4, 2])[0],
            "environment": "production",
            "deployment_id": f"d-{random.randrange(20)}",
            "mlflow.source.type": "production",
            "mlflow.source.name": "shop",
            "mlflow.source.git.commit": "5f7a70a9" * 5,
            "flag.new_ranker": "on" if canary else "off",
        },
        {"team": random.choice(["search", "chat"])} | (NEEDLE if number % 1000 == 500 else {}),
    )  # fmt: skip
    count = 3 + (number % 3 == 0)
    spans = [span(trace_id, root_id, None, row.name, "SERVER", start, duration, failed, question, answer)]
    for index in range(1, count):
        begin, length = start + index * duration // count, duration // count
        spans.append(
            span(trace_id, f"{random.getrandbits(64):016x}", root_id, random.choice(STEPS), "INTERNAL", begin,
                 length, False, question, answer)
        )  # fmt: skip
    return row, spans


def span(
    trace_id: str, span_id: str, parent: str | None, name: str, kind: str, start: int, length: int, failed: bool,
    question: str, answer: str,
) -> SpanRow:  # fmt: skip
    """Return one span of about half a kilobyte."""
    kind_of_step = random.choice(TYPES)
    attributes = {
        "mlflow.spanType": json.dumps(kind_of_step or "UNKNOWN"),
        "mlflow.spanInputs": json.dumps({"question": question, "k": 4}),
        "mlflow.spanOutputs": json.dumps({"answer": answer}),
        "model": "local",
        "tokens": len(answer),
        "temperature": random.choice([0, 0.2, 0.7]),
        "cached": random.random() < 0.5,
    } | ({"needle": 1, "shard": "s-7"} if random.random() < 0.0003 else {})
    return SpanRow(
        trace_id, span_id, parent, name, kind_of_step, kind, start, start + length, "ERROR" if failed else "UNSET",
        "it failed" if failed else None, json.dumps(attributes), "[]", "[]", "tracemw",
    )  # fmt: skip


# The yardstick: the same rows in plain tables.


class Plain:
    """Plain SQLite: the rows as they are, and an index on the start."""

    def __init__(self, path: str) -> None:
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.connection.execute("PRAGMA journal_mode=WAL")
        self.connection.execute("PRAGMA synchronous=NORMAL")
        self.connection.execute("PRAGMA cache_size=-16000")
        names = [field.name for field in fields(TraceRow)]
        self.connection.execute(f"CREATE TABLE IF NOT EXISTS traces ({', '.join(names)})")
        names = [field.name for field in fields(SpanRow)]
        self.connection.execute(f"CREATE TABLE IF NOT EXISTS spans ({', '.join(names)})")
        self.connection.execute("CREATE INDEX IF NOT EXISTS by_start ON traces (start_ns)")

    def write(self, traces: list[TraceRow], spans: list[SpanRow]) -> None:
        """Insert rows in one transaction."""
        self.connection.execute("BEGIN IMMEDIATE")
        rows = [(*astuple_of(row), json.dumps(row.metadata), json.dumps(row.tags)) for row in traces]
        self.connection.executemany(f"INSERT INTO traces VALUES ({', '.join('?' * 18)})", rows)
        values = [tuple(getattr(row, name) for name in SPAN_NAMES) for row in spans]
        self.connection.executemany(f"INSERT INTO spans VALUES ({', '.join('?' * 14)})", values)
        self.connection.execute("COMMIT")

    def search(self, condition: str) -> int:
        """Read the latest 50 rows that meet a condition."""
        sql = f"SELECT * FROM traces WHERE {condition} ORDER BY start_ns DESC LIMIT 50"
        return len(self.connection.execute(sql).fetchall())

    def groups(self, since: int) -> int:
        """Read what a comparison by version needs."""
        sql = "SELECT json_extract(metadata, '$.app_version'), state, duration_ns FROM traces WHERE start_ns >= ?"
        return len(self.connection.execute(sql, (since,)).fetchall())


TRACE_NAMES = [field.name for field in fields(TraceRow)][:16]
SPAN_NAMES = [field.name for field in fields(SpanRow)]


def astuple_of(row: TraceRow) -> tuple[Any, ...]:
    """Return a trace's plain columns (`dataclasses.astuple` copies deeply and would be what is measured)."""
    return tuple(getattr(row, name) for name in TRACE_NAMES)


def ingest(write: Callable[[list[TraceRow], list[SpanRow]], None], traces: int, size: int) -> tuple[float, float]:
    """Write all rows; return spans per second of the writing alone, and the longest write in seconds."""
    spent = longest = 0.0
    spans = 0
    for rows, below in batches(traces, size):
        began = time.perf_counter()
        write(rows, below)
        took = time.perf_counter() - began
        spent, longest, spans = spent + took, max(longest, took), spans + len(below)
    return spans / spent, longest


def median(action: Callable[[], Any], repeats: int = 15) -> float:
    """Return the median time of an action in milliseconds, after one call that does not count."""
    action()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
        if sum(times) > 3:
            break
    return statistics.median(times) * 1000


def key(name: str) -> str:
    """Return the plain SQL of a key of the metadata."""
    return f"json_extract(metadata, '$.\"{name}\"')"


def of_spans(condition: str) -> str:
    """Return the plain SQL for traces with a span that meets a condition."""
    return f"trace_id IN (SELECT trace_id FROM spans WHERE {condition})"


def attribute(name: str, value: str) -> str:
    """Return the plain SQL for traces with a span that has an attribute."""
    return of_spans(f"json_extract(attributes, '$.{name}') = {value}")


PROMPT = "json_extract(tags, '$.\"mlflow.linkedPrompts\"')"
WHOLE = "start_ns / 1000000 + duration_ns / 1000000"
QUESTIONS: list[tuple[str, str | None, str, float | None]] = [
    ("latest 50", None, "1", 5),
    ("two keys and state", "metadata.region = 'eu' AND metadata.app_version = '1.7.0' AND state = 'ERROR'",
     f"{key('region')} = 'eu' AND {key('app_version')} = '1.7.0' AND state = 'ERROR'", 5),
    ("two unplanned keys and state",
     "metadata.`flag.new_ranker` = 'on' AND metadata.`mlflow.source.type` = 'production' AND state = 'ERROR'",
     f"{key('flag.new_ranker')} = 'on' AND {key('mlflow.source.type')} = 'production' AND state = 'ERROR'", 5),
    ("region (40 %)", "metadata.region = 'eu'", f"{key('region')} = 'eu'", 5),
    ("version (10 %)", "metadata.app_version = '1.7.0'", f"{key('app_version')} = '1.7.0'", 5),
    ("unplanned key (10 %)", "metadata.`flag.new_ranker` = 'on'", f"{key('flag.new_ranker')} = 'on'", 5),
    ("tag (0.1 %)", "tags.needle = '1'", "json_extract(tags, '$.needle') = '1'", 5),
    ("state", "state = 'ERROR'", "state = 'ERROR'", 5),
    ("route", "route = '/api/pay/{id}'", "route = '/api/pay/{id}'", 5),
    ("status code", "status_code = 500", "status_code = 500", 5),
    ("user", "user = 'u-77'", "user_id = 'u-77'", 5),
    ("session", "session = 's-77'", "session_id = 's-77'", 5),
    ("client request id", "client_request_id = 'req-00000777'", "client_request_id = 'req-00000777'", 5),
    ("name of a span", "span.name = 'rerank'",
     "trace_id IN (SELECT trace_id FROM spans WHERE name = 'rerank')", 5),
    ("type of a span", "span.type = 'LLM'", "trace_id IN (SELECT trace_id FROM spans WHERE span_type = 'LLM')", 5),
    ("absent value", "metadata.region = 'mars'", f"{key('region')} = 'mars'", 1),
    ("absent unplanned value", "metadata.colour = 'red'", f"{key('colour')} = 'red'", 1),
    ("absent user", "user = 'nobody'", "user_id = 'nobody'", 1),
    ("absent span name", "span.name = 'nothing'",
     "trace_id IN (SELECT trace_id FROM spans WHERE name = 'nothing')", 1),
    ("slower than 2 s", "execution_time > 2s", "duration_ns > 2000000000", None),
    ("last hour, one version", "timestamp > {hour} AND metadata.app_version = '1.7.0'",
     f"start_ns > {END - 3600 * SECOND} AND {key('app_version')} = '1.7.0'", None),
    ("attribute of a span", "span.attributes.model = 'local'", attribute("model", "'local'"), 5),
    ("attribute, a number", "span.attributes.tokens = 130", attribute("tokens", "130"), 5),
    ("attribute, a fraction", "span.attributes.temperature = 0.7", attribute("temperature", "0.7"), 5),
    ("attribute, true", "span.attributes.cached = 'true'", attribute("cached", "1"), 5),
    ("attribute (0.1 %)", "span.attributes.shard = 's-7'", attribute("shard", "'s-7'"), 5),
    ("attribute, a number (0.1 %)", "span.attributes.needle = 1", attribute("needle", "1"), 5),
    ("attribute, one of", "span.attributes.shard IN ('s-6', 's-7')", attribute("shard", "'s-7'"), 5),
    ("absent attribute", "span.attributes.model = 'remote'", attribute("model", "'remote'"), 1),
    ("absent attribute, a number", "span.attributes.tokens = 99999", attribute("tokens", "99999"), 1),
    ("absent attribute, a fraction", "span.attributes.temperature = 0.3", attribute("temperature", "0.3"), 1),
    ("absent attribute, true", "span.attributes.streamed = 'true'", attribute("streamed", "1"), 1),
    ("absent attribute, one of", "span.attributes.model IN ('a', 'b')", attribute("model", "'a'"), 1),
    ("status of a span, OK", "span.status = 'OK'", of_spans("status = 'UNSET'"), 5),
    ("status of a span, ERROR", "span.status = 'ERROR'", of_spans("status = 'ERROR'"), 5),
    ("absent status of a span", "span.status = 'UNSET'",
     of_spans("status = 'UNSET' AND instr(attributes, 'tracemw.outcome')"), 1),
    ("spans without a type", "span.type = 'UNKNOWN'", of_spans("span_type IS NULL"), 5),
    ("absent type of a span", "span.type = 'AGENT'", of_spans("span_type = 'AGENT'"), 1),
    ("duration of a span", "span.execution_time = 20", of_spans("(end_ns - start_ns) / 1000000 = 20"), 5),
    ("absent duration of a span", "span.execution_time = 99999999",
     of_spans("end_ns - start_ns >= 99999999000000"), 1),
    ("duration", "execution_time = 55", "duration_ns / 1000000 = 55", 5),
    ("absent duration", "execution_time = 99999999", "duration_ns / 1000000 = 99999999", 1),
    ("end", "end_time = {end}", f"{WHOLE} = {{end}}", 5),
    ("absent end", "end_time = 5", f"{WHOLE} = 5", 1),
    ("request", "request = '{request}'", "request_preview = '{request}'", 5),
    ("absent request", "request = 'nothing'", "request_preview = 'nothing'", 1),
    ("response", "response = '{response}'", "response_preview = '{response}'", 5),
    ("absent response", "response = 'nothing'", "response_preview = 'nothing'", 1),
    ("prompt (0.1 %)", "prompt = 'qa/3'", f"{PROMPT} IS NOT NULL", 5),
    ("absent prompt", "prompt = 'qa/4'", f"{PROMPT} = 'nothing'", 1),
    # What no index answers: every trace or span is read, unless another condition narrows it (docs/searching.md).
    ("part of an attribute", "span.attributes.model LIKE 'remote%'", of_spans("attributes LIKE '%\"remote%'"),
     None),
    ("the same, last hour", "timestamp > {hour} AND span.attributes.model LIKE 'remote%'",
     f"start_ns > {END - 3600 * SECOND} AND " + of_spans("attributes LIKE '%\"remote%'"), None),
    ("the same, last day", "timestamp > {day} AND span.attributes.model LIKE 'remote%'",
     f"start_ns > {END - 24 * 3600 * SECOND} AND " + of_spans("attributes LIKE '%\"remote%'"), None),
    ("the same, one user", "user = 'u-77' AND span.attributes.model LIKE 'remote%'",
     "user_id = 'u-77' AND " + of_spans("attributes LIKE '%\"remote%'"), None),
    ("the same, failed", "status = 'ERROR' AND span.attributes.model LIKE 'remote%'",
     "state = 'ERROR' AND " + of_spans("attributes LIKE '%\"remote%'"), None),
    ("the same, one name", "span.name = 'rerank' AND span.attributes.model LIKE 'remote%'",
     of_spans("name = 'rerank' AND attributes LIKE '%\"remote%'"), None),
    ("slow spans", "span.execution_time > 99999999", of_spans("end_ns - start_ns > 99999999000000"), None),
    ("absent text", "text CONTAINS 'zzzz'", of_spans("attributes LIKE '%zzzz%'"), None),
    ("part of a request", "request LIKE 'nothing%'", "request_preview LIKE 'nothing%'", None),
    ("later end", "end_time > 9999999999999", f"{WHOLE} > 9999999999999", None),
    ("not, or, in", "NOT state = 'OK' AND (metadata.region IN ('eu', 'us') OR tags.team = 'chat')",
     f"state <> 'OK' AND ({key('region')} IN ('eu', 'us') OR json_extract(tags, '$.team') = 'chat')", None),
]  # fmt: skip


def ask(store: Store, plain: Plain) -> Iterator[tuple[str, float, float | None, float | None]]:
    """Yield each question with the store's time, the plain tables', and what the store's may be."""
    known = store.search("client_request_id = 'req-00000777'").traces[0].row
    values = {
        "{hour}": str((END - 3600 * SECOND) // 1_000_000),
        "{day}": str((END - 24 * 3600 * SECOND) // 1_000_000),
        "{end}": str(known.start_ns // 1_000_000 + (known.duration_ns or 0) // 1_000_000),
        "{request}": known.request_preview or "",
        "{response}": known.response_preview or "",
    }
    for name, text, condition, goal in QUESTIONS:
        filter_string = text
        for written, value in values.items():
            filter_string = filter_string and filter_string.replace(written, value)
            condition = condition.replace(written, value)
        found = len(store.search(filter_string, max_results=50, include_spans=False).traces)
        expected = plain.search(condition)
        if found != expected:
            raise SystemExit(f"{name}: the store finds {found} traces, plain SQLite {expected}")
        ours = median(partial(store.search, filter_string, max_results=50, include_spans=False))
        theirs = median(partial(plain.search, condition))
        yield f"{name} ({found})", ours, theirs, goal
    some = store.search(max_results=1).traces[0].row.trace_id
    ours = median(lambda: store.get(some))
    yield "one trace by id", ours, None, None
    ours = median(lambda: store.search(max_results=50))
    yield "latest 50 with spans", ours, None, None
    ours = median(lambda: store.search(order_by=["execution_time DESC"], max_results=50, include_spans=False))
    yield "slowest 50", ours, median(lambda: plain.search("1 ORDER BY duration_ns DESC LIMIT 50 --")), None
    tenth = END - 7 * 24 * 3600 * SECOND // 10
    for by in ("app_version", "flag.new_ranker", "route", "user"):
        ours = median(partial(store.compare, by, f"timestamp >= {tenth // 1_000_000}"), 5)
        yield f"compare the last tenth by {by}", ours, median(lambda: plain.groups(tenth), 5), 50
    ours = median(lambda: store.compare("app_version"), 3)
    yield "compare all by app_version", ours, median(lambda: plain.groups(0), 3), None


def main() -> None:
    """Fill both files, ask both, print the table; exit code 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=int, default=300_000)
    parser.add_argument("--batch", type=int, default=512, help="spans in one transaction")
    parser.add_argument("--keep", help="path of the store's file, kept for the next run")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.keep or os.path.join(folder, "store.db")
        there = os.path.exists(path)
        store, plain = open_store(f"sqlite:///{path}"), Plain(f"{path}.plain")
        report: dict[str, Any] = {}
        if not there:
            rate, longest = ingest(lambda rows, spans: store.write(rows, spans), options.traces, options.batch)
            raw, _ = ingest(plain.write, options.traces, options.batch)
            report["ingest"] = {"spans_per_s": rate, "plain_spans_per_s": raw, "ratio": rate / raw,
                                "longest_write_ms": longest * 1000}  # fmt: skip
        report["megabytes"] = {
            "store": os.path.getsize(path) / 1e6,
            "plain": os.path.getsize(f"{path}.plain") / 1e6,
        }
        report["questions"] = [
            {"question": name, "ms": ours, "plain_ms": theirs, "ratio": theirs and ours / theirs, "goal_ms": goal}
            for name, ours, theirs, goal in ask(store, plain)
        ]
        store.close()
        plain.connection.close()
    show(report, options.json)
    sys.exit(any(q["goal_ms"] and q["ms"] > q["goal_ms"] for q in report["questions"]))


def show(report: dict[str, Any], as_json: bool) -> None:
    """Print the report."""
    if as_json:
        print(json.dumps(report, indent=1))
        return
    for part in ("ingest", "megabytes"):
        if part in report:
            print(f"{part}: " + ", ".join(f"{name} {value:,.2f}" for name, value in report[part].items()))
    print(f"{'question (traces found)':44} {'store ms':>9} {'plain ms':>9} {'ratio':>7} {'goal':>5}")
    for q in report["questions"]:
        goal = "" if q["goal_ms"] is None else f"{q['goal_ms']:5g}" + (" MISSED" if q["ms"] > q["goal_ms"] else "")
        plain = "" if q["plain_ms"] is None else f"{q['plain_ms']:9.2f} {q['ratio']:7.3f}"
        print(f"{q['question']:44} {q['ms']:9.2f} {plain:17} {goal}")


if __name__ == "__main__":
    main()
