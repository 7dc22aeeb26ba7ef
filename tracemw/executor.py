"""A thread pool whose tasks stay in their trace.

A module of its own: `concurrent.futures.thread` cannot be imported once the main thread has ended, and a trace may
well begin then, in a thread that goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from tracemw.propagation import propagate

P = ParamSpec("P")
R = TypeVar("R")


class ContextThreadPoolExecutor(ThreadPoolExecutor):
    """A `ThreadPoolExecutor` whose tasks run in the context in which they were submitted.

    Each task, also each of `map`, gets a copy of its own. `loop.run_in_executor` works with it too.
    """

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Submit a task; arguments and result as in `concurrent.futures`."""
        return super().submit(propagate(fn), *args, **kwargs)
