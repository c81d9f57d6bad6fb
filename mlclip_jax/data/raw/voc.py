"""Pascal VOC 2007 and 2012 (Everingham et al., 2010), as the archives unpack.

    VOCdevkit/VOC2012/ImageSets/Main/train.txt           2008_000008
    VOCdevkit/VOC2012/ImageSets/Main/horse_train.txt     2008_000008  1
    VOCdevkit/VOC2012/Annotations/2008_000008.xml        the objects, each with <difficult>
    VOCdevkit/VOC2012/JPEGImages/2008_000008.jpg

Labels are those of the XML files. A class with an object that is not marked difficult is positive;
one with difficult objects only stands in `difficult`, and a protocol decides what it is. The lists
by class (1, 0 for difficult objects only, -1) must say the same, where they are there.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mlclip_jax.data.manifest import Manifest, Rows
from mlclip_jax.data.raw.common import check_part, lines, malformed, unknown_label, unreadable
from mlclip_jax.errors import UserError
from mlclip_jax.labels import catalog

# VOC 2012 publishes no labels of its test images: what is called so is "val2012".
PARTS: tuple[str, ...] = (
    "train2007", "val2007", "trainval2007", "test2007", "train2012", "val2012", "trainval2012",
)  # fmt: skip
EXPECTED: Mapping[str, Mapping[str, int]] = {
    "train2007": {"images": 2_501},
    "val2007": {"images": 2_510},
    "trainval2007": {"images": 5_011},
    "test2007": {"images": 4_952},
    "train2012": {"images": 5_717, "labelled": 5_717},
    "val2012": {"images": 5_823, "labelled": 5_823, "positives": 8_856},
    "trainval2012": {"images": 11_540, "labelled": 11_540},
}


def read(raw: Path, part: str) -> Manifest:
    """The images of a part, in the order of its list, with their labels.

    Args:
      raw: folder that holds VOCdevkit/.
      part: of `PARTS`.

    Raises:
      UserError: a file is missing or malformed, an image repeated, a class unknown, or the list of
        a class says something else than the XML files.
    """
    check_part("voc", part, PARTS)
    split, year, space = part[:-4], part[-4:], catalog.voc()
    inside = f"VOCdevkit/VOC{year}"
    folder = Path(raw) / inside
    if not folder.is_dir():
        raise UserError(f"there is no {folder}: give the folder that holds VOCdevkit")
    sets = folder / "ImageSets" / "Main"
    ids = _ids(sets / f"{split}.txt")
    class_of = {name: i for i, name in enumerate(space.names)}
    # 1 positive, 0 difficult objects only, -1 absent, as in the lists by class.
    state = np.full((len(ids), len(space)), -1, np.int8)
    for row, name in enumerate(ids):
        for label, difficult in _objects(folder / "Annotations" / f"{name}.xml", class_of):
            state[row, label] = max(state[row, label], 0 if difficult else 1)
    for name, label in class_of.items():
        path = sets / f"{name}_{split}.txt"
        if path.is_file():
            _check_list(path, dict(zip(ids, state[:, label].tolist(), strict=True)))
    return Manifest(
        name=f"voc{year}/{split}",
        space=space,
        keys=np.array([f"{inside}/JPEGImages/{name}.jpg" for name in ids], str),
        positives=Rows.from_pairs(*np.nonzero(state == 1), len(ids)),
        difficult=Rows.from_pairs(*np.nonzero(state == 0), len(ids)),
    )


def _ids(path: Path) -> list[str]:
    """The image ids of a list, one a line."""
    first: dict[str, int] = {}
    for number, line in lines(path):
        name = line.strip()
        if not name:
            continue
        if len(name.split()) != 1 or set(name) & set("/\\"):
            raise malformed(path, number, f"{name[:80]!r} is no image id, such as 2008_000008")
        if name in first:
            raise malformed(path, number, f"image {name!r} stands on line {first[name]} too")
        first[name] = number
    return list(first)


def _objects(path: Path, class_of: Mapping[str, int]) -> list[tuple[int, bool]]:
    """Class and whether it is difficult of each object of an image."""
    try:
        root = ET.parse(path).getroot()
    except OSError as error:
        raise unreadable(path, error) from error
    except ET.ParseError as error:
        raise malformed(
            path, error.position[0], f"not XML ({error}): the file is cut off or damaged"
        ) from error
    except (LookupError, ValueError) as error:
        raise UserError(f"{path} is in an unknown encoding ({error})") from error
    if root.tag != "annotation":
        raise malformed(path, f"<{root.tag[:80]}>", "an annotation of VOC begins with <annotation>")
    objects = []
    # Parts of a person (<part>) have names too: only the object's own children count.
    for i, entry in enumerate(root.findall("object"), start=1):
        place = f"object {i}"
        name = (entry.findtext("name") or "").strip()
        if name not in class_of:
            raise unknown_label(path, place, name, class_of)
        difficult = entry.findtext("difficult", "0").strip()
        if difficult not in ("0", "1"):
            raise malformed(path, place, f"<difficult> is {difficult[:80]!r}, neither 0 nor 1")
        objects.append((class_of[name], difficult == "1"))
    return objects


def _check_list(path: Path, state: Mapping[str, int]) -> None:
    """Raises unless the list of a class has each image once, with its state in the XML files."""
    missing = dict(state)
    for number, line in lines(path):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 2 or fields[1] not in ("1", "0", "-1"):
            raise malformed(path, number, f'{line[:80]!r} should read "<image id> 1", 0 or -1')
        name, value = fields
        if name not in missing:
            other = "stands here before" if name in state else "is not in the list of the part"
            raise malformed(path, number, f"image {name!r} {other}")
        if int(value) != missing.pop(name):
            raise malformed(
                path,
                number,
                f"image {name!r} has {value}, but its XML file says {state[name]}: "
                "files of two releases are mixed, unpack the archive again",
            )
    if missing:
        raise UserError(f"{path} lacks the image {next(iter(missing))!r}: unpack the archive again")
