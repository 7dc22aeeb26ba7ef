"""The errors that tracemw raises on purpose; every message says what to do."""

from __future__ import annotations


class TracemwError(Exception):
    """Base of every error that tracemw raises on purpose."""


class SettingError(TracemwError, ValueError):
    """A setting is unknown or has a value that it does not allow."""


class StoreError(TracemwError):
    """The local store cannot be read or written.

    Attributes:
        retry: True where trying again later may succeed (a lock, a full disk), False where it will not
            (a file that is no SQLite database, one made by a newer tracemw).
    """

    def __init__(self, message: str, *, retry: bool = False) -> None:
        super().__init__(message)
        self.retry = retry


class FilterError(TracemwError, ValueError):
    """A filter or an order string cannot be understood; the message points at the place."""


class NotFoundError(TracemwError, LookupError):
    """No trace or span has the id that was given."""
