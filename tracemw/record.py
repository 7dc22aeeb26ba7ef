"""The trace record: what is known about one trace besides its spans, and what may change it.

The record travels in the OpenTelemetry context next to the current span, so whoever carries the context has it,
and it is freed with the last context that does. A weak map from trace id to record serves the span processor.

A trace may have several roots in one process: two requests of one trusted caller, or a request that calls its own
application. Each has a record of its own. The map knows the first; the spans of the others are in a second map,
which is looked at only in processes where there ever was another.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from types import MappingProxyType, MethodType
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import context as otel_context
from opentelemetry import trace as trace_api
from opentelemetry.context import Context

from tracemw.errors import TracemwError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

logger = logging.getLogger("tracemw")

RECORD_KEY: Final = otel_context.create_key("tracemw-record")
# What `set_span_in_context` puts a span under: one dictionary instead of three copies for each request.
SPAN_KEY: Final = next(iter(trace_api.set_span_in_context(trace_api.INVALID_SPAN, Context())))

# MLflow's names of session and user in the metadata: they set the fields, wherever they come from.
SESSION_METADATA: Final = "mlflow.trace.session"
USER_METADATA: Final = "mlflow.trace.user"
MODEL_METADATA: Final = "mlflow.modelId"

KEPT: Final = "_tracemw_kept"  # on a span that is not kept: the one above it that is

_NONE: Final[Mapping[str, str]] = MappingProxyType({})

LATE: Final = 1  # of `TraceRecord.late`
LATE_FAILED: Final = 2

# A `WeakValueDictionary` in the small: what forgets a record is C all the way, and is on every request's way. The
# reference that forgets is the one in the dictionary: once another has taken its place it does nothing any more.
_alive: dict[int, weakref.ref[TraceRecord]] = {}
_forget: Final = _alive.pop  # made a method of the trace id: called with the reference, as what to return else
_others: weakref.WeakValueDictionary[tuple[int, int], TraceRecord] = weakref.WeakValueDictionary()
several = False  # some trace of this process has had more than one root here


class TraceRecord:
    """What is known about one trace: who asked, what was set on it, how it went.

    Plain attributes, read and written from any thread; each change is one dictionary or attribute
    assignment. The writer reads the record when it stores the trace. Once the root has ended, `on_change`
    queues the record again, so that later facts reach the stored trace.
    """

    # What every trace begins with; an instance has its own value only where that differs.
    first: TraceRecord | None = None  # the record of the trace's first root here, where this is another's
    is_request = False
    name = ""
    start_ns = 0
    end_ns: int | None = None
    client_request_id: str | None = None
    session_id: str | None = None
    user_id: str | None = None
    process: Mapping[str, str] = _NONE  # the process metadata in force when the trace began
    metadata: Mapping[str, str] = _NONE  # changed by `update` alone
    tags: Mapping[str, str] = _NONE  # changed by `update` and `remove_tag`
    request_preview: str | None = None
    response_preview: str | None = None
    inputs: str | None = None  # of the traced handler, JSON: what the preview is made of
    outputs: str | None = None
    has_handler = False  # a call of what the framework registered for the request has begun
    state: str | None = None  # what the user set; wins over the computed one
    error = False
    outcome: str | None = None
    failure: Mapping[str, Any] | None = None  # the exception that left the handler's span, as an event's
    late = 0  # whether spans ended after the root, and failed
    queued = False  # spans of it have been queued, or the record itself has
    dropped_spans: dict[int, int | None] | None = None  # span id -> parent of spans that are not kept
    held_back: list[ReadableSpan] | None = None  # spans waiting for the decision to keep the trace
    on_change: Callable[[TraceRecord], None] | None = None
    runtime: Any = None  # the settings in force for the spans, where the application has its own

    def __init__(
        self, trace_id: int, root_span_id: int, *, recording: bool = True, has_parent: bool = False
    ) -> None:
        self.trace_id = trace_id
        self.root_span_id = root_span_id
        self.has_parent = has_parent  # the root continues a trusted caller's trace
        self.recording = recording  # False: nothing of this trace is stored
        self.attributes: dict[str, Any] = {}  # the root's, merged in when it is written
        if recording:
            self.register()

    def register(self, span_id: int = 0) -> None:
        """Have the span processor find this record by its trace id.

        Where the garbage collector ends a span, it has taken the weak map's references away before.

        Args:
            span_id: The span that is about to end, where that may be so.
        """
        if self.has_parent and self._is_another():
            note_span(self, self.root_span_id)
            if span_id:
                note_span(self, span_id)
        else:
            _alive[self.trace_id] = weakref.ref(self, MethodType(_forget, self.trace_id))

    def _is_another(self) -> bool:
        """True where the trace has a living record already; it lives on as long as this one."""
        global several
        first = _living(self.trace_id)
        if first is not None and first is not self:
            self.first, several = first, True
        return self.first is not None

    @property
    def ended(self) -> bool:
        """True once the root span has ended: a later change is a patch to the stored trace."""
        return self.on_change is not None

    @property
    def failed(self) -> bool:
        """True where the trace counts as an error."""
        return self.state == "ERROR" if self.state is not None else self.error

    def update(
        self,
        *,
        tags: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        client_request_id: str | None = None,
        session_id: str | None = None,
        user: str | None = None,
        request_preview: str | None = None,
        response_preview: str | None = None,
        state: str | None = None,
        model_id: str | None = None,
    ) -> None:
        """Set facts of the trace; what is None stays as it is.

        Args:
            tags: Added to the trace's tags; other values than strings are stored as their `str`.
            metadata: Added to the trace's metadata, likewise. `mlflow.trace.session` and
                `mlflow.trace.user` set the session and the user.
            client_request_id: The caller's id of the request.
            session_id: The session (conversation) that the trace belongs to.
            user: The user that the trace belongs to; wins over what a header claimed.
            request_preview: Shown instead of a preview made from the inputs.
            response_preview: Shown instead of a preview made from the outputs.
            state: "OK" or "ERROR": the trace's state, whatever its spans say.
            model_id: Stored as the metadata `mlflow.modelId`.

        Raises:
            TracemwError: `state` is something else, a preview is no string (as MLflow has it), or tags or metadata
                are no dictionary. Nothing was changed.
        """
        _check_preview("request_preview", request_preview)
        _check_preview("response_preview", response_preview)
        state = None if state is None else _checked_state(state)
        new_tags = _strings("tags", tags) if tags else None
        new_metadata = _strings("metadata", metadata) if metadata else None
        if state is not None:
            self.state = state
        if new_tags:
            self._own("tags").update(new_tags)
        if new_metadata:
            self._update_metadata(new_metadata)
        if model_id is not None:
            self._own("metadata").update(_strings("metadata", {MODEL_METADATA: model_id}))
        if client_request_id is not None:
            self.client_request_id = str(client_request_id)
        if session_id is not None:
            self.session_id = str(session_id)
        if user is not None:
            self.user_id = str(user)
        if request_preview:
            self.request_preview = request_preview
        if response_preview:
            self.response_preview = response_preview
        self.changed()

    def _update_metadata(self, metadata: dict[str, str]) -> None:
        if SESSION_METADATA in metadata:
            self.session_id = metadata.pop(SESSION_METADATA)
        if USER_METADATA in metadata:
            self.user_id = metadata.pop(USER_METADATA)
        self._own("metadata").update(metadata)

    def remove_tag(self, key: str) -> bool:
        """Remove a tag; False where there is none of that key."""
        return self._own("tags").pop(key, None) is not None

    def _own(self, name: str) -> dict[str, str]:
        """Return the dictionary of this name, made when it is first changed, whichever thread comes first."""
        return self.__dict__.setdefault(name, {})  # type: ignore[no-any-return]

    def changed(self) -> None:
        """Queue the record again if its root has ended already."""
        if self.on_change is not None:
            self.on_change(self)

    def parent_of_kept(self, parent_id: int | None) -> int | None:
        """Follow a parent id past spans that are not kept."""
        dropped = self.dropped_spans
        while dropped and parent_id in dropped:
            parent_id = dropped[parent_id]
        return parent_id


def current_record(context: Context | None = None) -> TraceRecord | None:
    """Return the record of the trace that the given (or current) OpenTelemetry context belongs to."""
    return otel_context.get_value(RECORD_KEY, context)  # type: ignore[return-value]


def record_of(trace_id: int, span_id: int = 0) -> TraceRecord | None:
    """Return the living record of a trace, if it is one of ours and still in somebody's hands.

    Args:
        trace_id: The trace.
        span_id: A span of it that is open, or a root: where the trace has several roots here, its record is that
            of the root which the span belongs to. Without it, the first root's, as in the store.
    """
    if several and (other := _others.get((trace_id, span_id))) is not None:
        return other
    return _living(trace_id)


def _living(trace_id: int) -> TraceRecord | None:
    found = _alive.get(trace_id)
    return None if found is None else found()


def note_span(record: TraceRecord, span_id: int) -> None:
    """Take note of a span below a root that is not the first of its trace here."""
    _others[record.trace_id, span_id] = record


def forget_span(record: TraceRecord, span_id: int) -> None:
    """Forget a span that has ended; the root is known as long as the record is."""
    if span_id != record.root_span_id:
        _others.pop((record.trace_id, span_id), None)


def kept(span: Any) -> Any:
    """Return the span, or the nearest one above it that is kept."""
    return getattr(span, KEPT, span)


def with_record(context: Context, record: TraceRecord) -> Context:
    """Return the context with the record in it."""
    return otel_context.set_value(RECORD_KEY, record, context)


def _check_preview(name: str, value: object) -> None:
    if value is not None and not isinstance(value, str):
        raise TracemwError(f"The `{name}` parameter must be a string, but got {type(value).__name__}.")


def _checked_state(state: object) -> str:
    text = str(getattr(state, "value", state)).upper()
    if text not in ("OK", "ERROR"):
        raise TracemwError(f"State must be either 'OK' or 'ERROR', but got '{state}'.")
    return text


def _strings(kind: str, values: Mapping[str, Any]) -> dict[str, str]:
    """Return keys and values as strings, with a warning for those that are none (as MLflow does)."""
    if not isinstance(values, Mapping):
        raise TracemwError(f"The `{kind}` parameter must be a dictionary, but got {type(values).__name__}.")
    others = [key for key, value in values.items() if not (isinstance(key, str) and isinstance(value, str))]
    if not others:
        return dict(values)
    made: dict[str, str] = {}
    for key, value in values.items():
        try:
            made[str(key)] = str(value)
        except Exception:
            logger.warning("one of the %s has no text form and is left out (%s)", kind, type(value).__name__)
    told = [key if isinstance(key, str) else type(key).__name__ for key in others[:5]]
    logger.warning("values of %s should be strings; stored as text: %r", kind, told)
    return made
