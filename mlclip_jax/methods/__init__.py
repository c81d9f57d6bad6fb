"""Methods, found by module name: a new method is one file here and one config."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from flax import nnx

from mlclip_jax.clip import CLIP, CLIPConfig
from mlclip_jax.fields import from_mapping
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.methods.base import Method, MethodConfig
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


def _configured(spec: Mapping[str, Any]) -> tuple[type[Method], MethodConfig]:
    fields = dict(spec)
    method = load(fields.pop("name", ""))
    return method, from_mapping(method.Config, fields, "method")


def image_size(spec: Mapping[str, Any], clip: CLIPConfig) -> int:
    """Pixels of a side of the images that the method of `config.method` takes.

    Raises:
        UserError: unknown method, field or wrong type.
    """
    method, config = _configured(spec)
    return method.image_size_of(config, clip)


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
    method, config = _configured(spec)
    return method(config, clip, space=space, encoder=encoder, rngs=rngs)
