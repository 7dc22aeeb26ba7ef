"""Values of classes that declare their fields: dataclasses, attrs, pydantic, msgspec and named tuples.

Their fields become a JSON object. What the author hides (`repr=False`, `exclude=True`) is masked.
"""

from __future__ import annotations

from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from tracemw._classes import (
    MOST_FIELDS,
    Class,
    GetSet,
    Slot,
    bases_of,
    dictionary_of,
    exported,
    find,
    is_derived,
    module_of,
    ordinary,
    origin,
)
from tracemw._redact import MASK

if TYPE_CHECKING:
    from tracemw._capture_types import Handler
    from tracemw.capture import Walk

_MODELS: Final = {("pydantic.main", "BaseModel"), ("pydantic.v1.main", "BaseModel")}


def fields_handler(cls: Class) -> Handler | None:
    """What writes instances of a class that declares fields; None for any other class."""
    for declared in (_dataclass_fields, _model_fields, _attrs_fields, _struct_fields):
        fields = declared(cls)
        if fields is not None:
            return _handler(cls, dict(islice(fields.items(), MOST_FIELDS)))
    names = find(cls, "_fields")
    if is_derived(cls, tuple) and type(names) is tuple and all(type(name) is str for name in names):
        return _named_tuple
    return None


# Each of these gives the names of the fields and whether the author hides them.


def _dataclass_fields(cls: Class) -> dict[str, bool] | None:
    declared, kind = find(cls, "__dataclass_fields__"), exported("dataclasses", "Field")
    if type(declared) is not dict:
        return None
    fields = [field for field in declared.values() if type(field) is kind]
    return {field.name: not field.repr for field in fields if field._field_type.name == "_FIELD"}


def _attrs_fields(cls: Class) -> dict[str, bool] | None:
    declared, kind = find(cls, "__attrs_attrs__"), exported("attr._make", "Attribute")
    if kind is None or not is_derived(type(declared), tuple):
        return None
    fields = [field for field in tuple.__iter__(declared) if type(field) is kind]
    return {field.name: field.repr is False for field in fields}


def _struct_fields(cls: Class) -> dict[str, bool] | None:
    of_class = find(type(cls), "__struct_fields__")  # msgspec keeps them in the metaclass, in C
    names = of_class.__get__(cls) if type(of_class) in (Slot, GetSet) else None
    return {name: False for name in names if type(name) is str} if type(names) is tuple else None


def _model_fields(cls: Class) -> dict[str, bool] | None:
    if not any(origin(base) in _MODELS for base in bases_of(cls)):
        return None
    for attribute in ("__pydantic_fields__", "model_fields", "__fields__"):  # 2.10+, 2, 1
        declared = find(cls, attribute)
        if type(declared) is dict:
            return {name: _is_hidden(info) for name, info in declared.items() if type(name) is str}
    return None


def _is_hidden(info: Any) -> bool:
    if module_of(type(info)).partition(".")[0] != "pydantic":
        return False
    info = getattr(info, "field_info", info)  # of version 1
    return info.exclude is True or getattr(info, "repr", True) is False


def _handler(cls: Class, fields: dict[str, bool]) -> Handler:
    slots = {name: slot.__get__ for name in fields if type(slot := find(cls, name)) is Slot}
    dictionary = dictionary_of(cls)
    extra = find(cls, "__pydantic_extra__")
    is_root_model = find(cls, "__pydantic_root_model__") is True

    def handler(walk: Walk, value: Any, depth: int) -> str:
        found = ordinary(dictionary(value)) if dictionary else {}
        for name, slot in slots.items():
            with suppress(AttributeError):  # a slot that was never set
                found[name] = slot(value)
        if is_root_model and "root" in found:
            return walk.value(found["root"], depth)
        pairs = [(name, MASK if hidden else found[name]) for name, hidden in fields.items() if name in found]
        more = extra.__get__(value) if type(extra) is Slot else None
        if type(more) is dict:
            pairs += islice(more.items(), MOST_FIELDS)
        return walk.mapping(value, pairs, len(pairs), depth)

    return handler


def _named_tuple(walk: Walk, value: Any, depth: int) -> str:
    names, size = find(type(value), "_fields"), tuple.__len__(value)
    if len(names) != size:
        return walk.sequence(value, tuple.__iter__(value), size, depth)
    return walk.mapping(value, zip(names, tuple.__iter__(value), strict=True), size, depth)
