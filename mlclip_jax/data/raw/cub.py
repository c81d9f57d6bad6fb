"""CUB-200-2011 with its 312 attributes (Wah et al., 2011), as the archive unpacks.

    CUB_200_2011/images.txt                               1 001.Black_footed_Albatross/....jpg
    CUB_200_2011/train_test_split.txt                     1 0
    CUB_200_2011/attributes/image_attribute_labels.txt    1 5 1 3 27.7080
    attributes.txt                                        1 has_bill_shape::curved_(up_or_down)

An attribute is positive where an annotator saw it, however uncertain. `attributes.txt`, which lies
at the top of the archive, only confirms the order of the attributes and may be absent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mlclip_jax.data.manifest import Manifest, Rows
from mlclip_jax.data.raw.common import check_part, image_key, lines, malformed, unknown_label
from mlclip_jax.errors import UserError
from mlclip_jax.labels import catalog
from mlclip_jax.labels.space import LabelSpace

PARTS: tuple[str, ...] = ("train", "test")
EXPECTED: Mapping[str, Mapping[str, int]] = {
    "train": {"images": 5_994, "labelled": 5_994},
    "test": {"images": 5_794, "labelled": 5_794},
}

_FOLDER = "CUB_200_2011"


def read(raw: Path, part: str) -> Manifest:
    """The images of a part, in the order of images.txt, with their attributes.

    Args:
      raw: folder that holds CUB_200_2011/.
      part: of `PARTS`.

    Raises:
      UserError: a file is missing or malformed, an image or attribute unknown, missing or repeated.
    """
    check_part("cub", part, PARTS)
    folder, space = Path(raw) / _FOLDER, catalog.cub()
    for path in (folder.parent / "attributes.txt", folder / "attributes.txt"):
        if path.is_file():
            _check_attributes(path, space)
    images = _numbered(folder / "images.txt")
    line_of: dict[str, int] = {}
    for line, text in images.values():
        name = image_key(folder / "images.txt", line, text)
        if name in line_of:
            problem = f"image {name!r} stands on line {line_of[name]} too"
            raise malformed(folder / "images.txt", line, problem)
        line_of[name] = line
    training = _training(folder / "train_test_split.txt", list(images))
    present = _present(folder / "attributes" / "image_attribute_labels.txt", list(images), space)
    chosen = training == (part == "train")
    keys = [f"{_FOLDER}/images/{name}" for name in line_of]
    rows, columns = np.nonzero(present[chosen] == 1)
    return Manifest(
        name=f"cub/{part}",
        space=space,
        keys=np.array(keys, np.str_)[chosen],
        positives=Rows.from_pairs(rows, columns, int(chosen.sum())),
    )


def _numbered(path: Path) -> dict[str, tuple[int, str]]:
    """Of a file of "<number> <text>" lines: by number, its line and text."""
    found: dict[str, tuple[int, str]] = {}
    for line, content in lines(path):
        if not content.strip():
            continue
        number, _, text = content.strip().partition(" ")
        if not (number.isascii() and number.isdigit()) or not text:
            raise malformed(path, line, f"{content[:80]!r} should be a number, a space and a text")
        if number in found:
            raise malformed(path, line, f"{number} stands on line {found[number][0]} too")
        found[number] = line, text.strip()
    return found


def _training(path: Path, images: list[str]) -> np.ndarray:
    """Whether each image is for training, bool [n]."""
    split, known = _numbered(path), set(images)
    for image, (line, value) in split.items():
        if image not in known:
            raise malformed(path, line, f"image {image} is not in images.txt")
        if value not in ("0", "1"):
            raise malformed(path, line, f"image {image} has {value[:80]!r}, not 0 or 1")
    missing = [image for image in images if image not in split]
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} images of images.txt, the first is number {missing[0]}: "
            "unpack the archive again"
        )
    return np.array([split[image][1] == "1" for image in images], bool)


def _present(path: Path, images: list[str], space: LabelSpace) -> np.ndarray:
    """1 where an attribute is present, 0 where not, int8 [n c]; each pair has exactly one line.

    Some lines of the official file have more than five fields: only the first three count.
    """
    row_of = {image: row for row, image in enumerate(images)}
    column_of = {number: column for column, number in enumerate(space.ids)}
    present = np.full((len(images), len(space)), -1, np.int8)
    for line, content in lines(path):
        fields = content.split(maxsplit=3)
        if not fields:
            continue
        if len(fields) < 3 or fields[2] not in ("0", "1"):
            raise malformed(
                path, line, f"{content[:80]!r} should begin with image, attribute and 0 or 1"
            )
        image, attribute, value = fields[:3]
        if image not in row_of:
            raise malformed(path, line, f"image {image[:80]} is not in images.txt")
        if attribute not in column_of:
            raise unknown_label(path, line, attribute, space.ids)
        cell = row_of[image], column_of[attribute]
        if present[cell] >= 0:
            raise malformed(path, line, f"image {image} has attribute {attribute} a second time")
        present[cell] = value == "1"
    rows, columns = np.nonzero(present < 0)
    if len(rows):
        raise UserError(
            f"{path} lacks {len(rows)} pairs of image and attribute, the first is "
            f"{images[rows[0]]} {space.ids[columns[0]]}: it is cut off, unpack the archive again"
        )
    return present


def _check_attributes(path: Path, space: LabelSpace) -> None:
    """Raises UserError where attributes.txt is not the list that `space` was made from."""
    found = _numbered(path)
    for number, (line, text) in found.items():
        kind, _, value = text.removeprefix("has_").partition("::")
        name = f"{re.sub(r'_[(].*[)]', '', value)} {kind.split('_')[0]}"
        if number not in space.ids:
            raise unknown_label(path, line, number, space.ids)
        if space.names[space.ids.index(number)] != name:
            expected = space.names[space.ids.index(number)]
            raise malformed(path, line, f"{text[:80]!r} is not the attribute {expected!r}")
    if len(found) < len(space):
        raise UserError(f"{path} has {len(found)} attributes, not {len(space)}: it is cut off")
