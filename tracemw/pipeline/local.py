"""The sink that writes to the embedded store, from which traces are delivered to a remote destination."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from tracemw.errors import StoreError
from tracemw.pipeline.retention import Retention
from tracemw.pipeline.target import masked
from tracemw.pipeline.troubles import Troubles
from tracemw.store import Store, absolute, open_store
from tracemw.store.arrivals import of_root

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tracemw.pipeline.delivery import Deliverer
    from tracemw.settings import Settings
    from tracemw.store.arrivals import Arrival
    from tracemw.store.rows import SpanRow, TraceRow

logger = logging.getLogger("tracemw")

IN_MEMORY: Final = 64 << 20  # bytes of traces that wait for delivery where no file can be written
RETENTION_WAIT: Final = 1.0  # seconds that closing waits for a removal; it goes on without being waited for
CHECKED: Final = 100  # writes between two looks at that


class StoreSink:
    """Writes rows to the store; opens it with the first write, in the writer's thread.

    Args:
        url: The store.
        destination: Where the traces are delivered to from there, or None.
        settings: Those in force, for the retention limits.
    """

    def __init__(self, url: str, destination: str | None, settings: Settings) -> None:
        self.url = absolute(url)  # now: the process may change its directory before the first write
        self.destination = destination
        self.patient: Callable[[], bool] | None = None  # asked while another process has the store locked
        self._store: Store | None = None
        self._deliverer: Deliverer | None = None
        self._writes = 0
        self._retention = Retention(settings)
        self._troubles = Troubles()

    @property
    def store(self) -> Store:
        """The store, opened when first asked for."""
        if self._store is None:
            self._store = self._open()
        return self._store

    def _open(self) -> Store:
        try:
            return open_store(self.url)
        except StoreError as exc:
            if self.destination is None or exc.retry:
                raise
            logger.error("%s. Traces are kept in memory until delivered, %d MB at most.", exc, IN_MEMORY >> 20)
            return open_store("memory:")

    def ready(self, trace: TraceRow, span: SpanRow) -> Arrival:
        """Return a new trace as the store takes it with the least work; ValueError if it has to be cleaned."""
        return of_root(trace, span, self.destination is not None)

    def write(
        self, traces: Sequence[TraceRow], spans: Sequence[SpanRow], arrived: Sequence[Arrival] = ()
    ) -> None:
        """Store rows; those for a remote destination are queued for delivery in the same transaction."""
        store = self.store
        store.write(traces, spans, arrived, outbox=self.destination is not None, patient=self.patient)
        self._retention.look(store)
        self._troubles.look(store)
        if self.destination is None:
            return
        self._deliver().notify()
        self._writes += 1
        if store.path is None and self._writes % CHECKED == 0:
            store.purge(max_size_bytes=IN_MEMORY)

    def _deliver(self) -> Deliverer:
        if self._deliverer is None:
            from tracemw.pipeline.delivery import Deliverer

            assert self.destination is not None
            self._deliverer = Deliverer(lambda: self.store, self.destination)
        return self._deliverer

    def wait_delivered(self, timeout: float) -> bool:
        """Wait until all that is stored now is acknowledged by the remote destination, if there is one.

        Args:
            timeout: Seconds to wait at most.

        Returns:
            False when time ran out, or something was given up meanwhile.
        """
        return True if self.destination is None else self._deliver().wait_delivered(timeout)

    def stats(self) -> dict[str, Any]:
        """Return where traces are stored and go, and for a remote destination how its delivery goes."""
        found: dict[str, Any] = {"store": self.url, "destination": masked(self.destination or self.url)}
        if self._store is not None:
            found["replaced"] = self._store.replaced
        if self.destination is not None:
            found["delivery"] = self._deliver().stats()
        return found

    def rest(self) -> None:
        """Have all that is to be written in the store's main file, unless others have it open as well."""
        self._settle()
        if self._store is not None:
            self._store.rest()

    def close(self) -> None:
        """Stop delivery, close the store's connections. What was not delivered stays in the store."""
        if self._deliverer is not None:
            self._deliverer.close()
        self._settle()
        store, self._store = self._store, None
        if store is not None:
            store.close()

    def _settle(self) -> None:
        """Wait for a removal, whose connection would keep the log; leave a note of what went wrong here."""
        self._retention.close(RETENTION_WAIT)
        if self._store is not None:
            self._troubles.look(self._store, now=True)
