"""The tables of the present layout."""

from __future__ import annotations

import sqlite3

TRACES = """
CREATE TABLE traces (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    trace_id TEXT NOT NULL UNIQUE,
    start_key INTEGER NOT NULL,
    root_span_id TEXT,
    has_parent INTEGER NOT NULL,
    name TEXT NOT NULL,
    start_ns INTEGER NOT NULL,
    duration_ns INTEGER,
    state TEXT NOT NULL,
    outcome TEXT,
    method TEXT,
    route TEXT,
    status_code INTEGER,
    client_request_id TEXT,
    session_id TEXT,
    user_id TEXT,
    environment TEXT,
    version TEXT,
    deployment TEXT,
    region TEXT,
    request_preview TEXT,
    response_preview TEXT,
    metadata TEXT NOT NULL,
    tags TEXT NOT NULL,
    words TEXT NOT NULL,
    other_error INTEGER NOT NULL,
    revision INTEGER NOT NULL
);
"""
# Covers what `compare` counts by. No other column has an index: the token index finds them.
TRACES_BY_TIME = """
CREATE INDEX traces_by_time ON traces (
    start_key, state, duration_ns, version, region, deployment, environment, route
);
"""
# Traces with the words of layout 2 (`key=value`, no mark), which a process of an older version may still write
# or add to others.
OLD_WORDS = "(instr(words, '|') = 0 OR instr(words, '=') > 0)"
TRACES_BY_OLD_WORDS = f"CREATE INDEX traces_by_old_words ON traces (start_key) WHERE {OLD_WORDS};"
SPANS = """
CREATE TABLE spans (
    id INTEGER PRIMARY KEY,
    trace INTEGER NOT NULL REFERENCES traces (id),
    span_id TEXT NOT NULL,
    parent_id TEXT,
    name TEXT NOT NULL,
    span_type TEXT,
    kind TEXT NOT NULL,
    start_ns INTEGER NOT NULL,
    end_ns INTEGER NOT NULL,
    status TEXT NOT NULL,
    status_message TEXT,
    attributes TEXT NOT NULL,
    events TEXT NOT NULL,
    links TEXT NOT NULL,
    scope TEXT,
    UNIQUE (trace, span_id)
);
"""
OUTBOX = """
CREATE TABLE outbox (
    trace INTEGER PRIMARY KEY REFERENCES traces (id),
    attempts INTEGER NOT NULL,
    due_ns INTEGER NOT NULL,
    reason TEXT,
    dead INTEGER NOT NULL
);
"""
LEASE = """
CREATE TABLE lease (
    name TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    expires_ns INTEGER NOT NULL
);
"""
FACTS = """
CREATE TABLE facts (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
);
"""


def create(connection: sqlite3.Connection) -> None:
    """Make all tables in an empty file."""
    run(connection, TRACES + TRACES_BY_TIME + TRACES_BY_OLD_WORDS + SPANS + OUTBOX + LEASE + FACTS)


def run(connection: sqlite3.Connection, script: str) -> None:
    """Execute statements without the commit that `executescript` begins with."""
    for statement in script.split(";"):
        if statement.strip():
            connection.execute(statement)
