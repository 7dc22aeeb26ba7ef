"""The short words of the token index: what a trace is found by besides the plain words of `tokens.py`.

| kind | of | words |
|---|---|---|
| `s`, `y`, `u` | spans | names, types (`UNKNOWN` without one), statuses as they are shown |
| `a` | spans | attributes, each key and value |
| `d` | trace and spans | durations in whole milliseconds |
| `e` | trace | its end, in steps of 1,024 ms |
| `q`, `r`, `p` | trace | request and response preview, linked prompts (`name/version`) |

A short word is the hash of a key and value in five characters, or a number: different values may share one. It
only leads to candidates, which the SQL of a filter decides on. What counts is that no trace is missing: what SQL
calls equal has a word in common (see `of_text`, `of_number`), and a trace for which that is not certain has the
word `more(kind)`, which every search looks for, too.

The words of a trace's spans are kept with it: those of names, types and statuses, of attributes, of durations,
parted by `|`. (Layout 2 had no such mark.) Attributes are JSON text; what `pipeline/encode.py` makes of them is
cut at `,"` and each piece looked up, which takes a fraction of the time of parsing it. Any other form is parsed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable
from functools import lru_cache
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any, Final
from zlib import crc32

from .rows import TraceRow

NONE: Final = "||"
"""The words of a trace without spans."""
MAX_TEXT: Final = 200  # characters of an attribute that has a word; SQL alone finds a longer one
PROMPTS_TAG: Final = "mlflow.linkedPrompts"

_MAX = {"s": 64, "a": 1000, "d": 128}  # words of one kind for a trace's spans
_MS = 1_000_000
_DIGITS = "0123456789abcdefghijklmnopqrstuv"
_PAIRS = [a + b for a in _DIGITS for b in _DIGITS]
_LONGEST = 2**63 - 1  # nanoseconds of a duration: what is longer, in a filter or in an older file, is as long
_EXACT = 10**18  # integers below have words of their own, others those of numbers with a fraction
_TOLERANCE = 1e-11  # by which a number with a fraction may be read and written differently; words have 10 digits

_FRACTION = re.compile(r"[0-9]+\.[0-9]+")
_OUTCOME = '"tracemw.outcome"'
_COMPLETED = f'{_OUTCOME}:"completed"}}'
_EITHER = "OK|UNSET"
_SHOWN = {  # an UNSET span with this outcome
    f'{_OUTCOME}:"{outcome}"': shown
    for outcome, shown in {
        "completed": "OK", "error": "OK", "disconnected": "UNSET", "cancelled": "UNSET", "interrupted": "UNSET",
    }.items()
}  # fmt: skip

SPAN_FIELDS: Final = ("name", "span_type", "status", "start_ns", "end_ns", "attributes")
Described = tuple[str, str | None, str, int, int, str]
"""What a span's words are made of: its `SPAN_FIELDS`."""


def outdated(words: str) -> bool:
    """True for the words of a trace of layout 2, or to which a process of an older version has added."""
    return "|" not in words or "=" in words


def more(kind: str) -> str:
    """Return the word of the traces of which words of a kind are missing."""
    return f"-{kind}"


def _hashed(text: str) -> str:
    code = crc32(text.encode("utf-8", "surrogatepass"))
    return _PAIRS[code & 1023] + _PAIRS[code >> 10 & 1023] + _DIGITS[code >> 20 & 31]


@lru_cache(maxsize=4096)
def word(kind: str, value: str) -> str:
    """Return the word of a name (`s`), type (`y`) or status (`u`) of a span."""
    return _hashed(f"{kind}{value}")


def of_duration(ns: float) -> str:
    """Return the word of a duration; all negative ones share that of nothing."""
    return f"d{int((ns if ns < _LONGEST else _LONGEST) // _MS)}" if ns > 0 else "d0"


def of_end(ms: int) -> str:
    """Return the word of a trace's end."""
    return f"e{ms >> 10}"


def of_preview(kind: str, text: str) -> str:
    """Return the word of a request (`q`) or response (`r`) preview, or of a linked prompt (`p`)."""
    return _hashed(f"{kind}{text}")


def of_trace(row: TraceRow) -> list[str]:
    """Return the words of a trace's own facts: a function of the row alone."""
    duration, end = row.duration_ns, row.start_ns // _MS
    found = []
    if duration is not None:
        found.append(of_duration(duration))
        end += duration // _MS
    found.append(f"e{int(end) >> 10}")
    if row.request_preview is not None:
        found.append(_hashed(f"q{row.request_preview}"))
    if row.response_preview is not None:
        found.append(_hashed(f"r{row.response_preview}"))
    if PROMPTS_TAG in row.tags:
        found += _prompts(row.tags[PROMPTS_TAG])
    return found


def of_text(key: str, text: str) -> list[str] | None:
    """Return the words of the attributes that equal a text; None where they may have none.

    Numbers and arrays equal their text, too.
    """
    if len(text) > MAX_TEXT or (key.startswith("mlflow.") and text[:1] in ("{", "[")):
        return None
    found = [_of_plain(key, text)]
    if text[:1] in ("{", "["):
        found.append(_hashed(f"[{key}"))
    if re.fullmatch(r"-?[0-9]{1,18}", text):
        return found + of_number(key, int(text))
    try:
        return found + of_number(key, float(text))
    except ValueError:
        return found


def of_number(key: str, number: float) -> list[str]:
    """Return the words of the attributes that equal a number."""
    found = []
    if number == number // 1 and abs(number) < _EXACT:
        found.append(_of_plain(key, int(number)))
    near = (number, number * (1 - _TOLERANCE), number * (1 + _TOLERANCE))  # ints fit into floats
    return found + list(dict.fromkeys(_hashed(f"#{key}={_rounded(n)}") for n in near))


def with_spans(words: str, spans: Iterable[Described]) -> str:
    """Return a trace's words, as they are kept with it, with those of more spans added."""
    return kept(*of_spans(spans, words))


def kept(names: Collection[str], attributes: Collection[str], durations: Collection[str]) -> str:
    """Return words of the three kinds as they are kept with a trace."""
    return f"{' '.join(names)}|{' '.join(attributes)}|{' '.join(durations)}"


def of_spans(spans: Iterable[Described], words: str = NONE) -> tuple[Collection[str], ...]:
    """Return the words of a trace's spans by kinds: of names, types and statuses, of attributes, of durations.

    Args:
        words: Those that are kept with the trace already.
    """
    names, attributes, durations = [], [], []
    if words != NONE:
        names, attributes, durations = (part.split(" ") for part in words.split("|"))
    for name, kind, status, start, end, text in spans:
        found, shown = of_attributes(text)
        attributes += found
        names += _of_names(name, kind, status, shown)
        durations.append(of_duration(end - start))
    if words == NONE and len(durations) <= 1 and len(attributes) <= _MAX["a"]:
        return names, attributes, durations  # nothing comes twice
    return _bounded(names, "s"), _bounded(attributes, "a"), _bounded(durations, "d")


@lru_cache(maxsize=4096)
def _of_names(name: str, kind: str | None, status: str, shown: str) -> tuple[str, ...]:
    statuses = shown.split("|") if status == "UNSET" else [status]
    named = word("s", name), word("y", "UNKNOWN" if kind is None else kind)
    return named + tuple(word("u", status) for status in statuses)


def of_attributes(text: str) -> tuple[list[str], str]:
    """Return the words of attributes, some of them empty, and what UNSET may be shown as."""
    if text[:2] != '{"' or text[-1:] != "}":
        return _parsed(text)
    spaced = text[text.find('":') + 2] == " "  # as by `json.dumps`
    try:
        found = list(map(_PIECES.__getitem__, text[2:-1].split(', "' if spaced else ',"')))
    except _NotPlain:
        return _parsed(text)
    place = text.find(_OUTCOME)
    if place < 0 or text[place:] == _COMPLETED:
        return found, "OK"
    return found, _EITHER if text.count(_OUTCOME) > 1 else _shown(text)


class _NotPlain(Exception):
    """A piece of JSON text is not a key, a colon and a value without parts."""


class _Pieces(dict[str, str]):
    """Words by the pieces `key":value` of JSON text."""

    def __missing__(self, piece: str) -> str:
        found = _simple(piece)
        if found is None:
            found = _of_piece(piece)
        if len(piece) <= MAX_TEXT:  # long ones hardly come again
            if len(self) >= 8192:
                self.clear()
            self[piece] = found
        return found


def _simple(piece: str) -> str | None:
    """Return the word of a string or a number without a sign, as most are, in a part of the time."""
    if piece.startswith("mlflow."):  # inputs and outputs, most often, in which the quotes are escaped
        at = piece.find('":') + 2
        parts = piece.startswith(('"{', '"[', ' "{', ' "['), at) and "\\" not in piece[:at]
        return "" if parts and piece[-1] == '"' and piece.count('"') == piece.count('\\"') + 3 else None
    key, _, text = piece.partition('":')
    if '"' in key or "\\" in piece or len(piece) > MAX_TEXT:
        return None
    if text[-1:] == '"':
        return _hashed(piece) if text[:1] == '"' and text.count('"') == 2 else None
    if text.isdigit():
        return _hashed(piece) if len(text) < 18 else None
    return _hashed(f"#{key}={_rounded(float(text))}") if _FRACTION.fullmatch(text) else None


def _of_piece(piece: str) -> str:
    key, colon, text = piece.partition('":')
    if not colon or '"' in key or "\\" in key:
        raise _NotPlain
    text = text.strip(" ")
    try:
        value, end = scanstring(text, 1) if text[:1] == '"' else (json.loads(text), len(text))
    except (ValueError, RecursionError):
        raise _NotPlain from None
    if end != len(text) or value.__class__ in (list, dict):
        raise _NotPlain
    return _of_value(key, value)


_PIECES: Final = _Pieces()


def _shown(text: str) -> str:
    return next((shown for piece, shown in _SHOWN.items() if piece in text), _EITHER)


class _Object(list[Any]):
    """A JSON object's pairs: there may be several of one key."""


def _parsed(text: str) -> tuple[list[str], str]:
    if text == "{}":
        return [], "OK"
    try:
        pairs = json.loads(text, object_pairs_hook=_Object)
    except (ValueError, RecursionError):
        return [more("a")], _EITHER
    shown = "OK" if _OUTCOME not in text else _EITHER
    if pairs.__class__ is not _Object:
        return [], shown
    found = [_of_value(key, value) for key, value in pairs]
    if shown is _EITHER and text.count(_OUTCOME) == 1 and "\\u" not in text:
        outcomes = [value for key, value in pairs if key == "tracemw.outcome"]
        if len(outcomes) == 1:
            shown = "OK" if outcomes[0] in ("completed", "error") else "UNSET"
    return found, shown


def _of_value(key: str, value: Any) -> str:
    """Return the word of an attribute; "" where it has none."""
    value = _decoded(value) if key.startswith("mlflow.") else value
    if "\0" in key or (value.__class__ is str and "\0" in value):  # where some versions of SQLite end a text
        return more("a")
    return _of_plain(key, value)


def _of_plain(key: str, value: Any) -> str:
    kind = value.__class__
    if kind is str:
        return _hashed(f'{key}":"{value}"') if len(value) <= MAX_TEXT else ""
    if kind is bool:
        return _of_plain(key, "true" if value else "false")
    if kind is int and -_EXACT < value < _EXACT:
        return _hashed(f'{key}":{value}')
    if kind is int or kind is float:
        return _hashed(f"#{key}={_rounded(value)}")
    return "" if value is None else _hashed(f"[{key}")


def _decoded(value: Any) -> Any:
    """MLflow's attributes are JSON text in their turn; those with parts have no word."""
    kind = value.__class__
    if kind is str:
        if value[:1] in ("{", "["):
            return None
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
        return None if value.__class__ in (list, dict) else value
    return int(value) if kind is bool else value if kind in (int, float) else None


def _rounded(number: float) -> str:
    try:
        number = float(number)
    except OverflowError:
        number = math.inf if number > 0 else -math.inf
    size = abs(number)
    if size < 1e-290:  # far from what is read and written exactly
        return "0"
    return f"{number:.9e}" if size < 1e290 else "inf" if number > 0 else "-inf"


def _prompts(text: str) -> list[str]:
    """Return the words of the prompts in MLflow's tag, a JSON array of objects."""
    try:
        prompts = json.loads(text, object_pairs_hook=_first_of_each)
    except (ValueError, RecursionError):
        return [more("p")]
    found = [more("p")] if "\\u0000" in text else []
    if isinstance(prompts, dict):  # SQL sees all of its values, also two of one key
        found.append(more("p"))
    for prompt in prompts if isinstance(prompts, list) else ():
        if isinstance(prompt, dict):
            name, version = prompt.get("name"), prompt.get("version")
            if isinstance(name, str) and (isinstance(version, str) or _is_stored(version)):
                found.append(of_preview("p", f"{name}/{version}"))
            elif name is not None and version is not None:
                found.append(more("p"))
    return found


def _is_stored(number: Any) -> bool:
    """True for an integer that SQLite writes as it is."""
    return number.__class__ is int and -_LONGEST <= number <= _LONGEST


def _first_of_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return dict(reversed(pairs))  # of two with one key, SQL sees the first


def _bounded(found: list[str], kind: str) -> Collection[str]:
    words = dict.fromkeys(found)
    if len(words) <= _MAX[kind]:
        return words
    return [*[word for word in words if word != more(kind)][: _MAX[kind] - 1], more(kind)]
