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
    ("readonly", "{path} cannot be written: make the file and its directory writable for this user", False),
    ("read-only", "{path} cannot be written: make the file and its directory writable for this user", False),
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
    if "unable to open" in message:
        return _unopened(path)
    return StoreError(f"{path} cannot be used: {error}", retry=isinstance(error, sqlite3.OperationalError))


def _unopened(path: str) -> StoreError:
    """Return the error for a file that SQLite cannot open, which does not say why."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        return missing_folder(path)
    if not os.access(path, os.R_OK | os.W_OK) or not os.access(folder, os.W_OK):
        return unwritable(path)
    return StoreError(f"{path} cannot be opened: check the limit of open files of this process", retry=True)


def missing_folder(path: str) -> StoreError:
    """Return the error for a file whose directory is not there."""
    return StoreError(f"{path} cannot be made: create the directory {os.path.dirname(path)} first")


def unwritable(path: str) -> StoreError:
    """Return the error for a file that this user may not write."""
    return StoreError(f"{path} cannot be written: make the file and its directory writable for this user")
