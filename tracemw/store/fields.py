"""The fields of the filter language: a name as it was written -> what it stands for in the store."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NoReturn

from .codec import PROMOTED
from .grammar import Field, fail, nearest
from .match import Sql

TRACE_NAME_TAG: Final = "mlflow.traceName"

_PREVIEWS = "(COALESCE(t.request_preview, '') || char(10) || COALESCE(t.response_preview, ''))"
_CONTENT = (
    "(s.name || char(10) || s.attributes || char(10) || s.events || COALESCE(char(10) || s.status_message, ''))"
)
# What ended without an error is shown as OK, unless it was left or cancelled.
_SPAN_STATUS = """CASE WHEN s.status <> 'UNSET' THEN s.status
 WHEN instr(s.attributes, '"tracemw.outcome"') = 0 THEN 'OK'
 WHEN json_extract(s.attributes, '$."tracemw.outcome"') IN ('completed', 'error') THEN 'OK' ELSE 'UNSET' END"""


@dataclass(frozen=True, slots=True)
class Operand:
    """What a field stands for.

    Attributes:
        kind: What it can be compared with: `text`, `state`, `id`, `number`, `time` (nanoseconds, unique), `end`
            (milliseconds), `duration` (nanoseconds), `content` (JSON text), `attribute` (`number` is its other
            form), `prompt`, `assessment` or `issue` (which the store does not have).
        sql: The value, over `traces AS t` and, with `of_span`, `spans AS s`.
        token: Kind and key of the word in the token index for an equal value; the kinds are those of `tokens.py`
            and, without a key but for attributes, those of `words.py`.
        number: For an attribute of a span, its value where that is a number.
        both: For `text`: what else is searched besides the spans' content.
    """

    kind: str
    sql: Sql
    of_span: bool = False
    token: tuple[str, str] | None = None
    number: Sql | None = None
    both: Sql | None = None


def _column(name: str, kind: str = "text", word: str | None = None) -> Operand:
    return Operand(kind, (f"t.{name}", ()), token=(word, "") if word else None)


def _token_column(name: str, kind: str = "text") -> Operand:
    return Operand(kind, (f"t.{name}", ()), token=("c", name))


def _promoted(key: str) -> Operand:
    return Operand("text", (f"t.{PROMOTED[key]}", ()), token=("m", key))


_START = _column("start_key", "time")
_END = Operand("end", ("(t.start_ns / 1000000 + COALESCE(t.duration_ns, 0) / 1000000)", ()), token=("e", ""))
_DURATION = _column("duration_ns", "duration", "d")
_STATE = _token_column("state", "state")
_NAME = _token_column("name")
_SESSION = _token_column("session_id")
_USER = _token_column("user_id")
_ID = _column("trace_id", "id")

ATTRIBUTES: Final[dict[str, Operand]] = {
    # MLflow's.
    "name": _NAME,
    "status": _STATE,
    "timestamp": _START,
    "timestamp_ms": _START,
    "execution_time": _DURATION,
    "execution_time_ms": _DURATION,
    "end_time": _END,
    "end_time_ms": _END,
    "request_id": _ID,
    "client_request_id": _token_column("client_request_id"),
    "prompt": Operand("prompt", ("t.tags", ()), token=("p", "")),
    "text": Operand("content", (_CONTENT, ()), of_span=True, both=(_PREVIEWS, ())),
    # Ours.
    "trace_id": _ID,
    "state": _STATE,
    "duration": _DURATION,
    "duration_ms": _DURATION,
    "session": _SESSION,
    "session_id": _SESSION,
    "user": _USER,
    "user_id": _USER,
    "environment": _promoted("environment"),
    "version": _promoted("app_version"),
    "app_version": _promoted("app_version"),
    "deployment": _promoted("deployment_id"),
    "deployment_id": _promoted("deployment_id"),
    "region": _promoted("region"),
    "method": _token_column("method"),
    "route": _token_column("route"),
    "status_code": _token_column("status_code", "number"),
    "outcome": _token_column("outcome"),
    "request": _column("request_preview", word="q"),
    "request_preview": _column("request_preview", word="q"),
    "response": _column("response_preview", word="r"),
    "response_preview": _column("response_preview", word="r"),
}
RUN_ID_METADATA: Final = "mlflow.sourceRun"

_SPAN_DURATION = Operand("duration", ("(s.end_ns - s.start_ns)", ()), of_span=True, token=("d", ""))
SPAN_FIELDS: Final[dict[str, Operand]] = {
    "name": Operand("text", ("s.name", ()), of_span=True, token=("s", "")),
    "type": Operand("text", ("COALESCE(s.span_type, 'UNKNOWN')", ()), of_span=True, token=("y", "")),
    "status": Operand("state", (_SPAN_STATUS, ()), of_span=True, token=("u", "")),
    "content": Operand("content", (_CONTENT, ()), of_span=True),
    "execution_time": _SPAN_DURATION,
    "execution_time_ms": _SPAN_DURATION,
    "duration": _SPAN_DURATION,
    "duration_ms": _SPAN_DURATION,
}
_ATTRIBUTE_PREFIXES = ("attribute", "attributes", "trace")
_KEYED_PREFIXES = ("tag", "tags", "metadata", "request_metadata", "span", "feedback", "expectation")
_PREFIXES = (*_ATTRIBUTE_PREFIXES, *_KEYED_PREFIXES)
_PLAIN_KEY = re.compile(r'[^"\\\x00-\x1f\x7f-\U0010ffff]+')


def resolve(text: str, field: Field) -> Operand:
    """Return what a field stands for.

    Args:
        text: The whole string, for the message.

    Raises:
        FilterError: There is no such field; the message suggests the nearest one.
    """
    prefix, key = field.path[0], ".".join(field.path[1:])
    if len(field.path) == 1:
        return _attribute(text, field, prefix)
    if prefix in _ATTRIBUTE_PREFIXES:
        return _attribute(text, field, key)
    if prefix in ("tag", "tags"):
        return tag(key)
    if prefix in ("metadata", "request_metadata"):
        return metadata(key)
    if prefix == "span":
        return _span_field(text, field, key)
    if prefix in ("feedback", "expectation") and key:
        return Operand("assessment", ("NULL", ()))
    if prefix == "issue" and key == "id":
        return Operand("issue", ("NULL", ()))
    close = nearest(prefix, _PREFIXES)
    hint = (
        close.replace("'?", f".{key}'?") or f"; a key of the metadata is written metadata.`{'.'.join(field.path)}`"
    )
    fail(text, f"unknown field '{'.'.join(field.path)}'{hint}", field.place)


def metadata(key: str) -> Operand:
    """Return what `metadata.<key>` stands for: a column where there is one for the key."""
    if key == "mlflow.trace.session":
        return _SESSION
    if key == "mlflow.trace.user":
        return _USER
    return _promoted(key) if key in PROMOTED else Operand("text", _value("t.metadata", key), token=("m", key))


def tag(key: str) -> Operand:
    """Return what `tags.<key>` stands for."""
    return _NAME if key == TRACE_NAME_TAG else Operand("text", _value("t.tags", key), token=("t", key))


def _attribute(text: str, field: Field, name: str) -> Operand:
    if name == "run_id":
        return metadata(RUN_ID_METADATA)
    operand = ATTRIBUTES.get(name)
    return _unknown_attribute(text, field, name) if operand is None else operand


def _unknown_attribute(text: str, field: Field, name: str) -> NoReturn:
    if name in _PREFIXES:
        fail(text, f"a key is missing: {name}.<key>", field.place)
    close = nearest(name, [*ATTRIBUTES, "run_id"])
    hint = close or f"; a key of the metadata is written metadata.{name}, a tag tags.{name}"
    fail(text, f"unknown field '{name}'{hint}", field.place)


def _span_field(text: str, field: Field, key: str) -> Operand:
    name = key.removeprefix("attributes.")
    if name != key and name:
        number = _attribute_number(name)
        return Operand("attribute", _attribute_text(name), of_span=True, token=("a", name), number=number)
    operand = SPAN_FIELDS.get(key)
    if operand is None:
        hint = nearest(key, SPAN_FIELDS) or f"; an attribute is written span.attributes.`{key}`"
        fail(text, f"unknown field 'span.{key}'{hint}", field.place)
    return operand


def _value(column: str, key: str) -> Sql:
    """The text under a key of a JSON object. Both forms take any key; the first one is several times as fast."""
    if _PLAIN_KEY.fullmatch(key):
        return f"json_extract({column}, ?)", (f'$."{key}"',)
    return f"(SELECT value FROM json_each({column}) WHERE key = ?)", (key,)


def _attribute_value(form: Callable[[str, str], str], key: str) -> Sql:
    """An attribute of a span; MLflow's own (`mlflow.*`) are JSON text in their turn."""
    row = "SELECT type, value FROM json_each(s.attributes) WHERE key = ?"
    if key.startswith("mlflow."):
        decoded = "json_type(value) AS type, json_extract(value, '$') AS value"
        row = f"SELECT {decoded} FROM ({row}) WHERE json_valid(value)"
    sql = f"(SELECT {form('type', 'value')} FROM ({row}))"
    if not _PLAIN_KEY.fullmatch(key):
        return sql, (key,)
    # Most spans have no such attribute: a glance at the text saves parsing it.
    return f"CASE WHEN instr(s.attributes, ?) THEN {sql} END", (f'"{key}"', key)


def _attribute_text(key: str) -> Sql:
    return _attribute_value(
        lambda type_, value: (
            f"CASE {type_} WHEN 'true' THEN 'true' WHEN 'false' THEN 'false' ELSE CAST({value} AS TEXT) END"
        ),
        key,
    )


def _attribute_number(key: str) -> Sql:
    return _attribute_value(lambda type_, value: f"CASE WHEN {type_} IN ('integer', 'real') THEN {value} END", key)
