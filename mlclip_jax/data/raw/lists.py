"""Published lists: which images a benchmark takes, and with which labels.

    read_text        SPLC, HSPNet: "2008_000003.jpg,14 18"; LMPT: "train2017/000000554625.jpg 0 62"
    read_ids         DBL: "2008_000023" or "554625"; labels are the corpus' own
    read_arrays      LargeLoss: formatted_train_images.npy and formatted_train_labels.npy
    read_mldecoder   ML-Decoder: data.csv with `filepath,"['sky', 'water']",train`, and its classes,
                     over which `over_classes` puts the images of the corpus
    with_captions    LMPT: "VOCdevkit/VOC2012/JPEGImages/2008_000023.jpg a bottle of beer and ..."

Labels are numbers from 0, in the order of the label space, or names. `apply` finds the images in
the manifest of the corpus, whatever part of their path a list writes, and passes over those that
`mlclip prepare` left out.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mlclip_jax.data.manifest import Manifest, Rows
from mlclip_jax.data.raw.common import (
    csv_rows,
    field,
    integer,
    lines,
    malformed,
    read_json,
    spot,
    unknown_label,
    unreadable,
)
from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace

# SPLC's names of NUS-WIDE: row in ImageList/Imagelist.txt, photo id, secret, size.
_THUMBNAIL = re.compile(r"(\d{1,7})_(\d+)_[0-9a-f]+(_[a-z])?", re.ASCII)


@dataclass(frozen=True)
class Listed:
    """The m images of a list.

    Attributes:
      path: the file.
      names: the images as the file writes them [m].
      places: the line of each, or where else in the file it stands [m].
      targets: int8 [m c], +1 positive, 0 unobserved, -1 negative; None: the corpus' own labels.
    """

    path: Path
    names: tuple[str, ...]
    places: tuple[int | str, ...]
    targets: np.ndarray | None


def read_text(path: str | Path, space: LabelSpace, *, complete: bool = False) -> Listed:
    """A list with an image and the numbers of its positive labels on each line.

    Args:
      path: the list; between image and numbers stands a comma, a space or both.
      space: the labels.
      complete: whether labels that are not listed are negative; otherwise they are unobserved.

    Raises:
      UserError: the file cannot be read, or a number is no label.
    """
    path = Path(path)
    names, places, targets = [], [], []
    for number, line in lines(path):
        name, _, rest = line.strip().replace(",", " ", 1).partition(" ")
        if not line.strip():
            continue
        if not name:
            raise malformed(path, number, "a line must begin with the name of an image")
        row = np.full(len(space), -1 if complete else 0, np.int8)
        row[[integer(path, number, text, len(space)) for text in rest.split()]] = 1
        names.append(name)
        places.append(number)
        targets.append(row)
    return _listed(path, names, places, np.array(targets))


def read_ids(path: str | Path) -> Listed:
    """A list of images, one a line, by file name without its ending (COCO: or by number).

    Raises:
      UserError: the file cannot be read, or a line has more than one word.
    """
    path = Path(path)
    ids = [(number, line.strip()) for number, line in lines(path) if line.strip()]
    for number, name in ids:
        if len(name.split()) > 1:
            raise malformed(path, number, f"{name[:80]!r} is not the id of one image")
    return _listed(path, [name for _, name in ids], [number for number, _ in ids], None)


def read_arrays(images: str | Path, labels: str | Path, space: LabelSpace) -> Listed:
    """Names [m] and labels [m c] in two .npy files.

    Labels are 1 and 0 (absent), or, where any is -1 (absent), 0 is unobserved.

    Raises:
      UserError: an array cannot be read without unpickling, or has another shape or other values.
    """
    images, labels = Path(images), Path(labels)
    names, values = _array(images), _array(labels)
    if names.ndim != 1 or names.dtype.kind != "U":
        raise UserError(f"{images} must hold names [m], not {names.dtype} {list(names.shape)}")
    if values.shape != (len(names), len(space)):
        raise UserError(
            f"{labels} has the shape {list(values.shape)}, but {len(names)} images and the "
            f"{len(space)} labels of {space.name!r} need {[len(names), len(space)]}"
        )
    if values.dtype.kind not in "biuf" or not np.isin(values, (-1, 0, 1)).all():
        raise UserError(f"{labels} must hold 1, 0 and -1 only")
    targets = values.astype(np.int8)
    if not (targets < 0).any():
        targets[targets == 0] = -1
    return _listed(images, names, [f"row {i}" for i in range(len(names))], targets)


def read_mldecoder(
    path: str | Path,
    classes: str | Path,
    space: LabelSpace,
    *,
    split: str,
) -> Listed:
    """The images of one split of ML-Decoder's data.csv that have a label of the space.

    Args:
      path: rows of a file, a list of label names as Python writes it, and a split.
      classes: JSON with lists of label names, "train class" and "test class".
      space: the labels, all of `over_classes` or some; those that are not listed are negative, and
        images without any are left out, as in the authors' code.
      split: "train" or "val", as the file has it.

    Raises:
      UserError: a file is malformed, has unknown labels, or no such split.
    """
    path = Path(path)
    everything = set(_classes(Path(classes)).names)
    column = {name: i for i, name in enumerate(space.names)}
    names, places, targets = [], [], []
    for number, fields in csv_rows(path):
        if len(fields) != 3:
            raise malformed(path, number, f"{len(fields)} columns, not file, labels and split")
        if number == 1 and not fields[1].startswith("["):
            continue  # names of the columns
        labels = _names(path, number, fields[1])
        for label in labels:
            if label not in everything:
                raise unknown_label(path, number, label, everything)
        if fields[2].strip() != split:
            continue
        if columns := [column[label] for label in labels if label in column]:
            row = np.full(len(space), -1, np.int8)
            row[columns] = 1
            names.append(fields[0])
            places.append(number)
            targets.append(row)
    if not names:
        raise UserError(
            f"{path} has no image of the split {split!r} with one of the {len(space)} labels"
        )
    return _listed(path, names, places, np.array(targets))


def over_classes(manifest: Manifest, classes: str | Path) -> Manifest:
    """The images of a corpus, without their labels, over the classes of ML-Decoder's JSON.

    Returns:
      A manifest over the "train class", then the "test class", with subsets "seen" and "unseen".

    Raises:
      UserError: the file is malformed, or a class stands there twice.
    """
    none = Rows.from_lists([()] * len(manifest))
    own = {"negatives": None, "difficult": None, "aux": {}}
    return replace(manifest, space=_classes(Path(classes)), positives=none, **own)


def _classes(path: Path) -> LabelSpace:
    content = read_json(path)
    seen, unseen = (
        tuple(map(str, field(path, "top level", content, f"{kind} class", list)))
        for kind in ("train", "test")
    )
    count = len(seen) + len(unseen)
    subsets = {"seen": tuple(range(len(seen))), "unseen": tuple(range(len(seen), count))}
    try:
        return LabelSpace(seen + unseen, subsets=subsets, name="nus1006")
    except UserError as error:
        raise malformed(path, "its classes", str(error)) from error


def apply(manifest: Manifest, listed: Listed) -> tuple[np.ndarray, np.ndarray]:
    """The listed images of a corpus.

    A name is matched with the end of a key, or a key with the end of a name, by whole folders;
    names without an ending as `read_ids` says; and SPLC's names of NUS-WIDE with the rows of a
    manifest in the order of Imagelist.txt. Images that are `left_out` of the manifest keep their
    rows in this, and their entries are dropped.

    Args:
      manifest: of the corpus part or parts that the list draws from.
      listed: as the functions above read it.

    Returns:
      (targets int8 [m' c], index int64 [m']): labels, and rows of `manifest`, in the list's order;
      m - m' images are left out.

    Raises:
      UserError: an image that the manifest has not, has more than once, or that is listed twice.
      ValueError: targets over another number of labels than the manifest's.
    """
    there, index = _rows(manifest, listed)
    if listed.targets is None:
        return manifest.take(index).label_matrix(), index
    if listed.targets.shape[1] != len(manifest.space):
        raise ValueError(
            f"{listed.path} was read over {listed.targets.shape[1]} labels, "
            f"but {manifest.name} has {len(manifest.space)}"
        )
    return listed.targets[there], index


def with_captions(manifest: Manifest, path: str | Path) -> Manifest:
    """The manifest with the captions of a list: an image, a space and its caption on each line.

    Images that are not listed have none.

    Raises:
      UserError: as `apply`, or a line without a caption.
    """
    path = Path(path)
    names, places, texts = [], [], []
    for number, line in lines(path):
        name, _, text = line.strip().partition(" ")
        if not name:
            continue
        if not text.strip():
            raise malformed(path, number, f"image {name!r} has no caption")
        names.append(name)
        places.append(number)
        texts.append(text.strip())
    captions: list[tuple[str, ...]] = [()] * len(manifest)
    there, rows = _rows(manifest, _listed(path, names, places, None))
    for i, row in zip(there, rows, strict=True):
        captions[row] = (texts[i],)
    return replace(manifest, captions=tuple(captions))


def _listed(
    path: Path, names: Sequence[str], places: Sequence[int | str], targets: np.ndarray | None
) -> Listed:
    if not len(names):
        raise UserError(f"{path} lists no images")
    return Listed(path, tuple(map(str, names)), tuple(places), targets)


def _array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise unreadable(path, error) from error
    except Exception as error:  # a damaged header raises many kinds
        # NumPy takes other files for pickled objects, and advises to load these.
        reason = " ".join(str(error).split())[:200]
        if "pickle" in reason:
            reason = "it holds Python objects, or is another kind of file"
        raise UserError(
            f"{path} is no whole .npy array of text or numbers ({reason}): download it again, or, "
            "if you trust its origin, save its content with numpy as such an array"
        ) from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} is an archive of arrays; a single .npy array is needed")
    return array


def _names(path: Path, line: int, text: str) -> list[str]:
    """A list of strings as Python writes it."""
    try:
        names = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise malformed(path, line, f"{text[:80]!r} is no list of names, such as ['sky', 'water']")
    return names


def _rows(manifest: Manifest, listed: Listed) -> tuple[np.ndarray, np.ndarray]:
    """Which of the listed images are not left out, and their rows: both int64 [m']."""
    annotated, row_of = manifest.annotated()
    keys = annotated.tolist()
    by_stem: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        by_stem.setdefault(_stem(key), []).append(row)
    first: dict[int, int | str] = {}
    for place, name in zip(listed.places, listed.names, strict=True):
        rows = _matches(keys, by_stem, name.replace("\\", "/"))
        if len(rows) != 1:
            found = f"{len(rows)} images" if rows else "no image"
            raise malformed(
                listed.path,
                place,
                f"{manifest.name} has {found} with the name {name[:200]!r}: "
                "is the list for another part or corpus?",
            )
        if rows[0] in first:
            raise malformed(
                listed.path, place, f"image {name!r} is listed before, at {spot(first[rows[0]])}"
            )
        first[rows[0]] = place
    index = row_of[np.fromiter(first, np.int64, len(first))]
    there = np.flatnonzero(index >= 0)
    if not len(there):
        raise UserError(
            f"{manifest.name}: all images of {listed.path} were left out when it was prepared: put "
            "them in place, remove the prepared folder and run `mlclip prepare` again"
        )
    return there, index[there]


def _stem(path: str) -> str:
    name = path.rpartition("/")[2]
    return name.rpartition(".")[0] or name


def _matches(keys: Sequence[str], by_stem: dict[str, list[int]], name: str) -> list[int]:
    """The rows that a listed name may mean; an exact key alone."""
    stem = _stem(name)
    if name == stem:
        return by_stem.get(name, by_stem.get(name.zfill(12), []))
    near = by_stem.get(stem, [])
    exact = [row for row in near if keys[row] == name]
    ends = [
        row
        for row in near
        if f"/{keys[row]}".endswith(f"/{name}") or f"/{name}".endswith(f"/{keys[row]}")
    ]
    if near or not (thumbnail := _THUMBNAIL.fullmatch(stem)):
        return exact or ends
    row, photo = int(thumbnail[1]), thumbnail[2]
    return [row] if row < len(keys) and _stem(keys[row]).endswith(f"_{photo}") else []
