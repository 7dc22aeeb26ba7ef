"""Traced generators: a span from the first step to the last, current only while the generator's own code runs.

The context of the generator's code is put in place before each step and taken out after it, with whatever spans
the code has open then: so no context leaks to the consumer, and any thread or task may take the next step.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Generator
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import context as otel_context

from tracemw.capture import Limits, dumps
from tracemw.guard import report
from tracemw.runtime import runtime

if TYPE_CHECKING:
    from tracemw.decorator import Call, Plan

logger = logging.getLogger("tracemw")

CHUNK_EVENT: Final = "mlflow.chunk.item."
CHUNK_VALUE: Final = "mlflow.chunk.value"
CHUNKS: Final = "tracemw.chunks"
CHUNKS_KEPT: Final = "tracemw.chunks_kept"

# The SDK keeps 128 events of a span and drops the oldest; the exception and the code's own events need room, too.
EVENT_LIMIT: Final = 100
EVENT_VALUE: Final = Limits(depth=6, items=100, nodes=200, string=1_000, chars=2_000)
KEPT_ITEMS: Final = 10_000  # chunks that the output or the reducer gets
KEPT_SIZE: Final = 4_000_000  # characters or bytes of them


class Stream:
    """One run of a traced generator: its span, and what it has yielded."""

    __slots__ = ("_call", "_context", "_outside", "_chunks", "_kept", "_size", "_done", "__weakref__")

    def __init__(self, call: Call) -> None:
        self._call = call
        self._context = call.scope.context
        self._outside = call.scope.previous
        self._chunks = 0
        self._kept: list[Any] = []
        self._size = 0
        self._done = False

    def enter(self) -> None:
        """Put the context of the generator's code in place."""
        self._outside = otel_context.get_current()
        otel_context.attach(self._context)

    def leave(self) -> None:
        """Put the consumer's context back; what the code has made current stays with the code."""
        self._context = otel_context.get_current()
        otel_context.attach(self._outside)

    def chunk(self, item: Any) -> None:
        """Take note of what was yielded."""
        number = self._chunks
        self._chunks += 1
        if not self._call.recording:
            return
        try:
            if number < EVENT_LIMIT:
                value = dumps(item, EVENT_VALUE, runtime().redactor)
                self._call.scope.span.add_event(f"{CHUNK_EVENT}{number}", {CHUNK_VALUE: value})
            if number == len(self._kept) and number < KEPT_ITEMS:
                size = len(item) if isinstance(item, (str, bytes)) else 0
                if self._size + size <= KEPT_SIZE:
                    self._size += size
                    self._kept.append(item)
        except Exception as exc:
            report("trace: chunk", exc)

    def end(self, exc: BaseException | None = None) -> None:
        """End the span: after the last step (None), or with what left the generator."""
        if self._done:
            return
        self._done = True
        call, kept = self._call, self._kept
        self._kept = []
        if not call.recording:
            return
        try:
            if exc is not None:
                call.scope.fail(exc)
            call.finish_stream(self._chunks, kept)
        except Exception as failure:
            report("trace", failure)

    def __del__(self) -> None:
        # An asynchronous generator that is dropped where no event loop can close it comes here.
        if not self._done:
            self.end(GeneratorExit())


def output_of(kept: list[Any], reducer: Callable[[list[Any]], Any] | None) -> Any:
    """Return the output of a stream: the list of its chunks, or what the reducer makes of it."""
    if reducer is None:
        return kept
    try:
        return reducer(kept)
    except Exception as exc:
        logger.warning("output_reducer failed (%s: %s); the list of chunks is kept", type(exc).__name__, exc)
        return kept


def traced_generator(plan: Plan) -> Callable[..., Generator[Any, Any, Any]]:
    """Return a generator function that traces each run of the plan's one."""
    fn = plan.fn

    def traced(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        stream = _opened(plan, args, kwargs)
        if stream is None:
            return (yield from fn(*args, **kwargs))
        value: Any = None
        try:
            generator = fn(*args, **kwargs)
            step: Callable[[Any], Any] = generator.send
            while True:
                stream.enter()
                try:
                    item = step(value)
                except StopIteration as stop:
                    result = stop.value
                    break
                finally:
                    stream.leave()
                stream.chunk(item)
                value = None
                try:
                    value = yield item
                    step = generator.send
                except GeneratorExit:
                    stream.enter()
                    try:
                        generator.close()
                    finally:
                        stream.leave()
                    raise
                except BaseException as exc:
                    step, value = generator.throw, exc
        except BaseException as exc:
            stream.end(exc)
            raise
        finally:
            value = None  # an exception kept here would keep this frame
        stream.end()
        return result

    return traced


def traced_async_generator(plan: Plan) -> Callable[..., AsyncGenerator[Any, Any]]:
    """Return an asynchronous generator function that traces each run of the plan's one."""
    fn = plan.fn

    async def traced(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        stream = _opened(plan, args, kwargs)
        value: Any = None
        try:
            generator = fn(*args, **kwargs)
            step: Callable[[Any], Any] = generator.asend
            while True:
                if stream is not None:
                    stream.enter()
                try:
                    item = await step(value)
                except StopAsyncIteration:
                    break
                finally:
                    if stream is not None:
                        stream.leave()
                if stream is not None:
                    stream.chunk(item)
                value = None
                try:
                    value = yield item
                    step = generator.asend
                except GeneratorExit:
                    if stream is not None:
                        stream.enter()
                    try:
                        await generator.aclose()
                    finally:
                        if stream is not None:
                            stream.leave()
                    raise
                except BaseException as exc:
                    step, value = generator.athrow, exc
        except BaseException as exc:
            if stream is not None:
                stream.end(exc)
            raise
        finally:
            value = None  # an exception kept here would keep this frame
        if stream is not None:
            stream.end()

    return traced


def _opened(plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Stream | None:
    try:
        call = plan.open(args, kwargs)
        return None if call is None else Stream(call)
    except Exception as exc:
        report("trace", exc)
        return None


def tell(span: Any, chunks: int, kept: int) -> None:
    """Write the number of chunks onto the span, and how many of them the output has where it has not all."""
    span.set_attribute(CHUNKS, chunks)
    if kept < chunks:
        span.set_attribute(CHUNKS_KEPT, kept)
