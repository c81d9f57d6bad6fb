"""Features in place of images: keys, views, batches, unreadable images, processes."""

from __future__ import annotations

import logging
import pickle

import numpy as np
import pytest
from cached_noise import Noise, encode, make, pooled, written

from mlclip_jax.data import features
from mlclip_jax.data.augment import Augment, recipe
from mlclip_jax.data.captions import Captioned
from mlclip_jax.data.manifest import Manifest, Rows
from mlclip_jax.data.pipeline import eval_batches, train_batches
from mlclip_jax.data.protocols import Labels
from mlclip_jax.data.scenes import Scenes
from mlclip_jax.data.sources import ImageSource
from mlclip_jax.data.transforms import ImageError, Preprocess
from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace


def test_batches_of_features(tmp_path):
    opened = written(tmp_path).open()
    direct = list(eval_batches(Noise(), 4))
    for batch, plain in zip(eval_batches(opened, 4), direct, strict=True):
        assert batch["images"].keys() == {"pooled", "tokens"}
        np.testing.assert_allclose(batch["images"]["pooled"], pooled(plain["images"]), rtol=1e-6)
        for name in ("targets", "index", "mask"):
            np.testing.assert_array_equal(batch[name], plain[name])
    trained, plain = (train_batches(s, 4, seed=3, start_step=1) for s in (opened, Noise()))
    for _ in range(4):
        left, right = next(trained), next(plain)
        np.testing.assert_array_equal(left["index"], right["index"])
        np.testing.assert_allclose(left["images"]["pooled"], pooled(right["images"]), rtol=1e-6)


def test_workers_read_the_cache(tmp_path):
    opened = written(tmp_path).open()
    (one,), (two,) = (list(eval_batches(opened, 10, num_workers=k)) for k in (0, 2))
    np.testing.assert_array_equal(one["images"]["tokens"], two["images"]["tokens"])
    again = pickle.loads(pickle.dumps(opened))
    np.testing.assert_array_equal(again[3]["features"]["pooled"], one["images"]["pooled"][3])


def test_views_are_augmented_and_epochs_draw_among_them(tmp_path):
    source = Noise(augment="upside down")
    cache = written(tmp_path, source, views=4, flip=True, seed=5)
    assert cache.files.records == 40
    opened = cache.open()
    first = opened[2]["features"]["pooled"]
    image = source[2]["image"]
    variants = [pooled(v[None])[0] for v in (image, image[::-1], image[:, ::-1], image[::-1, ::-1])]
    rng, seen = np.random.default_rng(0), set()
    for _ in range(40):
        found = opened.augmented(2, rng)["features"]
        (match,) = [k for k, v in enumerate(variants) if np.allclose(found["pooled"], v, rtol=1e-5)]
        seen.add(match)
    assert len(seen) > 1 and any(np.allclose(first, v, rtol=1e-5) for v in variants)
    turned = [  # without a mirror, or not at all
        any(np.array_equal(cache.images.image(10 * view + i), v) for v in (image, image[::-1]))
        for view in range(4)
        for i in range(10)
        for image in [source[i]["image"]]
    ]
    assert 10 < sum(turned) < 30  # mirrored with probability one half
    # Evaluation sees images as they are, and shares its cache with training that changes nothing.
    assert make(tmp_path, source, train=False).files.folder == make(tmp_path).files.folder
    assert make(tmp_path, source).files.folder != make(tmp_path).files.folder
    with pytest.raises(UserError, match=r"cache\.views' is 2, but nothing changes"):
        make(tmp_path, views=2)


def test_all_that_decides_features_is_in_the_key(tmp_path):
    random = Noise(augment="x")
    caches = [
        make(tmp_path),
        make(tmp_path, encoder="b"),
        make(tmp_path, dtype="int8"),
        make(tmp_path, Noise(9)),
        make(tmp_path, Noise(seed=1)),
        make(tmp_path, Noise(bad=[9])),  # the same name, other pixels
        make(tmp_path, random),
        make(tmp_path, random, views=2),
        make(tmp_path, random, flip=True),
        make(tmp_path, random, seed=1),
        make(tmp_path, Noise(augment="y")),
    ]
    assert len({cache.files.folder for cache in caches}) == len(caches)
    assert make(tmp_path, seed=7).files.folder == caches[0].files.folder  # nothing is random there


class Grey(Noise):
    """Images that look the same whatever is done to them: only their names differ."""

    def __getitem__(self, i):
        return {"image": np.full((8, 8, 3), 9, np.uint8), **self.annotations(i)}


def test_names_and_settings_are_in_the_key_even_where_pixels_are_the_same(tmp_path):
    random = Grey(augment="x")
    caches = [
        make(tmp_path, Grey()),
        make(tmp_path, Grey(9)),
        make(tmp_path, Grey(seed=1)),
        make(tmp_path, random),
        make(tmp_path, random, views=2),
        make(tmp_path, random, flip=True),
        make(tmp_path, random, seed=1),
        make(tmp_path, Grey(augment="y")),
    ]
    assert len({cache.files.folder for cache in caches}) == len(caches)


def test_pixels_are_in_the_key_even_where_names_are_the_same(tmp_path, monkeypatch):
    plain, random = Noise(), Noise(augment="x")
    before = [make(tmp_path, source).files.folder for source in (plain, random)]
    # Augmentation that another version of a library carries out in another way.
    monkeypatch.setattr(Noise, "augmented", lambda self, i, rng: self[i])
    after = [make(tmp_path, source).files.folder for source in (plain, random)]
    assert before[0] == after[0] and before[1] != after[1]
    # Files replaced by others, or decoded in another way.
    original = Noise.__getitem__

    def darker(self, i):
        example = original(self, i)
        return {**example, "image": example["image"] // 2}

    monkeypatch.setattr(Noise, "__getitem__", darker)
    assert make(tmp_path, plain).files.folder != after[0]


def test_unreadable_images_are_passed_over_and_counted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        opened = written(tmp_path, Noise(bad=(2, 5), augment="x"), views=2).open()
    found = [record.getMessage() for record in caplog.records]
    assert found == [
        "noise 2 is damaged (passed over: 1 of at most 10)",
        "noise 5 is damaged (passed over: 2 of at most 10)",
    ]
    with pytest.raises(ImageError, match="example 5 could not be read when"):
        opened[5]
    batch = next(train_batches(opened, 10, seed=0))
    direct = next(train_batches(Noise(bad=(2, 5)), 10, seed=0))
    assert sorted(batch["index"].tolist()).count(2) == 0
    assert batch["index"].shape == direct["index"].shape
    with pytest.raises(UserError, match=r"noise 5 is damaged\. It is number 2 .* and 1 may be"):
        written(tmp_path / "one", Noise(bad=(2, 5)), max_unreadable=1)


def test_two_processes_write_what_one_does(tmp_path):
    # Process 1 computes along and writes nothing; a batch is shared out in turn.
    cache = make(tmp_path / "two")
    shares = [list(eval_batches(Noise(), 4, process_index=p, process_count=2)) for p in (0, 1)]
    calls = iter(zip(*shares, strict=True))

    def together(images, readable):
        both = np.stack([share["images"] for share in next(calls)], 1).reshape(4, 8, 8, 3)
        np.testing.assert_array_equal(images, both[0::2])
        return encode(both, np.ones(4, bool))

    features.write(cache, together, batch_size=4, process_index=0, process_count=2)
    one = written(tmp_path / "one")
    assert cache.files.paths()[0][0].read_bytes() == one.files.paths()[0][0].read_bytes()

    calls = iter(zip(*shares, strict=True))

    def second(images, readable):
        return encode(np.concatenate([s["images"] for s in next(calls)]), np.ones(4, bool))

    idle = make(tmp_path / "idle")
    features.write(idle, second, batch_size=4, process_index=1, process_count=2)
    assert not idle.files.folder.exists() and next(calls, None) is None


def test_sources_of_the_library_can_be_cached(tmp_path):
    scenes = [Scenes("train", 12, view=view) for view in ("full", "single_positive")]
    folders = {make(tmp_path, source).files.folder for source in scenes}
    assert len(folders) == 1  # labels do not matter
    for other in (
        Scenes("test", 12),
        Scenes("train", 12, seed=1),
        Scenes("train", 12, image_size=32),
    ):
        assert make(tmp_path, other).files.folder not in folders
    tokens = np.arange(24, dtype=np.int32).reshape(12, 2)
    captioned = Captioned(scenes[0], tokens)
    assert make(tmp_path, captioned).files.folder in folders
    example = captioned.annotations(3)
    assert example["caption_tokens"].tolist() == [6, 7] and example["index"] == 3

    class Reader:
        def read(self, row, key):
            import io

            from PIL import Image

            file = io.BytesIO()
            Image.new("RGB", (9, 8), (row * 20, 0, 0)).save(file, "PNG")
            return file.getvalue()

    keys = np.array(["a.png", "b.png", "c.png"])
    space = LabelSpace(("x", "y"), name="xy")
    manifest = Manifest("made/up", space, keys, Rows.from_lists([[0], [1], []]))

    def images(name="none", rows=(0, 1, 2), **fields):
        labels = Labels(manifest.label_matrix()[list(rows)], np.array(rows))
        transform = Augment(Preprocess(8, **fields), recipe(name))
        return ImageSource(manifest, labels, Reader(), transform)

    plain = make(tmp_path, images())
    assert (
        make(tmp_path, images("flip")).files.folder == plain.files.folder
    )  # the flag says so, not the recipe
    others = [
        images("flip_rrc"),
        images(rows=(0, 1)),
        images(mode="squash"),
        images(fast_decode=True),
    ]
    assert (
        len({make(tmp_path, source).files.folder for source in others} | {plain.files.folder}) == 5
    )
    with pytest.raises(UserError, match="images of list cannot be told from others"):
        make(tmp_path, [1, 2, 3])
