"""The embedded store."""

from __future__ import annotations

from .rows import SpanRow, StoredPage, StoredTrace, TraceRow

__all__ = ["SpanRow", "StoredPage", "StoredTrace", "TraceRow"]
