"""Named arrays in files or in memory, and the way from them into a CLIP and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlclip_jax.clip.config import CLIPConfig
from mlclip_jax.clip.layouts import ignored, row_of
from mlclip_jax.clip.model import CLIP
from mlclip_jax.clip.positions import interpolate_positions
from mlclip_jax.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import DTypeLike


@dataclass(frozen=True)
class NamedArrays:
    """Named arrays that are read one at a time: their shapes, and a function that reads one."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def _arrays_of(tensors: Mapping[str, np.ndarray]) -> NamedArrays:
    return NamedArrays({name: np.shape(a) for name, a in tensors.items()}, tensors.__getitem__)


def open_safetensors(files: tuple[Path, ...]) -> NamedArrays:
    """The arrays of one safetensors file or of its shards; nothing is read yet but the headers.

    Raises:
        UserError: a file is damaged.
    """
    import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
    from safetensors import SafetensorError, safe_open

    homes, shapes = {}, {}
    for path in files:
        try:
            handle = safe_open(str(path), framework="numpy")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error}); fetch it again") from error
        for name in handle.keys():  # noqa: SIM118  (not a mapping)
            homes[name] = handle
            shapes[name] = tuple(handle.get_slice(name).get_shape())
    return NamedArrays(shapes, lambda name: homes[name].get_tensor(name))


def open_msgpack(path: Path) -> NamedArrays:
    """The arrays of a Flax msgpack file, nested names joined by dots.

    Raises:
        UserError: the file is damaged.
    """
    from flax import serialization, traverse_util

    try:
        tree = serialization.msgpack_restore(path.read_bytes())
        flat = traverse_util.flatten_dict(tree, sep=".")
    except Exception as error:  # msgpack, flax and numpy each have their own
        raise UserError(f"{path} cannot be read as Flax msgpack ({error})") from error
    return _arrays_of(flat)


def from_state_dict(
    tensors: Mapping[str, np.ndarray],
    config: CLIPConfig,
    *,
    layout: str = "openai",
    dtype: DTypeLike = jnp.float32,
    source: str = "the state dict",
) -> CLIP:
    """A CLIP filled from named arrays in memory.

    Args:
        tensors: name -> array, with the names and axis orders of the layout.
        config: sizes of the model to fill.
        layout: "openai", "hf" or "hf_flax" (see `layouts`).
        dtype: compute dtype; parameters are float32 always.
        source: what error messages call the arrays.

    Raises:
        UserError: names or shapes differ; lists every difference.
    """
    return fill(config, layout, _arrays_of(tensors), dtype, source, config)


def fill(
    stored: CLIPConfig,
    layout: str,
    arrays: NamedArrays,
    dtype: DTypeLike,
    source: str,
    wanted: CLIPConfig,
    *,
    remat: bool = False,
    class_chunk: int | None = None,
) -> CLIP:
    """A CLIP of configuration `wanted` filled with the arrays of one of configuration `stored`.

    The two may differ in the image size; the image tower's positions are then interpolated.

    Args:
        stored: what the arrays are; they are checked against it.
        layout: how the arrays are named and laid out.
        arrays: where to read them.
        dtype: compute dtype.
        source: what error messages call the arrays.
        wanted: what to build.
        remat, class_chunk: how it is to compute (see `CLIP`).

    Raises:
        UserError: names or shapes differ; lists every difference.
    """
    expected = expected_shapes(stored, layout)
    check_shapes(expected, arrays.shapes, source)

    model = _abstract(wanted, dtype, remat=remat, class_chunk=class_chunk)
    graph, state = nnx.split(model)
    flat = []
    for path, variable in nnx.to_flat_state(state):
        key = path_string(path)
        names, transform = row_of(layout, key)
        value = transform.load([np.asarray(arrays.read(name), np.float32) for name in names])
        if key in ("image/position_embedding", "image/attention_pool/position_embedding"):
            value = interpolate_positions(value, (wanted.image.grid, wanted.image.grid))
        flat.append((path, variable.replace(jnp.asarray(value, jnp.float32))))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def expected_shapes(config: CLIPConfig, layout: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every array that a file of a layout must hold for a CLIP.

    Raises:
        UserError: the layout has no place for a part of the model.
    """
    shapes = {}
    for path, leaf in _leaves(_abstract(config, jnp.float32)):
        names, transform = row_of(layout, path)
        # A view of one number in the leaf's shape: transforms run without memory.
        parts = transform.save(np.broadcast_to(np.float32(0), leaf.shape))
        shapes |= {name: part.shape for name, part in zip(names, parts, strict=True)}
    return shapes


def _abstract(config: CLIPConfig, dtype: DTypeLike, **settings: Any) -> CLIP:
    return nnx.eval_shape(lambda: CLIP(config, dtype=dtype, **settings, rngs=nnx.Rngs(0)))


def path_string(path: tuple) -> str:
    """An NNX path as text: ("image", "blocks", 0) -> "image/blocks/0"."""
    return "/".join(map(str, path))


def _leaves(clip: CLIP) -> list[tuple[str, np.ndarray]]:
    return [(path_string(p), v.get_value()) for p, v in nnx.to_flat_state(nnx.state(clip))]


def check_shapes(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """One UserError with every missing, unexpected and mismatched name."""
    lines = [
        f"  missing     {name} {list(shape)}"
        for name, shape in sorted(expected.items())
        if name not in found
    ]
    lines += [
        f"  unexpected  {name} {list(shape)}"
        for name, shape in sorted(found.items())
        if name not in expected and not ignored(name)
    ]
    lines += [
        f"  mismatched  {name} {list(found[name])}, the configuration says {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if lines:
        raise UserError(
            f"{source} does not fit its configuration; check that the weights and the "
            "configuration belong together:\n" + "\n".join(lines)
        )


def to_state_dict(clip: CLIP, layout: str) -> dict[str, np.ndarray]:
    """All weights of a CLIP under the names and in the axis orders of a layout, float32.

    Raises:
        UserError: the layout has no place for a ResNet tower.
    """
    tensors = {}
    for path, leaf in _leaves(clip):
        names, transform = row_of(layout, path)
        parts = transform.save(np.asarray(leaf, np.float32))
        tensors |= {n: np.array(a, order="C") for n, a in zip(names, parts, strict=True)}
    return tensors
