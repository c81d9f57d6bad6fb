"""Data sets that TFDS's own builders prepared: `coco`, `voc` and `imagenet2012` in ArrayRecord.

Nothing is copied: all records are read once for keys and labels, and beside the manifest a link to
them is kept. As TFDS shuffles, rows are put in the order of the keys. That is the order of the raw
files for VOC and ImageNet, but not for COCO, where draws that go by that order (the partial labels
of SARB) come out otherwise than from the raw files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlclip_jax.data import sources
from mlclip_jax.data.assemble import manifest_path
from mlclip_jax.data.builders import Prepared, lock
from mlclip_jax.data.files import publish
from mlclip_jax.data.manifest import Manifest, Rows
from mlclip_jax.data.raw import imagenet
from mlclip_jax.errors import UserError
from mlclip_jax.labels import catalog
from mlclip_jax.labels.space import LabelSpace

_EVAL = {"val": "validation", "trainval": "train+validation"}  # other names of TFDS's splits
#: Name of TFDS's data set by corpus.
CORPORA = {"coco": "coco", "voc": "voc", "imagenet": "imagenet2012"}


def link(
    corpus: str,
    part: str,
    folder: Path,
    data_dir: Path,
    *,
    raw: Path | None = None,
    tick: Callable[[int], None] = lambda images: None,
) -> Prepared:
    """Makes a part of a corpus readable from a data set of TFDS.

    Args:
      corpus: one of `CORPORA`.
      part: of the `PARTS` of its reader, e.g. "train2014".
      folder: of the data set, with its version: ".../coco/2014/1.1.0".
      data_dir: gets a folder of the corpus' name with manifest and link.
      raw: for ImageNet, the folder of the file that names the classes (`data.raw.imagenet`).
      tick: told numbers of records that are read.

    Raises:
      UserError: no such data set, it is another corpus or year, not in ArrayRecord, or damaged;
        or another run is preparing the part.
    """
    if corpus not in CORPORA:
        raise UserError(f"only {', '.join(CORPORA)} can be taken from TFDS, not {corpus}")
    year = "".join(filter(str.isdigit, part))
    split = part.removesuffix(year)
    info = sources.open_builder(folder).info
    found = info.name if corpus == "imagenet" else f"{info.name}/{info.config_name}"
    needed = CORPORA[corpus] if corpus == "imagenet" else f"{CORPORA[corpus]}/{year}"
    if found != needed or part.startswith("21k"):
        raise UserError(f"{folder} is {found}, which has not the images of {corpus}/{part}")
    target = data_dir / corpus
    if sources.records_folder(target, part).exists():
        raise UserError(
            f"{sources.records_folder(target, part)} holds records of {corpus}/{part} already: "
            "remove it, or choose another --data_dir"
        )
    records = sources.open_records(folder, _EVAL.get(split, split))
    single = corpus == "imagenet"
    label = info.features["label"] if single else info.features["objects"]["label"]
    space = _space(corpus, raw)
    column = {name: i for i, name in enumerate(space.ids if single else space.names)}
    if others := set(label.names) - set(column):
        raise UserError(f"{folder} has the class {min(others)!r}, which {space.name} has not")
    feature = "file_name" if single else "image/filename"
    keys, positives, difficult = [], [], []
    for i in range(len(records)):
        try:
            record = records[i]
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"record {i} of {folder} cannot be read ({error}): prepare it again"
            ) from error
        sure, unsure = _labels(record, single=single)
        name = record[feature].decode()
        keys.append(f"{_prefix(corpus, part, year, label.names, sure)}/{name}")
        positives.append([column[label.names[n]] for n in sure])
        difficult.append([column[label.names[n]] for n in unsure - sure])
        tick(1)
    order = np.argsort(np.array(keys), kind="stable")
    manifest = Manifest(
        name=f"{corpus}{year}/{split}",
        space=space,
        keys=np.array(keys),
        positives=Rows.from_lists(positives),
        difficult=Rows.from_lists(difficult) if corpus == "voc" else None,
    ).take(order)
    content = {
        "folder": str(folder.resolve()),
        "split": _EVAL.get(split, split),
        "feature": feature,
        "keys": sources.keys_digest(manifest.keys),
        "order": order.tolist(),
    }
    path = sources.link_path(target, part)
    new = path.with_name(f"{path.name}.part")
    with lock(target, part):
        manifest_path(target, part).unlink(missing_ok=True)
        new.write_text(json.dumps(content))
        publish(new, path)
        manifest.save(manifest_path(target, part))
    return Prepared(folder, len(manifest), 0, written=True)


def _space(corpus: str, raw: Path | None) -> LabelSpace:
    """The label space, as the reader of the raw files has it."""
    if corpus != "imagenet":
        return catalog.coco() if corpus == "coco" else catalog.voc()
    if raw is None:
        raise UserError(
            "TFDS has ImageNet's classes by number only: give with --raw the folder of "
            "synset_words.txt or LOC_synset_mapping.txt, which names them"
        )
    return imagenet.label_space(raw)


def _labels(record: Mapping[str, Any], *, single: bool) -> tuple[set[int], set[int]]:
    """TFDS's class numbers in a record: of objects not marked difficult, and of those that are."""
    if single:
        return {int(record["label"])}, set()
    objects = record["objects"]
    numbers = [int(n) for n in objects["label"]]
    marks = [bool(m) for m in objects.get("is_difficult", [False] * len(numbers))]
    pairs = list(zip(numbers, marks, strict=True))
    return {n for n, mark in pairs if not mark}, {n for n, mark in pairs if mark}


def _prefix(corpus: str, part: str, year: str, names: Sequence[str], labels: set[int]) -> str:
    """The folder of an image in the keys of the raw reader."""
    if corpus == "imagenet":
        return f"{part}/{names[min(labels)]}"
    return part if corpus == "coco" else f"VOCdevkit/VOC{year}/JPEGImages"
