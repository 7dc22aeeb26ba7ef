"""Looking at classes and instances without running any code that they define.

`isinstance` may ask `__class__`, attribute access may end in a property, and the look-up of a class in a
dictionary calls its metaclass's `__hash__`. So classes are compared by identity, and attributes are fetched
through the descriptors that C made.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from itertools import islice
from typing import Any, Final, TypeAlias

Class: TypeAlias = type[Any]
Slot: Final = types.MemberDescriptorType
GetSet: Final = types.GetSetDescriptorType
MOST_FIELDS: Final = 1_000

bases_of: Callable[[Class], tuple[Class, ...]] = vars(type)["__mro__"].__get__
_namespace: Callable[[Class], types.MappingProxyType[str, Any]] = vars(type)["__dict__"].__get__
_qualname: Callable[[Class], str] = vars(type)["__qualname__"].__get__
_module: Callable[[Class], object] = vars(type)["__module__"].__get__


def module_of(cls: Class) -> str:
    """The module that a class says it comes from; empty if it says no such thing."""
    module = _module(cls)
    return module if type(module) is str else ""


def type_name(cls: Class) -> str:
    """`module.Class`; without the module for built-in types."""
    name, module = str.__str__(_qualname(cls))[:200], module_of(cls)
    return name if module in ("", "builtins") else f"{module[:200]}.{name}"


def short_name(cls: Class) -> str:
    """The name of a class alone."""
    return str.__str__(_qualname(cls))[:200].rpartition(".")[2]


def find(cls: Class, name: str) -> Any:
    """What a class or a base of it has under a name, unbound; None if there is nothing."""
    for base in bases_of(cls):
        if name in _namespace(base):
            return _namespace(base)[name]
    return None


def exported(module: str, name: str) -> Any:
    """What an imported module has under a name; None if it was not imported. Nothing is imported."""
    home = sys.modules.get(module)
    return home.__dict__.get(name) if type(home) is types.ModuleType else None


def origin(cls: Class) -> tuple[str, str]:
    """Module and name of a class that its module really has under that name, else two empty strings.

    Only of such a class is it known whose code it is, since anyone can set `__module__`.
    """
    module, name = module_of(cls), str.__str__(_qualname(cls))
    return (module, name) if exported(module, name) is cls else ("", "")


def library_of(cls: Class) -> str:
    """The package that a class is from, if it really is."""
    return origin(cls)[0].partition(".")[0]


def is_derived(cls: Class, base: Class) -> bool:
    """`issubclass` without the hooks of metaclasses."""
    return id(base) in map(id, bases_of(cls))


def dictionary_of(cls: Class) -> Callable[[Any], dict[Any, Any]] | None:
    """What gives the dictionary of an instance; None if there is none, or the class put code in its place."""
    descriptor = find(cls, "__dict__")
    return descriptor.__get__ if type(descriptor) is GetSet else None


def own_attributes(value: Any) -> dict[str, Any]:
    """The instance's attributes with ordinary names, as far as the instance keeps them in a dictionary."""
    dictionary = dictionary_of(type(value))
    return ordinary(dictionary(value)) if dictionary else {}


def ordinary(attributes: dict[Any, Any]) -> dict[str, Any]:
    """The members whose names are strings, of a dictionary that may be of any subclass."""
    pairs = islice(dict.items(attributes), 2 * MOST_FIELDS)
    return {name: item for name, item in pairs if type(name) is str}
