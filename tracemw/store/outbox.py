"""Traces that wait for delivery to a remote back end, and the lease that makes one process deliver them.

A row of `outbox` is a trace not yet delivered as it is now. What was claimed is removed only if the trace has not
changed since, by its revision: a late span or tag has it delivered again, whole.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable
from dataclasses import dataclass

from . import bulk

UNFINISHED_WAIT = 600 * 10**9  # ns after which a trace is delivered as it is, its process may have been killed

_ENQUEUE = "INSERT INTO outbox (trace, attempts, due_ns, reason, dead) VALUES"
_AGAIN = """
ON CONFLICT (trace) DO UPDATE SET
    due_ns = CASE WHEN attempts = 0 OR dead THEN excluded.due_ns ELSE due_ns END,
    attempts = CASE WHEN dead THEN 0 ELSE attempts END,
    dead = 0
"""
_UNCHANGED = "trace = ? AND ? = (SELECT revision FROM traces WHERE id = outbox.trace)"


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A trace whose delivery was given up."""

    id: int
    trace_id: str
    name: str
    start_ns: int
    attempts: int
    reason: str | None


@dataclass(frozen=True, slots=True)
class OutboxStats:
    """What waits for delivery.

    Attributes:
        waiting: Traces to be delivered.
        dead: Traces whose delivery was given up.
        oldest_ns: Start of the oldest trace that waits.
    """

    waiting: int
    dead: int
    oldest_ns: int | None


def due_at(state: str) -> int:
    """Return when a trace of this state is to be delivered, in nanoseconds since the epoch; 0 is at once."""
    return time.time_ns() + UNFINISHED_WAIT if state == "IN_PROGRESS" else 0


def enqueue(connection: sqlite3.Connection, traces: Iterable[tuple[int, str]]) -> None:
    """Queue traces (number and state); one that was failing keeps its time, one given up gets another chance."""
    values = [(trace, due_at(state)) for trace, state in traces]
    bulk.insert(connection, _ENQUEUE, "(?, 0, ?, NULL, 0)", values, _AGAIN)


def claim(connection: sqlite3.Connection, limit: int, now_ns: int, max_spans: int) -> list[int]:
    """Return the numbers of traces that are due, oldest row first; one at least, whatever its size."""
    due = connection.execute(
        "SELECT trace, (SELECT count(*) FROM spans WHERE spans.trace = outbox.trace) FROM outbox"
        " WHERE dead = 0 AND due_ns <= ? ORDER BY trace LIMIT ?",
        (now_ns, limit),
    )
    claimed: list[int] = []
    total = 0
    for trace, spans in due:
        total += spans
        if claimed and total > max_spans:
            break
        claimed.append(trace)
    return claimed


def done(connection: sqlite3.Connection, delivered: Iterable[tuple[int, int]]) -> int:
    """Remove what was delivered at this revision and has not changed since; return how many."""
    return connection.executemany(f"DELETE FROM outbox WHERE {_UNCHANGED}", list(delivered)).rowcount


def failed(
    connection: sqlite3.Connection, items: Iterable[tuple[int, int]], reason: str, due_ns: int, dead: bool
) -> None:
    """Note a failed delivery; a trace that changed since is not given up, its new state may be accepted."""
    connection.executemany(
        "UPDATE outbox SET attempts = attempts + 1, reason = ?, due_ns = ?,"
        " dead = (? AND ? = (SELECT revision FROM traces WHERE id = outbox.trace)) WHERE trace = ?",
        [(reason, due_ns, dead, revision, trace) for trace, revision in items],
    )


def dead_letters(connection: sqlite3.Connection, limit: int) -> list[DeadLetter]:
    """Return the traces given up, oldest row first."""
    return [
        DeadLetter(*row)
        for row in connection.execute(
            "SELECT t.id, t.trace_id, t.name, t.start_ns, o.attempts, o.reason FROM outbox AS o"
            " JOIN traces AS t ON t.id = o.trace WHERE o.dead ORDER BY o.trace LIMIT ?",
            (limit,),
        )
    ]


def redeliver(connection: sqlite3.Connection, trace_ids: Iterable[str] | None) -> int:
    """Have traces given up tried again, all of them or those named; return how many."""
    sql = "UPDATE outbox SET dead = 0, attempts = 0, due_ns = 0, reason = NULL WHERE dead"
    if trace_ids is None:
        return connection.execute(sql).rowcount
    chosen = "SELECT id FROM traces WHERE trace_id IN (SELECT value FROM json_each(?))"
    return connection.execute(f"{sql} AND trace IN ({chosen})", (json.dumps(list(trace_ids)),)).rowcount


def stats(connection: sqlite3.Connection) -> OutboxStats:
    """Count what waits and what was given up."""
    dead = connection.execute("SELECT count(*) FROM outbox WHERE dead").fetchone()[0]
    waiting, oldest = connection.execute(
        "SELECT count(*), min(t.start_ns) FROM outbox AS o JOIN traces AS t ON t.id = o.trace WHERE NOT o.dead"
    ).fetchone()
    return OutboxStats(waiting, dead, oldest)


def lease(connection: sqlite3.Connection, name: str, owner: str, ttl_s: float) -> bool:
    """Take or renew a lease; False while another owner has it."""
    now = time.time_ns()
    connection.execute(
        "INSERT INTO lease (name, owner, expires_ns) VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE"
        " SET owner = excluded.owner, expires_ns = excluded.expires_ns"
        " WHERE lease.owner = excluded.owner OR lease.expires_ns <= ?",
        (name, owner, now + int(ttl_s * 1e9), now),
    )
    return bool(connection.execute("SELECT owner = ? FROM lease WHERE name = ?", (owner, name)).fetchone()[0])


def release(connection: sqlite3.Connection, name: str, owner: str) -> None:
    """Give a lease back."""
    connection.execute("DELETE FROM lease WHERE name = ? AND owner = ?", (name, owner))
