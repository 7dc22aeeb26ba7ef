"""Regular expressions that take no longer than the text is long.

Python's engine tries one way through an expression after the other; with several repetitions or alternatives there
can be more ways than anybody can wait for, and it cannot be stopped meanwhile. Here Python's own parser reads the
expression, and what is made of it follows all ways at once (Thompson's construction), a character at a time. The
states met are kept, so that most characters cost one look-up.

What only going back can do (look-around, references to groups, possessive repetitions) is refused.
"""

from __future__ import annotations

import re
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from typing import Any, Final

MAX_STEPS: Final = 2_000
"""Parts of an expression, with what is repeated counted as often as it is."""
_KEPT: Final = 50_000  # look-ups
_END: Final = ""  # the symbol after the last character
_LAST_NEWLINE: Final = "\n$"  # the symbol for a newline that is the last character: `$` matches before it
_EMPTY_HAS_NO_BOUNDARY: Final = re.search(r"\B", "") is not None  # since Python 3.14
_CATEGORIES: Final = {"DIGIT": "d", "SPACE": "s", "WORD": "w"}
_LEAVES: Final = ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT")
_REPEATS: Final = ("MAX_REPEAT", "MIN_REPEAT")


class Unfit(ValueError):
    """The expression cannot be made into an automaton; the message says what of it."""


def parse(pattern: str) -> Any:
    """Return Python's syntax tree of a regular expression.

    Raises:
        re.error: It is none.
    """
    parser: Any = import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return parser.parse(pattern)


def choices(items: Iterable[Any]) -> int:
    """Return how many repetitions and alternatives an expression has: with one, Python's engine is quick."""
    total = 0
    for op, value in items:
        name = str(op)
        if name == "BRANCH":
            total += 1 + sum(choices(option) for option in value[1])
        elif name == "SUBPATTERN":
            total += choices(value[-1])
        elif name.endswith("_REPEAT"):
            low, high, inner = value
            total += (low != high) + choices(inner) * (2 if int(high) > 1 else 1)
        elif name in ("ASSERT", "ASSERT_NOT"):
            total += choices(value[1])
        elif name == "ATOMIC_GROUP":
            total += choices(value)
        elif name == "GROUPREF_EXISTS":
            total += 2
    return total


class Automaton:
    """A regular expression that is searched for in linear time.

    Args:
        tree: Its syntax tree, of `parse`.

    Raises:
        Unfit: It has something that cannot be searched for this way, or is too large.
    """

    def __init__(self, tree: Any) -> None:
        self._tests: list[re.Pattern[str] | None] = []  # of a step: the character it takes
        self._at: list[tuple[str, int]] = []  # of a step without one: a place in the text, and the flags
        self._next: list[list[int]] = []
        self._flags = int(tree.state.flags)
        self._accept = self._step()
        self._start = self._sequence(tree, self._accept, self._flags)
        self._forget()

    def _forget(self) -> None:
        self._states: dict[tuple[frozenset[int], str], _State] = {}
        self._kept = 0
        self._first = self._state(frozenset(), "start")

    def search(self, text: str, deadline: float) -> bool:
        """Say whether the expression matches anywhere in a text.

        Args:
            deadline: By `time.perf_counter()`.

        Raises:
            TimeoutError: It took longer.
        """
        if self._kept > _KEPT:
            self._forget()
        state = self._first
        for symbol in _symbols(text):
            following = state.get(symbol)
            if following is None:
                if time.perf_counter() > deadline:
                    raise TimeoutError
                following = state[symbol] = self._follow(state, symbol)
                self._kept += 1
            if following is _MATCH:
                return True
            state = following
        return False

    # Following it.

    def _state(self, steps: frozenset[int], before: str) -> _State:
        key = steps, before
        found = self._states.get(key)
        if found is None:
            found = self._states[key] = _State(steps, before)
        return found

    def _follow(self, state: _State, symbol: str) -> _State:
        reached = self._reach({*state.steps, self._start}, state.before, symbol)
        if self._accept in reached:
            return _MATCH
        if symbol == _END:
            return state
        character = symbol[0]
        taken = set()
        for step in reached:
            test = self._tests[step]
            if test is not None and test.match(character):
                taken.update(self._next[step])
        return self._state(frozenset(taken), _kind(character))

    def _reach(self, steps: set[int], before: str, symbol: str) -> set[int]:
        """Return the steps that are reached without taking a character."""
        reached, waiting = set(steps), list(steps)
        while waiting:
            step = waiting.pop()
            if self._tests[step] is None and self._holds(step, before, symbol):
                fresh = [one for one in self._next[step] if one not in reached]
                reached.update(fresh)
                waiting += fresh
        return reached

    def _holds(self, step: int, before: str, symbol: str) -> bool:
        place, flags = self._at[step]
        if place == "":
            return True
        if place in ("AT_BOUNDARY", "AT_NON_BOUNDARY"):
            if before == "start" and symbol == _END:
                return place == "AT_NON_BOUNDARY" and _EMPTY_HAS_NO_BOUNDARY
            differ = _is_word(before, flags) != _is_word(_kind(symbol[:1]) if symbol else "start", flags)
            return differ == (place == "AT_BOUNDARY")
        if place == "AT_BEGINNING" and flags & re.MULTILINE:
            return before in ("start", "newline")
        if place in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return before == "start"
        if place == "AT_END_STRING":
            return symbol == _END
        return symbol in (_END, _LAST_NEWLINE) or bool(flags & re.MULTILINE and symbol == "\n")

    # Building it, from the end to the beginning.

    def _step(self, following: Sequence[int] = (), test: str | None = None, at: str = "", flags: int = 0) -> int:
        if len(self._next) >= MAX_STEPS:
            raise Unfit("it repeats too much")
        self._tests.append(None if test is None else _test(test, flags))
        self._at.append((at, flags))
        self._next.append([*following])
        return len(self._next) - 1

    def _sequence(self, items: Any, end: int, flags: int) -> int:
        for op, value in reversed(list(items)):
            end = self._item(str(op), value, end, flags)
        return end

    def _item(self, name: str, value: Any, end: int, flags: int) -> int:
        if name == "AT":
            return self._step([end], at=str(value), flags=flags)
        if name in _LEAVES:
            return self._step([end], _source(name, value), flags=flags)
        if name == "BRANCH":
            return self._step([self._sequence(option, end, flags) for option in value[1]])
        if name == "SUBPATTERN":
            _, added, removed, inner = value
            if added & (re.ASCII | re.UNICODE):
                flags &= ~(re.ASCII | re.UNICODE)
            return self._sequence(inner, end, (flags | added) & ~removed)
        if name in _REPEATS:
            return self._repeat(value, end, flags)
        raise Unfit("look-around, references to groups and possessive repetitions take too long beside others")

    def _repeat(self, value: Any, end: int, flags: int) -> int:
        low, high, inner = value
        if str(high) == "MAXREPEAT":
            loop = self._step([end])
            self._next[loop].append(self._sequence(inner, loop, flags))
            begin = loop
        else:
            begin = end
            for _ in range(int(high) - int(low)):
                begin = self._step([end, self._sequence(inner, begin, flags)])
        for _ in range(int(low)):
            begin = self._sequence(inner, begin, flags)
        return begin


class _State(dict[str, Any]):
    """A set of steps that are taken at once: symbol -> what follows, as far as it was met.

    Attributes:
        before: What the character before was.
    """

    def __init__(self, steps: frozenset[int], before: str) -> None:
        self.steps = steps
        self.before = before


_MATCH: Final = _State(frozenset(), "")


def _symbols(text: str) -> Iterator[str]:
    if text.endswith("\n"):
        yield from text[:-1]
        yield _LAST_NEWLINE
    else:
        yield from text
    yield _END


def _kind(character: str) -> str:
    """Return what a place in the text may hang on of the character before it."""
    if character == "\n":
        return "newline"
    if character.isalnum() or character == "_":
        return "word" if character.isascii() else "letter"
    return "other"


def _is_word(kind: str, flags: int) -> bool:
    return kind == "word" or (kind == "letter" and not flags & re.ASCII)


def _source(name: str, value: Any) -> str:
    """Return an expression for one character."""
    if name == "ANY":
        return "."
    if name == "LITERAL":
        return re.escape(chr(value))
    if name == "NOT_LITERAL":
        return f"[^{re.escape(chr(value))}]"
    parts: list[str] = []
    for op, what in value:
        kind = str(op)
        if kind == "NEGATE":
            parts.insert(0, "^")
        elif kind == "LITERAL":
            parts.append(re.escape(chr(what)))
        elif kind == "RANGE":
            parts.append(f"{re.escape(chr(what[0]))}-{re.escape(chr(what[1]))}")
        else:
            category = str(what).removeprefix("CATEGORY_")
            letter = _CATEGORIES[category.removeprefix("NOT_")]
            parts.append(f"\\{letter.upper() if category.startswith('NOT_') else letter}")
    return f"[{''.join(parts)}]"


def _test(source: str, flags: int) -> re.Pattern[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return re.compile(source, flags & (re.IGNORECASE | re.DOTALL | re.ASCII))
