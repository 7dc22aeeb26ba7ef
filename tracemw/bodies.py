"""Copies of request and response bodies, where the settings ask for them.

A tee looks at what passes, keeps the first part of it, and never reads ahead of the application. Only text and
JSON are kept; what looks secret is masked when the body is stored, by the writer thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from tracemw.guard import guarded

LIMIT: Final = 65_536  # bytes of a body that are kept
REQUEST: Final = "tracemw.request.body"
RESPONSE: Final = "tracemw.response.body"

_TEXT: Final = ("text/", "application/json", "application/x-www-form-urlencoded", "application/xml")
_TEXT_SUFFIXES: Final = ("+json", "+xml")
_CHARSETS: Final = ("utf-8", "utf8", "us-ascii", "ascii", "iso-8859-", "latin", "windows-125")  # ASCII is in them

# What takes something out of a stream (`io.RawIOBase`, `io.BufferedIOBase`); others only tell of it.
_READING: Final = frozenset(("read", "read1", "readall", "readline", "readlines", "readinto", "readinto1"))


class Tee:
    """Keeps the beginning of one body.

    Args:
        content_type: Of the body; one that is neither text nor JSON is not kept, only counted.
        content_encoding: Likewise; in what is compressed, no secret could be masked.
    """

    __slots__ = ("_parts", "_kept", "_wanted", "size")

    def __init__(self, content_type: str, content_encoding: str = "") -> None:
        self._parts: list[bytes] = []
        self._kept = 0
        self._wanted = is_text(content_type) and content_encoding.strip().lower() in ("", "identity")
        self.size = 0

    @guarded()
    def add(self, part: Any) -> None:
        """Take note of a part that passes."""
        if not isinstance(part, (bytes, bytearray, memoryview)):
            return
        self.size += len(part)
        room = LIMIT - self._kept
        if self._wanted and room > 0 and part:
            kept = bytes(part[:room])
            self._parts.append(kept)
            self._kept += len(kept)

    def attributes(self, name: str) -> dict[str, Any]:
        """Return the root's attributes for this body: its beginning as bytes, and what was left out."""
        if not self.size:
            return {}
        found: dict[str, Any] = {f"{name}.size": self.size}
        body = b"".join(self._parts)
        if body and b"\0" not in body:  # no text: UTF-16 that nobody has declared, or binary
            found[name] = body
            if self.size > self._kept:
                found[f"{name}.truncated"] = True
        return found


class TeeInput:
    """A `wsgi.input` that keeps the beginning of what the application reads from it.

    It has the methods that the server's stream has, no others: frameworks look which ones there are.
    """

    def __init__(self, stream: Any, tee: Tee) -> None:
        self._stream = stream
        self._tee = tee

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._stream, name)
        if name not in _READING:
            return found

        def reading(*args: Any, **named: Any) -> Any:
            result = found(*args, **named)
            self._look_at(result, (*args, *named.values()))
            return result

        return reading

    def __iter__(self) -> Iterator[Any]:
        for line in self._stream:
            self._tee.add(line)
            yield line

    def __next__(self) -> Any:
        line = next(self._stream)
        self._tee.add(line)
        return line

    @guarded()
    def _look_at(self, result: Any, args: tuple[Any, ...]) -> None:
        """Take note of what was read: returned, as lines, or put into a buffer of the caller's."""
        if isinstance(result, list):
            for line in result:
                self._tee.add(line)
        elif isinstance(result, int):
            self._tee.add(memoryview(args[0]).cast("B")[:result])
        else:
            self._tee.add(result)


def is_text(content_type: str) -> bool:
    """True for the media types that are kept, in a charset in which names of secrets are found."""
    kind, *parameters = content_type.lower().split(";")
    kind = kind.strip()
    if not (kind.startswith(_TEXT) or kind.endswith(_TEXT_SUFFIXES)):
        return False
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "charset":
            return value.strip(" \t\"'").startswith(_CHARSETS)
    return True


def content_of(headers: Any) -> tuple[str, str]:
    """Return content type and encoding among header pairs, of bytes (ASGI) or of strings (WSGI)."""
    kind = encoding = ""
    for name, value in headers:
        if isinstance(name, bytes):
            name, value = name.decode("latin-1"), bytes(value).decode("latin-1")
        name = name.lower()
        if name == "content-type":
            kind = kind or str(value)
        elif name == "content-encoding":
            encoding = encoding or str(value)
    return kind, encoding
