"""The store as the rest of tracemw sees it: one object per process and file."""

from __future__ import annotations

import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tracemw.errors import FilterError, StoreError

from . import arrivals, outbox, reader, reindex, retention, troubles, writer
from .codec import cleaned_spans, cleaned_traces, within
from .connections import Pool
from .outbox import DeadLetter, OutboxStats
from .patience import is_lock, leave_free, patiently
from .reader import Cursor
from .rows import SpanRow, StoredPage, StoredTrace, TraceRow
from .schema import prepare
from .troubles import Trouble

if TYPE_CHECKING:
    from .arrivals import Arrival
    from .compare import Group
    from .filter import Order, Where

LONGEST = 9e9  # seconds; ages beyond it are the same as none
MOST = 2**31  # traces of one page; more than a file holds

# What a row with a text or a number that SQLite cannot take raises; the rows are then cleaned and written again.
_UNCLEAN = (
    ValueError, TypeError, AttributeError, OverflowError,
    sqlite3.InterfaceError, sqlite3.ProgrammingError, sqlite3.IntegrityError, sqlite3.DataError,
)  # fmt: skip


class _Unwritable(Exception):
    """A row holds what SQLite cannot take."""


def open_store(url: str, *, create: bool = True) -> Store:
    """Open a store.

    Args:
        url: `sqlite:///relative.db`, `sqlite:////absolute.db`, or `memory:` for one that only
            this object has.
        create: Make the file where there is none; False also opens a file that may only be read.

    Raises:
        StoreError: The file cannot be used; the message says why and what to do.
    """
    return Store(url, create=create)


class Store:
    """Traces in one SQLite file. Any thread may use it, also after a fork.

    Attributes:
        url: As it was given.
        path: The file, absolute; None in memory.
    """

    def __init__(self, url: str, *, create: bool = True) -> None:
        self.url = url
        self.path = _path(url)
        self._pool = Pool(self.path, create=create, prepare=prepare)
        self._counts: Counter[str] = Counter()
        self._recent = arrivals.Recent()
        with self._reading():  # an unusable file is told of now
            pass

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections. Later calls raise StoreError."""
        self._pool.close()

    def rest(self) -> None:
        """Close the connections that nobody uses now: the last one moves the log into the file."""
        self._pool.rest()

    @property
    def replaced(self) -> int:
        """How often somebody removed, replaced or emptied the file under this object."""
        return self._pool.replaced

    # Writing.

    def write(
        self,
        traces: Sequence[TraceRow],
        spans: Sequence[SpanRow],
        arrived: Sequence[Arrival] = (),
        *,
        outbox: bool = False,
        patient: Callable[[], bool] | None = None,
    ) -> None:
        """Store traces and spans in one transaction; those that are there already are brought up to date.

        A span whose trace is not there makes one that is in progress. NUL characters and lone surrogates become
        U+FFFD, integers beyond 64 bits the nearest one.

        Args:
            arrived: Further traces, with their spans; where they are among the others, those say what is newer.
            outbox: Also queue the traces for delivery.
            patient: Asked now and then while another process has the file locked; False ends the waiting.

        Raises:
            StoreError: Nothing was stored; `retry` tells whether it is worth trying again.
        """
        if not (traces or spans or arrived):
            return
        try:
            return self._write(traces, spans, arrived, outbox, patient)
        except _Unwritable:
            pass
        traces, spans = _with_rows_of(arrived, traces, spans)
        try:
            self._write(cleaned_traces(traces), cleaned_spans(spans), (), outbox, patient)
        except (_Unwritable, *_UNCLEAN) as error:
            raise StoreError(f"a row cannot be stored: {error.__cause__ or error}") from error

    def _write(
        self,
        traces: Sequence[TraceRow],
        spans: Sequence[SpanRow],
        arrived: Sequence[Arrival],
        outbox: bool,
        patient: Callable[[], bool] | None,
    ) -> None:
        try:
            trace_ids = {row.trace_id for row in traces} | {span.trace_id for span in spans}
        except _UNCLEAN as error:
            raise _Unwritable from error
        whole = {arrival.trace_id for arrival in arrived}
        if len(whole) < len(arrived) or not whole.isdisjoint(trace_ids):  # there is more of one of them
            traces, spans = _with_rows_of(arrived, traces, spans)
            arrived = ()
        trace_ids |= whole
        if self._recent.has_any(trace_ids) or not self._write_new(traces, spans, arrived, outbox, patient):
            traces, spans = _with_rows_of(arrived, traces, spans)
            with self._pool.transaction(patient=patient) as connection:
                try:
                    writer.write(connection, traces, spans, outbox)
                except _UNCLEAN as error:
                    raise _Unwritable from error
        self._recent.add(trace_ids)

    def _write_new(
        self,
        traces: Sequence[TraceRow],
        spans: Sequence[SpanRow],
        arrived: Sequence[Arrival],
        outbox: bool,
        patient: Callable[[], bool] | None,
    ) -> bool:
        """Store a few rows of new traces by one statement; False where they are not, or it cannot."""

        def insert() -> bool:
            with self._pool.connection() as connection:
                try:
                    arrivals.insert(connection, new)
                except sqlite3.Error as error:
                    if is_lock(error):
                        raise
                    return False
            return True

        if not arrivals.fit(len(arrived) + max(len(traces), len(spans))):
            return False
        try:
            new = [*arrived, *arrivals.of_rows(traces, spans, outbox)]
            return arrivals.fit(sum(arrival.rows for arrival in new)) and patiently(insert, patient)
        except _UNCLEAN:
            return False

    def patch(
        self,
        trace_id: str,
        *,
        tags: Mapping[str, str | None] | None = None,
        metadata: Mapping[str, str | None] | None = None,
        outbox: bool = False,
        **columns: Any,
    ) -> bool:
        """Change facts of a stored trace. None removes a tag, a key of the metadata, or an optional fact.

        Args:
            outbox: Also queue the trace for delivery.
            columns: Fields of `TraceRow` that say something of the request: `state`, `session_id` ...

        Returns:
            False where there is no such trace.

        Raises:
            TypeError: There is no such field, or it cannot be changed.
            StoreError: The file cannot be written.
        """
        unknown = columns.keys() - writer.PATCHABLE
        if unknown:
            raise TypeError(f"a trace has no {', '.join(sorted(unknown))} that can be changed")
        with self._writing() as connection:
            return writer.patch(connection, trace_id, tags or {}, metadata or {}, columns, outbox)

    def delete(
        self,
        *,
        trace_ids: Iterable[str] | None = None,
        older_than_ns: int | None = None,
        filter_string: str | None = None,
        max_traces: int | None = None,
    ) -> int:
        """Delete the traces that meet all conditions given, the oldest first, and return how many.

        Raises:
            ValueError: No condition was given.
            FilterError: The filter cannot be understood.
            StoreError: The file cannot be written.
        """
        if trace_ids is None and older_than_ns is None and filter_string is None:
            raise ValueError("say which traces to delete: trace_ids, older_than_ns or filter_string")
        named = None if trace_ids is None else list(trace_ids)
        if older_than_ns is not None:
            older_than_ns = within(older_than_ns)
        where = _where(filter_string)
        removed = 0
        while max_traces is None or removed < max_traces:
            limit = retention.CHUNK_TRACES
            if max_traces is not None:
                limit = min(limit, max_traces - removed)
            with self._writing() as connection:
                ids = reader.matching(connection, where, older_than_ns, named, limit)
                count = retention.remove(connection, retention.bounded(connection, ids))
            removed += count
            if not count:
                break
        self._shrink()
        return removed

    def purge(self, max_age_s: float | None = None, max_size_bytes: int | None = None) -> int:
        """Remove the oldest traces until none is too old and the file's rows are small enough.

        What waits for delivery goes last, when nothing else is over the limit; `stats()` counts it separately.

        Returns:
            How many traces were removed.

        Raises:
            StoreError: The file cannot be written.
        """
        before = None if max_age_s is None else time.time_ns() - int(min(max_age_s, LONGEST) * 1e9)
        excess = retention.Excess(before, max_size_bytes)
        removed = 0
        for undelivered in (False, True):
            while count := self._purge_chunk(excess, undelivered):
                removed += count
        if before is not None:
            with self._writing() as connection:
                troubles.forget(connection, before)
        self._shrink()
        return removed

    def reindex(self) -> None:
        """Give the traces of an older file the words that searches look for, a few at a time."""
        reindex.finish(self._writing)

    @property
    def purged_undelivered(self) -> int:
        """How many traces this process removed by the limits before they were delivered."""
        return self._counts["purged_undelivered"]

    def note_trouble(self, process: str, trouble: Mapping[str, Any]) -> None:
        """Note what went wrong in a process, in place of what was noted of it before.

        Args:
            process: What tells it from all others.
            trouble: Values that JSON has.
        """
        with self._writing() as connection:
            troubles.note(connection, process, trouble)

    def troubles(self) -> list[Trouble]:
        """Return what was noted of processes, the newest note first."""
        with self._reading() as connection:
            return troubles.noted(connection)

    def _purge_chunk(self, excess: retention.Excess, undelivered: bool) -> int:
        began = time.perf_counter()
        with self._writing() as connection:
            ids = excess.next_chunk(connection, undelivered)
            count = retention.remove(connection, ids) if ids else 0
        self._counts["purged_undelivered" if undelivered else "purged"] += count
        if count:
            leave_free(began)
        return count

    def _shrink(self) -> None:
        """Rewrite the token index if need be, and give free pages back to the disk."""
        with self._reading() as connection:
            more = retention.littered(connection)
        first = True
        while more:
            with self._writing() as connection:
                more = retention.merge(connection, first)
            first = False
        more = self.path is not None
        while more:
            more = patiently(self._vacuum)

    def _vacuum(self) -> bool:
        with self._pool.connection() as connection:
            return retention.vacuum(connection)

    # Reading.

    def get(self, trace_id: str, *, spans: bool = True) -> StoredTrace | None:
        """Return one trace, None where there is none of this id."""
        with self._reading() as connection:
            return reader.by_trace_id(connection, trace_id, spans)

    def search(
        self,
        filter_string: str | None = None,
        order_by: Sequence[str] | None = None,
        max_results: int = 100,
        page_token: str | None = None,
        include_spans: bool = True,
    ) -> StoredPage:
        """Return one page of the traces that match, newest first unless ordered otherwise.

        Raises:
            FilterError: The filter, the order or the page token cannot be understood.
            StoreError: The file cannot be read.
        """
        limit = _limit(max_results)
        orders = reader.order_texts(order_by)
        where, order, query = _where(filter_string), _order(orders), [filter_string, orders]
        after = None if page_token is None else reader.place_of(page_token, query, reader.length(order))
        with self._reading() as connection:
            ids, place = reader.page(connection, where, order, limit, after)
            traces = reader.by_ids(connection, ids, include_spans)
        return StoredPage(traces, None if place is None else reader.token_of(place, query))

    def compare(self, by: str, filter_string: str | None = None, baseline: str | None = None) -> list[Group]:
        """Return counts, error rates and latencies for each value of a key (see `compare.py`)."""
        from .compare import compare

        return compare(self, by, filter_string, baseline)

    def changes(self, after: Cursor | int | None = None, limit: int = 100) -> tuple[list[StoredTrace], Cursor]:
        """Return traces that have finished since a place in the stream of traces, and the new place.

        Args:
            after: The place that the last call returned, or a row's number; None is the end: nothing is returned
                but the place from which what comes is seen.
            limit: Rows to look at.
        """
        with self._reading() as connection:
            if after is None:
                return [], reader.end(connection)
            cursor = Cursor(after) if isinstance(after, int) else after
            ids, cursor = reader.finished_after(connection, cursor, limit)
            return reader.by_ids(connection, ids, True), cursor

    def read(self, sql: str, params: Sequence[Any] = ()) -> list[Any]:
        """Return the rows of a query over the tables of `layout.py`."""
        with self._reading() as connection:
            rows: list[Any] = connection.execute(sql, params).fetchall()
            return rows

    def stats(self) -> dict[str, Any]:
        """Return how much the store holds, what waits for delivery, and what this process purged."""
        with self._reading() as connection:
            found = reader.counts(connection) | {"size_bytes": retention.used(connection)}
            waiting = outbox.stats(connection)
        found["file_bytes"] = sum(os.path.getsize(name) for name in self._files() if os.path.exists(name))
        found |= {"waiting": waiting.waiting, "dead": waiting.dead, "oldest_waiting_ns": waiting.oldest_ns}
        return found | {"purged": 0, "purged_undelivered": 0} | self._counts

    # Delivery.

    def outbox_claim(
        self, limit: int = 100, now_ns: int | None = None, *, max_spans: int = 5000
    ) -> list[StoredTrace]:
        """Return traces that are due for delivery, whole, in order of their rows; at least one, if any is due."""
        with self._reading() as connection:
            ids = outbox.claim(connection, limit, time.time_ns() if now_ns is None else now_ns, max_spans)
            return reader.by_ids(connection, ids, True)

    def outbox_done(self, delivered: Iterable[tuple[int, int]]) -> int:
        """Take delivered traces (`id` and `revision` as claimed) out; one that changed meanwhile stays."""
        with self._writing() as connection:
            return outbox.done(connection, delivered)

    def outbox_failed(
        self, items: Iterable[tuple[int, int]], reason: str, due_ns: int, *, dead: bool = False
    ) -> None:
        """Note that traces (`id` and `revision` as claimed) were not delivered.

        Args:
            due_ns: When to try again.
            dead: Give up, unless the trace changed meanwhile.
        """
        with self._writing() as connection:
            outbox.failed(connection, items, reason, due_ns, dead)

    def outbox_dead(self, limit: int = 100) -> list[DeadLetter]:
        """Return traces whose delivery was given up, in order of their rows."""
        with self._reading() as connection:
            return outbox.dead_letters(connection, limit)

    def outbox_redeliver(self, trace_ids: Iterable[str] | None = None) -> int:
        """Have traces that were given up tried again, all or those named; return how many."""
        with self._writing() as connection:
            return outbox.redeliver(connection, trace_ids)

    def outbox_stats(self) -> OutboxStats:
        """Return what waits for delivery."""
        with self._reading() as connection:
            return outbox.stats(connection)

    def lease(self, name: str, owner: str, ttl_s: float) -> bool:
        """Take or renew a lease; False while another owner has it."""
        with self._writing() as connection:
            return outbox.lease(connection, name, owner, ttl_s)

    def release(self, name: str, owner: str) -> None:
        """Give a lease back, if this owner has it."""
        with self._writing() as connection:
            outbox.release(connection, name, owner)

    def _files(self) -> list[str]:
        return [] if self.path is None else [self.path, f"{self.path}-wal"]

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._pool.transaction() as connection:
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._pool.transaction("DEFERRED") as connection:
            yield connection


def absolute(url: str) -> str:
    """Return the URL of a store with its path from the root on: it stays the same whatever the directory."""
    try:
        path = _path(url)
    except (StoreError, OSError):  # told of when it is opened
        return url
    return url if path is None else f"sqlite:///{path}"


def _path(url: str) -> str | None:
    if url == "memory:":
        return None
    path = url.removeprefix("sqlite:///")
    if path == url or not path:
        raise StoreError(f"{url!r} is no store: write sqlite:///file.db, sqlite:////absolute/file.db, or memory:")
    if "\0" in path:
        raise StoreError(f"{url!r} is no store: there is a NUL character in the path")
    return os.path.abspath(path)


def _limit(max_results: int) -> int:
    if isinstance(max_results, bool) or not isinstance(max_results, int):
        raise FilterError(f"max_results is {max_results!r}: it must be a whole number")
    if max_results < 1:
        raise FilterError(f"max_results is {max_results}: ask for 1 trace at least")
    return min(max_results, MOST)


def _with_rows_of(
    arrived: Sequence[Arrival], traces: Sequence[TraceRow], spans: Sequence[SpanRow]
) -> tuple[list[TraceRow], list[SpanRow]]:
    """Return all as rows, those that arrived first: what the others say of the same trace is newer."""
    before, more = arrivals.rows_of(arrived)
    return [*before, *traces], [*more, *spans]


def _where(filter_string: str | None) -> Where | None:
    if filter_string is None or not filter_string.strip():
        return None
    from .filter import compile_filter

    return compile_filter(filter_string)


def _order(orders: Sequence[str]) -> Order | None:
    if not orders:
        return None
    from .filter import compile_order

    return compile_order(orders)
