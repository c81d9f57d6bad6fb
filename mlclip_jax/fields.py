"""Mappings to frozen dataclasses: where a configuration leaves the dictionary for a checked type.

Every piece of the library receives a frozen dataclass; the dictionaries of a config file, of the
command line and of a checkpoint's JSON pass through `from_mapping` once, so that an unknown key
or a value of the wrong type is one clear message that names it.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from mlclip_jax.errors import UserError
from mlclip_jax.spec import hint

T = TypeVar("T")


def plain(value: Any) -> Any:
    """Copy of `value` in which every mapping (ConfigDict included) is a dict, lists are tuples."""
    if isinstance(value, Mapping) or hasattr(value, "to_dict"):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(plain(item) for item in value)
    return value


def unknown_key(key: str, known: Iterable[str], where: str) -> UserError:
    """The error for a key that nothing reads, with the closest key that exists."""
    return UserError(f"unknown config key '{_join(where, key)}': {hint(key, known)}")


def from_mapping(cls: type[T], mapping: Mapping[str, Any] | None, where: str = "") -> T:
    """The dataclass `cls` with the fields that `mapping` sets and defaults for the others.

    Args:
      cls: a dataclass; its fields may be bool, int, float, str, tuples, mappings, Literals,
        Optionals and unions of these, and other dataclasses.
      mapping: field values; a ConfigDict or any mapping, nested for nested dataclasses.
      where: dotted place of the mapping in the whole configuration, for messages.

    Raises:
      UserError: for an unknown key (with a close match), a missing one, or a wrong type.
    """
    values = plain(mapping or {})
    if not isinstance(values, dict):
        raise UserError(f"config key '{where}' must be a mapping, not {values!r}")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in values:
        if key not in fields:
            raise unknown_key(key, fields, where)
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in values:
            key = _join(where, name)
            raise UserError(f"config key '{key}' is missing: {cls.__name__} needs it")
    hints = typing.get_type_hints(cls)
    kwargs = {
        name: _convert(value, hints[name], _join(where, name)) for name, value in values.items()
    }
    return cls(**kwargs)


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(map(repr, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_describe, args))
    if hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotation `hint` wants it (ints become floats, lists tuples), or an error."""
    wrong = UserError(f"config key '{where}' must be {_describe(hint)}, not {value!r}")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is typing.Literal:
        if value not in args:
            choices = ", ".join(repr(choice) for choice in args)
            raise UserError(f"config key '{where}' must be one of {choices}, not {value!r}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        for option in args:
            if option is type(None):
                continue
            try:
                return _convert(value, option, where)
            except UserError:
                continue
        raise wrong
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_mapping(hint, value, where)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, tuple | list):
            raise wrong
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(v, args[0], f"{where}[{i}]") for i, v in enumerate(value))
        if len(value) != len(args):
            raise wrong
        return tuple(_convert(v, a, where) for v, a in zip(value, args, strict=True))
    kind = origin or hint
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is int and (isinstance(value, bool) or not isinstance(value, int)):
        raise wrong
    if not isinstance(kind, type) or not isinstance(value, kind):
        raise wrong
    return value
