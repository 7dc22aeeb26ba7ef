"""Any value becomes bounded, redacted JSON text, and nothing of the application is run for it."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import ipaddress
import itertools
import json
import pathlib
import string
import sys
import threading
import time
import types
import uuid
import zoneinfo
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn
from urllib.parse import quote

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracemw import capture
from tracemw.capture import (
    DEFAULT_REDACT,
    Limits,
    Redactor,
    attribute_value,
    dumps,
    plain,
    redact_json_text,
    redact_text,
)

# --- what the values of the tests are made of ---------------------------------------------------------------

touched: list[str] = []


def _hostile(name: str) -> Any:
    def method(self: object, *args: object, **kwargs: object) -> NoReturn:
        touched.append(name)
        raise SystemExit(f"{name} was called")

    return method


METHODS = (
    "__repr__ __str__ __format__ __iter__ __len__ __bool__ __contains__ __getitem__ __getattribute__ __getattr__"
    " __eq__ __hash__ __int__ __float__ __index__ __bytes__ __reduce__ __reduce_ex__ __sizeof__ __dir__ __next__"
    " __fspath__ __enter__ keys values items get isoformat bit_length encode isascii model_dump dict json __json__"
).split()


class HostileMeta(type):
    """A metaclass whose every method is a trap."""

    __instancecheck__ = _hostile("__instancecheck__")
    __subclasscheck__ = _hostile("__subclasscheck__")
    __call__ = type.__call__


for _name in ("__repr__", "__str__", "__eq__", "__hash__", "__getattribute__", "__iter__", "__len__"):
    setattr(HostileMeta, _name, _hostile(f"type.{_name}"))


def trap(base: type, *args: Any, meta: bool = False) -> Any:
    """An instance of a subclass whose methods and properties all raise."""
    members: dict[str, Any] = {name: _hostile(name) for name in METHODS}
    members |= {
        name: property(_hostile(name)) for name in ("__class__", "shape", "dtype", "scope", "args", "name")
    }
    if base is object:
        members["__dict__"] = property(_hostile("__dict__"))
    make: Any = HostileMeta if meta else type
    return base.__new__(make("Trap", (base,), members), *args)


def hostile_values() -> list[Any]:
    filled_dict, filled_list = trap(dict), trap(list)
    dict.update(filled_dict, {"a": 1, "password": "canary"})
    list.extend(filled_list, [1, "x"])
    error = trap(ValueError, "message")
    plain_bases = [trap(object), trap(object, meta=True), trap(dict), trap(list)]
    texts = [trap(str, "text"), trap(bytes, b"text"), trap(int, 7), trap(float, 7.5), trap(tuple, (1, 2))]
    times = [trap(dt.datetime, 2020, 1, 1), trap(dt.date, 2020, 1, 1), trap(dt.timedelta, 1)]
    more = [trap(decimal.Decimal, "1.5"), trap(frozenset, {1}), trap(type("Empty", (), {}))]
    return [filled_dict, filled_list, error, *plain_bases, *texts, *times, *more]


HOSTILE = hostile_values()


class StandIn(NamedTuple):
    """Stands for a hostile value where pytest or hypothesis would touch it."""

    number: int


def filled(value: Any) -> Any:
    """The value with hostile ones in the place of their stand-ins."""
    if type(value) is StandIn:
        return HOSTILE[value.number]
    if type(value) is dict:
        return {key: filled(item) for key, item in value.items()}
    return type(value)(map(filled, value)) if type(value) in (list, tuple, collections.deque) else value


STAND_INS = st.builds(StandIn, st.integers(0, len(HOSTILE) - 1))
HARMLESS_KEYS = st.sampled_from(["question", "max_tokens", "primary_key", "a b", "é", "n", "token_count", ""])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=300)
OTHERS = st.sampled_from(
    [object(), len, json, Exception, ValueError("x"), threading.Lock(), iter([1]), 1j, range(3), ..., float("nan")]
)


def values(leaves: st.SearchStrategy[Any], keys: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=6)
            | st.dictionaries(keys, inner, max_size=6)
            | st.lists(inner, max_size=4).map(tuple)
            | st.lists(inner, max_size=4).map(collections.deque)
        ),
        max_leaves=40,
    )


# --- JSON text ----------------------------------------------------------------------------------------------


class TestJson:
    @given(values(st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(), HARMLESS_KEYS))
    def test_plain_values_are_written_as_json_writes_them(self, value: Any) -> None:
        """What JSON can say is said in the same words as by the standard library, and read back unchanged."""
        if isinstance(value, (collections.deque, tuple)) or "deque" in repr(value):
            value = json.loads(dumps(value))
        assert json.loads(dumps(value)) == json.loads(json.dumps(value, default=list))

    def test_the_format_is_that_of_mlflow(self) -> None:
        """Separators have a space; letters of other scripts stay readable, so that a search finds them."""
        assert dumps({"question": "schön?", "k": [1, 2.5, None, True]}) == (
            '{"question": "schön?", "k": [1, 2.5, null, true]}'
        )

    @given(
        values(SCALARS | OTHERS | STAND_INS, st.text() | SCALARS | st.tuples(st.integers(), SCALARS)),
        st.builds(
            Limits,
            depth=st.integers(0, 6),
            items=st.integers(0, 10),
            nodes=st.integers(0, 30),
            string=st.integers(0, 200),
            chars=st.integers(128, 3000),
        ),
    )
    def test_any_value_is_valid_json_within_every_limit(self, value: Any, limits: Limits) -> None:
        """Whatever comes, the text is JSON, no longer than allowed, and no code of the value has run."""
        value = filled(value)
        touched.clear()
        text = dumps(value, limits)
        assert not touched
        assert len(text) <= limits.chars
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        text.encode("utf-8")
        assert "not recorded" not in text

    @pytest.mark.parametrize("index", range(len(HOSTILE)))
    def test_no_method_of_a_hostile_class_is_called(self, index: int) -> None:
        """Neither as a value nor as what a container holds."""
        value = HOSTILE[index]
        touched.clear()
        texts = dumps(value), dumps([value, {"a": value}]), str(attribute_value("a", value))
        assert not touched
        assert not any("canary" in text for text in texts)

    def test_subclasses_are_read_through_the_built_in_type(self) -> None:
        """Their contents are recorded, not what their methods pretend."""
        value = trap(dict)
        dict.update(value, {"a": trap(int, 7), "b": trap(str, "text")})
        assert (
            dumps([value, trap(float, 7.5), trap(tuple, (1, 2, 3))]) == '[{"a": 7, "b": "text"}, 7.5, [1, 2, 3]]'
        )

    def test_hostile_keys_are_no_harm(self) -> None:
        """A key of an unknown class is written by the name of its class."""

        class Key:
            __repr__ = __str__ = __eq__ = _hostile("key")

            def __hash__(self) -> int:
                return 1

        touched.clear()
        assert json.loads(dumps({Key(): 1})) == {f"<{__name__}.{Key.__qualname__}>": 1}
        assert not touched

    def test_keys_that_are_no_strings(self) -> None:
        """Keys become strings: as JSON has them, else by their value."""
        value = {7: 1, None: 2, True: 3, 2.5: 4, (1, "a"): 5, b"x": 6, uuid.UUID(int=1): 7, 10**30: 8}
        assert list(plain(value)) == [
            "7", "null", "true", "2.5", '[1, "a"]', "b'x'", "00000000-0000-0000-0000-000000000001", str(10**30),
        ]  # fmt: skip

    def test_dumps_never_raises_near_the_recursion_limit(self) -> None:
        """Where the application has used up the stack, the text says so."""

        def dive() -> str:
            try:
                return dive()
            except RecursionError:
                return dumps({"a": [[[[1]]]]})

        json.loads(dive())

    def test_a_dictionary_that_another_thread_changes(self) -> None:
        """The text is valid all the same."""
        shared: dict[str, int] = {}
        stop = threading.Event()

        def change() -> None:
            for number in itertools.count():
                shared[f"k{number % 500}"] = number
                shared.pop(f"k{number * 7 % 500}", None)
                if stop.is_set():
                    return

        thread = threading.Thread(target=change)
        thread.start()
        try:
            for _ in range(300):
                json.loads(dumps({"shared": shared, "list": [shared]}))
        finally:
            stop.set()
            thread.join()


# --- types --------------------------------------------------------------------------------------------------


class Color(enum.Enum):
    RED = "red"


class Number(enum.IntEnum):
    ONE = 1


class Word(str, enum.Enum):
    YES = "yes"


class OwnZone(dt.tzinfo):
    utcoffset = dst = tzname = _hostile("zone")


def generate() -> Iterator[int]:
    yield 1


class TestTypes:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (float("nan"), "NaN"),
            (float("inf"), "Infinity"),
            (-float("inf"), "-Infinity"),
            ("a\ud800b", "a\\ud800b"),
            (2**100, 2**100),
            (1 + 2j, "(1+2j)"),
            (b"abc", "b'abc'"),
            (bytearray(b"\xff"), "b'\\xff'"),
            (memoryview(b"abc"), "<memoryview of 3 bytes>"),
            (Color.RED, "Color.RED"),
            (Number.ONE, 1),
            (Word.YES, "yes"),
            (decimal.Decimal("1.50"), "1.50"),
            (uuid.UUID(int=5), "00000000-0000-0000-0000-000000000005"),
            (dt.datetime(2020, 1, 2, 3, 4, 5), "2020-01-02T03:04:05"),
            (dt.datetime(2020, 1, 2, tzinfo=dt.timezone.utc), "2020-01-02T00:00:00+00:00"),
            (dt.datetime(2020, 1, 2, tzinfo=zoneinfo.ZoneInfo("UTC")), "2020-01-02T00:00:00+00:00"),
            (dt.datetime(2020, 1, 2, tzinfo=OwnZone()), f"2020-01-02T00:00:00 <{__name__}.OwnZone>"),
            (dt.date(2020, 1, 2), "2020-01-02"),
            (dt.time(1, 2), "01:02:00"),
            (dt.timedelta(days=1, seconds=2), "1 day, 0:00:02"),
            (pathlib.PurePosixPath("/a/b"), "/a/b"),
            (ipaddress.ip_address("::1"), "::1"),
            ({1}, [1]),
            (frozenset("a"), ["a"]),
            ((1, 2, 3), [1, 2, 3]),
            (collections.deque([1, 2]), [1, 2]),
            (collections.OrderedDict(a=1), {"a": 1}),
            (collections.defaultdict(list, a=[1]), {"a": [1]}),
            (collections.Counter("aab"), {"a": 2, "b": 1}),
            ({"a": 1}.keys(), ["a"]),
            ({"a": 1}.values(), [1]),
            (range(1, 9, 2), "range(1, 9, 2)"),
            (ValueError("boom"), "ValueError: boom"),
            (OSError(2, "no file"), "FileNotFoundError: 2, no file"),
            (KeyError(), "KeyError"),
            (json.JSONDecodeError("bad", "doc", 0), "json.decoder.JSONDecodeError: bad: line 1 column 1 (char 0)"),
            (generate, f"<function {__name__}.generate>"),
            (len, "<function builtins.len>"),
            (json.JSONDecoder().decode, "<function json.decoder.JSONDecoder.decode>"),
            (Color, f"<class {__name__}.Color>"),
            (object(), "<object>"),
            (json, "<module>"),
            (threading.Lock(), "<_thread.lock>"),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_well_known_types(self, value: object, expected: object) -> None:
        """Each type of the standard library that says something is recorded with what it says."""
        assert plain(value) == expected

    def test_iterators_are_not_consumed(self) -> None:
        """A generator, a coroutine, a file or a map is named, and still has all it had."""

        async def coroutine() -> None: ...

        one, awaitable, mapped = generate(), coroutine(), map(str, [1])
        with open(__file__, encoding="utf-8") as file:
            named = plain([one, awaitable, mapped, file])
            assert file.readline().startswith('"""')
        awaitable.close()
        assert named[0] == "<generator generate>"
        assert named[1].startswith("<coroutine ")
        assert named[2:] == ["<map>", "<_io.TextIOWrapper>"]
        assert list(one) == [1] and list(mapped) == ["1"]

    def test_unknown_objects_are_named_and_not_opened(self) -> None:
        """Their attributes may be anything; only the class is recorded."""

        class Session:
            def __init__(self) -> None:
                self.dsn = "canary"

        assert dumps(Session()) == json.dumps(f"<{__name__}.{Session.__qualname__}>")

    def test_a_class_made_to_look_like_another(self) -> None:
        """Only what its module really exports is believed to be what it says."""

        class Decimal:
            shape = property(_hostile("shape"))

        touched.clear()
        for module, name in [("decimal", "Decimal"), ("numpy", "ndarray"), ("pydantic.main", "BaseModel")]:
            fake = type(
                name, (Decimal,), {"__module__": module, "__dataclass_fields__": 5, "__fields__": {"a": 1}}
            )
            assert dumps(fake()) == f'"<{module}.{name}>"'
        assert not touched


@dataclasses.dataclass
class Login:
    user: str
    password: str
    tries: int
    note: str = dataclasses.field(default="canary", repr=False)
    kind: dataclasses.InitVar[str] = "x"


@dataclasses.dataclass(frozen=True)
class Slotted:
    __slots__ = ("apiKey", "user")
    user: str
    apiKey: str


class Pair(NamedTuple):
    user: str
    secret: str


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    a: int
    inner: Login
    key: pydantic.SecretStr
    hidden: str = pydantic.Field("canary", exclude=True)
    url: pydantic.AnyUrl = pydantic.AnyUrl("postgres://u:canary@host/db")

    @pydantic.field_serializer("a")
    def _serialize(self, value: int) -> int:
        raise SystemExit(f"the serializer of {value} ran")


class TestFields:
    def test_dataclasses(self) -> None:
        """Fields by name; secrets and what is kept out of the repr are masked."""
        assert plain(Login("ann", "canary", 2)) == {
            "user": "ann", "password": "[REDACTED]", "tries": 2, "note": "[REDACTED]",
        }  # fmt: skip

    def test_slots_and_fields_that_are_not_set(self) -> None:
        """Slots are read; a field without a value is left out."""
        assert plain(Slotted("ann", "canary")) == {"user": "ann", "apiKey": "[REDACTED]"}
        unset = object.__new__(Slotted)
        assert plain(unset) == {}

    def test_named_tuples(self) -> None:
        """They have names, so these are recorded."""
        assert plain(Pair("ann", "canary")) == {"user": "ann", "secret": "[REDACTED]"}

    def test_pydantic_models(self) -> None:
        """Fields and extra fields, without a serializer; `SecretStr` and excluded fields stay masked."""
        model = Model(a=1, inner=Login("ann", "canary", 2), key=pydantic.SecretStr("canary"), more=[1])  # type: ignore[call-arg]
        recorded = plain(model)
        assert recorded["a"] == 1 and recorded["more"] == [1]
        assert recorded["inner"]["user"] == "ann"
        assert "canary" not in dumps(model)
        assert recorded["url"] == "postgres://u:[REDACTED]@host/db"

    def test_pydantic_root_models_are_their_root(self) -> None:
        """As in a dump of the model."""
        assert plain(pydantic.RootModel[list[int]]([1, 2])) == [1, 2]

    @pytest.mark.skipif(sys.version_info >= (3, 14), reason="pydantic 1 does not run there")
    def test_pydantic_1(self) -> None:
        """Models of the old version are read just so."""
        from pydantic import v1

        hidden = v1.Field("canary", repr=False)
        old = v1.create_model("Old", a=(int, ...), key=(v1.SecretStr, ...), hidden=(str, hidden))
        assert plain(old(a=1, key="canary")) == {"a": 1, "key": "[REDACTED]", "hidden": "[REDACTED]"}

    def test_attrs(self) -> None:
        """Classes of attrs are read by their fields, slotted or not."""
        attr = pytest.importorskip("attr")
        for slots in (True, False):
            made = attr.make_class("A", {"a": attr.ib(), "token": attr.ib(repr=False)}, slots=slots)
            assert plain(made(1, "canary")) == {"a": 1, "token": "[REDACTED]"}

    def test_msgspec(self) -> None:
        """Structs are read by their fields."""
        msgspec = pytest.importorskip("msgspec")
        made = msgspec.defstruct("S", [("a", int), ("password", str)])
        assert plain(made(1, "canary")) == {"a": 1, "password": "[REDACTED]"}

    @pytest.mark.parametrize("name", ["Secret", "SecretStr", "SecretBytes", "SecretStr[int]", "SecretValue"])
    @pytest.mark.parametrize("base", [str, bytes, object, dict])
    def test_classes_named_secret_stay_masked(self, name: str, base: type) -> None:
        """Also what derives from them, whatever they are made of."""
        secret = type(name, (base,), {})
        derived = type("Password2", (secret,), {})
        assert dumps(secret()) == dumps(derived()) == '"[REDACTED]"'

    def test_strings_whose_class_names_a_secret(self) -> None:
        """`class ApiKey(str)` says as much as a key `api_key` would."""
        assert (
            dumps([type("ApiKey", (str,), {})("canary"), type("Name", (str,), {})("ann")])
            == '["[REDACTED]", "ann"]'
        )


class TestLibraries:
    @pytest.fixture
    def torch(self, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
        """A module that looks like torch: a tensor with a shape and a type, and contents not to be touched."""
        module = types.ModuleType("torch")

        class Tensor:
            shape = property(lambda self: (2, 3))
            dtype = property(lambda self: "torch.float32")
            __repr__ = __iter__ = __len__ = _hostile("tensor")

        Tensor.__module__, Tensor.__qualname__ = "torch", "Tensor"
        module.Tensor = Tensor  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torch", module)
        return module

    def test_tensors(self, torch: types.ModuleType) -> None:
        """Type, shape and type of element, by the library's own attributes; a subclass is only named."""
        assert plain(torch.Tensor())["shape"] == [2, 3]
        assert plain(torch.Tensor())["type"] == "torch.Tensor"
        derived = type("Mine", (torch.Tensor,), {"__module__": "app"})
        assert plain(derived()) == "<app.Mine>"

    def test_numpy(self) -> None:
        """Arrays by shape and type; scalars by value."""
        np = pytest.importorskip("numpy")
        assert plain(np.zeros((3, 4))) == {"type": "numpy.ndarray", "shape": [3, 4], "dtype": "float64"}
        assert plain([np.float64(1.5), np.int8(3), np.bool_(True), np.str_("a")]) == [1.5, 3, True, "a"]

    def test_pandas(self) -> None:
        """Tables by their shape."""
        pd = pytest.importorskip("pandas")
        assert plain(pd.DataFrame({"a": [1, 2]}))["shape"] == [2, 1]
        assert plain([pd.NaT, pd.Timestamp("2020-01-01")]) == ["NaT", "2020-01-01T00:00:00"]

    def test_requests_and_responses(self) -> None:
        """Named by method and path, or by status; headers and bodies stay out."""
        flask = pytest.importorskip("flask")
        requests = pytest.importorskip("starlette.requests")
        responses = pytest.importorskip("starlette.responses")
        scope = {"type": "http", "method": "GET", "path": "/x", "headers": [(b"cookie", b"canary")]}
        assert plain(requests.Request(scope)) == "<starlette.requests.Request GET /x>"
        assert plain(responses.Response("canary", 404)) == "<starlette.responses.Response 404>"
        with flask.Flask(__name__).test_request_context("/a?canary=1", method="POST"):
            assert plain(flask.request._get_current_object()) == "<flask.wrappers.Request POST /a>"
            assert plain(flask.request) == "<werkzeug.local.LocalProxy>"


# --- limits -------------------------------------------------------------------------------------------------


class TestLimits:
    @pytest.mark.parametrize(
        ("value", "size"),
        [
            ("x" * 20_000_000, "20000000 characters"),
            (list(range(1_000_000)), "1000000 items"),
            ({str(number): number for number in range(5_000)}, "5000 items"),
            (b"x" * 1_000_000, "1000000 bytes"),
            (set(range(5_000)), "5000 items"),
            (10**5000, "integer of 16610 bits"),
            (type("Text", (str,), {})("x" * 50_000), "50000 characters"),
        ],
        ids=["str", "list", "dict", "bytes", "set", "int", "subclass"],
    )
    def test_what_is_left_out_is_said_with_its_size(self, value: object, size: str) -> None:
        """Every cut has a marker with `truncated` and the original size."""
        text = dumps(value)
        assert f"truncated: {size}" in text or f'"[truncated]": "{size}"' in text
        assert len(text) < 140_000

    def test_depth(self) -> None:
        """A container that is too deep is named with its size."""
        nested: list[Any] = [1, 2, 3]
        for _ in range(2_000):
            nested = [nested]
        assert dumps(nested, Limits(depth=2)) == '[["[truncated: list of 1 items]"]]'
        assert "truncated" in dumps(nested)

    def test_nodes_are_counted_over_all_containers(self) -> None:
        """Wide and nested values together stay within one bound."""
        value = {str(number): list(range(100)) for number in range(100)}
        text = dumps(value, Limits(nodes=250))
        assert text.count("truncated: 100 items") + text.count("list of 100 items") == 99
        assert json.loads(text)["0"] == list(range(100))

    def test_what_comes_first_does_not_take_the_room_of_the_brackets(self) -> None:
        """A text of the allowed length is closed properly, and says what it left out."""
        text = dumps({"a": "x" * 1_000, "b": 1, "c": ["\0" * 500]}, Limits(chars=300))
        assert len(text) <= 300
        assert json.loads(text)["a"].endswith("... [truncated: 1000 characters]")
        assert json.loads(text)["[truncated]"] == "3 items"

    def test_cycles_are_said(self) -> None:
        """A container within itself is named; one that merely occurs twice is written twice."""
        looped: dict[str, Any] = {"a": 1}
        looped["me"] = [looped]
        assert plain(looped) == {"a": 1, "me": ["[circular: dict of 2 items]"]}
        twice = [1]
        assert plain([twice, twice]) == [[1], [1]]

    def test_limits_that_leave_no_room_are_refused(self) -> None:
        """A marker must fit."""
        with pytest.raises(ValueError, match="at least 128"):
            Limits(chars=100)

    def test_time_does_not_grow_with_the_value(self) -> None:
        """Tens of megabytes and hundreds of thousands of members take a few milliseconds."""
        leaves = {number: dict.fromkeys(range(50)) for number in range(2_500)}
        worst = [leaves, "\0" * 20_000_000, [Login("a", "b", 1) for _ in range(20_000)], [b"x" * 9] * 500_000]
        worst.append({"k1" * 5_000 + str(number): 1 for number in range(2_000)})
        for value in worst:
            began = time.perf_counter()
            dumps(value)
            assert time.perf_counter() - began < 0.5


# --- secrets ------------------------------------------------------------------------------------------------

SECRET_KEYS = """
    password PASSWORD userPassword user_password password2 dbpassword passWord passwd pwd passphrase
    secret client-secret clientSecret AWS_SECRET_ACCESS_KEY token access_token accessToken refreshToken csrftoken
    x-csrf-token api_key api-key apiKey APIKey X-API-Key apikey MY_API_KEY_2 private_key privateKeyPem
    Authorization Proxy-Authorization cookie Set-Cookie setCookie cookies credentials auth jwt ssn cvv card_number
""".split()
HARMLESS = """
    max_tokens maxTokens prompt_tokens completion_tokens tokens token_count tokenCount tokenizer token_type
    primary_key foreign_key cache_key key keyboard author authors password_length secretary session_id user_id
    spinning question token_ids prompt_token_ids token_logprobs
""".split()


def spelled(name: str, style: int) -> str:
    words = name.lstrip("=").split("_")
    joined = {0: "_".join, 1: "-".join, 2: "".join}.get(style)
    if joined:
        return joined(words)
    return words[0] + "".join(word.title() for word in words[1:]) if style == 3 else "_".join(words).upper()


SECRET_NAMES = st.builds(spelled, st.sampled_from(DEFAULT_REDACT), st.integers(0, 4))


class TestRedaction:
    @pytest.mark.parametrize("key", SECRET_KEYS)
    def test_keys_that_name_a_secret(self, key: str) -> None:
        """Whole words of a key, however they are joined."""
        assert plain({key: "canary", "a": [{key: ["canary"]}]}) == {key: "[REDACTED]", "a": [{key: "[REDACTED]"}]}

    @pytest.mark.parametrize("key", HARMLESS)
    def test_keys_that_only_look_like_it(self, key: str) -> None:
        """Words that contain a name, and keys that measure or describe a secret."""
        assert plain({key: "value"}) == {key: "value"}

    @given(SECRET_NAMES, values(st.text(max_size=3), HARMLESS_KEYS), st.integers(0, 5))
    def test_no_value_of_a_secret_key_survives(self, key: str, around: Any, depth: int) -> None:
        """At any depth, in any kind of container, under any spelling of a listed name."""
        value: Any = {key: ["canary", {"a": b"canary"}], "around": around}
        for level in range(depth):
            value = [{"n": value}, [value], (value,), collections.deque([value]), Pair(value, "canary")][level]
        assert "canary" not in dumps(value)
        assert "canary" not in str(attribute_value(key, value))
        assert "canary" not in redact_text(json.dumps(plain(value, redactor=Redactor(()))))

    def test_numbers_flags_and_none(self) -> None:
        """They stay, but for a number under a key that ends with the name of a secret, other than `token`."""
        assert plain({"token": 17, "has_password": True, "password": None, "secret_version": 3}) == {
            "token": 17, "has_password": True, "password": None, "secret_version": 3,
        }  # fmt: skip
        assert plain({"password": 1234, "pin": 99, "user_pin": 99}) == {
            "password": "[REDACTED]", "pin": "[REDACTED]", "user_pin": 99,
        }  # fmt: skip

    def test_pairs_of_a_name_and_a_value(self) -> None:
        """Headers are often kept so, as strings or bytes."""
        headers = [("Authorization", "canary"), [b"cookie", b"canary"], ("host", "x")]
        assert plain({"headers": headers})["headers"] == [
            ["Authorization", "[REDACTED]"], ["b'cookie'", "[REDACTED]"], ["host", "x"],
        ]  # fmt: skip

    def test_own_names(self) -> None:
        """A list of names replaces the published one; `=` asks for the whole key; no names, no mask."""
        own = Redactor(["card", "=id"])
        assert plain({"creditCard": "a", "cards": "b", "id": 5, "user_id": 5, "password": "x"}, redactor=own) == {
            "creditCard": "[REDACTED]", "cards": "b", "id": "[REDACTED]", "user_id": 5, "password": "x",
        }  # fmt: skip
        assert plain({"password": "x"}, redactor=Redactor(())) == {"password": "x"}
        with pytest.raises(ValueError, match="names no key"):
            Redactor(["--"])

    def test_keys_are_remembered_within_bounds(self) -> None:
        """Keys come from clients: the memory of them does not grow for ever, and stays right."""
        redactor = Redactor()
        for number in range(10_000):
            assert (
                plain({f"k{number}": 1, f"password{number}": "x"}, redactor=redactor)[f"password{number}"] != "x"
            )
        assert len(redactor.prefixes) <= 2048 and len(redactor._levels) <= 2048

    @pytest.mark.parametrize("key", ["x" * 5_000 + "_password", "password_" + "x" * 5_000])
    def test_long_keys(self, key: str) -> None:
        """They are judged by their ends, and cut."""
        text = dumps({key: "canary"})
        assert "canary" not in text and f"truncated: {len(key)} characters" in text


class TestText:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ('{"password": "a\\"b", "n": 1}', '{"password": "[REDACTED]", "n": 1}'),
            ('{"a":{"api_key" : {"x":["}"]}},"b":2}', '{"a":{"api_key" : "[REDACTED]"},"b":2}'),
            ('{"token": 17, "secret": true, "pwd": null, "pin": 12}', None),
            ('{"max_tokens": "5", "primary_key": "k"}', "same"),
            ('{"pass\\u0077ord":"x"}', '{"pass\\u0077ord":"[REDACTED]"}'),
            ('{"user":"ann","password":"canar', '{"user":"ann","password":"[REDACTED]"'),
            ('{"cookies":{"a":"canar', '{"cookies":"[REDACTED]"'),
            ('{"url":"https://x?token=canary&n=1"}', '{"url":"https://x?token=[REDACTED]&n=1"}'),
            ('{"dsn":"pg://u:canary@h/d"}', '{"dsn":"pg://u:[REDACTED]@h/d"}'),
            ("a=1&access_token=canary&q=token", "a=1&access_token=[REDACTED]&q=token"),
            ('password=a"b&c=1', "password=[REDACTED]&c=1"),
            ("client%5Fsecret=canary;x=1", "client%5Fsecret=[REDACTED]"),
            ("key=1;password=2", "key=1;password=[REDACTED]"),
            ("token=17", "same"),
            ("user[password]=canary&api_key[0]=canary", "user[password]=[REDACTED]&api_key[0]=[REDACTED]"),
            ("a[b][secret]=canary&passwords[]=x", "a[b][secret]=[REDACTED]&passwords[]=[REDACTED]"),
            ("call(pin=12, x=[sig=canary])", "call(pin=[REDACTED] x=[sig=[REDACTED]"),
            ("https://x/#access_token=canary", "https://x/#access_token=[REDACTED]"),
            ("user = ann\npassword = canary\n", "user = ann\npassword = [REDACTED]\n"),
            ("a[b]=c&max_tokens[0]=5", "same"),
            ("Authorization: Bearer canary\r\nHost: x", "Authorization: [REDACTED]\r\nHost: x"),
            ('data: {"password":"canary"}\n\n', 'data: {"password":"[REDACTED]"}\n\n'),
            ('x; name="password"\r\n\r\ncanary\r\n--b', 'x; name="password"\r\n\r\n[REDACTED]\r\n--b'),
            ("plain words: no secret here", "same"),
            ("", "same"),
        ],
    )
    def test_text_of_any_form(self, text: str, expected: str | None) -> None:
        """JSON, also if it was cut off, forms, query strings, headers and URLs; all else is left alone."""
        if expected is None:
            expected = '{"token": 17, "secret": true, "pwd": null, "pin": "[REDACTED]"}'
        assert redact_text(text) == (text if expected == "same" else expected)

    @given(
        st.sampled_from(["password", "token", "api_key", "secret"]),
        st.sampled_from([c for c in string.punctuation if c not in "&="]),
        st.sampled_from([c for c in string.punctuation if c not in "&="]),
        st.booleans(),
        st.booleans(),
    )
    def test_any_separator_in_the_key_of_a_query_string(
        self, name: str, before: str, after: str, encoded: bool, first: bool
    ) -> None:
        """A key is split into words at every character that is no letter or digit, percent-encoded or not."""
        key = f"user{before}{name}{after}"
        key = quote(key, safe="") if encoded else key
        query = f"{key}=canary&a=b" if first else f"a=b&{key}=canary"
        assert "canary" not in redact_text(query)

    @given(values(st.text(max_size=5), HARMLESS_KEYS), SECRET_NAMES, st.integers(0, 400))
    def test_a_body_cut_anywhere_shows_no_secret(self, around: Any, key: str, cut: int) -> None:
        """The cap of a captured body may fall in the middle of a secret."""
        body = json.dumps({"around": plain(around), key: {"x": "canary-canary"}, "then": "more"})
        cut_body = body[: max(0, len(body) - cut)].encode()
        assert "cana" not in redact_json_text(cut_body)

    def test_bytes_that_are_no_text(self) -> None:
        """They are shown by their values."""
        assert redact_json_text(b"\xff=1&password=canary") == "\\xff=1&password=[REDACTED]"

    @given(st.text(alphabet='"\\{}[]:=&;,-\r\n ?@/apswordtkenm', max_size=300))
    def test_masking_twice_changes_nothing(self, text: str) -> None:
        """No text is too odd, and what is masked stays so."""
        once = redact_text(text)
        assert redact_text(once).count("[REDACTED]") >= once.count("[REDACTED]")

    def test_hostile_text_takes_no_time(self) -> None:
        """No text of a body's size makes the search slow."""
        units = [
            '"',
            'name="x"',
            "a=",
            '{"password":',
            " ",
            "\\",
            "a: b\n",
            '"password":"',
            'name="a"\n\n',
            "://:",
            "[",
            "[a][",
            "'#",
            "password =",
            "a;;;;=",
            "={[",
        ]
        for unit in units:
            began = time.perf_counter()
            redact_text(unit * (32_000 // len(unit)))
            assert time.perf_counter() - began < 0.5, unit


class TestAttributes:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("text", "text"), (5, 5), (2.5, 2.5), (True, True), ([1, 2], [1, 2]), (("a", "b"), ["a", "b"]),
            ([1, "a"], '[1, "a"]'), ([], "[]"), ({"a": 1}, '{"a": 1}'), (None, "null"), (2**70, str(2**70)),
            (float("nan"), "NaN"), ([float("inf")], '["Infinity"]'), (Color.RED, "Color.RED"),
            ([True, 1], "[true, 1]"), (dt.date(2020, 1, 2), "2020-01-02"), ("a\ud800", "a\\ud800"),
            ([["a"]], '[["a"]]'),
        ],
    )  # fmt: skip
    def test_what_opentelemetry_takes_stays(self, value: object, expected: object) -> None:
        """Strings, numbers, booleans and flat lists of one of them; the rest becomes text."""
        got = attribute_value("a", value)
        assert got == expected and type(got) is type(expected)

    @pytest.mark.parametrize("value", ["canary", ["canary"], {"a": "canary"}])
    def test_secret_keys(self, value: object) -> None:
        """The key of the attribute counts, as any other."""
        assert attribute_value("db.password", value) == "[REDACTED]"
        assert attribute_value("gen_ai.usage.output_tokens", 5) == 5

    def test_long_text_is_cut(self) -> None:
        """With the usual marker, in lists too."""
        assert str(attribute_value("a", "x" * 50_000)).endswith("[truncated: 50000 characters]")
        assert "truncated: 50000 characters" in str(attribute_value("a", ["x" * 50_000]))
        assert "truncated: 5000 items" in str(attribute_value("a", [1] * 5_000))


def test_published_names_exist() -> None:
    """`__all__` tells the truth."""
    assert all(hasattr(capture, name) for name in capture.__all__)
    assert isinstance(DEFAULT_REDACT, tuple)


def test_reading_is_a_snapshot() -> None:
    """A later change of the value does not change what was recorded."""
    value: dict[str, list[int]] = {"a": [1]}
    change: Callable[[], None] = lambda: value["a"].append(2)  # noqa: E731
    recorded = dumps(value)
    change()
    assert recorded == '{"a": [1]}'
