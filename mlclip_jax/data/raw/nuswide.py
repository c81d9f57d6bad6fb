r"""NUS-WIDE (Chua et al., 2009): 81 concepts that people judged, and 1,000 tags from Flickr.

    ImageList/TrainImagelist.txt                          actor\0001_2124494179.jpg
    Groundtruth/TrainTestLabels/Labels_airport_Train.txt  0 or 1 for each line of that list
    Groundtruth/AllLabels/Labels_airport.txt              the same for Imagelist.txt
    NUS_WID_Tags/Train_Tags1k.dat                         0 or 1 for each tag of TagList1k.txt
    Flickr/actor/0001_2124494179.jpg                      images

Everything is aligned by row. Some photos are there under two paths: an image is its path, never
its photo id. The parts with tags have the 925 tags that are no concepts for labels, the seen
classes of the zero-shot benchmarks, and the concepts in `aux["concepts81"]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from mlclip_jax.data.manifest import Manifest, Rows
from mlclip_jax.data.raw.common import check_part, image_key, lines, malformed
from mlclip_jax.errors import UserError
from mlclip_jax.labels import catalog
from mlclip_jax.labels.space import LabelSpace

PARTS: tuple[str, ...] = ("train", "test", "all", "train_tags", "test_tags")
EXPECTED: Mapping[str, Mapping[str, int]] = {
    "train": {"images": 161_789},
    "test": {"images": 107_859},
    "all": {"images": 269_648},
    "train_tags": {"images": 161_789},
    "test_tags": {"images": 107_859},
}
CONCEPTS = "concepts81"

_TAG_LIST = "NUS_WID_Tags/TagList1k.txt"


def read(raw: Path, part: str) -> Manifest:
    """The images of an official list, in its order, those without a label included.

    Args:
      raw: folder that holds ImageList/, Groundtruth/, NUS_WID_Tags/ and Flickr/.
      part: of `PARTS`; "all" is Imagelist.txt, which has both splits.

    Raises:
      UserError: a file is missing or malformed, files are not aligned, or a path stands twice.
    """
    check_part("nuswide", part, PARTS)
    raw = Path(raw)
    split = {"train": "Train", "test": "Test", "all": ""}[part.removesuffix("_tags")]
    path = raw / "ImageList" / f"{split}Imagelist.txt"
    line_of: dict[str, int] = {}
    for line, text in _filled(path):
        key = f"Flickr/{image_key(path, line, text)}"
        if key in line_of:
            raise malformed(path, line, f"image {text!r} stands on line {line_of[key]} too")
        line_of[key] = line
    keys = np.array(list(line_of), np.str_)
    concepts = _concepts(raw / "Groundtruth", split, len(keys))
    labels: dict = {"space": catalog.nus(), "positives": concepts}
    if part.endswith("_tags"):
        labels = _tags(raw, split, len(keys)) | {"aux": {CONCEPTS: concepts}}
    return Manifest(name=f"nuswide/{part}", keys=keys, **labels)


def joined(manifest: Manifest) -> Manifest:
    """Of a part with tags: tags and concepts as labels of one space, for generalised zero-shot.

    Returns:
      The same images over the tags, then the 81 concepts (925 + 81), with the subsets "seen" and
      "unseen"; `aux` is empty.
    """
    seen, unseen = manifest.space, catalog.nus()
    space = LabelSpace(
        names=seen.names + unseen.names,
        subsets={
            "seen": tuple(range(len(seen))),
            "unseen": tuple(range(len(seen), len(seen) + len(unseen))),
        },
        name="nus1006",
    )
    (rows, tags), (others, concepts) = manifest.positives.pairs(), manifest.aux[CONCEPTS].pairs()
    positives = Rows.from_pairs(
        np.concatenate([rows, others]), np.concatenate([tags, concepts + len(seen)]), len(manifest)
    )
    return replace(manifest, space=space, positives=positives, aux={})


def _filled(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line, stripped; blank lines may only be at the end."""
    blank = 0
    for number, line in lines(path):
        text = line.strip()
        if not text:
            blank = blank or number
        elif blank:
            raise malformed(path, blank, "blank line; files of NUS-WIDE are aligned line by line")
        else:
            yield number, text


def _check_length(path: Path, found: int, n: int) -> None:
    if found != n:
        raise UserError(
            f"{path} has {found} rows, but its list of images has {n}: both must be of one release"
        )


def _concepts(folder: Path, split: str, n: int) -> Rows:
    """The 81 concepts of the n images, from one file for each."""
    rows, columns = [], []
    for column, name in enumerate(catalog.nus().names):
        path = folder / "AllLabels" / f"Labels_{name}.txt"
        if split:
            path = folder / "TrainTestLabels" / f"Labels_{name}_{split}.txt"
        values = np.zeros(n, bool)
        count = 0
        for count, text in _filled(path):
            if text not in ("0", "1"):
                raise malformed(path, count, f"{text[:80]!r} is not 0 or 1")
            if count <= n:
                values[count - 1] = text == "1"
        _check_length(path, count, n)
        rows.append(np.flatnonzero(values))
        columns.append(np.full(len(rows[-1]), column))
    return Rows.from_pairs(np.concatenate(rows), np.concatenate(columns), n)


def _tags(raw: Path, split: str, n: int) -> dict:
    """The space of the tags that are no concepts, and the positives of the n images over it."""
    line_of: dict[str, int] = {}
    for line, tag in _filled(raw / _TAG_LIST):
        if tag in line_of:
            raise malformed(raw / _TAG_LIST, line, f"{tag!r} stands on line {line_of[tag]} too")
        line_of[tag] = line
    concepts = set(catalog.nus().names)
    names = tuple(tag for tag in line_of if tag not in concepts)
    if not names:
        raise UserError(f"{raw / _TAG_LIST} holds no tag besides the concepts: unpack it again")
    kept = np.array([tag not in concepts for tag in line_of], bool)
    path = raw / "NUS_WID_Tags" / f"{split}_Tags1k.dat"
    rows = []
    for line, text in _filled(path):
        fields = text.split()
        digits = "".join(fields)
        if len(fields) != len(kept):
            raise malformed(
                path, line, f"{len(fields)} values, but {_TAG_LIST} has {len(kept)} tags"
            )
        if len(digits) != len(kept) or digits.strip("01"):
            wrong = next(value for value in fields if value not in ("0", "1"))
            raise malformed(path, line, f"{wrong[:80]!r} is not 0 or 1")
        present = np.frombuffer(digits.encode(), np.uint8) == ord("1")
        rows.append(np.flatnonzero(present[kept]).astype(np.int32))
    _check_length(path, len(rows), n)
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    values = np.concatenate([np.zeros(0, np.int32), *rows])
    return {"space": LabelSpace(names, name="nus925"), "positives": Rows(offsets, values)}
