"""The sink that writes to the embedded store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tracemw.store import Store, open_store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tracemw.settings import Settings
    from tracemw.store.rows import SpanRow, TraceRow


class StoreSink:
    """Writes rows to the store; opens it with the first write, in the writer's thread.

    Args:
        url: The store.
        destination: Where the traces are delivered to from there, or None.
        settings: Those in force, for the retention limits.
    """

    def __init__(self, url: str, destination: str | None, settings: Settings) -> None:
        self.url = url
        self.destination = destination
        self._settings = settings
        self._store: Store | None = None

    @property
    def store(self) -> Store:
        """The store, opened when first asked for."""
        if self._store is None:
            self._store = open_store(self.url)
        return self._store

    def write(self, traces: Sequence[TraceRow], spans: Sequence[SpanRow]) -> None:
        """Store rows; those for a remote destination are queued for delivery in the same transaction."""
        self.store.write(traces, spans, outbox=self.destination is not None)

    def stats(self) -> dict[str, Any]:
        """Return what is known of the store."""
        return {"store": self.url, "destination": self.destination or self.url}

    def close(self) -> None:
        """Close the store's connections."""
        store, self._store = self._store, None
        if store is not None:
            store.close()
