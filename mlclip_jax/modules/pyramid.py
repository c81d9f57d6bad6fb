"""Pyramid-forwarding: a tower of small images sees a large one as crops of several sizes.

Level i is the image at 2^i times the tower's size S, cut into 2^i x 2^i crops of S x S; the top
level is the image itself, its crops overlapping evenly where its size is no power of two times S.
Each crop is an image of its own to the tower, so that the cost grows with the area of the image
and not with its square.

Source: Xu et al., 2023 (ADDS), "Pyramid-Forwarding". Deviation: the text says (i+1) x (i+1) crops,
which would leave gaps from level 2 on; its Table 7 has 16 at level 2, and its cost is 1 + 2^2 +
4^2 + ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mlclip_jax.errors import UserError


@dataclass(frozen=True)
class Pyramid:
    """The crops of images of one size.

    Attributes:
        base: side of a crop in pixels, S.
        target: side of an image in pixels.
        levels: those that are taken, from 0; None takes all.
        drop: share of the crops above level 0 that are left out, drawn at random.

    Raises:
        UserError: an image smaller than a crop, no such level, or a share that is none.
    """

    base: int
    target: int
    levels: tuple[int, ...] | None = None
    drop: float = 0.0

    def __post_init__(self) -> None:
        if self.target < self.base:
            raise UserError(
                f"method.image_size is {self.target} and the image tower takes {self.base} pixels: "
                "at least as many"
            )
        count = len(level_sizes(self.base, self.target))
        known = self.levels is None or set(self.levels) <= set(range(count))
        if not known or self.levels == () or len(set(self.levels or ())) < len(self.levels or ()):
            raise UserError(
                f"method.levels is {self.levels} and images of {self.target} pixels have the "
                f"levels {', '.join(map(str, range(count)))}: some of these, each once"
            )
        if not 0 <= self.drop < 1:
            raise UserError(
                f"method.drop_crops is {self.drop}: the share of crops that are left out is at "
                "least 0 and below 1"
            )

    @property
    def crops(self) -> list[tuple[int, int, int]]:
        """Level, and top and left in pixels of its image, of each crop: level by level, by rows."""
        found = []
        for level, size in enumerate(level_sizes(self.base, self.target)):
            if self.levels is None or level in self.levels:
                at = offsets(size, self.base, 2**level)
                found += [(level, y, x) for y in at for x in at]
        return found

    @property
    def kept(self) -> int:
        """Crops of an image that are seen."""
        upper = sum(level > 0 for level, _, _ in self.crops)
        return len(self.crops) - upper + math.ceil((1 - self.drop) * upper - 1e-9)

    def cut(self, images: Array, key: Array | None = None) -> Array:
        """All crops: [b t t 3] -> [b n s s 3], in the order of `crops`.

        Args:
            images: of `target` pixels a side, uint8 or floating point.
            key: draws the crops of each image that are left out; None leaves out the same of every
                image.

        Raises:
            ValueError: images of another size.
        """
        if images.shape[1:] != (self.target, self.target, 3):
            raise ValueError(
                f"the pyramid takes [b {self.target} {self.target} 3], not {list(images.shape)}"
            )
        sizes = level_sizes(self.base, self.target)
        crops = self.cut_levels([resize(images, size) for size in sizes])
        if self.kept == len(self.crops):
            return crops
        rows = self._chosen(len(images), key)
        return jnp.take_along_axis(crops, rows[:, :, None, None, None], axis=1)

    def cut_levels(self, images: Sequence[Array]) -> Array:
        """The crops of level images [b l l 3]: -> [b n s s 3]."""
        s = self.base
        crops = [images[level][:, y : y + s, x : x + s] for level, y, x in self.crops]
        return jnp.stack(crops, axis=1)

    def _chosen(self, b: int, key: Array | None) -> Array:
        """Numbers of the crops of each image that are seen, rising: int32 [b kept]."""
        upper = np.array([level > 0 for level, _, _ in self.crops])
        shape = (1 if key is None else b, len(self.crops))
        order = jax.random.uniform(jax.random.key(0) if key is None else key, shape)
        ranks = jnp.argsort(jnp.where(upper, order, -1), axis=1)[:, : self.kept]
        return jnp.broadcast_to(jnp.sort(ranks, axis=1), (b, self.kept))

    def encode(self, images: Array, tower: Callable[[Array], Array], key: Array | None) -> Array:
        """Tokens of all crops, one crop's after another's: -> [b n*t d].

        Args:
            images: uint8 [b t t 3].
            tower: gives [m t d] for m crops, which are its batch.
            key: see `cut`.
        """
        crops = self.cut(images, key)
        b, n = crops.shape[:2]
        tokens = tower(crops.reshape(b * n, *crops.shape[2:]))
        return tokens.reshape(b, n * tokens.shape[1], -1)

    def spread(self, values: Array, grid: int) -> Array:
        """Values of tokens as a map of the image: [... n*t] -> [... g g], g as fine as needed.

        What a token has is spread over the area that it sees; of overlapping crops, a place belongs
        to the one whose centre is nearest; levels add up. Class tokens have no place.

        Args:
            values: of each token, the class token first in every crop; none may be left out.
            grid: patches along the side of a crop.
        """
        side = round(self.target / self.base * grid)
        places = (np.arange(side) + 0.5) / side
        total: Array | float = 0.0
        start = 0
        for level, size in enumerate(level_sizes(self.base, self.target)):
            if self.levels is not None and level not in self.levels:
                continue
            n = 2**level
            at = np.array(offsets(size, self.base, n))
            crop = np.abs(places[:, None] * size - (at + self.base / 2)).argmin(1)
            cell = (places * size - at[crop]) / self.base * grid
            cell = np.clip(cell.astype(int), 0, grid - 1)
            number = crop[:, None] * n + crop[None]
            token = start + number * (grid**2 + 1) + 1 + cell[:, None] * grid + cell[None]
            # As much for its area as the levels' sizes say.
            total = total + values[..., token] * (size / self.target) ** 2
            start += n * n * (grid**2 + 1)
        return total


def level_sizes(base: int, target: int) -> list[int]:
    """Pixels of a side of each level's image: base, 2 base, ..., and the target itself."""
    top = math.ceil(math.log2(target / base))
    return [base * 2**level for level in range(top)] + [target]


def offsets(size: int, base: int, count: int) -> list[int]:
    """Where evenly spaced crops of `base` pixels start, rounded half up."""
    step = (size - base) / max(count - 1, 1)
    return [math.floor(j * step + 0.5) for j in range(count)]


def resize(images: Array, size: int) -> Array:
    """Images at another size, filtered as Pillow's bicubic does: [b t t 3] -> [b s s 3]."""
    if images.shape[1] == size:
        return images
    x = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    x = jax.image.resize(x, (len(images), size, size, 3), "cubic", antialias=True)
    if jnp.issubdtype(images.dtype, jnp.floating):
        return x
    return jnp.clip(jnp.round(x), 0, 255).astype(images.dtype)
