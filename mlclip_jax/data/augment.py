"""Augmentation on the host: what training does to an image between decoding and the device.

A recipe is a name in `RECIPES`; `Augment` carries it out, for any size. All random numbers come
from one generator that the caller gives, so that `example_rng` makes an augmented image a pure
function of the run's seed, the epoch and the example.

Mirroring is left to the training step, which flips on the device where the recipe says `flip`. The
operations here are drawn with either sign alike, so that it makes no difference that the flip comes
last, but for the edge that a vertical shear holds fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from mlclip_jax.data.transforms import Box, Preprocess, Source
from mlclip_jax.spec import unknown

_AREA = (0.08, 1.0)  # of a random resized crop, as a share of the image (Szegedy et al., 2015)
_RATIO = (3 / 4, 4 / 3)  # its width over its height
_LOG_RATIO = (math.log(_RATIO[0]), math.log(_RATIO[1]))
_CROP_ATTEMPTS = 10
# Multi-scale crops: an image squashed to 8/7 of the size is cropped to these shares of the size.
_SQUASHED = 8 / 7
_CROPS = (8 / 7, 1.0, 6 / 7, 5 / 7, 4 / 7)


@dataclass(frozen=True)
class RandAugment:
    """`count` operations in a row, each drawn from `operations` (Cubuk et al., 2020).

    Attributes:
      operations: names in `_OPERATIONS`.
      magnitude: mean strength, 1 being the strongest.
      magnitude_std: standard deviation of the strength, which stays within 0 and 1.
      probability: with which a drawn operation is carried out.
      translate: largest shift as a share of the side.
      posterize_bits: left of each channel by the weakest posterizing; the strongest leaves 4 less,
        but one.
      fill: colour of what comes into view from outside.
      filter: interpolation of turned, sheared and shifted images.
      count: number of operations.
    """

    operations: tuple[str, ...]
    magnitude: float
    magnitude_std: float
    probability: float
    translate: float
    posterize_bits: int
    fill: tuple[int, int, int]
    filter: Image.Resampling
    count: int = 2

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """An RGB image after the operations."""
        for _ in range(self.count):
            name = self.operations[rng.integers(len(self.operations))]
            perform, level = rng.random(), rng.normal(self.magnitude, self.magnitude_std)
            sign = 1.0 if rng.random() < 0.5 else -1.0
            if perform < self.probability:
                image = _OPERATIONS[name](image, float(np.clip(level, 0, 1)), sign, self)
        return image


@dataclass(frozen=True)
class Recipe:
    """What is done to a training image.

    Attributes:
      crop: "none" keeps the preprocessing of evaluation; "random_resized" takes a part of random
        area and shape; "multi_scale" a square of one of five sizes from the squashed image.
      cutout: side of a rectangle that is painted over, as a share of the image's; 0 paints none.
      rand_augment: random colour and geometry afterwards.
      flip: mirror with probability one half, which the training step does.
    """

    crop: Literal["none", "random_resized", "multi_scale"] = "none"
    cutout: float = 0.0
    rand_augment: RandAugment | None = None
    flip: bool = False


_GEOMETRY = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
_COLOUR = (
    "auto_contrast",
    "brightness",
    "color",
    "contrast",
    "equalize",
    "posterize",
    "sharpness",
    "solarize",
)

RECIPES: dict[str, Recipe] = {
    # HSPNet's released code.
    "none": Recipe(),
    # LMPT and LargeLoss (which squash).
    "flip": Recipe(flip=True),
    # HSPNet's paper.
    "flip_rrc": Recipe(crop="random_resized", flip=True),
    # MKT: what timm calls rand-m9-mstd0.5-inc1.
    "randaugment": Recipe(
        crop="random_resized",
        rand_augment=RandAugment(
            operations=(*_GEOMETRY, *_COLOUR, "invert", "solarize_add"),
            magnitude=0.9,
            magnitude_std=0.05,
            probability=0.5,
            translate=0.45,
            posterize_bits=4,
            fill=(124, 116, 104),  # ImageNet's mean colour
            filter=Image.Resampling.BICUBIC,
        ),
        flip=True,
    ),
    # ML-Decoder, SPLC, DualCoOp and, after them, ADDS (all squash).
    "cutout_randaugment": Recipe(
        cutout=0.5,
        rand_augment=RandAugment(
            operations=(*_GEOMETRY, *_COLOUR, "identity"),
            magnitude=0.3,  # 9 of torchvision's 30
            magnitude_std=0.0,
            probability=1.0,
            translate=150 / 331,
            posterize_bits=8,
            fill=(0, 0, 0),
            filter=Image.Resampling.NEAREST,
        ),
    ),
    # SST and SARB, at size 448: squashed to 512, cropped to 512, 448, 384, 320 or 256.
    "multi_scale_crop": Recipe(crop="multi_scale", flip=True),
}


def recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
      UserError: there is none.
    """
    if name not in RECIPES:
        raise unknown("augmentation", name, RECIPES)
    return RECIPES[name]


@dataclass(frozen=True)
class Augment:
    """Brings any image to `preprocess.size` pixels a side, with a recipe's random changes.

    Attributes:
      preprocess: size, interpolation and decoding; its mode counts where the recipe does not crop.
      recipe: what is done; the default changes nothing.
    """

    preprocess: Preprocess
    recipe: Recipe = Recipe()

    def __call__(
        self, source: Source, rng: np.random.Generator | None = None, *, name: str | None = None
    ) -> np.ndarray:
        """One image, decoded, resized and augmented: uint8 [size size 3].

        Args:
          source: encoded bytes, a path, pixels or a Pillow image.
          rng: of the recipe; None leaves the recipe out.
          name: what error messages call the image; a path names itself.

        Raises:
          ImageError: the image is missing, damaged or of a kind that has no RGB form.
          UserError: pixels of another shape or type.
        """
        recipe = self.recipe
        if rng is None or recipe.crop == "none":
            pixels = self.preprocess(source, name=name)
            if rng is None or not (recipe.cutout or recipe.rand_augment):
                return pixels
            image = Image.fromarray(pixels)
        else:
            choose = _random_resized_box if recipe.crop == "random_resized" else self._square_box
            image = self.preprocess.part(source, lambda w, h: choose(w, h, rng), name=name)
        if recipe.cutout:
            image = _cut_out(image, recipe.cutout, rng)
        if recipe.rand_augment:
            image = recipe.rand_augment(image, rng)
        return np.asarray(image)

    def _square_box(self, width: int, height: int, rng: np.random.Generator) -> Box:
        """The part of an image that a square crop of its squashed form shows."""
        side = round(_SQUASHED * self.preprocess.size)
        crop = round(_CROPS[rng.integers(len(_CROPS))] * self.preprocess.size)
        left, top = rng.integers(side - crop + 1, size=2).tolist()
        across, down = width / side, height / side
        return left * across, top * down, (left + crop) * across, (top + crop) * down


def example_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Random numbers of one example in one epoch, whoever prepares it.

    Args:
      seed: of the run.
      epoch: from 0; the number of the view where a fixed number of views is made.
      index: of the example in its source.
    """
    return np.random.default_rng((seed % 2**32, epoch, index))


def _random_resized_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """A part of random area and shape; the largest one in the middle where ten draws do not fit.

    Area uniform in [.08, 1], the logarithm of the shape uniform between 3/4 and 4/3, as in
    torchvision's and timm's RandomResizedCrop.
    """
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * rng.uniform(*_AREA)
        ratio = math.exp(rng.uniform(*_LOG_RATIO))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    ratio = min(max(width / height, _RATIO[0]), _RATIO[1])
    w = min(width, max(round(height * ratio), 1))
    h = min(height, max(round(width / ratio), 1))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _cut_out(image: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    """Paints a rectangle of one random colour around a random point (DeVries and Taylor, 2017).

    Its sides are `share` of the image's, less what reaches over the edges.
    """
    x, y = int(rng.integers(image.width)), int(rng.integers(image.height))
    w, h = round(share * image.width), round(share * image.height)
    colour = tuple(rng.integers(256, size=3).tolist())
    image = image.copy()
    image.paste(colour, (x - w // 2, y - h // 2, x - w // 2 + w, y - h // 2 + h))
    return image


# Operations take the image, a strength in [0, 1], a sign and the settings.
_Operation = Callable[[Image.Image, float, float, RandAugment], Image.Image]


def _affine(image: Image.Image, rows: tuple[float, ...], settings: RandAugment) -> Image.Image:
    """The image under an affine map: each result pixel (x, y) shows the point `rows` (x, y, 1)."""
    return image.transform(
        image.size, Image.Transform.AFFINE, rows, settings.filter, fillcolor=settings.fill
    )


def _enhance(kind: Callable[[Image.Image], Any]) -> _Operation:
    """Less or more of something: by a factor of up to .9 below or above 1."""
    return lambda image, level, sign, settings: kind(image).enhance(1 + sign * 0.9 * level)


def _solarize_add(image: Image.Image, level: float) -> Image.Image:
    """Brightens the darker half of the values by up to 110 of 255."""
    table = [value if value >= 128 else min(255, value + int(110 * level)) for value in range(256)]
    return image.point(table * 3)


_OPERATIONS: dict[str, _Operation] = {
    "identity": lambda image, level, sign, s: image,
    "auto_contrast": lambda image, level, sign, s: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign, s: ImageOps.equalize(image),
    "invert": lambda image, level, sign, s: ImageOps.invert(image),
    "brightness": _enhance(ImageEnhance.Brightness),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "posterize": lambda image, level, sign, s: ImageOps.posterize(
        image, max(1, s.posterize_bits - int(4 * level))
    ),
    "solarize": lambda image, level, sign, s: ImageOps.solarize(image, 256 - int(256 * level)),
    "solarize_add": lambda image, level, sign, s: _solarize_add(image, level),
    "rotate": lambda image, level, sign, s: image.rotate(
        sign * 30 * level, s.filter, fillcolor=s.fill
    ),
    "shear_x": lambda image, level, sign, s: _affine(image, (1, sign * 0.3 * level, 0, 0, 1, 0), s),
    "shear_y": lambda image, level, sign, s: _affine(image, (1, 0, 0, sign * 0.3 * level, 1, 0), s),
    "translate_x": lambda image, level, sign, s: _affine(
        image, (1, 0, sign * s.translate * level * image.width, 0, 1, 0), s
    ),
    "translate_y": lambda image, level, sign, s: _affine(
        image, (1, 0, 0, 0, 1, sign * s.translate * level * image.height), s
    ),
}
