"""The token index: which words a trace has, so that a filter finds its candidates without reading rows.

With FTS5, the contentless table `tokens` has one document per trace. Its rowid is the trace's `start_key`, so
walking its hits by rowid is walking them in order of time, whatever the share of the traces that match. A document
is made of whole `key=value` words:

| kind | key | value |
|---|---|---|
| `m` | key of the metadata | its text |
| `t` | key of a tag | its text |
| `c` | one of `SHARED` and `OWN` | the column's text; `str()` of a number |

Besides, it has the short words of `words.py`, for its spans and for what would be too long here.

FTS5 folds the case of ASCII letters, so a capital is written as `^` and the small letter: words are exact, and no
other character of FTS5's query language is left in them. Keys and values over 200 characters become a hash.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from . import bulk, layout
from .codec import TRACE_FIELDS, of_latest, trace_row
from .rows import TraceRow
from .words import of_trace, outdated

if TYPE_CHECKING:
    from .filter import Where

SHARED = ("name", "state", "outcome", "method", "route", "status_code")  # many traces have the same in all of them
OWN = ("client_request_id", "session_id", "user_id")
_shared, _own = attrgetter(*SHARED), attrgetter(*OWN)
MAX_TEXT = 200  # characters of a key or value that are written out

TABLE = """
CREATE VIRTUAL TABLE tokens USING fts5(
    words, content='', detail=none, columnsize=0, tokenize="ascii tokenchars '._-/:=^%#'"
)
"""

_CURRENT = "SELECT 1 FROM facts WHERE name = 'tokens' AND value = 'current'"
_OLD = f"SELECT 1 FROM traces WHERE {layout.OLD_WORDS} LIMIT 1"
_AS_IT_IS = re.compile(r"[a-z0-9._/:-]*").fullmatch
_PLAIN = "abcdefghijklmnopqrstuvwxyz0123456789._-/:"
_ESCAPES = {code: f"%{code:02x}" for code in range(128) if chr(code) not in _PLAIN} | {
    code: "^" + chr(code).lower() for code in range(ord("A"), ord("Z") + 1)
}


def _escaped(text: str) -> str:
    if len(text) > MAX_TEXT:
        return "#" + hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()
    return text if _AS_IT_IS(text) else text.translate(_ESCAPES)


def token(kind: str, key: str, value: str) -> str:
    """Return the word of one `key=value`.

    Args:
        kind: `m` metadata, `t` tag, `c` column.

    Returns:
        Small letters, digits, `._-/:=^%#` and characters beyond ASCII: one word for FTS5, a different one for
        any other three arguments.
    """
    return f"{kind}{_escaped(key)}={_escaped(value)}"


@of_latest
def _of_metadata(pairs: dict[str, str]) -> str:
    return _before([token("m", key, value) for key, value in pairs.items()])


@of_latest
def _of_tags(pairs: dict[str, str]) -> str:
    return _before([token("t", key, value) for key, value in pairs.items()])


@lru_cache(maxsize=1024, typed=True)
def _of_columns(*values: str | int | None) -> str:
    told = zip(SHARED, values, strict=True)
    return _before([token("c", key, str(value)) for key, value in told if value is not None])


_OWN_WORDS = tuple(token("c", key, "") for key in OWN)  # up to their values


def _of_caller(values: tuple[str | None, ...]) -> str:
    told = zip(_OWN_WORDS, values, strict=True)
    return _before([f"{word}{_escaped(value)}" for word, value in told if value is not None])


def _before(words: list[str]) -> str:
    """Return words as they stand before others."""
    return "".join([f"{word} " for word in words])


def document(row: TraceRow, words: str) -> str:
    """Return the document of a trace, no word twice: a function of its row alone, as FTS5 removes it by its words.

    Args:
        words: Those of its spans, as they are kept with it. Layout 2 had other ones, and none of `words.of_trace`;
            a process of that version, which adds its own to those of layout 3, indexes no others, either.
    """
    of_spans = words.replace("|", " ").split(" ")
    if outdated(words):
        return " ".join(dict.fromkeys([*_of_facts(row).split(" "), *of_spans]))
    return document_with(row, of_spans)


def document_with(row: TraceRow, *of_spans: Iterable[str]) -> str:
    """Return the document of a trace and the words of its spans."""
    # A word with `=` comes once: it has its kind, and a key comes once. Only the short ones have none.
    return f"{_of_facts(row)}{' '.join(dict.fromkeys(chain(of_trace(row), *of_spans)))}"


def _of_facts(row: TraceRow) -> str:
    of_pairs = f"{_of_metadata(row.metadata)}{_of_tags(row.tags)}"
    return f"{of_pairs}{_of_columns(*_shared(row))}{_of_caller(_own(row))}"


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
    return connection.execute(_CURRENT).fetchone() is not None


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


def change(
    connection: sqlite3.Connection, documents: Iterable[tuple[tuple[int, str] | None, tuple[int, str]]]
) -> None:
    """Put documents in the place of others of the same traces (None: there is none), each with its key.

    Only the words that differ are touched. FTS5 counts documents and words, and calls a file damaged of which more
    went than came: so something comes wherever words go. A word that came twice would come back after it went.
    """
    removed, added = [], []
    for old, new in documents:
        if old is not None and old[0] == new[0]:
            if old[1] == new[1]:
                continue
            before, after = (dict.fromkeys(text.split(" ")) for _, text in (old, new))
            gone = " ".join(word for word in before if word not in after)
            come = " ".join(word for word in after if word not in before)
            if gone:
                removed.append((old[0], gone))
            if gone or come:
                added.append((new[0], come))
        else:
            if old is not None:
                removed.append(old)
            added.append(new)
    remove(connection, sorted(removed))
    add(connection, sorted(added))


def expression(read: Callable[[str], Sequence[Any]], where: Where) -> str | None:
    """Return the expression by which the index finds the candidates of a filter; None where it cannot.

    Args:
        read: Returns the rows of a query.
    """
    if where.match is None or not supported() or not read(_CURRENT):
        return None
    return where.plain if where.plain != where.match and read(_OLD) else where.match


def add(connection: sqlite3.Connection, documents: Iterable[tuple[int, str]]) -> None:
    """Index documents, in order of their keys: FTS5 begins a new segment wherever a key is lower than the last."""
    bulk.insert(connection, "INSERT INTO tokens (rowid, words) VALUES", "(?, ?)", documents)


def remove(connection: sqlite3.Connection, documents: Iterable[tuple[int, str]]) -> None:
    """Take documents out again, by the very words that were indexed; in order of their keys."""
    head = "INSERT INTO tokens (tokens, rowid, words) VALUES"
    bulk.insert(connection, head, "('delete', ?, ?)", documents)
