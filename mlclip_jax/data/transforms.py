"""Image preprocessing on the host, with Pillow only: files or bytes in, uint8 pixels out.

Pixels are normalised on the device (`CLIP.encode_images`), so that a quarter of the bytes travel.
Sizes are rounded as torchvision does, whose transforms CLIP and its descendants were run with.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from mlclip_jax.errors import UserError

Source = bytes | str | Path | np.ndarray | Image.Image
Mode = Literal["clip", "squash", "resize256"]
Interpolation = Literal["bilinear", "bicubic"]

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
# Beyond this a resized image takes more than 256 MiB: only needle-shaped images come there.
_MAX_PIXELS = 2**28 // 3
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
# What Pillow raises for damaged files, depending on the format.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class ImageError(UserError):
    """One image that cannot be used: missing, damaged, or of a kind that has no RGB form."""


@dataclass(frozen=True)
class Preprocess:
    """Brings any image to `size` x `size` pixels.

    Attributes:
        size: pixels per side of the result.
        mode: "clip": the short side to `size`, then the centre is cut out (CLIP, HSPNet);
            "squash": both sides to `size`, the aspect is not kept (LMPT, ADDS);
            "resize256": the short side to int(size * 256 / 224), then the centre (MKT).
        interpolation: filter of the resizing, antialiased as always in Pillow.
        fast_decode: let the JPEG decoder scale down by 2, 4 or 8 first, never below the size
            that is resized to, and shrink by whole numbers before what is left is interpolated.
            Up to twice as fast; pixels differ by about 1 of 255 on average, so this is for
            training.
    """

    size: int
    mode: Mode = "clip"
    interpolation: Interpolation = "bicubic"
    fast_decode: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"the image size must be positive, not {self.size}")
        if self.mode not in ("clip", "squash", "resize256"):
            raise UserError(
                f"unknown resize mode {self.mode!r}; use 'clip', 'squash' or 'resize256'"
            )
        if self.interpolation not in _FILTERS:
            raise UserError(
                f"unknown interpolation {self.interpolation!r}; use 'bilinear' or 'bicubic'"
            )

    def __call__(self, source: Source, *, name: str | None = None) -> np.ndarray:
        """One image, decoded, resized and cropped.

        Args:
            source: encoded bytes, a path, pixels (uint8 `[h w]`, `[h w 1]`, `[h w 3]` or
                `[h w 4]`), or a Pillow image.
            name: what error messages call the image; a path names itself.

        Returns:
            uint8 `[size size 3]`.

        Raises:
            ImageError: the image is missing, damaged or of a kind that has no RGB form.
            UserError: pixels of another shape or type.
        """
        name = name or _name(source)
        image = _open(source, name)
        width, height = self.resized(*image.size)
        if width * height > _MAX_PIXELS:
            raise ImageError(
                f"{name}: {image.width} x {image.height} pixels are too long and thin to be "
                f"resized to {width} x {height}; crop it or use mode 'squash'"
            )
        image = self._resample(image, (0, 0, *image.size), (width, height), name)
        # Python's round: halves to the even neighbour, as in torchvision.
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        return np.asarray(image.crop((left, top, left + self.size, top + self.size)))

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height an image is resized to before the crop."""
        if self.mode == "squash":
            return self.size, self.size
        short = self.size if self.mode == "clip" else int(self.size * 256 / 224)
        # The long side is rounded down, as in torchvision's Resize.
        if width <= height:
            return short, int(short * height / width)
        return int(short * width / height), short

    def part(
        self, source: Source, choose: Callable[[int, int], Box], *, name: str | None = None
    ) -> Image.Image:
        """A part of an image, decoded and brought to `size` x `size` pixels, whatever the mode.

        Args:
            source: as above.
            choose: gives the part, in pixels, from the image's width and height.
            name: what error messages call the image.

        Raises:
            ImageError: the image is missing, damaged or of a kind that has no RGB form.
            UserError: pixels of another shape or type.
        """
        name = name or _name(source)
        image = _open(source, name)
        return self._resample(image, choose(*image.size), (self.size, self.size), name)

    def _resample(
        self, image: Image.Image, box: Box, size: tuple[int, int], name: str
    ) -> Image.Image:
        """The part `box` of an opened image in RGB, with this width and height."""
        left, top, right, bottom = box
        scale = 1.0
        if self.fast_decode:
            # The smallest whole image whose part is no smaller than the result.
            full = image.width
            least = (
                math.ceil(image.width * size[0] / (right - left)),
                math.ceil(image.height * size[1] / (bottom - top)),
            )
            drafted = image.draft(None, least)
            scale = drafted[1][2] / full if drafted else 1.0
        scaled = tuple(scale * edge for edge in box)
        return _rgb(image, name).resize(
            size,
            _FILTERS[self.interpolation],
            box=scaled,
            reducing_gap=1.0 if self.fast_decode else None,
        )


def decode(source: Source, *, name: str | None = None) -> Image.Image:
    """An RGB image in its full size, from bytes, a file or pixels.

    As in CLIP's own preprocessing, the EXIF orientation is not applied and transparency is
    dropped. Palettes, grey values, CMYK and 16-bit grey values are converted.

    Raises:
        ImageError: the image is missing, damaged or of a kind that has no RGB form.
        UserError: pixels of another shape or type.
    """
    name = name or _name(source)
    return _rgb(_open(source, name), name)


def _name(source: Source) -> str:
    """What error messages call an image that has no other name."""
    return str(source) if isinstance(source, str | Path) else "the image"


def _open(source: Source, name: str) -> Image.Image:
    """Opens an image; from a file or bytes without decoding: its size is known, its pixels not.

    Raises:
        ImageError: the image is missing or damaged.
        UserError: pixels of another shape or type.
    """
    if isinstance(source, np.ndarray):
        return _from_pixels(source, name)
    if isinstance(source, str | Path) and not Path(source).is_file():
        raise ImageError(f"{name}: there is no such image file")
    try:
        if isinstance(source, Image.Image):
            source.load()  # so that no scale is ever set for the decoder of a caller's image
            return source
        encoded = source if isinstance(source, bytes) else Path(source).read_bytes()
        return Image.open(io.BytesIO(encoded))
    except _DAMAGE as error:
        raise _damaged(name, error) from error


def _from_pixels(pixels: np.ndarray, name: str) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    grey, colours = pixels.ndim == 2, pixels.ndim == 3 and pixels.shape[-1] in (3, 4)
    if pixels.dtype != np.uint8 or not (grey or colours) or 0 in pixels.shape:
        raise UserError(
            f"{name}: pixels must be uint8 [h w 3], [h w 4] or [h w], "
            f"not {pixels.dtype} {list(pixels.shape)}"
        )
    return Image.fromarray(pixels)


def _rgb(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
        if image.mode == "RGB":
            return image
        if image.mode.startswith("I"):  # 16 bits a pixel, whatever Pillow holds them in
            grey = np.clip(np.asarray(image, np.int64), 0, 65535) >> 8
            return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
        if image.mode == "F":
            raise ImageError(
                f"{name}: floating-point pixels have no fixed range; save it with 8 bits a channel"
            )
        if image.mode == "P":
            # By way of RGBA: Pillow warns of palettes with transparency otherwise.
            return image.convert("RGBA").convert("RGB")
        return image.convert("RGB")
    except ImageError:
        raise
    except _DAMAGE as error:
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> ImageError:
    if isinstance(error, UnidentifiedImageError):
        reason = "it is in no known image format"
    else:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ImageError(f"{name}: cannot be read as an image ({reason}); replace or remove it")
