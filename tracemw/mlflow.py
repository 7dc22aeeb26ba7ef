"""MLflow's tracing API in our traces: `tracemw.mlflow.bridge()`, once, when the application starts.

    import mlflow, tracemw.mlflow

    tracemw.mlflow.bridge()

From then on `@mlflow.trace`, `mlflow.start_span`, `MlflowClient` and MLflow's autologging begin spans of our
traces: below the request's root inside of a request, as traces of their own elsewhere. `update_current_trace` and
`get_current_active_span` of MLflow work in both places. All goes to our store and from there to its destination,
once: MLflow's own exporter gets nothing of it. `docs/mlflow.md` has the details.

MLflow has no documented way for that; what is used of its internals stands in `_mlflow_internals`.
"""

from __future__ import annotations

import functools
import logging
import re
import threading
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import context as otel_context
from opentelemetry import trace as trace_api

from tracemw import config, opening, stamps
from tracemw import scope as scopes
from tracemw._mlflow_internals import OLDEST, Always, Patches, find, find_wanted, missing
from tracemw.errors import NotFoundError, TracemwError
from tracemw.record import TraceRecord, current_record, with_record

if TYPE_CHECKING:
    from tracemw._mlflow_handlers import Handlers

__all__ = ["bridge"]

logger = logging.getLogger("tracemw")

PROBE: Final = "tracemw probe"


class _State:
    bridge: Bridge | None = None


_lock = threading.RLock()


def bridge() -> bool:
    """Have everything that MLflow traces in this process become part of our traces.

    Call it once, when the application starts, best before the modules with `@mlflow.trace` are imported. Calling
    it again changes nothing.

    Returns:
        True if it is done. False, with a warning in the log, where the installed MLflow is a version that the
        bridge does not fit; MLflow then goes on as it did.

    Raises:
        TracemwError: MLflow is not installed.
    """
    with _lock:
        if _State.bridge is not None:
            return True
        reason = _unfit()
        if reason is None:
            made = Bridge()
            reason = made.install()
            if reason is None:
                _State.bridge = made
                return True
        logger.warning("MLflow is not bridged: %s. It goes on by itself, and its traces apart from ours.", reason)
        return False


def check() -> str | None:
    """Return why the installed MLflow cannot be bridged, None if it can: it is tried, and undone.

    Raises:
        TracemwError: MLflow is not installed.
    """
    with _lock:
        reason = _unfit() if _State.bridge is None else None
        if reason is None and _State.bridge is None:
            made = Bridge()
            reason = made.install()
            if reason is None:
                made.undo()
        return reason


def unbridge() -> None:
    """Undo `bridge()`, for tests. Spans that are open end as they are."""
    with _lock:
        made, _State.bridge = _State.bridge, None
        if made is not None:
            made.undo()


def _unfit() -> str | None:
    """Return why the installed MLflow cannot be bridged, as far as that can be seen without trying."""
    try:
        installed = import_module("mlflow")
    except ModuleNotFoundError as exc:
        if exc.name != "mlflow":
            return f"it cannot be imported ({exc})"
        raise TracemwError("tracemw.mlflow.bridge() needs MLflow: pip install 'tracemw[mlflow]'") from None
    except Exception as exc:
        return f"it cannot be imported ({type(exc).__name__}: {exc})"
    version = getattr(installed, "__version__", "0")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
        return f"version {version} is too old, it takes {'.'.join(map(str, OLDEST))} or newer"
    try:
        gone = missing()
    except Exception as exc:
        return f"version {version} does not let us look into it ({type(exc).__name__}: {exc})"
    if gone:
        return f"version {version} has no {', '.join(gone)}"
    if _exports_globally():
        return (
            "its exporter has been added to the application's OpenTelemetry provider already. Call bridge() "
            "before the first span of MLflow's"
        )
    return None


def _exports_globally() -> bool:
    """True where MLflow, told not to keep to itself, has put its processor onto the global provider."""
    base = find("mlflow.tracing.processor.base_mlflow", "BaseMlflowSpanProcessor")
    multi = getattr(trace_api.get_tracer_provider(), "_active_span_processor", None)
    return any(isinstance(one, base) for one in getattr(multi, "_span_processors", ()))


class Bridge:
    """What is put in the place of MLflow's own parts."""

    def __init__(self) -> None:
        self._patches = Patches()
        self._handlers: Handlers | None = None

    def install(self) -> str | None:
        """Put everything in its place and try it; return why it does not work, with nothing changed then."""
        try:
            self._assign()
            with config.overridden():  # what the settings are is not read for good yet
                _try_out()
        except Exception as exc:
            logger.debug("the bridge to MLflow does not work", exc_info=True)
            self.undo()
            return f"its internals are not as we know them ({type(exc).__name__}: {exc})"
        assert self._handlers is not None
        stamps.lookups.append(self._handlers.lookup)
        stamps.generation += 1
        opening.local_roots = True
        return None

    def undo(self) -> None:
        """Put MLflow's own parts back."""
        self._patches.undo()
        if self._handlers is not None and self._handlers.lookup in stamps.lookups:
            stamps.lookups.remove(self._handlers.lookup)
            opening.local_roots = False

    def _assign(self) -> None:
        from tracemw import _mlflow_spans as spans
        from tracemw import _mlflow_table as table
        from tracemw import _mlflow_tracer as tracer
        from tracemw._mlflow_handlers import Handlers

        mlflow: Any = import_module("mlflow")
        fluent: Any = import_module("mlflow.tracing.fluent")
        providers: Any = import_module("mlflow.tracing.provider")
        put, made = self._patches.put, tracer.BridgedProvider()

        def initialize(disabled: bool = False) -> None:
            providers.provider.set(trace_api.NoOpTracerProvider() if disabled else made)

        put(providers, "_initialize_tracer_provider", initialize)
        put(providers, "MLFLOW_USE_DEFAULT_TRACER_PROVIDER", Always())
        put(providers, "mlflow_runtime_context", tracer.SharedContext())
        put(providers, "start_span_in_context", _without_experiment(providers.start_span_in_context))
        put(providers, "start_detached_span", _without_experiment(providers.start_detached_span))
        # By assignment: to replace it by MLflow's own means would wait for what it has not exported yet.
        put(providers.provider, "_isolated_tracer_provider", made)
        put(providers.provider.once, "_done", True)
        put(fluent, "create_mlflow_span", spans.bridged)
        put(table.Manager, "_instance", table.TraceTable(table.Manager._instance))
        self._handlers = Handlers(mlflow.trace)
        put(mlflow, "trace", self._handlers.trace)
        put(mlflow, "update_current_trace", _where_recorded(mlflow.update_current_trace))
        put(mlflow, "set_trace_tag", _ours_first(mlflow.set_trace_tag, "set_trace_tag"))
        put(mlflow, "delete_trace_tag", _ours_first(mlflow.delete_trace_tag, "delete_trace_tag"))
        put(mlflow, "flush_trace_async_logging", _with_ours(mlflow.flush_trace_async_logging))
        self._assign_client()

    def _assign_client(self) -> None:
        from tracemw import _mlflow_spans as spans
        from tracemw import _mlflow_tracer as tracer

        MlflowClient: Any = find_wanted("mlflow.tracking.client", "MlflowClient")
        if MlflowClient is None:
            return
        start_trace, start_span = MlflowClient.start_trace, MlflowClient.start_span

        @functools.wraps(start_trace)
        def begin_trace(self: Any, *args: Any, **options: Any) -> Any:
            token = tracer.unseen.set(tracer.is_ours(trace_api.get_current_span()))
            try:
                span = start_trace(self, *args, **options)
            finally:
                tracer.unseen.reset(token)
            return _held(span)

        @functools.wraps(start_span)
        def begin_span(self: Any, *args: Any, **options: Any) -> Any:
            return _held(start_span(self, *args, **options))

        def _held(span: Any) -> Any:
            if isinstance(span, spans.BridgedSpan):
                spans.hold(span)
            return span

        self._patches.put(MlflowClient, "start_trace", begin_trace)
        self._patches.put(MlflowClient, "start_span", begin_span)


def _without_experiment(original: Callable[..., Any]) -> Callable[..., Any]:
    """Leave out the experiment: where traces go is a setting, and for a span below another MLflow would fail."""

    @functools.wraps(original)
    def start(*args: Any, experiment_id: Any = None, **options: Any) -> Any:
        return original(*args, **options)

    return start


def _where_recorded(original: Callable[..., Any]) -> Callable[..., Any]:
    """Do nothing where nothing is recorded, on purpose: MLflow would warn each time."""

    @functools.wraps(original)
    def update(*args: Any, **options: Any) -> Any:
        record = current_record()
        recorded = scopes.tracing_is_on(otel_context.get_current()) if record is None else record.recording
        return original(*args, **options) if recorded else None

    return update


def _ours_first(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Do it to a trace that is in progress or in our store; MLflow asks its server about others."""

    @functools.wraps(original)
    def change(*args: Any, **options: Any) -> Any:
        from tracemw import client

        try:
            return getattr(client, name)(*args, **options)
        except NotFoundError:
            return original(*args, **options)

    return change


def _with_ours(original: Callable[..., Any]) -> Callable[..., Any]:
    """Flush what MLflow had before it was bridged, and ours."""

    @functools.wraps(original)
    def flush(*args: Any, **options: Any) -> Any:
        original(*args, **options)
        config.flush()

    return flush


def _try_out() -> None:
    """Try everything once, on a provider and a trace that nobody sees.

    Raises:
        Exception: Something does not work.
    """
    from opentelemetry.sdk.trace import TracerProvider

    from tracemw import _mlflow_tracer as tracer
    from tracemw._mlflow_spans import BridgedSpan

    mlflow: Any = import_module("mlflow")
    fluent: Any = import_module("mlflow.tracing.fluent")
    nobodys, last = TracerProvider(shutdown_on_exit=False), fluent.get_last_active_trace_id()
    root = nobodys.get_tracer(PROBE).start_span(PROBE, otel_context.Context())
    ids = root.get_span_context()
    record = TraceRecord(ids.trace_id, ids.span_id)
    record.is_request = True
    before = otel_context.get_current()
    context = with_record(trace_api.set_span_in_context(root, otel_context.Context()), record)
    otel_context.attach(context)
    tracer.source, in_force = (lambda: nobodys), tracer.source
    try:
        with mlflow.start_span("outer", span_type="CHAIN") as outer:
            outer.set_inputs({"a": 1})
            mlflow.update_current_trace(tags={"k": "v"}, client_request_id="id", metadata={"m": "v"})
            current, inner = mlflow.get_current_active_span(), fluent.start_span_no_context("inner")
            is_current = trace_api.get_current_span() is outer._span
            inner.end()
        is_left = trace_api.get_current_span() is root
        mlflow.update_current_trace(state="ERROR")
    finally:
        tracer.source = in_force
        otel_context.attach(before)
        fluent._set_last_active_trace_id(last)
    found = {
        "spans": isinstance(outer, BridgedSpan) and isinstance(inner, BridgedSpan),
        "parents": (outer.parent_id, inner.parent_id) == (f"{ids.span_id:016x}", outer.span_id),
        "current span": current is outer and is_current and is_left,
        "ends": not outer._span.is_recording() and not inner._span.is_recording(),
        "facts": (record.tags, record.client_request_id, record.metadata, record.state)
        == ({"k": "v"}, "id", {"m": "v"}, "ERROR"),
    }
    wrong = [name for name, right in found.items() if not right]
    if wrong:
        raise RuntimeError(f"tried out, it is wrong in: {', '.join(wrong)}")
