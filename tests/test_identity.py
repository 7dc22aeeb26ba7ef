"""Headers to ids: what is taken, what is discarded, and that nothing a stranger sends can raise."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tracemw.errors import SettingError
from tracemw.identity import Identity, IdentityReader, check_id, clean_id, new_request_id

READER = IdentityReader()
HEX = set("0123456789abcdef")


def of_asgi(headers: Any, reader: IdentityReader = READER) -> Identity:
    """What an ASGI scope's headers say."""
    return reader.identity_of(reader.values_in_asgi(headers))


def of_environ(environ: Any, reader: IdentityReader = READER) -> Identity:
    """What a WSGI environ says."""
    return reader.identity_of(reader.values_in_environ(environ))


def read(*headers: tuple[bytes, bytes], reader: IdentityReader = READER) -> Identity:
    return of_asgi(list(headers), reader)


def is_safe(text: str) -> bool:
    """No control characters (C0, DEL, C1), no surrogates."""
    return not any(ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 for c in text)


class TestRequestId:
    @pytest.mark.parametrize(
        "value", [b"a", b"req-1", b"01ARZ3NDEKTSV4RRFFQ69G5FAV", b"x" * 128, b'!"#$%&\\()*,./:;<=>?@[]^_`{|}~']
    )
    def test_any_printable_ascii_up_to_128_is_kept(self, value: bytes) -> None:
        """Ids need not be UUIDs: whatever is printable ASCII of 1 to 128 characters is the caller's id."""
        identity = read((b"x-request-id", value))
        assert identity.client_request_id == value.decode()
        assert not identity.generated
        assert not identity.discarded

    def test_blanks_around_are_not_part_of_it(self) -> None:
        """Optional whitespace around a header value does not belong to it; a space inside does."""
        assert read((b"x-request-id", b" \ta b\t ")).client_request_id == "a b"

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            (b"x" * 129, "too_long"),
            (b"a\nb", "characters"),
            (b"a\r", "characters"),
            (b"\x00", "characters"),
            (b"a\tb", "characters"),
            (b"a\x7f", "characters"),
            ("é".encode(), "characters"),
            (b"\xff", "characters"),
        ],
    )
    def test_an_invalid_one_is_discarded_and_a_new_one_made(self, value: bytes, reason: str) -> None:
        """Nothing of an invalid id survives: no cut, no cleaned form; the discard is counted."""
        identity = read((b"x-request-id", value))
        assert identity.generated
        assert set(identity.client_request_id or "") <= HEX and len(identity.client_request_id or "") == 32
        assert identity.discarded == {f"client_request_id.{reason}": 1}

    def test_an_empty_one_is_none_and_not_counted(self) -> None:
        """An empty header says nothing, which is no mistake."""
        identity = read((b"x-request-id", b"  "))
        assert identity.generated
        assert not identity.discarded

    def test_none_is_made_where_that_is_turned_off(self) -> None:
        """`generate_request_id=False`: without a valid id there is none."""
        reader = IdentityReader(generate=False)
        assert read(reader=reader).client_request_id is None
        assert read((b"x-request-id", b"\n"), reader=reader) == Identity(
            None, None, None, False, discarded={"client_request_id.characters": 1}
        )


class TestSessionAndUser:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("jürgen 用户 🙂".encode(), "jürgen 用户 🙂"),
            ("jürgen".encode("latin-1"), "jürgen"),
            (b"  jane@example.org\t", "jane@example.org"),
            ("a\u00a0b".encode(), "a\u00a0b"),
            (("🙂" * 250).encode(), "🙂" * 250),
        ],
    )
    def test_utf8_else_latin1(self, value: bytes, expected: str) -> None:
        """Values are UTF-8; bytes that are not are latin-1, as HTTP once had it."""
        identity = read((b"x-session-id", value), (b"x-user-id", value))
        assert (identity.session_id, identity.user_id) == (expected, expected)

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            (b"x" * 251, "too_long"),
            (b"x" * 100_000, "too_long"),
            ("🙂".encode() * 251, "too_long"),
            (b"a\x00b", "characters"),
            (b"a\nb", "characters"),
            (b"a\x1bb", "characters"),
            (b"\x7f", "characters"),
            ("\x85".encode(), "characters"),
            (b"a\x85b", "characters"),
            (b"\xed\xa0\x80", "characters"),
        ],
    )
    def test_an_invalid_one_is_discarded_and_counted(self, value: bytes, reason: str) -> None:
        """Too long, control characters, encoded surrogates: no id at all, since a cut one is someone else's."""
        identity = read((b"x-session-id", value), (b"x-user-id", value))
        assert identity.session_id is None and identity.user_id is None
        assert identity.discarded == {f"session_id.{reason}": 1, f"user_id.{reason}": 1}

    def test_an_empty_one_is_none(self) -> None:
        """Empty is none, and not counted."""
        identity = read((b"x-session-id", b""), (b"x-user-id", b" "))
        assert (identity.session_id, identity.user_id, dict(identity.discarded)) == (None, None, {})


class TestPrecedence:
    def test_first_valid_duplicate_wins(self) -> None:
        """Of several headers of one name the first valid one counts; invalid ones before it are counted."""
        identity = read((b"x-user-id", b"\x00"), (b"x-user-id", b""), (b"x-user-id", b"a"), (b"x-user-id", b"b"))
        assert identity.user_id == "a"
        assert identity.discarded == {"user_id.characters": 1}

    def test_names_win_in_their_order(self) -> None:
        """With a list of names the first name that has a valid value wins, wherever it stands in the request."""
        reader = IdentityReader(request_id=("X-Request-ID", "X-Correlation-ID"))
        both = ((b"x-correlation-id", b"second"), (b"x-request-id", b"first"))
        assert read(*both, reader=reader).client_request_id == "first"
        assert read((b"x-correlation-id", b"c"), (b"x-request-id", b"\n"), reader=reader)[0] == "c"
        assert of_environ({"HTTP_X_CORRELATION_ID": "c", "HTTP_X_REQUEST_ID": "r"}, reader)[0] == "r"

    def test_one_header_may_serve_two_fields(self) -> None:
        """The same header may be the last resort of two fields."""
        reader = IdentityReader(request_id=("x-request-id", "x-session-id"))
        assert read((b"x-session-id", b"s"), reader=reader)[:2] == ("s", "s")

    def test_a_field_may_be_turned_off(self) -> None:
        """None as the name: the header is not looked at."""
        reader = IdentityReader(session_id=None, user_id=None)
        assert read((b"x-user-id", b"u"), (b"x-session-id", b"s"), reader=reader)[1:3] == (None, None)

    @pytest.mark.parametrize("name", [b"X-Request-ID", b"X-Request-Id", b"X-REQUEST-ID"])
    def test_usual_spellings_are_known(self, name: bytes) -> None:
        """A server that does not lower header names, as ASGI asks, is no reason to lose the id."""
        assert read((name, b"r")).client_request_id == "r"

    @pytest.mark.parametrize("name", ["", "X Request", "x:y", "ü", "a\n", 5])
    def test_what_is_no_header_name_is_refused(self, name: Any) -> None:
        """A wrong name fails when the reader is made, not in requests."""
        with pytest.raises(SettingError, match="name of a header"):
            IdentityReader(user_id=(name,))

    def test_trace_context_is_read_in_the_same_pass(self) -> None:
        """`traceparent`, `tracestate` and `baggage` come back raw; repeated ones are joined, as HTTP has it."""
        identity = read(
            (b"traceparent", b"00-x"), (b"tracestate", b"a=1"), (b"baggage", b"k=v"), (b"tracestate", b"b=2\xff")
        )
        assert identity[4:7] == ("00-x", "a=1,b=2\xff", "k=v")


class TestAnyInput:
    @given(
        st.lists(
            st.tuples(
                st.sampled_from(
                    [b"x-request-id", b"x-session-id", b"x-user-id", b"traceparent", b"baggage", b"accept"]
                ),
                st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode("utf-8", "replace")),
            ),
            max_size=12,
        )
    )
    def test_any_bytes_give_an_identity_within_the_limits(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Whatever bytes come: no exception, every id safe for a line, a header and a store, or discarded."""
        identity = of_asgi(headers)
        request_id = identity.client_request_id or ""
        assert 1 <= len(request_id) <= 128 and request_id.isascii() and request_id.isprintable()
        for value in (identity.session_id, identity.user_id):
            assert value is None or (1 <= len(value) <= 250 and is_safe(value) and value.encode())
        assert sum(identity.discarded.values()) <= len(headers)
        assert {reason.partition(".")[2] for reason in identity.discarded} <= {"too_long", "characters"}

    @given(
        st.recursive(
            st.none() | st.integers() | st.binary() | st.text() | st.just(b"x-user-id"),
            lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner),
        )
    )
    @example([(b"x-user-id", None), (b"x-user-id", b"u", b"more"), b"xy", (["unhashable"], b"v")])
    @example([(bytearray(b"X-User-ID"), b"u")])
    @example([(b"x-user-id", memoryview(b"u"))])
    def test_headers_that_are_no_headers_do_not_raise(self, headers: Any) -> None:
        """A server or middleware that breaks the protocol does not make the request fail."""
        assert isinstance(of_asgi(headers), Identity)
        assert isinstance(of_environ(headers), Identity)

    def test_what_can_be_read_of_malformed_headers_is(self) -> None:
        """One malformed header does not cost the others."""
        headers: Any = [(["no name"], b"v"), (bytearray(b"X-User-ID"), b"u"), None, (b"x-session-id", 7)]
        headers.append((b"x-request-id", "text and no bytes"))
        identity = of_asgi(headers)
        assert identity.user_id == "u"
        assert identity.client_request_id == "text and no bytes"
        assert identity.discarded == {"session_id.malformed": 1}

    @given(st.dictionaries(st.sampled_from(["HTTP_X_REQUEST_ID", "HTTP_X_USER_ID", "HTTP_BAGGAGE"]), st.text()))
    @example({"HTTP_X_USER_ID": "\ud800"})
    @example({"HTTP_X_USER_ID": "\udcff"})
    def test_any_environ_gives_an_identity_within_the_limits(self, environ: dict[str, str]) -> None:
        """The same rules on WSGI, whatever text a server puts there."""
        identity = of_environ(environ)
        assert identity.client_request_id and identity.client_request_id.isprintable()
        assert identity.user_id is None or (len(identity.user_id) <= 250 and is_safe(identity.user_id))

    @given(st.binary(min_size=1, max_size=300).filter(lambda raw: b"," not in raw))
    def test_wsgi_and_asgi_agree(self, raw: bytes) -> None:
        """The bytes of a header mean the same over both protocols."""
        headers = [(b"x-session-id", raw), (b"x-user-id", raw), (b"x-request-id", raw), (b"baggage", raw)]
        environ = {"HTTP_" + n.decode().upper().replace("-", "_"): v.decode("latin-1") for n, v in headers}
        reader = IdentityReader(generate=False)
        assert of_environ(environ, reader) == of_asgi(headers, reader)

    def test_environ_of_a_server_that_decodes_by_itself(self) -> None:
        """Text beyond latin-1 in an environ is taken as the text that it is."""
        assert of_environ({"HTTP_X_USER_ID": "用户"}).user_id == "用户"


class TestGenerated:
    def test_ids_differ_whatever_the_application_seeds(self) -> None:
        """An application that seeds `random` (to make results repeatable) does not make ids repeat."""
        random.seed(0)
        first = new_request_id()
        random.seed(0)
        assert new_request_id() != first

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_ids_differ_between_forked_processes(self) -> None:
        """Workers forked from one parent do not hand out each other's ids."""
        # In a process of its own, since the one of the tests has threads.
        program = (
            "import os; from tracemw.identity import new_request_id; new_request_id()\n"
            "for _ in range(2):\n"
            "    if os.fork() == 0:\n"
            "        os.write(1, (new_request_id() + '\\n').encode()); os._exit(0)\n"
            "    os.wait()\n"
            "os.write(1, new_request_id().encode())"
        )
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        ids = run.stdout.split()
        assert len(ids) == len(set(ids)) == 3


class TestIdsSetByCode:
    @pytest.mark.parametrize(
        ("field", "value", "expected"),
        [
            ("user_id", "jane", "jane"),
            ("user_id", 42, "42"),
            ("user_id", b"j\xc3\xbcrgen", "jürgen"),
            ("session_id", " s ", "s"),
            ("session_id", "", None),
            ("session_id", None, None),
            ("client_request_id", "x" * 128, "x" * 128),
        ],
    )
    def test_valid(self, field: str, value: object, expected: str | None) -> None:
        """Ids set by code follow the same rules; numbers and the like count as their text."""
        assert check_id(field, value) == clean_id(field, value) == expected

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("user_id", "x" * 251, "user_id is longer than 250 characters"),
            ("session_id", "a\nb", "session_id has control characters or surrogates"),
            ("session_id", "\ud800", "session_id has control characters or surrogates"),
            ("session_id", b"\xff", "session_id of type bytes has no text form"),
            ("client_request_id", "é", "client_request_id has other characters than printable ASCII"),
            ("client_request_id", "x" * 129, "client_request_id is longer than 128 characters"),
        ],
    )
    def test_invalid(self, field: str, value: object, message: str) -> None:
        """`check_id` says what is wrong; `clean_id` returns None instead."""
        with pytest.raises(ValueError, match=message):
            check_id(field, value)
        assert clean_id(field, value) is None

    def test_an_object_without_text_form(self) -> None:
        """A `__str__` that raises is told, not passed on."""

        class Odd:
            def __str__(self) -> str:
                raise RuntimeError

        with pytest.raises(ValueError, match="type Odd has no text form"):
            check_id("user_id", Odd())

    @given(st.text(max_size=300))
    def test_any_text_is_safe_or_none(self, text: str) -> None:
        """What `clean_id` lets through is safe in a line, a header and a store."""
        user, request_id = clean_id("user_id", text), clean_id("client_request_id", text)
        assert user is None or (user and len(user) <= 250 and is_safe(user))
        assert request_id is None or (request_id.isascii() and request_id.isprintable() and len(request_id) <= 128)
