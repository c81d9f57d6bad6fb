"""Settings written as text: `name(key=value)` in a config, `file.py:key=value` at its launch."""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any, TypeVar

from mlclip_jax.errors import UserError

T = TypeVar("T")


def hint(name: str, known: Iterable[str]) -> str:
    """The mend for an unknown name: the closest known one, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not among the known ones, with its mend."""
    return UserError(f"unknown {what} {name!r}; {hint(name, known)}")


def parse_call(text: str, *, what: str) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """`"name"` or `"name(1, key=2)"` into name, positional and keyword arguments (literals).

    Raises:
        UserError: where the text has another form.
    """
    problem = UserError(f'{what} {text!r} should read "name" or "name(key=value, ...)"')
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, (), {}
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            raise ValueError("neither a name nor a call")
        keywords = {k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg}
        if len(keywords) != len(node.keywords):
            raise ValueError("** among the arguments")
        return node.func.id, tuple(ast.literal_eval(a) for a in node.args), keywords
    except (SyntaxError, ValueError) as error:
        raise problem from error


def bind_call(
    text: str, table: Mapping[str, Callable[..., T]], *, what: str, reserved: tuple[str, ...] = ()
) -> functools.partial[T]:
    """The function that `text` names, with the keyword arguments it gives.

    Args:
        text: `"name"` or `"name(key=value, ...)"`.
        table: functions by name.
        what: what the functions are, for messages ("loss").
        reserved: keywords that the caller gives and `text` may not.

    Raises:
        UserError: unknown name, positional argument or unknown keyword.
    """
    name, positional, keywords = parse_call(text, what=what)
    if name not in table:
        raise unknown(what, name, table)
    parameters = [
        p.name
        for p in inspect.signature(table[name]).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in reserved
    ]
    if positional:
        raise UserError(f"{what} {text!r}: write arguments as key=value ({', '.join(parameters)})")
    for key in keywords:
        if key not in parameters:
            raise unknown(f"argument of {what} {name!r}:", key, parameters)
    return functools.partial(table[name], **keywords)


def parse_arg(arg: str | None, **defaults: Any) -> SimpleNamespace:
    """The variant argument of a config file as typed values.

    Args:
        arg: `"setup=largeloss,tiny"`: a bare word is a switch turned on; values take the type
            of their default; commas within parentheses belong to the value.
        **defaults: every argument the file knows, with its default.

    Raises:
        UserError: an argument that the file does not know, or a value of another type.
    """
    values = dict(defaults)
    for item in filter(None, re.split(r",(?![^()]*\))", arg or "")):
        key, has_value, text = item.partition("=")
        if key not in defaults:
            raise unknown("config argument", key, defaults)
        kind = type(defaults[key])
        value = True if not has_value else text if kind is str else _literal(text)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise UserError(f"config argument {item!r}: {key} takes a {kind.__name__}")
        values[key] = value
    return SimpleNamespace(**values)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
