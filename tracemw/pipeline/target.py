"""What a remote destination's URL says."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from tracemw.errors import SettingError

OPTIONS: Final = {"mlflow": ("experiment", "fidelity"), "otlp": ()}
FIDELITIES: Final = ("full", "fast")


@dataclass(frozen=True, slots=True)
class Target:
    """A remote destination.

    Attributes:
        kind: `mlflow` or `otlp`.
        url: `http(s)://host:port/path`, without user, password and options.
        options: What was said after the question mark.
    """

    kind: str
    url: str
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    options: dict[str, str] = field(default_factory=dict)


def parse(destination: str) -> Target:
    """Read `mlflow+http(s)://…` or `otlp+http(s)://…`.

    Raises:
        SettingError: It is no such URL, or has an option that is not known.
    """
    kind, _, rest = destination.partition("+")
    try:
        parts = urlsplit(rest)
        known, host = OPTIONS[kind], parts.hostname
        port = parts.port  # raises where it is no number, or too large
    except (KeyError, ValueError) as exc:
        raise SettingError(_wrong(destination, str(exc))) from None
    if parts.scheme not in ("http", "https") or not host:
        raise SettingError(_wrong(destination, "it begins with mlflow+http(s):// or otlp+http(s):// and a host"))
    if port == 0 or re.search(r"[\s\x00-\x20]", host):
        raise SettingError(_wrong(destination, "there is no such host or port"))
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    for name, value in options.items():
        if name not in known:
            near = [f"; did you mean {one!r}?" for one in difflib.get_close_matches(name, known, n=1)]
            known_ones = f"; known are: {', '.join(known)}" if known else "; this destination has none"
            raise SettingError(_wrong(destination, f"unknown option {name!r}{''.join(near) or known_ones}"))
        if name == "fidelity" and value not in FIDELITIES:
            raise SettingError(_wrong(destination, f"fidelity must be {' or '.join(FIDELITIES)}"))
        if not value:
            raise SettingError(_wrong(destination, f"{name} must be a name, or be left out"))
    return Target(kind, _without_credentials(parts), _part(parts.username), _part(parts.password), options)


def masked(destination: str) -> str:
    """Return a destination for people to read: without its password."""
    scheme, mark, rest = destination.partition("://")
    authority, slash, path = rest.partition("/")
    user, at, host = authority.rpartition("@")
    if not at:
        return destination
    return f"{scheme}{mark}{user.partition(':')[0]}:***@{host}{slash}{path}"


def _without_credentials(parts: SplitResult) -> str:
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl().rstrip("/")


def _part(text: str | None) -> str | None:
    return None if text is None else unquote(text)


def _wrong(destination: str, why: str) -> str:
    return f"the destination {masked(destination)!r} is not allowed: {why}"
