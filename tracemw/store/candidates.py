"""A filter -> an expression for the token index, which every trace that satisfies the filter satisfies, too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from . import tokens, words
from .conditions import amount_of, is_numeric, plain_of
from .fields import Operand
from .grammar import Comparison, Negation, Node
from .values import number_of, number_param, text_of

MAX_WORDS = 64  # in one expression

_LACKING: Final = {"y": "s", "u": "s"}  # kind -> that under which `words.more` has it


def expression(
    text: str, now_ms: int, operands: Mapping[int, Operand], node: Node, *, short: bool = True
) -> str | None:
    """Return the expression, None where none is known.

    Args:
        text: The whole filter string.
        now_ms: What `now` means.
        operands: What the conditions' fields stand for, by the `id` of the condition.
        short: Also with the words of `words.py`, which not every trace has before an older file is indexed anew.
    """
    found = _Expressions(text, now_ms, operands, short).of(node)
    return found if found is not None and found.count('"') <= 2 * MAX_WORDS else None


class _Expressions:
    def __init__(self, text: str, now_ms: int, operands: Mapping[int, Operand], short: bool) -> None:
        self._text = text
        self._now_ms = now_ms
        self._operands = operands
        self._short = short

    def of(self, node: Node) -> str | None:
        """Return the expression of a part of the filter."""
        if isinstance(node, Comparison):
            return self._condition(node)
        if isinstance(node, Negation):
            return None
        parts = [self.of(item) for item in node.items]
        known = [part for part in parts if part is not None]
        if not known or (not node.every and len(known) < len(parts)):
            return None
        return known[0] if len(known) == 1 else f"({(' AND ' if node.every else ' OR ').join(known)})"

    def _condition(self, node: Comparison) -> str | None:
        operand = self._operands[id(node)]
        if operand.token is None or node.negated or node.operator not in ("=", "IN"):
            return None
        if len(node.values) > MAX_WORDS:
            return None
        kind, key = operand.token
        if kind in ("c", "m", "t"):
            found: list[str] | None = [tokens.token(kind, key, value) for value in self._plain(node, operand)]
        else:
            found = self._words(node, operand, kind, key) if self._short else None
        if found is None:
            return None
        quoted = [f'"{word}"' for word in dict.fromkeys(found)]
        return quoted[0] if len(quoted) == 1 else f"({' OR '.join(quoted)})"

    def _plain(self, node: Comparison, operand: Operand) -> list[str]:
        if operand.kind == "number":
            return [str(number_of(self._text, value)) for value in node.values]
        return [plain_of(self._text, value, operand) for value in node.values]

    def _words(self, node: Comparison, operand: Operand, kind: str, key: str) -> list[str] | None:
        """Return the short words of one condition."""
        if kind == "a":
            found = self._attributes(node, key)
        elif kind == "d":
            found = [words.of_duration(self._amount(node, operand) * 1_000_000)]
        elif kind == "e":
            end = self._amount(node, operand)
            found = [words.of_end(end - 3), words.of_end(end + 1)]  # SQL and Python round what is odd differently
        elif kind in ("q", "r", "p"):
            found = [words.of_preview(kind, text_of(self._text, value)) for value in node.values]
        else:
            found = [words.word(kind, value) for value in self._plain(node, operand)]
        if found is not None and (kind == "p" or operand.of_span):
            found.append(words.more(_LACKING.get(kind, kind)))
        return found

    def _amount(self, node: Comparison, operand: Operand) -> int:
        return math.floor(amount_of(self._text, self._now_ms, node, operand)[0])

    def _attributes(self, node: Comparison, key: str) -> list[str] | None:
        found: list[str] = []
        for value in node.values:
            if is_numeric(node):
                number = number_of(self._text, value)
                assert number is not None  # the condition was compiled
                more: list[str] | None = words.of_number(key, number_param(number))
            else:
                more = words.of_text(key, text_of(self._text, value))
            if more is None:
                return None
            found += more
        return found
