"""Connections to one SQLite file: the file made private, connections pooled, none open across a fork.

A connection that merely exists in a forked child is a danger, even if it is never used: SQLite keeps a record of
its file locks per process, so a new connection of the child takes over the parent's entry and believes it holds
locks that only the parent has. When the parent closes, the log that the child still writes to is removed:
committed rows are lost without an error. So every connection is shut before a fork and made anew after it, on both
sides; a fork that Python does not know of (uWSGI's) is noticed by the process id.
"""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import stat
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tracemw.errors import StoreError, TracemwError
from tracemw.forks import RenewedLock
from tracemw.guard import due

from .errors import denied, explained, missing_folder
from .patience import ATTEMPT, patiently

logger = logging.getLogger("tracemw")

FORK_TIMEOUT = 5.0  # seconds a fork waits for the transactions of other threads
IDLE_LIMIT = 8  # connections kept open while nobody uses them

Prepare = Callable[[sqlite3.Connection, str, bool], None]

_files = RenewedLock()
_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


class Identity(NamedTuple):
    """Which files a path stands for at the moment.

    Attributes:
        database: Device and number of the file.
        log: Number of the log beside it; None where there is none.
        empty: The file has no content, not even a header.
    """

    database: tuple[int, int]
    log: int | None
    empty: bool


class Pool:
    """Connections to one database, for all threads of the process.

    Args:
        path: The file; None is a database in memory, which has one connection that the threads take in turn.
        create: Make the file if it is not there; False also opens a file that may only be read.
        prepare: Called with each new connection, the name of the file and whether it may be written.
    """

    def __init__(self, path: str | None, *, create: bool, prepare: Prepare) -> None:
        self.path = path
        self.name = path or "the store in memory"
        self._create = create
        self._prepare = prepare
        self.replaced = 0  # how often somebody took the file away from under us
        self._restart()
        _pools.add(self)

    def _restart(self) -> None:
        """Begin with nothing: at first, and in a forked child."""
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._idle: list[sqlite3.Connection] = []
        self._users: Counter[int] = Counter()
        self._file: Identity | None = None
        self._paused = False
        self._closed = False

    @contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection to the calling thread.

        Raises:
            StoreError: The file cannot be opened, or an SQLite error left the block.
        """
        connection, file = self._take()
        try:
            yield connection
        except sqlite3.Error as error:
            raise self._explained(error, file) from error
        finally:
            self._give_back(connection, file)

    @contextmanager
    def transaction(
        self, kind: str = "IMMEDIATE", patient: Callable[[], bool] | None = None
    ) -> Iterator[sqlite3.Connection]:
        """Lend a connection for the block, which is one transaction: all of it is stored, or nothing.

        Args:
            kind: `IMMEDIATE` to write, `DEFERRED` to read one state of the file. While another process has it
                locked, the caller waits.
            patient: Asked now and then while it waits; False ends the waiting.

        Raises:
            StoreError: The file cannot be opened, is locked for too long, or an SQLite error left the block.
        """
        connection, file = patiently(lambda: self._begin(kind), patient)
        try:
            with _ended(connection):
                yield connection
        except sqlite3.Error as error:
            raise self._explained(error, file) from error
        finally:
            self._give_back(connection, file)

    def _begin(self, kind: str) -> tuple[sqlite3.Connection, Identity | None]:
        connection, file = self._take()
        try:
            connection.execute(f"BEGIN {kind}")
            if kind == "DEFERRED":  # begins with the first read, which may meet a lock as well
                connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()
        except BaseException as error:
            _roll_back(connection)
            self._give_back(connection, file)
            if isinstance(error, sqlite3.Error):
                raise self._explained(error, file) from error
            raise
        return connection, file

    def _explained(self, error: sqlite3.Error, file: Identity | None) -> TracemwError:
        """Return the error to raise; what comes of files that were replaced meanwhile passes by itself."""
        found = explained(error, self.name)
        if isinstance(found, StoreError) and not found.retry and self._identity() != file:
            return StoreError(f"{self.name} was replaced meanwhile ({error}): it is tried again", retry=True)
        return found

    def rest(self) -> None:
        """Shut the connections that nobody uses: the last one of a file moves its log into it."""
        with self._changed:
            if self.path is not None and self._pid == os.getpid():
                self._shut_idle()

    def close(self) -> None:
        """Shut all connections; those in use are shut when they are given back."""
        if self._pid != os.getpid():
            self.after_fork_in_child()
        with self._changed:
            self._closed = True
            self._shut_idle()
            self._changed.notify_all()

    def __del__(self) -> None:
        for connection in getattr(self, "_idle", ()):  # not there if the constructor failed
            connection.close()

    def _take(self) -> tuple[sqlite3.Connection, Identity | None]:
        if self._pid != os.getpid():
            self.after_fork_in_child()
        file = self._identity()
        if self._idle and file != self._file:
            with _files:
                self._forsake(file)
        with self._changed:
            if self.path is None and threading.get_ident() in self._users:
                raise StoreError(f"{self.name} is in use by this very thread (a signal handler?)", retry=True)
            while self._paused or (self.path is None and self._users and not self._closed):
                self._changed.wait()
            if self._closed:
                raise StoreError(f"{self.name} was closed: open it again with open_store()")
            self._users[threading.get_ident()] += 1
            if self._idle:
                return self._idle.pop(), self._file
        try:
            connection = self._connect()
        except BaseException:
            self._leave()
            raise
        file = self._identity()
        with self._changed:
            self._file = file
        return connection, file

    def _give_back(self, connection: sqlite3.Connection, file: Identity | None) -> None:
        with self._changed:
            keep = not self._closed and file == self._file and len(self._idle) < IDLE_LIMIT
            if keep:
                self._idle.append(connection)
        if not keep:
            connection.close()
        self._leave()

    def _leave(self) -> None:
        thread = threading.get_ident()
        with self._changed:
            self._users[thread] -= 1
            if not self._users[thread]:
                del self._users[thread]
            self._changed.notify_all()

    def _identity(self) -> Identity | None:
        if self.path is None:
            return None
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        try:
            log = os.stat(f"{self.path}-wal").st_ino
        except OSError:
            log = None
        return Identity((found.st_dev, found.st_ino), log, found.st_size == 0)

    def _forsake(self, file: Identity | None) -> None:
        """Shut the connections to files that are no longer those that others see under their names.

        What a removed log holds is saved by that, unless another process has the database open: SQLite moves it
        into the file. An emptied file it makes unreadable, so that is emptied again.
        """
        known = self._file
        if known is None or self.path is None or not self._idle or self._identity() != file:
            return  # another thread has done it
        for pool in list(_pools):  # SQLite has one index of the log for all connections of a process
            if pool.path == self.path:
                pool.rest()
        if file is not None and file.database == known.database:
            if known.log is None:
                return  # a log came to a file that could only be read so far
            if file.empty and not known.empty:
                _empty(self.path)
        elif file is not None and file.log == known.log:
            _discard_log(self.path)  # SQLite would take it for that of the file that is there now
        self.replaced += 1
        if due(f"replaced {self.path}"):
            logger.error(
                "%s, or its -wal file, was removed, replaced or emptied while traces were written to it."
                " What was in it may be lost; traces go on to the file that is there now.", self.path
            )  # fmt: skip

    def _connect(self) -> sqlite3.Connection:
        file = self._identity()
        try:
            if self.path is None:
                mode, connection = "mode=memory", _opened(":memory:")
            else:
                with _files:
                    mode = _secured(self.path, self._create)
                connection = _opened(f"{Path(self.path).absolute().as_uri()}?{mode}")
            try:
                self._prepare(connection, self.name, not mode.startswith("mode=ro"))
            except BaseException:
                connection.close()
                raise
        except sqlite3.Error as error:
            raise self._explained(error, file) from error
        return connection

    def _shut_idle(self) -> None:
        while self._idle:
            self._idle.pop().close()

    # Around a fork.

    def before_fork(self) -> None:
        """Let the transactions of other threads end, keep new ones waiting, shut what is open."""
        deadline = time.monotonic() + FORK_TIMEOUT
        with self._changed:
            self._paused = True
            while set(self._users) - {threading.get_ident()}:
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    break
            if self.path is not None:
                self._shut_idle()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        with self._changed:
            self._paused = False
            self._changed.notify_all()

    def after_fork_in_child(self) -> None:
        """Forget the parent's connections.

        Idle ones are shut, which frees SQLite's record of the parent's locks before a connection of the child's
        own can rely on it. One that a thread was using is left alone: its locks are held by nobody who could
        release them.
        """
        inherited, closed = self._idle, self._closed
        self._restart()
        self._closed = closed
        for connection in inherited:
            connection.close()


@contextmanager
def transaction(connection: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator[None]:
    """Run the block in one transaction."""
    connection.execute(f"BEGIN {kind}")
    with _ended(connection):
        yield


@contextmanager
def _ended(connection: sqlite3.Connection) -> Iterator[None]:
    """Commit after the block, or roll back."""
    try:
        yield
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            _roll_back(connection)


def _opened(uri: str) -> sqlite3.Connection:
    return sqlite3.connect(
        uri, uri=True, timeout=ATTEMPT, isolation_level=None, check_same_thread=False, cached_statements=256
    )


def _empty(path: str) -> None:
    """Have an emptied file begin anew, without the log of what it held."""
    try:
        os.truncate(path, 0)
    except OSError as error:
        logger.error("%s cannot be made anew: %s", path, error.strerror)
    _discard_log(path)


def _discard_log(path: str) -> None:
    """Remove log and index of a file that is gone: processes that have not noticed yet still use them."""
    for name in (f"{path}-wal", f"{path}-shm"):
        try:
            os.unlink(name)
        except OSError:  # most often there is none
            pass


def _roll_back(connection: sqlite3.Connection) -> None:
    try:
        connection.execute("ROLLBACK")
    except sqlite3.Error:  # a full disk, for example, has already rolled back
        pass


def _secured(path: str, create: bool) -> str:
    """Make the file, for its owner only, or look at the one that is there; return the mode to open it with.

    The file is never opened here once it exists: closing it would drop the locks that other connections of this
    process hold on it (POSIX).

    Raises:
        StoreError: It cannot be made, or is nothing that can be opened.
    """
    if create:
        if not os.path.exists(path):
            _discard_log(path)
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o600))
        except FileExistsError:
            pass
        except FileNotFoundError:
            raise missing_folder(path) from None
        except NotADirectoryError:
            raise StoreError(f"{path} cannot be made: a part of its path is a file, not a directory") from None
        except PermissionError:
            raise denied(path, "made") from None
        except OSError as error:
            retry = error.errno not in (errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)
            raise StoreError(f"{path} cannot be made: {error.strerror}", retry=retry) from error
    try:
        kind = os.stat(path).st_mode
    except OSError as error:
        raise _absent(path, error) from error
    if not stat.S_ISREG(kind):
        raise StoreError(f"{path} is no regular file: choose another path")
    return _mode(path, create)


def _absent(path: str, error: OSError) -> StoreError:
    if os.path.islink(path):
        return StoreError(f"{path} is a link to a file that is not there: create that file, or remove the link")
    if isinstance(error, FileNotFoundError):
        return StoreError(f"there is no store at {path}: trace something first, or give the path of another one")
    if isinstance(error, PermissionError):
        return denied(path, "read")
    return StoreError(f"{path} cannot be read: {error.strerror}")


def _mode(path: str, create: bool) -> str:
    if os.access(path, os.R_OK | os.W_OK) and os.access(os.path.dirname(path) or ".", os.W_OK):
        return "mode=rw"
    if create or not os.access(path, os.R_OK):
        raise denied(path, "written" if create else "read")
    # Without its directory SQLite can make no index of the log; it needs none where there is no log.
    return "mode=ro" if os.path.exists(f"{path}-wal") else "mode=ro&immutable=1"


def _before_fork() -> None:
    for pool in list(_pools):
        pool.before_fork()


def _after_fork_in_parent() -> None:
    for pool in list(_pools):
        pool.after_fork_in_parent()


def _after_fork_in_child() -> None:
    for pool in list(_pools):
        pool.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
    )
