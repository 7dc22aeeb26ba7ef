"""HTTP to a back end: kept-alive connections, certificates, proxies, and what an answer means for what was sent.

The standard library's client is enough and brings nothing along: no other instrumentation of the application sees
it, and every timeout, limit and header is decided here.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import io
import os
import re
import socket
import ssl
import time
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, cast
from urllib.parse import SplitResult, unquote, urlsplit

_HEADER_NAME: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_HEADER_VALUE: Final = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
CONNECT_TIMEOUT: Final = 5.0  # seconds
MAX_ANSWER: Final = 4 << 20  # bytes of an answer that are read
MAX_RETRY_AFTER: Final = 900.0  # seconds; a longer wish is not a back end's to have
WORDS: Final = 300  # characters of a back end's message that are kept

TRY_LATER: Final = frozenset({408, 425, 429, 502, 503, 504})
NOT_FOR_US: Final = frozenset({401, 402, 403, 404, 405, 406, 407, 410, 415, 421, 451, 501, 505, 511})


class Unavailable(Exception):
    """The back end cannot be reached, or asks to be left alone for a while; everything waits.

    Attributes:
        retry_after: Seconds that it asked for.
    """

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Unfit(Exception):
    """The back end is there and takes nothing from us until somebody changes something; everything waits."""


class Refused(Exception):
    """The back end refuses what this request brought.

    Attributes:
        final: It would refuse it again; otherwise it may have been the back end's own trouble.
        too_large: A smaller request may be taken.
        content: It may be about the content of what was brought.
    """

    def __init__(self, reason: str, *, final: bool, too_large: bool = False, content: bool = False) -> None:
        super().__init__(reason)
        self.content = content
        self.final = final
        self.too_large = too_large


@dataclass(frozen=True, slots=True)
class Answer:
    """A response that was read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    credentials: str = ""  # where the user sets who we are

    @property
    def text(self) -> str:
        """The body as text, shortened, on one line."""
        words = printable(self.body[: 4 * WORDS].decode("utf-8", "replace"))
        return words if len(words) <= WORDS else words[: WORDS - 1] + "…"

    def header(self, name: str) -> str:
        """Return the value of a header, empty where there is none."""
        return next((value for one, value in self.headers.items() if one.lower() == name.lower()), "").strip()

    def retry_after(self) -> float | None:
        """Seconds to wait, as the header Retry-After says (a number or a date)."""
        value = self.header("Retry-After")
        try:
            seconds = float(value) if value.replace(".", "", 1).isdigit() else _until(value)
        except (ValueError, TypeError, OverflowError):
            return None
        return max(0.0, min(seconds, MAX_RETRY_AFTER))

    def check(self, what: str) -> Answer:
        """Return this answer if it is one of success.

        Args:
            what: What was asked for, to begin messages with.

        Raises:
            Unavailable: To be tried again later.
            Unfit: Whatever is sent, it will not be taken.
            Refused: This request was not taken, another one may be.
        """
        if 200 <= self.status < 300:
            return self
        there = f" to {printable(self.headers['Location'])}" if "Location" in self.headers else ""
        reason = f"{what}: HTTP {self.status}{there} {self.text}".rstrip()
        if self.status in (401, 403) and self.credentials:
            reason += f" (set who we are in {self.credentials})"
        if self.status in TRY_LATER:
            raise Unavailable(reason, self.retry_after())
        if self.status in NOT_FOR_US or self.status < 400:
            raise Unfit(reason)
        final = self.status < 500 and self.status not in (409, 422)
        content = self.status in (400, 422)
        raise Refused(reason, final=final, too_large=self.status == 413, content=content)


def printable(text: str) -> str:
    """Return text on one line, without what a terminal takes for a command: it goes to logs."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))


def _until(date: str) -> float:
    return email.utils.parsedate_to_datetime(date).timestamp() - time.time()


@dataclass
class Endpoint:
    """Where requests go and what they carry.

    Attributes:
        url: Base URL, without user, password and query; `http` or `https`.
        headers: Sent with every request.
        timeout: Seconds for one request, and for its whole answer.
        context: TLS settings, those of the machine if None.
        credentials: Where the user sets who we are, for messages.
    """

    url: str
    headers: dict[str, str] = field(default_factory=dict)
    timeout: float = 25.0
    context: Callable[[], ssl.SSLContext] | None = None
    credentials: str = ""


class Connection:
    """One kept-alive connection to an endpoint; used by one thread at a time."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._http: http.client.HTTPConnection | None = None
        self._prefix = ""  # of every request's target
        self._headers: dict[str, str] = {}
        self._used = False

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Send one request and read the whole answer.

        A connection that the server closed while it was idle is opened again, once.

        Args:
            path: What is added to the endpoint's URL.

        Raises:
            Unavailable: There was no answer.
            Unfit: What was set for us to send is no header.
        """
        for again in (self._used, False):
            try:
                return self._request(method, path, body, headers or {})
            except (OSError, http.client.HTTPException, zlib.error, ValueError) as exc:
                self.close()
                if not (again and isinstance(exc, (ConnectionError, http.client.BadStatusLine))):
                    raise Unavailable(f"{self._endpoint.url}: {_explained(exc)}") from exc
        raise AssertionError("not reached")

    def close(self) -> None:
        """Close it; the next request opens another one."""
        connection, self._http, self._used = self._http, None, False
        if connection is not None:
            connection.close()

    def _request(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Answer:
        if self._http is None:
            self._connect()
            assert self._http is not None
        headers = {**self._endpoint.headers, **self._headers, **headers}
        self._check(headers)
        self._http.sock.settimeout(self._endpoint.timeout)
        self._http.request(method, f"{self._prefix}{path}" or "/", body, headers)
        response = self._http.getresponse()
        content = response.read(MAX_ANSWER)
        self._used = True
        if response.getheader("Content-Encoding", "").lower() == "gzip":
            content = zlib.decompressobj(wbits=31).decompress(content, MAX_ANSWER)
        answer = Answer(response.status, dict(response.getheaders()), content, self._endpoint.credentials)
        if response.will_close or not response.isclosed():  # the rest of an endless answer is not read
            self.close()
        return answer

    def _check(self, headers: Mapping[str, str]) -> None:
        """Refuse what is no header before the library does, which shows secrets."""
        for name, value in headers.items():
            if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
                hint = f": look at {self._endpoint.credentials}" if self._endpoint.credentials else ""
                raise Unfit(f"the header {name!r} cannot be sent, it has characters that no header has{hint}")

    def _connect(self) -> None:
        url = urlsplit(self._endpoint.url)
        host, secure = url.hostname or "", url.scheme == "https"
        port = url.port or (443 if secure else 80)
        proxy = _proxy(url.scheme, f"{host}:{port}")
        where = (proxy.hostname or "", proxy.port or 80) if proxy else (host, port)
        self._prefix, self._headers = url.path.rstrip("/"), {}
        made: http.client.HTTPConnection
        if secure:
            context = self._endpoint.context() if self._endpoint.context else ssl.create_default_context()
            made = http.client.HTTPSConnection(*where, timeout=CONNECT_TIMEOUT, context=context)
            if proxy:
                made.set_tunnel(host, port, _proxy_headers(proxy))
        else:
            made = http.client.HTTPConnection(*where, timeout=CONNECT_TIMEOUT)
            if proxy:
                self._prefix = f"http://{host}:{port}{self._prefix}"
                self._headers = _proxy_headers(proxy)
        made.connect()
        made.response_class = partial(_answer_within, self._endpoint.timeout)  # type: ignore[assignment]
        self._http = made


def _answer_within(seconds: float, sock: socket.socket, *args: Any, **kwargs: Any) -> http.client.HTTPResponse:
    """Make a response that is read to its end within so many seconds, however slowly it comes."""
    return http.client.HTTPResponse(cast(socket.socket, _Within(seconds, sock)), *args, **kwargs)


class _Within(io.RawIOBase):
    """What comes from a socket, until a deadline."""

    def __init__(self, seconds: float, sock: socket.socket) -> None:
        self._deadline = time.monotonic() + seconds
        self._sock = sock
        self._raw = sock.makefile("rb", buffering=0)

    def makefile(self, *args: Any) -> io.BufferedReader:
        """Return this as the file that a response reads."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Read what is there, or wait for it until the deadline."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)
        return cast(Any, self._raw).readinto(buffer)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Close the file, and the socket if nobody else has it."""
        self._raw.close()
        super().close()


def tls(trusted: tuple[str, str | None], *own: tuple[str, str | None]) -> ssl.SSLContext:
    """Return TLS settings made of files that variables name.

    Args:
        trusted: Variable and value: a file or folder of certificates to trust.
        own: Likewise our certificate, and its key if that is in another file.

    Raises:
        Unfit: A file cannot be used; the message names it and its variable.
    """
    for name, path in (trusted, *own):
        if path and not os.access(path, os.R_OK):
            raise Unfit(f"{name} names {path!r}, which cannot be read")
    where = trusted[1] or None
    name = trusted[0]
    try:
        folder = where if where and os.path.isdir(where) else None
        context = ssl.create_default_context(cafile=None if folder else where, capath=folder)
        if own and own[0][1]:
            name = " or ".join(name for name, _ in own)
            context.load_cert_chain(*(path or None for _, path in own))  # type: ignore[arg-type]
    except OSError as exc:
        raise Unfit(f"{name} names no certificates that can be used: {exc}") from exc
    return context


def _proxy(scheme: str, host: str) -> SplitResult | None:
    """Return the proxy that the environment (HTTPS_PROXY, NO_PROXY ...) names for a host."""
    address = urllib.request.getproxies().get(scheme)
    if not address or urllib.request.proxy_bypass(host):
        return None
    return urlsplit(address if "//" in address else f"http://{address}")


def _proxy_headers(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    return {"Proxy-Authorization": basic(unquote(proxy.username), unquote(proxy.password or ""))}


def basic(user: str, password: str) -> str:
    """Return the value of an Authorization header."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def _explained(exc: Exception) -> str:
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({exc.verify_message})"
    if isinstance(exc, (socket.timeout, TimeoutError)):
        return "no answer in time"
    if isinstance(exc, ConnectionRefusedError):
        return "nothing listens there"
    if isinstance(exc, socket.gaierror):
        return "its name is not known"
    return f"{type(exc).__name__} {exc}".strip()
