"""`@trace`: one decorator for functions, coroutines, async generators, methods, objects that can be called."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import CoroutineType
from typing import TYPE_CHECKING, Any, TypeVar, overload

from tracemw import scope as scopes
from tracemw import stamps
from tracemw.binding import ArgumentNames
from tracemw.errors import TracemwError
from tracemw.failure import last_recorded
from tracemw.guard import report
from tracemw.runtime import Runtime, encoded, encoded_attribute, runtime
from tracemw.scope import DESCRIPTION, FUNCTION_NAME, INPUTS, LOG_LEVEL, OUTPUTS, SPAN_TYPE, Scope

if TYPE_CHECKING:
    from tracemw.record import TraceRecord

F = TypeVar("F", bound="Callable[..., Any] | classmethod[Any, ..., Any] | staticmethod[..., Any]")


@overload
def trace(
    func: None = None,
    name: str | None = None,
    span_type: str = "UNKNOWN",
    attributes: Mapping[str, Any] | None = None,
    output_reducer: Callable[[list[Any]], Any] | None = None,
    trace_destination: Any = None,
    sampling_ratio_override: float | None = None,
    log_level: int | str | None = None,
    links: Sequence[Any] | None = None,
    description: str | None = None,
) -> Callable[[F], F]: ...
@overload
def trace(
    func: F,
    name: str | None = None,
    span_type: str = "UNKNOWN",
    attributes: Mapping[str, Any] | None = None,
    output_reducer: Callable[[list[Any]], Any] | None = None,
    trace_destination: Any = None,
    sampling_ratio_override: float | None = None,
    log_level: int | str | None = None,
    links: Sequence[Any] | None = None,
    description: str | None = None,
) -> F: ...
def trace(
    func: Any = None,
    name: str | None = None,
    span_type: str = "UNKNOWN",
    attributes: Mapping[str, Any] | None = None,
    output_reducer: Callable[[list[Any]], Any] | None = None,
    trace_destination: Any = None,
    sampling_ratio_override: float | None = None,
    log_level: int | str | None = None,
    links: Sequence[Any] | None = None,
    description: str | None = None,
) -> Any:
    """Record every call of a function as a span: its arguments, its result, its exception, its time.

        @tracemw.trace
        def answer(question): ...

        @tracemw.trace(name="search", span_type="RETRIEVER", attributes={"index": "docs"})
        async def search(query): ...

    Functions, coroutine functions, generators, async generators, methods (above or below `@classmethod` and
    `@staticmethod`), `functools.partial` and callable objects; what comes back is of the same kind and keeps
    name, documentation and signature. As a decorator of a web framework's handler it may stand above or below
    the route decorator. Each `@trace` stands for one span: two of them on one function make two.

    A generator's span begins with the first step and ends when it is exhausted, closed, fails or is dropped;
    its chunks are events, its output is their list or what `output_reducer` makes of it.

    Args:
        func: The function; left out where the decorator has arguments.
        name: The span's name; without it the function's.
        span_type: One of `SpanType`, or a word of your own.
        attributes: The span's attributes, of any values.
        output_reducer: For generators: makes the output of the list of all chunks.
        trace_destination: Accepted for MLflow's sake; where traces go is a setting.
        sampling_ratio_override: The share of calls to record where a trace begins here, instead of `sample_rate`.
        log_level: The span's level, as in MLflow.
        links: Links to other spans.
        description: What the span is about, for people.

    Raises:
        TracemwError: What is decorated cannot be called, or an argument does not suit it.
    """
    if sampling_ratio_override is not None and not 0.0 <= sampling_ratio_override <= 1.0:
        raise TracemwError(
            f"sampling_ratio_override must be between 0.0 and 1.0, but is {sampling_ratio_override}"
        )
    options = Options(
        name, span_type, attributes, output_reducer, sampling_ratio_override, log_level, links, description
    )

    def decorate(function: Any) -> Any:
        if isinstance(function, (classmethod, staticmethod)):
            return type(function)(decorate(function.__func__))
        wrapper = wrap(function, options)
        stamps.stamp(function, options)
        return wrapper

    return decorate if func is None else decorate(func)


class Options:
    """What `@trace` was given."""

    __slots__ = (
        "name",
        "span_type",
        "attributes",
        "output_reducer",
        "rate",
        "log_level",
        "links",
        "description",
    )

    def __init__(
        self,
        name: str | None = None,
        span_type: str | None = "UNKNOWN",
        attributes: Mapping[str, Any] | None = None,
        output_reducer: Callable[[list[Any]], Any] | None = None,
        rate: float | None = None,
        log_level: int | str | None = None,
        links: Sequence[Any] | None = None,
        description: str | None = None,
    ) -> None:
        self.name = name
        self.span_type = span_type or "UNKNOWN"
        self.attributes = dict(attributes or {})
        self.output_reducer = output_reducer
        self.rate = rate
        self.log_level = log_level
        self.links = links
        self.description = description


class Plan:
    """All that is known of a traced function before it is called; one per decorated function.

    Attributes:
        fn: The function.
        name: The span's name.
        handler: True where a framework calls the function to handle its requests, which an adapter tells us.
    """

    __slots__ = ("fn", "name", "handler", "options", "_function_name", "_arguments", "_runtime", "_base", "_links")

    def __init__(self, fn: Callable[..., Any], options: Options) -> None:
        self.fn = fn
        self.options = options
        self.handler = False
        self._function_name = function_name(fn)
        self.name = options.name or self._function_name
        self._arguments = ArgumentNames(fn)
        self._runtime: Runtime | None = None
        self._base: dict[str, Any] = {}
        self._links: list[Any] = []

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Begin the span of a call and make it current; None where nothing is recorded."""
        try:
            call = self.open(args, kwargs)
            if call is not None:
                call.scope.enter()
            return call
        except Exception as exc:
            report("trace", exc)
            return None

    def open(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Begin the span of a call."""
        now = runtime()
        if now is not self._runtime:
            self._compile(now)
        attributes, inputs = self._base, None
        if now.capture_inputs:
            arguments = self._arguments.bind(args, kwargs)
            if arguments is not None:
                inputs = encoded(arguments)
                attributes = {**attributes, INPUTS: inputs}
        scope = scopes.open_scope(self.name, attributes, links=self._links, rate=self.options.rate)
        return None if scope is None else Call(self, scope, inputs, now)

    def _compile(self, now: Runtime) -> None:
        from tracemw.livespan import log_level
        from tracemw.spans import valid_links

        options = self.options
        base: dict[str, Any] = {
            SPAN_TYPE: encoded(options.span_type),
            FUNCTION_NAME: encoded(self._function_name),
        }
        if options.log_level is not None:
            base[LOG_LEVEL] = encoded(int(log_level(options.log_level)))
        if options.description is not None:
            base[DESCRIPTION] = encoded(options.description)
        for key, value in options.attributes.items():
            if value is not None:
                base[str(key)] = encoded_attribute(str(key), value)
        self._base = base
        self._links = valid_links(options.links)
        self._runtime = now


class Call:
    """One call of a traced function."""

    __slots__ = (
        "plan",
        "scope",
        "recording",
        "_inputs",
        "_is_handler",
        "_is_main",
        "_follows",
        "_capture_outputs",
    )

    def __init__(self, plan: Plan, scope: Scope, inputs: str | None, now: Runtime) -> None:
        self.plan = plan
        self.scope = scope
        self.recording = scope.recording
        self._inputs = inputs
        self._capture_outputs = now.capture_outputs
        self._is_handler = False
        self._is_main = False
        self._follows = False
        record = scope.record
        if record.is_request and self.recording:
            self._find_role(record)
            # Processors may mask the inputs; what they leave is told at the end.
            if self._is_handler and not now.processors and (record.inputs is None or self._is_main):
                record.inputs = self._inputs

    def _find_role(self, record: TraceRecord) -> None:
        """Find out whether the request's previews tell of this call.

        They tell of the handler, which the framework's adapter knows. Where it stands below a decorator that
        hides it, or there is no adapter, the first child of the root takes its place.
        """
        span: Any = self.scope.span
        if self.plan.handler and not record.has_handler:
            record.has_handler = self._is_handler = self._is_main = True
        elif record.ended:  # work after the response
            return
        elif span.parent is not None and record.parent_of_kept(span.parent.span_id) == record.root_span_id:
            self._is_handler = True
            # A stream that begins when the handler has returned is the body of the response.
            self._follows = record.outputs is not None

    def succeed(self, result: Any) -> None:
        """Leave and end the span of a call that returned."""
        try:
            self.scope.leave()
            if self.recording:
                self.finish(result)
        except Exception as exc:
            report("trace", exc)

    def fail(self, exc: BaseException) -> None:
        """Leave and end the span of a call that an exception left."""
        try:
            self.scope.leave()
            if self.recording:
                self.scope.fail(exc)
                if self._is_handler and isinstance(exc, Exception):
                    self.scope.record.failure = last_recorded(self.scope.span)
                self.scope.end()
        except Exception as failure:
            report("trace", failure)

    def finish(self, result: Any) -> None:
        """Record the result, unless the function's code has set the outputs itself, and end the span."""
        span: Any = self.scope.span
        if self._capture_outputs and span.attributes.get(OUTPUTS) is None:
            span.set_attribute(OUTPUTS, encoded(result))
        self.scope.end()
        if self._is_handler:
            self._tell_previews(span)

    def finish_stream(self, chunks: int, kept: list[Any]) -> None:
        """Record what a generator has yielded, and end the span."""
        from tracemw.streams import output_of, tell

        span: Any = self.scope.span
        tell(span, chunks, len(kept))
        if self._capture_outputs and span.attributes.get(OUTPUTS) is None:
            span.set_attribute(OUTPUTS, encoded(output_of(kept, self.plan.options.output_reducer)))
        self.scope.end()
        if self._follows:
            self.scope.record.outputs = span.attributes.get(OUTPUTS)
            self.scope.record.changed()
        elif self._is_handler:
            self._tell_previews(span)

    def _tell_previews(self, span: Any) -> None:
        record = self.scope.record
        attributes = span.attributes
        if record.inputs is None or record.inputs is self._inputs or self._is_main:
            record.inputs = attributes.get(INPUTS)
            record.outputs = attributes.get(OUTPUTS)
            record.changed()


def wrap(fn: Callable[..., Any], options: Options) -> Callable[..., Any]:
    """Return a callable of the same kind that records its calls.

    Raises:
        TracemwError: It cannot be called, or `output_reducer` does not suit it.
    """
    if isinstance(fn, type):
        raise TracemwError(f"@trace is for functions; decorate the methods of class {fn.__name__} instead")
    if not callable(fn):
        raise TracemwError(f"@trace is for functions, not for {type(fn).__name__}: put it below other decorators")
    kind = kind_of(fn)
    if options.output_reducer is not None and kind not in ("generator", "async generator"):
        raise TracemwError(f"output_reducer is for generators only, and {function_name(fn)} is none")
    plan = Plan(fn, options)
    if kind == "coroutine":
        wrapper = _traced_coroutine(plan)
    elif kind == "generator":
        from tracemw.streams import traced_generator

        wrapper = traced_generator(plan)
    elif kind == "async generator":
        from tracemw.streams import traced_async_generator

        wrapper = traced_async_generator(plan)
    else:
        wrapper = _traced_function(plan)
    return _dressed(wrapper, fn, plan)


def _traced_function(plan: Plan) -> Callable[..., Any]:
    fn, begin = plan.fn, plan.begin

    def traced(*args: Any, **kwargs: Any) -> Any:
        call = begin(args, kwargs)
        if call is None:
            return fn(*args, **kwargs)
        try:
            result = fn(*args, **kwargs)
        except BaseException as exc:
            call.fail(exc)
            raise
        if type(result) is CoroutineType:  # of a decorator that does not say that it wraps a coroutine function
            call.scope.leave()
            return _renamed(_awaited(call, result), result)
        call.succeed(result)
        return result

    return traced


async def _awaited(call: Call, coroutine: CoroutineType[Any, Any, Any]) -> Any:
    """Go on with a call that has returned a coroutine, when that is awaited."""
    call.scope.reenter()
    try:
        result = await coroutine
    except BaseException as exc:
        call.fail(exc)
        raise
    call.succeed(result)
    return result


def _renamed(coroutine: Any, original: Any) -> Any:
    """Give a coroutine the name of the one inside it, for the warning that it was never awaited."""
    coroutine.__name__, coroutine.__qualname__ = original.__name__, original.__qualname__
    return coroutine


def _traced_coroutine(plan: Plan) -> Callable[..., Any]:
    fn, begin = plan.fn, plan.begin

    async def traced(*args: Any, **kwargs: Any) -> Any:
        call = begin(args, kwargs)
        if call is None:
            return await fn(*args, **kwargs)
        try:
            result = await fn(*args, **kwargs)
        except BaseException as exc:
            call.fail(exc)
            raise
        call.succeed(result)
        return result

    return traced


def _dressed(wrapper: Any, fn: Any, plan: Plan) -> Callable[..., Any]:
    """Make the wrapper look like what it wraps."""
    functools.update_wrapper(wrapper, fn)
    if not hasattr(fn, "__name__"):
        wrapper.__name__ = wrapper.__qualname__ = plan.name
    try:
        wrapper.__signature__ = _signature(fn)
    except Exception:  # builtins have none
        pass
    setattr(wrapper, stamps.MARKER, plan)
    return wrapper  # type: ignore[no-any-return]


def _signature(fn: Any) -> inspect.Signature:
    """Return the signature of a function, with annotations that are no strings, where they can be evaluated.

    FastAPI before 0.115 evaluates strings in the module of the function that it is given, which is ours.
    """
    signature = inspect.signature(fn)
    if any(isinstance(p.annotation, str) for p in signature.parameters.values()):
        try:
            return inspect.signature(fn, eval_str=True)
        except Exception:  # a name that is not there yet, or only for type checkers
            pass
    return signature


def kind_of(fn: Any) -> str:
    """Return what calling it gives: "function", "coroutine", "generator" or "async generator"."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    called = fn if inspect.isroutine(fn) else type(fn).__call__
    for candidate in (fn, called):
        if inspect.iscoroutinefunction(candidate):
            return "coroutine"
        if inspect.isasyncgenfunction(candidate):
            return "async generator"
        if inspect.isgeneratorfunction(candidate):
            return "generator"
    return "function"


def function_name(fn: Any) -> str:
    """Return the name of a callable; of an object, its class's."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return str(getattr(fn, "__name__", None) or type(fn).__name__)
