"""What the spans' hot path needs of the settings: compiled once, for the process or for one application of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tracemw import config
from tracemw._redact import DEFAULT_REDACTOR, Redactor
from tracemw.capture import attribute_value, dumps
from tracemw.record import TraceRecord, current_record
from tracemw.settings import OF_SPANS, Settings


class Runtime:
    """What the hot path needs of the settings, made anew when they change."""

    __slots__ = (
        "generation",
        "redactor",
        "capture_inputs",
        "capture_outputs",
        "processors",
        "rate",
        "keeps",
        "keep_errors",
        "keep_slower_than",
        "operation_spans",
    )

    def __init__(self, settings: Settings | None = None) -> None:
        self.generation = config.generation()
        settings = config.settings() if settings is None else settings
        self.redactor = DEFAULT_REDACTOR if settings.redact is None else Redactor(settings.redact)
        self.capture_inputs = settings.capture_inputs
        self.capture_outputs = settings.capture_outputs
        self.processors: tuple[Callable[[Any], Any], ...] = settings.span_processors
        self.rate = settings.sample_rate
        self.keeps = settings.keep_errors or settings.keep_slower_than is not None
        self.keep_errors = settings.keep_errors
        self.keep_slower_than = settings.keep_slower_than
        self.operation_spans = settings.operation_spans


_runtime: Runtime | None = None


_applications_differ = False  # one of them has settings of its own


def runtime() -> Runtime:
    """Return what is in force: for the request that is being handled, else for the process."""
    global _runtime
    if _applications_differ:
        record = current_record()
        if record is not None and record.runtime is not None:
            return record.runtime  # type: ignore[no-any-return]
    now = _runtime
    if now is None or now.generation != config.generation():
        now = _runtime = Runtime()
    return now


def runtime_of(record: TraceRecord | None) -> Runtime:
    """Return what is in force for a trace."""
    if record is not None and record.runtime is not None:
        return record.runtime  # type: ignore[no-any-return]
    return runtime()


def runtime_for(settings: Settings) -> Runtime | None:
    """Return what is in force in the requests of an application; None where that is in force anyway."""
    global _applications_differ
    usual = config.settings()
    if all(getattr(settings, name) == getattr(usual, name) for name in OF_SPANS):
        return None
    _applications_differ = True
    return Runtime(settings)


def encoded(value: object) -> str:
    """Return JSON text of any value, bounded and redacted; never raises."""
    return dumps(value, redactor=runtime().redactor)


def encoded_attribute(key: str, value: object) -> Any:
    """Return what OpenTelemetry takes as the attribute: MLflow's own keys hold JSON text, others plain values."""
    return (
        encoded(value) if key.startswith("mlflow.") else attribute_value(key, value, redactor=runtime().redactor)
    )
