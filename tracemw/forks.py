"""Locks and forks: a lock that another thread holds while the process forks is never released in the child."""

from __future__ import annotations

import os
import threading
import weakref
from types import TracebackType


class RenewedLock:
    """A reentrant lock that is free in a forked child, whoever held it in the parent."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._held: list[threading.RLock] = []  # what to release: not `_lock` any more where the holder forked
        _locks.add(self)

    def __enter__(self) -> None:
        lock = self._lock
        lock.acquire()
        self._held.append(lock)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._held.pop().release()

    def renew(self) -> None:
        """Begin with a lock that nobody holds."""
        self._lock = threading.RLock()


_locks: weakref.WeakSet[RenewedLock] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for lock in list(_locks):
        lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
