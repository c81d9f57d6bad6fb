"""Tiny corpora in the raw formats of COCO, Pascal VOC and `custom`, images included.

`coco`, `voc` and `custom` fill a folder that the reader of that name takes, with at least four
images for training and two for testing; the functions below them write any content.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlclip_jax.labels import catalog

# The example lines of the published files.
COCO_LINE = (
    '{"images":[{"id":480023,"file_name":"COCO_train2014_000000480023.jpg",'
    '"height":427,"width":640}],\n'
    ' "annotations":[{"id":86,"image_id":480023,"category_id":58,"iscrowd":0,'
    '"area":54652.9556,"bbox":[116.95,305.86,285.3,266.03]}],\n'
    ' "categories":[{"id":51,"name":"bowl","supercategory":"kitchen"}]}'
)
VOC_LINE = (
    "<object><name>horse</name><pose>Left</pose><truncated>0</truncated>"
    "<difficult>0</difficult><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax>"
    "</bndbox></object>"
)

# Image id -> (category id, iscrowd) of its annotations. As strings, 1000 sorts before 9.
COCO = {
    "train": {
        480023: [(58, 0), (58, 0)],
        9: [(1, 1)],
        1000: [],
        57: [(90, 0), (1, 0)],
        8: [(3, 0)],
    },
    "val": {42: [(13, 0)], 73: [], 74: [(58, 0), (18, 1)]},
}
# Image id -> (class, difficult) of its objects.
VOC = {
    "train": {
        "000012": [("horse", 0), ("person", 0), ("person", 1)],
        "000017": [("person", 1), ("dog", 0)],
        "000023": [("bicycle", 0)],
        "000026": [("car", 1)],
    },
    "val": {"000005": [("chair", 0), ("chair", 1)], "000007": [("cat", 0), ("person", 1)]},
    "test": {"000001": [("dog", 0), ("person", 0)], "000002": [("train", 0), ("sofa", 1)]},
}
CUSTOM = [
    {"image": "beach/1.jpg", "labels": ["sea", "sky"], "captions": ["two boats, off a beach"]},
    {"image": "beach/2.jpg", "labels": ["sea"], "captions": ["a wave", "the sea"]},
    {"image": "straße 7/ü.jpg", "labels": ["car", "sky"], "captions": []},
    {"image": "straße 7/3.jpg", "labels": ["car"], "captions": ["a car"]},
    {"image": "4.jpg", "labels": [], "captions": ["an empty room"]},
    {"image": "5.jpg", "labels": ["sky"], "captions": ["clouds"]},
    {"image": "6.jpg", "labels": ["car", "sea"], "captions": ["a car by the sea"]},
]
CUSTOM_SPLITS = ("train", "train", "train", "train", "validation", "test", "test")


def coco(raw: Path, *, year: int = 2014) -> Path:
    """`COCO` as the parts train and val of a year, with two captions for each image."""
    for split, images in COCO.items():
        part = f"{split}{year}"
        prefix = f"COCO_{part}_" if year == 2014 else ""
        names = {number: f"{prefix}{number:012d}.jpg" for number in images}
        pairs = [(number, *entry) for number, entries in images.items() for entry in entries]
        write_coco(raw, part, names, pairs)
        captions = [
            {"image_id": number, "id": 10 * i + j, "caption": f"picture {number}, version {i}. "}
            for i in range(2)
            for j, number in enumerate(sorted(images))
        ]
        write_json(raw / "annotations" / f"captions_{part}.json", {"annotations": captions})
        for number, name in names.items():
            write_image(raw / part / name, number)
    return raw


def voc(raw: Path, *, year: int = 2007) -> Path:
    """`VOC` as the parts train, val, trainval and test of a year."""
    write_voc(raw, VOC | {"trainval": VOC["train"] | VOC["val"]}, year=year)
    for images in VOC.values():
        for name in images:
            write_image(raw / f"VOCdevkit/VOC{year}/JPEGImages/{name}.jpg", int(name))
    return raw


def custom(raw: Path, *, suffix: str = ".csv", splits: Sequence[str] = CUSTOM_SPLITS) -> Path:
    """`CUSTOM` as a CSV or JSONL file; without a column "split" if `splits` is empty."""
    records = [dict(record) for record in CUSTOM]
    for record, split in zip(records, splits, strict=False):
        record["split"] = split
    write_custom(raw, records, suffix=suffix)
    for i, record in enumerate(records):
        write_image(raw / record["image"], i)
    return raw


def write_coco(
    raw: Path, part: str, names: Mapping[int, str], pairs: Iterable[tuple[int, int, int]]
) -> None:
    """The instances file of a part.

    Args:
      names: the file name of each image id.
      pairs: image id, category id and iscrowd of each annotation.
    """
    space = catalog.coco()
    outline = {0: [[1.5, 2, 3.5, 4, 5, 6.25]], 1: {"counts": [3, 5], "size": [2, 4]}}
    content = {
        "info": {"year": 2014},
        "images": [
            {"id": number, "file_name": name, "height": 24, "width": 32}
            for number, name in names.items()
        ],
        "annotations": [
            {"id": i, "image_id": number, "category_id": category, "iscrowd": crowd, "area": 1.5}
            | {"bbox": [1.5, 2, 3.5, 4], "segmentation": outline[crowd]}
            for i, (number, category, crowd) in enumerate(pairs)
        ],
        "categories": [
            {"id": int(number), "name": name, "supercategory": "any"}
            for number, name in zip(space.ids, space.names, strict=True)
        ],
    }
    write_json(raw / "annotations" / f"instances_{part}.json", content)


def write_voc(
    raw: Path, parts: Mapping[str, Mapping[str, Sequence[tuple[str, int]]]], *, year: int
) -> None:
    """Lists, lists by class and XML files of the parts, each a mapping as in `VOC`."""
    folder = raw / f"VOCdevkit/VOC{year}"
    for split, images in parts.items():
        write_text(folder / f"ImageSets/Main/{split}.txt", "".join(f"{i}\n" for i in images))
        for label in catalog.voc().names:
            lines = []
            for name, objects in images.items():
                marks = [1 - difficult for kind, difficult in objects if kind == label]
                lines.append(f"{name} {max(marks, default=-1):2d}\n")
            write_text(folder / f"ImageSets/Main/{label}_{split}.txt", "".join(lines))
        for name, objects in images.items():
            entries = "".join(
                f"<object><name>{kind}</name><pose>Left</pose><difficult>{difficult}</difficult>"
                "<part><name>head</name><difficult>0</difficult></part></object>\n"
                for kind, difficult in objects
            )
            text = f"<annotation><filename>{name}.jpg</filename>\n{entries}</annotation>\n"
            write_text(folder / f"Annotations/{name}.xml", text)


def write_custom(raw: Path, records: Sequence[Mapping[str, Any]], *, suffix: str) -> None:
    """labels.csv or labels.jsonl of records, which in CSV must all have the same columns."""
    if suffix == ".jsonl":
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_text(raw / "labels.jsonl", text)
        return
    raw.mkdir(parents=True, exist_ok=True)
    with (raw / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(records[0])
        for record in records:
            writer.writerow(v if isinstance(v, str) else "|".join(v) for v in record.values())


def write_json(path: Path, value: Any) -> None:
    """A JSON file, with its folder."""
    write_text(path, json.dumps(value))


def write_text(path: Path, text: str) -> None:
    """A UTF-8 file, with its folder; line ends stay as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")


def write_image(path: Path, seed: int) -> None:
    """A JPEG of 32 x 24 pixels, another for every seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8)
    Image.fromarray(pixels).save(path, quality=90)
