"""Your own images: a folder with labels.csv or labels.jsonl at its top.

    image,labels,captions,split
    beach/1.jpg,sea|sky,two boats off a beach,train
    beach/2.jpg,,an empty room,test

    {"image": "beach/1.jpg", "labels": ["sea", "sky"], "captions": ["two boats off a beach"]}

Columns (fields of each line's object, in JSONL):
  image      path of the image, relative to the folder.
  labels     labels that are present: between "|" in CSV, a list in JSONL; may be empty.
  negatives  optional, likewise: labels that were looked for and are absent. With this column a
             label that is in neither is unobserved; without it, it is absent.
  captions   optional, likewise.
  split      optional: train, validation or test. Without it all images are in "train".

The labels have the order of labels.txt, one a line, if it is there: a label that it has not is then
an error. Otherwise they are all labels that occur in the file, in alphabetical order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlclip_jax.data.manifest import Manifest, Rows
from mlclip_jax.data.raw.common import (
    check_part,
    csv_rows,
    image_key,
    is_text,
    json_object,
    lines,
    malformed,
    unknown_label,
)
from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.spec import hint

PARTS: tuple[str, ...] = ("train", "validation", "test")
EXPECTED: Mapping[str, Mapping[str, int]] = {}

_NEEDED = ("image", "labels")
_COLUMNS = (*_NEEDED, "negatives", "captions", "split")


def read(raw: Path, part: str) -> Manifest:
    """The images of a part, in the order of the file, with labels and, if there, captions.

    Args:
      raw: the folder.
      part: of `PARTS`.

    Raises:
      UserError: there is no file or more than one, a line is malformed, an image is repeated, a
        label unknown, or the part has no images.
    """
    check_part("custom", part, PARTS)
    path = _file(Path(raw))
    records = list(_csv(path) if path.suffix == ".csv" else _jsonl(path))
    if not records:
        raise UserError(f"{path} lists no images: a line for each is needed")
    columns = {name for _, record in records for name in record}
    space = _space(Path(raw), path, records)
    class_of = {name: i for i, name in enumerate(space.names)}
    first: dict[str, int] = {}
    chosen = []
    for line, record in records:
        key = record["image"] = image_key(path, line, record["image"])
        if key in first:
            raise malformed(path, line, f"image {key!r} stands on line {first[key]} too")
        first[key] = line
        split = record.get("split", "" if "split" in columns else "train")
        if split not in PARTS:
            raise malformed(path, line, f"unknown split {split[:80]!r}; {hint(split, PARTS)}")
        labels, negatives = record["labels"], record.get("negatives", ())
        for label in (*labels, *negatives):
            if label not in class_of:
                raise unknown_label(path, line, label, class_of)
        for label in set(labels) & set(negatives):
            raise malformed(path, line, f"{label!r} is among the labels and the negatives")
        if split == part:
            chosen.append(record)
    if not chosen:
        mend = "add a column 'split' (train, validation, test)"
        if "split" in columns:
            mend = f"give some the split {part!r}"
            mend += "" if part == "train" else ", or leave it out of config key 'eval.splits'"
        raise UserError(f"{path} has no images of the part {part!r}: {mend}")

    def rows(column: str) -> Rows:
        return Rows.from_lists([map(class_of.get, r.get(column, ())) for r in chosen])

    return Manifest(
        name=f"custom/{part}",
        space=space,
        keys=np.array([record["image"] for record in chosen], str),
        positives=rows("labels"),
        negatives=rows("negatives") if "negatives" in columns else None,
        captions=tuple(tuple(record.get("captions", ())) for record in chosen)
        if "captions" in columns
        else None,
    )


def _file(raw: Path) -> Path:
    found = [path for name in ("labels.csv", "labels.jsonl") if (path := raw / name).is_file()]
    if len(found) != 1:
        problem = "has both labels.csv and" if found else "has neither labels.csv nor"
        raise UserError(f"{raw} {problem} labels.jsonl: one of the two is needed")
    return found[0]


def _space(raw: Path, path: Path, records: list[tuple[int, dict[str, Any]]]) -> LabelSpace:
    if (raw / "labels.txt").is_file():
        return LabelSpace(LabelSpace.from_file(raw / "labels.txt").names, name="custom")
    names = {n for _, r in records for n in (*r["labels"], *r.get("negatives", ()))}
    if not names:
        raise UserError(
            f"{path} has no labels at all: give some image one, or write all labels to labels.txt"
        )
    return LabelSpace(tuple(sorted(names)), name="custom")


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line and columns of each record; those with several entries as lists of strings."""
    rows = csv_rows(path)
    line, header = next(rows, (1, []))
    header = [name.strip() for name in header]
    if len(header) == 1 and (mark := next((m for m in ";\t" if m in header[0]), "")):
        raise malformed(path, line, f"columns are parted by {mark!r}: save it with commas")
    _check_columns(path, line, header)
    if len(set(header)) != len(header):
        raise malformed(path, line, "a column is there twice")
    for line, fields in rows:
        if len(fields) != len(header):
            raise malformed(
                path,
                line,
                f"{len(fields)} columns, but the first line names {len(header)}: "
                "text with a comma must stand in double quotes",
            )
        record: dict[str, Any] = dict(zip(header, fields, strict=True))
        for name in record:
            if name in ("labels", "negatives", "captions"):
                entries = record[name].split("|") if record[name].strip() else []
                record[name] = _entries(path, line, name, entries)
        yield line, record


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `_csv`, from an object a line."""
    for line, text in lines(path):
        if not text.strip():
            continue
        whole = 'each line must be an object by itself: {"image": ..., "labels": [...]}'
        try:
            record = json.loads(text, object_pairs_hook=partial(json_object, path, line))
        except UserError:
            raise
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            at = f", column {error.colno}" if hasattr(error, "colno") else ""
            raise malformed(path, line, f"not JSON ({reason}{at}): {whole}") from error
        if not isinstance(record, dict):
            raise malformed(path, line, whole)
        _check_columns(path, line, list(record))
        for name, value in record.items():
            if name in ("image", "split"):
                if not isinstance(value, str):
                    raise malformed(path, line, f"{name!r} must be a string")
            elif not isinstance(value, list) or not all(isinstance(v, str) for v in value):
                raise malformed(path, line, f"{name!r} must be a list of strings")
            else:
                record[name] = _entries(path, line, name, value)
        yield line, record


def _check_columns(path: Path, line: int, names: list[str]) -> None:
    for name in names:
        if name not in _COLUMNS:
            raise malformed(path, line, f"unknown column {name[:80]!r}; {hint(name, _COLUMNS)}")
    for name in _NEEDED:
        if name not in names:
            raise malformed(path, line, f"there is no column {name!r}")


def _entries(path: Path, line: int, column: str, entries: list[str]) -> list[str]:
    stripped = [entry.strip() for entry in entries]
    if not all(stripped):
        raise malformed(path, line, f"an entry of {column!r} is empty")
    if wrong := next((entry for entry in stripped if not is_text(entry)), None):
        raise malformed(path, line, f"{wrong[:80]!r} in {column!r} is no Unicode text")
    return stripped
