"""From a random-access source to batches on the host, over grain.

A source has `len()` and `source[i] -> {"image", "targets", "index"}`. A batch is a dict of numpy
arrays: images uint8 [b h w 3], targets int8 [b c], index int32 [b], mask bool [b].

The order of training examples is a pure function of the seed, the length of the source and the
number of processes: workers and threads change nothing, and `start_step` alone continues a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from mlclip_jax.errors import UserError

Batch = dict[str, np.ndarray]
Example = Mapping[str, Any]


class Source(Protocol):
    """Random access to examples {"image", "targets", "index"}."""

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, i: int) -> Example:
        """Example i."""

    def label_matrix(self) -> np.ndarray:
        """Targets of all examples, int8 [n c], without their images."""


class _Prepare:
    """Maps an example of the source to arrays of the batch's dtypes; picklable for workers."""

    def __init__(self, transform: Callable[[Any], np.ndarray] | None) -> None:
        self.transform = transform

    def __call__(self, example: Example) -> Batch:
        image = example["image"]
        image = self.transform(image) if self.transform is not None else np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(
                f"example {example['index']}: an image must be uint8 [h w 3] here, "
                f"not {image.dtype} {list(image.shape)}; is a transform missing?"
            )
        return {
            "images": image,
            "targets": np.asarray(example["targets"], np.int8),
            "index": np.asarray(example["index"], np.int32),
            "mask": np.asarray(True),
        }


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
    start_step: int = 0,
    transform: Callable[[Any], np.ndarray] | None = None,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Endless shuffled batches; each epoch has its own order and drops its remainder.

    Args:
      source: the examples; workers receive a pickled copy.
      batch_size: of all processes together.
      seed: of the order.
      start_step: batches to pass over: what follows is what an uninterrupted run would see.
      transform: of each image on the host, e.g. from `data.transforms`; None for sources whose
        images are ready.
      num_workers: worker processes; 0 works in threads of this process.
      process_index: which of the processes this is; each sees its own part of every epoch.
      process_count: number of processes.

    Yields:
      Batches of `batch_size // process_count` examples; `mask` is all True.

    Raises:
      UserError: the batch does not divide among the processes, or is larger than the source.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"batch_size {batch_size} does not divide among {process_count} processes")
    steps = steps_per_epoch(batch_size=batch_size, num_examples=len(source))
    import grain

    local = batch_size // process_count
    ds = grain.MapDataset.source(source).seed(seed).shuffle()
    ds = ds.slice(slice(process_index, None, process_count))
    # Whole batches only, before repeating: no batch mixes two epochs, and an epoch holds an
    # example at most once.
    ds = ds.slice(slice(0, steps * local)).repeat()
    ds = ds.map(_Prepare(transform)).batch(local, drop_remainder=True)
    return _iterate(ds[start_step:], local, num_workers)


def _iterate(ds: Any, local: int, num_workers: int) -> Iterator[Batch]:
    import grain

    buffer = max(4, min(64, 512 // local))
    batches = ds.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=buffer))
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
        iterator.close()


def eval_batches(
    source: Source,
    batch_size: int,
    *,
    transform: Callable[[Any], np.ndarray] | None = None,
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
      transform: of each image on the host.
      num_workers: worker processes; 0 works in threads of this process.
      process_index: which of the processes this is: it takes every `process_count`-th example.
      process_count: number of processes.

    Yields:
      Batches of `batch_size // process_count` examples.

    Raises:
      UserError: the batch does not divide among the processes, or there are no examples.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"batch_size {batch_size} does not divide among {process_count} processes")
    if len(source) == 0:
        raise UserError("there are no examples to evaluate")
    import grain

    local = batch_size // process_count
    padded = _Padded(source, -(-len(source) // batch_size) * batch_size)
    ds = grain.MapDataset.source(padded).slice(slice(process_index, None, process_count))
    ds = ds.map(_Unpad(_Prepare(transform))).batch(local, drop_remainder=True)
    return _iterate(ds, local, num_workers)


class _Padded:
    """A source made longer by repeating its last example, marked as padding."""

    def __init__(self, source: Source, length: int) -> None:
        self.source, self.length = source, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> tuple[Example, bool]:
        last = len(self.source) - 1
        return self.source[min(i, last)], i <= last

    def __repr__(self) -> str:
        return f"_Padded({self.source!r}, {self.length})"


class _Unpad:
    """Prepares a marked example and sets its mask."""

    def __init__(self, prepare: _Prepare) -> None:
        self.prepare = prepare

    def __call__(self, item: tuple[Example, bool]) -> Batch:
        example, real = item
        return {**self.prepare(example), "mask": np.asarray(real)}
