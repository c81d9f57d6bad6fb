"""VG-200: 200 classes of Visual Genome (Krishna et al., 2017) with the lists of SSGRL.

    VG_100K/2360596.jpg, VG_100K_2/...          images, in whichever folder the download put them
    train_list_500.txt, test_list_500.txt       2360596.jpg
    vg_category_500_labels_index.json           {"2360596.jpg": [3, 17, 421]}

The index numbers 500 classes, of which VG-200 is the first 200; no names of them are published
(`catalog.vg200`). An image whose classes are all beyond the 200 stays, without a label.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mlclip_jax.data.manifest import Manifest, Rows
from mlclip_jax.data.raw.common import check_part, field, image_key, lines, malformed, read_json
from mlclip_jax.errors import UserError
from mlclip_jax.labels import catalog

PARTS: tuple[str, ...] = ("train", "test")
EXPECTED: Mapping[str, Mapping[str, int]] = {
    "train": {"images": 82_904},
    "test": {"images": 10_000},
}

_INDEX = "vg_category_500_labels_index.json"
_INDEXED = 500  # classes that the index numbers
_FOLDERS = ("VG_100K", "VG_100K_2")


def read(raw: Path, part: str) -> Manifest:
    """The images of a list, in its order, with their classes below 200.

    Args:
      raw: folder of the two lists and the index.
      part: of `PARTS`.

    Returns:
      A manifest whose keys are the names of the images ("2360596.jpg"); `image_path` finds them.

    Raises:
      UserError: a file is missing or malformed, or an image listed twice or not in the index.
    """
    check_part("vg", part, PARTS)
    raw, space = Path(raw), catalog.vg200()
    index = read_json(raw / _INDEX)
    path = raw / f"{part}_list_500.txt"
    line_of: dict[str, int] = {}
    classes = []
    for line, text in lines(path):
        if not text.strip():
            continue
        key = image_key(path, line, text)
        if key in line_of:
            raise malformed(path, line, f"{key!r} stands on line {line_of[key]} too")
        if isinstance(index, dict) and key not in index:
            raise malformed(path, line, f"{key!r} is not in {_INDEX}")
        line_of[key] = line
        found = field(raw / _INDEX, "the whole", index, key, list)
        for value in found:
            if type(value) is not int or not 0 <= value < _INDEXED:
                raise malformed(
                    raw / _INDEX, key, f"{str(value)[:80]!r} is no class from 0 to {_INDEXED - 1}"
                )
        classes.append([value for value in found if value < len(space)])
    return Manifest(
        name=f"vg/{part}",
        space=space,
        keys=np.array(list(line_of), np.str_),
        positives=Rows.from_lists(classes),
    )


def image_path(raw: Path, key: str) -> Path:
    """The file of an image, in the first of the two folders that has it.

    Raises:
      UserError: neither has it.
    """
    paths = [Path(raw) / folder / key for folder in _FOLDERS]
    for path in paths:
        if path.is_file():
            return path
    raise UserError(f"the image is neither {paths[0]} nor {paths[1]}: unpack both archives")
