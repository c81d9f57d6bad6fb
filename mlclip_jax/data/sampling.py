"""Which training image comes next: each about as often, or those of each class about as often.

Class-aware sampling (Shen et al., ECCV 2016) as the release of Distribution-Balanced Loss (Wu et
al., ECCV 2020) has it: classes in turn, in a random order that changes from turn to turn, each
gives three images from a list of its positives, which is shuffled anew whenever it is used up.
Classes without positives are passed over, and images without any are never drawn.

There an epoch has a quarter as many draws as there are classes times positives of the largest; here
as many as there are training images, so that its length does not depend on how images are drawn.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from mlclip_jax.errors import UserError

Sampling = Literal["uniform", "class_aware"]

_PER_CLASS = 3  # images that a class gives at a time
# Keeps these draws apart from those of augmentation, which come from the same seed.
_STREAM = 0xC1A55


class ClassAware:
    """The endless sequence of draws; each is known without those before it.

    Args:
      images, classes: int [k], the image and the class of each positive label, in any order.
      seed: of all orders.

    Raises:
      UserError: no image has a positive label.
    """

    def __init__(self, images: np.ndarray, classes: np.ndarray, *, seed: int) -> None:
        if not len(images):
            raise UserError(
                "sampling='class_aware' draws images by their positive labels, and no training "
                "image has any: set sampling='uniform'"
            )
        self.seed = seed % 2**32
        by_class = np.argsort(classes, kind="stable")
        _, first = np.unique(classes[by_class], return_index=True)
        self.images = np.split(images[by_class].astype(np.int32), first[1:])
        self.classes = np.arange(len(self.images))  # those that have positives
        self._latest: dict[int, tuple[int, np.ndarray]] = {}

    def __getitem__(self, draw: int) -> int:
        """The image of a draw, counted from 0."""
        turn, place = divmod(draw, _PER_CLASS * len(self.classes))
        one, taken = divmod(place, _PER_CLASS)
        chosen = self._shuffled(0, self.classes, turn)[one]
        images = self.images[chosen]
        times, at = divmod(_PER_CLASS * turn + taken, len(images))
        return int(self._shuffled(1 + int(chosen), images, times)[at])

    def _shuffled(self, stream: int, items: np.ndarray, times: int) -> np.ndarray:
        """The items of a stream in their order after so many others, of which one is kept."""
        known = self._latest.get(stream)
        if known is None or known[0] != times:
            rng = np.random.default_rng((_STREAM, self.seed, stream, times))
            known = self._latest[stream] = times, rng.permutation(items)
        return known[1]
