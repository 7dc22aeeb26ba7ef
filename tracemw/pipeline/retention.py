"""Keeps the store within its limits of age and size, and indexed, beside the writer and never in its way."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

from tracemw.errors import StoreError
from tracemw.guard import report

if TYPE_CHECKING:
    from tracemw.settings import Settings
    from tracemw.store import Store

INTERVAL: Final = 60.0  # seconds between two looks


class Retention:
    """Removes what is too old or too much, in a thread that lives only as long as that takes.

    Args:
        settings: With the limits, `max_age` in seconds and `max_size` in bytes.
    """

    def __init__(self, settings: Settings) -> None:
        self._max_age = settings.max_age
        self._max_size = settings.max_size
        self._due = 0.0
        self._thread: threading.Thread | None = None

    def look(self, store: Store) -> None:
        """Start a removal if one is due; called by the writer now and then, returns at once."""
        now = time.monotonic()
        if now < self._due or (self._thread is not None and self._thread.is_alive()):
            return
        self._due = now + INTERVAL
        thread = threading.Thread(target=self._purge, args=(store,), name="tracemw-retention", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is about to end and starts no threads, since Python 3.12
            return
        self._thread = thread

    def close(self, timeout: float = 5.0) -> None:
        """Wait for a removal that is under way."""
        if self._thread is not None and self._thread.is_alive():
            self._thread.join(timeout)

    def _purge(self, store: Store) -> None:
        try:
            store.reindex()
            store.purge(self._max_age, self._max_size)
        except StoreError:
            pass  # the writer meets the same trouble and tells of it
        except Exception as exc:
            report("Retention", exc)
