"""Labelled images by number: the labels of a protocol, and images from prepared data or raw files.

Row i of a manifest is record i of the prepared data set of its part, and the file or archive member
`keys[i]` of the raw folder. A reader gives the bytes of either; everything here can be pickled into
worker processes.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from mlclip_jax.data.assemble import LabelledPart, manifest_path
from mlclip_jax.data.augment import Augment, Recipe, recipe
from mlclip_jax.data.manifest import Manifest
from mlclip_jax.data.pipeline import Example
from mlclip_jax.data.protocols import Labels
from mlclip_jax.data.transforms import ImageError, Preprocess
from mlclip_jax.errors import UserError

#: Version of the prepared form, which its folder bears, and the name of its only split.
VERSION = "1.0.0"
SPLIT = "images"

_CHUNK = 1 << 16
_PROBES = 8  # images whose files are part of a fingerprint
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageConfig:
    """How images are brought to the size of the backbone.

    Attributes:
      resize: "clip" (short side, then the centre), "squash" or "resize256" (`data.transforms`).
      interpolation: "bilinear" or "bicubic".
      augment: what training changes at random, of `data.augment.RECIPES`.
      fast_decode: let the JPEG decoder scale training images down first.
    """

    resize: Literal["clip", "squash", "resize256"] = "clip"
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    augment: str = "none"
    fast_decode: bool = True

    @property
    def flip(self) -> bool:
        """Whether the training step mirrors images: as the recipe says.

        Raises:
          UserError: an unknown recipe.
        """
        return recipe(self.augment).flip

    def preprocess(self, size: int) -> Preprocess:
        """How evaluation and serving bring an image to `size` pixels a side.

        Raises:
          UserError: an unknown mode or interpolation.
        """
        return Preprocess(size, self.resize, self.interpolation)

    def transform(self, size: int, *, train: bool) -> Augment:
        """The transform to `size` pixels a side; evaluation decodes exactly and changes nothing.

        Raises:
          UserError: an unknown recipe, mode or interpolation.
        """
        preprocess = replace(self.preprocess(size), fast_decode=train and self.fast_decode)
        return Augment(preprocess, recipe(self.augment if train else "none"))


class Reader(Protocol):
    """The encoded images of one part of a corpus."""

    def read(self, row: int, key: str) -> bytes:
        """The bytes of the image in a row of the manifest, whose key is given too.

        Raises:
          ImageError: this image is missing or cannot be read.
          UserError: the manifest is of other data.
        """


@dataclass(frozen=True)
class FolderReader:
    """Images of a raw folder.

    Attributes:
      corpus: module of `data.raw`.
      folder: the raw folder.
    """

    corpus: str
    folder: Path

    def read(self, row: int, key: str) -> bytes:
        """The bytes of a file or archive member; the key alone finds it."""
        try:
            return _opener(self.corpus)(self.folder, key)
        except OSError as error:
            raise ImageError(f"{self.folder / key}: {error.strerror or error}") from error
        except UserError as error:
            raise ImageError(str(error)) from error


@functools.cache
def _opener(corpus: str) -> Callable[[Path, str], bytes]:
    """What gives the bytes of an image from the raw folder and its key."""
    module = importlib.import_module(f"mlclip_jax.data.raw.{corpus}")
    if hasattr(module, "open_image"):
        return module.open_image
    if hasattr(module, "image_path"):
        return lambda folder, key: module.image_path(folder, key).read_bytes()
    return lambda folder, key: (folder / key).read_bytes()


class RecordReader:
    """Images of a data set that TFDS reads, whoever prepared it.

    Args:
      folder: of the data set, which holds dataset_info.json.
      split: of it.
      feature: which text feature of a record is the key, or the last part of the key.
      order: the record of each row, int64 [n]; None where record i is row i.

    Raises:
      UserError: no such data set or split, or it is not in the format ArrayRecord.
    """

    def __init__(
        self, folder: Path, split: str, *, feature: str = "key", order: np.ndarray | None = None
    ) -> None:
        self.folder, self.feature, self.order = folder, feature, order
        self._records = open_records(folder, split)

    def __len__(self) -> int:
        """Number of records."""
        return len(self._records)

    def read(self, row: int, key: str) -> bytes:
        """The bytes of an image, after a look whether the record is that image's."""
        number = int(row if self.order is None else self.order[row])
        try:
            record = self._records[number]
        except (RuntimeError, ValueError) as error:  # of ArrayRecord and of its content
            raise ImageError(
                f"{key}: record {number} of {self.folder} cannot be read ({error}); "
                "remove that folder and prepare the data again"
            ) from error
        found = record[self.feature].decode()
        if key != found and not key.endswith(f"/{found}"):
            raise UserError(
                f"record {number} of {self.folder} is the image {found!r}, but the manifest has "
                f"{key!r} there: they are not of one data set, prepare the data again"
            )
        return record["image"]


def open_records(folder: Path, split: str) -> Sequence[dict[str, Any]]:
    """The records of a data set that TFDS reads, images as encoded bytes.

    Raises:
      UserError: no such data set or split, or it is not in the format ArrayRecord.
    """
    import tensorflow_datasets as tfds

    builder = open_builder(folder)
    file_format = builder.info.file_format
    if file_format is None or file_format.value != "array_record":
        raise UserError(
            f"{folder} is in the format {file_format and file_format.value}, which gives no access "
            "by number: prepare it again with download_and_prepare(file_format='array_record'), "
            "or prepare the raw files with `mlclip prepare`"
        )
    known = set(builder.info.splits)
    if missing := set(split.split("+")) - known:
        raise UserError(f"{folder} has the splits {sorted(known)}, not {sorted(missing)}")
    decoders = {"image": tfds.decode.SkipDecoding()}
    try:
        return builder.as_data_source(split=split, decoders=decoders)
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"the records in {folder} cannot be opened ({error})") from error


def open_builder(folder: Path) -> Any:
    """TFDS's builder of a prepared data set.

    Raises:
      UserError: there is none in the folder, or its description is damaged.
    """
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # TFDS, protobuf and JSON have many kinds of their own
        raise UserError(
            f"{folder} is no data set that TFDS can read (its dataset_info.json and features.json "
            f"must be there; {str(error).splitlines()[0] if str(error) else error!r})"
        ) from error


def records_folder(folder: Path, part: str) -> Path:
    """Where the prepared data set of a part is, in the folder of its corpus."""
    return folder / part / VERSION


def link_path(folder: Path, part: str) -> Path:
    """Where it is written which data set, prepared by others, has the images of a part."""
    return folder / f"{part}.records.json"


def keys_digest(keys: np.ndarray) -> str:
    """SHA-256 (hex) of the keys of a manifest [n], in order."""
    digest = hashlib.sha256()
    for start in range(0, len(keys), _CHUNK):
        digest.update("".join(f"{key}\n" for key in keys[start : start + _CHUNK].tolist()).encode())
    return digest.hexdigest()


def open_reader(corpus: str, part: str, folder: Path, manifest: Manifest) -> Reader:
    """What reads the images of a part: its records where it is prepared, or else the raw files.

    Args:
      corpus: module of `data.raw`.
      part: of its `PARTS`.
      folder: of the corpus, raw or prepared.
      manifest: all images of the part, with whatever labels.

    Raises:
      UserError: the records are gone, damaged, or not those of the manifest.
    """
    records, link, name = records_folder(folder, part), link_path(folder, part), f"{corpus}/{part}"
    if (records / "dataset_info.json").is_file():
        reader = RecordReader(records, SPLIT)
        digest = _metadata(records).get("keys")
        what = f"records in {records}"
    elif link.is_file():
        reader, digest = _linked(link)
        what = f"records in {reader.folder}"
    elif manifest_path(folder, part).is_file():
        raise UserError(
            f"{folder} has a manifest of {part} but no records in {records}: run `mlclip prepare` "
            "again, or remove the manifest to read raw files"
        )
    else:
        _LOG.info("%s: images from files in %s (`mlclip prepare` is faster)", name, folder)
        return FolderReader(corpus, folder)
    if digest != keys_digest(manifest.keys):
        raise UserError(
            f"the {what} are not those of the manifest of {name}, which has {len(manifest)} images "
            f"for {len(reader)} records: run `mlclip prepare` again"
        )
    _LOG.info("%s: images from %s", name, what)
    return reader


def _metadata(records: Path) -> dict[str, Any]:
    """What `data.builders` noted about a data set."""
    try:
        return json.loads((records / "metadata.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{records} was not written by `mlclip prepare`, or is damaged: run it again"
        ) from error


def _linked(link: Path) -> tuple[RecordReader, str]:
    """The reader of a data set prepared by others, and the digest of the keys it was linked for."""
    try:
        found = json.loads(link.read_text())
        order = np.array(found["order"], np.int64)
        folder, split, feature = Path(found["folder"]), found["split"], found["feature"]
        reader = RecordReader(folder, split, feature=feature, order=order)
        digest = found["keys"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{link} is damaged: run `mlclip prepare --tfds=...` again") from error
    if len(reader) != len(order):
        raise UserError(
            f"{folder} has {len(reader)} records and had {len(order)} when it was linked: "
            "run `mlclip prepare --tfds=...` again"
        )
    return reader, digest


class ImageSource:
    """Examples of a part of a corpus: a `pipeline.AugmentedSource`.

    Args:
      manifest: all images of the part; row i is record i of the reader.
      labels: the images in use and their targets; example i is `labels.index[i]`.
      reader: gives the bytes of images.
      transform: makes pixels of them.
    """

    def __init__(
        self, manifest: Manifest, labels: Labels, reader: Reader, transform: Augment
    ) -> None:
        self.rows, self.targets = labels.index, labels.targets
        self.name, self.keys = manifest.name, manifest.keys[self.rows]
        self.reader, self.transform = reader, transform
        self._all_captions = manifest.captions

    def __len__(self) -> int:
        """Number of examples m."""
        return len(self.rows)

    def __getitem__(self, i: int) -> Example:
        """Example i; its image is uint8 [size size 3].

        Raises:
          ImageError: its image cannot be read.
        """
        return self._example(i, None)

    def augmented(self, i: int, rng: np.random.Generator) -> Example:
        """Example i as training sees it.

        Raises:
          ImageError: its image cannot be read.
        """
        return self._example(i, rng)

    def label_matrix(self) -> np.ndarray:
        """Targets of all examples, int8 [m c]."""
        return self.targets if isinstance(self.targets, np.ndarray) else self.targets.dense()

    def class_counts(self) -> np.ndarray:
        """Positives of each class, int64 [c]."""
        if isinstance(self.targets, np.ndarray):
            return np.count_nonzero(self.targets > 0, axis=0)
        return self.targets.class_counts()

    def positives(self) -> tuple[np.ndarray, np.ndarray]:
        """The example and the class of each positive label, integers [k] both."""
        if isinstance(self.targets, np.ndarray):
            return np.nonzero(self.targets > 0)
        return self.targets.positives.pairs()

    @property
    def captions(self) -> tuple[tuple[str, ...], ...] | None:
        """Captions of each example, for `data.captions.tokenize`; None where there are none.

        Workers do not have them.
        """
        return self._all_captions and tuple(self._all_captions[row] for row in self.rows)

    def _example(self, i: int, rng: np.random.Generator | None) -> Example:
        key = str(self.keys[i])
        content = self.reader.read(int(self.rows[i]), key)
        image = self.transform(content, rng, name=key)
        return {"image": image, **self.annotations(i)}

    def annotations(self, i: int) -> Example:
        """Example i without its image."""
        return {"targets": self.targets[i], "index": i}

    def identity(self) -> dict[str, Any]:
        """What decides the images, see `data.features`; mirroring is left to the device."""
        transform, unflipped = self.transform, replace(self.transform.recipe, flip=False)
        same = {
            "corpus": self.name,
            "keys": keys_digest(self.keys),
            "preprocess": repr(transform.preprocess),
        }
        return same if unflipped == Recipe() else {**same, "augment": repr(unflipped)}

    def fingerprint(self) -> dict[str, Any]:
        """What tells these examples from others, wherever their files are, as plain values.

        Returns:
          "count"; SHA-256 (hex) of the "images" by their keys, of these with their "labels", and of
          the "captions", None where there are none; "files": by key SHA-256 of the files of a few
          images, as reading all takes as long as an epoch, without those that cannot be read.
        """
        captions = self.captions and hashlib.sha256(json.dumps(self.captions).encode()).hexdigest()
        files = {}
        for i in np.linspace(0, len(self) - 1, min(_PROBES, len(self))).astype(int).tolist():
            key = str(self.keys[i])
            try:
                content = self.reader.read(int(self.rows[i]), key)
                self.transform(content, name=key)
            except ImageError:  # it may be mended while the run lasts
                continue
            files[key] = hashlib.sha256(content).hexdigest()
        return {
            "count": len(self),
            "images": keys_digest(self.keys),
            "labels": Labels(self.targets, np.arange(len(self))).fingerprint(self.keys),
            "captions": captions,
            "files": files,
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_all_captions": None}


def open_images(
    part: LabelledPart, config: ImageConfig, image_size: int, *, train: bool
) -> ImageSource:
    """The examples of a labelled part.

    Args:
      part: images in use and their labels.
      config: how images are prepared.
      image_size: pixels of a side.
      train: whether they are for training.

    Raises:
      UserError: as `open_reader`, or an unknown setting.
    """
    transform = config.transform(image_size, train=train)
    reader = open_reader(part.corpus, part.part, part.folder, part.manifest)
    return ImageSource(part.manifest, part.labels, reader, transform)
