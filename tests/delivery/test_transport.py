"""HTTP to a back end: connections are kept, failures have names, and the standard settings are honoured."""

from __future__ import annotations

import email.utils
import gzip
import socket
import ssl
import threading
import time
from pathlib import Path

import pytest

from tests.delivery.backends import HttpServer, Reply, Request, certificate
from tracemw.pipeline.transport import (
    MAX_RETRY_AFTER,
    Answer,
    Connection,
    Endpoint,
    Refused,
    Unavailable,
    Unfit,
    tls,
)


class Echo(HttpServer):
    """Remembers what it was asked."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.seen: list[Request] = []
        self.reply = Reply(body=b"yes")
        super().__init__(self._answer, tls)

    def _answer(self, request: Request) -> Reply:
        self.seen.append(request)
        return self.reply


@pytest.fixture
def echo() -> object:
    """A server that says yes."""
    made = Echo()
    yield made
    made.off()


def test_one_connection_serves_many_requests(echo: Echo) -> None:
    """It is kept open between them."""
    connection = Connection(Endpoint(f"{echo.url}/base", headers={"X-A": "1"}))
    for _ in range(3):
        assert connection.request("POST", "/x", b"body", {"X-B": "2"}).body == b"yes"
    assert {request.peer for request in echo.seen} == {echo.seen[0].peer}
    last = echo.seen[-1]
    assert (last.method, last.path, last.body) == ("POST", "/base/x", b"body")
    assert (last.headers["X-A"], last.headers["X-B"]) == ("1", "2")
    connection.close()


def test_a_connection_that_was_closed_meanwhile_is_opened_again(echo: Echo) -> None:
    """Servers close idle connections; that costs no request."""
    connection = Connection(Endpoint(echo.url))
    connection.request("GET", "/")
    echo.off()
    echo.on()
    assert connection.request("GET", "/").status == 200
    connection.close()


def test_a_server_that_says_close_is_taken_at_its_word(echo: Echo) -> None:
    """The next request has a connection of its own."""
    echo.reply = Reply(body=b"yes", headers={"Connection": "close"})
    connection = Connection(Endpoint(echo.url))
    connection.request("GET", "/")
    connection.request("GET", "/")
    assert len({request.peer for request in echo.seen}) == 2
    connection.close()


def test_compressed_answers_are_read(echo: Echo) -> None:
    """Some proxies compress unasked."""
    echo.reply = Reply(body=gzip.compress(b"packed"), headers={"Content-Encoding": "gzip"})
    connection = Connection(Endpoint(echo.url))
    assert connection.request("GET", "/").body == b"packed"
    connection.close()


def test_nobody_there_is_said_plainly() -> None:
    """The message names the address and what is wrong, not a class of exceptions."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(Unavailable, match=f"{url}: nothing listens there"):
            Connection(Endpoint(url)).request("GET", "/")
    with pytest.raises(Unavailable, match="its name is not known"):
        Connection(Endpoint("http://no-such-host.invalid")).request("GET", "/")


def test_a_silent_server_is_given_up() -> None:
    """The timeout bounds a request."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(Unavailable, match="no answer in time"):
            Connection(Endpoint(url, timeout=0.2)).request("GET", "/")
        assert time.monotonic() - began < 2


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "])
def test_an_answer_that_comes_too_slowly_is_given_up(start: bytes) -> None:
    """The timeout bounds all of it, not each byte."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            peer, _ = listening.accept()
            with peer:
                peer.recv(65536)
                try:
                    peer.sendall(start)
                    while True:
                        peer.sendall(b"x")
                        time.sleep(0.05)
                except OSError:
                    pass

        threading.Thread(target=drip, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(Unavailable, match="no answer in time"):
            Connection(Endpoint(url, timeout=0.5)).request("GET", "/")
        assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("name", "value"), [("Authorization", "Bearer se\ncret"), ("X-A", "\u20accret"), ("\xe9", "secret")]
)
def test_what_is_no_header_is_said_without_its_value(echo: Echo, name: str, value: str) -> None:
    """It may be a password; the message says which header, and where it is set."""
    connection = Connection(Endpoint(echo.url, {name: value}, credentials="A_VARIABLE"))
    with pytest.raises(Unfit, match=f"the header '{name}' cannot be sent.* look at A_VARIABLE") as caught:
        connection.request("GET", "/")
    assert "cret" not in str(caught.value) and not echo.seen
    connection.close()


def test_a_refused_log_in_names_what_to_set() -> None:
    """And nothing that the back end says can write to a terminal."""
    answer = Answer(403, {}, b"\x1b[31mno\x1b]0;x\x07", "A_VARIABLE")
    with pytest.raises(Unfit) as caught:
        answer.check("spans")
    assert str(caught.value) == "spans: HTTP 403 \ufffd[31mno\ufffd]0;x\ufffd (set who we are in A_VARIABLE)"


def test_a_missing_certificate_is_named_with_its_variable(tmp_path: Path) -> None:
    """The same for a file that has none in it."""
    with pytest.raises(Unfit, match="A_CERT names '/no/such.pem', which cannot be read"):
        tls(("A_CERT", "/no/such.pem"))
    with pytest.raises(Unfit, match="A_KEY names '/no/key.pem', which cannot be read"):
        tls(("A_CERT", None), ("A_CLIENT", None), ("A_KEY", "/no/key.pem"))
    (tmp_path / "empty.pem").write_text("")
    with pytest.raises(Unfit, match="A_CERT names no certificates that can be used"):
        tls(("A_CERT", str(tmp_path / "empty.pem")))
    with pytest.raises(Unfit, match="A_CLIENT names no certificates that can be used"):
        tls(("A_CERT", None), ("A_CLIENT", str(tmp_path / "empty.pem")))


def test_an_endless_answer_ends() -> None:
    """No more than a few megabytes of it are read."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def pour() -> None:
            peer, _ = listening.accept()
            with peer:
                peer.recv(65536)
                try:
                    peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                    while True:
                        peer.sendall(b"x" * 65536)
                except OSError:
                    pass

        thread = threading.Thread(target=pour, daemon=True)
        thread.start()
        connection = Connection(Endpoint(f"http://127.0.0.1:{listening.getsockname()[1]}"))
        assert len(connection.request("GET", "/").body) == 4 << 20
        connection.close()
        thread.join(5)


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_later(status: int) -> None:
    """Busy and gone mean: everything waits."""
    with pytest.raises(Unavailable):
        Answer(status, {}, b"").check("spans")


@pytest.mark.parametrize("status", [301, 401, 403, 404, 405, 501])
def test_not_at_all(status: int) -> None:
    """Whatever is sent, it will not be taken: somebody has to change something."""
    with pytest.raises(Unfit, match=f"HTTP {status}"):
        Answer(status, {}, b"").check("spans")


@pytest.mark.parametrize(
    ("status", "final", "too_large"),
    [(400, True, False), (413, True, True), (422, False, False), (500, False, False)],
)
def test_not_this_one(status: int, final: bool, too_large: bool) -> None:
    """Another request may be taken; MLflow says 422 for trouble of its database, so that is not final."""
    with pytest.raises(Refused) as caught:
        Answer(status, {}, b"because").check("spans")
    assert (caught.value.final, caught.value.too_large) == (final, too_large)
    assert str(caught.value) == f"spans: HTTP {status} because"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", 7.0), ("1.5", 1.5), ("999999", MAX_RETRY_AFTER), ("soon", None), ("-3", None), ("", None)],
)
def test_retry_after_in_seconds(value: str, seconds: float | None) -> None:
    """A number is honoured up to a limit; what is no number is left out."""
    with pytest.raises(Unavailable) as caught:
        Answer(503, {"retry-after": value}, b"").check("spans")
    assert caught.value.retry_after == seconds


def test_retry_after_as_a_date() -> None:
    """So is a point in time; one that has passed is no wait."""
    for offset, low, high in ((60, 50, 61), (-60, 0, 0)):
        date = email.utils.formatdate(time.time() + offset, usegmt=True)
        seconds = Answer(503, {"Retry-After": date}, b"").retry_after()
        assert seconds is not None and low <= seconds <= high


def test_messages_are_short_and_on_one_line() -> None:
    """A back end's error page does not fill the log."""
    text = Answer(500, {}, b"<html>\n" + b"long " * 1000).text
    assert len(text) == 300 and "\n" not in text


def test_certificates(tmp_path: Path) -> None:
    """An unknown one is refused with the reason; one that is trusted is taken."""
    pem, key = certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(pem, key)
    server = Echo(tls)
    try:
        with pytest.raises(Unavailable, match="certificate is not trusted"):
            Connection(Endpoint(server.url)).request("GET", "/")
        trusting = Endpoint(server.url, context=lambda: ssl.create_default_context(cafile=str(pem)))
        connection = Connection(trusting)
        assert connection.request("GET", "/").status == 200
        connection.close()
    finally:
        server.off()


def test_a_proxy_of_the_environment_is_used(echo: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain requests name the whole URL to it, with its credentials; NO_PROXY is left alone."""
    monkeypatch.setenv("http_proxy", f"http://me:pw@127.0.0.1:{echo.port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    connection = Connection(Endpoint("http://collector.test:4318/base"))
    assert connection.request("GET", "/x").status == 200
    assert echo.seen[0].path == "http://collector.test:4318/base/x"
    assert echo.seen[0].headers["Proxy-Authorization"].startswith("Basic ")
    connection.close()
    monkeypatch.setenv("no_proxy", "collector.test")
    with pytest.raises(Unavailable):
        Connection(Endpoint("http://collector.test:4318")).request("GET", "/")
    assert len(echo.seen) == 1


def test_a_proxy_is_asked_for_a_tunnel_to_a_secure_server(echo: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    """TLS goes through it; one that refuses is named."""
    monkeypatch.setenv("https_proxy", echo.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(Unavailable, match="Tunnel connection failed"):
        Connection(Endpoint("https://collector.test")).request("GET", "/")
