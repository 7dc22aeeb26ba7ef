"""The embedded store."""

from __future__ import annotations

from .database import Store, absolute, open_store
from .outbox import DeadLetter, OutboxStats
from .reader import Cursor
from .rows import SpanRow, StoredPage, StoredTrace, TraceRow
from .troubles import Trouble

__all__ = [
    "Cursor",
    "DeadLetter",
    "OutboxStats",
    "SpanRow",
    "Store",
    "StoredPage",
    "StoredTrace",
    "TraceRow",
    "Trouble",
    "absolute",
    "open_store",
]
