"""Open Images v4 (2018_04; Kuznetsova et al., 2020): labels of whole images that people verified.

    train-annotations-human-imagelabels.csv     000026e7ee790996,verification,/m/04hgtk,0
    validation-..., test-...                    the same, here or in train/, validation/, test/
    class-descriptions.csv                      /m/0100nhbf,Sprenger's tulip
    classes-trainable.txt                       /m/... of the 7,186 seen classes, in their order
    top_400_unseen.csv                          optional: BiAM's choice of the unseen classes
    train/000026e7ee790996.jpg                  images

Confidence 1 is a positive, 0 a negative; all other labels of an image are unknown. The candidates
for unseen classes are those of the test annotations that are not seen, sorted: BiAM's file numbers
them from 0, and without it the 400 with the most positives there are taken. So each part needs
the test annotations too.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlclip_jax.data.manifest import Manifest, Rows
from mlclip_jax.data.raw.common import (
    check_part,
    csv_rows,
    integer,
    lines,
    malformed,
    unknown_label,
)  # fmt: skip
from mlclip_jax.labels.space import LabelSpace

PARTS: tuple[str, ...] = ("train", "validation", "test")
# Of the 9,011,219 training images 5,655,108 have labels that people verified.
EXPECTED: Mapping[str, Mapping[str, int]] = {
    "train": {"images": 5_655_108},
    "validation": {"images": 41_620},
    "test": {"images": 125_436},
}
UNSEEN = 400

_TOP = "top_400_unseen.csv"
_HEADER = ["ImageID", "Source", "LabelName", "Confidence"]
_CONFIDENCE = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}
_IMAGE_ID = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True)
class _Table:
    """The rows of an annotation file.

    Attributes:
      images: uint64 [m], the image ids as numbers.
      labels: int32 [m], the class numbers in class-descriptions.csv.
      positive: int8 [m], 1 or 0.
    """

    images: np.ndarray
    labels: np.ndarray
    positive: np.ndarray


def read(raw: Path, part: str) -> Manifest:
    """The annotated images of a part, ascending by id, with their positives and negatives.

    Where a label of an image was verified more than once, the last line counts. Images all of whose
    labels are outside the space stay, without a label. Reading keeps 13 bytes of each line.

    Args:
      raw: folder of the files above.
      part: of `PARTS`.

    Returns:
      A manifest over the seen classes, then the unseen ones, with subsets "seen" and "unseen"; ids
      are the MIDs, and a name that several classes have is followed by its MID.

    Raises:
      UserError: a file is missing or malformed, or names a class without a description.
    """
    check_part("openimages", part, PARTS)
    raw = Path(raw)
    names = _descriptions(raw / "class-descriptions.csv")
    numbers = {mid: number for number, mid in enumerate(names)}
    table = test = _table(_annotations(raw, "test"), numbers)
    if part != "test":
        table = _table(_annotations(raw, part), numbers)
    space = _space(raw, names, test)
    column_of = np.full(len(names), -1, np.int64)
    column_of[[numbers[mid] for mid in space.ids]] = np.arange(len(space))
    images, rows = np.unique(table.images, return_inverse=True)
    columns = column_of[table.labels]
    kept = columns >= 0
    # Reversed, because np.unique finds the first of equal pairs and the last one counts.
    pairs, index = np.unique((rows[kept] << 32 | columns[kept])[::-1], return_index=True)
    positive = table.positive[kept][::-1][index] == 1
    rows, columns = pairs >> 32, pairs & 0xFFFFFFFF
    keys = np.fromiter(
        (f"{part}/{image:016x}.jpg" for image in images),
        np.dtype(f"U{len(part) + 21}"),
        len(images),
    )
    return Manifest(
        name=f"openimages/{part}",
        space=space,
        keys=keys,
        positives=Rows.from_pairs(rows[positive], columns[positive], len(images)),
        negatives=Rows.from_pairs(rows[~positive], columns[~positive], len(images)),
    )


def _annotations(raw: Path, part: str) -> Path:
    name = f"{part}-annotations-human-imagelabels.csv"
    return raw / part / name if (raw / part / name).is_file() else raw / name


def _descriptions(path: Path) -> dict[str, str]:
    """The names of all classes by MID."""
    names: dict[str, str] = {}
    for line, fields in csv_rows(path):
        mid, name = fields[0].strip(), ",".join(fields[1:]).strip()
        if line == 1 and mid == "LabelName":
            continue
        if not mid or not name:
            raise malformed(path, line, f"{','.join(fields)[:80]!r} should be a class and its name")
        if mid in names:
            raise malformed(path, line, f"class {mid!r} stands there a second time")
        names[mid] = name
    return names


def _table(path: Path, numbers: Mapping[str, int]) -> _Table:
    """All rows of an annotation file in growing buffers, as there may be tens of millions."""
    images, labels, positive = array("Q"), array("i"), array("b")
    records = csv_rows(path)
    line, header = next(records, (1, []))
    if header != _HEADER:
        raise malformed(path, line, f"the columns should be {','.join(_HEADER)}, not {header}")
    last, image = "", 0
    for line, fields in records:
        if len(fields) != len(_HEADER):
            raise malformed(path, line, f"{len(fields)} columns, not {','.join(_HEADER)}")
        name, _, mid, confidence = fields
        if name != last:
            if not _IMAGE_ID.fullmatch(name):
                raise malformed(path, line, f"{name[:80]!r} is no image id of 16 hex digits")
            last, image = name, int(name, 16)
        if mid not in numbers:
            raise unknown_label(path, line, mid, numbers)
        if confidence not in _CONFIDENCE:
            raise malformed(path, line, f"confidence {confidence[:80]!r} of a person is 0 or 1")
        images.append(image)
        labels.append(numbers[mid])
        positive.append(_CONFIDENCE[confidence])
    return _Table(
        np.frombuffer(images, np.uint64),
        np.frombuffer(labels, np.int32),
        np.frombuffer(positive, np.int8),
    )


def _space(raw: Path, names: Mapping[str, str], test: _Table) -> LabelSpace:
    """The seen classes, then the unseen ones."""
    mids = np.array(list(names))
    path = raw / "classes-trainable.txt"
    line_of: dict[str, int] = {}
    for line, text in lines(path):
        mid = text.strip()
        if not mid:
            continue
        if mid not in names:
            raise unknown_label(path, line, mid, names)
        if mid in line_of:
            raise malformed(path, line, f"class {mid!r} stands on line {line_of[mid]} too")
        line_of[mid] = line
    counts = np.bincount(test.labels[test.positive == 1], minlength=len(mids))
    candidates = sorted(
        (str(mids[number]), int(counts[number]))
        for number in np.unique(test.labels)
        if mids[number] not in line_of
    )
    if (raw / _TOP).is_file():
        chosen = _top(raw / _TOP, len(candidates))
    else:
        chosen = sorted(range(len(candidates)), key=lambda i: -candidates[i][1])[:UNSEEN]
    ids = (*line_of, *(candidates[i][0] for i in chosen))
    times = Counter(names[mid] for mid in ids)
    subsets = {
        "seen": tuple(range(len(line_of))),
        "unseen": tuple(range(len(line_of), len(ids))),
    }
    return LabelSpace(
        names=tuple(f"{names[i]} ({i})" if times[names[i]] > 1 else names[i] for i in ids),
        prompt_names=tuple(names[mid] for mid in ids),
        ids=ids,
        subsets={name: members for name, members in subsets.items() if members},
        name="openimages",
    )


def _top(path: Path, candidates: int) -> list[int]:
    """BiAM's numbers of the unseen classes, one a line."""
    line_of: dict[int, int] = {}
    for line, text in lines(path):
        if not text.strip():
            continue
        number = integer(path, line, text.strip(), candidates, "candidate for an unseen class")
        if number in line_of:
            raise malformed(path, line, f"{number} stands on line {line_of[number]} too")
        line_of[number] = line
    return list(line_of)
