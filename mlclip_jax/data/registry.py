"""From `config.data` to the splits of a run: one dataclass of settings for each dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlclip_jax.data.pipeline import Source
from mlclip_jax.data.scenes import Scenes
from mlclip_jax.errors import UserError
from mlclip_jax.fields import from_mapping
from mlclip_jax.labels import catalog
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.spec import unknown


@dataclass(frozen=True)
class DataConfig:
    """Settings that every dataset has.

    Attributes:
      num_workers: processes that prepare batches; 0 does it in threads of this one.
      augment_flip: mirror each training image with probability one half, on the device.
    """

    num_workers: int = 0
    augment_flip: bool = False


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


# name: (settings, loader, label space)
_DATASETS = {"scenes": (ScenesConfig, _load_scenes, catalog.scenes)}


def settings(config: Mapping[str, Any]) -> tuple[str, DataConfig]:
    """Name and settings of the dataset that `config.data` names.

    Raises:
      UserError: unknown dataset or setting.
    """
    fields = dict(config)
    name = fields.pop("name", "")
    if name not in _DATASETS:
        raise unknown("dataset", name, _DATASETS)
    return name, from_mapping(_DATASETS[name][0], fields, "data")


def load(config: Mapping[str, Any], *, image_size: int, splits: Sequence[str]) -> DataSplits:
    """The splits that `config.data` names.

    Args:
      config: "name" and the dataset's settings.
      image_size: pixels of a side that the backbone takes.
      splits: evaluation splits to open.

    Raises:
      UserError: unknown dataset, setting or split.
    """
    name, fields = settings(config)
    return _DATASETS[name][1](fields, image_size, splits)


def label_space(config: Mapping[str, Any]) -> LabelSpace:
    """The labels of a dataset, without its images."""
    name, _ = settings(config)
    return _DATASETS[name][2]()
