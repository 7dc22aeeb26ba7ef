"""Files that somebody takes away from under a writer: noticed with the next write, said, nothing more is lost."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.store.rows import span, trace
from tracemw import guard
from tracemw.store import Store, open_store

URL = "sqlite:///store.db"


def remove(*ends: str) -> Callable[[], None]:
    """Return what removes some of the store's files."""

    def change() -> None:
        for end in ends:
            Path(f"store.db{end}").unlink()

    return change


def empty() -> None:
    """Cut the file, as `> store.db` does."""
    os.truncate("store.db", 0)


def move() -> None:
    """Put the file elsewhere, as a rotation of logs does."""
    os.rename("store.db", "old.db")


def replace() -> None:
    """Put another store in its place."""
    with open_store("sqlite:///other.db") as other:
        other.write([trace(900)], [span(900)])
    shutil.move("other.db", "store.db")


def fill(store: Store, first: int) -> None:
    """Write ten traces, in several transactions."""
    for number in range(first, first + 10):
        store.write([trace(number)], [span(number), span(number, 1)])


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (remove(""), 0),
        (remove("", "-wal", "-shm"), 0),
        (remove("-wal", "-shm"), 10),
        (remove("-wal"), 10),
        (empty, 0),
        (move, 0),
        (replace, 1),
    ],
    ids=["removed", "all removed", "log and index removed", "log removed", "emptied", "moved", "replaced"],
)
def test_a_file_taken_away(change: Callable[[], None], kept: int, caplog: pytest.LogCaptureFixture) -> None:
    """What is written after it is in the file that is there then, which is whole; what the log held is saved."""
    guard._last_logged.clear()
    with caplog.at_level(logging.ERROR, "tracemw"), open_store(URL) as store:
        fill(store, 0)
        assert store.replaced == 0
        change()
        fill(store, 100)
        assert store.replaced == 1
        assert len([record for record in caplog.records if "removed, replaced or emptied" in record.message]) == 1
    with closing(sqlite3.connect("store.db")) as plain:
        assert plain.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert plain.execute("SELECT count(*) FROM traces").fetchone() == (10 + kept,)
        assert plain.execute("SELECT count(*) FROM spans").fetchone() == (20 + {0: 0, 1: 1, 10: 20}[kept],)


def test_two_writers_whose_log_is_removed() -> None:
    """Both go on in the same file, and it is whole."""
    with open_store(URL) as one, open_store(URL) as other:
        fill(one, 0)
        fill(other, 100)
        remove("-wal", "-shm")()
        fill(one, 200)
        fill(other, 300)
        fill(one, 400)
        with open_store(URL) as third:
            assert {200, 300, 400} <= {int(found.row.trace_id, 16) for found in third.search().traces}
            assert third.read("PRAGMA integrity_check") == [("ok",)]


def test_nothing_is_said_of_ordinary_changes(caplog: pytest.LogCaptureFixture) -> None:
    """Others that come and go, compact the file or move its log into it have not taken it away."""
    with caplog.at_level(logging.ERROR, "tracemw"), open_store(URL) as store:
        fill(store, 0)
        store.rest()
        with open_store(URL) as other:
            fill(other, 20)
            store.rest()
        fill(store, 40)
        with closing(sqlite3.connect("store.db", isolation_level=None)) as plain:
            plain.execute("VACUUM")
            plain.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        fill(store, 60)
        assert store.replaced == 0
        assert store.stats()["traces"] == 40
    assert not caplog.records
