"""MLflow's table of traces in progress while MLflow is bridged: our records, seen as MLflow sees traces.

MLflow's own holds each trace until its root has ended, a thousand of them at most. This one holds nothing: it
finds the record by the trace's id, shows a copy of what it knows, and writes back what has changed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from opentelemetry import trace as trace_api

from tracemw._mlflow_internals import find, find_wanted
from tracemw._mlflow_spans import RECORD, BridgedSpan, bridged, held, live
from tracemw.current import checked
from tracemw.guard import due, guarded, logger
from tracemw.record import SESSION_METADATA, USER_METADATA, TraceRecord, record_of

Manager: Any = find("mlflow.tracing.trace_manager", "InMemoryTraceManager")
_Trace: Any = find("mlflow.tracing.trace_manager", "_Trace")
_TraceInfo: Any = find("mlflow.entities.trace_info", "TraceInfo")
_TraceLocation: Any = find("mlflow.entities.trace_location", "TraceLocation")
_TraceState: Any = find("mlflow.entities.trace_state", "TraceState")
_update_prompts: Any = find_wanted("mlflow.tracing.utils.prompt", "update_linked_prompts_tag")

LINKED_PROMPTS: Final = "mlflow.linkedPrompts"


class _Made(threading.local):
    """What this thread's last call of a tracer has made: the caller asks for it by its id at once."""

    span_id: str = ""
    span: Any = None


made: Final = _Made()


def hand_over(span_id: int, span: Any) -> None:
    """Keep a span for whoever has had it made."""
    made.span_id, made.span = f"{span_id:016x}", span


class TraceTable(Manager):  # type: ignore[misc]
    """Stands for MLflow's table; traces that MLflow began before it was bridged are left to the one before.

    Args:
        before: The table that was there.
    """

    def __init__(self, before: Any) -> None:
        super().__init__()
        parts: dict[str, Any] = self.__dict__
        if before is not None:
            parts.update(before.__dict__)
        parts["_traces"] = _Traces(parts["_traces"])

    @contextmanager
    def get_trace(self, trace_id: Any) -> Iterator[Any]:
        """Give the trace, to look at and to change; None where nothing is known of it."""
        record = _record(trace_id)
        if record is None:
            with super().get_trace(trace_id) as found:
                yield _nobodys(trace_id) if found is None else found
            return
        view = View(record)
        yield view.trace
        view.write_back()

    def get_span_from_id(self, trace_id: Any, span_id: str) -> Any:
        """Return a span that is in use."""
        if span_id is not None and made.span_id == span_id:
            span, made.span, made.span_id = made.span, None, ""
            return span
        found = live.get(span_id)
        if found is None:
            found = super().get_span_from_id(trace_id, span_id)
        return _current(span_id) if found is None else found

    def get_root_span_id(self, trace_id: Any) -> Any:
        """Return the span that `MlflowClient.end_trace` ends: in a request, the last that a client began."""
        begun = [span for span in held.get(trace_id, ()) if span._is_top]
        if begun:
            return begun[-1].span_id
        record = _record(trace_id)
        return super().get_root_span_id(trace_id) if record is None else f"{record.root_span_id:016x}"

    def get_mlflow_trace_id_from_otel_id(self, otel_trace_id: int) -> Any:
        """Return the trace's id as MLflow writes it."""
        if record_of(otel_trace_id) is not None:
            return f"tr-{otel_trace_id:032x}"
        return super().get_mlflow_trace_id_from_otel_id(otel_trace_id)

    def register_trace(self, otel_trace_id: int, trace_info: Any, is_remote_trace: bool = False) -> None:
        """Take note of a trace that we know nothing of."""
        if record_of(otel_trace_id) is None:
            super().register_trace(otel_trace_id, trace_info, is_remote_trace)

    def register_span(self, span: Any) -> None:
        """Take note of a span that somebody else has made, for as long as it is in somebody's hands."""
        if isinstance(span, BridgedSpan):
            live[span.span_id] = span
        elif getattr(getattr(span, "_span", None), RECORD, None) is not None:
            span._span._tracemw_live = live[span.span_id] = span
        else:
            super().register_span(span)

    def register_prompt(self, trace_id: str, prompt: Any) -> None:
        """Link a prompt to a trace, by the tag that MLflow has for that."""
        if _record(trace_id) is None:
            super().register_prompt(trace_id, prompt)
        elif _update_prompts is not None:
            with self.get_trace(trace_id) as trace:
                tags = trace.info.tags
                tags[LINKED_PROMPTS] = _update_prompts(tags.get(LINKED_PROMPTS), [prompt])

    def pop_trace(self, otel_trace_id: int) -> Any:
        """Give away a trace that is not ours; ours end by themselves."""
        return None if record_of(otel_trace_id) is not None else super().pop_trace(otel_trace_id)


class View:
    """A trace as MLflow sees it.

    Args:
        record: What is known of it.
    """

    def __init__(self, record: TraceRecord) -> None:
        self._record = record
        self._tags = dict(record.tags)
        self._metadata = {**record.process, **record.metadata}
        for key, value in ((SESSION_METADATA, record.session_id), (USER_METADATA, record.user_id)):
            if value is not None:
                self._metadata[key] = value
        state = _TraceState(record.state) if record.state else _TraceState.IN_PROGRESS
        self.trace = _Trace(
            _TraceInfo(
                trace_id=f"tr-{record.trace_id:032x}",
                trace_location=_TraceLocation.from_experiment_id("0"),
                request_time=record.start_ns // 1_000_000,
                execution_duration=None,
                state=state,
                client_request_id=record.client_request_id,
                request_preview=record.request_preview,
                response_preview=record.response_preview,
                trace_metadata=dict(self._metadata),
                tags=dict(self._tags),
            )
        )
        self.trace.span_dict = _Spans(f"tr-{record.trace_id:032x}")
        self._state = state

    @guarded()
    def write_back(self) -> None:
        """Write what has changed onto the record."""
        record, info = self._record, self.trace.info
        tags, metadata = _changed(self._tags, info.tags), _changed(self._metadata, info.trace_metadata)
        for key in self._tags.keys() - info.tags.keys():
            record.remove_tag(key)
        request_id = info.client_request_id
        if request_id == record.client_request_id:
            request_id = None
        record.update(
            tags=tags,
            session_id=checked("session_id", metadata.pop(SESSION_METADATA, None)),
            user=checked("user_id", metadata.pop(USER_METADATA, None)),
            metadata=metadata,
            client_request_id=checked("client_request_id", request_id),
            request_preview=info.request_preview,
            response_preview=info.response_preview,
            state=None if info.state is self._state else info.state,
        )
        if info.assessments and due("assessments", float("inf")):
            logger.warning(
                "feedback on a trace that is in progress is not kept while MLflow is bridged; log it when the "
                "trace has been delivered. (Said once.)"
            )


class _Spans(Mapping[str, Any]):
    """The spans of a trace that are in use, looked up when they are asked for."""

    def __init__(self, trace_id: str) -> None:
        self._trace_id = trace_id

    def __getitem__(self, span_id: str) -> Any:
        found = Manager.get_instance().get_span_from_id(self._trace_id, span_id)
        if found is None:
            raise KeyError(span_id)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter([key for key, span in list(live.items()) if span.trace_id == self._trace_id])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def pop(self, span_id: str) -> Any:
        """Return a span. There is nothing to take it out of."""
        return self[span_id]


class _Traces:
    """MLflow's dictionary of traces, with ours in it for those who look there."""

    def __init__(self, traces: Any) -> None:
        self._traces = traces

    def __getitem__(self, trace_id: Any) -> Any:
        record = _record(trace_id)
        return self._traces[trace_id] if record is None else View(record).trace

    def __setitem__(self, trace_id: Any, trace: Any) -> None:
        self._traces[trace_id] = trace

    def __len__(self) -> int:
        return len(self._traces)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._traces, name)


def _current(span_id: str) -> Any:
    """Return a view of the current span, if it is the one: nobody holds those that MLflow asked for before."""
    span = trace_api.get_current_span()
    ids = span.get_span_context()
    return bridged(span) if ids.is_valid and span_id == f"{ids.span_id:016x}" else None


def _record(trace_id: Any) -> TraceRecord | None:
    """Return the record of a trace that is being recorded."""
    if not isinstance(trace_id, int):
        try:
            trace_id = int(str(trace_id).rpartition("/")[2].removeprefix("tr-"), 16)
        except ValueError:
            return None
    record = record_of(trace_id)
    return record if record is not None and record.recording else None


def _nobodys(trace_id: Any) -> Any:
    """Return a trace that is thrown away, where the current one is OpenTelemetry's alone: MLflow would fail."""
    ids = trace_api.get_current_span().get_span_context()
    if not ids.is_valid or trace_id != f"tr-{ids.trace_id:032x}":
        return None
    return View(TraceRecord(ids.trace_id, ids.span_id, recording=False)).trace


def _changed(before: Mapping[str, str], after: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in after.items() if before.get(key, _MISSING) != value}


_MISSING: Final = object()
