"""Who of the processes that share a store does something that one of them is enough for."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable
from typing import Final

from tracemw.errors import StoreError
from tracemw.store import Store

TTL: Final = 30.0  # seconds after which a lease that was not renewed is free
RENEWAL: Final = 5.0  # seconds between renewals; longer than one request may take, several fit into a lease


class Lease:
    """A lease in the store, held by one process at a time.

    It names its owner, so that a process on the same machine sees that the owner has died and takes over at once;
    others wait until the lease has run out.

    Args:
        store: Gives the store.
        name: What it is a lease of.
    """

    def __init__(self, store: Callable[[], Store], name: str) -> None:
        self._store = store
        self._name = name
        self._owner = f"{_process(os.getpid())}/{secrets.token_hex(4)}"
        self._renewed: float | None = None  # by the monotonic clock; None: not held

    @property
    def held(self) -> bool:
        """True where it was held when last looked at."""
        return self._renewed is not None

    def hold(self) -> bool:
        """Take the lease, or renew it when it is time; False while somebody else has it.

        Raises:
            StoreError: The store cannot be read or written.
        """
        now = time.monotonic()
        if self._renewed is not None and now - self._renewed < RENEWAL:
            return True
        try:
            held = self._take()
        except StoreError as exc:
            if exc.retry and self._renewed is not None and now - self._renewed < TTL / 2:
                return True  # the store is busy; there is time left
            self._renewed = None
            raise
        self._renewed = now if held else None
        return held

    def release(self) -> None:
        """Give it back, if it is held; never raises."""
        if self._renewed is not None:
            self._renewed = None
            try:
                self._store().release(self._name, self._owner)
            except StoreError:
                pass  # it runs out

    def _take(self) -> bool:
        found = self._store().read("SELECT owner, expires_ns FROM lease WHERE name = ?", (self._name,))
        if found:
            owner, expires_ns = found[0]
            if owner != self._owner and expires_ns > time.time_ns():
                if not is_dead(owner):
                    return False
                self._store().release(self._name, owner)
        return self._store().lease(self._name, self._owner, TTL)


def _process(pid: int) -> str:
    """Return what tells a process from all others, also from a later one with its number."""
    return f"{socket.gethostname()}/{_namespace()}/{pid}/{_started(pid)}"


def is_dead(owner: str) -> bool:
    """True where the owner was a process that could be seen from here, and is gone."""
    host, namespace, pid, started, _ = (owner.split("/") + [""] * 5)[:5]
    if not namespace or (host, namespace) != (socket.gethostname(), _namespace()) or not pid.isdigit():
        return False
    return _started(int(pid)) != started


def _namespace() -> str:
    """Return which processes this one can see (containers on a host may share its name), or nothing."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Return when a process was started, in the kernel's own measure; nothing for one that is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]
