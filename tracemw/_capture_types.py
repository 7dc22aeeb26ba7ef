"""How `tracemw.capture` reads values that are no plain dictionaries, lists, strings and numbers.

A class is looked at once and gets a handler. Handlers are kept by the `id` of the class.
"""

from __future__ import annotations

import datetime as dt
import enum
import re
import types
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from tracemw._capture_fields import fields_handler
from tracemw._classes import (
    Class,
    GetSet,
    Slot,
    bases_of,
    exported,
    find,
    is_derived,
    library_of,
    origin,
    own_attributes,
    short_name,
    type_name,
)
from tracemw._redact import MASK

if TYPE_CHECKING:
    from tracemw.capture import Walk

Handler: TypeAlias = "Callable[[Walk, Any, int], str]"

_MOST_CLASSES: Final = 1024
_MOST_BYTES: Final = 128
_handlers: dict[int, tuple[Callable[[], Class | None], Handler]] = {}


def handler_of(cls: Class) -> Handler:
    """What writes instances of a class."""
    known = _handlers.get(id(cls))
    if known is not None and known[0]() is cls:
        return known[1]
    try:
        handler = _choose(cls)
    except Exception:  # a class made to look like one of the known ones
        handler = _opaque
    if len(_handlers) >= _MOST_CLASSES:  # classes may be made without end
        _handlers.clear()
    _handlers[id(cls)] = (weakref.ref(cls), handler)
    return handler


def _choose(cls: Class) -> Handler:
    """The handler for a class: by what it declares, whose it is, or a base that is known; else its name."""
    bases = bases_of(cls)
    if any(_SECRET.match(short_name(base)) for base in bases):
        return _masked
    fields = fields_handler(cls)
    if fields is not None:
        return fields
    if origin(cls)[0] in _PRINTABLE:
        return _printed
    for base in bases:
        known = _BUILTIN.get(id(base)) or _KNOWN.get(origin(base))
        if known is not None:
            return known
    return (library_of(cls) in _ARRAYS and _array(cls)) or _opaque


_SECRET: Final = re.compile(r"Secret(Str|String|Bytes|Text|Value|Date)?(\[|\Z)")


def _masked(walk: Walk, value: Any, depth: int) -> str:
    return walk.text(MASK)


def _opaque(walk: Walk, value: Any, depth: int) -> str:
    return walk.text(f"<{type_name(type(value))}>")


# --- subclasses of built-in types: read through the built-in type's own methods ---------------------------


def _dict(walk: Walk, value: Any, depth: int) -> str:
    return walk.mapping(value, dict.items(value), dict.__len__(value), depth)


def _items(kind: Any) -> Handler:
    """For what C iterates: lists, tuples, sets, queues, views of dictionaries."""
    iterate, length = kind.__iter__, kind.__len__
    return lambda walk, value, depth: walk.sequence(value, iterate(value), length(value), depth)


def _str(walk: Walk, value: Any, depth: int) -> str:
    if walk.redactor.masks(short_name(type(value))):  # class ApiKey(str)
        return walk.text(MASK)
    start = str.__getitem__(value, slice(0, walk.limits.string + 1))
    return walk.text(start, str.__len__(value))


def _bytes(kind: Any) -> Handler:
    """For bytes and bytearray: the beginning as Python writes it."""
    cut, length = kind.__getitem__, kind.__len__

    def handler(walk: Walk, value: Any, depth: int) -> str:
        if walk.redactor.masks(short_name(type(value))):
            return walk.text(MASK)
        size = length(value)
        start = repr(bytes(cut(value, slice(0, _MOST_BYTES))))
        return walk.text(start if size <= _MOST_BYTES else f"{start}... [truncated: {size} bytes]")

    return handler


def _enum(walk: Walk, value: Any, depth: int) -> str:
    name = own_attributes(value).get("_name_")
    return walk.text(f"{short_name(type(value))}.{name if type(name) is str else '?'}")


def _datetime(walk: Walk, value: Any, depth: int) -> str:
    zone = type(_zone_of_datetime(value))
    is_plain = type(value) is dt.datetime or library_of(type(value)) == "pandas"
    if _is_fixed(zone) or (is_plain and origin(zone) == ("zoneinfo", "ZoneInfo")):
        return walk.text(dt.datetime.isoformat(value))
    year, month, day, *rest = (part(value) for part in _DATETIME_PARTS)
    naive = dt.datetime(year, month, day, *rest)  # type: ignore[arg-type]
    return walk.text(f"{naive.isoformat()} <{type_name(zone)}>")  # the offset would be code of that class


def _time(walk: Walk, value: Any, depth: int) -> str:
    if _is_fixed(type(_zone_of_time(value))):
        return walk.text(dt.time.isoformat(value))
    return _opaque(walk, value, depth)


def _is_fixed(zone: Class) -> bool:
    return zone is types.NoneType or zone is dt.timezone


_zone_of_datetime: Callable[[Any], object] = vars(dt.datetime)["tzinfo"].__get__
_zone_of_time: Callable[[Any], object] = vars(dt.time)["tzinfo"].__get__
_DATETIME_PARTS: Final[tuple[Callable[[Any], int], ...]] = tuple(
    vars(dt.date if name in ("year", "month", "day") else dt.datetime)[name].__get__
    for name in ("year", "month", "day", "hour", "minute", "second", "microsecond")
)


def _exception(walk: Walk, value: Any, depth: int) -> str:
    """`ValueError: message`, from the arguments: `__str__` may be anyone's."""
    args = [item for item in _args(value)[:8] if type(item) is str or _is_small(item)]
    message = ", ".join(item[: walk.limits.string] if type(item) is str else repr(item) for item in args)
    name = type_name(type(value))
    return walk.text(f"{name}: {message}" if message else name)


def _is_small(number: object) -> bool:
    return type(number) is float or (type(number) is int and number.bit_length() <= 64)


_args: Callable[[Any], tuple[Any, ...]] = vars(BaseException)["args"].__get__


def _named(word: str, kind: Any) -> Handler:
    """For functions, generators and their like: `<function module.name>`."""
    getters = [vars(kind)[name].__get__ for name in ("__module__", "__qualname__") if name in vars(kind)]

    def handler(walk: Walk, value: Any, depth: int) -> str:
        parts = [part[:200] for part in (get(value) for get in getters) if type(part) is str]
        return walk.text(f"<{word} {'.'.join(parts)}>")

    return handler


def _method(walk: Walk, value: Any, depth: int) -> str:
    return walk.value(vars(types.MethodType)["__func__"].__get__(value), depth)


def _class(walk: Walk, value: Any, depth: int) -> str:
    return walk.text(f"<class {type_name(value)}>")


def _memoryview(walk: Walk, value: Any, depth: int) -> str:
    return walk.text(f"<memoryview of {value.nbytes} bytes>")


def _range(walk: Walk, value: Any, depth: int) -> str:
    ends = [value.start, value.stop, value.step]
    return walk.text(repr(value)) if all(map(_is_small, ends)) else _opaque(walk, value, depth)


_BUILTIN: Final[dict[int, Handler]] = {
    id(kind): handler
    for kind, handler in (
        (dict, _dict),
        *((kind, _items(kind)) for kind in (list, tuple, set, frozenset, deque)),
        *((kind, _items(kind)) for kind in map(type, ({}.keys(), {}.values(), {}.items()))),
        (str, _str),
        *((kind, _bytes(kind)) for kind in (bytes, bytearray)),
        (int, lambda walk, value, depth: walk.integer(int.__int__(value))),
        (float, lambda walk, value, depth: walk.real(float.__float__(value))),
        (complex, lambda walk, value, depth: walk.text(complex.__repr__(value))),
        (memoryview, _memoryview),
        (range, _range),
        (enum.Enum, _enum),
        (dt.datetime, _datetime),
        (dt.date, lambda walk, value, depth: walk.text(dt.date.isoformat(value))),
        (dt.time, _time),
        (dt.timedelta, lambda walk, value, depth: walk.text(dt.timedelta.__str__(value))),
        (BaseException, _exception),
        (type, _class),
        (types.MethodType, _method),
        *(
            (kind, _named(word, kind))
            for word, kind in (
                ("function", types.FunctionType),
                ("function", types.BuiltinFunctionType),
                ("generator", types.GeneratorType),
                ("coroutine", types.CoroutineType),
                ("async_generator", types.AsyncGeneratorType),
            )
        ),
    )
}


# --- well-known types of libraries ------------------------------------------------------------------------


def _decimal(walk: Walk, value: Any, depth: int) -> str:
    decimal = exported("decimal", "Decimal")
    size = decimal.__sizeof__(value)  # writing a million digits takes long
    return walk.text(decimal.__str__(value) if size < 1_000 else f"[truncated: Decimal of {size} bytes]")


def _uuid(walk: Walk, value: Any, depth: int) -> str:
    number = vars(exported("uuid", "UUID"))["int"].__get__(value)
    digits = f"{int.__int__(number):032x}"
    return walk.text("-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])))


def _path(walk: Walk, value: Any, depth: int) -> str:
    parts = find(type(value), "_raw_paths")  # Python 3.12+ keeps what it was given, which may be a subclass
    is_plain = type(parts) is not Slot or all(type(part) is str for part in parts.__get__(value))
    if is_plain and library_of(type(value)) == "pathlib":
        return walk.text(str(value))
    return _opaque(walk, value, depth)


def _printed(walk: Walk, value: Any, depth: int) -> str:
    from tracemw._redact_text import mask_secrets

    return walk.text(mask_secrets(str(value), walk.redactor))  # addresses of services hold passwords


def _message(walk: Walk, value: Any, depth: int) -> str:
    """A request by method and path, a response by status."""
    own = own_attributes(value)
    scope = own.get("scope")
    facts = scope if type(scope) is dict else own
    words = [facts.get("method"), facts.get("path"), own.get("status_code", own.get("_status_code"))]
    shown = [str(word)[:500] for word in words if type(word) is str or _is_small(word)]
    return walk.text(f"<{' '.join([type_name(type(value)), *shown])}>")


def _numpy_scalar(walk: Walk, value: Any, depth: int) -> str:
    item = exported("numpy", "generic").item(value)
    return _opaque(walk, value, depth) if type(item) is type(value) else walk.value(item, depth)


def _array(cls: Class) -> Handler | None:
    """For arrays, tensors and tables: their shape and type of element, never what is in them."""
    shape_of, dtype_of = _getter(cls, "shape"), _getter(cls, "dtype")
    if shape_of is None:
        return None

    def handler(walk: Walk, value: Any, depth: int) -> str:
        facts: dict[str, object] = {"type": type_name(cls)}
        shape = shape_of(value)
        if is_derived(type(shape), tuple):
            facts["shape"] = [size for size in tuple.__iter__(shape) if type(size) is int]
        if dtype_of is not None:
            facts["dtype"] = _dtype_name(dtype_of(value))
        return walk.mapping(value, facts.items(), len(facts), depth)

    return handler


def _getter(cls: Class, name: str) -> Callable[[Any], Any] | None:
    """What reads an attribute in C, or in the library's own Python."""
    found = find(cls, name)
    if type(found) in (GetSet, Slot):
        return found.__get__  # type: ignore[no-any-return]
    return found.fget if type(found) is property else None


def _dtype_name(dtype: Any) -> str:
    kind, size = _getter(type(dtype), "kind"), _getter(type(dtype), "itemsize")
    if library_of(type(dtype)) == "numpy" and kind and size:
        return f"{_NUMPY_KINDS.get(kind(dtype), 'void')}{8 * size(dtype)}"
    written = find(type(dtype), "__repr__")
    return written(dtype) if type(written) is types.WrapperDescriptorType else type_name(type(dtype))


_ARRAYS: Final = frozenset("cupy jax jaxlib numpy pandas polars pyarrow scipy tensorflow torch".split())
_NUMPY_KINDS: Final = dict(
    zip("biufcOSUMm", "bool int uint float complex object bytes str datetime timedelta".split(), strict=True)
)
_PRINTABLE: Final = frozenset({"ipaddress", "pydantic.networks", "zoneinfo"})
_KNOWN: Final[dict[tuple[str, str], Handler]] = {
    ("decimal", "Decimal"): _decimal,
    ("uuid", "UUID"): _uuid,
    ("pathlib", "PurePath"): _path,
    ("pathlib._local", "PurePath"): _path,
    ("pydantic_core._pydantic_core", "Url"): _printed,
    ("pydantic_core._pydantic_core", "MultiHostUrl"): _printed,
    ("starlette.requests", "HTTPConnection"): _message,
    ("starlette.responses", "Response"): _message,
    ("werkzeug.sansio.request", "Request"): _message,
    ("werkzeug.sansio.response", "Response"): _message,
    ("numpy", "generic"): _numpy_scalar,
    ("pandas._libs.tslibs.nattype", "NaTType"): lambda walk, value, depth: walk.text("NaT"),
    ("pandas.api.typing", "NaTType"): lambda walk, value, depth: walk.text("NaT"),
}
