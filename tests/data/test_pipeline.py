from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from mlclip_jax.data.pipeline import eval_batches, steps_per_epoch, train_batches
from mlclip_jax.data.scenes import Scenes
from mlclip_jax.errors import UserError


class Rows:
    """37 images that carry their number."""

    def __len__(self):
        return 37

    def __getitem__(self, i):
        image = np.full((4, 4, 3), i, np.uint8)
        return {"image": image, "targets": np.array([1, -1, 0], np.int8), "index": i}


def take(batches, count):
    return list(islice(batches, count))


def indices(batches):
    return np.concatenate([b["index"] for b in batches])


def test_batches_have_the_promised_arrays():
    batch = next(train_batches(Scenes("train", 20), 8, seed=0))
    assert set(batch) == {"images", "targets", "index", "mask"}
    assert batch["images"].shape == (8, 64, 64, 3) and batch["images"].dtype == np.uint8
    assert batch["targets"].shape == (8, 22) and batch["targets"].dtype == np.int8
    assert batch["index"].dtype == np.int32 and batch["mask"].dtype == bool
    assert batch["mask"].all()


def test_examples_stay_together():
    for batch in take(train_batches(Rows(), 8, seed=3), 6):
        np.testing.assert_array_equal(batch["images"][:, 0, 0, 0], batch["index"])


def test_an_epoch_holds_every_index_at_most_once_and_drops_the_remainder():
    assert steps_per_epoch(batch_size=8, num_examples=37) == 4
    batches = take(train_batches(Rows(), 8, seed=0), 40)
    seen = set()
    for epoch in range(10):
        order = indices(batches[4 * epoch : 4 * epoch + 4])
        assert len(set(order)) == 32
        seen |= set(order.tolist())
    assert seen == set(range(37))  # what one epoch drops, others show


def test_every_epoch_has_its_own_order_and_seeds_differ():
    batches = take(train_batches(Rows(), 8, seed=0), 8)
    assert indices(batches[:4]).tolist() != indices(batches[4:]).tolist()
    again = take(train_batches(Rows(), 8, seed=0), 8)
    np.testing.assert_array_equal(indices(batches), indices(again))
    other = take(train_batches(Rows(), 8, seed=1), 4)
    assert indices(batches[:4]).tolist() != indices(other).tolist()


@pytest.mark.parametrize("start", [1, 3, 4, 7])
def test_resuming_equals_going_on(start):
    whole = take(train_batches(Rows(), 8, seed=5), 10)
    rest = take(train_batches(Rows(), 8, seed=5, start_step=start), 10 - start)
    for a, b in zip(whole[start:], rest, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_workers_change_nothing():
    source = Scenes("train", 24, image_size=32)
    alone = take(train_batches(source, 8, seed=2), 5)
    helped = take(train_batches(source, 8, seed=2, num_workers=2), 5)
    for a, b in zip(alone, helped, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_processes_share_an_epoch():
    parts = [
        take(train_batches(Rows(), 8, seed=0, process_index=i, process_count=2), 4) for i in (0, 1)
    ]
    both = np.concatenate([indices(p) for p in parts])
    assert all(b["index"].shape == (4,) for p in parts for b in p)
    assert len(set(both)) == 32


@pytest.mark.parametrize(
    ("batch_size", "process_count"), [(8, 1), (37, 1), (40, 1), (8, 2), (40, 2)]
)
def test_evaluation_sees_everything_once(batch_size, process_count):
    shown, counts = [], []
    for i in range(process_count):
        kwargs = {"process_index": i, "process_count": process_count}
        batches = list(eval_batches(Rows(), batch_size, **kwargs))
        counts.append(len(batches))
        assert all(b["index"].shape == (batch_size // process_count,) for b in batches)
        shown += [b["index"][b["mask"]] for b in batches]
    assert len(set(counts)) == 1
    assert sorted(np.concatenate(shown).tolist()) == list(range(37))
    if process_count == 1:
        assert np.concatenate(shown).tolist() == list(range(37))


def test_a_transform_reads_the_source_image():
    batch = next(eval_batches(Rows(), 4, transform=lambda image: image + np.uint8(1)))
    np.testing.assert_array_equal(batch["images"][:, 0, 0, 0], batch["index"] + 1)


def test_errors_name_the_mend():
    with pytest.raises(UserError, match="larger than the 37 training examples"):
        train_batches(Rows(), 64, seed=0)
    with pytest.raises(UserError, match="does not divide among 2"):
        train_batches(Rows(), 9, seed=0, process_count=2)
    with pytest.raises(ValueError, match="is a transform missing"):
        next(eval_batches(Rows(), 4, transform=lambda image: image[..., :1]))
