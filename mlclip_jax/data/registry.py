"""From `config.data` to the splits of a run: one dataclass of settings for each dataset.

Datasets are "scenes", which ships with the package, "custom", a folder of one's own images
(`data.raw.custom`), and the published benchmarks (`data.benchmarks`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlclip_jax.data import assemble, benchmarks, protocols
from mlclip_jax.data.assemble import LabelledPart
from mlclip_jax.data.benchmarks import Benchmark, Split
from mlclip_jax.data.manifest import Manifest
from mlclip_jax.data.pipeline import Source
from mlclip_jax.data.scenes import Scenes
from mlclip_jax.data.settings import BenchmarkConfig, CustomConfig, DataConfig, ScenesConfig
from mlclip_jax.data.sources import open_images
from mlclip_jax.errors import UserError
from mlclip_jax.fields import from_mapping
from mlclip_jax.labels import catalog, matching
from mlclip_jax.labels.matching import Matching
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.labels.taxonomies import NameFeatures, regroup
from mlclip_jax.spec import unknown


@dataclass(frozen=True)
class DataSplits:
    """The data of a run.

    Attributes:
      train: training examples.
      evals: evaluation examples by name of the split.
      space: their labels.
      config: settings of the dataset.
      protocol: of `evaluation.protocol.PROTOCOLS`, by which the dataset is reported.
      train_space: labels of the training examples where they are others than those of evaluation
        (zero-shot, single to several labels).
      fingerprints: SHA-256 of images and labels by split, of data read from files.
      left_out: by split, images that were missing or unreadable when they were prepared.
      matching: where labels of training and evaluation are matched by name, what was found.
    """

    train: Source
    evals: Mapping[str, Source]
    space: LabelSpace
    config: DataConfig
    protocol: str = "multi_label"
    train_space: LabelSpace | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    matching: Matching | None = None

    def report(self, *, short: bool = False) -> str:
        """What was read from files, a line for each split, then the labels that match; "" if none.

        To be read before a run: whether these are the images and labels that were meant.

        Args:
          short: twelve digits of each fingerprint, and how many labels match, not which.
        """
        lines = []
        for split, digest in self.fingerprints.items():
            source = self.train if split == "train" else self.evals[split]
            space = self.train_space if split == "train" and self.train_space else self.space
            digest = digest[:12] if short else digest
            left_out = self.left_out.get(split, 0)
            without = f" without {left_out:,} missing or unreadable ones" if left_out else ""
            lines.append(
                f"{split}: {len(source):,} images{without}, {len(space):,} labels, sha256 {digest}"
            )
        if self.matching is not None:
            matches = self.matching.report()
            lines.append(matches.partition(":\n")[0] if short else matches)
        return "\n".join(lines)

    def train_counts(self) -> np.ndarray | None:
        """Training positives of each class of `space`, int64 [c]: 0 of classes that are unseen.

        None where training has classes that evaluation does not know.
        """
        counts, train = self.train.class_counts(), self.train_space or self.space
        if not set(train.ids) <= set(self.space.ids):
            return None
        count_of = dict(zip(train.ids, counts.tolist(), strict=True))
        return np.array([count_of.get(name, 0) for name in self.space.ids], np.int64)


def _load_scenes(config: ScenesConfig, image_size: int, splits: Sequence[str]) -> DataSplits:
    """Scenes at the size of the backbone."""
    sizes = {
        "train": config.num_train,
        "validation": config.num_validation,
        "test": config.num_test,
    }
    for split in splits:
        if split not in sizes:
            raise unknown("split of scenes", split, sizes)
    size = config.image_size or image_size
    if size != image_size:
        raise UserError(
            f"data.image_size is {size} and the method takes images of {image_size} pixels: leave "
            "data.image_size out, or set backbone.image_size (or ADDS's method.image_size)"
        )

    def source(split: str, view: str) -> Scenes:
        return Scenes(
            split,
            sizes[split],
            seed=config.seed,
            image_size=size,
            object_scale=config.object_scale,
            objects=config.train_objects if split == "train" else None,
            view=view,
        )

    evals = {split: source(split, "full") for split in splits}
    return DataSplits(
        source("train", config.train_view), evals, catalog.scenes(), config, protocol="scenes"
    )


def _custom_part(config: CustomConfig, split: str) -> LabelledPart:
    """A part of the user's own images with all its labels."""
    if not config.data_dir:
        raise UserError("custom data need data.data_dir, the folder of the images")
    manifest, folder = assemble.open_part("custom", split, config.data_dir)
    labels = protocols.Labels(manifest.label_matrix(), np.arange(len(manifest)))
    return LabelledPart(manifest, labels, "custom", split, folder, len(manifest.left_out))


def _custom_labels(config: CustomConfig) -> LabelledPart:
    """The training part through its view."""
    part = _custom_part(config, "train")
    labels = protocols.apply(
        config.train_view, part.labels, seed=config.seed, keys=part.manifest.keys
    )
    return replace(part, labels=labels)


def _load_custom(
    config: CustomConfig,
    image_size: int,
    splits: Sequence[str],
    trained: LabelSpace | None = None,
) -> DataSplits:
    """The user's own images, over the labels `trained` where a run has them already."""

    def over_trained(part: LabelledPart) -> LabelledPart:
        return assemble.restrict(part, trained, require_positive=False) if trained else part

    train = over_trained(_custom_labels(config))
    parts = {split: over_trained(_custom_part(config, split)) for split in splits}
    return _open_images(train, parts, config, image_size)


def _load_benchmark(
    benchmark: Benchmark,
    config: BenchmarkConfig,
    image_size: int,
    splits: Sequence[str],
    trained: LabelSpace | None = None,
) -> DataSplits:
    """The published splits, over the labels `trained` where a run has them already."""
    if benchmark.names == "user" and not (config.names_file or trained):
        raise UserError(
            f"{benchmark.name} is published without class names: write them to a file, one a line "
            "in the order of their indices, and set data.names_file"
        )
    for split in splits:
        if split not in benchmark.splits:
            raise unknown(f"split of {benchmark.name}", split, benchmark.splits)
    opened = _opener(benchmark, config)
    train_space, space, found = _spaces(benchmark, config, opened, trained)
    parts = {}
    for name in ("train", *splits):
        manifest, folder = opened(getattr(benchmark, name))
        part = assemble.label(
            benchmark, name, manifest, folder, config.files, check_size=config.check_sizes
        )
        train = name == "train"
        own = train_space if train and train_space else space
        parts[name] = assemble.restrict(part, own, require_positive=train)
    data = _open_images(parts.pop("train"), parts, config, image_size)
    data = replace(data, space=space, train_space=train_space, matching=found)
    return replace(data, protocol=benchmark.protocol)


_Opener = Callable[[Split], tuple[Manifest, Path]]


def _opener(benchmark: Benchmark, config: BenchmarkConfig) -> _Opener:
    """`assemble.open_split` that reads what several splits are taken from only once."""
    kept: dict[tuple[str, ...], tuple[Manifest, Path]] = {}

    def opened(split: Split) -> tuple[Manifest, Path]:
        what = (split.corpus, split.part, split.labels, split.captions)
        if what not in kept:
            kept[what] = assemble.open_split(benchmark, split, config.files)
        return kept[what]

    return opened


def _spaces(
    benchmark: Benchmark,
    config: BenchmarkConfig,
    opened: _Opener,
    trained: LabelSpace | None = None,
) -> tuple[LabelSpace | None, LabelSpace, Matching | None]:
    """The labels of training, None where they are those of evaluation, and of evaluation.

    Also how they match, where labels that both have may be left out. Of a run, its own labels of
    evaluation are `trained`; nothing is matched then, nor left out of those of training.
    """

    def read(make: Callable[[], LabelSpace], split: Split) -> LabelSpace:
        return opened(split)[0].space if config.data_dir else make()

    space = trained or benchmark.space()
    if trained is None and benchmark.names == "files":
        space = read(benchmark.space, benchmark.test)
    if trained is None and config.names_file:
        space = catalog.with_names(space, config.names_file)
    if benchmark.train_space is None:
        return None, space, None
    train = read(benchmark.train_space, benchmark.train)
    if trained or benchmark.drop_from is None or not config.data_dir:  # stand-ins match nothing
        return train, space, None
    found = assemble.match(train, space, config.aliases)
    return *matching.without_overlap(found, benchmark.drop_from), found


def _open_images(
    train: LabelledPart,
    evals: Mapping[str, LabelledPart],
    config: CustomConfig | BenchmarkConfig,
    image_size: int,
) -> DataSplits:
    """Labelled parts with their images; "train" may be evaluated too, with all of its labels."""
    parts = {"train": train} | {split: part for split, part in evals.items() if split != "train"}
    return DataSplits(
        open_images(train, config, image_size, train=True),
        {name: open_images(part, config, image_size, train=False) for name, part in evals.items()},
        train.manifest.space,
        config,
        fingerprints={split: part.fingerprint() for split, part in parts.items()},
        left_out={split: part.left_out for split, part in parts.items()},
    )


_Load = Callable[[Any, int, Sequence[str]], DataSplits]
# name: (settings, loader, label space); None: the labels are in the files
_DATASETS: dict[str, tuple[type[DataConfig], _Load, Callable[[], LabelSpace] | None]] = {
    "scenes": (ScenesConfig, _load_scenes, catalog.scenes),
    "custom": (CustomConfig, _load_custom, None),
}


def _find(name: str) -> tuple[type[DataConfig], _Load, Callable[[], LabelSpace] | None]:
    """Settings, loader and label space of a dataset or benchmark."""
    if name in _DATASETS:
        return _DATASETS[name]
    if not name.startswith(benchmarks.NAMES):
        raise unknown("dataset", name, [*_DATASETS, *benchmarks.NAMES])
    benchmark = benchmarks.resolve(name)
    return BenchmarkConfig, functools.partial(_load_benchmark, benchmark), benchmark.space


def settings(config: Mapping[str, Any]) -> tuple[str, DataConfig]:
    """Name and settings of the dataset or benchmark that `config.data` names.

    Raises:
      UserError: unknown dataset or setting.
    """
    fields = dict(config)
    name = fields.pop("name", "")
    return name, from_mapping(_find(name)[0], fields, "data")


def load(
    config: Mapping[str, Any],
    *,
    image_size: int,
    splits: Sequence[str],
    name_features: NameFeatures | None = None,
    space: LabelSpace | None = None,
) -> DataSplits:
    """The splits that `config.data` names.

    Args:
      config: "name" and the dataset's settings.
      image_size: pixels of a side that the method takes.
      splits: evaluation splits to open.
      name_features: features of label names, which a taxonomy of clusters needs.
      space: labels of a trained run, whose names and groups are taken as they are: the files that
        once gave them (`names_file`, `aliases`, `taxonomy`) are not read again.

    Raises:
      UserError: unknown dataset, setting, split or taxonomy, or data without the labels of `space`.
      ValueError: clusters without `name_features`.
    """
    name, fields = settings(config)
    load_splits = _find(name)[1]
    if isinstance(fields, CustomConfig | BenchmarkConfig):  # their labels may come from files
        load_splits = functools.partial(load_splits, trained=space)
    data = load_splits(fields, image_size, splits)
    if space is not None:
        return replace(data, space=space)
    space, train_space = (
        own and regroup(own, fields.taxonomy, name_features)
        for own in (data.space, data.train_space)
    )
    return replace(data, space=space, train_space=train_space)


def label_space(
    config: Mapping[str, Any], *, name_features: NameFeatures | None = None
) -> LabelSpace:
    """The labels of evaluation of a dataset with the taxonomy they are to have, without images.

    Where no class names are published nor given in a file, they are stand-ins ("class 0"); so they
    are where names are in the files of a corpus and `data_dir` is not set.

    Raises:
      UserError: unknown dataset, setting or taxonomy, or a file that does not fit.
      ValueError: clusters without `name_features`.
    """
    return label_spaces(config, name_features=name_features)[1]


def label_spaces(
    config: Mapping[str, Any], *, name_features: NameFeatures | None = None
) -> tuple[LabelSpace, LabelSpace]:
    """The labels of training and those of evaluation, mostly the same, as `label_space` has them.

    Raises:
      UserError, ValueError: as `label_space`.
    """
    name, fields = settings(config)
    if isinstance(fields, CustomConfig):
        train, space = None, _custom_part(fields, "train").manifest.space
    elif isinstance(fields, BenchmarkConfig):
        benchmark = benchmarks.resolve(name)
        train, space, _ = _spaces(benchmark, fields, _opener(benchmark, fields))
    else:
        train, space = None, _find(name)[2]()
    space = regroup(space, fields.taxonomy, name_features)
    return regroup(train, fields.taxonomy, name_features) if train else space, space


def num_train(config: Mapping[str, Any]) -> int | None:
    """Training images that `config.data` names, without opening any.

    For Scenes the number that is drawn, of which a view such as "few_shot" leaves out some. None
    for a benchmark of which it is not published.

    Raises:
      UserError: unknown dataset or setting, or custom data that cannot be read.
    """
    name, fields = settings(config)
    if isinstance(fields, BenchmarkConfig):
        return benchmarks.resolve(name).num_train
    if isinstance(fields, CustomConfig):
        return len(_custom_labels(fields).labels.index)
    return fields.num_train
