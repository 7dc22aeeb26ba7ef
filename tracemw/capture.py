"""Inputs and outputs of any kind as bounded, redacted JSON text.

This runs inside the requests of the traced application, on values that it knows nothing about. So the time is
bounded whatever comes, and no code of the application runs: no `__repr__`, `__str__`, `__iter__`, property,
`__getattr__`, `__eq__` or `__hash__`, and no iterator, generator or file is read. Exact built-in types are
taken as they are; subclasses are read through the built-in type's own methods; the fields of dataclasses,
attrs classes and pydantic models through the instance's dictionary and slots; a few well-known types through
what their library has in C; of everything else only the name of its type is recorded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from json.encoder import encode_basestring
from typing import Any, Final, TypeAlias, TypeGuard

from tracemw._capture_types import handler_of
from tracemw._classes import type_name
from tracemw._redact import DEFAULT_REDACT, DEFAULT_REDACTOR, Redactor, quote

__all__ = [
    "DEFAULT_LIMITS",
    "DEFAULT_REDACT",
    "Limits",
    "Redactor",
    "attribute_value",
    "dumps",
    "plain",
    "redact_json_text",
    "redact_text",
]


class Limits:
    """How much of a value is recorded; what is left out is always said in its place.

    Args:
        depth: Containers within containers.
        items: Members of one container.
        nodes: Members of all containers together, so the bound on time.
        string: Characters of one string.
        chars: Characters of the JSON text.

    Raises:
        ValueError: `chars` leaves no room for saying what was left out.
    """

    __slots__ = ("chars", "depth", "items", "nodes", "string")

    def __init__(
        self,
        depth: int = 12,
        items: int = 1_000,
        nodes: int = 4_000,
        string: int = 32_768,
        chars: int = 131_072,
    ) -> None:
        if chars < 2 * _MARKER:
            raise ValueError(f"chars={chars} is too little, take at least {2 * _MARKER}.")
        self.depth = depth
        self.items = items
        self.nodes = nodes
        self.string = string
        self.chars = chars


# Room that must be left before a member is begun: it holds any number, or a marker instead of the member.
_MARKER: Final = 64
_LONGEST_KEY: Final = 128
_MAX_INT: Final = 2**63 - 1
_INFINITY: Final = float("inf")
DEFAULT_LIMITS: Final = Limits()
_KEY_LIMITS: Final = Limits(depth=2, items=8, nodes=16, string=_LONGEST_KEY, chars=4 * _LONGEST_KEY)

AttributeValue: TypeAlias = "str | int | float | bool | list[str] | list[int] | list[float] | list[bool]"


def dumps(value: object, limits: Limits = DEFAULT_LIMITS, redactor: Redactor | None = None) -> str:
    """The JSON text of any value, as it is now.

    Truncation is visible: a string ends in `... [truncated: 20000000 characters]`, a list in
    `"[truncated: 5000 items]"`, a dictionary in `"[truncated]": "5000 items"` (always the original size), and
    a container that is too deep is `"[truncated: list of 3 items]"`. NaN and the infinities are strings.

    Args:
        value: Anything.
        limits: The budgets.
        redactor: The keys to mask, at any depth; those of `DEFAULT_REDACT` if None.

    Returns:
        Valid JSON of at most `limits.chars` characters. Never raises.
    """
    try:
        return Walk(limits, DEFAULT_REDACTOR if redactor is None else redactor).value(value, limits.depth)
    except Exception as error:  # MemoryError, or RecursionError where the application is at its own limit
        return f'"[not recorded: {type(error).__name__[:40]}]"'


def plain(value: object, limits: Limits = DEFAULT_LIMITS, redactor: Redactor | None = None) -> Any:
    """The value as `dumps` records it, as plain dictionaries, lists, strings and numbers."""
    return json.loads(dumps(value, limits, redactor))


def attribute_value(
    key: str, value: object, limits: Limits = DEFAULT_LIMITS, redactor: Redactor | None = None
) -> AttributeValue:
    """A value that OpenTelemetry takes as a span attribute, masked where its key names a secret.

    Strings, 64-bit integers, finite floats, booleans and flat lists or tuples of one of them stay what they
    are; what is recorded as one string (a date, an Enum, the mask) is that string; the rest is JSON text.
    """
    redactor = DEFAULT_REDACTOR if redactor is None else redactor
    value = redactor.value(key, value)
    if _is_number(value):
        return value
    kind = type(value)
    if (kind is list or kind is tuple) and _is_flat(value, limits):
        return list(value)  # type: ignore[call-overload,no-any-return]
    text = dumps(value, limits, redactor)
    return str(json.loads(text)) if text.startswith('"') else text


def _is_number(value: object) -> TypeGuard[bool | int | float]:
    if type(value) is int:
        return -_MAX_INT <= value <= _MAX_INT
    return type(value) is bool or (type(value) is float and -_INFINITY < value < _INFINITY)


def _is_flat(values: Any, limits: Limits) -> bool:
    """True for the lists that OpenTelemetry takes: all of one type, nothing to cut and nothing to mask."""
    if not 0 < len(values) <= limits.items:
        return False
    kind = type(values[0])
    if kind is str:
        return all(type(text) is str and text.isascii() for text in values) and (
            sum(map(len, values)) <= limits.string
        )
    return all(type(number) is kind and _is_number(number) for number in values)


def redact_text(text: str, redactor: Redactor | None = None) -> str:
    """Masks the values of secret keys in text of any form, as well as can be done without knowing the form.

    JSON members (at any depth, also of JSON that was cut off), `key=value` pairs of forms and query strings,
    `Name: value` lines, multipart form fields and passwords in URLs are found; the rest is left as it is.

    Args:
        text: A query string, or the text of a body.
        redactor: The keys to mask; those of `DEFAULT_REDACT` if None.
    """
    from tracemw._redact_text import mask_secrets

    return mask_secrets(text, DEFAULT_REDACTOR if redactor is None else redactor)


def redact_json_text(body: bytes | str, redactor: Redactor | None = None) -> str:
    """The text of a body with its secrets masked, as `redact_text` does, also where it was cut in the middle.

    Args:
        body: JSON, a form, or text of any other kind; bytes are decoded as UTF-8.
        redactor: The keys to mask; those of `DEFAULT_REDACT` if None.
    """
    text = body if isinstance(body, str) else bytes(body).decode("utf-8", "backslashreplace")
    return redact_text(text, redactor)


class Walk:
    """One pass over a value: its methods give the JSON text of a part and take that from the budgets.

    `room` is what is left of the characters. Whoever adds a member has first seen that its key and
    `_MARKER` characters fit; a container sets the same aside for its own brackets and marker.
    """

    __slots__ = ("items", "limits", "nodes", "open", "redactor", "room")

    def __init__(self, limits: Limits, redactor: Redactor) -> None:
        self.limits = limits
        self.redactor = redactor
        self.items = limits.items
        self.nodes = limits.nodes
        self.room = limits.chars
        self.open: set[int] = set()  # ids of the containers that we are in

    def value(self, value: Any, depth: int) -> str:
        """The JSON text of anything; `depth` is how many containers may still be opened."""
        kind = type(value)
        if kind is str:
            return self.text(value)
        if kind is dict:
            return self.mapping(value, value.items(), len(value), depth)
        if kind is list or kind is tuple:
            return self.sequence(value, value, len(value), depth)
        if kind is int:
            return self.integer(value)
        if value is None or value is True or value is False:
            return self.word("null" if value is None else "true" if value else "false")
        if kind is float:
            return self.real(value)
        try:
            return handler_of(kind)(self, value, depth)
        except (MemoryError, RecursionError):
            raise
        except Exception:  # it is not quite what its class says
            return self.text(f"<{type_name(kind)}>")

    def mapping(self, source: object, pairs: Iterable[tuple[Any, Any]], size: int, depth: int) -> str:
        """A JSON object. `source` is what is checked for cycles, `size` the number of `pairs`."""
        here = id(source)
        if depth <= 0 or here in self.open:
            return self.closed(source, size)
        count = size
        if size > self.nodes or size > self.items:
            count = min(self.nodes, self.items)
            pairs = islice(pairs, count)
        self.nodes -= count
        self.room -= _MARKER
        self.open.add(here)
        known = self.redactor.prefixes.get
        longest = self.limits.string
        parts: list[str] = []
        try:
            for key, value in pairs:
                prefix = known(key) if type(key) is str else None
                if prefix is None:
                    prefix, value = self.key(key, value)
                room = self.room - len(prefix) - 2
                if room < _MARKER:
                    break
                if type(value) is str and len(value) <= longest and 6 * len(value) < room and value.isascii():
                    text = encode_basestring(value)
                    self.room = room - len(text)
                else:
                    self.room = room
                    text = self.value(value, depth - 1)
                parts.append(prefix + text)
        except RuntimeError:  # another thread changed the dictionary
            pass
        cut = "" if len(parts) == size else f'"[truncated]": "{size} items"'
        return f"{{{self.leave(here, parts, cut)}}}"

    def sequence(self, source: object, items: Iterable[Any], size: int, depth: int) -> str:
        """A JSON array. `source` is what is checked for cycles, `size` the number of `items`."""
        here = id(source)
        if depth <= 0 or here in self.open:
            return self.closed(source, size)
        count = size
        if size > self.nodes or size > self.items:
            count = min(self.nodes, self.items)
            items = islice(items, count)
        elif size == 2:
            items = self.pair(list(islice(items, 2)))
        self.nodes -= count
        self.room -= _MARKER
        self.open.add(here)
        parts: list[str] = []
        try:
            for item in items:
                room = self.room - 2
                if room < _MARKER:
                    break
                self.room = room
                parts.append(self.value(item, depth - 1))
        except RuntimeError:  # another thread changed the set or the queue
            pass
        cut = "" if len(parts) == size else f'"[truncated: {size} items]"'
        return f"[{self.leave(here, parts, cut)}]"

    def leave(self, here: int, parts: list[str], cut: str) -> str:
        """Closes a container: the text between its brackets, with what says that it was cut."""
        self.open.discard(here)
        self.room += _MARKER - 2
        if cut:
            parts.append(cut)
            self.room -= len(cut) + 2
        return ", ".join(parts)

    def closed(self, source: object, size: int) -> str:
        """What stands for a container that is not opened."""
        why = "circular" if id(source) in self.open else "truncated"
        return self.text(f"[{why}: {type_name(type(source))} of {size} items]")

    def pair(self, items: list[Any]) -> list[Any]:
        """Two items; the second masked if the first names a secret, as headers are often kept."""
        name = items[0] if len(items) == 2 else None
        if type(name) is bytes and len(name) <= _LONGEST_KEY:
            name = name.decode("latin-1")
        if type(name) is str:
            items[1] = self.redactor.value(name, items[1])
        return items

    def key(self, key: Any, value: Any) -> tuple[str, Any]:
        """The JSON text of a key with its colon, and its value, masked if the key names a secret."""
        if type(key) is int and -_MAX_INT <= key <= _MAX_INT:
            key = int.__repr__(key)
        elif type(key) is not str:
            text = Walk(_KEY_LIMITS, self.redactor).value(key, _KEY_LIMITS.depth)
            key = json.loads(text) if text.startswith('"') else text
        value = self.redactor.value(key, value)
        if len(key) <= _LONGEST_KEY:
            return self.redactor.prefix(key), value
        return f"{quote(_cut(key, len(key), _LONGEST_KEY))}: ", value

    def text(self, text: str, size: int | None = None) -> str:
        """A JSON string, cut where it is too long; `size` is the length of what `text` is the beginning of."""
        size = len(text) if size is None else size
        room, longest = self.room, self.limits.string
        if size > longest or size + 2 > room:
            piece = quote(_cut(text, size, min(longest, room - _MARKER)))
        else:
            piece = quote(text)
        if len(piece) > room:  # of the characters that have to be escaped, each can take eight
            piece = quote(_cut(text, size, (room - _MARKER) // 8))
        self.room = room - len(piece)
        return piece

    def word(self, text: str) -> str:
        """A short text that is JSON as it is."""
        self.room -= len(text)
        return text

    def integer(self, number: int) -> str:
        bits = number.bit_length()
        if bits <= 64 or (bits <= 1_000 and bits // 3 < self.room):
            return self.word(int.__repr__(number))
        return self.text(f"[truncated: integer of {bits} bits]")

    def real(self, number: float) -> str:
        if -_INFINITY < number < _INFINITY:
            return self.word(float.__repr__(number))
        return self.text("NaN" if number != number else "Infinity" if number > 0 else "-Infinity")


def _cut(text: str, size: int, longest: int) -> str:
    return f"{text[: max(longest, 0)]}... [truncated: {size} characters]"
