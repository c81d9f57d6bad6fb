"""Captions of the training images as a method reads them: tokenised and encoded once."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import numpy as np
from flax import nnx

from mlclip_jax.clip import CLIP
from mlclip_jax.clip.tokenizer import Tokenizer
from mlclip_jax.data.captions import Captioned, CaptionsAsImages, tokenize
from mlclip_jax.data.registry import DataSplits
from mlclip_jax.errors import UserError
from mlclip_jax.methods.base import Method

_BATCH = 256  # captions encoded at a time
#: Bytes of caption features that are kept; where there are more, each step encodes its captions.
MAX_BYTES = 2 * 2**30


def reads_no_images(method: Method) -> bool:
    """Whether captions stand for the images of training."""
    captions = method.captions()
    return captions is not None and captions.read == "images"


def with_captions(
    data: DataSplits,
    method: Method,
    tokenizer: Tokenizer,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> DataSplits:
    """`data` whose training examples carry captions as `method.captions()` asks, or are captions.

    Features are computed once here, by the frozen text tower, and kept in memory; captions longer
    than it takes are cut. Those in place of images have features at all positions, some 75 GB for
    COCO: where they are more than `MAX_BYTES`, ids are kept and the training step encodes them.

    Args:
      data: of the run; its training source has `captions`.
      method: on the CLIP that encodes them.
      tokenizer: of that CLIP.
      say: told what was read.

    Raises:
      UserError: the data have no captions.
    """
    wanted = method.captions()
    if wanted is None:
        return data
    captions = getattr(data.train, "captions", None)
    if captions is None or not any(itertools.chain.from_iterable(captions)):
        raise UserError(
            "the method learns from captions and the training data have none: give them with the "
            "images (docs/data.md), as data.captions_list or a column of labels.csv"
        )
    encode = functools.partial(tokenizer, truncate=True)
    cut = functools.partial(tokenize, encode=encode, max_characters=wanted.max_characters)
    if wanted.read == "images":
        targets = [data.train.annotations(i)["targets"] for i in range(len(data.train))]
        examples = method.caption_examples(
            captions, np.stack(targets), data.train_space or data.space
        )
        say(examples.report)
        ids = cut([text] for text in examples.texts)
        size = ids.size * method.clip.config.embed_dim * method.clip.dtype.itemsize
        if size > MAX_BYTES:
            say(f"their features would take {size / 2**30:.1f} GiB: encoded in every step instead")
            values = {"ids": ids}
        else:
            values = encode_captions(method.clip, ids, ("pooled", "tokens", "mask"))
        return replace(data, train=CaptionsAsImages(values, examples.targets))
    tokens = found = cut(captions)
    if wanted.read == "features":
        found = encode_captions(method.clip, tokens, ("pooled",))["pooled"]
    absent = np.array([not any(texts) for texts in captions])
    found[absent] = 0
    without = f"; {absent.sum():,} images have none" if absent.any() else ""
    say(f"captions of {len(found):,} training images, {tokens.shape[1]} tokens at most{without}")
    return replace(data, train=Captioned(data.train, found, f"caption_{wanted.read}"))


def encode_captions(clip: CLIP, tokens: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Some of the features that `CLIP.encode_captions` gives, in its compute dtype, on the host.

    Args:
      clip: whose text tower encodes; float32, or float64 for references.
      tokens: int32 [n t].
      names: of "pooled" [n d], "tokens" [n t d] and "mask" bool [n t].
    """
    graphdef, state = nnx.split(clip)

    @jax.jit
    def encode(state: nnx.State, ids: jax.Array) -> dict[str, jax.Array]:
        features = nnx.merge(graphdef, state).encode_captions(ids)._asdict()
        return {name: features[name] for name in names}

    state = jax.device_put(state)
    found: dict[str, np.ndarray] = {}
    for start in range(0, len(tokens), _BATCH):
        rows = tokens[start : start + _BATCH]
        padded = np.concatenate([rows, np.repeat(rows[:1], _BATCH - len(rows), axis=0)])
        for name, values in jax.device_get(encode(state, padded)).items():
            whole = found.setdefault(name, np.empty((len(tokens), *values.shape[1:]), values.dtype))
            whole[start : start + _BATCH] = values[: len(rows)]
    return found
