"""Prepared data sets: a part of a corpus as TFDS data in ArrayRecord files, without TensorFlow.

    <data_dir>/coco/train2014/1.0.0/      records, read by `tfds.builder_from_directory`
    <data_dir>/coco/train2014.manifest.npz

Record i is row i of the manifest. Each file of records is written under another name and renamed
when it is whole, and so is the data set; the manifest, without which nothing is taken for prepared,
comes last. After a kill finished files are kept. A part is prepared by one run at a time.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlclip_jax.data import benchmarks, sources
from mlclip_jax.data.assemble import manifest_path
from mlclip_jax.data.files import alone, publish, sync
from mlclip_jax.data.manifest import Manifest
from mlclip_jax.data.transforms import ImageError, Preprocess
from mlclip_jax.errors import UserError, make_folder

# Every image is decoded on its way; JPEG at an eighth of its size, which reads all of its data.
_CHECK = Preprocess(8, mode="squash", interpolation="bilinear", fast_decode=True)
_LEAST_ROWS, _MOST_FILES = 2048, 256  # images in a file; files, which are all held open for reading
_THREADS = max(2, min(8, os.cpu_count() or 1))
_OPTIONS = "group_size:1,uncompressed"  # each record can be read alone; images are packed already


@dataclass(frozen=True)
class Prepared:
    """A prepared part.

    Attributes:
      folder: of its records.
      images: number of them.
      left_out: images that the raw annotations have besides.
      written: whether it was written now, not found ready.
    """

    folder: Path
    images: int
    left_out: int
    written: bool


@functools.cache
def _builder_class(corpus: str, part: str) -> type:
    """TFDS's builder of a part, made here because TFDS is imported no sooner than needed."""
    import tensorflow_datasets as tfds

    class CorpusBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Images with keys, labels and captions, in the order of a manifest."""

        name = corpus
        VERSION = tfds.core.Version(sources.VERSION)
        code_path = None  # TFDS looks for checksums of downloads there, and there are none
        BUILDER_CONFIGS = (tfds.core.BuilderConfig(name=part, description=f"The part {part}."),)

        def __init__(self, *, manifest: Manifest, reader: sources.Reader, **options: Any) -> None:
            self.manifest, self.reader = manifest, reader
            super().__init__(file_format="array_record", **options)

        def _info(self) -> Any:
            manifest, features = self.manifest, tfds.features
            label = features.ClassLabel(names=list(manifest.space.names))
            columns = {name: features.Sequence(label) for name in self._labels()}
            columns |= {f"aux_{name}": features.Sequence(np.int32) for name in manifest.aux}
            if manifest.captions is not None:
                columns["captions"] = features.Sequence(features.Text())
            image = {"image": features.Image(encoding_format="jpeg"), "key": features.Text()}
            return tfds.core.DatasetInfo(
                builder=self,
                features=features.FeaturesDict(image | columns),
                disable_shuffling=True,
                metadata=tfds.core.MetadataDict(),
            )

        def _labels(self) -> dict[str, Any]:
            names = ("positives", "negatives", "difficult")
            rows = {name: getattr(self.manifest, name) for name in names}
            return {name: found for name, found in rows.items() if found is not None}

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {sources.SPLIT: self._generate_examples(range(len(self.manifest)))}

        def _generate_examples(
            self, rows: range, unreadable: dict[int, str] | None = None
        ) -> Iterator[tuple[str, dict[str, Any]]]:
            """Keys and examples of rows; those `unreadable` are noted there or, if None, raised."""
            with ThreadPoolExecutor(_THREADS) as pool:
                for start in range(0, len(rows), 8 * _THREADS):
                    block = rows[start : start + 8 * _THREADS]
                    for row, found in zip(block, pool.map(self._load, block), strict=True):
                        if isinstance(found, bytes):
                            yield str(self.manifest.keys[row]), self._example(row, found)
                        elif unreadable is None:
                            raise found
                        else:
                            unreadable[row] = str(found)

        def _load(self, row: int) -> bytes | ImageError:
            key = str(self.manifest.keys[row])
            try:
                content = self.reader.read(row, key)
                _CHECK(content, name=key)
            except ImageError as error:
                return error
            return content

        def _example(self, row: int, content: bytes) -> dict[str, Any]:
            manifest = self.manifest
            example = {"image": content, "key": str(manifest.keys[row])}
            example |= {name: rows.row(row).tolist() for name, rows in self._labels().items()}
            example |= {f"aux_{name}": rows.row(row) for name, rows in manifest.aux.items()}
            if manifest.captions is not None:
                example["captions"] = list(manifest.captions[row])
            return example

    return CorpusBuilder


def make_builder(
    corpus: str, part: str, manifest: Manifest, reader: sources.Reader, data_dir: Path
) -> Any:
    """TFDS's builder of a part, which keeps its data in <data_dir>/<corpus>/<part>."""
    options = {"config": part, "data_dir": data_dir}
    return _builder_class(corpus, part)(manifest=manifest, reader=reader, **options)


def prepare(
    corpus: str,
    part: str,
    manifest: Manifest,
    raw: Path,
    data_dir: Path,
    *,
    allow_missing: bool = False,
    tick: Callable[[int], None] = lambda images: None,
) -> Prepared:
    """Writes the images and labels of a part as a data set, or finds it ready.

    Args:
      corpus: module of `data.raw`.
      part: of its `PARTS`.
      manifest: what the module reads of it.
      raw: the raw folder.
      data_dir: gets a folder of the corpus' name.
      allow_missing: leave images out that are missing or cannot be read.
      tick: told numbers of images that are done; nothing where all is ready.

    Raises:
      UserError: images are missing or cannot be read (they are then listed in the folder of the
        corpus, in <part>.unreadable.txt), nothing is left, the disk is full, or another run is
        preparing this part.
    """
    with lock(data_dir / corpus, part):
        return _prepare(corpus, part, manifest, raw, data_dir, allow_missing, tick)


def lock(folder: Path, part: str) -> AbstractContextManager[None]:
    """Keeps other runs from preparing a part of the corpus in `folder`.

    Raises:
      UserError: another run is at it, or there can be no such folder.
    """
    return alone(
        folder / f".{part}.lock",
        f"another run is preparing {part} in {folder}: run the command again when it is done, or "
        "choose another --data_dir",
    )


def _prepare(
    corpus: str,
    part: str,
    manifest: Manifest,
    raw: Path,
    data_dir: Path,
    allow_missing: bool,
    tick: Callable[[int], None],
) -> Prepared:
    """`prepare` by the only run that is at this part."""
    folder, source = data_dir / corpus, _digest(manifest)
    final, bad_list = sources.records_folder(folder, part), folder / f"{part}.unreadable.txt"
    found = _ready(final, manifest_path(folder, part), manifest, source)
    work = folder / f".incomplete-{part}-{source[:16]}"
    for other in folder.glob(f".incomplete-{part}-*"):
        if found or other != work:  # of a run that was killed last of all, or of other annotations
            shutil.rmtree(other)
    if found:
        return found
    make_folder(work)
    reader = sources.FolderReader(corpus, raw)
    builder = make_builder(corpus, part, manifest, reader, work)
    files = _files(builder, len(manifest))
    states = [_file(builder, work, path, rows, tick) for path, rows in files]

    unreadable = {int(row): why for state in states for row, why in state["unreadable"].items()}
    _list_unreadable(bad_list, manifest, unreadable)
    if unreadable and not allow_missing:
        raise UserError(
            f"{manifest.name}: {len(unreadable):,} of {len(manifest):,} images are missing or "
            f"cannot be read, the first is {next(iter(unreadable.values()))}; all are listed in "
            f"{bad_list}. Put them in place and run the command again, which keeps what is done, "
            "or leave them out with --allow_missing"
        )
    left_out = sorted(unreadable)
    kept = manifest.without(left_out)
    if not len(kept):
        raise UserError(f"{manifest.name} has no images in {raw}: is that the right folder?")
    metadata = {
        "source": source,
        "manifest": kept.fingerprint(),
        "keys": sources.keys_digest(kept.keys),
        "left_out": left_out,
        "sizes": {path.name: path.stat().st_size for path, _ in files},
    }
    _describe(builder, files, states, metadata)
    manifest_path(folder, part).unlink(missing_ok=True)
    sources.link_path(folder, part).unlink(missing_ok=True)
    if final.exists():
        shutil.rmtree(final)
    make_folder(final.parent)
    for path in (*Path(builder.data_path).iterdir(), Path(builder.data_path)):
        sync(path)
    Path(builder.data_path).rename(final)
    sync(final.parent)
    kept.save(manifest_path(folder, part))
    shutil.rmtree(work)
    return Prepared(final, len(kept), len(left_out), written=True)


def copy_lists(corpus: str, raw: Path, data_dir: Path) -> list[str]:
    """Copies the published lists among the raw files of a corpus to its prepared folder.

    Returns:
      Their names.

    Raises:
      UserError: the folder cannot be written to.
    """
    found = [name for name in benchmarks.list_files(corpus) if (raw / name).is_file()]
    folder = data_dir / corpus
    make_folder(folder)
    for name in found:
        part = folder / f"{name}.{os.getpid()}.part"  # runs of other parts may copy it too
        shutil.copyfile(raw / name, part)
        part.replace(folder / name)
    return found


def _digest(manifest: Manifest) -> str:
    """SHA-256 (hex) of all that a prepared data set is made from, but the images."""
    text = json.dumps([sources.VERSION, manifest.name, manifest.fingerprint(), manifest.captions])
    return hashlib.sha256(text.encode()).hexdigest()


def _ready(final: Path, saved: Path, manifest: Manifest, source: str) -> Prepared | None:
    """The data set that is there already, made from the same and with all of its files.

    Its manifest is mended if need be.
    """
    try:
        metadata = json.loads((final / "metadata.json").read_text())
        if metadata["source"] != source:
            return None
        left_out, sizes = metadata["left_out"], metadata["sizes"]
        if any((final / name).stat().st_size != size for name, size in sizes.items()):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    kept = manifest.without(left_out)
    try:
        found = Manifest.load(saved)
        current = found.fingerprint() == metadata["manifest"] and found.left_out == kept.left_out
    except UserError:
        current = False
    if not current:
        kept.save(saved)
    return Prepared(final, len(kept), len(left_out), written=False)


def _files(builder: Any, n: int) -> list[tuple[Path, range]]:
    """The files of records and the rows of each."""
    size = max(_LEAST_ROWS, -(-n // _MOST_FILES))
    starts = range(0, n, size)
    template = _template(builder)
    paths = (
        template.sharded_filepath(shard_index=i, num_shards=len(starts)) for i in range(len(starts))
    )
    rows = (range(start, min(start + size, n)) for start in starts)
    return [(Path(path), part) for path, part in zip(paths, rows, strict=True)]


def _template(builder: Any) -> Any:
    """TFDS's names of the files of records."""
    import tensorflow_datasets as tfds

    return tfds.core.ShardedFileTemplate(
        data_dir=builder.data_path,
        dataset_name=builder.name,
        split=sources.SPLIT,
        filetype_suffix="array_record",
    )


def _file(
    builder: Any, work: Path, path: Path, rows: range, tick: Callable[[int], None]
) -> dict[str, Any]:
    """Writes a file of records unless it is there without gaps; says what it could not read."""
    note = work / f"{path.name}.json"
    if path.is_file() and note.is_file():
        state = json.loads(note.read_text())
        if not state["unreadable"]:
            tick(len(rows))
            return state
    make_folder(path.parent)
    unreadable: dict[int, str] = {}
    part = work / f"{path.name}.part"
    try:
        size = _write(builder, part, builder._generate_examples(rows, unreadable), tick)
    except RuntimeError as error:  # of ArrayRecord
        if "No space left" in str(error):
            raise UserError(
                f"the disk of {work.parent} is full: make room and run the command again, which "
                "keeps the files that are done"
            ) from error
        raise UserError(f"cannot write {part} ({error})") from error
    tick(len(unreadable))
    publish(part, path)
    state = {"unreadable": unreadable, "images": len(rows) - len(unreadable), "bytes": size}
    part.write_text(json.dumps(state))
    publish(part, note)
    return state


def _write(builder: Any, path: Path, examples: Iterator[Any], tick: Callable[[int], None]) -> int:
    """Writes examples to a file of records and gives their size in bytes."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer, size = ArrayRecordWriter(str(path), _OPTIONS), 0
    try:
        for _, example in examples:
            record = builder.info.features.serialize_example(example)
            writer.write(record)
            size += len(record)
            tick(1)
    finally:
        writer.close()
    return size


def _describe(
    builder: Any,
    files: list[tuple[Path, range]],
    states: list[dict[str, Any]],
    metadata: dict[str, Any],
) -> None:
    """Writes what TFDS needs to read the files, and removes files of another division."""
    import tensorflow_datasets as tfds

    folder, paths = Path(builder.data_path), {path for path, _ in files}
    for path in folder.iterdir():
        if path not in paths:
            path.unlink()
    split = tfds.core.SplitInfo(
        name=sources.SPLIT,
        shard_lengths=[state["images"] for state in states],
        num_bytes=sum(state["bytes"] for state in states),
        filename_template=_template(builder),
    )
    builder.info.set_splits(tfds.core.SplitDict([split]))
    builder.info.metadata.update(metadata)
    builder.info.write_to_directory(folder)


def _list_unreadable(path: Path, manifest: Manifest, unreadable: dict[int, str]) -> None:
    """Writes the key of each image and what is wrong with it; no file where all is well."""
    if not unreadable:
        path.unlink(missing_ok=True)
        return
    lines = (f"{manifest.keys[row]}\t{why}\n" for row, why in unreadable.items())
    path.write_text("".join(lines), encoding="utf-8")
