"""The text tower's short cuts give what plain encoding of every full prompt gives."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlclip_jax.clip import CLIP, CLIPConfig, PromptTokens, Segment, TextConfig, ViTConfig
from mlclip_jax.clip.text import end_of_text

EOT, SOT, WIDTH, CLASSES = 59, 58, 32, 6
CONFIG = CLIPConfig(
    16, ViTConfig(16, 8, 32, 2, 2, 64), TextConfig(60, 77, WIDTH, layers=2, heads=2, mlp_width=64)
)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def clip() -> CLIP:
    model = CLIP(CONFIG, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for _, variable in nnx.to_flat_state(nnx.state(model)):  # no zero biases, no unit scales
        noise = rng.normal(size=variable.get_value().shape).astype(np.float32)
        variable.set_value(variable.get_value() + 0.1 * noise)
    return model


@jax.jit
def plain(embeddings: jax.Array, eot: jax.Array, weights: dict) -> jax.Array:
    """Every prompt alone, at the full 77 positions, pooled at EOT: the definition, written out."""

    def norm(x: jax.Array, p: dict) -> jax.Array:
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * p[
            "scale"
        ] + p["bias"]

    def linear(x: jax.Array, p: dict) -> jax.Array:
        return x @ p["kernel"] + p["bias"]

    c, t, w = embeddings.shape
    x = jnp.zeros((c, 77, w)).at[:, :t].set(embeddings) + weights["position_embedding"]
    for block in weights["blocks"].values():
        q, k, v = jnp.split(linear(norm(x, block["norm1"]), block["attention"]["qkv"]), 3, -1)
        q, k, v = (y.reshape(c, 77, 2, w // 2).swapaxes(1, 2) for y in (q, k, v))
        scores = q @ k.swapaxes(2, 3) / jnp.sqrt(w // 2)
        scores = jnp.where(jnp.tril(jnp.ones((77, 77), bool)), scores, -jnp.inf)
        y = (jax.nn.softmax(scores, -1) @ v).swapaxes(1, 2).reshape(c, 77, w)
        x = x + linear(y, block["attention"]["out"])
        h = linear(norm(x, block["norm2"]), block["mlp"]["up"])
        x = x + linear(h / (1 + jnp.exp(-1.702 * h)), block["mlp"]["down"])
    return norm(x, weights["norm_final"])[jnp.arange(c), eot] @ weights["projection"]


def weights_of(clip: CLIP) -> dict:
    state = nnx.to_pure_dict(nnx.state(clip.text))
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), state)


def names(rng: np.random.Generator) -> list[list[int]]:
    return [list(rng.integers(1, 50, size=n)) for n in (1, 3, 2, 1, 4, 2)]


def pack(prefix: list[int], rows: list[list[int]]) -> PromptTokens:
    own = np.zeros((len(rows), max(map(len, rows)) + 1), np.int32)
    for i, row in enumerate(rows):
        own[i, : len(row) + 1] = [*row, EOT]
    return PromptTokens(
        jnp.array(prefix, jnp.int32), jnp.array(own), jnp.array([len(r) for r in rows])
    )


K = 4
SLOTS = [-(j + 1) for j in range(K)]
# kind: (prefix, what surrounds each name, shape of the learned context)
KINDS = {
    "template": ([SOT, 7, 8, 7], ([], [9]), None),
    "no shared words": ([SOT], ([], [9]), None),
    "unified end": ([SOT, *SLOTS], ([], [9]), (K, WIDTH)),
    "unified middle": ([SOT, *SLOTS[:2]], ([], [*SLOTS[2:], 9]), (K, WIDTH)),
    "unified front": ([SOT], ([], [*SLOTS, 9]), (K, WIDTH)),
    "specific end": ([SOT], (SLOTS, [9]), (CLASSES, K, WIDTH)),
    "specific middle": ([SOT], (SLOTS[:2], [*SLOTS[2:], 9]), (CLASSES, K, WIDTH)),
    "specific front": ([SOT], ([], [*SLOTS, 9]), (CLASSES, K, WIDTH)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_equal_plain_encoding(clip: CLIP, kind: str) -> None:
    prefix, (before, after), shape = KINDS[kind]
    rng = np.random.default_rng(2)
    prompts = pack(prefix, [[*before, *name, *after] for name in names(rng)])
    context = None if shape is None else jnp.array(rng.normal(size=shape))
    weights = jnp.array(rng.normal(size=(CLASSES, 16)))

    def direct(context: jax.Array | None) -> jax.Array:
        ids = np.concatenate([np.tile(prefix, (CLASSES, 1)), np.asarray(prompts.own)], axis=1)
        table = np.asarray(clip.text.token_embedding[...], np.float64)
        rows = jnp.array(np.where((ids >= 0)[..., None], table[np.maximum(ids, 0)], 0))
        if context is not None:  # each learned vector put where its negative id stands
            place = jnp.array(ids[..., None] == -1 - np.arange(K), jnp.float64)
            each = jnp.broadcast_to(context, (CLASSES, K, WIDTH))
            rows = rows + jnp.einsum("ctk,ckw->ctw", place, each)
        return plain(rows, prompts.eot + len(prefix), weights_of(clip))

    @jax.jit
    def ours(context: jax.Array | None) -> jax.Array:
        return clip.text.encode_prompts(prompts, context, dtype=jnp.float64)

    expected = direct(context)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(ours(context), expected, rtol=0, atol=1e-10)
    if context is not None:
        grads = [
            jax.jit(jax.grad(lambda c, f=f: (f(c) * weights).sum()))(context)
            for f in (direct, ours)
        ]
        assert np.abs(grads[0]).max() > 1e-3
        np.testing.assert_allclose(grads[1], grads[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["template", "specific middle"])
def test_gradients_of_the_tower_equal_plain_encoding(clip: CLIP, kind: str) -> None:
    """For methods that train the text tower: every weight, through every short cut."""
    prefix, (before, after), shape = KINDS[kind]
    rng = np.random.default_rng(6)
    prompts = pack(prefix, [[*before, *name, *after] for name in names(rng)])
    context = None if shape is None else jnp.array(rng.normal(size=shape))
    weights = jnp.array(rng.normal(size=(CLASSES, 16)))
    graphdef, state = nnx.split(clip.text)
    prefixes = jnp.broadcast_to(prompts.prefix, (CLASSES, len(prefix)))
    ids = jnp.concatenate([prefixes, prompts.own], axis=1)

    def direct(state: dict) -> jax.Array:
        rows = nnx.merge(graphdef, state).embed(ids, context)
        return (plain(rows, prompts.eot + len(prefix), state) * weights).sum()

    def ours(state: dict) -> jax.Array:
        tower = nnx.merge(graphdef, state)
        return (tower.encode_prompts(prompts, context, dtype=jnp.float64) * weights).sum()

    expected, got = (jax.jit(jax.grad(f))(weights_of(clip)) for f in (direct, ours))
    assert jax.tree.structure(got) == jax.tree.structure(nnx.to_pure_dict(state))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.abs(b).max() > 1e-6
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)


def test_group_contexts_equal_plain_encoding(clip: CLIP) -> None:
    """Start token, then each group's own context, then the names: three levels."""
    rng = np.random.default_rng(3)
    group = jnp.array([2, 0, 1, 1, 0, 2])
    prompts = pack([SOT], [[*name, 9] for name in names(rng)])
    context = jnp.array(rng.normal(size=(3, K, WIDTH)))
    weights = jnp.array(rng.normal(size=(CLASSES, 16)))
    text = clip.text
    sot, own = text.embed(prompts.prefix[None]), text.embed(prompts.own)

    def direct(context: jax.Array) -> jax.Array:
        start = jnp.broadcast_to(sot, (CLASSES, 1, WIDTH))
        full = jnp.concatenate([start, context[group], own], axis=1)
        return plain(full, prompts.eot + 1 + K, weights_of(clip))

    @jax.jit
    def ours(context: jax.Array) -> jax.Array:
        levels = (Segment(sot), Segment(context), Segment(own, group))
        return text.encode([Segment(s.embeddings.astype(float), s.parent) for s in levels],
                           prompts.eot)  # fmt: skip

    np.testing.assert_allclose(ours(context), direct(context), rtol=0, atol=1e-10)
    grad = [jax.jit(jax.grad(lambda c, f=f: (f(c) * weights).sum())) for f in (direct, ours)]
    text.remat = True  # recomputed activations must give the same gradient
    try:
        got = grad[1](context)
    finally:
        text.remat = False
    np.testing.assert_allclose(got, grad[0](context), rtol=0, atol=1e-10)


def test_dual_contexts_equal_two_separate_encodings(clip: CLIP) -> None:
    """Each name after two different contexts (DualCoOp): both in one call."""
    rng = np.random.default_rng(4)
    prompts = pack([SOT], [[*name, 9] for name in names(rng)])
    context = jnp.array(rng.normal(size=(2, K, WIDTH)))
    sot, own = clip.text.embed(prompts.prefix[None]), clip.text.embed(prompts.own)
    levels = [
        Segment(sot.astype(float)),
        Segment(context),
        Segment(jnp.concatenate([own, own]).astype(float), jnp.repeat(jnp.arange(2), CLASSES)),
    ]
    encode = jax.jit(clip.text.encode)
    both = encode(levels, jnp.concatenate([prompts.eot] * 2)).reshape(2, CLASSES, -1)
    for i in range(2):
        one = PromptTokens(jnp.array([SOT, *SLOTS]), prompts.own, prompts.eot)
        alone = jax.jit(partial(clip.text.encode_prompts, dtype=jnp.float64))(one, context[i])
        np.testing.assert_allclose(both[i], alone, rtol=0, atol=1e-10)


def test_token_ids_equal_plain_encoding_and_length_does_not_matter(clip: CLIP) -> None:
    rng = np.random.default_rng(5)
    rows = [[SOT, *name, EOT] for name in names(rng)]
    ids = np.zeros((CLASSES, 77), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    embeddings = clip.text.embed(jnp.array(ids)).astype(float)
    expected = plain(embeddings, end_of_text(jnp.array(ids), None), weights_of(clip))
    for length in (77, max(map(len, rows))):
        got = clip.text(jnp.array(ids[:, :length]), dtype=jnp.float64)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)


def test_end_of_text_rules() -> None:
    ids = jnp.array([[1, 9, 50, 3, 50], [50, 60, 2, 0, 0]])
    assert end_of_text(ids, None).tolist() == [2, 1]
    assert end_of_text(ids, 50).tolist() == [2, 0]


def test_too_long_prompts_are_refused(clip: CLIP) -> None:
    with pytest.raises(ValueError, match="78 tokens exceed"):
        clip.text.encode([Segment(jnp.zeros((2, 78, WIDTH)))], jnp.zeros((2,), jnp.int32))
