"""From `config.data` to the splits of a run: one dataclass of settings for each dataset."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlclip_jax.data import benchmarks
from mlclip_jax.data.benchmarks import Benchmark
from mlclip_jax.data.pipeline import Source
from mlclip_jax.data.scenes import Scenes
from mlclip_jax.errors import UserError
from mlclip_jax.fields import from_mapping
from mlclip_jax.labels import catalog
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.labels.taxonomies import NameFeatures, regroup
from mlclip_jax.spec import unknown


@dataclass(frozen=True)
class DataConfig:
    """Settings that every dataset has.

    Attributes:
      num_workers: processes that prepare batches; 0 does it in threads of this one.
      augment_flip: mirror each training image with probability one half, on the device.
      taxonomy: groups of the labels: "own", "none", "cluster", "cluster(12, seed=1)", "random",
        "renamed" or a YAML file (`labels.taxonomies.regroup`).
    """

    num_workers: int = 0
    augment_flip: bool = False
    taxonomy: str = "own"


@dataclass(frozen=True)
class ScenesConfig(DataConfig):
    """Settings of Scenes.

    Attributes:
      train_view: what the training labels show, e.g. "single_positive" or "partial(0.1)".
      num_train, num_validation, num_test: scenes in each split.
      seed: of the scenes and views.
      image_size: pixels of a side; None takes the backbone's.
    """

    train_view: str = "full"
    num_train: int = 2000
    num_validation: int = 500
    num_test: int = 1000
    seed: int = 0
    image_size: int | None = None


@dataclass(frozen=True)
class BenchmarkConfig(DataConfig):
    """Settings of a published benchmark (`data.benchmarks`).

    Attributes:
      data_dir: folder of its images and annotations.
      names_file: names of the labels in their order, one a line, in place of the published ones.
    """

    data_dir: str = ""
    names_file: str = ""


@dataclass(frozen=True)
class DataSplits:
    """The data of a run.

    Attributes:
      train: training examples.
      evals: evaluation examples by name of the split.
      space: their labels.
      config: settings of the dataset.
      protocol: of `evaluation.protocol.PROTOCOLS`, by which the dataset is reported.
    """

    train: Source
    evals: Mapping[str, Source]
    space: LabelSpace
    config: DataConfig
    protocol: str = "multi_label"


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
            f"data.image_size is {size} and the backbone takes {image_size} pixels: "
            f"set backbone.image_size={size} too, or leave data.image_size out"
        )

    def source(split: str, view: str) -> Scenes:
        return Scenes(split, sizes[split], seed=config.seed, image_size=size, view=view)

    evals = {split: source(split, "full") for split in splits}
    return DataSplits(
        source("train", config.train_view), evals, catalog.scenes(), config, protocol="scenes"
    )


def _load_benchmark(
    benchmark: Benchmark, config: BenchmarkConfig, image_size: int, splits: Sequence[str]
) -> DataSplits:
    """Says what is missing."""
    if not (benchmark.names_published or config.names_file):
        raise UserError(
            f"{benchmark.name} is published without class names: write them to a file, one a line "
            "in the order of their indices, and set data.names_file"
        )
    raise UserError(
        f"the images of {benchmark.name} cannot be read by this version yet, which knows its "
        "labels and sizes only"
    )


_Load = Callable[[Any, int, Sequence[str]], DataSplits]
# name: (settings, loader, label space)
_DATASETS: dict[str, tuple[type[DataConfig], _Load, Callable[[], LabelSpace]]] = {
    "scenes": (ScenesConfig, _load_scenes, catalog.scenes)
}


def _find(name: str) -> tuple[type[DataConfig], _Load, Callable[[], LabelSpace]]:
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
      image_size: pixels of a side that the backbone takes.
      splits: evaluation splits to open.
      name_features: features of label names, which a taxonomy of clusters needs.
      space: labels of a trained run, whose names and groups are taken as they are: the files that
        once gave them are not read again.

    Raises:
      UserError: unknown dataset, setting, split or taxonomy.
      ValueError: clusters without `name_features`.
    """
    name, fields = settings(config)
    data = _find(name)[1](fields, image_size, splits)
    return replace(data, space=space or label_space(config, name_features=name_features))


def label_space(
    config: Mapping[str, Any], *, name_features: NameFeatures | None = None
) -> LabelSpace:
    """The labels of a dataset with the taxonomy it is to have, without its images.

    Where no class names are published nor given in a file, they are stand-ins ("class 0").

    Raises:
      UserError: unknown dataset, setting or taxonomy, or a file that does not fit.
      ValueError: clusters without `name_features`.
    """
    name, fields = settings(config)
    space = _find(name)[2]()
    if isinstance(fields, BenchmarkConfig) and fields.names_file:
        space = catalog.with_names(space, fields.names_file)
    return regroup(space, fields.taxonomy, name_features)


def num_train(config: Mapping[str, Any]) -> int:
    """Training images that `config.data` names, without opening any.

    For Scenes the number that is drawn, of which a view such as "few_shot" leaves out some.

    Raises:
      UserError: unknown dataset or setting.
    """
    name, fields = settings(config)
    if isinstance(fields, BenchmarkConfig):
        return benchmarks.resolve(name).num_train
    return fields.num_train
