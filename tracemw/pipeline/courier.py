"""Takes traces that wait in the store to their destination, a batch at a time; decides what a failure means.

A failure is the back end's (it is down, busy, or set up wrongly: everything waits, and it is asked again after
longer and longer pauses, with one trace), or a trace's own (it alone is refused while others are taken: it is
tried a few times more and then given up, with the reason, until somebody has it redelivered).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Final

from tracemw.errors import StoreError, TracemwError
from tracemw.guard import due, report
from tracemw.pipeline import target as targets
from tracemw.pipeline.batches import MAX_TRACES, Destination, Result, pause
from tracemw.pipeline.lease import Lease
from tracemw.pipeline.transport import Refused, Unavailable, Unfit
from tracemw.store import Store, StoredTrace

logger = logging.getLogger("tracemw")

POLL: Final = 1.0  # seconds between two looks for what other processes wrote
LEASE_POLL: Final = 2.0  # seconds between two looks at a lease that another process has
MAX_SPANS: Final = 5000  # read from the store at once
COMMIT: Final = 0.5  # seconds after which what was delivered is noted
WAITED_FOR: Final = 2.0  # seconds, the longest pause while somebody waits for delivery
UNFIT_PAUSE: Final = 30.0  # seconds; somebody has to change something first
HEALTHY: Final = 60.0  # seconds since a trace was taken in which a refusal is the refused trace's own fault
FINAL_ATTEMPTS: Final = 3  # refusals for good after which a trace is given up although no other was taken
MAX_ATTEMPTS: Final = 5  # refusals of other kinds, while others were taken, after which a trace is given up
LONGEST_WAIT: Final = 300.0  # seconds until a refused trace is tried again

_ATTEMPTS = "SELECT trace, attempts FROM outbox WHERE attempts > 0 AND trace BETWEEN ? AND ?"


def connect(destination: str) -> Destination:
    """Make the destination that a URL names. Nothing is sent yet.

    Raises:
        SettingError: The URL is not allowed.
        TracemwError: A package is missing; the message names the extra.
    """
    target = targets.parse(destination)
    if target.kind == "mlflow":
        from tracemw.pipeline.mlflow import Mlflow

        return Mlflow(target)
    from tracemw.pipeline.otlp import Otlp

    return Otlp(target)


class Courier:
    """Delivers from one store to one destination, while no other process does.

    Args:
        store: Gives the store.
        destination: URL of the destination.

    Attributes:
        counts: `delivered`, `retried`, `dead`: traces, in this process.
        problem: What keeps traces from being delivered; None while they are.
    """

    def __init__(self, store: Callable[[], Store], destination: str) -> None:
        self.counts: Counter[str] = Counter()
        self.problem: str | None = None
        self.lease = Lease(store, "delivery")
        self._store = store
        self._url = destination
        self._name = targets.masked(destination)
        self._destination: Destination | None = None
        self._failures = 0  # in a row
        self._next = 0.0  # monotonic time of the next try after a failure
        self._next_if_waited_for = 0.0
        self._taken_at: float | None = None  # monotonic time at which a trace was taken last

    def step(self, stop: Callable[[], bool], waited_for: bool = False) -> float:
        """Deliver a batch, if there is one and the time has come.

        Args:
            stop: Asked between two requests.
            waited_for: Somebody waits for delivery: shorten the pause after a failure.

        Returns:
            Seconds until the next step is worth while.

        Raises:
            StoreError: The store cannot be read or written.
        """
        if not self.lease.hold():
            return LEASE_POLL
        wait = (self._next_if_waited_for if waited_for else self._next) - time.monotonic()
        if wait > 0:
            return min(wait, POLL)
        traces = self._store().outbox_claim(1 if self._failures else MAX_TRACES, max_spans=MAX_SPANS)
        if not traces:
            return POLL
        self._deliver(traces, stop)
        return 0.0

    def close(self) -> None:
        """Give the lease back and close the connections."""
        self.lease.release()
        if self._destination is not None:
            self._destination.close()

    def _deliver(self, traces: list[StoredTrace], stop: Callable[[], bool]) -> None:
        attempts = dict(self._store().read(_ATTEMPTS, (traces[0].id, traces[-1].id)))
        results: list[Result] = []
        try:
            if self._destination is None:
                self._destination = connect(self._url)
            with closing(self._destination.send(traces, attempts.keys())) as sending:
                self._take(sending, results, stop)
        except Unavailable as exc:
            self._trouble(exc, len(traces) - len(results), exc.retry_after)
        except StoreError:
            raise
        except (Unfit, TracemwError) as exc:
            self._trouble(exc, len(traces) - len(results), UNFIT_PAUSE)
        except Refused as exc:  # not a trace, but what was asked before one was sent
            self._trouble(exc, len(traces) - len(results), None)
        except Exception as exc:  # a defect of ours, or an answer that nobody thought of: traces wait, too
            report("Courier.deliver", exc)
            self._trouble(exc, len(traces) - len(results), None)
        else:
            self._well()
        for result in results:
            if result.reason is not None:
                self._refused(result, attempts.get(result.trace.id, 0) + 1)

    def _take(self, sending: Iterator[Result], results: list[Result], stop: Callable[[], bool]) -> None:
        """Take results as they come; note in the store, now and then, what was delivered."""
        delivered: list[tuple[int, int]] = []
        noted = time.monotonic()
        try:
            for result in sending:
                results.append(result)
                now = time.monotonic()
                if result.reason is None:
                    delivered.append((result.trace.id, result.trace.revision))
                    self._taken_at = now
                if now - noted > COMMIT:
                    self._note(delivered)
                    noted = now
                    if stop() or not self.lease.hold():
                        break
        finally:
            self._note(delivered)

    def _note(self, delivered: list[tuple[int, int]]) -> None:
        if delivered:
            self._store().outbox_done(delivered)
            self.counts["delivered"] += len(delivered)
            delivered.clear()

    def _refused(self, result: Result, attempts: int) -> None:
        """Have a refused trace tried again, or give it up."""
        taken_at, reason = self._taken_at, result.reason or ""
        healthy = taken_at is not None and time.monotonic() - taken_at < HEALTHY
        if result.final:
            dead = healthy or attempts >= FINAL_ATTEMPTS
        else:
            dead = healthy and attempts >= MAX_ATTEMPTS
        due_ns = time.time_ns() + int(1e9 * pause(attempts, LONGEST_WAIT))
        trace = result.trace
        self._store().outbox_failed([(trace.id, trace.revision)], reason, due_ns, dead=dead)
        self.counts["dead" if dead else "retried"] += 1
        if dead and due("delivery given up"):
            logger.error(
                "delivery of trace tr-%s to %s is given up: %s (given up so far: %d; `tracemw doctor` lists them)",
                trace.row.trace_id, self._name, reason, self.counts["dead"],
            )  # fmt: skip

    def _trouble(self, exc: Exception, left: int, wait: float | None) -> None:
        """Wait before the next try: as long as the back end asked for, else longer each time."""
        self._failures += 1
        self.counts["retried"] += left
        self.problem = str(exc)
        seconds, now = max(pause(self._failures), wait or 0.0), time.monotonic()
        self._next = now + seconds
        asked = wait is not None and isinstance(exc, Unavailable)
        self._next_if_waited_for = now + (seconds if asked else min(seconds, WAITED_FOR))
        if due(f"delivery to {self._name}"):
            logger.warning(
                "traces wait for %s: %s. They are kept and tried again, next in %.0f s.", self._name, exc, seconds
            )

    def _well(self) -> None:
        if self._failures and due(f"delivery again to {self._name}"):
            logger.warning("traces are delivered to %s again", self._name)
        self._failures, self._next, self._next_if_waited_for, self.problem = 0, 0.0, 0.0, None
