from __future__ import annotations

import io
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from mlclip_jax.data.augment import Augment, example_rng, recipe
from mlclip_jax.data.captions import Captioned, tokenize
from mlclip_jax.data.pipeline import eval_batches, steps_per_epoch, train_batches
from mlclip_jax.data.sampling import ClassAware
from mlclip_jax.data.scenes import Scenes
from mlclip_jax.data.transforms import ImageError, Preprocess
from mlclip_jax.errors import UserError


class Rows:
    """37 images that carry their number."""

    def __len__(self):
        return 37

    def __getitem__(self, i):
        image = np.full((4, 4, 3), i, np.uint8)
        return {"image": image, "targets": np.array([1, -1, 0], np.int8), "index": i}


class Photos:
    """A source of n JPEGs in memory, augmented; those in `broken` are cut short."""

    def __init__(self, n=37, *, broken=(), augment="flip_rrc"):
        self.augment = Augment(Preprocess(16, fast_decode=True), recipe(augment))
        self.content = [self.encode(i, i in broken) for i in range(n)]
        self.labels = np.where(np.arange(n)[:, None] % 3 == np.arange(3), 1, -1).astype(np.int8)

    @staticmethod
    def encode(i, broken):
        y, x = np.mgrid[:24, :32]
        file = io.BytesIO()
        waves = [(i + 1) * x, 5 * y + i, x * y + 0 * i]
        Image.fromarray((np.stack(waves, -1) % 256).astype(np.uint8)).save(file, "JPEG")
        return file.getvalue()[: 300 if broken else None]

    def __len__(self):
        return len(self.content)

    def __getitem__(self, i):
        return self.augmented(i, None)

    def augmented(self, i, rng):
        image = self.augment(self.content[i], rng, name=f"photo {i}")
        return {"image": image, "targets": self.labels[i], "index": i}

    def class_counts(self):
        return (self.labels > 0).sum(0)

    def positives(self):
        return np.nonzero(self.labels > 0)


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


def assert_same(some, others):
    for a, b in zip(some, others, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_augmentation_depends_on_seed_epoch_and_example_only():
    source = Photos()
    batches = take(train_batches(source, 8, seed=5), 8)
    for step, batch in enumerate(batches):
        for i, image in zip(batch["index"].tolist(), batch["images"], strict=True):
            expected = source.augmented(i, example_rng(5, step // 4, i))["image"]
            np.testing.assert_array_equal(image, expected)
    rows = {i: image for b in batches[:4] for i, image in zip(b["index"], b["images"], strict=True)}
    again = {
        i: image for b in batches[4:] for i, image in zip(b["index"], b["images"], strict=True)
    }
    assert all((rows[i] != again[i]).any() for i in rows.keys() & again.keys())


@pytest.mark.parametrize("start", [1, 6])
def test_resuming_augments_alike(start):
    source = Photos(broken={3})
    whole = take(train_batches(source, 8, seed=5), 10)
    assert_same(whole[start:], take(train_batches(source, 8, seed=5, start_step=start), 10 - start))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers, caplog):
    source = Captioned(Photos(broken={3, 30}), np.arange(37 * 4).reshape(37, 4))
    alone = take(train_batches(source, 8, seed=2), 9)
    said = [record.message for record in caplog.records]
    caplog.clear()
    assert_same(alone, take(train_batches(source, 8, seed=2, num_workers=workers), 9))
    assert [record.message for record in caplog.records] == said
    assert len(said) == 2


def test_processes_augment_alike():
    whole = take(train_batches(Photos(), 8, seed=1), 6)
    parts = [
        take(train_batches(Photos(), 8, seed=1, process_index=i, process_count=2), 6)
        for i in (0, 1)
    ]
    for batch, *pair in zip(whole, *parts, strict=True):
        shown = {i: v for b in pair for i, v in zip(b["index"].tolist(), b["images"], strict=True)}
        assert shown.keys() == set(batch["index"].tolist())
        for i, image in zip(batch["index"].tolist(), batch["images"], strict=True):
            np.testing.assert_array_equal(image, shown[i])


class Tail(Photos):
    """37 photos, of which 30 show the first class, 3 the second and none the third."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.labels = np.full((37, 3), -1, np.int8)
        self.labels[:30, 0] = self.labels[[2, 31, 33], 1] = 1


def by_class(source, count=10, **kwargs):
    with closing(train_batches(source, 8, seed=5, sampling="class_aware", **kwargs)) as batches:
        return take(batches, count)


def test_class_aware_batches_are_the_draws_in_order():
    source = Tail()
    batches, draws = by_class(source), ClassAware(*source.positives(), seed=5)
    assert set(batches[0]) == {"images", "targets", "index", "mask"}
    index = indices(batches)
    assert index.tolist() == [draws[i] for i in range(80)]
    assert np.concatenate([b["mask"] for b in batches]).all()
    rare = np.isin(index, [2, 31, 33]).mean()
    assert rare > 0.45  # of 3 images in 37


def test_every_draw_is_augmented_anew():
    source = Tail()
    index, images = (np.concatenate([b[k] for b in by_class(source)]) for k in ("index", "images"))
    for draw, (i, image) in enumerate(zip(index.tolist(), images, strict=True)):
        expected = source.augmented(i, example_rng(5, draw, i))["image"]
        np.testing.assert_array_equal(image, expected)
    first_epoch = images[:32][index[:32] == 31]
    assert len(first_epoch) >= 4
    assert len({image.tobytes() for image in first_epoch}) == len(first_epoch)


@pytest.mark.parametrize("start", range(1, 10))
def test_resuming_draws_alike(start):
    source = Tail()
    assert_same(by_class(source)[start:], by_class(source, 10 - start, start_step=start))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_draw_alike(workers):
    source = Captioned(Tail(broken={3, 31}), np.arange(37 * 4).reshape(37, 4))
    assert_same(by_class(source), by_class(source, num_workers=workers))


def test_processes_share_the_draws():
    source = Tail()
    parts = [by_class(source, process_index=i, process_count=2) for i in (0, 1)]
    for batch, *pair in zip(by_class(source), *parts, strict=True):
        for key, value in batch.items():
            np.testing.assert_array_equal(
                value, np.stack([b[key] for b in pair], 1).reshape(value.shape)
            )


def test_unreadable_images_are_replaced_named_once_and_counted(caplog):
    broken = {3, 11, 30}
    batches = take(train_batches(Photos(broken=broken), 8, seed=0, max_unreadable=3), 24)
    index = indices(batches)
    assert len(index) == 24 * 8 and broken.isdisjoint(index.tolist())
    assert set(batches[0]) == {"images", "targets", "index", "mask"}
    for batch in batches:  # labels are those of the image that is shown
        np.testing.assert_array_equal(batch["targets"].argmax(1), batch["index"] % 3)
    said = [record.message for record in caplog.records]
    assert len(said) == 3
    for i in broken:
        assert sum(line.startswith(f"photo {i}: cannot be read as an image") for line in said) == 1
    for count, line in enumerate(said, start=1):
        assert line.endswith(f"(passed over: {count} of at most 3)")


def test_too_many_unreadable_images_are_an_error(caplog):
    batches = train_batches(Photos(broken={3, 11, 30}), 8, seed=0, max_unreadable=2)
    with pytest.raises(
        UserError, match=r"photo \d+: .* number 3 of the training images .* and 2 may"
    ):
        take(batches, 24)
    assert len(caplog.records) == 2
    with pytest.raises(UserError, match="number 1 of the training images"):
        take(train_batches(Photos(broken={3}), 8, seed=0, max_unreadable=0), 24)
    with pytest.raises(ImageError, match=r"photo \d+: cannot be read as .* none of 99 others"):
        next(train_batches(Photos(broken=range(37)), 8, seed=0))


def test_an_unreadable_image_ends_an_evaluation():
    with pytest.raises(ImageError, match="photo 9: cannot be read as an image"):
        list(eval_batches(Photos(broken={9}), 8))


def test_evaluation_augments_nothing():
    source = Photos(10)
    batches = list(eval_batches(source, 4))
    images = np.concatenate([b["images"][b["mask"]] for b in batches])
    plain = Preprocess(16, fast_decode=True)
    np.testing.assert_array_equal(images, [plain(content) for content in source.content])


def test_captions_travel_with_their_images():
    def encode(texts):
        rows = np.zeros((len(texts), 12), np.int32)
        for row, text in zip(rows, texts, strict=True):
            row[: len(text) + 1] = [*map(ord, text), 99]
        return rows

    captions = [(f"no {i}", "x") if i % 2 else () for i in range(37)]
    tokens = tokenize(captions, encode)
    assert tokens.dtype == np.int32 and tokens.shape == (37, len("no 11 x") + 1)
    np.testing.assert_array_equal(tokens[1][:7], [*map(ord, "no 1 x"), 99])
    assert tokens[0][0] == 99
    assert tokenize(captions, encode, max_characters=2).shape == (37, 3)
    for source in (Rows(), Photos()):
        for batch in (
            *take(train_batches(Captioned(source, tokens), 8, seed=0), 3),
            *eval_batches(Captioned(source, tokens), 8),
        ):
            np.testing.assert_array_equal(batch["caption_tokens"], tokens[batch["index"]])
    with pytest.raises(ValueError, match="captions of 36 images for 37"):
        Captioned(Rows(), tokens[1:])


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


def test_errors_name_the_mend():
    with pytest.raises(UserError, match="larger than the 37 training examples"):
        train_batches(Rows(), 64, seed=0)
    with pytest.raises(UserError, match=r"unknown sampling 'class-aware'.*'class_aware'"):
        train_batches(Photos(), 8, seed=0, sampling="class-aware")
    unlabelled = Photos()
    unlabelled.labels[:] = -1
    with pytest.raises(UserError, match="no training image has any: set sampling='uniform'"):
        train_batches(unlabelled, 8, seed=0, sampling="class_aware")
    with pytest.raises(UserError, match="does not divide among 2"):
        train_batches(Rows(), 9, seed=0, process_count=2)
    with pytest.raises(ValueError, match="example 0: an image must be uint8"):
        next(eval_batches([{"image": np.zeros((4, 4, 1), np.uint8), "index": 0}], 1))
