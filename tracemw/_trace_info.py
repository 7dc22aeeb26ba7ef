"""What is known about a trace as a whole, as plain values. Published by `tracemw.entities`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from enum import Enum
from typing import Any, Final

from tracemw._span_parts import EntityError

TOKEN_USAGE: Final = "mlflow.trace.tokenUsage"
COST: Final = "mlflow.trace.cost"
LOCAL_EXPERIMENT: Final = "0"  # MLflow's default experiment: the local store knows no others


class TraceState(str, Enum):
    """How a trace went; STATE_UNSPECIFIED where it was cut short, which is no error."""

    STATE_UNSPECIFIED = "STATE_UNSPECIFIED"
    OK = "OK"
    ERROR = "ERROR"
    IN_PROGRESS = "IN_PROGRESS"

    def __str__(self) -> str:
        return self.value


class TraceStatus(str, Enum):
    """MLflow 2's name and values of `TraceState`."""

    UNSPECIFIED = "TRACE_STATUS_UNSPECIFIED"
    OK = "OK"
    ERROR = "ERROR"
    IN_PROGRESS = "IN_PROGRESS"

    def to_state(self) -> TraceState:
        """The state of today."""
        return TraceState.STATE_UNSPECIFIED if self is TraceStatus.UNSPECIFIED else TraceState(self.value)

    @classmethod
    def from_state(cls, state: TraceState) -> TraceStatus:
        """The status that stood for a state."""
        return cls.UNSPECIFIED if state is TraceState.STATE_UNSPECIFIED else cls(state.value)


class TraceLocationType(str, Enum):
    """Where traces can be."""

    TRACE_LOCATION_TYPE_UNSPECIFIED = "TRACE_LOCATION_TYPE_UNSPECIFIED"
    MLFLOW_EXPERIMENT = "MLFLOW_EXPERIMENT"


@dataclass
class MlflowExperimentLocation:
    """An MLflow experiment."""

    experiment_id: str


@dataclass
class TraceLocation:
    """Where a trace is: in an MLflow experiment; `"0"` stands for the local store."""

    type: TraceLocationType = TraceLocationType.TRACE_LOCATION_TYPE_UNSPECIFIED
    mlflow_experiment: MlflowExperimentLocation | None = None

    @classmethod
    def from_experiment_id(cls, experiment_id: str) -> TraceLocation:
        """The location of an experiment."""
        return cls(TraceLocationType.MLFLOW_EXPERIMENT, MlflowExperimentLocation(experiment_id))

    def to_dict(self) -> dict[str, Any]:
        """The location as MLflow's dictionary."""
        known: dict[str, Any] = {"type": self.type.value}
        if self.mlflow_experiment:
            known["mlflow_experiment"] = {"experiment_id": self.mlflow_experiment.experiment_id}
        return known

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TraceLocation:
        """The location that `to_dict` wrote; unspecified if it is of a kind that only Databricks has."""
        experiment = data.get("mlflow_experiment")
        return cls.from_experiment_id(experiment["experiment_id"]) if experiment else cls()


@dataclass
class TraceInfo:
    """What is known about a trace as a whole.

    Attributes:
        trace_id: `tr-` and 32 hexadecimal digits.
        trace_location: Where the trace is.
        request_time: When it began, in milliseconds since the epoch.
        state: How it went.
        request_preview: What was asked, in at most 1,000 characters.
        response_preview: What was answered.
        client_request_id: The request's id, given by the client or made here.
        execution_duration: In milliseconds; None while the trace is in progress.
        trace_metadata: Facts that stay: version, region, `mlflow.trace.session`, `mlflow.trace.user` ...
        tags: Facts that may change.
        assessments: Judgements about the trace, as MLflow's dictionaries; the local store has none.
    """

    trace_id: str
    trace_location: TraceLocation
    request_time: int
    state: TraceState
    request_preview: str | None = None
    response_preview: str | None = None
    client_request_id: str | None = None
    execution_duration: int | None = None
    trace_metadata: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    assessments: list[Any] = field(default_factory=list)

    @property
    def request_id(self) -> str:
        """MLflow's older name of `trace_id`."""
        return self.trace_id

    @property
    def experiment_id(self) -> str | None:
        """The MLflow experiment that the trace is in."""
        experiment = self.trace_location.mlflow_experiment
        return experiment.experiment_id if experiment else None

    @experiment_id.setter
    def experiment_id(self, value: str) -> None:
        self.trace_location = TraceLocation.from_experiment_id(value)

    @property
    def request_metadata(self) -> dict[str, str]:
        """MLflow's older name of `trace_metadata`."""
        return self.trace_metadata

    @property
    def timestamp_ms(self) -> int:
        """MLflow's older name of `request_time`."""
        return self.request_time

    @timestamp_ms.setter
    def timestamp_ms(self, value: int) -> None:
        self.request_time = value

    @property
    def execution_time_ms(self) -> int | None:
        """MLflow's older name of `execution_duration`."""
        return self.execution_duration

    @execution_time_ms.setter
    def execution_time_ms(self, value: int | None) -> None:
        self.execution_duration = value

    @property
    def status(self) -> TraceStatus:
        """MLflow's older form of `state`."""
        return TraceStatus.from_state(self.state)

    @status.setter
    def status(self, value: TraceStatus) -> None:
        self.state = value.to_state()

    @property
    def token_usage(self) -> dict[str, int] | None:
        """`input_tokens`, `output_tokens`, `total_tokens` of all calls of language models; None without any."""
        usage = self.trace_metadata.get(TOKEN_USAGE)
        return json.loads(usage) if usage else None

    @property
    def cost(self) -> dict[str, float] | None:
        """`input_cost`, `output_cost`, `total_cost` in USD of all calls of language models; None without any."""
        cost = self.trace_metadata.get(COST)
        return json.loads(cost) if cost else None

    def to_dict(self) -> dict[str, Any]:
        """The facts as MLflow's dictionary (version 3); what is not known is left out."""
        known = {
            "trace_id": self.trace_id,
            "trace_location": self.trace_location.to_dict(),
            "request_time": _to_rfc3339(self.request_time),
            "state": self.state.value,
            "trace_metadata": dict(self.trace_metadata) or None,
            "tags": dict(self.tags) or None,
            "assessments": self.assessments or None,
            "client_request_id": self.client_request_id,
            "request_preview": self.request_preview,
            "response_preview": self.response_preview,
            "execution_duration_ms": self.execution_duration,
        }
        return {key: value for key, value in known.items() if value is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TraceInfo:
        """The facts that `to_dict` wrote, of this library or of any MLflow 3 or 2.

        Raises:
            EntityError: It describes no trace.
        """
        try:
            return cls._from_dict_v2(data) if "request_id" in data else cls._from_dict_v3(data)
        except Exception as error:
            raise EntityError(
                f"Failed to create a TraceInfo from the given dictionary: {type(error).__name__}: {error}"
            ) from error

    @classmethod
    def _from_dict_v3(cls, data: Mapping[str, Any]) -> TraceInfo:
        return cls(
            trace_id=data["trace_id"],
            trace_location=TraceLocation.from_dict(data.get("trace_location") or {}),
            request_time=_from_rfc3339(data["request_time"]),
            state=TraceState(data.get("state") or TraceState.STATE_UNSPECIFIED),
            request_preview=data.get("request_preview"),
            response_preview=data.get("response_preview"),
            client_request_id=data.get("client_request_id"),
            execution_duration=data.get("execution_duration_ms"),
            trace_metadata=dict(data.get("trace_metadata") or {}),
            tags=dict(data.get("tags") or {}),
            assessments=list(data.get("assessments") or ()),
        )

    @classmethod
    def _from_dict_v2(cls, data: Mapping[str, Any]) -> TraceInfo:
        return cls(
            trace_id=data["request_id"],
            trace_location=TraceLocation.from_experiment_id(data["experiment_id"]),
            request_time=data["timestamp_ms"],
            state=TraceStatus(data["status"]).to_state(),
            execution_duration=data.get("execution_time_ms"),
            trace_metadata=dict(data.get("request_metadata") or {}),
            tags=dict(data.get("tags") or {}),
        )


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)
_RFC3339: Final = r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d{1,9})?(Z|[-+]\d\d:\d\d)"


def _to_rfc3339(milliseconds: int) -> str:
    moment = _EPOCH + timedelta(milliseconds=milliseconds)
    fraction = "milliseconds" if milliseconds % 1000 else "seconds"
    return moment.replace(tzinfo=None).isoformat(timespec=fraction) + "Z"


def _from_rfc3339(text: str) -> int:
    found = re.fullmatch(_RFC3339, text)
    if not found:
        raise ValueError(f"{text!r} is no time such as 2026-11-20T17:58:53.123Z")
    moment = datetime.fromisoformat(found[1] + ("+00:00" if found[3] == "Z" else found[3]))
    milliseconds = int((found[2] or ".0")[1:4].ljust(3, "0"))
    return (moment - _EPOCH) // timedelta(milliseconds=1) + milliseconds
