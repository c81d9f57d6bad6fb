"""What is known of a corpus without opening an image: keys, labels and captions of its n images.

Row i of a manifest is record i of the prepared data set, so that everything that chooses images or
labels is arithmetic on a few small arrays.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from mlclip_jax.data.files import publish
from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.spec import unknown

DIFFICULT = {"positive": 1, "negative": -1, "ignore": 0}
_FORMAT = 1
_CHUNK = 1 << 16


@dataclass(frozen=True, eq=False)
class Rows:
    """For each of n images a set of class numbers, as compressed sparse rows.

    Attributes:
      offsets: int64 [n+1]; row i is `values[offsets[i] : offsets[i + 1]]`.
      values: int32 [nnz], ascending and unique within a row.

    Raises:
      ValueError: other dtypes, offsets that do not fit, or rows that are not such sets.
    """

    offsets: np.ndarray
    values: np.ndarray

    def __post_init__(self) -> None:
        offsets, values = self.offsets, self.values
        if offsets.dtype != np.int64 or values.dtype != np.int32:
            raise ValueError(f"rows are int64, int32, not {offsets.dtype}, {values.dtype}")
        if offsets.ndim != 1 or values.ndim != 1 or not len(offsets):
            raise ValueError(f"rows of shapes {offsets.shape} and {values.shape}, not [n+1], [nnz]")
        if offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
            raise ValueError(f"offsets must ascend from 0 to the {len(values)} values")
        if len(values) and values.min() < 0:
            raise ValueError(f"class number {values.min()} is negative")
        if (np.diff(self._codes()) <= 0).any():
            raise ValueError("the class numbers of a row must ascend without repeats")

    @classmethod
    def from_lists(cls, lists: Iterable[Iterable[int]]) -> Rows:
        """Rows of any collections of class numbers, in any order; repeats count once."""
        lists = [tuple(row) for row in lists]
        counts = np.fromiter(map(len, lists), np.int64, len(lists))
        values = np.fromiter(itertools.chain.from_iterable(lists), np.int64, counts.sum())
        return cls.from_pairs(np.repeat(np.arange(len(lists)), counts), values, len(lists))

    @classmethod
    def from_pairs(cls, rows: np.ndarray, values: np.ndarray, n: int) -> Rows:
        """Rows of pairs (image, class number), in any order; repeats count once.

        Args:
          rows: integers [m] from 0 to n-1.
          values: class numbers [m] from 0 to 2^31-1.
          n: number of rows.

        Raises:
          ValueError: numbers outside these bounds.
        """
        rows, values = np.asarray(rows, np.int64), np.asarray(values, np.int64)
        for what, numbers, end in (("row", rows, n), ("class", values, 1 << 31)):
            if len(numbers) and not 0 <= numbers.min() <= numbers.max() < end:
                raise ValueError(
                    f"{what} numbers {numbers.min()} to {numbers.max()}, but 0 <= number < {end}"
                )
        codes = np.unique(rows << 32 | values)
        counts = np.bincount(codes >> 32, minlength=n)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return cls(offsets, (codes & 0x7FFFFFFF).astype(np.int32))

    def __len__(self) -> int:
        """The number of rows n."""
        return len(self.offsets) - 1

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Rows)
            and np.array_equal(self.offsets, other.offsets)
            and np.array_equal(self.values, other.values)
        )

    __hash__ = None

    def row(self, i: int) -> np.ndarray:
        """Class numbers of image i >= 0, int32."""
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """The image (int64) and the class number (int32) of each entry, both [nnz]."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets)), self.values

    def take(self, rows: np.ndarray) -> Rows:
        """The rows at positions `rows` [m], in that order."""
        rows = np.asarray(rows, np.int64)
        counts = np.diff(self.offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        shift = np.repeat(self.offsets[rows] - offsets[:-1], counts)
        return Rows(offsets, self.values[np.arange(offsets[-1]) + shift])

    def dense(self, c: int, value: int = 1) -> np.ndarray:
        """int8 [n c] with `value` at the entries and 0 elsewhere."""
        out = np.zeros((len(self), c), np.int8)
        out[self.pairs()] = value
        return out

    def _codes(self) -> np.ndarray:
        """An int64 for each entry that orders by row, then class."""
        rows, values = self.pairs()
        return rows << 32 | values


@dataclass(frozen=True, eq=False)
class Manifest:
    """Annotations of the n images of one part of a corpus.

    Attributes:
      name: corpus and part, e.g. "coco2014/train".
      space: the c labels.
      keys: unicode [n], unique paths of the images, relative to the raw folder, with "/".
      positives: labels that are present.
      negatives: labels that were looked for and are absent; None where labels are complete, that
        is every label that is not positive is negative.
      difficult: labels of which an image has objects marked difficult only (Pascal VOC); they are
        in neither of the others. None where a corpus has no such mark.
      captions: those of each image [n], or None.
      aux: further rows by name, over other numbers than the labels of `space`.
      left_out: images that the raw annotations have besides, by key with their rows there, in
        ascending order: missing or unreadable when the part was prepared.

    Raises:
      UserError: a key that repeats or is no relative path.
      ValueError: parts that do not fit together.
    """

    name: str
    space: LabelSpace
    keys: np.ndarray
    positives: Rows
    negatives: Rows | None = None
    difficult: Rows | None = None
    captions: tuple[tuple[str, ...], ...] | None = None
    aux: Mapping[str, Rows] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.keys.dtype.kind != "U" or self.keys.ndim != 1:
            raise ValueError(f"keys must be unicode [n], not {self.keys.dtype} {self.keys.shape}")
        object.__setattr__(self, "keys", self.keys.astype(self.keys.dtype.newbyteorder("=")))
        object.__setattr__(self, "aux", dict(self.aux))
        object.__setattr__(self, "left_out", dict(self.left_out))
        for what, rows in self._rows().items():
            if len(rows) != len(self):
                raise ValueError(f"{self.name}: {len(rows)} {what} for {len(self)} images")
        if self.captions is not None and len(self.captions) != len(self):
            raise ValueError(f"{self.name}: {len(self.captions)} captions for {len(self)} images")
        bounds = [-1, *self.left_out.values(), len(self) + len(self.left_out)]
        if any(a >= b for a, b in itertools.pairwise(bounds)):
            raise ValueError(f"{self.name}: {bounds[1:-1]} are no rows of images that are left out")
        _check_keys(self.name, self.annotated()[0] if self.left_out else self.keys)
        labels = self._label_rows()
        for what, rows in labels.items():
            if len(rows.values) and rows.values.max() >= len(self.space):
                raise ValueError(
                    f"{self.name}: class number {rows.values.max()} among the {what}, "
                    f"but {self.space.name!r} has {len(self.space)} labels"
                )
        for (one, a), (two, b) in itertools.combinations(labels.items(), 2):
            both = np.intersect1d(a._codes(), b._codes(), assume_unique=True)
            if len(both):
                row, label = int(both[0]) >> 32, int(both[0]) & 0x7FFFFFFF
                raise ValueError(
                    f"{self.name}: {str(self.keys[row])!r} has {self.space.names[label]!r} "
                    f"among its {one} and its {two}"
                )

    def __len__(self) -> int:
        """The number of images n."""
        return len(self.keys)

    def label_matrix(
        self, *, difficult: Literal["positive", "negative", "ignore"] = "positive"
    ) -> np.ndarray:
        """All labels: int8 [n c], +1 positive, 0 unobserved, -1 negative.

        Args:
          difficult: what labels with difficult objects only are; "ignore" is unobserved.

        Raises:
          UserError: an unknown policy.
        """
        if difficult not in DIFFICULT:
            raise unknown("policy for difficult objects", difficult, DIFFICULT)
        absent = 0 if self.negatives is not None else -1
        out = np.full((len(self), len(self.space)), absent, np.int8)
        if self.negatives is not None:
            out[self.negatives.pairs()] = -1
        out[self.positives.pairs()] = 1
        if self.difficult is not None:
            out[self.difficult.pairs()] = DIFFICULT[difficult]
        return out

    def annotated(self) -> tuple[np.ndarray, np.ndarray]:
        """All images of the raw annotations, k of them left out here.

        Returns:
          (keys unicode [n+k], rows int64 [n+k]): in their order there, and the row of each here,
          -1 of those that are left out.
        """
        rows = np.full(len(self) + len(self.left_out), -1, np.int64)
        there = np.ones(len(rows), bool)
        there[list(self.left_out.values())] = False
        others = np.array(list(self.left_out), str)
        keys = np.empty(len(rows), np.promote_types(self.keys.dtype, others.dtype))
        rows[there], keys[there], keys[~there] = np.arange(len(self)), self.keys, others
        return keys, rows

    def without(self, rows: Sequence[int]) -> Manifest:
        """The images but those at `rows`, which become `left_out`; only of raw annotations."""
        if self.left_out:
            raise ValueError(f"{self.name}: images are left out already")
        kept = np.ones(len(self), bool)
        kept[list(rows)] = False
        left_out = {str(self.keys[row]): int(row) for row in sorted(rows)}
        return replace(self.take(kept), left_out=left_out)

    def take(self, rows: np.ndarray) -> Manifest:
        """The images at positions `rows` [m] (or where a bool [n] is true), in that order.

        What is `left_out` is forgotten, as it goes by another order.
        """
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        labels = {what: part.take(rows) for what, part in self._label_rows().items()}
        return replace(
            self,
            keys=self.keys[rows],
            **labels,
            captions=self.captions and tuple(self.captions[i] for i in rows),
            aux={name: part.take(rows) for name, part in self.aux.items()},
            left_out={},
        )

    def fingerprint(self) -> str:
        """SHA-256 (hex) of keys, label ids and all rows here; captions and names do not count."""
        digest = hashlib.sha256()
        for start in range(0, len(self), _CHUNK):
            digest.update("".join(f"{k}\n" for k in self.keys[start : start + _CHUNK]).encode())
        digest.update(json.dumps(self.space.ids).encode())
        for what, rows in sorted(self._rows().items()):
            digest.update(f"\n{what}\n".encode())
            digest.update(rows.offsets.astype("<i8").tobytes())
            digest.update(rows.values.astype("<i4").tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Writes one .npz without pickled objects; `path` holds all of it or is left alone."""
        path = Path(path)
        text = {
            "format": _FORMAT,
            "name": self.name,
            "space": self.space.to_json(),
            "captions": self.captions,
            "left_out": self.left_out,
        }
        arrays = {"text": np.frombuffer(json.dumps(text).encode(), np.uint8), "keys": self.keys}
        for what, rows in self._rows().items():
            arrays |= {f"{what}.offsets": rows.offsets, f"{what}.values": rows.values}
        part = path.with_name(f"{path.name}.part")
        try:
            with part.open("wb") as file:
                np.savez_compressed(file, **arrays)
            publish(part, path)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Reads what `save` wrote.

        Raises:
          UserError: no such file, or it is no whole manifest.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            text = json.loads(arrays.pop("text").tobytes())
            if text["format"] != _FORMAT:
                raise ValueError(f"it has format {text['format']}, not {_FORMAT}")
            keys = arrays.pop("keys")
            rows = {
                what: Rows(arrays[f"{what}.offsets"], arrays[f"{what}.values"])
                for what in {entry.rpartition(".")[0] for entry in arrays}
            }
            captions = text["captions"]
            return cls(
                name=text["name"],
                space=LabelSpace.from_json(text["space"]),
                keys=keys,
                positives=rows["positives"],
                negatives=rows.get("negatives"),
                difficult=rows.get("difficult"),
                captions=None if captions is None else tuple(map(tuple, captions)),
                aux={k.removeprefix("aux."): v for k, v in rows.items() if k.startswith("aux.")},
                left_out=text.get("left_out", {}),
            )
        except OSError as error:
            raise UserError(
                f"cannot read the manifest {path}: {error.strerror or error}"
            ) from error
        except (
            ValueError, KeyError, TypeError, AttributeError, EOFError,
            zipfile.BadZipFile, zlib.error,
        ) as error:  # fmt: skip
            raise UserError(
                f"{path} is no whole manifest ({error}): prepare the data again"
            ) from error

    def _label_rows(self) -> dict[str, Rows]:
        """The rows over `space`, by field."""
        fields = {name: getattr(self, name) for name in ("positives", "negatives", "difficult")}
        return {name: rows for name, rows in fields.items() if rows is not None}

    def _rows(self) -> dict[str, Rows]:
        """All rows; those of `aux` as "aux.<name>"."""
        return self._label_rows() | {f"aux.{name}": rows for name, rows in self.aux.items()}


def _check_keys(name: str, keys: np.ndarray) -> None:
    """Raises UserError for a key that repeats or is no relative path with "/"."""
    if not len(keys):
        return
    ordered = np.sort(keys)
    repeats = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeats):
        raise UserError(
            f"{name}: the image {str(repeats[0])!r} occurs more than once"
            f"{f', as do {len(repeats) - 1} others' if len(repeats) > 1 else ''}; "
            "each image may have one row"
        )
    # Code points, padded with 0: whole columns are checked at once, as there may be millions.
    codes = np.ascontiguousarray(keys).view(np.uint32).reshape(len(keys), -1)
    wrong = (codes[:, 0] == 0) | (codes[:, 0] == ord("/"))
    for column in codes.T:
        wrong |= (column == ord("\\")) | ((column < 32) & (column > 0)) | (column >> 11 == 27)
    for row in np.flatnonzero(np.char.find(keys, "..") >= 0):
        wrong[row] |= ".." in str(keys[row]).split("/")
    if wrong.any():
        raise UserError(
            f"{name}: {str(keys[wrong.argmax()])!r} is no path of an image: it must be relative "
            'to the raw folder, with "/" between folders'
        )
