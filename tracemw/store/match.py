"""Text patterns of the filter language as SQL, and the functions that a connection needs for them.

LIKE is case-sensitive and ILIKE is not, in every alphabet. SQLite's own LIKE folds ASCII only, and whether it does
hangs on a setting of the connection: so LIKE becomes GLOB, and ILIKE becomes SQLite's LIKE where ASCII is all
there is to fold, else a function.
"""

from __future__ import annotations

import json
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import sqlite3

MAX_PATTERN: Final = 1_000
"""Characters of a LIKE pattern or a regular expression."""
MAX_SUBJECT: Final = 10_000
"""Characters of a text in which RLIKE searches; what stands further back is not seen."""
MAX_SECONDS: Final = 5.0
"""What RLIKE may take in one query."""

Param = str | int | float
Sql = tuple[str, tuple[Param, ...]]

_ESCAPED = re.compile(r"\\+u([0-9a-fA-F]{4})(?:\\+u([dD][c-fC-F][0-9a-fA-F]{2}))?")


@dataclass(frozen=True, slots=True)
class Pattern:
    """A LIKE pattern taken apart.

    Attributes:
        parts: Literal text, `"%"` and `"_"` wildcards as `(is_wildcard, text)`.
        fold: Upper and lower case are the same.
    """

    parts: tuple[tuple[bool, str], ...]
    fold: bool

    @classmethod
    def like(cls, text: str, *, fold: bool) -> Pattern:
        """Read a pattern with `%` and `_`; there is no escape character, as in MLflow on SQLite."""
        return cls(tuple((p in ("%", "_"), p) for p in re.split(r"([%_])", text) if p), fold)

    @classmethod
    def contains(cls, text: str) -> Pattern:
        """Any text with this in it; `%` and `_` are themselves."""
        return cls(((True, "%"), (False, text), (True, "%")), True)

    def condition(self, operand: Sql) -> Sql:
        """Return SQL that is true where the operand's text matches."""
        sql, params = operand
        if not self.fold:
            return f"{sql} GLOB ?", (*params, self._glob())
        if self._only_ascii_folds():
            return f"{sql} LIKE ? ESCAPE '\\'", (*params, self._escaped())
        return f"tracemw_ilike({sql}, ?)", (*params, self._escaped())

    def in_json(self, operand: Sql) -> Sql:
        """The same for a text that is JSON, with strings that may be JSON again (inputs and outputs are)."""
        if not self._only_ascii_folds():
            return f"tracemw_ilike({operand[0]}, ?, 1)", (*operand[1], self._escaped())
        conditions = [pattern.condition(operand) for pattern in self._encodings()]
        sql = " OR ".join(sql for sql, _ in conditions)
        return f"({sql})", tuple(param for _, params in conditions for param in params)

    def _encodings(self) -> list[Pattern]:
        found = {}
        for escapes in ((), (False,), (True,), (False, False), (True, True), (False, True)):
            parts = tuple((wild, p if wild else _encoded(p, escapes)) for wild, p in self.parts)
            found[parts] = Pattern(parts, self.fold)
        return list(found.values())

    def _only_ascii_folds(self) -> bool:
        return not self.fold or all(
            wild or all(c.isascii() or c == c.casefold() == c.upper() for c in p) for wild, p in self.parts
        )

    def _glob(self) -> str:
        return "".join(
            {"%": "*", "_": "?"}[p] if wild else re.sub(r"[*?[]", r"[\g<0>]", p) for wild, p in self.parts
        )

    def _escaped(self) -> str:
        return "".join(p if wild else re.sub(r"[%_\\]", r"\\\g<0>", p) for wild, p in self.parts)


def _encoded(text: str, escapes: Sequence[bool]) -> str:
    for ascii_only in escapes:
        text = json.dumps(text, ensure_ascii=ascii_only)[1:-1]
    return text


def check_regex(pattern: str) -> str | None:
    """Return what is wrong with a regular expression, None if nothing is."""
    if len(pattern) > MAX_PATTERN:
        return f"the regular expression has more than {MAX_PATTERN} characters"
    try:
        _compiled(pattern)
    except ImportError:
        raise
    except Exception as error:  # the library's own, of recursion, of overflow
        return f"not a regular expression: {error}"
    return None


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> Any:
    import regex  # its searches can be given a time, those of Python's own module cannot be stopped

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return regex.compile(pattern)


def register_functions(connection: sqlite3.Connection) -> None:
    """Give a connection the functions that compiled filters call: `regexp` and `tracemw_ilike`.

    Raises:
        sqlite3.Error: The connection is closed.
    """
    connection.create_function("regexp", 2, _regexp(), deterministic=True)
    connection.create_function("tracemw_ilike", 2, _ilike, deterministic=True)
    connection.create_function("tracemw_ilike", 3, _ilike, deterministic=True)


def _regexp() -> Callable[[str, object], bool | None]:
    last = spent = 0.0

    def regexp(pattern: str, value: object) -> bool | None:
        """`value REGEXP pattern`; too much time in calls that follow each other closely ends the query."""
        nonlocal last, spent
        if value is None:
            return None
        began = time.perf_counter()
        spent = spent if began - last < 0.5 else 0.0
        try:
            # Other threads go on meanwhile: the process may be serving.
            found = _compiled(pattern).search(
                str(value)[:MAX_SUBJECT], timeout=max(0.0, MAX_SECONDS - spent), concurrent=True
            )
        except TimeoutError:
            spent = 0.0  # the query has ended: the next one has all the time again
            raise
        last = time.perf_counter()
        spent += last - began
        return found is not None

    return regexp


def _ilike(value: object, pattern: str, is_json: int = 0) -> bool | None:
    if value is None:
        return None
    text = str(value)
    return _matches(_unescaped(text) if is_json else text, pattern)


def _unescaped(text: str) -> str:
    """Undo `\\uXXXX` in JSON text, at every depth of strings in strings."""
    return _ESCAPED.sub(lambda m: _character(m[1], m[2]), text) if "\\u" in text else text


def _character(first: str, second: str | None) -> str:
    units = bytes.fromhex(first) + (bytes.fromhex(second) if second else b"")
    return units.decode("utf-16-be", "replace")


def _matches(text: str, pattern: str) -> bool:
    """Match by taking each piece between `%` as early as possible: linear, unlike a regular expression."""
    starts, ends, pieces = _pieces(pattern)
    folded = text.casefold()
    position = 0
    for index, (piece, length) in enumerate(pieces):
        first, last = index == 0 and starts, index == len(pieces) - 1 and ends
        if last:
            tail = len(folded) - length
            return tail >= position and (not first or tail == 0) and piece.match(folded, tail) is not None
        found = piece.match(folded) if first else piece.search(folded, position)
        if found is None:
            return False
        position = found.end()
    return bool(pieces) or not starts or not folded


@lru_cache(maxsize=64)
def _pieces(pattern: str) -> tuple[bool, bool, list[tuple[re.Pattern[str], int]]]:
    """Take an escaped LIKE pattern apart: does it begin and end with text, and the pieces with their length."""
    tokens = re.findall(r"\\.|.", pattern, re.DOTALL)
    pieces: list[list[str]] = [[]]
    for token in tokens:
        if token == "%":
            pieces.append([])
        else:
            pieces[-1].extend("." if token == "_" else map(re.escape, token[-1].casefold()))
    compiled = [(re.compile("".join(piece), re.DOTALL), len(piece)) for piece in pieces if piece]
    return bool(pieces[0]) or len(pieces) == 1, bool(pieces[-1]) or len(pieces) == 1, compiled
