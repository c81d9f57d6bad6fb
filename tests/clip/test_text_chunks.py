"""Encoding classes in chunks is the same function in bounded memory, on one device and on eight."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlclip_jax.clip import PromptTokens, Segment, TextConfig, TextTower
from mlclip_jax.errors import UserError
from mlclip_jax.training.config import parse_config
from mlclip_jax.training.dry_run import abstract_step
from mlclip_jax.training.mesh import make_mesh, replicated, split_over_data

WIDTH, K, GROUPS = 32, 4, 3
CONFIG = TextConfig(60, 77, WIDTH, layers=2, heads=2, mlp_width=64)
EOT, SOT = 59, 58


def make_prompts(classes: int, *, specific: bool = False) -> PromptTokens:
    """Names of one to three tokens after K context vectors, shared or the classes' own."""
    rng = np.random.default_rng(0)
    slots = [-(j + 1) for j in range(K)]
    rows = [[*rng.integers(1, 50, 1 + i % 3), EOT] for i in range(classes)]
    rows = [[*slots, *row] for row in rows] if specific else rows
    own = np.zeros((classes, max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        own[i, : len(row)] = row
    prefix = [SOT] if specific else [SOT, *slots]
    return PromptTokens(
        np.array(prefix, np.int32), own, np.array([len(row) - 1 for row in rows], np.int32)
    )


def encode(kind: str, tower: TextTower, prompts: PromptTokens, context: jax.Array) -> jax.Array:
    if kind != "groups":
        return tower.encode_prompts(prompts, context, dtype=context.dtype)
    # The start token, each group's own context, the names.
    start, own = tower.embed(prompts.prefix[None, :1]), tower.embed(prompts.own)
    group = jnp.arange(len(prompts.eot)) * 7 % GROUPS
    dtype = context.dtype
    levels = Segment(start.astype(dtype)), Segment(context), Segment(own.astype(dtype), group)
    return tower.encode(levels, prompts.eot)


SHAPES = {"shared": (), "specific": (None,), "groups": (GROUPS,)}


def score_of(kind: str, classes: int, dtype: jnp.dtype = jnp.float32, **settings):
    """A function of (context, weights of the tower, prompts), and its arguments."""
    graphdef, state = nnx.split(TextTower(CONFIG, 16, **settings, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    shape = [classes if n is None else n for n in SHAPES[kind]]
    context = jnp.asarray(rng.normal(size=(*shape, K, WIDTH)), dtype)
    readout = jnp.asarray(rng.normal(size=(16,)), dtype)

    def score(context, state, prompts):
        features = encode(kind, nnx.merge(graphdef, state), prompts, context)
        return (jnp.sin(features * features) @ readout).sum(), features

    state = jax.tree.map(lambda a: a.astype(dtype), nnx.to_pure_dict(state))
    return score, (context, state, make_prompts(classes, specific=kind == "specific"))


@pytest.mark.parametrize("kind", SHAPES)
def test_chunks_change_neither_values_nor_gradients(kind: str) -> None:
    # 14 classes: at once, in 2 chunks of 7, in 3 of 5, of which one row is padding.
    settings = {}, {"class_chunk": 8}, {"class_chunk": 5, "remat": True}
    with jax.enable_x64(True):
        found = []
        for setting in settings:
            score, arguments = score_of(kind, 14, jnp.float64, **setting)
            found.append(jax.jit(jax.value_and_grad(score, (0, 1), has_aux=True))(*arguments))
        expected, *others = found
        assert min(np.abs(a).max() for a in jax.tree.leaves(expected[1])) > 1e-6
        for got in others:
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * np.abs(b).max())


@pytest.mark.parametrize("kind", ["specific", "groups"])
def test_devices_share_every_chunk(kind: str) -> None:
    """An eighth of the work on each of 8 devices, and no row of a prompt moves to another."""
    # 30 classes a device: 4 chunks of 8 each, two of them padding.
    score, (context, state, prompts) = score_of(kind, 240, class_chunk=64)

    def run(devices: int):
        mesh = make_mesh(jax.devices()[:devices])
        split, whole = split_over_data(mesh), replicated(mesh)
        by_class = PromptTokens(whole, split, split)
        gradient = jax.jit(
            jax.value_and_grad(score, has_aux=True),
            in_shardings=(split if kind == "specific" else whole, whole, by_class),
            out_shardings=((whole, split), split if kind == "specific" else whole),
        )
        compiled = gradient.lower(context, state, prompts).compile()
        return compiled, compiled(context, state, prompts)

    (alone, expected), (shared, got) = run(1), run(8)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
    # A prefix that all classes share is repeated on every device.
    flops = [compiled.cost_analysis()["flops"] for compiled in (shared, alone)]
    assert flops[0] < (0.14 if kind == "specific" else 0.25) * flops[1]
    text = shared.as_text()
    assert not re.search(r" (all-to-all|all-gather|collective-permute)(-start)?\(", text)


def test_memory_hardly_grows_with_the_classes() -> None:
    def scratch(classes: int, chunk: int | None) -> int:
        score, arguments = score_of("shared", classes, class_chunk=chunk)
        lowered = jax.jit(jax.value_and_grad(score, has_aux=True)).lower(*arguments)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    grown = [scratch(512, chunk) - scratch(64, chunk) for chunk in (None, 32)]
    assert grown[1] < grown[0] / 10


def test_impossible_chunks_are_refused() -> None:
    base = {"method": {"name": "coop"}, "data": {"name": "scenes"}}
    assert parse_config(base).backbone.class_chunk is None
    for value, message in ((0, "must be at least 1"), ("all", "must be int")):
        with pytest.raises(UserError, match=rf"'backbone\.class_chunk'.* {message}"):
            parse_config({**base, "backbone": {"class_chunk": value}})
    with pytest.raises(UserError, match=r"'backbone\.class_chunk'.* 20 .*use 16 or 24"):
        abstract_step({**base, "batch_size": 8, "backbone": {"class_chunk": 20}})
