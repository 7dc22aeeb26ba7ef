"""Filter and order strings -> SQL over the store's tables.

**What a filter means.** Conditions on spans that are joined by AND and OR speak of one and the same span:
`span.name = 'search' AND span.status = 'ERROR'` finds traces with a failed search (as in MLflow). NOT is about the
trace: `NOT span.name = 'search'` finds the traces without any. A condition on a value that is not there is false,
`!=` and NOT LIKE included (as in SQL and MLflow); `NOT tags.x = 'a'` is true then.

User text reaches SQLite as parameters only; the keys of an order string, which has no parameters, as hexadecimal.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tracemw.errors import FilterError

from . import candidates
from .conditions import condition, pattern_of
from .fields import ATTRIBUTES, Operand, resolve
from .grammar import Comparison, Junction, Negation, Node, Ordering, fail, parse_filter, parse_order
from .match import Param, Sql, register_functions

__all__ = ["Order", "Where", "compile_filter", "compile_order", "register_functions"]

MAX_CONDITIONS = 250
MAX_PARAMS = 900  # SQLite before 3.32 takes 999

_MS = 1_000_000


@dataclass(frozen=True, slots=True)
class Where:
    """A filter as SQL.

    Attributes:
        sql: A condition over `traces AS t`; the connection needs `register_functions`.
        params: Its parameters.
        match: An expression for the token index that all traces of the filter satisfy, or None.
        plain: The same without the short words of `words.py`.
    """

    sql: str
    params: tuple[Param, ...]
    match: str | None
    plain: str | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """An order as SQL.

    Attributes:
        terms: SQL over `traces AS t` without parameters, never NULL, and whether it is descending. Empty: newest
            first.
    """

    terms: tuple[tuple[str, bool], ...]


def compile_filter(filter_string: str | None, *, now_ns: int | None = None) -> Where:
    """Compile a filter string.

    Args:
        filter_string: In MLflow's language or ours; None and "" are all traces.
        now_ns: What `now` means; the clock if None.

    Raises:
        FilterError: The string is wrong; the message points at the place.
    """
    if filter_string is None or filter_string == "":
        return Where("1", (), None)
    if not isinstance(filter_string, str):
        raise FilterError(f"a filter is text, not {type(filter_string).__name__}")
    node = parse_filter(filter_string)
    now_ms = (time.time_ns() if now_ns is None else now_ns) // _MS
    compiler = _Compiler(filter_string, now_ms)
    compiler.prepare(node)
    sql, params = compiler.scope(node)
    if len(params) > MAX_PARAMS:
        raise FilterError("the filter has too many conditions; values for one field go into a list: IN ('a', 'b')")
    match = candidates.expression(filter_string, now_ms, compiler.operands, node)
    plain = candidates.expression(filter_string, now_ms, compiler.operands, node, short=False)
    return Where(sql, params, match, plain)


def compile_order(order_by: Sequence[str] | str | None) -> Order:
    """Compile an order.

    Args:
        order_by: `["timestamp DESC", "name"]`, or one string with commas. Missing values come last (as in MLflow).

    Raises:
        FilterError: The order is wrong; the message points at the place.
    """
    terms: list[tuple[str, bool]] = []
    seen: set[str] = set()
    for text in [order_by] if isinstance(order_by, str) else order_by or ():
        if not isinstance(text, str):
            raise FilterError(f"order_by holds text, not {type(text).__name__}")
        for ordering in parse_order(text):
            new = _order_terms(text, ordering)
            if new and new[-1][0] in seen:
                fail(text, "this field is in the order twice", ordering.field.place)
            seen.update(sql for sql, _ in new[-1:])
            terms.extend(new)
    return Order(tuple(terms))


def _order_terms(text: str, ordering: Ordering) -> list[tuple[str, bool]]:
    path, descending = ordering.field.path, ordering.descending
    if path[-1] == "experiment_id" and len(path) <= 2:  # MLflow's; the store is one experiment
        return []
    operand = resolve(text, ordering.field)
    if operand.of_span or operand.kind in ("assessment", "issue", "prompt"):
        fail(text, "traces cannot be ordered by this field", ordering.field.place)
    sql = operand.sql[0]
    for param in operand.sql[1]:
        sql = sql.replace("?", f"CAST(x'{str(param).encode('utf-8').hex()}' AS TEXT)", 1)
    if operand.kind in ("time", "end", "id", "state") or operand is ATTRIBUTES["name"]:
        return [(sql, descending)]
    empty = "0" if operand.kind in ("duration", "number") else "''"
    return [(f"({sql} IS NULL)", False), (f"COALESCE({sql}, {empty})", descending)]


@dataclass
class _Compiler:
    """One filter on its way to SQL.

    A scope is what stands outside of all NOTs, or directly below one: its conditions on spans share one EXISTS
    where AND joins them.
    """

    text: str
    now_ms: int
    conditions: dict[int, Sql] = field(default_factory=dict)
    operands: dict[int, Operand] = field(default_factory=dict)

    def prepare(self, node: Node) -> None:
        """Compile the single conditions, in the order of the text: what is wrong first is said first."""
        if isinstance(node, Negation):
            self.prepare(node.item)
        elif isinstance(node, Junction):
            for item in node.items:
                self.prepare(item)
        else:
            if len(self.operands) >= MAX_CONDITIONS:
                fail(self.text, f"more than {MAX_CONDITIONS} conditions", node.field.place)
            operand = resolve(self.text, node.field)
            self.operands[id(node)] = operand
            self.conditions[id(node)] = condition(self.text, self.now_ms, node, operand)

    def scope(self, node: Node) -> Sql:
        """Compile a whole scope."""
        return _Scope(self, self._names_spans(node)).outside(node)

    def has_spans(self, node: Node) -> bool:
        """True where a condition of the node's own scope is on spans."""
        if isinstance(node, Comparison):
            return self.operands[id(node)].of_span
        return not isinstance(node, Negation) and any(self.has_spans(item) for item in node.items)

    def _names_spans(self, node: Node) -> bool:
        if isinstance(node, Comparison):
            operand = self.operands[id(node)]
            return operand.of_span and operand.both is None
        return not isinstance(node, Negation) and any(self._names_spans(item) for item in node.items)


@dataclass
class _Scope:
    """Compiles the nodes of one scope.

    Attributes:
        strict: A condition names spans (`span.x`): `text` is then about that span alone, as in MLflow.
    """

    compiler: _Compiler
    strict: bool

    def outside(self, node: Node) -> Sql:
        """Compile where no span is bound yet."""
        compiler = self.compiler
        if isinstance(node, Negation):
            sql, params = compiler.scope(node.item)
            return f"({sql}) IS NOT TRUE", params
        if isinstance(node, Comparison):
            own = compiler.conditions[id(node)]
            return _either(self.without(node), _exists(own)) if self._of_span(node) else own
        if not node.every:
            return _join("OR", [self.outside(item) for item in node.items])
        on_spans = [item for item in node.items if compiler.has_spans(item)]
        if len(on_spans) < 2:
            return _join("AND", [self.outside(item) for item in node.items])
        others = [self.outside(item) for item in node.items if not compiler.has_spans(item)]
        shared = _exists(_join("AND", [self.inside(item) for item in on_spans]))
        alternatives = [self.without(item) for item in on_spans]
        possible = [sql for sql in alternatives if sql is not None]
        spanless = _join("AND", possible) if len(possible) == len(alternatives) else None
        return _join("AND", [*others, _either(spanless, shared)])

    def _of_span(self, node: Comparison) -> bool:
        return self.compiler.operands[id(node)].of_span

    def inside(self, node: Node) -> Sql:
        """Compile where `s` is the span that the scope speaks of."""
        if isinstance(node, Negation):
            return self.outside(node)
        if isinstance(node, Comparison):
            own = self.compiler.conditions[id(node)]
            return _either(self.without(node), own) if self._of_span(node) else own
        return _join("AND" if node.every else "OR", [self.inside(item) for item in node.items])

    def without(self, node: Node) -> Sql | None:
        """Compile for the case that no span fits; None where it is false then."""
        if isinstance(node, Negation):
            return self.outside(node)
        if isinstance(node, Comparison):
            operand = self.compiler.operands[id(node)]
            if not operand.of_span:
                return self.compiler.conditions[id(node)]
            if self.strict or operand.both is None:
                return None
            return pattern_of(self.compiler.text, node).condition(operand.both)
        parts = [self.without(item) for item in node.items]
        possible = [part for part in parts if part is not None]
        if not possible or (node.every and len(possible) < len(parts)):
            return None
        return _join("AND" if node.every else "OR", possible)


def _exists(condition: Sql) -> Sql:
    return f"EXISTS (SELECT 1 FROM spans AS s WHERE s.trace = t.id AND {condition[0]})", condition[1]


def _either(first: Sql | None, second: Sql) -> Sql:
    return second if first is None else _join("OR", [first, second])


def _join(word: str, parts: Sequence[Sql]) -> Sql:
    if len(parts) == 1:
        return parts[0]
    return f"({f' {word} '.join(sql for sql, _ in parts)})", tuple(p for _, params in parts for p in params)
