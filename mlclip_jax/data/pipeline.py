"""From a random-access source to batches on the host, over grain.

A batch is a dict of numpy arrays: images uint8 [b h w 3], targets int8 [b c], index int32 [b], mask
bool [b], and caption_tokens int32 [b t] or caption_features [b d] where the source has them. In
place of pixels "images" is a dict of features where they are cached (`data.features`).

The training examples are a pure function of the seed, the source and the number of processes, and
what augmentation makes of each one of the seed, the epoch (or the draw, where an epoch may show an
image more than once) and the example: workers and threads change nothing, and `start_step` alone
continues a run.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any, Protocol, get_args, runtime_checkable

import numpy as np

from mlclip_jax.data.augment import example_rng
from mlclip_jax.data.sampling import ClassAware, Sampling
from mlclip_jax.data.transforms import ImageError
from mlclip_jax.errors import UserError
from mlclip_jax.spec import unknown

Batch = dict[str, Any]
Example = Mapping[str, Any]

#: Images that training passes over because they cannot be read, unless it is told otherwise.
MAX_UNREADABLE = 10
_REPLACEMENTS = 100  # tries to find a readable image in place of an unreadable one
_MAX_THREADS = 8
_log = logging.getLogger(__name__)


class Source(Protocol):
    """Random access to examples.

    An example has "image" (uint8 [h w 3]), "targets" (int8 [c]), "index" (its number) and, in every
    example or none, "caption_tokens" (int32 [t]) or "caption_features" ([d], see `data.captions`);
    "features" by name may stand for the image. Workers receive a pickled
    copy of the source.
    """

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, i: int) -> Example:
        """Example i, always the same.

        Raises:
          ImageError: its image cannot be read.
        """

    def class_counts(self) -> np.ndarray:
        """Positives of each class among all examples, int64 [c]."""


@runtime_checkable
class AugmentedSource(Source, Protocol):
    """A source whose images training sees changed at random."""

    def augmented(self, i: int, rng: np.random.Generator) -> Example:
        """Example i, its image changed with these random numbers.

        Raises:
          ImageError: its image cannot be read.
        """


class LabelledSource(Source, Protocol):
    """A source whose labels are known without its images, as class-aware sampling needs it."""

    def positives(self) -> tuple[np.ndarray, np.ndarray]:
        """The example and the class of each positive label, integers [k] both, in any order."""


def _arrays(example: Example, mask: bool = True) -> Batch:
    """An example as arrays of the batch's dtypes."""
    out = {
        "images": example["features"] if "features" in example else _pixels(example),
        "targets": np.asarray(example["targets"], np.int8),
        "index": np.asarray(example["index"], np.int32),
        "mask": np.asarray(mask),
    }
    if "caption_tokens" in example:
        out["caption_tokens"] = np.asarray(example["caption_tokens"], np.int32)
    if "caption_features" in example:
        out["caption_features"] = np.asarray(example["caption_features"])
    return out


def _pixels(example: Example) -> np.ndarray:
    image = np.asarray(example["image"])
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(
            f"example {example['index']}: an image must be uint8 [h w 3] here, "
            f"not {image.dtype} {list(image.shape)}"
        )
    return image


class _OfEpoch:
    """At a position of the endless training sequence the epoch and the example."""

    def __init__(self, epoch_length: int) -> None:
        self.epoch_length = epoch_length

    def __call__(self, position: int, i: int) -> tuple[int, int]:
        return position // self.epoch_length, i


class _OfDraw:
    """The number of a draw and the example."""

    def __init__(self, draws: ClassAware) -> None:
        self.draws = draws

    def __call__(self, draw: int) -> tuple[int, int]:
        return draw, self.draws[draw]


class _TrainExample:
    """Example i in an epoch (or at a draw), augmented, as arrays; runs in workers.

    An image that cannot be read is replaced by another one, drawn from all; "unreadable" is then
    its number i, and -1 otherwise.
    """

    def __init__(self, source: Source, seed: int) -> None:
        self.source, self.seed = source, seed

    def __call__(self, drawn: tuple[int, int]) -> Batch:
        epoch, i = drawn
        rng = example_rng(self.seed, epoch, i)
        shown, failure = i, None
        for _ in range(_REPLACEMENTS):
            try:
                out = _arrays(load_example(self.source, shown, rng))
            except ImageError as error:
                failure, shown = error, int(rng.integers(len(self.source)))
            else:
                return {**out, "unreadable": np.asarray(-1 if failure is None else i, np.int32)}
        raise ImageError(
            f"{failure}; none of {_REPLACEMENTS - 1} others drawn in its place can be read"
        ) from failure


def load_example(source: Source, i: int, rng: np.random.Generator) -> Example:
    """Example i as training sees it: augmented where the source does that.

    Raises:
      ImageError: its image cannot be read.
    """
    return source.augmented(i, rng) if hasattr(source, "augmented") else source[i]


class _EvalExample:
    """Example i as arrays; numbers beyond the last repeat it, marked as padding."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __call__(self, i: int) -> Batch:
        last = len(self.source) - 1
        return _arrays(self.source[min(i, last)], mask=i <= last)


def steps_per_epoch(*, batch_size: int, num_examples: int) -> int:
    """Batches in one pass over the training examples; the remainder is dropped.

    Raises:
      UserError: fewer examples than one batch.
    """
    if num_examples < batch_size:
        raise UserError(
            f"batch_size {batch_size} is larger than the {num_examples} training examples: "
            "lower batch_size or take more examples"
        )
    return num_examples // batch_size


def train_batches(
    source: Source,
    batch_size: int,
    *,
    seed: int,
    sampling: Sampling = "uniform",
    start_step: int = 0,
    max_unreadable: int = MAX_UNREADABLE,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Endless shuffled batches.

    Uniform sampling shows each example at most once in an epoch, whose order is its own and whose
    remainder is dropped. Class-aware sampling (`data.sampling`) knows no epochs: an example may
    come again at any time, and is then augmented anew.

    An image that cannot be read is named once in the log, and always replaced by the same other
    one, drawn from all.

    Args:
      source: the examples; augmented where it is an `AugmentedSource`, and drawn by class only
        where it is a `LabelledSource`.
      batch_size: of all processes together.
      seed: of the order and the augmentation.
      sampling: "uniform", or "class_aware" to show each class about as often.
      start_step: batches to pass over: what follows is what an uninterrupted run would see.
      max_unreadable: different images that may be replaced, counted from the call.
      num_workers: worker processes; 0 works in threads of this process.
      process_index: which of the processes this is; each sees its own part of every epoch.
      process_count: number of processes.

    Yields:
      Batches of `batch_size // process_count` examples; `mask` is all True.

    Raises:
      UserError: the batch does not divide among the processes, or is larger than the source;
        unknown sampling, or by class where no example has a positive label; while iterating, more
        images than `max_unreadable` cannot be read.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"batch_size {batch_size} does not divide among {process_count} processes")
    if sampling not in get_args(Sampling):
        raise unknown("sampling", sampling, get_args(Sampling))
    steps = steps_per_epoch(batch_size=batch_size, num_examples=len(source))
    import grain

    local = batch_size // process_count
    if sampling == "class_aware":
        draws = ClassAware(*source.positives(), seed=seed)
        ds = grain.MapDataset.range(process_index, sys.maxsize, process_count).map(_OfDraw(draws))
    else:
        ds = grain.MapDataset.range(len(source)).seed(seed).shuffle()
        ds = ds.slice(slice(process_index, None, process_count))
        # Whole batches only, before repeating: no batch mixes two epochs, and an epoch holds an
        # example at most once.
        ds = ds.slice(slice(0, steps * local)).repeat().map_with_index(_OfEpoch(steps * local))
    ds = ds.map(_TrainExample(source, seed)).batch(local, drop_remainder=True)
    batches = _iterate(ds[start_step:], local, num_workers)
    return _count_unreadable(batches, source, max_unreadable)


def _count_unreadable(batches: Iterator[Batch], source: Source, limit: int) -> Iterator[Batch]:
    """The batches without their "unreadable", which is reported and counted here.

    Workers only note numbers, so that the count is of all of them and follows the batches' order.
    """
    known: set[int] = set()
    with closing(batches):
        for batch in batches:
            for i in batch.pop("unreadable").tolist():
                if i >= 0 and i not in known:
                    known.add(i)
                    reason = _why_unreadable(source, i)
                    if len(known) > limit:
                        raise UserError(
                            f"{reason}. It is number {len(known)} of the training images that "
                            f"cannot be read, and {limit} may be passed over (max_unreadable)"
                        )
                    _log.warning("%s (passed over: %d of at most %d)", reason, len(known), limit)
            yield batch


def _why_unreadable(source: Source, i: int) -> str:
    """The message of reading example i once more."""
    try:
        load_example(source, i, np.random.default_rng(0))
    except ImageError as error:
        return str(error)
    return f"example {i} could not be read, and now it can: is its disk failing?"


def _iterate(ds: Any, local: int, num_workers: int) -> Iterator[Batch]:
    import grain

    # Decoding releases Python's lock, so that threads use several cores.
    threads = 2 if num_workers else max(2, min(_MAX_THREADS, os.cpu_count() or 1))
    buffer = max(4, threads, min(64, 512 // local))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)
    batches = ds.to_iter_dataset(options)
    if num_workers > 0:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # grain's workers read absl flags, whoever the caller is
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
        batches = batches.mp_prefetch(options)
    iterator = iter(batches)
    try:
        yield from iterator
    finally:
        # Python may still warn of leaked shared memory at its exit, and frees it then: grain frees
        # the last batches of workers in a thread that the exit ends.
        iterator.close()


def eval_batches(
    source: Source,
    batch_size: int,
    *,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """One pass in order; every batch is full, its last rows repeated where examples run out.

    All processes yield the same number of batches. Padding has `mask` False and the index of the
    example it repeats.

    Args:
      source: the examples.
      batch_size: of all processes together.
      num_workers: worker processes; 0 works in threads of this process.
      process_index: which of the processes this is: it takes every `process_count`-th example.
      process_count: number of processes.

    Yields:
      Batches of `batch_size // process_count` examples.

    Raises:
      UserError: the batch does not divide among the processes, or there are no examples; while
        iterating, an image cannot be read.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"batch_size {batch_size} does not divide among {process_count} processes")
    if len(source) == 0:
        raise UserError("there are no examples to evaluate")
    import grain

    local = batch_size // process_count
    padded = -(-len(source) // batch_size) * batch_size
    ds = grain.MapDataset.range(padded).slice(slice(process_index, None, process_count))
    ds = ds.map(_EvalExample(source)).batch(local, drop_remainder=True)
    return _iterate(ds, local, num_workers)
