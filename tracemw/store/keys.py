"""Unique keys of time for traces."""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Callable, Iterable, Sequence

from .codec import within

_MILLISECOND = 1_000_000
_LAST = 2**63 - 1  # of the keys that SQLite has
_LAST_MILLISECOND = _LAST // _MILLISECOND * _MILLISECOND


def _key_of(start_ns: int) -> int:
    """Return the key that a trace with this start has if no other one has it."""
    return min(within(start_ns), _LAST_MILLISECOND)  # others find a free one above


def free_keys(connection: sqlite3.Connection, starts: Sequence[int]) -> list[int]:
    """Return a `start_key` for each start, none of them taken; to be used in the transaction of the caller.

    Clocks are coarse on some systems: a taken key is replaced by a free one of the same millisecond, as long as
    there is one, so that filters on milliseconds stay exact.
    """
    keys = [_key_of(start) for start in starts]
    query = "SELECT start_key FROM traces WHERE start_key IN (SELECT value FROM json_each(?))"
    taken = {key for (key,) in connection.execute(query, (json.dumps(keys),))}

    def taken_between(first: int, last: int) -> Iterable[int]:
        query = "SELECT start_key FROM traces WHERE start_key BETWEEN ? AND ?"
        return (key for (key,) in connection.execute(query, (max(first, -_LAST), min(last, _LAST))))

    return _distinct(keys, taken, taken_between)


def distinct_keys(starts: Sequence[int]) -> list[int]:
    """Return a `start_key` for each start, no two alike; another trace of the file may have one of them."""
    return _distinct([_key_of(start) for start in starts], set(), lambda first, last: ())


def _distinct(wanted: Sequence[int], taken: set[int], between: Callable[[int, int], Iterable[int]]) -> list[int]:
    loaded: set[int] = set()
    hints: dict[int, int] = {}
    keys = []
    for start in wanted:
        key = start
        if key in taken:
            first = start // _MILLISECOND * _MILLISECOND
            if first not in loaded:
                taken.update(between(first, first + _MILLISECOND - 1))
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
