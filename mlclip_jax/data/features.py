"""Image features of a frozen tower, computed once and read in place of images from then on.

    <folder>/<key>/features-00000-of-00004.array_record
    <folder>/<key>/cache.json                             written last; without it nothing is read

Record v * n + i holds view v of the n examples' number i. The key is a SHA-256 of everything that
decides the features: the tower and its weights, the images and their transform, the views and how
values are stored. Labels are no part of it: all label views of the same images share a cache. Files
of records are written under another name and renamed when they are whole, so that what a killed run
has finished is kept.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from mlclip_jax.data.augment import example_rng
from mlclip_jax.data.pipeline import (
    MAX_UNREADABLE,
    Example,
    Source,
    eval_batches,
    load_example,
)
from mlclip_jax.data.transforms import ImageError
from mlclip_jax.errors import UserError, make_folder

Dtype = Literal["float32", "bfloat16", "int8"]
Arrays = Mapping[str, Any]
#: Images uint8 [b h w 3] and readable bool [b], this process's share of the batch, to the float32
#: features by name and readable of the whole batch, its examples in their order.
Encode = Callable[[np.ndarray, np.ndarray], Arrays]

_VERSION = 1  # of the form on disk
_FILE_BYTES = 64 << 20  # of a file of records, about
_PROBES = 8  # images whose pixels are part of the key
_UNREADABLE = b"unreadable"  # the record of an image that training passes over
_OPTIONS = "group_size:1,uncompressed"  # each record can be read alone
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheConfig:
    """Where image features are kept and what of them.

    Attributes:
      folder: gets a folder for each set of features; different runs may share it.
      views: versions of each training image, of which every epoch draws one. Where augmentation
        changes images at random each is another, 1 being the same in all epochs; otherwise 1.
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
    """The features of one split: what they are made from and where they are, ready or not.

    Attributes:
      folder: of this very set of features.
      key: everything that decides them.
      images: what they are made from.
      dtype: how values are stored.
      layout: type and shape of each array of a record, in order.
    """

    folder: Path
    key: Mapping[str, Any]
    images: Views
    dtype: Dtype
    layout: tuple[tuple[str, str, tuple[int, ...]], ...]

    @property
    def records(self) -> int:
        """Views times examples."""
        return len(self.images)

    @property
    def record_bytes(self) -> int:
        """Size of a record."""
        return sum(np.dtype(kind).itemsize * math.prod(shape) for _, kind, shape in self.layout)

    @property
    def size(self) -> int:
        """Bytes of all records."""
        return self.records * self.record_bytes

    def files(self) -> list[tuple[Path, int]]:
        """The files and how many records belong into each."""
        each = max(1, _FILE_BYTES // self.record_bytes)
        count = -(-self.records // each)
        return [
            (
                self.folder / f"features-{k:05}-of-{count:05}.array_record",
                min(each, self.records - k * each),
            )
            for k in range(count)
        ]

    def ready(self) -> bool:
        """Whether all files are there, whole and of this key."""
        try:
            found = json.loads((self.folder / "cache.json").read_text())
            sizes = {path.name: path.stat().st_size for path, _ in self.files()}
        except (OSError, ValueError):
            return False
        return found == {"key": self.key, "sizes": sizes}

    def open(self) -> CachedSource:
        """The examples with features in place of images.

        Raises:
          UserError: the cache is not ready.
        """
        if not self.ready():
            raise UserError(
                f"the image features in {self.folder} are not complete: does every process see "
                "this folder, and has no other program changed it?"
            )
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
    key = {
        "version": _VERSION,
        "encoder": dict(encoder),
        "images": {**images, "count": len(source), "pixels": _probe(source)},
        "views": changes,
        "dtype": config.dtype,
    }
    text = json.dumps(key, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    views = Views(source, count, seed if random else None, flip and random)
    folder = Path(config.folder) / digest[:32]
    return Cache(folder, json.loads(text), views, config.dtype, layout(shapes, config.dtype))


def layout(
    shapes: Mapping[str, tuple[int, ...]], dtype: Dtype
) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """Name, type and shape of each array that is stored for one image, in order.

    Args:
      shapes: of the features of one image by name.
      dtype: how values are stored; bfloat16 goes as uint16.
    """
    arrays = []
    for name, shape in shapes.items():
        arrays.append((name, "uint16" if dtype == "bfloat16" else dtype, tuple(shape)))
        if dtype == "int8":
            arrays.append((f"{name}_scale", "float32", (*shape[:-1], 1)))
    return tuple(arrays)


def _probe(source: Source) -> str:
    """SHA-256 of the pixels of a few images, in case files or decoders are others now."""
    digest = hashlib.sha256()
    for i in np.linspace(0, len(source) - 1, min(_PROBES, len(source))).astype(int).tolist():
        try:
            digest.update(np.ascontiguousarray(source[i]["image"]).tobytes())
        except ImageError:
            digest.update(_UNREADABLE)
    return digest.hexdigest()


def check_space(caches: Iterable[Cache], folder: Path) -> None:
    """Makes the folder, and raises unless the caches that are not ready fit on its disk.

    Raises:
      UserError: naming what is needed and what is free.
    """
    make_folder(folder)
    needed = sum(cache.size - _kept_bytes(cache) for cache in caches if not cache.ready())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"image features need {gibibytes(needed)} more in {folder}, where "
            f"{gibibytes(free)} are free: make room, choose another cache.folder, a smaller "
            "cache.dtype or fewer cache.views"
        )


def gibibytes(size: int) -> str:
    """A size for people."""
    return f"{size / 2**30:.3g} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"


def _kept_bytes(cache: Cache) -> int:
    return sum(path.stat().st_size for path, _ in cache.files() if path.is_file())


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

    Raises:
      UserError: more images than `max_unreadable` cannot be read, another run is writing the same
        features, or the disk is full.
    """
    files = cache.files()
    kept = next((k for k, file in enumerate(files) if not _whole(*file)), len(files))
    start = sum(count for _, count in files[:kept])
    tick(start)

    def rows() -> Iterator[bytes]:
        """The records that are missing."""
        if start == cache.records:
            return
        left, unreadable = cache.records - start, set()
        # The next batch computes while the records of one are written.
        for first, found in _ahead(encoded()):
            arrays = {name: np.asarray(values) for name, values in found.items()}
            readable = arrays.pop("readable")
            stored = _store(arrays, cache.dtype)
            for j in range(min(batch_size, left - first)):
                tick(1)
                if readable[j]:
                    yield b"".join(stored[name][j].tobytes() for name, _, _ in cache.layout)
                else:
                    _note_unreadable(cache, start + first + j, unreadable, max_unreadable)
                    yield _UNREADABLE

    def encoded() -> Iterator[tuple[int, Arrays]]:
        batches = eval_batches(
            replace(cache.images, start=start),
            batch_size,
            num_workers=num_workers,
            process_index=process_index,
            process_count=process_count,
        )
        for k, batch in enumerate(batches):
            yield k * batch_size, encode(batch["images"], batch["targets"][:, 0] > 0)

    if process_index:
        for _ in rows():
            pass
        return
    make_folder(cache.folder)
    with _alone(cache.folder):
        (cache.folder / "cache.json").unlink(missing_ok=True)
        records = rows()
        for path, count in files[kept:]:
            _write_file(path, count, records)
        _write_note(cache)


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The items, each after the next one has been started."""
    waiting = []
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


def _store(arrays: Mapping[str, np.ndarray], dtype: Dtype) -> dict[str, np.ndarray]:
    """Float32 features [b ...] as they are stored."""
    import ml_dtypes

    stored = {}
    for name, values in arrays.items():
        if dtype == "int8":
            scale = np.abs(values).max(-1, keepdims=True) / 127
            scale = np.where(scale > 0, scale, 1).astype(np.float32)
            stored[name] = np.round(values / scale).astype(np.int8)
            stored[f"{name}_scale"] = scale
        elif dtype == "bfloat16":
            stored[name] = values.astype(ml_dtypes.bfloat16).view(np.uint16)
        else:
            stored[name] = values.astype(np.float32)
    return stored


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


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds a lock on the folder, which a killed process loses.

    Raises:
      UserError: another process holds it.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another run is writing the image features in {folder}: start again when it is "
                "done, or use another cache.folder"
            ) from error
        yield


def _whole(path: Path, count: int) -> bool:
    """Whether a file of records is there with all of them."""
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(path))
        found = reader.num_records()
        reader.close()  # where it could not be opened, this is what says so
    except (RuntimeError, ValueError):
        return False
    return found == count


def _write_file(path: Path, count: int, records: Iterator[bytes]) -> None:
    """Writes the next `count` records to a file, which gets its name when it is whole."""
    from array_record.python.array_record_module import ArrayRecordWriter

    part = path.with_name(f"{path.name}.part")
    try:
        writer = ArrayRecordWriter(str(part), _OPTIONS)
        try:
            for _ in range(count):
                writer.write(next(records))
        finally:
            writer.close()
    except RuntimeError as error:  # of ArrayRecord
        raise UserError(
            f"cannot write {part} ({error}): make room and start again; what is done is kept"
        ) from error
    part.replace(path)


def _write_note(cache: Cache) -> None:
    """Marks the cache as complete."""
    sizes = {path.name: path.stat().st_size for path, _ in cache.files()}
    part = cache.folder / "cache.json.part"
    with part.open("w") as file:
        json.dump({"key": cache.key, "sizes": sizes}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    part.replace(cache.folder / "cache.json")


class CachedSource:
    """Examples with "features" in place of "image": a `pipeline.AugmentedSource`.

    Args:
      cache: ready to read.
    """

    def __init__(self, cache: Cache) -> None:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.source, self.views = cache.images.source, cache.images.count
        self.folder, self.dtype, self.layout = cache.folder, cache.dtype, cache.layout
        self._records = ArrayRecordDataSource([str(path) for path, _ in cache.files()])

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.source)

    def __repr__(self) -> str:
        return f"CachedSource({str(self.folder)!r})"

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

    def _example(self, i: int, view: int) -> Example:
        try:
            record = self._records[view * len(self) + i]
        except RuntimeError as error:  # of ArrayRecord, whose checksums find damage
            raise UserError(
                f"image features in {self.folder} are damaged ({error}): remove this folder"
            ) from error
        if record == _UNREADABLE:
            raise ImageError(f"example {i} could not be read when image features were cached")
        return {**self.source.annotations(i), "features": self._arrays(record)}

    def _arrays(self, record: bytes) -> dict[str, np.ndarray]:
        import ml_dtypes

        arrays, offset = {}, 0
        for name, kind, shape in self.layout:
            values = np.frombuffer(record, kind, math.prod(shape), offset).reshape(shape)
            offset += values.nbytes
            arrays[name] = values.view(ml_dtypes.bfloat16) if self.dtype == "bfloat16" else values
        return arrays


def settings(config: CacheConfig | None) -> dict[str, Any] | None:
    """What of a configuration decides what training sees."""
    return config and {key: value for key, value in asdict(config).items() if key != "folder"}
