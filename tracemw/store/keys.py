"""Unique keys of time for traces."""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Sequence

_MILLISECOND = 1_000_000
_LAST = 2**63 - 1  # of the keys that SQLite has


def free_keys(connection: sqlite3.Connection, starts: Sequence[int]) -> list[int]:
    """Return a `start_key` for each start, none of them taken; to be used in the transaction of the caller.

    Clocks are coarse on some systems: a taken key is replaced by a free one of the same millisecond, as long as
    there is one, so that filters on milliseconds stay exact.
    """
    query = "SELECT start_key FROM traces WHERE start_key IN (SELECT value FROM json_each(?))"
    taken = {key for (key,) in connection.execute(query, (json.dumps(starts),))}
    loaded: set[int] = set()
    hints: dict[int, int] = {}
    keys = []
    for start in starts:
        key = start
        if key in taken:
            first = start // _MILLISECOND * _MILLISECOND
            if first not in loaded:
                query = "SELECT start_key FROM traces WHERE start_key BETWEEN ? AND ?"
                last = min(first + _MILLISECOND - 1, _LAST)
                taken.update(key for (key,) in connection.execute(query, (first, last)))
                loaded.add(first)
            key = _free(start, hints.get(start, start), first, taken)
            hints[start] = key
        taken.add(key)
        keys.append(key)
    return keys


def _free(start: int, hint: int, first: int, taken: set[int]) -> int:
    end = first + _MILLISECOND
    beyond = itertools.count(end) if end <= _LAST else itertools.count(first - 1, -1)
    candidates = itertools.chain(range(hint, min(end, _LAST + 1)), range(start - 1, first - 1, -1), beyond)
    return next(key for key in candidates if key not in taken)
