"""The grammar of filter and order strings: text -> syntax tree, or an error that points at the place.

The language is MLflow's for `search_traces` (attributes, `tags.k`, `metadata.k`, `span.x`, comparisons joined by
AND) with OR, NOT, parentheses, CONTAINS, durations and times relative to now. The grammar accepts a little more
than the language, a word without quotes as a value for instance: what is wrong can then be said in its own terms.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeAlias

from tracemw.errors import FilterError

if TYPE_CHECKING:
    from lark import Lark, Token

MAX_LENGTH = 100_000
MAX_DEPTH = 20
"""Levels of alternating AND, OR and NOT; SQLite's own parser gives up not far above."""

_AMOUNT = r"(?:\d+(?:\.\d*)?|\.\d+)"
_UNIT = "(?:ns|us|\u00b5s|\u03bcs|ms|min|s|m|h|d|w)"
_NAME = r"[^\W\d]\w*"
_KEY = r"\d*[^\W\d]\w*"
_GRAMMAR = rf"""
filter: _any
order: ordering ("," ordering)*
ordering: FIELD (ASC | DESC)?

_any: disjunction
disjunction: conjunction (_OR conjunction)*
conjunction: (AND | _term)+
_term: negation | group | comparison | presence
negation: NOT _term
group: "(" _any ")"

comparison: FIELD OPERATOR _value
          | FIELD NOT? MATCH _value
          | FIELD NOT? IN list
presence: FIELD _IS NOT? NULL
list: "(" (_value ("," _value)* ","?)? ")"
_value: text | number | duration | moment | word
text: STRING | QUOTED
number: NUMBER
duration: DURATION
moment: NOW ((PLUS | MINUS) DURATION)?
word: FIELD

_OR.9: /or(?![\w.`])/i
AND.9: /and(?![\w.`])/i
NOT.9: /not(?![\w.`])/i
IN.9: /in(?![\w.`])/i
_IS.9: /is(?![\w.`])/i
NULL.9: /null(?![\w.`])/i
MATCH.9: /(?:like|ilike|rlike|contains)(?![\w.`])/i
NOW.9: /now(?:\s*\(\s*\))?(?![\w.`])/i
ASC.9: /asc(?![\w.`])/i
DESC.9: /desc(?![\w.`])/i
OPERATOR: /[=!<>~]+/
PLUS: "+"
MINUS: "-"
DURATION.7: /{_AMOUNT}\s*{_UNIT}(?:{_AMOUNT}{_UNIT})*(?![\w.])/
NUMBER.6: /-?{_AMOUNT}(?:e[+-]?\d+)?(?![\w.])/i
STRING.5: /'(?:''|[\\]'|[^'])*'/
QUOTED.5: /"(?:""|[\\]"|[^"])*"/
FIELD: /(?:{_NAME}|`[^`]*`|"[^"]*")(?:\.(?:{_KEY}|`[^`]*`|"[^"]*"|'[^']*'))*/
%ignore /\s+/
"""

_SEGMENT = re.compile(r"""\w+|`[^`]*`|"[^"]*"|'[^']*'""")
_UNSAFE = re.compile(r"[\x00\ud800-\udfff]")
_FOUND = re.compile(r"""'[^']{0,40}'|"[^"]{0,40}"|`[^`]{0,40}`|\w{1,40}|&&|\|\||.""", re.DOTALL)
_NO_KEY = re.compile(r"\.\s*([^\w\s]|$)")

_SAYS = {
    "OPERATOR": "an operator (=, !=, <, <=, >, >=, LIKE, ILIKE, RLIKE, CONTAINS, IN, IS NULL)",
    "STRING": "a value ('text', 5, 500ms, now - 1h)",
    "FIELD": "a field",
    "_OR": "AND or OR",
    "IN": "IN, LIKE, ILIKE, RLIKE or CONTAINS",
    "NULL": "NULL",
    "LPAR": "'('",
    "COMMA": "','",
    "RPAR": "')'",
    "DURATION": "a duration (500ms, 1h)",
    "ASC": "ASC or DESC",
    "$END": "the end",
}
_QUOTE_KEY = "a key with characters other than letters, digits and '_' goes into backticks: tags.`feature-flag`"
_UNCLOSED = "unclosed"
_WORDS = ("LIKE", "ILIKE", "RLIKE", "CONTAINS", "IN", "IS")
_HINTS = {
    "&&": "write AND",
    "||": "write OR",
    "!": "write NOT",
    ";": "only one expression is allowed",
    "-": _QUOTE_KEY,
    ".": _QUOTE_KEY,
    "'": _UNCLOSED,
    '"': _UNCLOSED,
    "`": _UNCLOSED,
    "BETWEEN": "write field >= low AND field <= high",
    "NULL": "write IS NULL or IS NOT NULL",
}
_DIGITS = "text goes into quotes; the units of a duration are ns, us, ms, s, m, h, d, w"


@dataclass(frozen=True, slots=True)
class Place:
    """Where something stands in the string."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Field:
    """A field as it was written; ``metadata.`a.b` `` has the path `("metadata", "a.b")`."""

    path: tuple[str, ...]
    place: Place


@dataclass(frozen=True, slots=True)
class Value:
    """A value as it was written.

    Attributes:
        kind: `text`, `number`, `duration`, `now` (its text is the offset, `-1h`) or `word` (text without quotes).
    """

    kind: str
    text: str
    place: Place


@dataclass(frozen=True, slots=True)
class Comparison:
    """One condition.

    Attributes:
        operator: In capitals; `NULL` for IS NULL.
        negated: There is a NOT inside of the condition, as in NOT LIKE and IS NOT NULL.
    """

    depth: ClassVar[int] = 0
    field: Field
    operator: str
    negated: bool
    values: tuple[Value, ...]
    place: Place


@dataclass(frozen=True, slots=True)
class Negation:
    """NOT and what follows it."""

    item: Node
    depth: int


@dataclass(frozen=True, slots=True)
class Junction:
    """Items joined by AND (`every`) or by OR.

    Attributes:
        sloppy: Where an AND is missing or too many; MLflow allows that between plain conditions.
    """

    every: bool
    items: tuple[Node, ...]
    depth: int
    sloppy: Place | None = None


Node: TypeAlias = "Comparison | Negation | Junction"


@dataclass(frozen=True, slots=True)
class Ordering:
    """One field of an order string."""

    field: Field
    descending: bool


@lru_cache(maxsize=256)
def parse_filter(text: str) -> Node:
    """Return the syntax tree of a filter string.

    Raises:
        FilterError: The string does not follow the grammar.
    """
    node: Node = _parse(text, "filter")
    return node


@lru_cache(maxsize=64)
def parse_order(text: str) -> tuple[Ordering, ...]:
    """Return the fields of an order string (`timestamp DESC, name`).

    Raises:
        FilterError: The string does not follow the grammar.
    """
    orderings: tuple[Ordering, ...] = _parse(text, "order")
    return orderings


def fail(text: str, message: str, place: Place) -> NoReturn:
    """Raise a `FilterError` whose text shows the line of the place and points at it.

    Args:
        text: The whole string.
        message: What is wrong and what to write instead.
        place: Where.
    """
    start, end = min(place.start, len(text)), max(place.end, place.start + 1)
    line_start, line_end = text.rfind("\n", 0, start) + 1, text.find("\n", start)
    line_end = len(text) if line_end < 0 else line_end
    left = max(line_start, start - 60)
    right = min(line_end, left + 100)
    shown = _printable(text[left:right])
    head, tail = "..." if left > line_start else "", "..." if right < line_end else ""
    pointer = " " * (len(head) + start - left) + "^" * max(1, min(end, right) - start)
    raise FilterError(f"{_printable(message)}\n  {head}{shown}{tail}\n  {pointer}")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def refuse_unsafe(text: str) -> None:
    """Raise a `FilterError` for a character that SQLite does not take, and that no stored text has."""
    if unsafe := _UNSAFE.search(text):
        fail(text, "no stored text contains this character", Place(unsafe.start(), unsafe.end()))


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` with the nearest of the known names, or nothing."""
    names = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word[:60].lower(), names, n=1, cutoff=0.6)
    return f"; did you mean '{names[close[0]]}'?" if close else ""


@lru_cache(maxsize=1)
def _parser() -> Lark:
    from lark import Lark

    return Lark(
        _GRAMMAR,
        parser="lalr",
        lexer="contextual",
        start=["filter", "order"],
        transformer=_Builder(),
        maybe_placeholders=False,
    )


def _parse(text: str, start: str) -> Any:
    from lark.exceptions import UnexpectedCharacters, UnexpectedToken

    if len(text) > MAX_LENGTH:
        raise FilterError(f"the string has {len(text):,} characters; at most {MAX_LENGTH:,} are allowed")
    if not text.strip():
        raise FilterError("the string is blank")
    refuse_unsafe(text)
    try:
        return _parser().parse(text, start=start)
    except UnexpectedCharacters as error:
        start_pos = error.pos_in_stream or 0
        found = _FOUND.match(text, start_pos)
        place, expected = Place(start_pos, found.end() if found else start_pos + 1), set(error.allowed or ())
    except UnexpectedToken as error:
        expected = set(error.accepts or error.expected)
        place = Place(len(text), len(text)) if error.token.type == "$END" else _place(error.token)
    except _Misplaced as error:
        fail(text, error.message, error.place)
    fail(text, _unexpected(text, place, expected), place)


def _unexpected(text: str, place: Place, expected: set[str]) -> str:
    wanted = _wanted(expected)
    rest = text[place.start :]
    if not rest.strip():
        return f"the string ends where {wanted} is expected"
    found = _FOUND.match(rest)
    word = found.group() if found else rest[0]
    if rest[0] == "." and _NO_KEY.match(rest):
        return "a key is missing after the dot"
    if rest[0].isdigit() and "STRING" in expected:
        return f"unexpected '{word}': {_DIGITS}"
    hint = _HINTS.get(word.upper())
    if hint is _QUOTE_KEY and not re.match(r"[\w`\"]", text[place.start - 1 : place.start]):
        hint = None
    if hint is _UNCLOSED:
        return f"what begins here has no closing {word}"
    if hint is None and "OPERATOR" in expected:
        hint = nearest(word, _WORDS).removeprefix("; ")
    return f"unexpected {word}: {hint}" if hint else f"unexpected {word}: expected {wanted}"


def _wanted(expected: set[str]) -> str:
    names = expected - {"IN", "NULL", "NOT"} if "OPERATOR" in expected else expected
    names = names - {"FIELD", "DURATION"} if "STRING" in names else names
    return " or ".join([said for name, said in _SAYS.items() if name in names][:2]) or "something else"


class _Misplaced(Exception):
    """The words follow each other as the grammar wants, but make no sense together."""

    def __init__(self, message: str, place: Place) -> None:
        super().__init__(message)
        self.message, self.place = message, place


class _Builder:
    """What lark calls for each rule, from the inside to the outside: no recursion, however deep the string."""

    def filter(self, items: Sequence[Node]) -> Node:
        return items[0]

    def order(self, items: Sequence[Ordering]) -> tuple[Ordering, ...]:
        return tuple(items)

    def ordering(self, items: Sequence[Token]) -> Ordering:
        return Ordering(_field(items[0]), len(items) > 1 and items[1].type == "DESC")

    def disjunction(self, items: Sequence[Node]) -> Node:
        return items[0] if len(items) == 1 else _junction(False, items)

    def conjunction(self, items: Sequence[Any]) -> Node:
        terms = [item for item in items if not hasattr(item, "type")]
        if not terms:
            raise _Misplaced("AND joins two conditions", _place(items[0]))
        sloppy = _sloppy(items)
        if sloppy is not None:
            if not all(isinstance(term, Comparison) for term in terms):
                raise _Misplaced("AND or OR is missing here, or too many", sloppy)
            return Junction(True, tuple(terms), 1, sloppy)
        return terms[0] if len(terms) == 1 else _junction(True, terms)

    def negation(self, items: Sequence[Any]) -> Node:
        return Negation(items[1], _depth(items[1:]))

    def group(self, items: Sequence[Node]) -> Node:
        return _junction(True, items)

    def comparison(self, items: Sequence[Any]) -> Comparison:
        negated = items[1].type == "NOT"
        operator, last = items[-2], items[-1]
        values = last if isinstance(last, tuple) else (last,)
        return Comparison(_field(items[0]), operator.upper(), negated, values, _place(operator))

    def presence(self, items: Sequence[Token]) -> Comparison:
        return Comparison(_field(items[0]), "NULL", len(items) == 3, (), _place(items[-1]))

    def list(self, items: Sequence[Value]) -> tuple[Value, ...]:
        return tuple(items)

    def text(self, items: Sequence[Token]) -> Value:
        quote, inner = items[0][0], items[0][1:-1]
        inner = inner.replace("\\" + quote, quote).replace(quote * 2, quote)
        return Value("text", inner, _place(items[0]))

    def number(self, items: Sequence[Token]) -> Value:
        return Value("number", str(items[0]), _place(items[0]))

    def duration(self, items: Sequence[Token]) -> Value:
        return Value("duration", str(items[0]), _place(items[0]))

    def moment(self, items: Sequence[Token]) -> Value:
        place = Place(_place(items[0]).start, _place(items[-1]).end)
        return Value("now", "".join(items[1:]), place)

    def word(self, items: Sequence[Token]) -> Value:
        return Value("word", str(items[0]), _place(items[0]))


def _place(token: Token) -> Place:
    return Place(token.start_pos or 0, token.end_pos or 0)


def _field(token: Token) -> Field:
    segments = _SEGMENT.findall(token)
    return Field(tuple(s[1:-1] if s[0] in "`\"'" else s for s in segments), _place(token))


def _sloppy(items: Sequence[Any]) -> Place | None:
    """Return where condition and AND do not alternate."""
    joined = True  # as if an AND stood before the first
    for item in items:
        is_and = hasattr(item, "type")
        if is_and == joined:
            return _place(item) if is_and else item.field.place if isinstance(item, Comparison) else Place(0, 0)
        joined = is_and
    return _place(items[-1]) if joined else None


def _junction(every: bool, items: Sequence[Node]) -> Junction:
    """Join items; those that are joined the same way already are taken apart."""
    flat: list[Node] = []
    for item in items:
        if isinstance(item, Junction) and item.sloppy is not None:
            raise _Misplaced("AND is missing before this, or too many", item.sloppy)
        same = isinstance(item, Junction) and (item.every == every or len(item.items) == 1)
        flat.extend(item.items if same and isinstance(item, Junction) else [item])
    return Junction(every, tuple(flat), _depth(flat) if len(flat) > 1 else flat[0].depth)


def _depth(items: Sequence[Node]) -> int:
    depth = max(item.depth for item in items) + 1
    if depth > MAX_DEPTH:
        raise _Misplaced(f"more than {MAX_DEPTH} levels of parentheses and NOT", Place(0, 0))
    return depth
