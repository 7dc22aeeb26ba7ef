"""What the bridge uses of MLflow that is not its documented API: named here, and nowhere else.

MLflow keeps its tracing apart from everybody else's: a provider, a runtime context and a table of traces in
progress of its own. The bridge puts others in their places. That is done by assignment to the names below, all of
them or none, and can be undone.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

OLDEST: Final = (3, 10)

# Without one of these the bridge refuses.
NEEDED: Final = {
    "mlflow.tracing.provider": (
        "provider._isolated_tracer_provider",  # what makes MLflow's spans
        "provider.once._done",
        "_initialize_tracer_provider",  # called where a setting has changed, and before the first span
        "mlflow_runtime_context",  # where MLflow keeps its current span
        "start_span_in_context",
        "start_detached_span",
        "MLFLOW_USE_DEFAULT_TRACER_PROVIDER.get",
    ),
    "mlflow.tracing.fluent": ("create_mlflow_span", "_set_last_active_trace_id", "start_span_no_context"),
    "mlflow.tracing.trace_manager": (  # the table of traces in progress
        "InMemoryTraceManager._instance",
        "InMemoryTraceManager.get_instance",
        "InMemoryTraceManager.get_trace",
        "InMemoryTraceManager.get_span_from_id",
        "InMemoryTraceManager.get_root_span_id",
        "InMemoryTraceManager.get_mlflow_trace_id_from_otel_id",
        "InMemoryTraceManager.register_trace",
        "InMemoryTraceManager.register_span",
        "InMemoryTraceManager.register_prompt",
        "InMemoryTraceManager.pop_trace",
        "_Trace",
    ),
    "mlflow.tracing.sampling": ("_SAMPLING_RATIO_OVERRIDE.get",),
    "mlflow.tracing.utils.processor": ("apply_span_processors",),
    "mlflow.tracing.processor.base_mlflow": ("BaseMlflowSpanProcessor",),
    "mlflow.entities.span": ("LiveSpan.end", "LiveSpan.set_attribute", "LiveSpan.record_exception", "NoOpSpan"),
    "mlflow.entities.trace_info": ("TraceInfo",),
    "mlflow.entities.trace_location": ("TraceLocation.from_experiment_id",),
    "mlflow.entities.trace_state": ("TraceState",),
}

# Without one of these something less is recorded.
WANTED: Final = {
    "mlflow.tracking.client": ("MlflowClient.start_trace", "MlflowClient.start_span"),  # not in mlflow-tracing
    "mlflow.tracing.context": ("get_configured_trace_metadata", "get_configured_trace_tags"),  # since 3.11
    "mlflow.tracking.fluent": ("_get_latest_active_run", "_get_active_model_id_global"),
    "mlflow.tracing.utils.prompt": ("update_linked_prompts_tag",),
    "mlflow.environment_variables": ("MLFLOW_TRACE_SAMPLING_RATIO.get",),
}


def find(module: str, path: str) -> Any:
    """Return something of MLflow's.

    Raises:
        ImportError: There is no such module.
        AttributeError: The module has no such thing.
    """
    found: Any = import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def find_wanted(module: str, path: str) -> Any:
    """Return something that may be missing; None then."""
    try:
        return find(module, path)
    except (ImportError, AttributeError):
        return None


def missing() -> list[str]:
    """Return what the bridge needs and the installed MLflow does not have."""
    gone = []
    for module, paths in NEEDED.items():
        for path in paths:
            try:
                find(module, path)
            except (ImportError, AttributeError):
                gone.append(f"{module}.{path}")
    return gone


class Patches:
    """Assignments to names of MLflow's, which can be undone."""

    def __init__(self) -> None:
        self._done: list[tuple[Any, str, Any]] = []

    def put(self, owner: Any, name: str, value: Any) -> Any:
        """Assign a value and return the one that was there."""
        before = vars(owner)[name]
        self._done.append((owner, name, before))
        setattr(owner, name, value)
        return before

    def undo(self) -> None:
        """Assign what was there before."""
        while self._done:
            owner, name, before = self._done.pop()
            setattr(owner, name, before)


class Always:
    """Stands for a variable of the environment that is set to true."""

    def get(self) -> bool:
        """Return True."""
        return True
