"""Decorators that stand with `@trace` on a handler, of every kind that is met in applications."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

Handler = Callable[..., Any]


def timed(fn: Handler) -> Handler:
    """A decorator as they should be: `functools.wraps`, and the kind of the function kept."""
    if inspect.isasyncgenfunction(fn):

        @functools.wraps(fn)
        async def async_generator(*args: Any, **kwargs: Any) -> Any:
            async for part in fn(*args, **kwargs):
                yield part

        return async_generator
    if inspect.isgeneratorfunction(fn):

        @functools.wraps(fn)
        def generator(*args: Any, **kwargs: Any) -> Any:
            yield from fn(*args, **kwargs)

        return generator
    if inspect.iscoroutinefunction(fn):

        @functools.wraps(fn)
        async def coroutine(*args: Any, **kwargs: Any) -> Any:
            return await fn(*args, **kwargs)

        return coroutine

    @functools.wraps(fn)
    def function(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return function


def bare(fn: Handler) -> Handler:
    """A decorator without `functools.wraps`: only its closure tells what it wraps."""
    if inspect.isasyncgenfunction(fn):

        async def async_generator(number: int) -> Any:
            async for part in fn(number):
                yield part

        return async_generator
    if inspect.isgeneratorfunction(fn):

        def generator(number: int) -> Any:
            yield from fn(number)

        return generator
    if inspect.iscoroutinefunction(fn):

        async def coroutine(number: int) -> Any:
            return await fn(number)

        return coroutine

    def function(number: int) -> Any:
        return fn(number)

    return function


def cached(key: Callable[..., str], seconds: int = 5) -> Callable[[Handler], Handler]:
    """A decorator with arguments, one of them a function."""

    def decorate(fn: Handler) -> Handler:
        wrapped = timed(fn)

        def describe() -> str:
            return key() + str(seconds)

        wrapped.describe = describe  # type: ignore[attr-defined]
        return wrapped

    return decorate


def marked(fn: Handler) -> Handler:
    """A decorator that leaves a note on the function and returns it."""
    fn.marked = True  # type: ignore[attr-defined]
    return fn


OTHERS: dict[str, Callable[[Handler], Handler]] = {
    "timed": timed,
    "bare": bare,
    "cached": cached(lambda: "key"),
    "marked": marked,
}
