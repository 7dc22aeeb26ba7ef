"""Headers in, ids out: who asks, in which session, and under which request id.

Header values are claims of whoever sent them, and they end up in log lines, response headers, a database and
other people's back ends. What fits the rules below is taken as it is; what does not is discarded and counted,
never cut: a cut id would merge two people or two requests.

- Request id: 1 to 128 characters of printable ASCII. A space inside is allowed: it breaks neither a line nor
  a header. Spaces and tabs around a value are not part of it.
- Session and user: UTF-8, else latin-1; at most 250 characters; no control characters (C0, DEL, C1) and no
  surrogates. 250 is MLflow's limit: beyond it MLflow drops session, user and request id of the trace.
- An empty value is none. Of several values the first valid one counts: in the order of the configured names,
  then in the order in which they came.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeAlias

from tracemw.chance import chance
from tracemw.errors import SettingError

MAX_REQUEST_ID: Final = 128
MAX_ID: Final = 250

NOTHING_DISCARDED: Final[Mapping[str, int]] = MappingProxyType({})

_FIELDS: Final = ("client_request_id", "session_id", "user_id", "traceparent", "tracestate", "baggage")
_LONGEST: Final = (MAX_REQUEST_ID, MAX_ID, MAX_ID)
_REQUEST_ID: Final = 0
_TRACEPARENT: Final = 3  # from here on raw values, which their own parsers judge

_UNSAFE: Final = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


class Identity(NamedTuple):
    """What the headers of one request say.

    Attributes:
        client_request_id: The caller's id of the request, or the one that was made for it.
        session_id: The session, None if no valid one came.
        user_id: The user, None if no valid one came.
        generated: True where `client_request_id` was made here.
        traceparent: The raw header, not yet checked; several are joined, as HTTP has it.
        tracestate: The raw header, likewise.
        baggage: The raw header, likewise.
        discarded: How many values were discarded, by reason: `<field>.<too_long|characters|malformed>`.
    """

    client_request_id: str | None
    session_id: str | None
    user_id: str | None
    generated: bool
    traceparent: str | None = None
    tracestate: str | None = None
    baggage: str | None = None
    discarded: Mapping[str, int] = NOTHING_DISCARDED


NOBODY: Final = Identity(None, None, None, False)

Values: TypeAlias = list[tuple[int, Any]]  # of the headers that tell an identity, by a code of their reader's


class _Discard(ValueError):
    """A value that breaks a rule; carries the reason it is counted under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class IdentityReader:
    """Reads the identity of requests; made once from the settings, used by every request.

    Args:
        request_id: Name of the request id header, or several by precedence, or None.
        session_id: The session's header, likewise.
        user_id: The user's header, likewise.
        generate: Make a request id where no valid one came.

    Raises:
        SettingError: A name cannot be a header name.
    """

    __slots__ = ("_asgi", "_fields", "_generate", "_wsgi")

    def __init__(
        self,
        request_id: str | Sequence[str] | None = ("x-request-id",),
        session_id: str | Sequence[str] | None = ("x-session-id",),
        user_id: str | Sequence[str] | None = ("x-user-id",),
        generate: bool = True,
    ) -> None:
        names = [_header_names(given) for given in (request_id, session_id, user_id)]
        names += [("traceparent",), ("tracestate",), ("baggage",)]
        targets: dict[str, list[tuple[int, int]]] = {}  # header -> what it may fill: (precedence, field)
        for field, headers in enumerate(names):
            for rank, header in enumerate(headers):
                targets.setdefault(header, []).append((rank, field))
        plain = all(found[0][0] == 0 and len(found) == 1 for found in targets.values())
        # In the plain case, one header for each field, the code of a header is its field; else an index here.
        self._fields = None if plain else tuple(targets.values())
        codes = {name: found[0][1] if plain else i for i, (name, found) in enumerate(targets.items())}
        self._asgi = {spelling: code for name, code in codes.items() for spelling in _spellings(name)}
        self._wsgi = tuple((_environ_key(name), code) for name, code in codes.items())
        self._generate = generate

    def values_in_asgi(self, headers: Iterable[tuple[bytes, bytes]]) -> Values:
        """Find the values that tell the identity among the headers of an ASGI scope, in one pass.

        ASGI names are lower-case; the usual spellings of servers that do not follow that are known too.

        Args:
            headers: `scope["headers"]`, whatever it is.

        Returns:
            The values, for `identity_of`; never raises.
        """
        names = self._asgi
        try:
            return [(names[name], value) for name, value in headers if name in names]
        except Exception:  # not pairs, or names that cannot be looked up
            return _tolerant_hits(names, headers)

    def values_in_environ(self, environ: Mapping[str, Any]) -> Values:
        """Find the values that tell the identity in a WSGI environ.

        Servers have joined repeated headers with a comma by then; such a value is taken as it is.

        Args:
            environ: The WSGI environ, whose strings hold latin-1 (PEP 3333).

        Returns:
            The values, for `identity_of`; never raises.
        """
        try:
            return [(code, _wsgi_value(environ[key])) for key, code in self._wsgi if key in environ]
        except Exception:  # no mapping
            return []

    def request_id_of(self, hits: Values) -> str | None:
        """Judge the request id alone, where one look will do.

        Args:
            hits: What `values_in_asgi` or `values_in_environ` has found.

        Returns:
            The id, or the one that was made where no header came; None where `identity_of` has to tell; never
            raises.
        """
        if not hits and self._generate:
            return new_request_id()
        if self._fields is None:
            for field, value in hits:
                if field == _REQUEST_ID:
                    try:
                        return _plain(value, field) or None
                    except Exception:  # no text
                        return None
        return None

    def identity_of(self, hits: Values) -> Identity:
        """Judge the values of the headers.

        Args:
            hits: What `values_in_asgi` or `values_in_environ` has found.

        Returns:
            The identity; never raises.
        """
        if self._fields is not None:
            hits = _by_precedence(self._fields, hits)
        found: list[str | None] = [None, None, None, None, None, None]
        discarded: dict[str, int] | None = None
        for field, value in hits:
            try:
                if field >= _TRACEPARENT:
                    found[field] = _joined(found[field], value)
                elif found[field] is None:
                    judge = _person if field else _request_id
                    found[field] = _plain(value, field) or judge(value) or None
            except Exception as exc:
                discarded = {} if discarded is None else discarded
                reason = f"{_FIELDS[field]}.{exc.reason if isinstance(exc, _Discard) else 'malformed'}"
                discarded[reason] = discarded.get(reason, 0) + 1
        request_id, session_id, user_id, traceparent, tracestate, baggage = found
        generated = request_id is None and self._generate
        return Identity(
            new_request_id() if generated else request_id,
            session_id,
            user_id,
            generated,
            traceparent,
            tracestate,
            baggage,
            NOTHING_DISCARDED if discarded is None else discarded,
        )


def _plain(raw: bytes | str, field: int) -> str | None:
    """Return the id where one look says that it keeps all rules, as nearly always; else None."""
    text = raw if isinstance(raw, str) else raw.decode("latin-1")
    if len(text) <= _LONGEST[field] and text.isascii() and text.isprintable():
        return text.strip(" ")
    return None


def new_request_id() -> str:
    """Make a request id: 32 random hex digits, different in every forked process."""
    return f"{chance.getrandbits(128):032x}"


def check_id(field: str, value: object) -> str | None:
    """Check an id that server code sets; the same limits hold as for headers.

    Args:
        field: "client_request_id", "session_id" or "user_id"; the first has the limits of a request id.
        value: The id. Numbers, UUIDs and the like count as their `str`; a list, a dictionary, or an object
            whose text would be its address in memory is none.

    Returns:
        The id without surrounding blanks, or None where it is None or empty.

    Raises:
        ValueError: The id cannot be used; the message says why.
    """
    if value is None:
        return None
    try:
        text = value if isinstance(value, str) else _text_of(value)
    except Exception:
        raise ValueError(f"{field} of type {type(value).__name__} has no text form that is an id") from None
    text = text.strip(" \t")
    try:
        return (_checked_request_id(text) if field == "client_request_id" else _checked_person(text)) or None
    except _Discard as exc:
        raise ValueError(f"{field} {exc}") from None


def clean_id(field: str, value: object) -> str | None:
    """Return what `check_id` returns, and None where it raises."""
    try:
        return check_id(field, value)
    except ValueError:
        return None


def _text_of(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode()
    kind: Any = type(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number or (kind.__str__ is not object.__str__ and not hasattr(kind, "__iter__")):
        return str(value)
    raise TypeError(kind)


def _request_id(raw: bytes | str) -> str:
    text = raw if isinstance(raw, str) else raw.decode("latin-1")
    return _checked_request_id(text.strip(" \t"))


def _checked_request_id(text: str) -> str:
    if len(text) > MAX_REQUEST_ID:
        raise _Discard("too_long", f"is longer than {MAX_REQUEST_ID} characters")
    if text.isascii() and text.isprintable():
        return text
    raise _Discard("characters", "has other characters than printable ASCII")


def _person(raw: bytes | str) -> str:
    if isinstance(raw, str):
        return _checked_person(raw.strip(" \t"))
    raw = raw.strip(b" \t")
    if len(raw) > 4 * MAX_ID:  # before it is decoded: nobody pays for a megabyte
        raise _Discard("too_long", f"is longer than {MAX_ID} characters")
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    return _checked_person(text)


def _checked_person(text: str) -> str:
    if len(text) > MAX_ID:
        raise _Discard("too_long", f"is longer than {MAX_ID} characters")
    # isprintable() is the fast way to say yes; what it refuses may still be fine (a no-break space).
    if text.isprintable() or not _UNSAFE.search(text):
        return text
    raise _Discard("characters", "has control characters or surrogates")


def _joined(before: str | None, raw: bytes | str) -> str:
    text = raw if isinstance(raw, str) else raw.decode("latin-1")
    return text if before is None else f"{before},{text}"


def _by_precedence(
    fields: tuple[list[tuple[int, int]], ...], hits: list[tuple[int, Any]]
) -> list[tuple[int, Any]]:
    ranked = [(rank, field, value) for code, value in hits for rank, field in fields[code]]
    ranked.sort(key=_rank)
    return [(field, value) for _, field, value in ranked]


def _rank(ranked: tuple[int, int, Any]) -> int:
    return ranked[0]


def _tolerant_hits(names: Mapping[bytes, int], headers: Any) -> list[tuple[int, Any]]:
    """Take what can be taken from headers that are not pairs of bytes."""
    hits: list[tuple[int, Any]] = []
    try:
        for item in headers:
            try:
                name, value = item
                hits.append((names[bytes(name).lower()], value))
            except Exception:  # this one is no header that we look for
                continue
    except Exception:  # no iterable at all
        pass
    return hits


def _wsgi_value(value: Any) -> Any:
    """Return ASCII text, or the bytes that a WSGI string stands for; what has none is left to be counted."""
    if type(value) is str and value.isascii():
        return value
    for encoding in ("latin-1", "utf-8"):  # the second for a server that has decoded by itself
        try:
            return value.encode(encoding)
        except Exception:  # no text, or surrogates
            continue
    return None


def _header_names(given: str | Sequence[str] | None) -> tuple[str, ...]:
    names = () if given is None else (given,) if isinstance(given, str) else tuple(given)
    for name in names:
        if not isinstance(name, str) or not _TOKEN.fullmatch(name):
            raise SettingError(f"{name!r} cannot be the name of a header")
    return tuple(dict.fromkeys(name.lower() for name in names))


def _spellings(name: str) -> set[bytes]:
    canonical = "-".join(part.capitalize() for part in name.split("-"))
    spellings = {name, name.upper(), canonical, re.sub(r"-Id\b", "-ID", canonical)}
    return {spelling.encode("ascii") for spelling in spellings}


def _environ_key(name: str) -> str:
    key = name.upper().replace("-", "_")
    return key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"
