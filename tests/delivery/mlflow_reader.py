"""Reads traces with MLflow's own client; run by a Python that has MLflow, one question and one answer per line."""

from __future__ import annotations

import json
import sys
from typing import Any

import mlflow  # type: ignore[import-not-found,unused-ignore]


def answer(question: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the traces of an experiment that a filter matches, oldest first."""
    experiment = mlflow.get_experiment_by_name(question["experiment"])
    if experiment is None:
        return []
    client, found, token = mlflow.MlflowClient(), [], None
    while True:
        page = client.search_traces(
            [experiment.experiment_id],
            filter_string=question["filter"],
            max_results=500,
            order_by=["timestamp_ms ASC"],
            page_token=token,
            include_spans=question["spans"],
        )
        found += [told(trace) for trace in page]
        token = page.token
        if not token:
            return found


def told(trace: Any) -> dict[str, Any]:
    """Return a trace as JSON can have it: MLflow's own view of it."""
    info = trace.info
    return {
        "trace_id": info.trace_id,
        "state": str(getattr(info.state, "value", info.state)),
        "client_request_id": info.client_request_id,
        "request_time": info.request_time,
        "duration": info.execution_duration,
        "request_preview": info.request_preview,
        "response_preview": info.response_preview,
        "metadata": info.trace_metadata,
        "tags": info.tags,
        "spans": [
            {
                "span_id": span.span_id,
                "parent_id": span.parent_id,
                "name": span.name,
                "type": span.span_type,
                "status": str(getattr(span.status.status_code, "value", span.status.status_code)),
                "message": span.status.description,
                "inputs": span.inputs,
                "outputs": span.outputs,
                "attributes": span.attributes,
                "events": [{"name": event.name, "attributes": event.attributes} for event in span.events],
            }
            for span in (trace.data.spans if trace.data else [])
        ],
    }


for line in sys.stdin:
    try:
        result: Any = answer(json.loads(line))
    except Exception as exc:
        result = f"{type(exc).__name__}: {exc}"
    print(json.dumps(result), flush=True)
