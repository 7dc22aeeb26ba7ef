"""One condition of a filter: a field, an operator and values -> SQL."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NoReturn

from . import values
from .fields import Operand
from .grammar import Comparison, Value, fail, nearest
from .match import MAX_PATTERN, Param, Pattern, Sql, check_regex
from .words import PROMPTS_TAG

SHORT_LIST = 8  # values of IN that become parameters of their own

_MS = 1_000_000
_UNSPECIFIED = "STATE_UNSPECIFIED"
_STATES = {"TRACE_STATUS_UNSPECIFIED": _UNSPECIFIED, "TRACE_STATE_UNSPECIFIED": _UNSPECIFIED}
_ORDERED = ("<", "<=", ">", ">=")
_TEXT_OPERATORS = ("=", "!=", "LIKE", "ILIKE", "RLIKE", "CONTAINS", "IN", "NULL")
_OPERATORS = {
    "text": _TEXT_OPERATORS,
    "state": _TEXT_OPERATORS,
    "id": _TEXT_OPERATORS,
    "attribute": (*_TEXT_OPERATORS, *_ORDERED),
    "number": ("=", "!=", "IN", "NULL", *_ORDERED),
    "time": ("=", "!=", "NULL", *_ORDERED),
    "end": ("=", "!=", "NULL", *_ORDERED),
    "duration": ("=", "!=", "NULL", *_ORDERED),
    "content": ("LIKE", "ILIKE", "CONTAINS"),
    "prompt": ("=",),
    "issue": ("=",),
    "assessment": ("=", "!=", "LIKE", "ILIKE", "RLIKE", "NULL", *_ORDERED),
}
_KNOWN_OPERATORS = ("=", "!=", *_ORDERED)


def condition(text: str, now_ms: int, node: Comparison, operand: Operand) -> Sql:
    """Compile one condition.

    Args:
        text: The whole filter string, for the message.
        now_ms: What `now` means.

    Raises:
        FilterError: The operator or a value does not go with the field.
    """
    operator = node.operator
    if operator not in _OPERATORS[operand.kind]:
        _bad_operator(text, node, operand)
    if operator == "IN" and not node.values:
        fail(text, "the list is empty", node.place)
    if operator == "NULL":
        return f"{operand.sql[0]} IS {'NOT ' if node.negated else ''}NULL", operand.sql[1]
    if operand.kind == "content":
        if node.negated:
            fail(text, f"write NOT before the field: NOT {'.'.join(node.field.path)} {operator} ...", node.place)
        return pattern_of(text, node).in_json(operand.sql)
    if operand.kind in ("assessment", "issue"):
        return _assessment(text, node)
    if operand.kind == "prompt":
        return _prompt(text, node)
    if operand.kind in ("time", "duration", "end"):
        return _amount(text, now_ms, node, operand)
    if operand.kind == "number" or (operand.kind == "attribute" and is_numeric(node)):
        return _number(text, node, operand)
    return _text(text, node, operand)


def _bad_operator(text: str, node: Comparison, operand: Operand) -> NoReturn:
    operator, allowed = node.operator, _OPERATORS[operand.kind]
    hint = {"==": "; write =", "<>": "; write !=", "=~": "; write RLIKE", "!~": "; write NOT RLIKE"}.get(operator)
    if hint is None and operator not in (*_KNOWN_OPERATORS, *_TEXT_OPERATORS):
        hint = nearest(operator, allowed)
    if hint:
        fail(text, f"unknown operator {operator}{hint}", node.place)
    shown = ", ".join("IS NULL" if name == "NULL" else name for name in allowed)
    fail(text, f"{'.'.join(node.field.path)} cannot be compared by {operator}; use one of {shown}", node.place)


def _text(text: str, node: Comparison, operand: Operand) -> Sql:
    operator = node.operator
    sql, params = operand.sql
    target = (f"('tr-' || {sql})", params) if operand.kind == "id" else operand.sql
    if operator in ("LIKE", "ILIKE", "CONTAINS"):
        found = pattern_of(text, node).condition(target)
    elif operator == "RLIKE":
        pattern = values.text_of(text, node.values[0])
        if problem := check_regex(pattern):
            fail(text, problem, node.values[0].place)
        found = f"{target[0]} REGEXP ?", (*target[1], pattern)
    elif operator in _ORDERED:
        fail(text, f"{operator} needs a number", node.values[0].place)
    else:
        wanted = [plain_of(text, value, operand) for value in node.values]
        if operand.of_span and operand.kind == "state" and wanted == ["ERROR"] and operator != "!=":
            return _equal(("s.status", ()), node, wanted)  # what else the status hangs on makes no difference
        return _equal(operand.sql, node, wanted)
    return (f"NOT ({found[0]})", found[1]) if node.negated else found


def pattern_of(text: str, node: Comparison) -> Pattern:
    """Return the pattern of LIKE, ILIKE or CONTAINS."""
    pattern = values.text_of(text, node.values[0])
    if len(pattern) > MAX_PATTERN:
        fail(text, f"the pattern has more than {MAX_PATTERN:,} characters", node.values[0].place)
    if node.operator == "CONTAINS":
        return Pattern.contains(pattern)
    return Pattern.like(pattern, fold=node.operator == "ILIKE")


def _equal(operand: Sql, node: Comparison, wanted: Sequence[Param]) -> Sql:
    sql, params = operand
    if node.operator != "IN":
        return f"{sql} {node.operator} ?", (*params, wanted[0])
    word = "NOT IN" if node.negated else "IN"
    if len(wanted) <= SHORT_LIST:
        return f"{sql} {word} ({', '.join('?' * len(wanted))})", (*params, *wanted)
    return f"{sql} {word} (SELECT value FROM json_each(?))", (*params, json.dumps(wanted))


def plain_of(text: str, value: Value, operand: Operand) -> str:
    """The text to compare with; states are found in any case, ids with and without `tr-`."""
    plain = values.text_of(text, value)
    if operand.kind == "state":
        return _STATES.get(plain.upper(), plain.upper())
    return plain.removeprefix("tr-") if operand.kind == "id" else plain


def is_numeric(node: Comparison) -> bool:
    """True where an attribute of a span is compared as a number."""
    by_value = node.operator in ("=", "!=", "IN") and all(value.kind == "number" for value in node.values)
    return node.operator in _ORDERED or by_value


def _number(text: str, node: Comparison, operand: Operand) -> Sql:
    numbers: list[Param] = []
    for value in node.values:
        number = values.number_of(text, value)
        if number is None:
            fail(text, "expected a number", value.place)
        numbers.append(values.number_param(number))
    return _equal(operand.number or operand.sql, node, numbers)


def _amount(text: str, now_ms: int, node: Comparison, operand: Operand) -> Sql:
    """Compare a time or a duration.

    As in MLflow, what is compared are whole milliseconds (12.9 ms are 12); only a duration written with a finer
    unit is compared to the nanosecond. A range of the column does it, which an index can serve.
    """
    limit, has_unit = amount_of(text, now_ms, node, operand)
    scale = 1 if operand.kind == "end" else _MS
    if has_unit and limit.denominator != 1:
        return _equal(operand.sql, node, [values.number_param(limit * scale)])
    return _whole(operand.sql, node.operator, limit, scale)


def amount_of(text: str, now_ms: int, node: Comparison, operand: Operand) -> tuple[Fraction, bool]:
    """Return the time or duration to compare with, in milliseconds, and whether it is a duration with a unit."""
    if operand.kind == "duration":
        return values.duration_of(text, node.values[0])
    return values.time_of(text, node.values[0], now_ms), False


def _whole(operand: Sql, operator: str, limit: Fraction, scale: int) -> Sql:
    sql, params = operand
    from_, above = math.ceil(limit), math.floor(limit) + 1  # the first number >= limit, and > limit
    low, high = values.clamped(from_ * scale), values.clamped(above * scale)
    if operator in (">=", "<"):
        return f"{sql} {operator} ?", (*params, low)
    if operator in (">", "<="):
        return f"{sql} {'>=' if operator == '>' else '<'} ?", (*params, high)
    if operator == "=":
        return f"({sql} >= ? AND {sql} < ?)", (*params, low, *params, high)
    return f"({sql} < ? OR {sql} >= ?)", (*params, low, *params, high)


def _prompt(text: str, node: Comparison) -> Sql:
    """`prompt = 'name/version'`: MLflow keeps the prompts of a trace as JSON in a tag."""
    wanted = values.text_of(text, node.values[0])
    if wanted.count("/") != 1:
        fail(text, "a prompt is written 'name/version'", node.values[0].place)
    rows = "SELECT value FROM json_each(t.tags) WHERE key = ? AND json_valid(value)"
    return (
        f"EXISTS (SELECT 1 FROM ({rows}) AS tag, json_each(tag.value) AS prompt WHERE prompt.type = 'object'"
        " AND json_extract(prompt.value, '$.name') || '/' || json_extract(prompt.value, '$.version') = ?)",
        (PROMPTS_TAG, wanted),
    )


def _assessment(text: str, node: Comparison) -> Sql:
    """Feedback, expectations and issues are MLflow's: the store has none, so nothing matches."""
    value = node.values[0]
    if node.operator in _ORDERED and value.kind != "number":
        fail(text, f"{node.operator} needs a number without quotes", value.place)
    if node.operator not in _ORDERED:
        values.text_of(text, value)
    return "0", ()
