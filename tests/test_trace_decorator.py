"""`@trace`: what it records of a call, what it leaves alone, and what it may be put on."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tracemw
from tracemw import SpanStatusCode, config, guard, stamps
from tracemw.binding import ArgumentNames
from tracemw.errors import TracemwError
from tracemw.testing import CapturedTraces, capture_traces


def only_span(traces: CapturedTraces) -> Any:
    """The one span of the one trace."""
    (trace,) = traces
    (span,) = trace.data.spans
    return span


@tracemw.trace
def module_level(a: int) -> int:
    """Add one."""
    return a + 1


class Shop:
    """Every kind of method, with the decorator above and below."""

    def __len__(self) -> int:
        return 0  # falsy: `self` must not be recorded for that

    @tracemw.trace
    def method(self, a: int, b: int = 2) -> int:
        return a + b

    @tracemw.trace
    @classmethod
    def class_below(cls, a: int, b: int = 2) -> int:
        return a + b

    @classmethod
    @tracemw.trace
    def class_above(cls, a: int, b: int = 2) -> int:
        return a + b

    @tracemw.trace
    @staticmethod
    def static_below(a: int, b: int = 2) -> int:
        return a + b

    @staticmethod
    @tracemw.trace
    def static_above(a: int, b: int = 2) -> int:
        return a + b

    @tracemw.trace
    async def coroutine(self, a: int, b: int = 2) -> int:
        await asyncio.sleep(0)
        return a + b

    def untraced(self, a: int, b: int = 2) -> int:
        return a + b

    def __call__(self, a: int, b: int = 2) -> int:
        return a + b


class AsyncCallable:
    """An object that is called with await."""

    async def __call__(self, a: int, b: int = 2) -> int:
        return a + b


def plain(a: int, b: int = 2) -> int:
    return a + b


async def coroutine(a: int, b: int = 2) -> int:
    return a + b


@pytest.mark.parametrize(
    ("traced", "name"),
    [
        (tracemw.trace(plain), "plain"),
        (tracemw.trace(coroutine), "coroutine"),
        (Shop().method, "method"),
        (Shop.class_below, "class_below"),
        (Shop().class_above, "class_above"),
        (Shop.static_below, "static_below"),
        (Shop().static_above, "static_above"),
        (Shop().coroutine, "coroutine"),
        (tracemw.trace(Shop()), "Shop"),
        (tracemw.trace(AsyncCallable()), "AsyncCallable"),
        (tracemw.trace(functools.partial(plain, b=2)), "plain"),
        (tracemw.trace(functools.partial(coroutine, b=2)), "coroutine"),
        (tracemw.trace(Shop().untraced), "untraced"),
        (tracemw.trace(name="given")(plain), "given"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_kind_of_callable_is_one_span(
    captured_traces: CapturedTraces, traced: Callable[..., Any], name: str
) -> None:
    """Whatever is called, a call is one span with the function's name, its arguments by name and its result."""
    result = traced(40)
    if inspect.isawaitable(result):
        result = asyncio.run(_awaited(result))
    assert result == 42
    span = only_span(captured_traces)
    assert (span.name, span.inputs, span.outputs) == (name, {"a": 40, "b": 2}, 42)
    assert span.status.status_code == SpanStatusCode.OK
    assert span.start_time_ns <= span.end_time_ns


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


def test_the_function_looks_the_same(captured_traces: CapturedTraces) -> None:
    """Name, documentation, signature and kind are the function's own; the function itself is at `__wrapped__`."""
    assert module_level.__name__ == "module_level"
    assert module_level.__doc__ == "Add one."
    assert list(inspect.signature(module_level).parameters) == ["a"]
    assert module_level.__wrapped__(1) == 2  # type: ignore[attr-defined]
    assert hasattr(module_level, "__tracemw_traced__")
    assert pickle.loads(pickle.dumps(module_level)) is module_level
    assert inspect.iscoroutinefunction(tracemw.trace(coroutine))
    assert not inspect.iscoroutinefunction(tracemw.trace(plain))
    assert len(captured_traces) == 0


def test_options_are_on_the_span(captured_traces: CapturedTraces) -> None:
    """Name, type and attributes are as given; a value of any kind can be an attribute."""

    @tracemw.trace(name="search", span_type="RETRIEVER", attributes={"top_k": 3, "index": {"docs": ["a"]}})
    def find(query: str) -> list[str]:
        return [query]

    find("x")
    span = only_span(captured_traces)
    assert (span.name, span.span_type) == ("search", "RETRIEVER")
    assert span.attributes["top_k"] == 3
    assert span.attributes["index"] == {"docs": ["a"]}
    assert span.attributes["mlflow.spanFunctionName"] == "find"


def test_what_the_body_sets_wins(captured_traces: CapturedTraces) -> None:
    """`set_inputs` and `set_outputs` in the body replace what the decorator would record."""

    @tracemw.trace
    def answer(question: str) -> str:
        span = tracemw.get_current_active_span()
        assert span is not None
        span.set_inputs({"q": "masked"})
        span.set_outputs({"a": "masked"})
        return question

    assert answer("my card is 4111") == "my card is 4111"
    span = only_span(captured_traces)
    assert (span.inputs, span.outputs) == ({"q": "masked"}, {"a": "masked"})


def test_inputs_are_as_they_were_at_the_call(captured_traces: CapturedTraces) -> None:
    """A list that the function changes is recorded as the caller gave it."""

    @tracemw.trace
    def drain(items: list[int]) -> int:
        items.clear()
        return len(items)

    drain([1, 2, 3])
    assert only_span(captured_traces).inputs == {"items": [1, 2, 3]}


def test_a_function_that_returns_nothing(captured_traces: CapturedTraces) -> None:
    """No arguments are an empty object, no result is null."""

    @tracemw.trace
    def nothing() -> None:
        pass

    nothing()
    span = only_span(captured_traces)
    assert (span.inputs, span.outputs) == ({}, None)
    assert "mlflow.spanOutputs" in span.attributes


def test_capture_can_be_switched_off() -> None:
    """`capture_inputs` and `capture_outputs` leave out what functions get and give, not the span."""
    with capture_traces(capture_inputs=False, capture_outputs=False) as traces:
        module_level(1)
    span = only_span(traces)
    assert "mlflow.spanInputs" not in span.attributes
    assert "mlflow.spanOutputs" not in span.attributes


def test_secrets_are_masked() -> None:
    """Arguments and attributes under a secret's name are masked before they are stored, also one's own names."""

    @tracemw.trace(attributes={"api_key": "sk-1"})
    def login(user: str, password: str, pin_code: str) -> dict[str, str]:
        return {"access_token": "t-1", "user": user}

    with capture_traces(redact=["password", "token", "api_key", "pin_code"]) as traces:
        login("ada", "hunter2", pin_code="pin-1234")
    text = traces[0].to_json()
    assert not any(secret in text for secret in ("sk-1", "hunter2", "pin-1234", "t-1"))
    assert only_span(traces).inputs["user"] == "ada"


# Exceptions


def test_an_exception_passes_untouched(captured_traces: CapturedTraces) -> None:
    """It is the same object with its own frames, recorded once; status ERROR says type and text."""
    error = ValueError("boom")

    @tracemw.trace
    def fails() -> None:
        raise error

    with pytest.raises(ValueError, match="boom") as caught:
        fails()
    assert caught.value is error
    assert error.__cause__ is None and error.__context__ is None
    frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    assert frames[-1] == "fails" and len(frames) == 3  # this test, our wrapper, the function
    span = only_span(captured_traces)
    assert span.status.status_code == SpanStatusCode.ERROR
    assert span.status.description == "ValueError: boom"
    (event,) = span.events
    assert event.name == "exception"
    assert event.attributes["exception.type"] == "ValueError"
    assert event.attributes["exception.message"] == "boom"
    assert "in fails" in event.attributes["exception.stacktrace"]
    assert captured_traces[0].info.state == "ERROR"


def test_every_span_that_an_exception_leaves_has_it_once(captured_traces: CapturedTraces) -> None:
    """Each span has one exception event, also where the code has recorded the exception by itself."""

    @tracemw.trace
    def inner() -> None:
        span = tracemw.get_current_active_span()
        assert span is not None
        try:
            raise KeyError("k")
        except KeyError as exc:
            span.record_exception(exc)
            raise

    @tracemw.trace
    def outer() -> None:
        inner()

    with pytest.raises(KeyError):
        outer()
    assert [len(span.events) for span in captured_traces[0].data.spans] == [1, 1]


def test_a_caught_exception_is_no_error_of_the_caller(captured_traces: CapturedTraces) -> None:
    """Only the span that the exception left has failed, and the trace has not."""

    @tracemw.trace
    def fails() -> None:
        raise ValueError

    @tracemw.trace
    def copes() -> str:
        try:
            fails()
        except ValueError:
            pass
        return "ok"

    assert copes() == "ok"
    (trace,) = captured_traces
    assert trace.info.state == "OK"
    assert {span.name: span.status.status_code for span in trace.data.spans} == {
        "copes": SpanStatusCode.OK,
        "fails": SpanStatusCode.ERROR,
    }


@pytest.mark.parametrize(
    ("kind", "outcome"),
    [
        (KeyboardInterrupt, "interrupted"),
        (SystemExit, "interrupted"),
        (GeneratorExit, "cancelled"),
        (asyncio.CancelledError, "cancelled"),
    ],
)
def test_what_is_no_exception_is_no_error_and_not_ok(
    captured_traces: CapturedTraces, kind: type[BaseException], outcome: str
) -> None:
    """A call that was cancelled or interrupted is stored, with its outcome and without a status."""

    @tracemw.trace
    def stopped() -> None:
        raise kind

    with pytest.raises(kind):
        stopped()
    span = only_span(captured_traces)
    assert span.status.status_code == SpanStatusCode.UNSET
    assert span.attributes["tracemw.outcome"] == outcome
    assert span.events == []
    assert captured_traces[0].info.state == "STATE_UNSPECIFIED"


def test_a_time_out_that_is_no_exception_is_an_error(captured_traces: CapturedTraces) -> None:
    """What has to get past `except Exception` (gevent's Timeout) fails the call that it leaves."""

    class TimeIsUp(BaseException):
        pass

    @tracemw.trace
    def slow() -> None:
        raise TimeIsUp("3 s")

    with pytest.raises(TimeIsUp):
        slow()
    span = only_span(captured_traces)
    assert (span.status.status_code, span.status.description) == (SpanStatusCode.ERROR, "TimeIsUp: 3 s")
    assert [event.name for event in span.events] == ["exception"]
    assert captured_traces[0].info.state == "ERROR"


def test_a_cancelled_coroutine_is_recorded(captured_traces: CapturedTraces) -> None:
    """A task that is cancelled while it waits ends its span as cancelled, and the cancellation goes on."""

    @tracemw.trace
    async def waits() -> None:
        await asyncio.sleep(60)

    async def main() -> bool:
        task = asyncio.create_task(waits())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(main())
    assert only_span(captured_traces).attributes["tracemw.outcome"] == "cancelled"


def test_an_exception_whose_text_fails(captured_traces: CapturedTraces) -> None:
    """An exception that cannot be turned into text reaches the caller all the same, recorded by its type."""

    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    @tracemw.trace
    def fails() -> None:
        raise Mute

    with pytest.raises(Mute):
        fails()
    assert only_span(captured_traces).events[0].attributes["exception.type"] == "Mute"


def test_a_wrong_call_fails_as_without_us(captured_traces: CapturedTraces) -> None:
    """Arguments that do not fit raise the function's own TypeError; the span has no inputs."""
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'a'"):
        tracemw.trace(plain)()  # type: ignore[call-arg]
    span = only_span(captured_traces)
    assert span.inputs is None
    assert span.status.status_code == SpanStatusCode.ERROR


# Our own failures


def test_hostile_values_do_not_reach_the_caller(captured_traces: CapturedTraces) -> None:
    """Values whose methods raise, cycles and deep nesting change nothing for the caller."""

    class Hostile:
        def __getattribute__(self, name: str) -> Any:
            raise RuntimeError(name)

        def __repr__(self) -> str:
            raise RuntimeError("repr")

    loop: dict[str, Any] = {}
    loop["me"] = loop
    deep: list[Any] = []
    for _ in range(5_000):
        deep = [deep]

    @tracemw.trace
    def echo(value: Any) -> Any:
        return value

    for value in (Hostile(), loop, deep):
        assert echo(value) is value
    assert len(captured_traces) == 3


def test_a_broken_span_processor_is_reported_and_skipped(caplog: pytest.LogCaptureFixture) -> None:
    """A `span_processors` callable that raises costs itself: the others run, the call returns, the span stays."""
    seen = []

    def broken(span: Any) -> None:
        raise RuntimeError("broken processor")

    def mask(span: Any) -> None:
        seen.append(span.name)
        span.set_inputs({"masked": True})
        span.set_outputs("masked")

    with capture_traces(span_processors=[broken, mask]) as traces:
        assert module_level(1) == 2
    assert seen == ["module_level"]
    assert (only_span(traces).inputs, only_span(traces).outputs) == ({"masked": True}, "masked")
    assert "masked" in str(traces[0].info.request_preview)


def test_a_recursion_error_stays_the_functions_own(captured_traces: CapturedTraces) -> None:
    """A function at its recursion limit raises RecursionError as without us, and the next call is traced."""

    @tracemw.trace
    def recurse(n: int) -> int:
        return recurse(n + 1)

    with pytest.raises(RecursionError):
        recurse(0)
    assert module_level(1) == 2
    assert captured_traces[-1].data.spans[0].name == "module_level"


# On and off


def test_nothing_is_recorded_while_tracing_is_off(captured_traces: CapturedTraces) -> None:
    """`disable` and `enable` work for the process, `context(enabled=...)` for a block; the inner word counts."""
    tracemw.disable()
    module_level(1)
    with tracemw.context(enabled=True):
        module_level(2)
    tracemw.enable()
    with tracemw.context(enabled=False):
        module_level(3)
        with tracemw.context(enabled=True):
            module_level(4)
    module_level(5)
    assert [trace.data.spans[0].inputs["a"] for trace in captured_traces] == [2, 4, 5]


def test_off_inside_a_trace_leaves_out_what_is_below(captured_traces: CapturedTraces) -> None:
    """Calls in a block that is switched off are left out; one switched on again is in the same trace."""
    with tracemw.start_span("root"):
        with tracemw.context(enabled=False):
            module_level(1)
            with tracemw.context(enabled=True):
                module_level(2)
    (trace,) = captured_traces
    assert [span.name for span in trace.data.spans] == ["root", "module_level"]
    assert trace.data.spans[1].inputs == {"a": 2}


def test_a_trace_is_sampled_at_its_root() -> None:
    """Below a rate of 0 nothing is recorded, children included; the decorator's own rate wins at a root."""

    @tracemw.trace(sampling_ratio_override=1.0)
    def always() -> int:
        return module_level(1)

    @tracemw.trace
    def never() -> int:
        return always()

    with capture_traces(sample_rate=0.0) as traces:
        never()
        assert len(traces) == 0
        always()
    assert [span.name for span in traces[0].data.spans] == ["always", "module_level"]


def test_failed_traces_can_be_kept_although_not_sampled() -> None:
    """With `keep_errors`, a trace that was not sampled is stored whole if it fails, and only then."""

    @tracemw.trace
    def work(fail: bool) -> None:
        module_level(1)
        if fail:
            raise ValueError

    with capture_traces(sample_rate=0.0, keep_errors=True) as traces:
        work(False)
        with pytest.raises(ValueError):
            work(True)
    (trace,) = traces
    assert [span.name for span in trace.data.spans] == ["work", "module_level"]


# Misuse


def test_misuse_says_what_to_do() -> None:
    """What cannot be traced is refused where it is decorated."""
    with pytest.raises(TracemwError, match="generators only, and plain is none"):
        tracemw.trace(plain, output_reducer=list)
    with pytest.raises(TracemwError, match="decorate the methods of class Shop"):
        tracemw.trace(Shop)
    with pytest.raises(TracemwError, match="not for str"):
        tracemw.trace("name")  # type: ignore[call-overload]
    with pytest.raises(TracemwError, match="between 0.0 and 1.0"):
        tracemw.trace(sampling_ratio_override=2.0)


def test_builtins_can_be_traced(captured_traces: CapturedTraces) -> None:
    """A function without a signature is recorded with its arguments in order."""
    assert tracemw.trace(max)(1, 2) == 2
    span = only_span(captured_traces)
    assert (span.name, span.inputs, span.outputs) == ("max", {"args": [1, 2]}, 2)


def test_two_decorators_are_two_spans(captured_traces: CapturedTraces) -> None:
    """Each `@trace` stands for one span."""

    @tracemw.trace(name="outer")
    @tracemw.trace(name="inner")
    def work() -> None: ...

    work()
    assert [span.name for span in captured_traces[0].data.spans] == ["outer", "inner"]


def test_tracing_in_a_handler_is_no_news_to_the_adapters(captured_traces: CapturedTraces) -> None:
    """What is decorated anew with every request makes adapters look at their routes once, not every time."""

    def handler() -> None:
        @tracemw.trace
        def inner() -> None: ...

        inner()
        tracemw.trace(max)(1, 2)
        tracemw.trace(functools.partial(plain, 1))()
        tracemw.trace(Shop())(1)

    handler()
    generation = stamps.generation
    handler()
    assert stamps.generation == generation


def test_a_coroutine_behind_a_plain_decorator(captured_traces: CapturedTraces) -> None:
    """A function that returns a coroutine is recorded until that has been awaited."""

    def logged(fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def wrapper(*args: Any) -> Any:
            return fn(*args)

        return wrapper

    @tracemw.trace
    @logged
    async def work(number: int) -> int:
        await asyncio.sleep(0.01)
        return module_level(number)

    async def main() -> None:
        started = work(1)
        assert inspect.iscoroutine(started) and started.__name__ == "work"
        assert tracemw.get_current_active_span() is None
        with tracemw.start_span("elsewhere"):
            assert await asyncio.create_task(started) == 2
            span = tracemw.get_current_active_span()
            assert span is not None and span.name == "elsewhere"

    asyncio.run(main())
    trace = next(trace for trace in captured_traces if trace.search_spans(name="work"))
    outer, inner = trace.data.spans
    assert (outer.outputs, inner.parent_id) == (2, outer.span_id)
    assert outer.end_time_ns - outer.start_time_ns > 5_000_000  # type: ignore[operator]


def test_the_last_trace_is_known(captured_traces: CapturedTraces) -> None:
    """`get_last_active_trace_id` is the trace whose root ended last; `get_active_trace_id` the current one."""
    with tracemw.start_span("a") as span:
        assert tracemw.get_active_trace_id() == span.trace_id
    assert tracemw.get_active_trace_id() is None
    assert tracemw.get_last_active_trace_id() == span.trace_id
    assert tracemw.get_last_active_trace_id(thread_local=True) == span.trace_id


# Arguments by name

_SIGNATURES: list[Callable[..., Any]] = [
    lambda: None,
    lambda a: None,
    lambda a, b=2: None,
    lambda a, /, b, *, c=3: None,
    lambda a, /, **kw: None,
    lambda *args, key: None,
    lambda a, *args, b=1, **kw: None,
    lambda self, a: None,
]


@given(
    st.sampled_from(_SIGNATURES),
    st.lists(st.integers(0, 9), max_size=4),
    st.dictionaries(st.sampled_from(["a", "b", "c", "key", "x"]), st.integers(0, 9), max_size=3),
)
def test_arguments_are_bound_as_python_binds_them(
    fn: Callable[..., Any], args: list[int], kwargs: dict[str, int]
) -> None:
    """The arguments by name are those of `inspect.Signature.bind` with defaults; None where it does not fit."""
    try:
        bound = inspect.signature(fn).bind(*args, **kwargs)
        bound.apply_defaults()
        expected: dict[str, Any] | None = dict(bound.arguments)
        expected.pop("self", None)  # type: ignore[union-attr]
    except TypeError:
        expected = None
    found = ArgumentNames(fn).bind(tuple(args), kwargs)
    assert found == expected
    assert found is None or list(found) == list(expected or ())


def test_the_settings_may_be_unusable(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, captured_traces: CapturedTraces
) -> None:
    """An environment variable with a wrong value is logged, and the function works untraced."""
    monkeypatch.setenv("TRACEMW_SAMPLE_RATE", "much")
    monkeypatch.setattr(guard, "_last_logged", {})  # each place is logged once a minute
    with config.overridden(), caplog.at_level(logging.ERROR, "tracemw"):
        config._state.settings = None
        config._state.generation += 1
        assert module_level(1) == 2
    assert "much" in caplog.text
    assert len(captured_traces) == 0
