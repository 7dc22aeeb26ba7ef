"""The token index: which words a trace has, so that a filter finds its candidates without reading rows.

With FTS5, the contentless table `tokens` has one document per trace. Its rowid is the trace's `start_key`, so
walking its hits by rowid is walking them in order of time, whatever the share of the traces that match. A document
is made of whole `key=value` words:

| kind | key | value |
|---|---|---|
| `m` | key of the metadata | its text |
| `t` | key of a tag | its text |
| `c` | one of `COLUMNS` (`state`, `route`, `session_id` ...) | the column's text; `str()` of a number |
| `s` | `name` | name of any span of the trace |
| `y` | `type` | type of any span of the trace |

FTS5 folds the case of ASCII letters, so a capital is written as `^` and the small letter: words are exact, and no
other character of FTS5's query language is left in them. Keys and values over 200 characters become a hash.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable
from functools import lru_cache

from . import bulk
from .codec import TRACE_FIELDS, trace_row
from .rows import TraceRow

COLUMNS = (
    "name", "state", "outcome", "method", "route", "status_code", "client_request_id", "session_id", "user_id"
)  # fmt: skip
MAX_WORDS = 64  # words for the names and types of one trace's spans; more are replaced by `token("s", "more", "")`
MAX_TEXT = 200  # characters of a key or value that are written out

TABLE = """
CREATE VIRTUAL TABLE tokens USING fts5(
    words, content='', detail=none, columnsize=0, tokenize="ascii tokenchars '._-/:=^%#'"
)
"""

_PLAIN = "abcdefghijklmnopqrstuvwxyz0123456789._-/:"
_ESCAPES = {code: f"%{code:02x}" for code in range(128) if chr(code) not in _PLAIN} | {
    code: "^" + chr(code).lower() for code in range(ord("A"), ord("Z") + 1)
}


@lru_cache(maxsize=8192)
def token(kind: str, key: str, value: str) -> str:
    """Return the word of one `key=value`.

    Args:
        kind: `m` metadata, `t` tag, `c` column, `s` span name, `y` span type.

    Returns:
        Small letters, digits, `._-/:=^%#` and characters beyond ASCII: one word for FTS5, a different one for
        any other three arguments.
    """
    return f"{kind}{_escaped(key)}={_escaped(value)}"


def quoted(kind: str, key: str, value: str) -> str:
    """Return the same word, quoted for an FTS5 expression."""
    return f'"{token(kind, key, value)}"'


def span_words(kind: str, key: str, value: str) -> str:
    """Return an FTS5 expression for a span's name (`s`, `name`) or type (`y`, `type`)."""
    return f"({quoted(kind, key, value)} OR {quoted('s', 'more', '')})"


def document(row: TraceRow, words: str) -> str:
    """Return the document of a trace: a function of its row alone, since FTS5 removes it by its words.

    Args:
        words: Those of its spans, separated by spaces (see `with_spans`).
    """
    parts = [token("m", key, value) for key, value in row.metadata.items()]
    parts += [token("t", key, value) for key, value in row.tags.items()]
    for column in COLUMNS:
        value = getattr(row, column)
        if value is not None:
            parts.append(token("c", column, str(value)))
    if words:
        parts.append(words)
    return " ".join(parts)


def with_spans(words: str, spans: Iterable[tuple[str, str | None]]) -> str:
    """Return a trace's span words with those of more spans (name, type) added."""
    found = dict.fromkeys(words.split(" ")) if words else {}
    more = token("s", "more", "")
    if more in found:
        return words
    for name, kind in spans:
        found[token("s", "name", name)] = None
        if kind is not None:
            found[token("y", "type", kind)] = None
    if len(found) > MAX_WORDS:
        found = dict.fromkeys([*found][:MAX_WORDS] + [more])
    return " ".join(found)


@lru_cache(maxsize=1)
def supported() -> bool:
    """True where Python's SQLite has FTS5."""
    connection = sqlite3.connect(":memory:")
    try:
        connection.execute("CREATE VIRTUAL TABLE probe USING fts5(words)")
    except sqlite3.OperationalError:
        return False
    finally:
        connection.close()
    return True


def current(connection: sqlite3.Connection) -> bool:
    """True where the index has every trace of the file, and this process can use it."""
    if not supported():
        return False
    found = connection.execute("SELECT 1 FROM facts WHERE name = 'tokens' AND value = 'current'").fetchone()
    return found is not None


def outdate(connection: sqlite3.Connection) -> None:
    """Say that the index lacks traces: they were written without FTS5."""
    connection.execute("UPDATE facts SET value = 'outdated' WHERE name = 'tokens' AND value = 'current'")


def rebuild(connection: sqlite3.Connection) -> None:
    """Make the index anew from the rows, in the transaction of the caller."""
    connection.execute("DROP TABLE IF EXISTS tokens")
    connection.execute(TABLE)
    fields = ", ".join(TRACE_FIELDS)
    rows = connection.execute(f"SELECT start_key, words, {fields} FROM traces ORDER BY start_key")
    add(connection, ((key, document(trace_row(values), words)) for key, words, *values in rows))
    connection.execute("INSERT OR REPLACE INTO facts VALUES ('tokens', 'current')")


def add(connection: sqlite3.Connection, documents: Iterable[tuple[int, str]]) -> None:
    """Index documents, in order of their keys: FTS5 begins a new segment wherever a key is lower than the last."""
    bulk.insert(connection, "INSERT INTO tokens (rowid, words) VALUES", "(?, ?)", documents)


def remove(connection: sqlite3.Connection, documents: Iterable[tuple[int, str]]) -> None:
    """Take documents out again, by the very words that were indexed; in order of their keys."""
    head = "INSERT INTO tokens (tokens, rowid, words) VALUES"
    bulk.insert(connection, head, "('delete', ?, ?)", documents)


def _escaped(text: str) -> str:
    if len(text) > MAX_TEXT:
        return "#" + hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()
    return text.translate(_ESCAPES)
