"""From the store to a remote back end: by a thread of a process that shares the store, or a process of its own.

Whatever happens to the back end, to the thread or to its process, the traces are in the store, and what was not
acknowledged is sent again. Traces and spans are known by their ids there, so nothing is there twice.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from tracemw.errors import StoreError, TracemwError
from tracemw.guard import due, report
from tracemw.pipeline.batches import pause
from tracemw.pipeline.courier import Courier, connect
from tracemw.pipeline.lease import is_dead
from tracemw.pipeline.target import masked
from tracemw.pipeline.transport import Refused, Unavailable, Unfit
from tracemw.store import Store, open_store
from tracemw.store.errors import is_missing
from tracemw.store.outbox import DeadLetter

logger = logging.getLogger("tracemw")

LINGER: Final = 0.3  # seconds that traces may gather after the first one
BEHIND: Final = 60.0  # seconds that a trace may wait before delivery is said to fall behind
EXIT: Final = 1.0  # seconds that the end of the thread is waited for

_LAST = "SELECT coalesce(max(trace), 0) FROM outbox"
_UNDELIVERED = (
    "SELECT EXISTS (SELECT 1 FROM outbox AS o JOIN traces AS t ON t.id = o.trace"
    " WHERE o.dead = 0 AND o.trace <= ? AND t.state <> 'IN_PROGRESS')"
)
_DEAD = "SELECT count(*) FROM outbox WHERE dead = 1 AND trace <= ?"
_UNFINISHED = (
    "SELECT count(*) FROM outbox AS o JOIN traces AS t ON t.id = o.trace"
    " WHERE o.dead = 0 AND o.attempts = 0 AND t.state = 'IN_PROGRESS'"
)
_LEFT = "SELECT EXISTS (SELECT 1 FROM outbox WHERE dead = 0 AND (attempts > 0 OR due_ns <= ?))"


class Deliverer:
    """The thread that delivers what this process and others put into the store.

    It starts when this process has written something, and never in a forked child without that.

    Args:
        store: Gives the store.
        destination: URL of the destination.
    """

    def __init__(self, store: Callable[[], Store], destination: str) -> None:
        self._store = store
        self._destination = destination
        self._reset()
        _deliverers.add(self)

    def _reset(self) -> None:
        """Start anew, without what belongs to another process (after a fork) or nobody."""
        self._pid = os.getpid()
        self._courier = Courier(self._store, self._destination)
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._stopping = threading.Event()
        self._waiters = 0
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def notify(self) -> None:
        """Something was queued for delivery: start the thread, or wake it."""
        if self._pid != os.getpid():  # a fork that Python was not told of
            self._reset()
        self._wake.set()
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._start()

    def _start(self) -> None:
        _release_at_exit()
        thread = threading.Thread(target=self._run, args=(self._courier, self._stopping), daemon=True)
        thread.name = "tracemw-deliverer"
        try:
            thread.start()
        except RuntimeError:  # the interpreter is shutting down: the store keeps it
            return
        self._thread = thread

    def wait_delivered(self, timeout: float) -> bool:
        """Wait until what is queued now is acknowledged; False if time ran out or something of it was given up."""
        deadline = time.monotonic() + timeout
        try:
            last = self._store().read(_LAST)[0][0]
            given_up = self._store().read(_DEAD, (last,))
            self._waiters += 1
            try:
                self.notify()
                while self._store().read(_UNDELIVERED, (last,))[0][0]:
                    self._hurry.set()
                    left = deadline - time.monotonic()
                    if left <= 0:
                        return False
                    time.sleep(min(0.05, left))
            finally:
                self._waiters -= 1
            return self._store().read(_DEAD, (last,)) == given_up
        except StoreError as exc:
            report("Deliverer.wait_delivered", exc)
            return False

    def stats(self) -> dict[str, Any]:
        """Return what this process delivered, and what waits in the store."""
        courier = self._courier
        counts: dict[str, Any] = {name: courier.counts[name] for name in ("delivered", "retried")}
        counts |= {"active": courier.lease.held, "problem": courier.problem}
        try:
            return counts | waiting(self._store())
        except StoreError:
            return counts

    def close(self) -> None:
        """Stop the thread, give the lease back; what waits stays in the store."""
        thread, courier = self._thread, self._courier
        self._stopping.set()
        self._hurry.set()
        self._wake.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(EXIT)
        courier.lease.release()
        self._reset()

    def leave(self) -> None:
        """Let another process take over at once: this one ends."""
        self._stopping.set()
        self._courier.lease.release()

    # The thread.

    def _run(self, courier: Courier, stopping: threading.Event) -> None:
        failures = 0
        while not stopping.is_set():
            try:
                wait = courier.step(stopping.is_set, self._waiters > 0)
                failures = 0
                self._warn_if_behind(courier)
            except StoreError as exc:
                failures += 1
                wait = pause(failures)
                if due("delivery store"):
                    logger.error("the store cannot be read for delivery: %s", exc)
            except Exception as exc:  # a defect of ours must not end delivery
                failures += 1
                wait = pause(failures)
                report("Deliverer.step", exc)
            self._rest(wait)
        courier.close()

    def _rest(self, wait: float) -> None:
        if wait <= 0:
            return
        if self._waiters:
            wait = min(wait, 0.05)
        if self._wake.wait(wait):
            self._wake.clear()
            if not self._waiters:
                self._hurry.wait(LINGER)
        self._hurry.clear()

    def _warn_if_behind(self, courier: Courier) -> None:
        if courier.lease.held and courier.problem is None and due("delivery behind?", BEHIND / 2):
            text = behind(self._store(), self._destination)
            if text and due("delivery behind", 600.0):
                logger.warning("%s", text)


@dataclass(frozen=True, slots=True)
class Delivered:
    """What `run_deliverer` did and left.

    Attributes:
        delivered: Traces acknowledged.
        waiting: Traces that still wait in the store.
        dead: Traces whose delivery was given up, in the store.
        problem: What kept traces from being delivered at the end; None if nothing did.
        unfinished: Waiting traces that have not ended: they are due when they do, or ten minutes after they began.
    """

    delivered: int
    waiting: int
    dead: int
    problem: str | None
    unfinished: int = 0


def run_deliverer(
    store_url: str,
    destination: str,
    *,
    once: bool = False,
    timeout: float | None = None,
    stop: threading.Event | None = None,
) -> Delivered:
    """Deliver from a store in the calling thread: beside an application, or to empty a store left behind.

    Only one process at a time delivers from a store; while another does, this one waits for its turn.

    Args:
        store_url: The store.
        destination: `mlflow+http(s)://…` or `otlp+http(s)://…`.
        once: Return when nothing is left that can be delivered now (traces that are not finished are due ten
            minutes after they began). Otherwise go on until told to stop, and wait for a store that is not
            there yet.
        timeout: Return after so many seconds at most.
        stop: Return soon after it is set.

    Returns:
        What was delivered, and what is left.

    Raises:
        SettingError: The destination is not allowed.
        TracemwError: A package is missing; the message names the extra.
        StoreError: The store cannot be used.
    """
    connect(destination).close()
    stop = stop or threading.Event()
    deadline = None if timeout is None else time.monotonic() + timeout

    def is_over() -> bool:
        return stop.is_set() or (deadline is not None and time.monotonic() >= deadline)

    path = store_url.removeprefix("sqlite:///")
    while not once and not is_over() and is_missing(path):
        if due("delivery no store", 600.0):
            logger.warning("there is no store at %s yet; waiting for it", store_url)
        stop.wait(1.0)
    with open_store(store_url, create=False) as store:
        courier = Courier(lambda: store, destination)
        try:
            _deliver(courier, store, once, is_over, stop)
        finally:
            courier.close()
        left = store.outbox_stats()
        unfinished = store.read(_UNFINISHED)[0][0]
        return Delivered(courier.counts["delivered"], left.waiting, left.dead, courier.problem, unfinished)


def _deliver(
    courier: Courier, store: Store, once: bool, is_over: Callable[[], bool], stop: threading.Event
) -> None:
    failures = 0
    while not is_over():
        try:
            wait = courier.step(is_over, waited_for=once)
            failures = 0
            if once and not store.read(_LEFT, (time.time_ns(),))[0][0]:
                return
        except StoreError as exc:
            if not exc.retry:
                raise
            failures += 1
            wait = pause(failures)
        while wait > 0 and not is_over():
            stop.wait(min(wait, 0.25))
            wait -= 0.25


def check(destination: str) -> tuple[bool, str]:
    """Ask a destination whether it will do; sends no trace, but makes an MLflow experiment that is not there.

    Returns:
        Whether traces can be delivered, and a line that says what is there or what is wrong with it.
    """
    try:
        made = connect(destination)
        try:
            return True, made.check()
        finally:
            made.close()
    except (Unavailable, Unfit, Refused, TracemwError) as exc:
        return False, str(exc)


def waiting(store: Store) -> dict[str, Any]:
    """Return how many traces wait, how many were given up, and for how many seconds the oldest waits."""
    found = store.outbox_stats()
    oldest = None if found.oldest_ns is None else max(0.0, (time.time_ns() - found.oldest_ns) / 1e9)
    return {"waiting": found.waiting, "dead": found.dead, "oldest_waiting_s": oldest}


def behind(store: Store, destination: str) -> str | None:
    """Return a line that says what to do if traces wait for long; None if they do not.

    Traces that are not finished, and those that were refused before, do not count.
    """
    count, oldest_ns = store.read(
        "SELECT count(*), min(t.start_ns + COALESCE(t.duration_ns, 0)) FROM outbox AS o"
        " JOIN traces AS t ON t.id = o.trace WHERE o.dead = 0 AND o.attempts = 0 AND o.due_ns <= ?",
        (time.time_ns(),),
    )[0]
    seconds = 0.0 if oldest_ns is None else (time.time_ns() - oldest_ns) / 1e9
    if seconds < BEHIND:
        return None
    full = destination.startswith("mlflow+") and "fidelity=fast" not in destination
    advice = "add fidelity=fast to the destination, " if full else ""
    return (
        f"delivery to {masked(destination)} falls behind: {count} traces wait, the oldest for {seconds:.0f} s. "
        f"If that grows: {advice}lower sample_rate, or give the back end more workers and a faster database."
    )


def due_now(store: Store) -> int:
    """Return how many traces wait that could be delivered now."""
    sql = "SELECT count(*) FROM outbox WHERE dead = 0 AND due_ns <= ?"
    return int(store.read(sql, (time.time_ns(),))[0][0])


def deliverer_of(store: Store) -> str | None:
    """Return which process delivers from a store, `host, process 123`; None if none does."""
    found = store.read("SELECT owner FROM lease WHERE name = ? AND expires_ns > ?", ("delivery", time.time_ns()))
    if not found or is_dead(found[0][0]):
        return None
    host, _, pid = (found[0][0].split("/") + ["", "?"])[:3]
    return f"{host}, process {pid}"


def dead_letters(store: Store, limit: int = 100) -> list[DeadLetter]:
    """Return traces whose delivery was given up, with the reasons; `Store.outbox_redeliver` tries them again."""
    return store.outbox_dead(limit)


_deliverers: weakref.WeakSet[Deliverer] = weakref.WeakSet()
_exit_hook_of: list[int] = []  # the process that has it


def _after_fork_in_child() -> None:
    for deliverer in list(_deliverers):
        deliverer._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _release_at_exit() -> None:
    if os.getpid() not in _exit_hook_of:
        _exit_hook_of[:] = [os.getpid()]
        atexit.register(_leave)


def _leave() -> None:
    for deliverer in list(_deliverers):
        deliverer.leave()
