"""Captions of training images, tokenised once and carried beside the labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from mlclip_jax.data.pipeline import Example, Source, load_example


def tokenize(
    captions: Iterable[Sequence[str]],
    encode: Callable[[list[str]], np.ndarray],
    *,
    max_characters: int | None = None,
) -> np.ndarray:
    """Token ids of each image's captions, as many columns as the longest needs: int32 [n t].

    Args:
      captions: those of each image [n], which are read as one text.
      encode: texts to ids int32 [n context_length], zeros after the end of text; for a tokenizer
        `functools.partial(tokenizer, truncate=True)`.
      max_characters: cut each text to its first characters before it is encoded (LMPT: 75).
    """
    texts = [" ".join(several)[:max_characters] for several in captions]
    ids = np.asarray(encode(texts), np.int32)
    used = np.flatnonzero(ids.any(0))
    return ids[:, : used[-1] + 1].copy() if len(used) else ids[:, :1].copy()


class Captioned:
    """A source whose examples carry "caption_tokens" too; augments where the source does.

    Args:
      source: the examples.
      tokens: int32 [n t], from `tokenize`; row i belongs to example i.

    Raises:
      ValueError: there are not as many rows as examples.
    """

    def __init__(self, source: Source, tokens: np.ndarray) -> None:
        if len(tokens) != len(source):
            raise ValueError(f"captions of {len(tokens)} images for {len(source)} examples")
        self.source, self.tokens = source, tokens

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.source)

    def __getitem__(self, i: int) -> Example:
        """Example i with its caption."""
        return {**self.source[i], "caption_tokens": self.tokens[i]}

    def augmented(self, i: int, rng: np.random.Generator) -> Example:
        """Example i as training sees it, with its caption."""
        return {**load_example(self.source, i, rng), "caption_tokens": self.tokens[i]}

    def identity(self) -> dict[str, Any]:
        """What decides the images, see `data.features`; captions do not."""
        return self.source.identity()

    def annotations(self, i: int) -> Example:
        """Example i with its caption, without its image."""
        return {**self.source.annotations(i), "caption_tokens": self.tokens[i]}

    def class_counts(self) -> np.ndarray:
        """Positives of each class, int64 [c]."""
        return self.source.class_counts()

    def positives(self) -> tuple[np.ndarray, np.ndarray]:
        """The example and the class of each positive label, integers [k] both."""
        return self.source.positives()
