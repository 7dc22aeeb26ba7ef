"""Tables, indexes and migrations of the store's file.

**Order.** `traces.start_key` is `start_ns`, nudged by a few nanoseconds within its millisecond where another trace
started in the very same one, so that it is unique: newest first is `ORDER BY t.start_key DESC`, and a time filter on
milliseconds is a range of `t.start_key` (covered by an index, unlike `start_ns`).

**Tokens.** With FTS5, the contentless table `tokens` has one document per trace; its rowid is the trace's `start_key`,
so walking its hits by rowid is walking them in order of time, whatever the share of the traces that match. It holds
whole `key=value` words, made by `token(kind, key, value)`:

| kind | key | value |
|---|---|---|
| `m` | key of the metadata | its text |
| `t` | key of a tag | its text |
| `c` | one of `TOKEN_COLUMNS` (`state`, `route`, `session_id` ...) | the column's text; `str()` of a number |
| `s` | `name` | name of any span of the trace |
| `y` | `type` | type of any span of the trace |

FTS5 folds the case of ASCII letters, so `token` writes a capital as `^` and the small letter: words are exact, and no
other character of FTS5's query language is left in them. Keys and values over 200 characters are replaced by a hash.

A filter is compiled to `Where(sql, params, match)`: `sql` over `traces AS t` (spans through EXISTS on `spans AS s`) is
the whole truth and never needs `tokens`; `match` is None or an FTS5 expression which every trace that satisfies `sql`
also satisfies, a shortcut to the candidates made of `quoted(kind, key, value)` words joined by `AND`, `OR` and
parentheses (no NOT). A trace with more than `MAX_WORDS` span words gets the word `token("s", "more", "")` instead of the
rest: an expression for a span's name or type is `span_words(kind, key, value)`. Metadata and tags in `sql`:
`json_extract(t.metadata, '$."key"')`; for keys with a quote, backslash or control character `json_value(t.metadata, key)`,
a function which every connection of the store has. The promoted columns of `PROMOTED` equal their metadata key.

An order is compiled to `Order(terms)`: pairs of SQL over `t` and whether it is descending. The store appends
`start_key` as the last term; an empty list is newest first.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

VERSION = 1

PROMOTED = {"environment": "environment", "app_version": "version", "deployment_id": "deployment", "region": "region"}
"""Metadata key -> column of `traces` that repeats it."""

TOKEN_COLUMNS = (
    "name", "state", "outcome", "method", "route", "status_code", "client_request_id", "session_id", "user_id"
)  # fmt: skip
MAX_WORDS = 64
MAX_VALUE = 200

_PLAIN = "abcdefghijklmnopqrstuvwxyz0123456789._-/:"
_ESCAPES = {code: f"%{code:02x}" for code in range(128) if chr(code) not in _PLAIN} | {
    code: "^" + chr(code).lower() for code in range(ord("A"), ord("Z") + 1)
}

# Contentless, without positions or sizes: 1-2 % of the file. A document can only be removed by giving its words again.
_TOKENS = """
CREATE VIRTUAL TABLE tokens USING fts5(
    words, content='', detail=none, columnsize=0, tokenize="ascii tokenchars '._-/:=^%#'"
)
"""

_TABLES = """
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
CREATE INDEX traces_by_time ON traces (
    start_key, state, duration_ns, version, region, deployment, environment, route
);
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
CREATE TABLE outbox (
    trace INTEGER PRIMARY KEY REFERENCES traces (id),
    attempts INTEGER NOT NULL,
    due_ns INTEGER NOT NULL,
    reason TEXT,
    dead INTEGER NOT NULL
);
CREATE TABLE lease (
    name TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    expires_ns INTEGER NOT NULL
);
"""


@lru_cache(maxsize=4096)
def token(kind: str, key: str, value: str) -> str:
    """The word of one `key=value` in the token index (see the module's text).

    Args:
        kind: `m` metadata, `t` tag, `c` column, `s` span name, `y` span type.

    Returns:
        Small ASCII letters, digits, `._-/:=^%` and characters beyond ASCII: one word for FTS5, different for any
        two different triples.
    """
    return f"{kind}{_escape(key)}={_escape(value)}"


def quoted(kind: str, key: str, value: str) -> str:
    """The same word, quoted for an FTS5 expression."""
    return f'"{token(kind, key, value)}"'


def span_words(kind: str, key: str, value: str) -> str:
    """An FTS5 expression for a span's name (`s`, `name`) or type (`y`, `type`)."""
    return f"({quoted(kind, key, value)} OR {quoted('s', 'more', '')})"


def _escape(text: str) -> str:
    if len(text) > MAX_VALUE:
        return "#" + hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()
    return text.translate(_ESCAPES)
