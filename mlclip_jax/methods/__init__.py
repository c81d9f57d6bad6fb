"""Methods, found by module name: a new method is one file here and one config."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from flax import nnx

from mlclip_jax.clip import CLIP
from mlclip_jax.fields import from_mapping
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.methods.base import Method
from mlclip_jax.modules.prompts import Encoder
from mlclip_jax.spec import unknown


def names() -> list[str]:
    """All methods' names."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base")


def load(name: str) -> type[Method]:
    """The method class in `mlclip_jax/methods/<name>.py`.

    Raises:
        UserError: where there is no such method.
    """
    if name not in names():
        raise unknown("method", name, names())
    module = importlib.import_module(f"{__name__}.{name}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Method)
        and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__file__} must define one Method, not {len(found)}")
    return found[0]


def build(
    spec: Mapping[str, Any],
    clip: CLIP,
    *,
    space: LabelSpace,
    encoder: Encoder,
    rngs: nnx.Rngs,
) -> Method:
    """A method from `config.method`: its `name` and the fields of its `Config`.

    Raises:
        UserError: unknown method, field or wrong type.
    """
    fields = dict(spec)
    method = load(fields.pop("name", ""))
    config = from_mapping(method.Config, fields, "method")
    return method(config, clip, space=space, encoder=encoder, rngs=rngs)
