"""The golden CLIPs in float64 with a toy tokenizer, and what references need of them.

Everything here is called under `jax.enable_x64(True)`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from references.prompt_methods import Encode

from mlclip_jax import methods
from mlclip_jax.clip import CLIP
from mlclip_jax.clip.arrays import from_state_dict
from mlclip_jax.clip.config_files import infer_config
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.methods.base import Batch, LabelInputs, Method, Progress, image_features
from mlclip_jax.training.step import take_apart

GOLDEN = Path(__file__).parents[1] / "golden"
SPACE = LabelSpace(("cat", "traffic light", "sky", "hair dryer", "bus"), name="five")
START = Progress(step=0, epoch=0)


class Words:
    """A tokenizer of one to three ids for each word, and one for each period."""

    sot, eot, context_length, vocab_size = 510, 511, 77, 512

    def encode(self, text: str) -> list[int]:
        words = text.replace(".", " . ").split()
        return [
            1 + (sum(map(ord, w)) * (7 + j)) % 509 for w in words for j in range(-(-len(w) // 3))
        ]


def load(name: str) -> tuple[CLIP, jax.Array]:
    """A golden CLIP, every value float64, and its images [b h w 3], normalised already."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        state = {key[3:]: file[key] for key in file if key.startswith("sd/")}
        images = file["in/images"]
    config = infer_config({key: value.shape for key, value in state.items()})
    clip = from_state_dict(state, config, dtype=jnp.float64)
    return double(clip), jnp.asarray(images.transpose(0, 2, 3, 1), jnp.float64)


def double(module: nnx.Module) -> nnx.Module:
    """`module` with every value float64."""
    nnx.update(module, jax.tree.map(lambda x: x.astype(jnp.float64), nnx.state(module)))
    return module


def make(spec: dict, clip: CLIP, space: LabelSpace = SPACE) -> Method:
    """A method over its own copy of `clip`, in float64."""
    built = methods.build(spec, nnx.clone(clip), space=space, encoder=Words(), rngs=nnx.Rngs(3))
    return double(built)


def inputs(method: Method, space: LabelSpace = SPACE, *, multiple_of: int = 1) -> LabelInputs:
    """Its label inputs."""
    return method.label_inputs(space, Words(), multiple_of=multiple_of)


def batch(images: jax.Array | dict[str, jax.Array], b: int, **captions: jax.Array) -> Batch:
    """b images, or features in their place, with targets of all three values."""
    targets = np.random.default_rng(5).integers(-1, 2, (b, len(SPACE))).astype(np.int8)
    targets[:, 0], targets[:, 1] = 1, -1
    return Batch(images, jnp.asarray(targets), jnp.arange(b), jnp.ones(b, bool), **captions)


class Result(NamedTuple):
    """What a method makes of a batch; gradients by path, of what trains and of nothing else."""

    loss: jax.Array
    gradients: dict[str, jax.Array]
    logits: jax.Array
    label_features: jax.Array
    parts: dict[str, jax.Array]


class Runner:
    """A method compiled once for its label inputs: batches and trained values are arguments."""

    def __init__(self, method: Method, labels: LabelInputs) -> None:
        parts = take_apart(method)
        self.start, self.frozen, self.labels = parts.trainable, parts.frozen, labels

        def scores(method: Method, batch: Batch, labels: LabelInputs) -> tuple:
            images = image_features(method, batch.images, progress=START)
            texts = method.encode_labels(labels, image_features=images, progress=START)
            return images, texts, method.logits(images, texts, labels)

        def loss(trainable: dict, frozen: dict, batch: Batch, labels: LabelInputs) -> tuple:
            method = parts.merge({**frozen, **trainable})
            extra = labels.num_classes - batch.targets.shape[1]
            batch = replace(batch, targets=jnp.pad(batch.targets, ((0, 0), (0, extra))))
            images, texts, logits = scores(method, batch, labels)
            value, parts_of_it = method.loss(
                logits, batch, labels, START, image_features=images, label_features=texts
            )
            return value, (logits, texts, parts_of_it)

        self.run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        self.scores = jax.jit(lambda batch: scores(method, batch, labels)[2])

    def __call__(self, batch: Batch, **changed: jax.Array) -> Result:
        """Of a batch, with other values at some paths ("/" written as "__")."""
        values = self.start | {path.replace("__", "/"): v for path, v in changed.items()}
        (loss, aux), gradients = self.run(values, self.frozen, batch, self.labels)
        return Result(loss, gradients, *aux)


def encoder(clip: CLIP) -> Encode:
    """The text tower as the references take it: every position of prompts at full length."""

    def encode(embeddings: jax.Array, eot: jax.Array) -> jax.Array:
        hidden = clip.text.hidden_states(embeddings)
        return hidden[jnp.arange(len(eot)), eot] @ clip.text.projection[...]

    return encode


def surroundings(clip: CLIP, m: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What stands around m context vectors: start [w], suffixes [c 76-m w], EOT's places [c]."""
    table, ends, places = clip.text.token_embedding[...], [], []
    for name in SPACE.names:
        ids = [*Words().encode(name), *Words().encode("."), Words.eot]
        places.append(m + len(ids))
        ends.append(ids + [0] * (76 - m - len(ids)))
    return table[Words.sot], table[np.array(ends)], jnp.asarray(places)


def same(got, expected, bar: float = 1e-6) -> None:
    """max |a - b| / max |b| at most `bar`, of float64 arrays.

    JAX's attention takes its softmax in float32 whatever it is given, hence no tighter bar.
    """
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape and got.dtype == expected.dtype == np.float64
    assert np.abs(expected).max() > 0
    assert np.abs(got - expected).max() <= bar * np.abs(expected).max()


def same_gradients(got: dict, expected: dict, bar: float = 1e-5) -> None:
    """`same` for each path, and no path more."""
    assert got.keys() == expected.keys()
    for path, value in expected.items():
        same(got[path], value, bar)


def padding_changes_nothing(plain: Result, method: Method, batch: Batch, *counts: Any) -> None:
    """`plain`, of the five classes, is what they give when they are padded to eight."""
    labels = inputs(method, multiple_of=8)
    labels = labels.with_counts(*counts) if counts else labels
    assert labels.mask.tolist() == [True] * 5 + [False] * 3
    padded = Runner(method, labels)(batch)
    assert padded.logits.shape == (len(batch.targets), 8)
    same(padded.logits[:, :5], plain.logits)
    same(padded.loss, plain.loss)
    same_gradients(padded.gradients, plain.gradients)
