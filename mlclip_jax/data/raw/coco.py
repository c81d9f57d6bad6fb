"""COCO 2014 and 2017 (Lin et al., 2014), as the archives unpack.

    annotations/instances_train2014.json    categories, images and one annotation for each object
    annotations/captions_train2014.json     optional: five captions for each image
    train2014/COCO_train2014_000000480023.jpg

A label is positive where an image has any annotation of its category, crowds included. Images come
in the order of the file and stay where they have no annotation: benchmarks that leave these out
say so in their protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlclip_jax.data.manifest import Manifest, Rows
from mlclip_jax.data.raw.common import (
    check_part,
    field,
    image_key,
    is_text,
    malformed,
    read_json,
)
from mlclip_jax.labels import catalog
from mlclip_jax.labels.space import LabelSpace

PARTS: tuple[str, ...] = ("train2014", "val2014", "train2017", "val2017")
EXPECTED: Mapping[str, Mapping[str, int]] = {
    "train2014": {"images": 82_783, "labelled": 82_081},
    "val2014": {"images": 40_504, "labelled": 40_137},
    "train2017": {"images": 118_287, "labelled": 117_266},
    "val2017": {"images": 5_000, "labelled": 4_952},
}


def read(raw: Path, part: str) -> Manifest:
    """The images of a part, in the order of its file, with labels and, if there, captions.

    Args:
      raw: folder that holds annotations/ and the folder of images, which bears the part's name.
      part: of `PARTS`.

    Raises:
      UserError: a file is missing or malformed, an image repeated, an image or category unknown.
    """
    check_part("coco", part, PARTS)
    folder, space = Path(raw) / "annotations", catalog.coco()
    path = folder / f"instances_{part}.json"
    content = read_json(path, hook=_slim)
    class_of = _classes(path, content, space)
    row_of, keys = _images(path, content, part)
    rows, classes = [], []
    for i, entry in enumerate(field(path, "top level", content, "annotations", list)):
        place = f"annotations[{i}]"
        rows.append(_row(path, place, entry, row_of))
        category = field(path, place, entry, "category_id", int)
        if category not in class_of:
            raise malformed(path, f"{place}.category_id", f"COCO has no category {category}")
        classes.append(class_of[category])
    captions = folder / f"captions_{part}.json"
    return Manifest(
        name=f"coco{part[-4:]}/{part[:-4]}",
        space=space,
        keys=np.array(keys, str),
        positives=Rows.from_pairs(np.array(rows), np.array(classes), len(keys)),
        captions=_captions(captions, row_of) if captions.is_file() else None,
    )


def _slim(entry: dict[str, Any]) -> dict[str, Any]:
    """Drops the outlines while the file is parsed: they take most of its memory."""
    entry.pop("segmentation", None)
    return entry


def _classes(path: Path, content: Any, space: LabelSpace) -> dict[int, int]:
    """The class of each category id; the file's categories must be those of COCO."""
    class_of = {int(number): i for i, number in enumerate(space.ids)}
    for i, entry in enumerate(field(path, "top level", content, "categories", list)):
        place = f"categories[{i}]"
        number = field(path, place, entry, "id", int)
        name = field(path, place, entry, "name", str)
        expected = space.names[class_of[number]] if number in class_of else None
        if name != expected:
            raise malformed(
                path, place, f"category {number} is {name!r}, but in COCO it is {expected!r}"
            )
    return class_of


def _images(path: Path, content: Any, part: str) -> tuple[dict[int, int], list[str]]:
    """The row of each image id, and the keys in the order of rows."""
    row_of, first = {}, {}
    for i, entry in enumerate(field(path, "top level", content, "images", list)):
        place = f"images[{i}]"
        number = field(path, place, entry, "id", int)
        if number in row_of:
            raise malformed(path, f"{place}.id", f"image {number} is listed before")
        row_of[number] = i
        name = field(path, place, entry, "file_name", str)
        key = f"{part}/{image_key(path, f'{place}.file_name', name)}"
        if key in first:
            raise malformed(path, f"{place}.file_name", f"{name!r} is images[{first[key]}] too")
        first[key] = i
    return row_of, list(first)


def _row(path: Path, place: str, entry: Any, row_of: Mapping[int, int]) -> int:
    number = field(path, place, entry, "image_id", int)
    if number not in row_of:
        raise malformed(path, f"{place}.image_id", f"image {number} is not among the images")
    return row_of[number]


def _captions(path: Path, row_of: Mapping[int, int]) -> tuple[tuple[str, ...], ...]:
    captions: list[list[str]] = [[] for _ in row_of]
    content = read_json(path)
    for i, entry in enumerate(field(path, "top level", content, "annotations", list)):
        place = f"annotations[{i}]"
        row = _row(path, place, entry, row_of)
        caption = field(path, place, entry, "caption", str).strip()
        if not is_text(caption):
            raise malformed(path, f"{place}.caption", f"{caption[:80]!r} is no Unicode text")
        captions[row].append(caption)
    return tuple(map(tuple, captions))
