"""From finished spans to the store, and from the store onwards.

`current()` is the pipeline in force; `use(pipeline)` puts another in its place. Both are one global, because a
process has one place that its traces go to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tracemw.forks import RenewedLock

if TYPE_CHECKING:
    from tracemw.pipeline.writer import Pipeline

_current: Pipeline | None = None
_lock = RenewedLock()
_make_default: Callable[[], Pipeline] | None = None


def current() -> Pipeline:
    """Return the pipeline in force; the first call makes it from the settings."""
    return _current if _current is not None else _first()


def installed() -> Pipeline | None:
    """Return the pipeline in force, or None where nothing has asked for one yet."""
    return _current


def use(pipeline: Pipeline | None) -> Pipeline | None:
    """Put a pipeline in force and return the one that was; None has the next one made from the settings."""
    global _current
    previous, _current = _current, pipeline
    return previous


def set_default(make: Callable[[], Pipeline]) -> None:
    """Say how the first pipeline is made (the configuration does, which this package does not import)."""
    global _make_default
    _make_default = make


def _first() -> Pipeline:
    if _make_default is None:
        raise RuntimeError("import tracemw before its parts")
    with _lock:
        if _current is None:
            use(_make_default())
    return current()
