"""Image features of a frozen tower, computed once and read in place of images from then on.

Each set of features has a folder of its own (`data.feature_files`), named by a SHA-256 of
everything that decides them: the tower and its weights, the images and their transform, the views
and how values are stored. Labels are no part of it: all label views of the same images share a
cache. Record v * n + i holds view v of the n examples' number i.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mlclip_jax.data import feature_files
from mlclip_jax.data.augment import example_rng
from mlclip_jax.data.feature_files import UNREADABLE, Dtype, FeatureFiles
from mlclip_jax.data.pipeline import (
    MAX_UNREADABLE,
    Example,
    Source,
    eval_batches,
    load_example,
)
from mlclip_jax.data.transforms import ImageError
from mlclip_jax.errors import UserError

Arrays = Mapping[str, Any]
#: Images uint8 [b h w 3] and readable bool [b], this process's share of the batch, to the float32
#: features by name and readable of the whole batch, its examples in their order.
Encode = Callable[[np.ndarray, np.ndarray], Arrays]

_VERSION = 1  # of the form on disk
_PROBES = 8  # images whose pixels are part of the key
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheConfig:
    """Where image features are kept and what of them.

    Attributes:
      folder: gets a folder for each set of features; different runs may share it.
      views: versions of each training image, of which one is drawn whenever it is shown. Where
        augmentation changes images at random each is another, 1 being the same in all epochs;
        otherwise 1.
      dtype: how values are stored; "int8" with a float32 scale for each vector.
    """

    folder: str
    views: int = 1
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        if not self.folder:
            raise UserError("config key 'cache.folder' is empty: name a folder for the features")
        if self.views < 1:
            raise UserError(f"config key 'cache.views' must be at least 1, not {self.views}")


@runtime_checkable
class CacheableSource(Source, Protocol):
    """A source whose images have an identity, and whose labels can be had without them."""

    def identity(self) -> dict[str, Any]:
        """What decides the pixels of all examples, as plain values.

        "augment" is there only where `augmented` changes images at random, and says how.
        """

    def annotations(self, i: int) -> Example:
        """Example i without its image."""


@dataclass(frozen=True)
class Views:
    """The images of a cache by number of record, as a `pipeline.Source`.

    Attributes:
      source: the examples.
      count: views of each.
      seed: of random changes; None where nothing is changed.
      flip: whether a view is mirrored with probability one half.
      start: records to pass over.

    The targets of a record are one value: whether its image could be read.
    """

    source: CacheableSource
    count: int
    seed: int | None
    flip: bool
    start: int = 0

    def __len__(self) -> int:
        """Number of records that are left."""
        return self.count * len(self.source) - self.start

    def __getitem__(self, record: int) -> Example:
        """The image of a record, black where it cannot be read."""
        try:
            image, readable = self.image(record), 1
        except ImageError:
            image, readable = np.zeros_like(self._some_image()), 0
        return {"image": image, "targets": np.array([readable], np.int8), "index": record}

    def image(self, record: int) -> np.ndarray:
        """uint8 [h w 3].

        Raises:
          ImageError: it cannot be read.
        """
        view, i = divmod(self.start + record, len(self.source))
        if self.seed is None:
            return self.source[i]["image"]
        rng = example_rng(self.seed, view, i)
        image = load_example(self.source, i, rng)["image"]
        return image[:, ::-1] if self.flip and rng.random() < 0.5 else image

    def class_counts(self) -> np.ndarray:
        """Records have no labels."""
        raise TypeError("the images of a cache have no labels")

    def _some_image(self) -> np.ndarray:
        """The first image that can be read, for its shape."""
        for i in range(len(self.source)):
            try:
                return self.source[i]["image"]
            except ImageError as error:
                failure = error
        raise failure


@dataclass(frozen=True)
class Cache:
    """The features of one split, computed or not.

    Attributes:
      images: what they are made from; record by record.
      files: where they are.
    """

    images: Views
    files: FeatureFiles

    def open(self) -> CachedSource:
        """The examples with features in place of images.

        Raises:
          UserError: the features are not complete, or damaged.
        """
        return CachedSource(self)


def plan(
    source: Source,
    config: CacheConfig,
    *,
    encoder: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    train: bool,
    seed: int = 0,
    flip: bool = False,
) -> Cache:
    """The cache of a source's image features.

    Args:
      source: the examples.
      config: where and how.
      encoder: plain values that tell the tower and its weights from any other.
      shapes: of the features of one image by name.
      train: whether training sees the examples, augmented; otherwise there is one view, unchanged.
      seed: of augmentation.
      flip: whether training mirrors images at random.

    Raises:
      UserError: the source cannot be cached, or has no more than one view of an image.
    """
    if not isinstance(source, CacheableSource):
        raise UserError(
            f"the images of {type(source).__name__} cannot be told from others, as a cache of "
            "their features needs: set cache=None"
        )
    images = source.identity()
    augment = images.pop("augment", None)
    random = train and (flip or augment is not None)
    count = config.views if train else 1
    if count > 1 and not random:
        raise UserError(
            f"config key 'cache.views' is {count}, but nothing changes training images at random: "
            "use 1, or turn augmentation on"
        )
    changes = {"augment": augment, "flip": flip, "seed": seed, "count": count} if random else None
    views = Views(source, count, seed if random else None, flip and random)
    key = {
        "version": _VERSION,
        "encoder": dict(encoder),
        "images": {**images, "count": len(source), "pixels": _probe(views)},
        "views": changes,
        "dtype": config.dtype,
    }
    text = json.dumps(key, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    files = FeatureFiles(
        folder=Path(config.folder) / digest[:32],
        key=json.loads(text),
        dtype=config.dtype,
        layout=feature_files.layout(shapes, config.dtype),
        records=len(views),
    )
    return Cache(views, files)


def _probe(views: Views) -> str:
    """SHA-256 of the pixels of a few records, in case files, decoders or transforms changed."""
    digest = hashlib.sha256()
    for record in np.linspace(0, len(views) - 1, min(_PROBES, len(views))).astype(int).tolist():
        try:
            digest.update(np.ascontiguousarray(views.image(record)).tobytes())
        except ImageError:
            digest.update(UNREADABLE)
    return digest.hexdigest()


def write(
    cache: Cache,
    encode: Encode,
    *,
    batch_size: int,
    max_unreadable: int = MAX_UNREADABLE,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    tick: Callable[[int], None] = lambda records: None,
    agree: Callable[[int], int] = lambda records: records,
) -> None:
    """Computes the features that are missing; process 0 writes them.

    Args:
      cache: from `plan`.
      encode: images to features, see `Encode`; called by all processes alike.
      batch_size: images at a time, of all processes together.
      max_unreadable: different images that may be passed over.
      num_workers: processes that read images; 0 does it in threads of this one.
      process_index, process_count: which of the processes this is.
      tick: told numbers of records that are done.
      agree: a number as process 0 has it.

    Raises:
      UserError: more images than `max_unreadable` cannot be read, another run is writing the same
        features, the disk is full, or features are not finite.
    """

    def rows(start: int) -> Iterator[bytes]:
        """The records from one on."""
        if start == cache.files.records:
            return
        left, unreadable = cache.files.records - start, set()
        # The next batch computes while the records of one are written.
        for first, found in _ahead(encoded(start)):
            arrays = {name: np.asarray(values) for name, values in found.items()}
            readable = arrays.pop("readable")
            stored = feature_files.store(arrays, cache.files.dtype)
            for j in range(min(batch_size, left - first)):
                tick(1)
                if readable[j]:
                    yield b"".join(stored[name][j].tobytes() for name, _, _ in cache.files.layout)
                else:
                    _note_unreadable(cache, start + first + j, unreadable, max_unreadable)
                    yield UNREADABLE

    def encoded(start: int) -> Iterator[tuple[int, Arrays]]:
        batches = eval_batches(
            replace(cache.images, start=start),
            batch_size,
            num_workers=num_workers,
            process_index=process_index,
            process_count=process_count,
        )
        for k, batch in enumerate(batches):
            yield k * batch_size, encode(batch["images"], batch["targets"][:, 0] > 0)

    with nullcontext() if process_index else cache.files.alone():
        start = int(agree(cache.files.done()))
        tick(start)
        if process_index:
            deque(rows(start), maxlen=0)
        else:
            cache.files.write(rows(start), start)


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The items, each after the next one has been started."""
    waiting = []
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


def _note_unreadable(cache: Cache, record: int, known: set[int], limit: int) -> None:
    """Names an image that cannot be read once, and counts it.

    Raises:
      UserError: there are more of them than the limit.
    """
    example = record % len(cache.images.source)
    if example in known:
        return
    known.add(example)
    try:
        cache.images.image(record)
        reason = f"example {example} could not be read, and now it can: is its disk failing?"
    except ImageError as error:
        reason = str(error)
    if len(known) > limit:
        raise UserError(
            f"{reason}. It is number {len(known)} of the images that cannot be read, and {limit} "
            "may be passed over"
        )
    _LOG.warning("%s (passed over: %d of at most %d)", reason, len(known), limit)


class CachedSource:
    """Examples with "features" in place of "image": a `pipeline.AugmentedSource`.

    Args:
      cache: whose features are computed.

    Raises:
      UserError: they are not complete, or damaged.
    """

    def __init__(self, cache: Cache) -> None:
        self.source, self.views = cache.images.source, cache.images.count
        self.files, self._records = cache.files, cache.files.open()

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.source)

    def __repr__(self) -> str:
        return f"CachedSource({str(self.files.folder)!r})"

    def __getitem__(self, i: int) -> Example:
        """Example i in its first view.

        Raises:
          ImageError: its image could not be read.
        """
        return self._example(i, 0)

    def augmented(self, i: int, rng: np.random.Generator) -> Example:
        """Example i in one of its views.

        Raises:
          ImageError: its image could not be read.
        """
        return self._example(i, int(rng.integers(self.views)) if self.views > 1 else 0)

    def class_counts(self) -> np.ndarray:
        """Positives of each class, int64 [c]."""
        return self.source.class_counts()

    def positives(self) -> tuple[np.ndarray, np.ndarray]:
        """The example and the class of each positive label, integers [k] both."""
        return self.source.positives()

    def _example(self, i: int, view: int) -> Example:
        arrays = self.files.read(self._records, view * len(self) + i)
        if arrays is None:
            raise ImageError(f"example {i} could not be read when image features were cached")
        return {**self.source.annotations(i), "features": arrays}


def settings(config: CacheConfig | None) -> dict[str, Any] | None:
    """What of a configuration decides what training sees."""
    return config and {key: value for key, value in asdict(config).items() if key != "folder"}
