"""Captions of training images, tokenised once: beside the labels, or in place of the images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """A source whose examples carry their captions too; augments where the source does.

    Args:
      source: the examples.
      values: row i belongs to example i: ids int32 [n t] from `tokenize`, or features [n d].
      name: what the batch calls them, "caption_tokens" or "caption_features".

    Raises:
      ValueError: there are not as many rows as examples.
    """

    def __init__(self, source: Source, values: np.ndarray, name: str = "caption_tokens") -> None:
        if len(values) != len(source):
            raise ValueError(f"captions of {len(values)} images for {len(source)} examples")
        self.source, self.values, self.name = source, values, name

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.source)

    def __getitem__(self, i: int) -> Example:
        """Example i with its caption."""
        return {**self.source[i], self.name: self.values[i]}

    def augmented(self, i: int, rng: np.random.Generator) -> Example:
        """Example i as training sees it, with its caption."""
        return {**load_example(self.source, i, rng), self.name: self.values[i]}

    def identity(self) -> dict[str, Any]:
        """What decides the images, see `data.features`; captions do not."""
        return self.source.identity()

    def annotations(self, i: int) -> Example:
        """Example i with its caption, without its image."""
        return {**self.source.annotations(i), self.name: self.values[i]}

    def class_counts(self) -> np.ndarray:
        """Positives of each class, int64 [c]."""
        return self.source.class_counts()

    def positives(self) -> tuple[np.ndarray, np.ndarray]:
        """The example and the class of each positive label, integers [k] both."""
        return self.source.positives()


class CaptionsAsImages:
    """Examples that are captions: they stand where an image's features would (TaI-DPT).

    Args:
      features: "pooled" [n d], "tokens" [n t d] and "mask" bool [n t], see `CLIP.encode_captions`;
        or "ids" int32 [n t], which the training step encodes.
      targets: int8 [n c].
    """

    def __init__(self, features: Mapping[str, np.ndarray], targets: np.ndarray) -> None:
        self.features, self.targets = dict(features), targets

    def __len__(self) -> int:
        """Number of captions."""
        return len(self.targets)

    def __repr__(self) -> str:
        return f"CaptionsAsImages({len(self)})"

    def __getitem__(self, i: int) -> Example:
        """Caption i."""
        features = {name: values[i] for name, values in self.features.items()}
        return {"features": features, **self.annotations(i)}

    def annotations(self, i: int) -> Example:
        """Caption i without its features."""
        return {"targets": self.targets[i], "index": i}

    def class_counts(self) -> np.ndarray:
        """Positives of each class, int64 [c]."""
        return np.count_nonzero(self.targets > 0, axis=0)

    def positives(self) -> tuple[np.ndarray, np.ndarray]:
        """The example and the class of each positive label, integers [k] both."""
        return np.nonzero(self.targets > 0)
