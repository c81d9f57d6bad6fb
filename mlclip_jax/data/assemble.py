"""From a benchmark's name to its images and labels: parts of corpora, published lists, views.

Annotations only; `data.registry` puts the images to them.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlclip_jax.data import benchmarks, protocols, raw
from mlclip_jax.data.benchmarks import Benchmark, Split
from mlclip_jax.data.manifest import Manifest, Rows
from mlclip_jax.data.protocols import Labels, SparseTargets
from mlclip_jax.data.raw import lists, nuswide
from mlclip_jax.errors import UserError
from mlclip_jax.labels import matching
from mlclip_jax.labels.matching import Matching
from mlclip_jax.labels.space import LabelSpace

_LABELS = ("positives", "negatives", "difficult")
_DENSE_BYTES = 1 << 29  # above it targets are made row by row


@dataclass(frozen=True)
class Files:
    """Where the files of a run are.

    Attributes:
      data_dir: the folder of a corpus, raw or prepared; of several, the folder that holds one for
        each, by its name ("coco", "imagenet", ...).
      lists: published lists by what they are for ("train", "test", "captions"), where they are not
        in the folder of the corpus under their published names.
    """

    data_dir: str
    lists: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class LabelledPart:
    """A part of a corpus and what is used of it.

    Attributes:
      manifest: all images of the part; row i is record i where the corpus is prepared.
      labels: the images in use and their labels, over the classes of `manifest.space`.
      corpus: module of `data.raw`.
      part: of its `PARTS`.
      folder: of the corpus.
      left_out: number of images that would be chosen from, or are listed, but were missing or
        unreadable when the part was prepared.
    """

    manifest: Manifest
    labels: Labels
    corpus: str
    part: str
    folder: Path
    left_out: int = 0

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the images in use and their labels."""
        return self.labels.fingerprint(self.manifest.keys)


def corpus_folder(data_dir: str, corpus: str) -> Path:
    """The folder of a corpus: in `data_dir` the one of its name, or `data_dir` itself.

    Images may be in a folder of that name too: what makes it the one is a prepared part or
    annotations, unless `data_dir` has none either.
    """
    marks = {manifest_path(Path(), "*").name, *raw.NEEDED[corpus].values()}

    def holds(folder: Path) -> bool:
        return any(any(folder.glob(mark)) for mark in marks)

    whole, folder = Path(data_dir), Path(data_dir) / corpus
    return folder if folder.is_dir() and (holds(folder) or not holds(whole)) else whole


def manifest_path(folder: Path, part: str) -> Path:
    """Where the manifest of a prepared part is."""
    return folder / f"{part}.manifest.npz"


def open_part(corpus: str, part: str, data_dir: str) -> tuple[Manifest, Path]:
    """The annotations of a part, prepared if they are, and the folder of the corpus.

    Raises:
      UserError: no such folder, or files in it are missing or malformed.
    """
    folder = corpus_folder(data_dir, corpus)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: set data.data_dir to the folder of {corpus}")
    if (path := manifest_path(folder, part)).is_file():
        return Manifest.load(path), folder
    return importlib.import_module(f"mlclip_jax.data.raw.{corpus}").read(folder, part), folder


def select_labels(manifest: Manifest, space: LabelSpace) -> Manifest:
    """The same images with the labels of a smaller space, whose ids are among the manifest's."""
    column = {name: i for i, name in enumerate(space.ids)}
    new = np.array([column.get(name, -1) for name in manifest.space.ids], np.int64)

    def select(rows: Rows | None) -> Rows | None:
        if rows is None:
            return None
        images, labels = rows.pairs()
        kept = new[labels] >= 0
        return Rows.from_pairs(images[kept], new[labels[kept]], len(rows))

    parts = {name: select(getattr(manifest, name)) for name in _LABELS}
    return dataclasses.replace(manifest, space=space, **parts, aux={})


def open_split(benchmark: Benchmark, split: Split, files: Files) -> tuple[Manifest, Path]:
    """The part of the corpus a split is taken from, over its labels and with its captions.

    Raises:
      UserError: as `open_part`, or `data_dir` is not set.
    """
    if not files.data_dir:
        bring = "; ".join(
            f"{corpus}: {text}" for corpus, text in benchmarks.needs(benchmark).items()
        )
        raise UserError(f"{benchmark.name} needs data.data_dir, the folder of its files ({bring})")
    manifest, folder = open_part(split.corpus, split.part, files.data_dir)
    if split.listed.endswith(".csv"):
        manifest = lists.over_classes(manifest, _list_files(benchmark, split, folder, files)[1])
    if split.labels == "joined":
        manifest = nuswide.joined(manifest)
    elif split.labels == "seen":
        manifest = select_labels(manifest, manifest.space.select("seen"))
    if split.captions:
        path = Path(files.lists.get("captions") or folder / split.captions)
        if path.is_file() or files.lists.get("captions"):
            manifest = lists.with_captions(manifest, path)
    return manifest, folder


def label(
    benchmark: Benchmark,
    name: str,
    manifest: Manifest,
    folder: Path,
    files: Files,
    *,
    check_size: bool = True,
) -> LabelledPart:
    """The images and labels of a split.

    Args:
      benchmark: which.
      name: of the split: "train", "validation" or "test".
      manifest, folder: as `open_split` gives them.
      files: where lists are.
      check_size: whether another number of images than the published one is an error.

    Raises:
      UserError: a list is missing or malformed, or the number of images is wrong.
    """
    split = getattr(benchmark, name)
    if split.listed:
        paths = _list_files(benchmark, split, folder, files)
        listed = _read_list(benchmark, split, *paths, manifest.space)
        labels = Labels(*lists.apply(manifest, listed))
        left_out = len(listed.names) - len(labels.index)
    else:
        labels = Labels(_targets(manifest, split), np.arange(len(manifest)))
        left_out = len(manifest.left_out)
    labels = protocols.apply(split.view, labels, subsets=manifest.space.subsets, keys=manifest.keys)
    if check_size and split.size is not None and len(labels.index) != split.size:
        left = f" ({left_out:,} left out when it was prepared)" if left_out else ""
        raise UserError(
            f"{benchmark.name}: {name} has {len(labels.index):,} images, but {split.size:,} are "
            f"published: check that {folder} is complete{left}, or set data.check_sizes=False"
        )
    return LabelledPart(manifest, labels, split.corpus, split.part, folder, left_out)


def _list_files(
    benchmark: Benchmark, split: Split, folder: Path, files: Files
) -> tuple[Path, Path]:
    """The list of a split, and the file of its labels or classes, which may be the same."""
    # Validation images are held out of the training list.
    kind = "test" if split is benchmark.test else "train"
    path = Path(files.lists.get(kind) or folder / split.listed)
    labels = path.with_name(benchmarks.file_of_labels(path.name))
    for file in (path, labels):
        if not file.is_file():
            raise UserError(
                f"{benchmark.name} takes its images and labels from the published "
                f"{' and '.join(split.list_files)}, and there is no {file}: put it there, or among "
                "the raw files before `mlclip prepare`, which copies it, or anywhere with "
                f"data.{kind}_list=FILE"
            )
    return path, labels


def _read_list(
    benchmark: Benchmark, split: Split, path: Path, labels: Path, space: LabelSpace
) -> lists.Listed:
    """The list of a split; one that only names images (DBL) takes the labels of the corpus."""
    if split.listed.endswith(".csv"):
        part = "train" if split is benchmark.train else "val"
        return lists.read_mldecoder(path, labels, space, split=part)
    if path.suffix == ".npy":
        return lists.read_arrays(path, labels, space)
    listed = lists.read_text(path, space, complete=split.complete)
    if (listed.targets > 0).any():
        return listed
    if split.complete:
        return lists.read_ids(path)
    raise UserError(
        f"{path} gives no image a label, and {benchmark.name} takes its labels from it: "
        f"is it the published {split.listed}?"
    )


def _targets(manifest: Manifest, split: Split) -> np.ndarray | SparseTargets:
    if len(manifest) * len(manifest.space) <= _DENSE_BYTES or manifest.difficult is not None:
        return manifest.label_matrix(difficult=split.difficult)
    return SparseTargets(manifest.positives, manifest.negatives, len(manifest.space))


def match(train: LabelSpace, evaluated: LabelSpace, aliases: str = "") -> Matching:
    """Which labels of training and evaluation mean the same.

    Args:
      train, evaluated: the spaces, with their names.
      aliases: YAML file of further names (`labels.matching.read_aliases`), "" for none.

    Raises:
      UserError: the aliases cannot be read or used.
    """
    return matching.match(train, evaluated, matching.read_aliases(aliases) if aliases else None)


def restrict(part: LabelledPart, space: LabelSpace, *, require_positive: bool) -> LabelledPart:
    """The part over the labels of a smaller space.

    Args:
      part: whose images and labels.
      space: its ids are among the part's.
      require_positive: whether images without a positive among them are left out.

    Raises:
      UserError: the part has not one of the labels.
    """
    if space.ids == part.manifest.space.ids:
        return part
    if unknown := set(space.ids) - set(part.manifest.space.ids):
        name = space.names[space.ids.index(min(unknown))]
        raise UserError(
            f"{part.manifest.name} in {part.folder} has not the label {name!r} of {space.name!r}: "
            "is it the data of this run?"
        )
    manifest, labels = select_labels(part.manifest, space), part.labels
    if labels.sparse:
        targets = SparseTargets(manifest.positives, manifest.negatives, len(space))[labels.index]
    else:
        column = {name: i for i, name in enumerate(part.manifest.space.ids)}
        targets = labels.targets[:, [column[name] for name in space.ids]]
    labels = Labels(targets, labels.index)
    if require_positive:
        labels = protocols.apply("require_positive", labels)
    return dataclasses.replace(part, manifest=manifest, labels=labels)
