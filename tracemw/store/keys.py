"""Unique keys of time for traces."""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Sequence

_MILLISECOND = 1_000_000


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
                taken.update(key for (key,) in connection.execute(query, (first, first + _MILLISECOND - 1)))
                loaded.add(first)
            key = _free(start, hints.get(start, start), first, taken)
            hints[start] = key
        taken.add(key)
        keys.append(key)
    return keys


def _free(start: int, hint: int, first: int, taken: set[int]) -> int:
    end = first + _MILLISECOND
    candidates = itertools.chain(range(hint, end), range(start - 1, first - 1, -1), itertools.count(end))
    return next(key for key in candidates if key not in taken)
