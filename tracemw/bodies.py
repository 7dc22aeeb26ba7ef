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


class Tee:
    """Keeps the beginning of one body.

    Args:
        content_type: Of the body; one that is neither text nor JSON is not kept, only counted.
    """

    __slots__ = ("_parts", "_kept", "_wanted", "size")

    def __init__(self, content_type: str) -> None:
        self._parts: list[bytes] = []
        self._kept = 0
        self._wanted = is_text(content_type)
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
        if self._parts:
            found[name] = b"".join(self._parts)
            if self.size > self._kept:
                found[f"{name}.truncated"] = True
        return found


class TeeInput:
    """A `wsgi.input` that keeps the beginning of what the application reads from it."""

    def __init__(self, stream: Any, tee: Tee) -> None:
        self._stream = stream
        self._tee = tee

    def read(self, *args: Any) -> Any:
        """Read as the server's stream does."""
        return self._seen(self._stream.read(*args))

    def readline(self, *args: Any) -> Any:
        """Read a line as the server's stream does."""
        return self._seen(self._stream.readline(*args))

    def readlines(self, *args: Any) -> Any:
        """Read lines as the server's stream does."""
        lines = self._stream.readlines(*args)
        for line in lines:
            self._tee.add(line)
        return lines

    def __iter__(self) -> Iterator[Any]:
        for line in self._stream:
            yield self._seen(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _seen(self, data: Any) -> Any:
        self._tee.add(data)
        return data


def is_text(content_type: str) -> bool:
    """True for the media types that are kept."""
    kind = content_type.partition(";")[0].strip().lower()
    return kind.startswith(_TEXT) or kind.endswith(_TEXT_SUFFIXES)


def content_type(headers: Any) -> str:
    """Return the content type among header pairs, of bytes (ASGI) or of strings (WSGI)."""
    for name, value in headers:
        if isinstance(name, bytes):
            name, value = name.decode("latin-1"), bytes(value).decode("latin-1")
        if name.lower() == "content-type":
            return str(value)
    return ""
