"""Notes of what went wrong in the processes that share the file: rows of `facts`, one for each process.

They need no table of their own, so that older and newer processes go on sharing a file.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .codec import clean

KEPT = 100  # notes, the newest ones

_PREFIX = "trouble:"
_OURS = f"name >= '{_PREFIX}' AND name < '{_PREFIX[:-1]};'"


@dataclass(frozen=True, slots=True)
class Trouble:
    """What went wrong in a process.

    Attributes:
        process: Host, process id and what tells it from later ones of this id, with slashes between them.
        at_ns: When the note was written.
        counts: What it says.
    """

    process: str
    at_ns: int
    counts: dict[str, Any]


def note(connection: sqlite3.Connection, process: str, trouble: Mapping[str, Any]) -> None:
    """Write the note of a process; only so many are kept."""
    row = clean(_PREFIX + process), json.dumps({"at_ns": time.time_ns(), "counts": dict(trouble)})
    connection.execute("INSERT OR REPLACE INTO facts (name, value) VALUES (?, ?)", row)
    connection.execute(
        f"DELETE FROM facts WHERE {_OURS} AND name NOT IN (SELECT name FROM facts WHERE {_OURS}"
        f" ORDER BY json_extract(value, '$.at_ns') DESC LIMIT {KEPT})"
    )


def noted(connection: sqlite3.Connection) -> list[Trouble]:
    """Return all notes, the newest first."""
    found = []
    for name, text in connection.execute(f"SELECT name, value FROM facts WHERE {_OURS}"):
        value = json.loads(text)
        found.append(Trouble(name.removeprefix(_PREFIX), value["at_ns"], value["counts"]))
    return sorted(found, key=lambda trouble: -trouble.at_ns)


def forget(connection: sqlite3.Connection, before_ns: int) -> None:
    """Remove notes that were written before a time."""
    connection.execute(f"DELETE FROM facts WHERE {_OURS} AND json_extract(value, '$.at_ns') < ?", (before_ns,))
