"""Many rows in few statements.

Python gives the interpreter away for every statement and has to get it back afterwards, which takes up to 5 ms
beside a thread that computes. So rows are not written one by one: a statement takes up to `ROWS` of them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, islice
from typing import Any

ROWS = 1024  # in one statement at most
FEW = 32  # rows that go into one statement, whatever their number: about as many as a busy server writes at a time


def insert(
    connection: sqlite3.Connection, head: str, row: str, values: Iterable[Sequence[Any]], tail: str = ""
) -> None:
    """Insert rows.

    Args:
        head: The statement up to and with `VALUES`.
        row: The placeholders of one row, in parentheses.
        values: Of the rows; they may be made while they are asked for.
        tail: The rest of the statement.
    """
    size = 1 << (_most(row).bit_length() - 1)
    rest = iter(values)
    while chunk := list(islice(rest, size)):
        for rows in _split(chunk, size):
            statement = _statement(head, row, len(rows), tail)
            connection.executemany(statement, (list(chain.from_iterable(rows)),))


def _most(row: str) -> int:
    """Return how many rows one statement takes."""
    return min(ROWS, _variables() // row.count("?"))


def _split(rows: list[Sequence[Any]], size: int) -> Iterator[list[Sequence[Any]]]:
    """Split rows into parts whose lengths are powers of two, or few: not many different statements to prepare."""
    begin = 0
    while (rest := len(rows) - begin) > 0:
        while size > rest:
            size = rest if rest <= FEW else size >> 1
        yield rows[begin : begin + size]
        begin += size


@lru_cache(maxsize=256)
def _statement(head: str, row: str, size: int, tail: str) -> str:
    return f"{head} {', '.join([row] * size)} {tail}"


@lru_cache(maxsize=1)
def _variables() -> int:
    """Return how many values a statement may have: 999 before SQLite 3.32, unless built otherwise."""
    wanted = 30_000
    connection = sqlite3.connect(":memory:")
    try:
        connection.execute(f"SELECT 1 IN ({', '.join('?' * wanted)})", [None] * wanted)
    except sqlite3.OperationalError:
        return 999
    finally:
        connection.close()
    return wanted
