"""Settings of each dataset: what `config.data` may hold beside its name."""

from __future__ import annotations

from dataclasses import dataclass

from mlclip_jax.data.assemble import Files
from mlclip_jax.data.pipeline import MAX_UNREADABLE
from mlclip_jax.data.sources import ImageConfig
from mlclip_jax.data.transforms import Preprocess


@dataclass(frozen=True)
class DataConfig:
    """Settings that every dataset has.

    Attributes:
      num_workers: processes that prepare batches; 0 does it in threads of this one.
      taxonomy: groups of the labels: "own", "none", "cluster", "cluster(12, seed=1)", "random",
        "renamed" or a YAML file (`labels.taxonomies.regroup`).
      max_unreadable: different training images that may be passed over because they cannot be read.
    """

    num_workers: int = 0
    taxonomy: str = "own"
    max_unreadable: int = MAX_UNREADABLE

    @property
    def flip(self) -> bool:
        """Whether the training step mirrors each image with probability one half."""
        return False

    def preprocess(self, size: int) -> Preprocess:
        """How evaluation and serving bring an image to `size` pixels a side."""
        return Preprocess(size)


@dataclass(frozen=True)
class ScenesConfig(DataConfig):
    """Settings of Scenes.

    Attributes:
      train_view: what the training labels show, e.g. "single_positive" or "partial(0.1)".
      train_objects: objects in each training scene, 1 to 4; None: two to four as drawn.
      num_train, num_validation, num_test: scenes in each split.
      seed: of the scenes and views.
      image_size: pixels of a side; None takes the backbone's.
      object_scale: size of objects relative to the usual one, in (0, 1]: 0.5 draws those of a
        64-pixel scene in one of 128 pixels.
      augment_flip: mirror each training image with probability one half.
    """

    train_view: str = "full"
    train_objects: int | None = None
    num_train: int = 2000
    num_validation: int = 500
    num_test: int = 1000
    seed: int = 0
    image_size: int | None = None
    object_scale: float = 1.0
    augment_flip: bool = False

    @property
    def flip(self) -> bool:
        """As `augment_flip` says."""
        return self.augment_flip


@dataclass(frozen=True)
class CustomConfig(ImageConfig, DataConfig):
    """Settings of a folder of one's own images, beside those of `ImageConfig`.

    Attributes:
      data_dir: the folder, with labels.csv or labels.jsonl.
      train_view: what the training labels show.
      seed: of the view.
    """

    data_dir: str = ""
    train_view: str = "full"
    seed: int = 0


@dataclass(frozen=True)
class BenchmarkConfig(ImageConfig, DataConfig):
    """Settings of a published benchmark (`data.benchmarks`), beside those of `ImageConfig`.

    Attributes:
      data_dir: folder of its images and annotations, raw or prepared; for a benchmark of several
        corpora the folder that holds theirs, each by its name.
      names_file: names of the labels in their order, one a line, in place of the published ones.
      train_list, test_list, captions_list: published lists that it takes images, labels and
        captions from, where they are not in the folder of the corpus under their published names.
      aliases: YAML file of further names by which labels of training and evaluation are matched.
      check_sizes: whether another number of images than the published one is an error.
    """

    data_dir: str = ""
    names_file: str = ""
    train_list: str = ""
    test_list: str = ""
    captions_list: str = ""
    aliases: str = ""
    check_sizes: bool = True

    @property
    def files(self) -> Files:
        """Where the files are."""
        lists = {"train": self.train_list, "test": self.test_list, "captions": self.captions_list}
        return Files(self.data_dir, lists)
