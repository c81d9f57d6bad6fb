"""Images of noise, a tower that is one matrix, and caches of its features."""

from __future__ import annotations

import numpy as np

from mlclip_jax.data import features
from mlclip_jax.data.features import CacheConfig
from mlclip_jax.data.pipeline import eval_batches
from mlclip_jax.data.transforms import ImageError

SHAPES = {"pooled": (6,), "tokens": (4, 6)}
_RNG = np.random.default_rng(0)
_MATRIX = _RNG.normal(size=(8 * 8 * 3, 6))


class Noise:
    """Images of noise that training turns upside down at random; some cannot be read."""

    def __init__(self, n=10, *, bad=(), seed=0, augment=None, fail_at=None):
        self.n, self.bad, self.seed, self.augment, self.fail_at = n, bad, seed, augment, fail_at
        self.opened = []

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i == self.fail_at:
            raise KeyboardInterrupt
        if i in self.bad:
            raise ImageError(f"noise {i} is damaged")
        self.opened.append(i)
        image = np.random.default_rng((self.seed, i)).integers(0, 256, (8, 8, 3), np.uint8)
        return {"image": image, **self.annotations(i)}

    def augmented(self, i, rng):
        example = self[i]
        turned = self.augment is not None and rng.random() < 0.5
        return {**example, "image": example["image"][::-1] if turned else example["image"]}

    def annotations(self, i):
        return {"targets": np.array([1, -1 if i % 2 else 0], np.int8), "index": i}

    def identity(self):
        same = {"name": "noise", "seed": self.seed}
        return same if self.augment is None else {**same, "augment": self.augment}

    def class_counts(self):
        return np.array([self.n, 0])


def pooled(images):
    # Rounded from float64: a float32 product would depend on the size of the batch.
    return (images.reshape(len(images), -1) / 255 @ _MATRIX).astype(np.float32)


def encode(images, readable):
    tokens = np.stack([pooled(images) * k for k in range(4)], 1)
    return {"pooled": pooled(images), "tokens": tokens, "readable": readable}


def exactly(source, *, batch_size=4):
    """What `encode` makes of the images in batches of this size, by name."""
    batches = list(eval_batches(source, batch_size))
    found = [encode(batch["images"], batch["mask"]) for batch in batches]
    return {name: np.concatenate([f[name] for f in found])[: len(source)] for name in SHAPES}


def values(cache):
    """All features of a cache by name, as they are read."""
    opened = cache.open()
    examples = [opened[i]["features"] for i in range(len(opened))]
    return {name: np.stack([found[name] for found in examples]) for name in examples[0]}


def make(folder, source=None, *, train=True, encoder="a", **fields):
    config = CacheConfig(
        str(folder), **{k: fields.pop(k) for k in ("views", "dtype") if k in fields}
    )
    source = Noise() if source is None else source
    return features.plan(
        source, config, encoder={"weights": encoder}, shapes=SHAPES, train=train, **fields
    )


def written(folder, source=None, *, max_unreadable=10, batch_size=4, **fields):
    cache = make(folder, source, **fields)
    features.write(cache, encode, batch_size=batch_size, max_unreadable=max_unreadable)
    return cache
