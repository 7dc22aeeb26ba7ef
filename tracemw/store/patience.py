"""Waiting for a file that another process has locked.

SQLite would wait by itself, inside of a call that nothing can interrupt: under gevent it stops every greenlet of
the process, a fork has to wait for it, and so has whoever ends the process. So SQLite waits hardly at all, and we
do, between two attempts that hold nothing.
"""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Callable
from typing import TypeVar

from tracemw.errors import StoreError

T = TypeVar("T")

BUSY_TIMEOUT = 5.0  # seconds that somebody waits for another process's transaction
ATTEMPT = 0.002  # seconds of that which SQLite waits by itself
LONGEST_PAUSE = 0.03  # seconds between two attempts


def patiently(attempt: Callable[[], T], patient: Callable[[], bool] | None = None) -> T:
    """Return what an attempt returns, tried again while the file is locked.

    Args:
        attempt: It leaves nothing open when it raises.
        patient: Asked before every pause; False has the error raised at once.

    Raises:
        StoreError: It is locked for too long, or something else is wrong.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT
    pause = 0.001
    while True:
        try:
            return attempt()
        except StoreError as error:
            if not _locked(error) or time.monotonic() > deadline or not (patient is None or patient()):
                raise
        time.sleep(pause * random.uniform(0.5, 1))
        pause = min(pause * 2, LONGEST_PAUSE)


def leave_free(began: float) -> None:
    """Leave the lock free as long as it was taken: who waits for it looks for it now and then.

    Args:
        began: When it was taken, by `time.perf_counter`.
    """
    time.sleep(min(0.1, time.perf_counter() - began))


def is_lock(error: BaseException | None) -> bool:
    """True for SQLite's word that another connection has locked the file."""
    return isinstance(error, sqlite3.OperationalError) and "locked" in str(error)


def _locked(error: StoreError) -> bool:
    return error.retry and is_lock(error.__cause__)
