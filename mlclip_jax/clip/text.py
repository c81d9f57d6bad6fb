"""The text tower, exact and without waste.

The tower is causal and pooled at the end-of-text token (EOT), so three things need never be
computed: positions after EOT, a prefix that several prompts share more than once, and the last
block anywhere but at EOT. A set of prompts is therefore given as levels of `Segment`s: the
start token and words or learned vectors that all prompts share; perhaps one segment per label
group; and each class's own tokens. The result, gradients included, is that of encoding every
prompt alone at full length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mlclip_jax.clip.config import TextConfig
from mlclip_jax.clip.transformer import KeyValue, LayerNorm, make_blocks


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PromptTokens:
    """Tokenised prompts of c classes that begin alike.

    The prompt of class i is `prefix` followed by `own[i]` up to its EOT. A negative id -(j+1)
    stands for learned context vector j; `own` is zero padded after EOT.

    prefix int32 [k]; own int32 [c s]; eot int32 [c], the position of EOT within `own`.
    """

    prefix: Array
    own: Array
    eot: Array


class Segment(NamedTuple):
    """One level of prompts: n runs of s input embeddings, each continuing a run one level up.

    embeddings [n s w], positions not added; parent int32 [n], the index of the run it continues
    in the level before (None: the first run, shared by all).
    """

    embeddings: Array
    parent: Array | None = None


def end_of_text(ids: Array, eot_id: int | None) -> Array:
    """Position of the (first) EOT in each row: [c t] -> [c]; None: the largest id is EOT."""
    return jnp.argmax(ids if eot_id is None else ids == eot_id, axis=-1)


class TextTower(nnx.Module):
    """Causal transformer over BPE tokens or over learned prompt embeddings."""

    def __init__(
        self, config: TextConfig, embed_dim: int, *, remat: bool = False, rngs: nnx.Rngs
    ) -> None:
        w, init = config.width, nnx.initializers.normal
        self.token_embedding = nnx.Param(init(0.02)(rngs.params(), (config.vocab_size, w)))
        self.position_embedding = nnx.Param(init(0.01)(rngs.params(), (config.context_length, w)))
        self.blocks = make_blocks(
            config.layers, w, config.heads, config.mlp_width, config.activation, config.norm_eps,
            rngs=rngs,
        )  # fmt: skip
        self.norm_final = LayerNorm(w, eps=config.norm_eps)
        self.projection = nnx.Param(init(w**-0.5)(rngs.params(), (w, embed_dim)))
        self.config = config
        self.remat = remat

    def embed(self, ids: Array, context: Array | None = None) -> Array:
        """Input embeddings of token ids: [... t] -> [... t w].

        Args:
            ids: int32; a negative id -(j+1) is context vector j.
            context: learned vectors [k w] shared by all rows, or [c k w], one set per row of
                `ids` [c t]; needed where `ids` has negative entries.
        """
        words = self.token_embedding[...][jnp.maximum(ids, 0)]
        if context is None:
            return words
        slot = jnp.maximum(-ids - 1, 0)
        if context.ndim == 2:
            learned = context[slot]
        else:
            learned = jnp.take_along_axis(context, slot[..., None], axis=-2)
        return jnp.where((ids < 0)[..., None], learned, words)

    def hidden_states(self, embeddings: Array) -> Array:
        """Final states at every position, after the last norm: [c t w] -> [c t w]."""
        x = embeddings + self.position_embedding[: embeddings.shape[1]].astype(embeddings.dtype)
        for block in self.blocks:
            x = block(x, causal=True)
        return self.norm_final(x)

    def encode(self, segments: Sequence[Segment], eot: Array) -> Array:
        """Text features of the prompts that end in the last level: -> [c d], not normalised.

        Args:
            segments: levels in order; all but the last are read in full by their children.
            eot: int32 [c], position of EOT within each run of the last level.

        Raises:
            ValueError: where the prompts are longer than the tower's context.
        """
        levels, start = [], 0
        for segment in segments:
            end = start + segment.embeddings.shape[1]
            if end > self.config.context_length:
                raise ValueError(
                    f"prompts of {end} tokens exceed the text tower's context of "
                    f"{self.config.context_length}"
                )
            positions = self.position_embedding[...][start:end]
            x = segment.embeddings
            levels.append(x + positions.astype(x.dtype))
            start = end
        ancestors = _ancestors([segment.parent for segment in segments])
        *body, last = self.blocks

        def run(block: nnx.Module, levels: list[Array]) -> list[Array]:
            out, keys_values = [], []
            for x, above in zip(levels, ancestors, strict=True):
                y, kv = block.extend(x, _gather(keys_values, above))
                out.append(y)
                keys_values.append(kv)
            return out

        for block in body:
            step = lambda levels, block=block: run(block, levels)  # noqa: E731
            levels = (jax.checkpoint(step) if self.remat else step)(levels)
        context = _gather([last.keys_values(x) for x in levels[:-1]], ancestors[-1])
        x = last.read(levels[-1], eot, causal=True, context=context)
        return self.norm_final(x) @ self.projection[...].astype(x.dtype)

    def encode_prompts(
        self, prompts: PromptTokens, context: Array | None = None, *, dtype: jnp.dtype
    ) -> Array:
        """Text features of tokenised prompts: [c d], the shared prefix encoded once.

        Args:
            prompts: the tokens; negative ids name vectors of `context`.
            context: [k w] shared, or [c k w] per class (the prefix may then hold none).
            dtype: compute dtype.
        """
        shared = context if context is None or context.ndim == 2 else None
        own = Segment(self.embed(prompts.own, context).astype(dtype))
        if prompts.prefix.shape[0] == 0:
            return self.encode((own,), prompts.eot)
        prefix = Segment(self.embed(prompts.prefix[None], shared).astype(dtype))
        return self.encode((prefix, own), prompts.eot)

    def encode_tokens(self, ids: Array, *, dtype: jnp.dtype) -> tuple[Array, Array, Array]:
        """Whole texts, every position projected as EOT is.

        Args:
            ids: int32 [n t]; trim to the longest first.
            dtype: compute dtype.

        Returns:
            Features at EOT [n d] and at all positions [n t d], not normalised; bool [n t], False
            after EOT.
        """
        hidden = self.hidden_states(self.embed(ids).astype(dtype))
        tokens = hidden @ self.projection[...].astype(dtype)
        eot = end_of_text(ids, self.config.eot_id)[:, None]
        pooled = jnp.take_along_axis(tokens, eot[..., None], axis=1)[:, 0]
        return pooled, tokens, jnp.arange(ids.shape[1]) <= eot

    def __call__(self, ids: Array, *, dtype: jnp.dtype) -> Array:
        """Text features of token ids: int32 [c t] -> [c d]; trim ids to the longest first."""
        embeddings = Segment(self.embed(ids).astype(dtype))
        return self.encode((embeddings,), end_of_text(ids, self.config.eot_id))


def _ancestors(parents: Sequence[Array | None]) -> list[list[Array | None]]:
    """For each level, the row of every level above that its runs continue (None: row 0)."""
    out: list[list[Array | None]] = []
    for level, parent in enumerate(parents):
        if level == 0:
            out.append([])
        elif parent is None:
            out.append([None] * level)
        else:
            up = [a if a is None else a[parent] for a in out[-1]]
            out.append([*up, parent])
    return out


def _gather(keys_values: Sequence[KeyValue], rows: Sequence[Array | None]) -> list[KeyValue]:
    """Keys and values of the ancestors; shared ones stay [1 t h e] and are not copied."""
    return [
        (k[:1], v[:1]) if row is None else (k[row], v[row])
        for (k, v), row in zip(keys_values, rows, strict=True)
    ]
