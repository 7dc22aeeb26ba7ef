"""What went wrong in a process, noted in the store that it shares, where `tracemw doctor` finds it.

`stats()` tells of the process that calls it alone. A process without trouble notes nothing.
"""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING, Any, Final

from tracemw import guard, pipeline
from tracemw.errors import StoreError

if TYPE_CHECKING:
    from tracemw.store import Store

INTERVAL: Final = 5.0  # seconds between two looks
_LOST: Final = ("dropped", "held_back_dropped")  # of `Pipeline.stats()`


class Troubles:
    """Keeps one note per process up to date: spans and traces it lost, failures of ours that were swallowed."""

    def __init__(self) -> None:
        self._due = 0.0
        self._noted: dict[str, Any] = {}
        self._owner: tuple[int, str] = (0, "")

    def look(self, store: Store, *, now: bool = False) -> None:
        """Note what happened since the last look; called by the writer after each batch.

        Args:
            now: Look even if the last look was a moment ago.
        """
        moment = time.monotonic()
        if moment < self._due and not now:
            return
        self._due = moment + INTERVAL
        found = _found(store)
        pid = os.getpid()
        if self._owner[0] != pid:
            self._owner, self._noted = (pid, f"{socket.gethostname()}/{pid}/{time.time_ns():x}"), {}
        if found and found != self._noted:
            try:
                store.note_trouble(self._owner[1], found)
            except StoreError:
                return  # the writer meets the same trouble and tells of it
            self._noted = found


def _found(store: Store) -> dict[str, Any]:
    current = pipeline.installed()
    counts: dict[str, Any] = {} if current is None else current.stats()
    found: dict[str, Any] = {"dropped_spans": sum(counts.get(name, 0) for name in _LOST)}
    found["purged_undelivered_traces"] = store.purged_undelivered
    found["failures"] = guard.failures()
    return {name: value for name, value in found.items() if value}
