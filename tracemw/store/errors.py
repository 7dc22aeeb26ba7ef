"""What SQLite says -> a StoreError that says what is wrong and what to do."""

from __future__ import annotations

import os
import sqlite3

from tracemw.errors import FilterError, StoreError, TracemwError

# Parts of SQLite's messages (its numeric codes reach Python from 3.11 on) -> our text, worth retrying.
_TEXTS: tuple[tuple[str, str, bool], ...] = (
    ("locked", "{path} is locked by another process; it is tried again, or end the process that holds it", True),
    ("is full", "the disk that holds {path} is full: free some space, or lower max_size", True),
    ("disk i/o", "the disk that holds {path} fails ({error}): check its space and its health", True),
    ("not a database", "{path} is not an SQLite database: move it away, or choose another path", False),
    ("malformed", "{path} is damaged ({error}): move it and its -wal file away, and a new one is made", False),
    ("too big", "a text is too long for {path} ({error}): lower the capture limits", False),
)


# What a filter can bring about that is well-formed.
_FILTERS = (
    ("user-defined function", "RLIKE takes too long on so many traces: narrow the search by time, or use LIKE"),
    ("too complex", "the pattern is too complex: write a shorter one"),
    ("too large", "the filter has too many conditions: values for one field go into a list: IN ('a', 'b')"),
    ("stack overflow", "the filter has too many parentheses inside one another"),
)


def explained(error: sqlite3.Error, path: str) -> TracemwError:
    """Return the error to raise instead of SQLite's."""
    message = str(error).lower()
    for part, text in _FILTERS:
        if part in message:
            return FilterError(text)
    for part, text, retry in _TEXTS:
        if part in message:
            return StoreError(text.format(path=path, error=error), retry=retry)
    if "readonly" in message or "read-only" in message:
        return denied(path, "written")
    if "unable to open" in message:
        return _unopened(path)
    return StoreError(f"{path} cannot be used: {error}", retry=isinstance(error, sqlite3.OperationalError))


def _unopened(path: str) -> StoreError:
    """Return the error for a file that SQLite cannot open, which does not say why."""
    folder = os.path.dirname(path) or "."
    if is_missing(folder):
        return missing_folder(path)
    if os.path.isdir(folder) and not _closed(path, os.R_OK) and not _closed(path, os.W_OK):
        return StoreError(f"{path} cannot be opened: check the limit of open files of this process", retry=True)
    return denied(path, "read" if _closed(path, os.R_OK) else "written")


def is_missing(path: str) -> bool:
    """True where there is nothing; False also where this user is not let so far."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last for a NUL character
        return True
    except OSError:
        pass
    return False


def missing_folder(path: str) -> StoreError:
    """Return the error for a file whose directory is not there."""
    return StoreError(f"{path} cannot be made: create the directory {os.path.dirname(path)} first")


def denied(path: str, what: str) -> StoreError:
    """Return the error for a file that this user is not let to use: whose it is, and what to do.

    Args:
        what: What cannot be done with it: `read`, `written` or `made`.
    """
    reading = what == "read"
    closed = _closed(path, os.R_OK if reading else os.W_OK)
    remedy = (
        "let this user read the directory, the file, its -wal and -shm"
        if reading
        else "make the file and its directory writable for this user"
    )
    if closed is None:
        return StoreError(f"{path} cannot be {what}: {remedy}")
    if not reading and _is_mounted_readonly(closed):
        return StoreError(
            f"{path} cannot be {what}: its file system is mounted read-only. "
            "Choose a path on one that can be written, or mount it writable"
        )
    mode, owner = _owner(closed)
    name = "it" if closed == path else closed
    said = f"{path} cannot be {what}: {name} belongs to {owner} (mode {mode}), and this process runs as"
    if owner == _me():
        return StoreError(f"{said} this very user. Choose another path, or {remedy}")
    return StoreError(f"{said} {_me()}. Run it as {owner}, choose another path, or {remedy}")


def _closed(path: str, wanted: int) -> str | None:
    """Return what of a store is closed to this user: a directory above it, itself, a file beside it."""
    folder = os.path.dirname(path) or "."
    above = folder
    while not os.access(above, os.F_OK) and os.path.dirname(above) != above:
        above = os.path.dirname(above)
    if not os.access(above, os.X_OK):
        return above
    for name in (path, f"{path}-wal", f"{path}-shm"):
        if os.path.exists(name) and not os.access(name, wanted):
            return name
    needed = wanted == os.W_OK or os.path.exists(f"{path}-wal")  # to read a log SQLite keeps an index beside it
    return folder if needed and not os.access(folder, os.W_OK) else None


def _is_mounted_readonly(path: str) -> bool:
    return hasattr(os, "statvfs") and bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def _owner(path: str) -> tuple[str, str]:
    found = os.stat(path)
    return f"{found.st_mode & 0o777:o}", _user(found.st_uid)


def _me() -> str:
    return _user(os.geteuid()) if hasattr(os, "geteuid") else "another user"


def _user(number: int) -> str:
    try:
        import pwd

        return pwd.getpwuid(number).pw_name
    except (ImportError, KeyError):
        return f"user {number}"
