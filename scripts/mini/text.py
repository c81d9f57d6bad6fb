"""Stage 2: the text tower learns to match the locked image tower's features."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mini.common import (
    PAIRS,
    SEED,
    SPACE,
    average_precision,
    by_group,
    log,
    phrase_targets,
    save_npz,
    unit,
)
from mlclip_jax.clip import CLIPConfig, TextTower
from mlclip_jax.clip.tokenizer import Tokenizer
from mlclip_jax.data.scenes import Scenes

# The sentences phrases are shown in. The usual zero-shot prompt is not among them: as with the
# published CLIPs, there is something left for learned prompts to find.
TEMPLATES = (
    "{}",
    "a {}.",
    "there is a {} in the scene",
    "this photo contains {}",
    "this is a {} photo",
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
    "a picture of a {}.",
    "an image of the {}.",
)
ZERO_SHOT = "a photo of a {}."
# Fixed, as CLIP's files have no place for a bias. Pairs are seven times rarer than single labels;
# with this much taken off their logits, single labels without any bias are near their frequency.
PHRASE_BIAS = -2.0


def token_ids(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """int32 [n t], cut to the longest text."""
    ids = tokenizer(texts)
    return ids[:, : int((ids == tokenizer.eot).argmax(1).max()) + 1]


def train_text(
    config: CLIPConfig,
    tokenizer: Tokenizer,
    features: np.ndarray,
    scenes: Scenes,
    validation: tuple[np.ndarray, np.ndarray],
    workdir: Path,
    *,
    steps: int,
    caption_weight: float,
    peak: float = 1e-3,
) -> None:
    """Writes text.npz: the text tower's leaves and the temperature.

    Args:
      config: of the whole model.
      tokenizer: of the model.
      features: the locked tower's unit features of all `scenes` [n d].
      scenes: training scenes.
      validation: unit features [m d] and labels [m 22] for the log.
      workdir: where to write.
      steps: training steps of 256 scenes, or of all where they are fewer.
      caption_weight: of the caption loss.
      peak: learning rate after warm-up.
    """
    tower = TextTower(config.text, config.embed_dim, rngs=nnx.Rngs(SEED + 1))
    graph, params = nnx.split(tower, nnx.Param)
    train = {
        "tower": nnx.to_pure_dict(params),
        "log_scale": jnp.asarray(np.log(10.0), jnp.float32),
        "caption_bias": jnp.asarray(-4.0, jnp.float32),
    }
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            optax.warmup_cosine_decay_schedule(0.0, peak, min(50, steps // 3), steps, 0.02 * peak),
            b2=0.98,
            weight_decay=0.05,
            mask=jax.tree.map(lambda a: a.ndim > 1, train),
        ),
    )
    state = tx.init(train)
    phrase_ids = [token_ids(tokenizer, [t.format(p) for p in PAIRS]) for t in TEMPLATES]
    longest = max(ids.shape[1] for ids in phrase_ids)
    phrase_ids = np.stack(
        [np.pad(ids, ((0, 0), (0, longest - ids.shape[1]))) for ids in phrase_ids]
    )
    caption_ids = token_ids(tokenizer, [scenes.caption(i) for i in range(len(scenes))])
    targets = np.stack([phrase_targets(scenes, i, 1)[0] for i in range(len(scenes))])
    targets = targets[:, : len(PAIRS)]
    test_ids = token_ids(tokenizer, [ZERO_SHOT.format(n) for n in SPACE.prompt_names])

    @jax.jit
    def step(train: Any, state: Any, x: Any, y: Any, ids: Any, captions: Any) -> Any:
        def loss(train: Any) -> Any:
            model = nnx.merge(graph, train["tower"])
            scale = jnp.exp(train["log_scale"])
            logits = scale * x @ unit(model(ids, dtype=jnp.float32)).T + PHRASE_BIAS
            phrases = optax.sigmoid_binary_cross_entropy(logits, y).sum(-1).mean()
            some = x[: captions.shape[0]]
            logits = scale * some @ unit(model(captions, dtype=jnp.float32)).T
            same = jnp.eye(len(some))
            match = optax.sigmoid_binary_cross_entropy(logits + train["caption_bias"], same)
            match = match.sum(-1).mean()
            return phrases + caption_weight * match, (phrases, match)

        (_, parts), grads = jax.value_and_grad(loss, has_aux=True)(train)
        updates, state = tx.update(grads, state, train)
        return optax.apply_updates(train, updates), state, parts

    encode = jax.jit(lambda params, ids: unit(nnx.merge(graph, params)(ids, dtype=jnp.float32)))
    rng = np.random.default_rng(SEED)
    began = time.time()
    for number in range(1, steps + 1):
        rows = rng.choice(len(scenes), min(256, len(scenes)), replace=False)
        ids = phrase_ids[rng.integers(len(TEMPLATES))]
        some = caption_ids[rows[:64]]
        train, state, parts = step(train, state, features[rows], targets[rows], ids, some)
        if number % 100 == 0 or number == steps:
            scores = validation[0] @ np.asarray(encode(train["tower"], test_ids)).T
            ap = by_group(average_precision(scores, validation[1]))
            log(
                step=number,
                seconds=time.time() - began,
                phrases=float(parts[0]),
                captions=float(parts[1]),
                scale=float(jnp.exp(train["log_scale"])),
                **ap,
            )
    save_npz(workdir / "text.npz", {"text": train["tower"], "logit_scale": train["log_scale"]})
