"""Image preprocessing on the host, with Pillow only: files or bytes in, uint8 pixels out.

Pixels are normalised on the device (`CLIP.encode_images`), so that a quarter of the bytes travel.
Sizes are rounded as torchvision does, whose transforms CLIP and its descendants were run with.
"""

from __future__ import annotations

import io
import struct
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
# What Pillow raises for damaged files, depending on the format.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


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
            that is resized to. About twice as fast; pixels differ by about 1 of 255 on average,
            so this is for training.
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
            UserError: the image is missing, damaged or of a kind that has no RGB form.
        """
        name = name or _name(source)
        image = _open(source, name)
        width, height = self.resized(*image.size)
        if width * height > _MAX_PIXELS:
            raise UserError(
                f"{name}: {image.width} x {image.height} pixels are too long and thin to be "
                f"resized to {width} x {height}; crop it or use mode 'squash'"
            )
        if self.fast_decode and image is not source:
            image.draft(None, (width, height))
        image = _rgb(image, name).resize((width, height), _FILTERS[self.interpolation])
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


def decode(source: Source, *, name: str | None = None) -> Image.Image:
    """An RGB image in its full size, from bytes, a file or pixels.

    As in CLIP's own preprocessing, the EXIF orientation is not applied and transparency is
    dropped. Palettes, grey values, CMYK and 16-bit grey values are converted.

    Raises:
        UserError: the image is missing, damaged or of a kind that has no RGB form.
    """
    name = name or _name(source)
    return _rgb(_open(source, name), name)


def _name(source: Source) -> str:
    return str(source) if isinstance(source, str | Path) else "the image"


def _open(source: Source, name: str) -> Image.Image:
    """Opens without decoding: size and mode are known, pixels are read later."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return _from_pixels(source, name)
    if isinstance(source, str | Path) and not Path(source).is_file():
        raise UserError(f"{name}: there is no such image file")
    try:
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
            raise UserError(
                f"{name}: floating-point pixels have no fixed range; save it with 8 bits a channel"
            )
        if image.mode == "P":
            # By way of RGBA: Pillow warns of palettes with transparency otherwise.
            return image.convert("RGBA").convert("RGB")
        return image.convert("RGB")
    except UserError:
        raise
    except _DAMAGE as error:
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> UserError:
    if isinstance(error, UnidentifiedImageError):
        reason = "it is in no known image format"
    else:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{name}: cannot be read as an image ({reason}); replace or remove it")
