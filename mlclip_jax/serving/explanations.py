"""Pictures of where in an image the scores of its labels come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from mlclip_jax.errors import UserError, make_folder
from mlclip_jax.evaluation.maps import upsample

# From dark to bright: brightness rises evenly, so that the order is seen without colours too.
_COLOURS = np.array(
    [[20, 12, 60], [92, 18, 120], [178, 42, 100], [236, 104, 50], [252, 172, 60], [252, 236, 150]]
)
_SIDE = 224  # least pixels of a panel's side
_PER_ROW = 6
_GAP, _LINE, _TEXT = 12, 18, 14  # pixels: between panels, of a line of text, of its letters


@dataclass(frozen=True)
class Explanation:
    """Maps of some labels on an image.

    Attributes:
        pixels: what the method saw, uint8 `[s s 3]`.
        tags: the labels with their scores, as `Tagger.tag` gives them.
        maps: of each label, float32 `[k h w]`, a value for each patch.
    """

    pixels: np.ndarray
    tags: Sequence[dict[str, Any]]
    maps: np.ndarray

    def picture(self) -> Image.Image:
        """The image, and beside it each label's map over it, with label and score below.

        Each map has the whole range of colours: they compare places, not labels.
        Pillow's own font writes the names: letters beyond ASCII may be missing.
        """
        side = max(_SIDE, self.pixels.shape[0])
        image = Image.fromarray(self.pixels).resize((side, side), Image.Resampling.BICUBIC)
        panels = [(image, "", "")]
        for tag, values in zip(self.tags, upsample(self.maps, side), strict=True):
            panels.append((overlay(image, values), tag["label"], f"{tag['score']:.3g}"))
        across = min(len(panels), _PER_ROW)
        down = -(-len(panels) // _PER_ROW)
        step = side + _GAP, side + 2 * _LINE + _GAP
        page = Image.new("RGB", (across * step[0] + _GAP, down * step[1] + _GAP), "white")
        draw, font = ImageDraw.Draw(page), ImageFont.load_default(_TEXT)
        for number, (panel, label, score) in enumerate(panels):
            x = _GAP + number % across * step[0]
            y = _GAP + number // across * step[1]
            page.paste(panel, (x, y))
            for line, text in enumerate((_shortened(label, side, font), score)):
                draw.text((x, y + side + 2 + line * _LINE), text, "black", font)
        return page


def overlay(image: Image.Image, values: np.ndarray) -> Image.Image:
    """A map [h w] over an image of its size, from dark (lowest) to bright (highest).

    Of the image its edges are seen: its own brightness would be taken for the map's.
    """
    values = values.astype(np.float64) - values.min()
    values /= values.max() or 1
    steps = np.linspace(0, 1, len(_COLOURS))
    colours = np.stack([np.interp(values, steps, channel) for channel in _COLOURS.T], axis=-1)
    grey = image.convert("L")
    smooth = grey.filter(ImageFilter.GaussianBlur(image.width / 24))
    edges = np.asarray(grey, np.float64) - np.asarray(smooth, np.float64)
    mixed = 0.8 * colours + 0.2 * 128 + 0.7 * edges[..., None]
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def _shortened(text: str, width: int, font: Any) -> str:
    """As much of a text as fits into so many pixels."""
    shown = text
    while shown and font.getlength(shown if shown == text else f"{shown}…") > width:
        shown = shown[:-1]
    return shown if shown == text else f"{shown}…"


class Folder:
    """A new or empty folder for pictures, each named after its image.

    Raises:
        UserError: it is not empty, or cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        make_folder(folder)
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty: choose another folder, or empty it first")
        self._folder = folder
        self._taken: set[str] = set()

    def save(self, explanation: Explanation, name: str) -> Path:
        """Writes the picture as NAME.png, or NAME-2.png where there is one; where it is now."""
        number, free = 1, name
        while free.lower() in self._taken:
            number += 1
            free = f"{name}-{number}"
        self._taken.add(free.lower())
        path = self._folder / f"{free}.png"
        explanation.picture().save(path)
        return path
