"""The values of the filter language: durations, times and numbers, as exact milliseconds."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from fractions import Fraction
from typing import Final

from .grammar import Value, fail

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)
_LIMIT: Final = 2**63 - 1
_LONGEST: Final = 100  # characters of a duration or a size on the command line
_UNITS: Final = {
    "ns": Fraction(1, 1_000_000),
    "us": Fraction(1, 1_000),
    "\u00b5s": Fraction(1, 1_000),
    "\u03bcs": Fraction(1, 1_000),
    "ms": Fraction(1),
    "s": Fraction(1_000),
    "m": Fraction(60_000),
    "min": Fraction(60_000),
    "h": Fraction(3_600_000),
    "d": Fraction(86_400_000),
    "w": Fraction(604_800_000),
}
_AMOUNT: Final = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z\u00b5\u03bc]+)")
_NUMBER: Final = re.compile(r"-?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,4})?")
_DURATION: Final = re.compile(r"(?:(?:\d+(?:\.\d*)?|\.\d+)\s*(?:ns|us|\u00b5s|\u03bcs|ms|min|s|m|h|d|w)\s*)+")
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_NOW: Final = re.compile(rf"now(?:\s*\(\s*\))?\s*(?:([+-])\s*({_DURATION.pattern}))?", re.IGNORECASE)


def text_of(text: str, value: Value) -> str:
    """Return the text of a quoted value.

    Raises:
        FilterError: It is not quoted.
    """
    if value.kind == "text":
        return value.text
    if value.kind == "word" and value.text.upper() == "NULL":
        fail(text, "write IS NULL or IS NOT NULL", value.place)
    written = text[value.place.start : value.place.end].strip("`")
    fail(text, f"this field holds text: put the value into quotes, '{written}'", value.place)


def number_of(text: str, value: Value) -> Fraction | None:
    """Return a number, quoted or not; None where the value is none.

    Raises:
        FilterError: The number is out of all bounds.
    """
    if value.kind not in ("text", "number") or not _NUMBER.fullmatch(value.text.strip()):
        return None
    number = value.text.strip()
    if len(number) > 400:
        fail(text, "the number is too long", value.place)
    return Fraction(number)


def number_param(number: Fraction) -> int | float:
    """Return a number for SQLite: whole ones as such, within 64 bits."""
    if number.denominator == 1:
        return clamped(int(number))
    return float(max(min(number, Fraction(_LIMIT)), Fraction(-_LIMIT)))


def duration_of(text: str, value: Value) -> tuple[Fraction, bool]:
    """Return a duration in milliseconds and whether it was written with a unit.

    Raises:
        FilterError: It is neither a number of milliseconds nor a duration.
    """
    number = number_of(text, value)
    if number is not None:
        return number, False
    if value.kind == "duration" or (value.kind == "text" and _DURATION.fullmatch(value.text.strip())):
        return _milliseconds(value.text), True
    fail(text, "expected a duration: 500ms, 1.5s, 2m, or a number of milliseconds", value.place)


def time_of(text: str, value: Value, now_ms: int) -> Fraction:
    """Return a time in milliseconds since the epoch.

    Args:
        now_ms: What `now` means.

    Raises:
        FilterError: It is no time.
    """
    number = number_of(text, value)
    if number is not None:
        return number
    if value.kind == "now":
        return _relative(value.text, now_ms)
    if value.kind == "duration":
        fail(text, f"a duration is no time: write now - {value.text}", value.place)
    if value.kind == "text":
        written = value.text.strip()
        if found := _NOW.fullmatch(written):
            return _relative((found[1] or "") + (found[2] or ""), now_ms)
        if (moment := _date(written)) is not None:
            return moment
    fail(
        text,
        "expected a time: now - 1h, '2026-01-31', '2026-01-31T09:30:00Z', or milliseconds since 1970",
        value.place,
    )


def seconds_of(text: str) -> float:
    """Return a duration with a unit, such as `12h` or `7d`, in seconds.

    Raises:
        ValueError: It is none.
    """
    if not _DURATION.fullmatch(text.strip()):
        raise ValueError(f"{text!r} is no duration: write 90s, 12h, 7d or 2w")
    if len(text) > _LONGEST:
        raise ValueError(f"{text[:_LONGEST]}... is too long for a duration")
    return float(_milliseconds(text) / 1000)


def bytes_of(text: str) -> int:
    """Return a size such as `500MB` or `2GiB` in bytes.

    Raises:
        ValueError: It is none.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no size: write 500MB or 2GiB")
    if len(text) > _LONGEST:
        raise ValueError(f"{text[:_LONGEST]}... is too long for a size")
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** " kmgt".index((found[2] or " ").lower()))


def clamped(value: int) -> int:
    """Return the number within SQLite's 64 bits."""
    return max(-_LIMIT, min(value, _LIMIT))


def _relative(offset: str, now_ms: int) -> Fraction:
    shift = _milliseconds(offset) if offset else Fraction(0)
    return now_ms - shift if offset.startswith("-") else now_ms + shift


def _milliseconds(text: str) -> Fraction:
    return sum((Fraction(amount) * _UNITS[unit] for amount, unit in _AMOUNT.findall(text.lower())), Fraction(0))


def _date(written: str) -> Fraction | None:
    """An ISO 8601 date or time; without an offset it is local time."""
    if written.endswith(("Z", "z")):  # `fromisoformat` takes it from Python 3.11 on
        written = written[:-1] + "+00:00"
    try:
        moment = datetime.fromisoformat(written)
        return Fraction((moment.astimezone(timezone.utc) - _EPOCH) // timedelta(microseconds=1), 1000)
    except (ValueError, OverflowError, OSError):
        return None
