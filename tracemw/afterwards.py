"""What an application does after its response: background tasks, closing what a request has opened.

Traced work is spans of its own below the root. Work that is not traced becomes one span, `background work`, from
the end of the response to the return of the application, if it failed or took a while. Frameworks do not tell a
middleware of such work; what it can see is that the application has not returned.
"""

from __future__ import annotations

from typing import Any, Final

from opentelemetry.context import Context

from tracemw import provider
from tracemw.failure import outcome_of, record_exception

NAME: Final = "background work"
QUICK: Final = 5_000_000  # nanoseconds; what takes less is not worth a span
BLOCKING: Final = 80_000_000  # nanoseconds; longer than the machine keeps a thread waiting that does nothing


def record_work(context: Context, start_ns: int, end_ns: int, exc: BaseException | None) -> None:
    """Record what was done after a response.

    Args:
        context: That of the request.
        start_ns: When the response had been sent.
        end_ns: When the application returned.
        exc: What it raised then.
    """
    span = provider.tracer().start_span(
        NAME, context, start_time=start_ns, record_exception=False, set_status_on_exception=False
    )
    if exc is not None:
        outcome = outcome_of(exc)
        if outcome is None:
            record_exception(span, exc)
        else:
            span.set_attribute("tracemw.outcome", outcome)
    span.end(end_ns)


class _Turns:
    """Counts the turns of the event loop in which somebody has asked.

    There is one for all threads: where several run a loop, they count more turns than there are.
    """

    loop: Any = None
    number = 0
    counting = False


_turns = _Turns()
_running_loop: Any = None


def turn() -> int:
    """Return the number of the event loop's present turn.

    Two answers differ if the caller was suspended in between. A thread that the operating system did not run for a
    while looks just as late, but is in the same turn.
    """
    loop = (_running_loop or _find_loop())()
    if not _turns.counting or _turns.loop is not loop:
        _turns.loop, _turns.counting = loop, loop is not None
        if loop is not None:
            loop.call_soon(_next_turn)
    return _turns.number


def _next_turn() -> None:
    _turns.number += 1
    _turns.counting = False


def _find_loop() -> Any:
    global _running_loop
    import asyncio

    _running_loop = asyncio._get_running_loop  # None where another library runs the loop
    return _running_loop
