"""What a mini CLIP can do: zero-shot, trained heads, learned prompts."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mini.common import SPACE, average_precision, by_group, unit
from mini.text import ZERO_SHOT, token_ids
from mlclip_jax.clip import CLIP
from mlclip_jax.clip.tokenizer import Tokenizer

Split = tuple[np.ndarray, np.ndarray]


def minimise(loss: Any, params: Any, data: Split, *, steps: int, rate: float) -> Any:
    """Adam with cosine decay on random batches of 256; `loss(params, x, y)`."""
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @jax.jit
    def step(params: Any, state: Any, x: Any, y: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    state, rng = tx.init(params), np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.integers(len(data[0]), size=256)
        params, state = step(params, state, data[0][rows], data[1][rows])
    return params


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean binary cross-entropy of logits [b c] with targets in {+1, -1}."""
    return optax.sigmoid_binary_cross_entropy(logits, (targets > 0).astype(jnp.float32)).mean()


def linear_head(train: Split, test: Split) -> np.ndarray:
    """Per-label AP of a linear layer on unit pooled features, trained with full labels [22]."""
    zero = {"w": jnp.zeros((train[0].shape[1], len(SPACE))), "b": jnp.zeros(len(SPACE))}
    head = minimise(
        lambda p, x, y: cross_entropy(x @ p["w"] + p["b"], y), zero, train, steps=3000, rate=0.1
    )
    return average_precision(test[0] @ np.asarray(head["w"]), test[1])


def mlp_head(train: Split, test: Split) -> np.ndarray:
    """Per-label AP of a layer of 256 GELUs and a linear one on the same features [22]."""
    keys = jax.random.split(jax.random.key(0))
    d, h = train[0].shape[1], 256
    start = {
        "u": jax.random.normal(keys[0], (d, h)) * 2 / d**0.5,
        "a": jnp.zeros(h),
        "v": jax.random.normal(keys[1], (h, len(SPACE))) / h**0.5,
        "b": jnp.zeros(len(SPACE)),
    }

    def logits(p: Any, x: Any) -> Any:
        return jax.nn.gelu(8 * x @ p["u"] + p["a"]) @ p["v"] + p["b"]

    head = minimise(
        lambda p, x, y: cross_entropy(logits(p, x), y), start, train, steps=3000, rate=3e-3
    )
    return average_precision(np.asarray(logits(head, test[0])), test[1])


def learned_context(clip: CLIP, tokenizer: Tokenizer, train: Split, test: Split) -> np.ndarray:
    """Per-label AP of four learned words in place of "a photo of a" (CoOp), towers frozen [22]."""
    ids = token_ids(tokenizer, [ZERO_SHOT.format(n) for n in SPACE.prompt_names])
    context = clip.text.token_embedding[...][ids[0, 1:5]]
    slots = jnp.asarray(ids).at[:, 1:5].set(-1 - jnp.arange(4))
    graph, frozen = nnx.split(clip.text, nnx.Param)
    frozen = nnx.to_pure_dict(frozen)
    eot = jnp.asarray((ids == tokenizer.eot).argmax(1))

    def features(p: Any) -> Any:
        from mlclip_jax.clip import Segment

        text = nnx.merge(graph, frozen)
        return unit(text.encode((Segment(text.embed(slots, p["context"])),), eot))

    start = {"context": context, "log_scale": clip.logit_scale[...], "bias": jnp.asarray(0.0)}
    best = minimise(
        lambda p, x, y: cross_entropy(
            jnp.exp(p["log_scale"]) * x @ features(p).T + p["bias"], y
        ),
        start, train, steps=600, rate=5e-3,
    )  # fmt: skip
    return average_precision(test[0] @ np.asarray(features(best)).T, test[1])


def measure(clip: CLIP, tokenizer: Tokenizer, train: Split, test: Split) -> dict[str, Any]:
    """All figures, mAP by group. `train` and `test`: unit pooled features [n d], labels [n 22]."""
    began = time.time()
    ids = token_ids(tokenizer, [ZERO_SHOT.format(n) for n in SPACE.prompt_names])
    text = np.asarray(unit(clip.encode_text(jnp.asarray(ids))))
    zero_shot = by_group(average_precision(test[0] @ text.T, test[1]))
    figures = {
        "chance": by_group((test[1] > 0).mean(0)),
        "zero_shot": zero_shot,
        "learned_context": by_group(learned_context(clip, tokenizer, train, test)),
        "linear_head": by_group(linear_head(train, test)),
        "mlp_head": by_group(mlp_head(train, test)),
    }
    best = max(figures[k]["all"] for k in ("linear_head", "mlp_head"))
    figures["zero_shot_over_trained_head"] = zero_shot["all"] / best
    together = np.corrcoef((train[1] > 0).T)
    upper = np.triu_indices(len(SPACE), 1)
    figures["text_similarity_follows_cooccurrence"] = float(
        np.corrcoef((text @ text.T)[upper], together[upper])[0, 1]
    )
    figures["seconds"] = time.time() - began
    return figures
