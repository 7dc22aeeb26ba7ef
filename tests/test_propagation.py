"""Context into threads, out of requests, and between services."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import inspect
import logging
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from opentelemetry import context as otel_context
from opentelemetry import trace as trace_api
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, TraceFlags

from tracemw.errors import SettingError
from tracemw.executor import ContextThreadPoolExecutor
from tracemw.propagation import (
    TrustPolicy,
    detached,
    outgoing_headers,
    parse_traceparent,
    pending_links,
    propagate,
)
from tracemw.record import TraceRecord, current_record, with_record

TRACER = TracerProvider(shutdown_on_exit=False).get_tracer("test")
VALUE: contextvars.ContextVar[str] = contextvars.ContextVar("value")


@pytest.fixture(autouse=True)
def _value() -> Iterator[None]:
    token = VALUE.set("none")
    yield
    VALUE.reset(token)


def span_id() -> int:
    return trace_api.get_current_span().get_span_context().span_id


@contextmanager
def current_trace(*, recording: bool = True) -> Iterator[TraceRecord]:
    """A current span with a record, as the middleware makes them."""
    span = TRACER.start_span("root", context=otel_context.Context())
    ids = span.get_span_context()
    record = TraceRecord(ids.trace_id, ids.span_id, recording=recording)
    token = otel_context.attach(with_record(trace_api.set_span_in_context(span, otel_context.Context()), record))
    try:
        yield record
    finally:
        otel_context.detach(token)
        span.end()


def in_thread(fn: Callable[[], Any]) -> Any:
    """Run a callable in a new thread and return what it returned."""
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(fn())
        except BaseException as exc:
            result.set_exception(exc)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    return result.result(0)


class TestPropagate:
    def test_a_thread_is_in_the_trace(self) -> None:
        """A bound callable sees the span and the record that were current when it was bound."""
        with current_trace() as record:
            bound = propagate(lambda: (span_id(), current_record()))
        assert in_thread(bound) == (record.root_span_id, record)

    def test_arguments_arrive(self) -> None:
        """Positional and keyword arguments of the call reach the function, each once."""

        def call(a: int, /, b: int, *rest: int, c: int = 0, **more: int) -> tuple[Any, ...]:
            return a, b, rest, c, more

        assert propagate(call)(1, 2, 3, c=4, fn=5, args=6) == (1, 2, (3,), 4, {"fn": 5, "args": 6})
        assert propagate(functools.partial(call, 1))(2) == (1, 2, (), 0, {})
        assert propagate(str.upper)("a") == "A"

    def test_calls_overlap_and_are_isolated(self) -> None:
        """Every call has its own copy: they may run at once, and none sees what another one sets."""
        barrier = threading.Barrier(2, timeout=10)

        def work(name: str) -> tuple[str, str]:
            before = VALUE.get()
            VALUE.set(name)
            barrier.wait()
            return before, VALUE.get()

        VALUE.set("bound")
        bound = propagate(work)
        VALUE.set("later")
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(bound, "ab")) == [("bound", "a"), ("bound", "b")]
        assert VALUE.get() == "later"

    def test_it_may_be_called_while_it_runs(self) -> None:
        """A bound function may call itself."""
        bound: Callable[[int], int] = propagate(lambda n: n if n == 0 else bound(n - 1))
        assert bound(3) == 0

    def test_it_looks_like_the_function(self) -> None:
        """Name, signature and kind of the function stay, and exceptions pass untouched."""

        def fails(a: int) -> int:
            raise ZeroDivisionError

        async def coroutine() -> None: ...

        def generator() -> Iterator[int]:
            yield 1

        async def async_generator() -> AsyncGenerator[int, None]:
            yield 1

        assert inspect.signature(propagate(fails)) == inspect.signature(fails)
        with pytest.raises(ZeroDivisionError):
            propagate(fails)(1)
        assert inspect.iscoroutinefunction(propagate(coroutine))
        assert inspect.isgeneratorfunction(propagate(generator))
        assert inspect.isasyncgenfunction(propagate(async_generator))

    def test_an_object_with_an_async_call(self) -> None:
        """A callable object whose call is a coroutine function is awaited in the bound context."""

        class Job:
            async def __call__(self) -> int:
                await asyncio.sleep(0)
                return span_id()

        with current_trace() as record:
            bound = propagate(Job())
        assert asyncio.run(bound()) == record.root_span_id


class TestPropagatedSteps:
    def test_a_coroutine_runs_in_the_bound_context(self) -> None:
        """Every step of a coroutine function's body, on whatever loop, and the tasks that it starts."""

        async def work() -> list[int]:
            seen = [span_id()]
            await asyncio.sleep(0)
            seen.append(span_id())
            seen.append(await asyncio.create_task(asyncio.sleep(0, span_id())))
            async with asyncio.timeout(10) if hasattr(asyncio, "timeout") else _Nothing():
                seen.append(await asyncio.to_thread(span_id))
            return seen

        with current_trace() as record:
            bound = propagate(work)

        async def main() -> tuple[list[int], int]:
            first, second = await asyncio.gather(bound(), bound())
            assert first == second
            return first, span_id()

        assert asyncio.run(main()) == ([record.root_span_id] * 4, 0)

    def test_a_coroutine_is_cancelled_as_any(self) -> None:
        """Cancellation reaches the body, which may clean up in its context, and comes out again."""
        seen: list[int] = []

        async def work() -> None:
            try:
                await asyncio.sleep(10)
            finally:
                await asyncio.sleep(0)
                seen.append(span_id())

        with current_trace() as record:
            bound = propagate(work)

        async def main() -> None:
            task = asyncio.create_task(bound())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(main())
        assert seen == [record.root_span_id]

    def test_generators_keep_their_protocol(self) -> None:
        """`send`, `throw`, `close` and the return value pass through; the consumer's context is its own."""
        log: list[Any] = []

        def work(first: str) -> Generator[Any, Any, str]:
            try:
                log.append((yield first, span_id()))
                try:
                    yield span_id()
                except KeyError as exc:
                    log.append(exc)
                yield "last"
            finally:
                log.append(("closed", span_id()))
            return "result"

        with current_trace() as record:
            bound = propagate(work)
        steps = bound("a")
        assert (next(steps), span_id()) == (("a", record.root_span_id), 0)
        assert steps.send("sent") == record.root_span_id
        error = KeyError("k")
        assert steps.throw(error) == "last"
        with pytest.raises(StopIteration) as stopped:
            next(steps)
        assert stopped.value.value == "result"
        assert log == ["sent", error, ("closed", record.root_span_id)]
        steps = bound("b")
        next(steps)
        steps.close()
        assert log[-1] == ("closed", record.root_span_id)
        with pytest.raises(StopIteration):
            next(steps)

    def test_async_generators_keep_their_protocol(self) -> None:
        """The same for async generators: `asend`, `athrow`, `aclose`."""
        log: list[Any] = []

        async def work(first: str) -> AsyncGenerator[Any, Any]:
            try:
                log.append((yield first, span_id()))
                try:
                    await asyncio.sleep(0)
                    yield span_id()
                except KeyError as exc:
                    log.append(exc)
                yield "last"
            finally:
                await asyncio.sleep(0)
                log.append(("closed", span_id()))

        with current_trace() as record:
            bound = propagate(work)

        async def main() -> None:
            steps = bound("a")
            assert (await anext(steps), span_id()) == (("a", record.root_span_id), 0)
            assert await steps.asend("sent") == record.root_span_id
            error = KeyError("k")
            assert await steps.athrow(error) == "last"
            assert [item async for item in steps] == []
            assert log == ["sent", error, ("closed", record.root_span_id)]
            steps = bound("b")
            await anext(steps)
            await steps.aclose()
            assert log[-1] == ("closed", record.root_span_id)

        asyncio.run(main())

    def test_steps_may_be_taken_by_different_threads(self) -> None:
        """A generator bound here may be iterated by a pool, each item on another thread."""

        def work() -> Iterator[int]:
            for _ in range(3):
                yield span_id()

        with current_trace() as record:
            steps = propagate(work)()
        assert [in_thread(functools.partial(next, steps)) for _ in range(3)] == [record.root_span_id] * 3

    def test_a_thrown_exception_is_freed_at_once(self) -> None:
        """An exception that passed through does not keep itself alive in its own traceback."""

        class Payload:
            pass

        def work() -> Iterator[int]:
            yield 1

        def throw() -> weakref.ref[Payload]:
            payload = Payload()
            steps: Any = propagate(work)()
            next(steps)
            try:
                steps.throw(ValueError(payload))
            except ValueError:
                pass
            return weakref.ref(payload)

        gc.disable()
        try:
            assert throw()() is None
        finally:
            gc.enable()


class _Nothing:
    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *_: object) -> None: ...


class TestExecutor:
    def test_tasks_run_in_the_submitter_s_context(self) -> None:
        """`submit`, `map` and `run_in_executor` carry the context, on a thread that served others before."""
        with ContextThreadPoolExecutor(1) as pool:
            with current_trace() as first:
                assert pool.submit(span_id).result(10) == first.root_span_id
            with current_trace() as second:
                assert list(pool.map(lambda _: span_id(), range(2))) == [second.root_span_id] * 2
                future = pool.submit(current_record)
            assert future.result(10) is second
            assert pool.submit(current_record).result(10) is None

            async def main() -> int:
                with current_trace() as record:
                    found = await asyncio.get_running_loop().run_in_executor(pool, span_id)
                    return found - record.root_span_id

            assert asyncio.run(main()) == 0

    def test_one_copy_for_each_task(self) -> None:
        """What one task sets no other sees, not on the same thread, nor the submitter."""

        def work(name: str) -> str:
            before = VALUE.get()
            VALUE.set(name)
            return before

        with ContextThreadPoolExecutor(1) as pool:
            assert list(pool.map(work, "abc")) == ["none"] * 3
        assert VALUE.get() == "none"

    def test_arguments_and_exceptions(self) -> None:
        """As in `concurrent.futures`: arguments pass through, exceptions come back with the future."""
        with ContextThreadPoolExecutor(1) as pool:
            assert pool.submit(int, "ff", base=16).result(10) == 255
            with pytest.raises(ValueError):
                pool.submit(int, "x").result(10)
            assert isinstance(pool, ThreadPoolExecutor)


class TestDetached:
    def test_inside_there_is_no_trace(self) -> None:
        """Inside: no span, no record, nothing else of the OpenTelemetry context; afterwards all is back."""
        key = otel_context.create_key("other")
        with current_trace() as record:
            token = otel_context.attach(otel_context.set_value(key, "baggage"))
            with detached():
                assert (span_id(), current_record(), otel_context.get_value(key)) == (0, None, None)
            assert (span_id(), current_record()) == (record.root_span_id, record)
            otel_context.detach(token)

    def test_the_link_waits_for_the_next_trace(self) -> None:
        """The span that was current is remembered as a link, across threads, and only inside."""
        with current_trace() as record:
            with detached():
                (link,) = pending_links()
                assert in_thread(propagate(pending_links)) == (link,)
                with detached():  # leaving twice is leaving once
                    assert pending_links() == (link,)
            assert pending_links() == ()
        assert (link.context.trace_id, link.context.span_id) == (record.trace_id, record.root_span_id)
        assert isinstance(link, Link)

    def test_where_there_is_nothing_to_link_to(self) -> None:
        """No link without a trace, into one that is not stored, or when it is not wanted."""
        with detached():
            assert pending_links() == ()
        with current_trace(recording=False), detached():
            assert pending_links() == ()
        with current_trace(), detached(link=False):
            assert pending_links() == ()

    def test_it_does_not_keep_the_trace(self) -> None:
        """A task that lives on after the request does not keep the request's record alive."""
        gate = threading.Event()
        with ContextThreadPoolExecutor(1) as pool:
            with current_trace() as record:
                alive = weakref.ref(record)
                with detached():
                    pool.submit(gate.wait, 10)
            del record
            gc.collect()
            assert alive() is None
            gate.set()

    def test_as_a_decorator(self) -> None:
        """Each call of a decorated function leaves the trace that it is called in; every kind of function."""

        @detached()
        def plain(n: int) -> tuple[int, int]:
            return n, len(pending_links())

        @detached()
        async def coroutine() -> tuple[int, int]:
            await asyncio.sleep(0)
            return span_id(), len(pending_links())

        @detached()
        def generator() -> Iterator[int]:
            yield span_id()
            yield len(pending_links())

        @detached()
        async def async_generator() -> AsyncGenerator[int, None]:
            yield span_id()
            yield len(pending_links())

        async def main() -> tuple[tuple[int, int], list[int]]:
            return await coroutine(), [item async for item in async_generator()]

        with current_trace() as record:
            assert plain(5) == (5, 1)
            assert list(generator()) == [0, 1]
            assert asyncio.run(main()) == ((0, 1), [0, 1])
            assert span_id() == record.root_span_id

    def test_other_context_variables_stay(self) -> None:
        """Only the trace is left behind: the application's own context variables are there."""
        VALUE.set("mine")
        with current_trace(), detached():
            assert VALUE.get() == "mine"

    def test_the_block_may_fail(self) -> None:
        """An exception passes through, and the trace is current again."""
        with current_trace() as record:
            with pytest.raises(KeyError), detached():
                raise KeyError
            assert span_id() == record.root_span_id


TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
VALID = f"00-{TRACE_ID}-{SPAN_ID}-01"


class TestTraceparent:
    @pytest.mark.parametrize("value", [VALID, VALID.encode(), f" {VALID}\t"])
    def test_a_valid_one(self, value: str | bytes) -> None:
        """The caller's span, marked as remote, with its flags."""
        span = parse_traceparent(value)
        assert span == SpanContext(int(TRACE_ID, 16), int(SPAN_ID, 16), True, TraceFlags(1))
        assert span is not None and span.is_remote and span.trace_flags.sampled

    @pytest.mark.parametrize(
        "value",
        [
            None,
            "",
            "00",
            VALID[:-1],
            VALID + "-",
            VALID + "-00",
            VALID + "0",
            VALID.upper(),
            VALID.replace("00-", "0-", 1),
            "ff" + VALID[2:],
            f"00-{'0' * 32}-{SPAN_ID}-01",
            f"00-{TRACE_ID}-{'0' * 16}-01",
            f"00-{TRACE_ID}-{SPAN_ID}-0g",
            f"{VALID},{VALID}",
            f"{VALID}\n",
            f"cc-{VALID[3:]}-{'x' * 500}",
            f"cc-{VALID[3:]}x",
            "٠٠-" + VALID[3:],
        ],
    )
    def test_malformed_ones(self, value: str | None) -> None:
        """What W3C Trace Context does not allow is no caller: wrong length or case, zeros, version ff, two."""
        assert parse_traceparent(value) is None

    @pytest.mark.parametrize("value", ["cc" + VALID[2:], f"01{VALID[2:]}-what-the-future-brings"])
    def test_a_future_version(self, value: str) -> None:
        """A version that we do not know is read as far as we know it."""
        span = parse_traceparent(value)
        assert span is not None and span.span_id == int(SPAN_ID, 16)

    def test_unknown_flags_are_not_taken(self) -> None:
        """Of the flags only those that have a meaning are kept."""
        span = parse_traceparent(VALID[:-2] + "ff")
        assert span is not None and span.trace_flags == 3

    @pytest.mark.parametrize(
        ("state", "expected"),
        [
            ("rojo=00f067aa0ba902b7,congo=t61rcWkgMzE", "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"),
            (b" a=1 , ,b@v=2\t", "a=1,b@v=2"),
            (",".join(f"k{i}=v" for i in range(32)), ",".join(f"k{i}=v" for i in range(32))),
            (",".join(f"k{i}=v" for i in range(33)), ""),
            ("a=1,a=2", ""),
            ("a=1,B=2", ""),
            ("a", ""),
            ("a=\x00", ""),
            ("a=" + "x" * 257, ""),
            ("a=1," * 3000, ""),
            ("ü=1", ""),
        ],
    )
    def test_tracestate(self, state: str | bytes, expected: str, caplog: pytest.LogCaptureFixture) -> None:
        """A `tracestate` is taken whole or, when malformed, left out, without a word in the log."""
        with caplog.at_level(logging.DEBUG):
            span = parse_traceparent(VALID, state)
        assert span is not None and span.trace_state.to_header() == expected
        assert not caplog.records

    @given(
        st.binary() | st.text() | st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"),
        st.none() | st.binary() | st.text(),
    )
    @example(5, 5)
    @example(VALID, b"\xff")
    def test_any_value(self, value: Any, state: Any) -> None:
        """Whatever a stranger sends: a valid span or None, never an exception."""
        span = parse_traceparent(value, state)
        assert span is None or (span.is_valid and span.is_remote)


class TestTrustPolicy:
    @pytest.mark.parametrize("peer", ["10.0.0.1", None, "unix:", "testclient"])
    def test_everybody_or_nobody(self, peer: str | None) -> None:
        """True trusts every caller, False (the default) nobody."""
        assert TrustPolicy(True).is_trusted(peer)
        assert not TrustPolicy().is_trusted(peer)
        assert not TrustPolicy([]).is_trusted(peer)

    @pytest.mark.parametrize(
        ("peer", "trusted"),
        [
            ("10.1.2.3", True),
            ("::ffff:10.1.2.3", True),
            ("fd00::5", True),
            ("192.168.1.7", True),
            ("192.168.1.8", False),
            ("11.0.0.1", False),
            ("fe80::1%eth0", False),
            ("", False),
            ("10.1.2.3, 10.1.2.4", False),
            ("testclient", False),
            (None, False),
        ],
    )
    def test_networks(self, peer: str | None, trusted: bool) -> None:
        """Networks and addresses of both families; an IPv4 address may come mapped into IPv6."""
        policy = TrustPolicy(["10.0.0.0/8", "fd00::/8", "192.168.1.7"])
        assert policy.is_trusted(peer) is trusted
        assert policy.is_trusted(peer) is trusted

    def test_a_callable(self) -> None:
        """A callable decides on the scope or environ; where it fails, nobody is trusted."""
        policy = TrustPolicy(lambda scope: scope["trusted"])
        assert policy.is_trusted(None, {"trusted": 1})
        assert not policy.is_trusted(None, {"trusted": 0})
        assert not policy.is_trusted(None, {})

    @pytest.mark.filterwarnings("error")
    def test_an_answer_that_would_have_to_be_awaited(self) -> None:
        """A coroutine is no yes, though it counts as true; nor is a future."""

        async def yes() -> bool:
            return True

        class Promise:
            def __await__(self) -> Any:
                yield

        assert not TrustPolicy(lambda scope: yes()).is_trusted(None, {})
        assert not TrustPolicy(lambda scope: Promise()).is_trusted(None, {})

    def test_what_is_no_network(self) -> None:
        """A network that cannot be read fails when the policy is made, and the message says what is allowed."""
        with pytest.raises(SettingError, match=r"trust_traceparent: '10\.0\.0\.0/33'.*'10\.0\.0\.0/8'"):
            TrustPolicy(["10.0.0.0/33"])


class TestOutgoingHeaders:
    def test_outside_a_trace(self) -> None:
        """Without a trace there is nothing to pass on."""
        assert outgoing_headers() == {}

    def test_the_current_span_and_request(self) -> None:
        """`traceparent` of the current span, and the id of the request being handled."""
        with current_trace() as record:
            record.client_request_id = "req-1"
            expected = f"00-{record.trace_id:032x}-{record.root_span_id:016x}-"
            headers = outgoing_headers()
            assert headers["traceparent"].startswith(expected) and len(headers) == 2
            assert headers["X-Request-ID"] == "req-1"
            assert "X-Correlation-ID" in outgoing_headers("X-Correlation-ID")
            assert list(outgoing_headers(None)) == ["traceparent"]
            read = parse_traceparent(headers["traceparent"])
            assert read is not None and read.trace_id == record.trace_id

    def test_tracestate_of_a_trusted_caller(self) -> None:
        """What a trusted caller's `tracestate` says goes on to the next service."""
        remote = parse_traceparent(VALID, "a=1")
        assert remote is not None
        token = otel_context.attach(trace_api.set_span_in_context(NonRecordingSpan(remote)))
        assert outgoing_headers() == {"traceparent": VALID, "tracestate": "a=1"}
        otel_context.detach(token)

    def test_an_id_that_is_no_header_value(self) -> None:
        """An id that code has set and that would break a header is left out."""
        with current_trace() as record:
            record.client_request_id = "a\r\nSet-Cookie: x"
            assert "X-Request-ID" not in outgoing_headers()

    def test_baggage_is_not_forwarded(self) -> None:
        """Baggage in the context stays here."""
        from opentelemetry import baggage

        token = otel_context.attach(baggage.set_baggage("k", "v"))
        assert outgoing_headers() == {}
        otel_context.detach(token)
