"""One mechanism keeps our own failures out of the application that we trace.

Every hook of ours that runs inside a request goes through `guarded`: what it raises is counted and logged,
at most once a minute for each place, and a fallback is returned in its stead. Exceptions of the application
never pass through here.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from tracemw.errors import SettingError

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger("tracemw")

LOG_INTERVAL = 60.0  # seconds between two log lines for one place

_failures: dict[str, int] = {}
_last_logged: dict[str, float] = {}


def guarded(fallback: Any = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a hook so that its failure is reported instead of raised.

    Args:
        fallback: What the hook returns when it failed.
    """

    def decorate(hook: Callable[P, R]) -> Callable[P, R]:
        return functools.wraps(hook)(_guard(hook, hook.__qualname__, fallback))

    return decorate


def _guard(hook: Any, place: str, fallback: Any) -> Any:
    """Wrap a hook; one that takes only itself, or one or two arguments, is called without a detour: it may be on
    the way of every request."""

    def call0(self: Any, /) -> Any:
        try:
            return hook(self)
        except Exception as exc:
            report(place, exc)
            return fallback

    def call1(self: Any, argument: Any, /) -> Any:
        try:
            return hook(self, argument)
        except Exception as exc:
            report(place, exc)
            return fallback

    def call2(self: Any, first: Any, second: Any, /) -> Any:
        try:
            return hook(self, first, second)
        except Exception as exc:
            report(place, exc)
            return fallback

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return hook(*args, **kwargs)
        except Exception as exc:
            report(place, exc)
            return fallback

    code = hook.__code__
    plain = not (hook.__defaults__ or code.co_kwonlyargcount or code.co_flags & _VARIADIC)
    return {1: call0, 2: call1, 3: call2}.get(code.co_argcount, call) if plain else call


_VARIADIC = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS


def report(place: str, exc: BaseException) -> None:
    """Count a failure of ours and log it, at most once a minute for each place.

    A wrong setting is a line of its own, the same for all the places that meet it.
    """
    try:
        _failures[place] = _failures.get(place, 0) + 1
        if isinstance(exc, SettingError):
            tracing_is_off(exc)
        elif due(place):
            logger.error("tracing failed in %s; the request goes on without it", place, exc_info=exc)
    except Exception:  # a logging handler of the application may be broken as well
        pass


def tracing_is_off(exc: SettingError) -> None:
    """Log that a wrong setting keeps us from tracing."""
    if due(f"setting {exc}"):
        logger.error("tracing is off: %s", exc)


def due(key: str, interval: float = LOG_INTERVAL) -> bool:
    """Say whether a message of this key may be logged now (and take note that it is)."""
    now = time.monotonic()
    last = _last_logged.get(key)
    if last is not None and now - last < interval:
        return False
    _last_logged[key] = now
    return True


def failures() -> dict[str, int]:
    """Return how often each guarded place failed in this process."""
    return dict(_failures)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_failures.clear)  # they are the parent's
