"""Tables, indexes and migrations of the store's file.

**Order.** `traces.start_key` is `start_ns`, nudged by a few nanoseconds within its millisecond where another trace
started in the very same one, so that it is unique: newest first is `ORDER BY t.start_key DESC`, and a filter on
milliseconds is a range of `t.start_key` (which an index covers, unlike `start_ns`).

**Filters.** A filter is compiled to `Where(sql, params, match)`: `sql` over `traces AS t` (spans through EXISTS on
`spans AS s`, `s.trace = t.id`) is the whole truth and never needs the token index; `match` is None or an FTS5
expression which every trace that satisfies `sql` also satisfies, a shortcut to the candidates: words of
`tokens.py` or `words.py`, joined by `AND`, `OR` and parentheses, never `NOT`. The columns of `PROMOTED` equal
their metadata key.

**Orders.** An order is compiled to `Order(terms)`: pairs of SQL over `t` and whether it is descending. The store
appends `start_key` as the last term; no terms are newest first.
"""

from __future__ import annotations

import sqlite3

from tracemw.errors import StoreError

from . import arrivals, layout, migrations, reindex, tokens
from .connections import transaction
from .match import register_functions

VERSION = 3
APPLICATION = 0x74726D77  # "trmw" in the file's header


def prepare(connection: sqlite3.Connection, name: str, writable: bool) -> None:
    """Make a new connection ready: its settings, and the file's tables where they are missing or old.

    Args:
        name: What messages call the file.

    Raises:
        StoreError: The file is of a newer version, of another program, or too old and must not be written.
    """
    register_functions(connection)
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA temp_store=MEMORY")
    connection.execute("PRAGMA cache_size=-16000")
    connection.execute("PRAGMA journal_size_limit=67108864")
    with transaction(connection, "DEFERRED"):  # one state of the file: another process may be making the tables
        version = _version(connection, name)
    if version < VERSION:
        if not writable:
            raise StoreError(f"{name} was made by an older tracemw: open it once where it may be written")
        _migrate(connection, name)
    if writable:
        _index_tokens(connection)
        arrivals.prepare(connection)
    if 0 < version < VERSION:
        reindex.begin(connection)


def _version(connection: sqlite3.Connection, name: str) -> int:
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version > VERSION:
        raise StoreError(
            f"{name} was made by a newer tracemw (layout {version}, this one knows {VERSION}): "
            "update tracemw, or choose another path"
        )
    ours = connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION
    empty = not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if not ours and not (empty and version == 0):
        raise StoreError(f"{name} is a database of another program: choose another path for the store")
    return version


def _migrate(connection: sqlite3.Connection, name: str) -> None:
    """Bring the file to the present layout, in one transaction; another process may be doing the same."""
    connection.execute("PRAGMA auto_vacuum=INCREMENTAL")  # counts only before the first table
    connection.execute("PRAGMA journal_mode=WAL").fetchone()  # for good
    with transaction(connection):
        version = _version(connection, name)
        if version == VERSION:
            return
        if version == 0:
            layout.create(connection)
        else:
            migrations.upgrade(connection, version)
        connection.execute(f"PRAGMA application_id={APPLICATION}")
        connection.execute(f"PRAGMA user_version={VERSION}")


def _index_tokens(connection: sqlite3.Connection) -> None:
    """Make the token index where it is missing, or was not kept up by a process whose SQLite has no FTS5."""
    if tokens.current(connection) or not tokens.supported():
        return
    with transaction(connection):
        if not tokens.current(connection):
            tokens.rebuild(connection)
