"""Files of image features: how values are stored, and the record files of one set of features.

    <folder>/features-00000-of-00004.array_record
    <folder>/cache.json                            written last; without it nothing is read

All records are of one size. A file of records is written under another name and renamed when it is
whole, so that what a killed run has finished is kept. ArrayRecord's checksums find changed bytes.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mlclip_jax.data.files import alone, publish
from mlclip_jax.errors import UserError, make_folder

Dtype = Literal["float32", "bfloat16", "int8"]
#: Name, type and shape of each array of a record, in order.
Layout = tuple[tuple[str, str, tuple[int, ...]], ...]
Arrays = Mapping[str, np.ndarray]

#: The record of an image that training passes over.
UNREADABLE = b"unreadable"
_FILE_BYTES = 64 << 20  # of a file of records, about
_OPTIONS = "group_size:1,uncompressed"  # each record can be read alone


# ---- Values ------------------------------------------------------------------------------------


def layout(shapes: Mapping[str, tuple[int, ...]], dtype: Dtype) -> Layout:
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


def store(arrays: Arrays, dtype: Dtype) -> dict[str, np.ndarray]:
    """Float32 features [b ...] as they are stored; int8 with a scale for each vector.

    Raises:
      UserError: they are not finite, which int8 could not say.
    """
    import ml_dtypes

    stored = {}
    for name, values in arrays.items():
        if not np.isfinite(values).all():
            raise UserError(
                f"{name} image features are not all finite: check the weights of the backbone, or "
                "use backbone.dtype 'float32'"
            )
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


# ---- Files -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureFiles:
    """The files of one set of features, whether they are there or not.

    Attributes:
      folder: of this very set.
      key: everything that decides the features, as JSON gives it back.
      dtype: how values are stored.
      layout: of a record.
      records: number of them.
    """

    folder: Path
    key: Mapping[str, Any]
    dtype: Dtype
    layout: Layout
    records: int

    @property
    def record_bytes(self) -> int:
        """Size of a record."""
        return sum(np.dtype(kind).itemsize * math.prod(shape) for _, kind, shape in self.layout)

    @property
    def size(self) -> int:
        """Bytes of all records."""
        return self.records * self.record_bytes

    def paths(self) -> list[tuple[Path, int]]:
        """The files of records and how many belong into each."""
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
            return json.loads((self.folder / "cache.json").read_text()) == self._note()
        except (OSError, ValueError):
            return False

    def done(self) -> int:
        """Number of records from the first one on that need not be written again."""
        records = 0
        for path, count in self.paths():
            if not _whole(path, count):
                break
            records += count
        return records

    def missing_bytes(self) -> int:
        """How much there is still to write, about."""
        written = sum(path.stat().st_size for path, _ in self.paths() if path.is_file())
        return max(0, self.size - written)

    def alone(self) -> AbstractContextManager[None]:
        """Makes the folder and holds a lock on it, which a killed process loses.

        Raises:
          UserError: another process holds it, or there can be no such folder.
        """
        return alone(
            self.folder / ".lock",
            f"another run is writing the image features in {self.folder}: start again when it is "
            "done, or use another cache.folder",
        )

    def write(self, records: Iterator[bytes], start: int) -> None:
        """Writes the files from record `start` on, where one of them begins, and the note.

        Raises:
          UserError: the disk is full or fails.
        """
        first = 0
        for path, count in self.paths():
            if first >= start:
                _write_file(path, list(itertools.islice(records, count)))
            first += count
        self._write_note()

    def open(self) -> Sequence[bytes]:
        """The records, for `read`; they can be pickled.

        Raises:
          UserError: they are not complete, or damaged.
        """
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        if not self.ready():
            raise UserError(
                f"the image features in {self.folder} are not complete: does every process see "
                "this folder, and has no other program changed it?"
            )
        try:
            records = ArrayRecordDataSource([str(path) for path, _ in self.paths()])
        except (RuntimeError, ValueError) as error:
            raise self._damaged(error) from error
        if len(records) != self.records:
            raise self._damaged(f"{len(records)} records in place of {self.records}")
        return records

    def read(self, records: Sequence[bytes], number: int) -> dict[str, np.ndarray] | None:
        """The arrays of a record as they are stored, bfloat16 as such; None if unreadable.

        Raises:
          UserError: the file is damaged.
        """
        import ml_dtypes

        try:
            record = records[number]
            if record == UNREADABLE:
                return None
            arrays, offset = {}, 0
            for name, kind, shape in self.layout:
                values = np.frombuffer(record, kind, math.prod(shape), offset).reshape(shape)
                offset += values.nbytes
                lower = self.dtype == "bfloat16"
                arrays[name] = values.view(ml_dtypes.bfloat16) if lower else values
        except (RuntimeError, ValueError) as error:
            raise self._damaged(error) from error
        return arrays

    def _damaged(self, why: Exception | str) -> UserError:
        return UserError(f"image features in {self.folder} are damaged ({why}): remove this folder")

    def _note(self) -> dict[str, Any]:
        """What cache.json holds if the files are complete."""
        return {"key": self.key, "sizes": {p.name: p.stat().st_size for p, _ in self.paths()}}

    def _write_note(self) -> None:
        """Marks the files as complete."""
        part = self.folder / "cache.json.part"
        with _telling(part):
            part.write_text(json.dumps(self._note(), indent=1))
            publish(part, self.folder / "cache.json")


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


def _write_file(path: Path, records: list[bytes]) -> None:
    """Writes a file of records, which gets its name when it is whole."""
    from array_record.python.array_record_module import ArrayRecordWriter

    part = path.with_name(f"{path.name}.part")
    with _telling(part):
        writer = ArrayRecordWriter(str(part), _OPTIONS)
        try:
            for record in records:
                writer.write(record)
        finally:
            writer.close()
        part.replace(path)


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Says what to do where writing fails.

    Raises:
      UserError: in place of the error of ArrayRecord or of the system.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"cannot write {path} ({error}): make room and start again; what is done is kept"
        ) from error


# ---- Space -------------------------------------------------------------------------------------


def check_space(wanted: Iterable[FeatureFiles], folder: Path) -> None:
    """Makes the folder, and raises unless what is missing fits on its disk.

    Raises:
      UserError: naming what is needed and what is free.
    """
    make_folder(folder)
    needed = sum(files.missing_bytes() for files in wanted)
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
