"""From older layouts of the file to the present one, in place, in the transaction of the caller."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

from . import layout
from .codec import TRACE_COLUMNS
from .keys import free_keys


def upgrade(connection: sqlite3.Connection, version: int) -> None:
    """Take the steps from a version of the layout to the present one."""
    for step in STEPS[version - 1 :]:
        step(connection)


def _from_first(connection: sqlite3.Connection) -> None:
    """1 to 2: the first layout had no unique key of time, no words, and gave numbers of deleted rows again."""
    _replace(connection, "traces", layout.TRACES, ("id", *TRACE_COLUMNS, "revision"), "start_ns, '', 0",
             ("start_key", "words", "other_error"))  # fmt: skip
    _replace(connection, "outbox", layout.OUTBOX, ("trace", "attempts", "due_ns", "reason", "dead"))
    layout.run(connection, layout.TRACES_BY_TIME + layout.FACTS)
    _separate_keys(connection)


def _from_second(connection: sqlite3.Connection) -> None:
    """2 to 3: traces have more words. They get them by and by: `reindex.py`."""
    layout.run(connection, layout.TRACES_BY_OLD_WORDS)


STEPS: tuple[Callable[[sqlite3.Connection], None], ...] = (_from_first, _from_second)


def _replace(
    connection: sqlite3.Connection,
    table: str,
    script: str,
    columns: tuple[str, ...],
    new_values: str = "",
    new_columns: tuple[str, ...] = (),
) -> None:
    """Give a table its present form: made under another name, filled, renamed (SQLite's own advice)."""
    layout.run(connection, script.replace(f"CREATE TABLE {table} ", f"CREATE TABLE new_{table} "))
    kept = ", ".join(columns)
    added = f", {new_values}" if new_values else ""
    connection.execute(
        f"INSERT INTO new_{table} ({', '.join((*columns, *new_columns))})"
        f" SELECT {kept}{added} FROM {table} ORDER BY 1"
    )
    connection.execute(f"DROP TABLE {table}")
    connection.execute(f"ALTER TABLE new_{table} RENAME TO {table}")


def _separate_keys(connection: sqlite3.Connection) -> None:
    doubles = connection.execute(
        "SELECT id, start_ns FROM traces AS t WHERE EXISTS"
        " (SELECT 1 FROM traces AS o WHERE o.start_key = t.start_key AND o.id < t.id) ORDER BY id"
    ).fetchall()
    keys = free_keys(connection, [start for _, start in doubles])
    connection.executemany(
        "UPDATE traces SET start_key = ? WHERE id = ?",
        [(key, trace) for key, (trace, _) in zip(keys, doubles, strict=True)],
    )
