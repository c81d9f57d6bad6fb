"""Prompts: templates around a label's name, and learned context vectors in their place.

Host side, names become `PromptTokens`: everything up to the name that all labels share is the
prefix, and is encoded once (see `mlclip_jax.clip.text`). A learned vector is a negative id, so
every layout (context before, after or around the name) is a row of ids and nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mlclip_jax.clip import CLIP, PromptTokens
from mlclip_jax.clip.transformer import Linear, start_as_torch
from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import readable, split_template

ClassPosition = Literal["end", "middle", "front"]

#: Widths that the classes' own tokens are padded to: few, so that another label set seldom
#: means another compilation.
WIDTHS = (2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 32, 40, 48, 64, 77)


class Encoder(Protocol):
    """What prompts need of a tokenizer: `mlclip_jax.clip.tokenizer.Tokenizer` has it."""

    sot: int
    eot: int
    context_length: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without start and end."""


def pack(
    prefix: Sequence[int], own: Sequence[Sequence[int]], names: Sequence[str], encoder: Encoder
) -> PromptTokens:
    """Rows of ids into arrays, EOT appended, padded to the next of `WIDTHS`.

    Args:
        prefix: ids that every prompt begins with (start of text included).
        own: each class's ids after the prefix, without EOT.
        names: of the classes, for messages.
        encoder: gives EOT and the context length.

    Raises:
        UserError: a prompt longer than the context, naming its label.
    """
    room = encoder.context_length - len(prefix) - 1
    for name, row in zip(names, own, strict=True):
        if len(row) > room:
            raise UserError(
                f"the prompt of label {name!r} has {len(prefix) + len(row) + 1} tokens and the "
                f"text tower takes {encoder.context_length}; shorten the name or the template"
            )
    longest = max(len(row) for row in own) + 1
    width = min((w for w in WIDTHS if w >= longest), default=longest)
    ids = np.zeros((len(own), min(width, room + 1)), np.int32)
    for i, row in enumerate(own):
        ids[i, : len(row) + 1] = [*row, encoder.eot]
    eot = np.array([len(row) for row in own], np.int32)
    return PromptTokens(np.array(prefix, np.int32), ids, eot)


def template_prompts(template: str, names: Sequence[str], encoder: Encoder) -> PromptTokens:
    """A fixed template around each name, such as "a photo of a {}.".

    Raises:
        UserError: where the template has not exactly one "{}", or a prompt is too long.
    """
    head, tail = split_template(template)
    if head and not head[-1].isspace():  # the name continues a word: nothing is shared
        head, prefix = "", [encoder.sot]
        texts = [template.replace("{}", readable(name)) for name in names]
    else:
        prefix = [encoder.sot, *encoder.encode(head)]
        texts = [readable(name) + tail for name in names]
    return pack(prefix, [encoder.encode(text) for text in texts], names, encoder)


def template_features(
    clip: CLIP, names: Sequence[str], encoder: Encoder, template: str = "a photo of a {}."
) -> Array:
    """Text features of a template around each name: float32 [n d], not normalised.

    Raises:
        UserError: as `template_prompts`.
    """
    prompts = template_prompts(template, names, encoder)
    graphdef, state = nnx.split(clip)

    @jax.jit
    def encode(state: nnx.State, prompts: PromptTokens) -> Array:
        features = nnx.merge(graphdef, state).encode_prompts(prompts)
        return features.astype(jnp.promote_types(features.dtype, jnp.float32))

    return encode(state, prompts)


def context_prompts(
    n_ctx: int,
    names: Sequence[str],
    encoder: Encoder,
    *,
    position: ClassPosition = "end",
    class_specific: bool = False,
) -> PromptTokens:
    """Learned context around each name and a final period (CoOp, Zhou et al., 2022).

    end: [V1..Vk][name].   middle: [V1..Vk/2][name][..Vk].   front: [name][V1..Vk].
    Ids -1..-k stand for V1..Vk. Shared context before the name belongs to the prefix;
    class-specific context cannot.
    """
    slots = [-(j + 1) for j in range(n_ctx)]
    split = {"end": n_ctx, "middle": n_ctx // 2, "front": 0}[position]
    before, after = slots[:split], slots[split:]
    own = []
    for name in map(readable, names):
        if after:
            own.append([*encoder.encode(name), *after, *encoder.encode(".")])
        else:
            own.append(encoder.encode(f"{name}."))
    if class_specific:
        return pack([encoder.sot], [[*before, *row] for row in own], names, encoder)
    return pack([encoder.sot, *before], own, names, encoder)


def tuned_prompts(
    template: str, names: Sequence[str], encoder: Encoder, *, ends: bool = False
) -> PromptTokens:
    """A template around each name with learned vectors in the places of its words (MKT).

    Ids -1..-k stand for the words before the name, then those after it; with `ends` -(k+1) stands
    for the start of text and -(k+2) for its end.

    Raises:
        UserError: where the template has not exactly one "{}", or a prompt is too long.
    """
    before, after = (len(encoder.encode(part)) for part in split_template(template))
    k = before + after
    slots = [-(j + 1) for j in range(k)]
    own = [[*encoder.encode(readable(name)), *slots[before:]] for name in names]
    prompts = pack([encoder.sot, *slots[:before]], own, names, encoder)
    if not ends:
        return prompts
    prefix = np.concatenate([[-(k + 1)], prompts.prefix[1:]]).astype(np.int32)
    last = np.arange(prompts.own.shape[1]) == prompts.eot[:, None]
    return PromptTokens(prefix, np.where(last, -(k + 2), prompts.own), prompts.eot)


class MetaNetwork(nnx.Module):
    """Linear-ReLU-Linear from a feature to context vectors or their shift (HSPNet, CoCoOp).

    Kernels and biases start uniform in +-1/sqrt(inputs).
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, *, rngs: nnx.Rngs) -> None:
        self.linear1 = Linear(inputs, hidden, rngs=rngs)
        self.linear2 = Linear(hidden, outputs, rngs=rngs)
        for layer in (self.linear1, self.linear2):
            start_as_torch(layer, rngs)

    def __call__(self, x: Array) -> Array:
        """[n inputs] -> [n outputs]."""
        return self.linear2(jax.nn.relu(self.linear1(x)))


class GroupMetaNetwork(MetaNetwork):
    """Context vectors from a group's feature (HSPNet, Eq. 3)."""

    def __init__(self, features: int, n_ctx: int, width: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(features, n_ctx * width, n_ctx * width, rngs=rngs)
        self.n_ctx = n_ctx

    def __call__(self, groups: Array) -> Array:
        """[g d] -> [g k w]."""
        return super().__call__(groups).reshape(groups.shape[0], self.n_ctx, -1)


class Context(nnx.Module):
    """Learned context vectors: [k w], or [c k w] with one set for each class.

    Args:
        n_ctx: k, where they start at random, N(0, 0.02^2).
        words: start from these words' embeddings instead; k is their number of tokens.
        classes: c for class-specific vectors, None for one set shared by all.
        table: the token embedding [v w].
        encoder: tokenizer for `words`.

    Raises:
        UserError: fewer than one vector, or `words` without any token.
    """

    def __init__(
        self,
        *,
        n_ctx: int,
        words: str,
        classes: int | None,
        table: Array,
        encoder: Encoder,
        rngs: nnx.Rngs,
    ) -> None:
        if words:
            ids = encoder.encode(readable(words))
            if not ids:
                raise UserError(f"no context can start from {words!r}: it has no tokens")
            start = table[np.array(ids)]
            start = start if classes is None else jnp.repeat(start[None], classes, axis=0)
        elif n_ctx < 1:
            raise UserError(f"method.n_ctx is {n_ctx}: a prompt needs a vector or words (ctx_init)")
        else:
            lead = () if classes is None else (classes,)
            start = 0.02 * jax.random.normal(rngs.params(), (*lead, n_ctx, table.shape[-1]))
        self.vectors = nnx.Param(start)

    def __call__(self, index: Array | None = None) -> Array:
        """The vectors, rows in the order of `index` [c] where they are class-specific."""
        vectors = self.vectors[...]
        return vectors if vectors.ndim == 2 or index is None else vectors[index]
