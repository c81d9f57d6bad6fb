"""Training from cached image features: whether a stage may, what keys them, and computing them."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlclip_jax.clip import ImageFeatures
from mlclip_jax.clip.config import CLIPConfig
from mlclip_jax.data import feature_files, features
from mlclip_jax.data.features import Cache, CacheConfig
from mlclip_jax.data.pipeline import Source
from mlclip_jax.data.registry import DataSplits
from mlclip_jax.errors import UserError
from mlclip_jax.methods.base import Batch, Method, Progress
from mlclip_jax.training.captions import reads_no_images
from mlclip_jax.training.config import StageConfig
from mlclip_jax.training.mesh import replicated, shard_batch
from mlclip_jax.training.stage import Run
from mlclip_jax.training.step import Leaves, Parts, State, all_leaves, statistics


def upstream(parts: Parts, images: Any) -> tuple[set[str], set[str]]:
    """What image features depend on in training, found by tracing.

    Args:
      parts: a method taken apart, with values or shapes.
      images: uint8 [b h w 3], values or shapes.

    Returns:
      Paths of the leaves that reach the features ("progress" among them if they change with it),
      and paths of the BatchNorm statistics that computing them moves.
    """
    leaves = {**parts.frozen, **parts.trainable, **parts.moving}
    leaves = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    moved: set[str] = set()

    def encode(leaves: Leaves, progress: Progress, images: Any) -> Any:
        method = parts.merge(leaves)
        found = method.encode_images(images, progress=progress)
        after = statistics(method)
        moved.update(path for path, value in after.items() if value is not leaves[path])
        return found

    zero = jax.ShapeDtypeStruct((), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    progress = Progress(step=zero, epoch=zero, key=key)
    jaxpr = jax.make_jaxpr(encode)(leaves, progress, images).jaxpr
    # Inputs are in the order of the flattened arguments: leaves by path, progress, images.
    names = [{path} for path in sorted(leaves)]
    names += [{"progress"}] * (len(jaxpr.invars) - len(names) - 1) + [set()]
    reached = dict(zip(jaxpr.invars, names, strict=True))

    def of(variables: Any) -> set[str]:
        known = (reached.get(v, set()) for v in variables if not hasattr(v, "val"))  # no literals
        return set().union(*known)

    for equation in jaxpr.eqns:
        sources = of(equation.invars)
        reached.update((variable, sources) for variable in equation.outvars)
    return of(jaxpr.outvars), moved


def check_frozen(stage: StageConfig, parts: Parts, images: Any) -> set[str]:
    """Paths of the leaves that decide the image features, none of which changes in the stage.

    Raises:
      UserError: naming what does change.
    """
    reaching, moved = upstream(parts, images)
    trained = sorted(reaching & parts.trainable.keys())
    problems = []
    if trained:
        problems.append(
            f"{_some(trained)} train{'s' if len(trained) == 1 else ''} upstream of them"
        )
    if moved:
        problems.append(f"training moves the BatchNorm statistics {_some(sorted(moved))}")
    if "progress" in reaching:
        problems.append("they change with the step or epoch")
    if problems:
        raise UserError(
            f"config key 'cache': in stage '{stage.name}' image features of method "
            f"'{stage.method['name']}' cannot be computed once, because {'; '.join(problems)}: "
            "set cache=None for this stage, or freeze the image tower"
        )
    return reaching


def _some(paths: list[str]) -> str:
    shown = ", ".join(paths[:2])
    return shown if len(paths) <= 2 else f"{shown} and {len(paths) - 2} more"


def encoder_key(method: Method, leaves: Leaves) -> dict[str, Any]:
    """Plain values that tell these image features from those of any other tower.

    Args:
      method: whose image features.
      leaves: those that decide them, by path.
    """
    digest = hashlib.sha256()
    for path in sorted(leaves):
        value = np.asarray(jax.device_get(leaves[path]))
        digest.update(f"{path} {value.dtype} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    clip: CLIPConfig = method.clip.config
    function = type(method).encode_images
    return {
        "weights": digest.hexdigest(),
        "function": f"{function.__module__}.{function.__qualname__}",
        "settings": method.image_settings(),
        "tokens": method.reads_tokens,
        "tower": repr(clip.image),
        "image_norm": [*clip.image_mean, *clip.image_std],
        "dtype": str(method.clip.dtype),
    }


def cached_shape(parts: Parts, batch: Batch, config: CacheConfig) -> Batch:
    """Shapes of a batch whose images are cached features."""
    images = {
        name: jax.ShapeDtypeStruct(
            (*batch.index.shape, *shape),
            jnp.bfloat16 if kind == "uint16" else kind,
            sharding=batch.index.sharding,
        )
        for name, kind, shape in feature_files.layout(_shapes(parts, batch.images), config.dtype)
    }
    return replace(batch, images=images)


def cache_features(
    run: Run,
    data: DataSplits,
    stage: StageConfig,
    method: Method,
    parts: Parts,
    state: State,
    frozen: Leaves,
) -> DataSplits:
    """`data` with image features in place of images, computed where they are missing.

    Captions that stand for training images stay what they are.

    Args:
      run: its mesh and settings.
      data: of the stage.
      stage: with a `cache`.
      method: of the stage.
      parts: its structure; the leaves are taken from `state` and `frozen`.
      state, frozen: on the devices.

    Raises:
      UserError: image features change in this stage, or as `data.features`.
    """
    config, mesh = stage.cache, run.mesh
    leaves = all_leaves(state, frozen)
    parts = replace(parts, trainable=state["trainable"], moving=state["batch_stats"], frozen=frozen)
    size = method.image_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
    deciding = check_frozen(stage, parts, image)
    encoder = encoder_key(method, {path: leaves[path] for path in deciding})

    # ---- Which, and how much -------------------------------------------------------------------
    def plan(source: Source, train: bool) -> Cache:
        return features.plan(
            source,
            config,
            encoder=encoder,
            shapes=_shapes(parts, image),
            train=train,
            seed=run.config.seed,
            flip=data.config.flip,
        )

    train = None if reads_no_images(method) else plan(data.train, train=True)
    evals = {split: plan(source, train=False) for split, source in data.evals.items()}
    # Splits of the same images share files; the limit on unreadable ones is that of the last.
    named = {cache.files.folder: (split, cache) for split, cache in evals.items()}
    if train is not None:
        named = {train.files.folder: ("train", train), **named}
    ready = _of_the_first(np.array([cache.files.ready() for _, cache in named.values()]))
    missing = [pair for pair, done in zip(named.values(), ready, strict=True) if not done]
    _say(run, list(named.values()), missing, config)
    feature_files.check_space([cache.files for _, cache in missing], Path(config.folder))

    # ---- Compute -------------------------------------------------------------------------------
    def encode(leaves: Leaves, images: Any, readable: Any) -> dict[str, jax.Array]:
        return {**_features(parts, leaves, images), "readable": readable}

    jitted = jax.jit(encode, out_shardings=replicated(mesh))

    def encode_share(images: np.ndarray, readable: np.ndarray) -> dict[str, Any]:
        computed = jitted(leaves, *shard_batch((images, readable), mesh))
        return {name: _in_order(value) for name, value in computed.items()}

    batch_size = -(-run.config.eval.batch_size // mesh.size) * mesh.size
    for split, cache in missing:
        _compute(run, split, cache, encode_share, batch_size)
    _wait_for_all()
    opened = {split: cache.open() for split, cache in evals.items()}
    return replace(data, train=train.open() if train else data.train, evals=opened)


def _features(parts: Parts, leaves: Leaves, images: Any) -> dict[str, jax.Array]:
    """Image features outside training, float32 by name."""
    found: ImageFeatures = parts.merge(leaves).encode_images(images)
    named = {name: value for name, value in found._asdict().items() if value is not None}
    return {name: value.astype(jnp.float32) for name, value in named.items()}


def _shapes(parts: Parts, images: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the features of one image by name."""
    leaves = {**parts.frozen, **parts.trainable, **parts.moving}
    found = jax.eval_shape(lambda *inputs: _features(parts, *inputs), leaves, images)
    return {name: value.shape[1:] for name, value in found.items()}


def _in_order(values: jax.Array) -> np.ndarray | jax.Array:
    """The examples of a batch in their order, which its processes share out in turn."""
    count = jax.process_count()
    if count == 1:
        return values
    local = values.addressable_data(0)
    return local.reshape(count, -1, *local.shape[1:]).swapaxes(0, 1).reshape(local.shape)


def _say(
    run: Run, caches: list[tuple[str, Cache]], missing: list[tuple[str, Cache]], config: CacheConfig
) -> None:
    """What is read in place of images, and what of it is computed first."""

    def size(several: list[tuple[str, Cache]]) -> str:
        return feature_files.gibibytes(sum(cache.files.size for _, cache in several))

    views = f"{config.views} view{'s' if config.views > 1 else ''}"
    changed = any(cache.images.seed is not None for _, cache in caches)
    run.say(
        f"training and evaluation read cached image features, not images: {config.dtype}, {views} "
        f"of each{' augmented' if changed else ''} training image, {size(caches)} in "
        f"{config.folder}"
    )
    if missing:
        splits = ", ".join(split for split, _ in missing)
        images = sum(cache.files.records for _, cache in missing)
        run.say(f"to compute first: {splits}, {images:,} images, {size(missing)}")


def _compute(run: Run, split: str, cache: Cache, encode: features.Encode, batch_size: int) -> None:
    """Writes one cache, with a bar on a terminal."""
    from tqdm import tqdm

    hidden = run.quiet or not sys.stderr.isatty()
    with tqdm(
        desc=f"features of {split}", total=cache.files.records, unit="image", disable=hidden
    ) as bar:
        features.write(
            cache,
            encode,
            batch_size=batch_size,
            max_unreadable=run.data.config.max_unreadable if split == "train" else 0,
            num_workers=run.data.config.num_workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            tick=bar.update,
            agree=_of_the_first,
        )


def _of_the_first(value: Any) -> Any:
    """An array or number as process 0 has it: others may see the files at another moment."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(value)


def _wait_for_all() -> None:
    """Until every process has come here: the first one writes what all read."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("cached image features")
