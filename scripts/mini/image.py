"""Stage 1: the image tower learns what is in a scene, and where."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, traverse_util

from mini.common import (
    PAIRS,
    PHRASES,
    SEED,
    SPACE,
    average_precision,
    by_group,
    log,
    phrase_targets,
    rendered,
    save_npz,
    unit,
)
from mlclip_jax.clip import CLIPConfig, ResNetConfig
from mlclip_jax.clip.resnet import ModifiedResNet
from mlclip_jax.clip.vit import VisionTransformer
from mlclip_jax.data.scenes import KINDS, Scenes

BATCH = 64


def fresh_batches(steps: int, grid: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Batches of scenes never seen before, rendered by a thread ahead of the training step."""
    scenes = Scenes("train", steps * BATCH, seed=SEED)
    ready: queue.Queue[Any] = queue.Queue(maxsize=8)

    def work() -> None:
        for step in range(steps):
            rows = range(step * BATCH, (step + 1) * BATCH)
            whole, cells = zip(*(phrase_targets(scenes, i, grid) for i in rows), strict=True)
            ready.put((np.stack([scenes.image(i) for i in rows]), np.stack(whole), np.stack(cells)))

    threading.Thread(target=work, daemon=True).start()
    for _ in range(steps):
        yield ready.get()


def build_image_tower(config: CLIPConfig, seed: int) -> nnx.Module:
    """The image tower alone, with random weights."""
    if isinstance(config.image, ResNetConfig):
        return ModifiedResNet(config.image, config.embed_dim, rngs=nnx.Rngs(seed))
    tower = VisionTransformer(config.image, config.embed_dim, rngs=nnx.Rngs(seed))
    # Positions that already tell near from far: attention finds its neighbours sooner.
    places = sine_positions(config.image.grid, config.image.width)
    tower.position_embedding[...] = tower.position_embedding[...].at[1:].set(places)
    return tower


def sine_positions(grid: int, width: int) -> jax.Array:
    """Sines and cosines of each patch's row and column: float32 [grid*grid width]."""
    quarter = width // 4
    waves = jnp.arange(grid)[:, None] / (2.0 * grid) ** (jnp.arange(quarter) / quarter)
    line = jnp.concatenate([jnp.sin(waves), jnp.cos(waves)], axis=1)
    rows, columns = jnp.repeat(line, grid, axis=0), jnp.tile(line, (grid, 1))
    return 0.5 * jnp.concatenate([rows, columns], axis=1)


def normalise_pixels(images: jax.Array, config: CLIPConfig) -> jax.Array:
    """uint8 [b h w 3] -> what the tower reads."""
    return (images / 255.0 - jnp.asarray(config.image_mean)) / jnp.asarray(config.image_std)


def phrase_vectors(head: dict[str, jax.Array]) -> jax.Array:
    """Vectors of all phrases [118 d]: the sum of a pair's words, and a part of each one's own."""
    kinds, colours = head["words"][: len(KINDS)], head["words"][len(KINDS) :]
    pairs = (kinds[:, None] + colours).reshape(len(PAIRS), -1)
    return jnp.concatenate([pairs, head["words"]]) + head["own"]


def sigmoid_loss(features: jax.Array, targets: jax.Array, head: dict[str, jax.Array]) -> jax.Array:
    """Binary cross-entropy of scaled cosines with the head's vectors, summed over phrases, mean."""
    vectors = unit(phrase_vectors(head))
    logits = jnp.exp(head["log_scale"]) * (unit(features) @ vectors.T) + head["bias"]
    return optax.sigmoid_binary_cross_entropy(logits, targets).sum(-1).mean()


def train_image(config: CLIPConfig, workdir: Path, steps: int, peak: float) -> None:
    """Writes image.npz: the tower's leaves by path, and the vectors of the 118 phrases."""
    tower = build_image_tower(config, SEED)
    graph, params, stats = nnx.split(tower, nnx.Param, nnx.BatchStat)
    params, stats = nnx.to_pure_dict(params), nnx.to_pure_dict(stats)
    bias = jnp.where(jnp.arange(len(PHRASES)) < len(PAIRS), -3.5, -1.5)
    words = jax.random.normal(jax.random.key(SEED), (len(SPACE), config.embed_dim))
    own = jnp.zeros((len(PHRASES), config.embed_dim))
    head = {"words": words, "own": own, "bias": bias, "log_scale": jnp.asarray(2.3)}
    train = {"tower": params, "head": head, "cells": {"bias": bias, "log_scale": jnp.asarray(2.3)}}
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, 200, steps, 0.02 * peak)
    decay = jax.tree.map(lambda a: a.ndim > 1, train)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=0.05, mask=decay),
    )
    state = tx.init(train)
    bn = isinstance(config.image, ResNetConfig)

    @jax.jit
    def step(train: Any, stats: Any, state: Any, images: Any, whole: Any, cells: Any) -> Any:
        def loss(train: Any) -> Any:
            model = nnx.merge(graph, train["tower"], stats)
            pixels = normalise_pixels(images, config)
            out = model(pixels, tokens=True, **({"train_bn": True} if bn else {}))
            one = sigmoid_loss(out.pooled, whole, train["head"])
            two = sigmoid_loss(out.tokens, cells, {**train["head"], **train["cells"]})
            return one + two, (one, two, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

        (_, (one, two, stats)), grads = jax.value_and_grad(loss, has_aux=True)(train)
        updates, state = tx.update(grads, state, train)
        return optax.apply_updates(train, updates), stats, state, one, two

    images, targets = rendered("validation", 1000)
    began = time.time()
    for number, batch in enumerate(fresh_batches(steps, config.image.grid), start=1):
        train, stats, state, one, two = step(train, stats, state, *batch)
        if number % 100 == 0 or number == steps:
            features = encode_images(graph, train["tower"], stats, images, config)
            vectors = np.asarray(unit(phrase_vectors(train["head"])))[len(PAIRS) :]
            ap = by_group(average_precision(features @ vectors.T, targets))
            log(step=number, seconds=time.time() - began, pooled=float(one), cells=float(two), **ap)
            save_npz(
                workdir / "image.npz",
                {"tower": params_with(train["tower"], stats), "head": train["head"]},
            )


def params_with(params: dict[str, Any], stats: dict[str, Any]) -> dict[str, Any]:
    """Parameters and BatchNorm statistics in one nested dict."""
    flat = {**traverse_util.flatten_dict(params), **traverse_util.flatten_dict(stats)}
    return traverse_util.unflatten_dict(flat)


def encode_images(
    graph: Any, params: Any, stats: Any, images: np.ndarray, config: CLIPConfig
) -> np.ndarray:
    """Normalised pooled features of uint8 images [n h w 3] -> float32 [n d]."""
    run = _encode_jit(graph, config)
    parts = [images[i : i + 250] for i in range(0, len(images), 250)]
    return np.concatenate([np.asarray(run(params, stats, part)) for part in parts])


_ENCODERS: dict[Any, Any] = {}


def _encode_jit(graph: Any, config: CLIPConfig) -> Any:
    if config not in _ENCODERS:
        _ENCODERS[config] = jax.jit(
            lambda params, stats, images: unit(
                nnx.merge(graph, params, stats)(normalise_pixels(images, config)).pooled
            )
        )
    return _ENCODERS[config]
