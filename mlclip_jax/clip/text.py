"""The text tower, exact and without waste.

The tower is causal and pooled at the end-of-text token (EOT), so three things need never be
computed: positions after EOT, a prefix that several prompts share more than once, and the last
block anywhere but at EOT. A set of prompts is therefore given as levels of `Segment`s: the
start token and words or learned vectors that all prompts share; perhaps one segment per label
group; and each class's own tokens. The result, gradients included, is that of encoding every
prompt alone at full length.

Thousands of classes need not be in memory at once: what they share is run first and its keys and
values are kept, then the classes' own tokens follow in chunks that the backward pass recomputes
one after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mlclip_jax.clip.config import TextConfig
from mlclip_jax.clip.transformer import Block, KeyValue, LayerNorm, make_blocks


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
        self,
        config: TextConfig,
        embed_dim: int,
        *,
        remat: bool = False,
        class_chunk: int | None = None,
        rngs: nnx.Rngs,
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
        self.class_chunk = class_chunk

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
        kept: list[list[KeyValue]] = [[] for _ in self.blocks]  # of every block, by level
        for x, above in zip(levels[:-1], ancestors[:-1], strict=True):
            for block, context in zip(body, kept[:-1], strict=True):
                x, keys_values = self._extend(block, x, context, above)
                context.append(keys_values)
            kept[-1].append(last.keys_values(x))
        rows = levels[-1], ancestors[-1], eot
        if self.class_chunk is None or self.class_chunk >= len(eot):
            return self._finish(kept, *rows)
        # In float32, so that the gradients that chunks add up are: the compute type may be shorter.
        wide = jax.tree.map(lambda a: a.astype(jnp.promote_types(a.dtype, jnp.float32)), kept)

        def finish(rows: tuple[Array, list[Array | None], Array]) -> Array:
            return self._finish(jax.tree.map(lambda a: a.astype(rows[0].dtype), wide), *rows)

        return _map_chunks(finish, rows, self.class_chunk)

    def _extend(
        self, block: Block, x: Array, context: list[KeyValue], above: list[Array | None]
    ) -> tuple[Array, KeyValue]:
        """A level through a block, after the keys and values of the levels above it."""

        def step(x: Array, context: list[KeyValue]) -> tuple[Array, KeyValue]:
            return block.extend(x, _gather(context, above))

        return (jax.checkpoint(step) if self.remat else step)(x, context)

    def _finish(
        self, kept: list[list[KeyValue]], x: Array, above: list[Array | None], eot: Array
    ) -> Array:
        """Features of runs of the last level [n s w], given every block's `kept`: [n d]."""
        *body, last = self.blocks
        for block, context in zip(body, kept[:-1], strict=True):
            x, _ = self._extend(block, x, context, above)
        x = last.read(x, eot, causal=True, context=_gather(kept[-1], above))
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


def _map_chunks(function: Callable[[Any], Array], rows: Any, size: int) -> Array:
    """`function` of all rows, at most `size` at a time, recomputed in the backward pass.

    Where devices share the rows they share every chunk alike, and no row moves: c and `size` are
    multiples of their number, so `unit` is one too; each of the `unit` blocks of adjacent rows is
    padded on its own, and gives every n-th of its rows to each of the n chunks.

    Args:
        function: of rows like these to [k d], row by row.
        rows: arrays [c ...].
        size: largest k.

    Returns:
        [c d].
    """
    c = len(jax.tree.leaves(rows)[0])
    unit, n = math.gcd(c, size), -(-c // size)
    block = c // unit
    share = -(-block // n)  # rows of a block in a chunk

    def split(x: Array) -> Array:
        x = x.reshape(unit, block, *x.shape[1:])
        x = jnp.pad(x, [(0, 0), (0, share * n - block), *[(0, 0)] * (x.ndim - 2)])
        x = jnp.moveaxis(x.reshape(unit, share, n, *x.shape[2:]), 2, 0)
        return x.reshape(n, unit * share, *x.shape[3:])

    # Steps of a loop are not merged with one another: `prevent_cse` would only cost time.
    y = jax.lax.map(jax.checkpoint(function, prevent_cse=False), jax.tree.map(split, rows))
    y = jnp.moveaxis(y.reshape(n, unit, share, -1), 0, 2)
    return y.reshape(unit, share * n, -1)[:, :block].reshape(c, -1)
