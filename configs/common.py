"""What config files share: variant arguments after the colon of `--config=file.py:key=value,...`."""

from __future__ import annotations

import ast
from types import SimpleNamespace
from typing import Any

from mlclip_jax.errors import UserError
from mlclip_jax.spec import unknown


def parse_arg(arg: str | None, **defaults: Any) -> SimpleNamespace:
    """The variant argument of a config file as typed values.

    Args:
        arg: `"setup=largeloss,tiny"`: a bare word is a switch turned on; values take the type
            of their default.
        **defaults: every argument the file knows, with its default.

    Raises:
        UserError: an argument that the file does not know, or a value of another type.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
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
