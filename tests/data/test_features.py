"""The feature cache on its own: form on disk, keys, resuming, damage, unreadable images."""

from __future__ import annotations

import fcntl
import json
import logging
import pickle
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from mlclip_jax.data import feature_files, features
from mlclip_jax.data.augment import Augment, recipe
from mlclip_jax.data.captions import Captioned
from mlclip_jax.data.features import CacheConfig
from mlclip_jax.data.manifest import Manifest, Rows
from mlclip_jax.data.pipeline import eval_batches, train_batches
from mlclip_jax.data.protocols import Labels
from mlclip_jax.data.scenes import Scenes
from mlclip_jax.data.sources import ImageSource
from mlclip_jax.data.transforms import ImageError, Preprocess
from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace

SHAPES = {"pooled": (6,), "tokens": (4, 6)}
_RNG = np.random.default_rng(0)
_MATRIX = _RNG.normal(size=(8 * 8 * 3, 6))


class Noise:
    """Images of noise that training turns upside down at random; some cannot be read."""

    def __init__(self, n=10, *, bad=(), seed=0, augment=None, fail_at=None):
        self.n, self.bad, self.seed, self.augment, self.fail_at = n, bad, seed, augment, fail_at
        self.opened = []

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i == self.fail_at:
            raise KeyboardInterrupt
        if i in self.bad:
            raise ImageError(f"noise {i} is damaged")
        self.opened.append(i)
        image = np.random.default_rng((self.seed, i)).integers(0, 256, (8, 8, 3), np.uint8)
        return {"image": image, **self.annotations(i)}

    def augmented(self, i, rng):
        example = self[i]
        turned = self.augment is not None and rng.random() < 0.5
        return {**example, "image": example["image"][::-1] if turned else example["image"]}

    def annotations(self, i):
        return {"targets": np.array([1, -1 if i % 2 else 0], np.int8), "index": i}

    def identity(self):
        same = {"name": "noise", "seed": self.seed}
        return same if self.augment is None else {**same, "augment": self.augment}

    def class_counts(self):
        return np.array([self.n, 0])


def pooled(images):
    # Rounded from float64: a float32 product would depend on the size of the batch.
    return (images.reshape(len(images), -1) / 255 @ _MATRIX).astype(np.float32)


def encode(images, readable):
    tokens = np.stack([pooled(images) * k for k in range(4)], 1)
    return {"pooled": pooled(images), "tokens": tokens, "readable": readable}


def make(folder, source=None, *, train=True, encoder="a", **fields):
    config = CacheConfig(
        str(folder), **{k: fields.pop(k) for k in ("views", "dtype") if k in fields}
    )
    source = Noise() if source is None else source
    return features.plan(
        source, config, encoder={"weights": encoder}, shapes=SHAPES, train=train, **fields
    )


def written(folder, source=None, *, max_unreadable=10, batch_size=4, **fields):
    cache = make(folder, source, **fields)
    features.write(cache, encode, batch_size=batch_size, max_unreadable=max_unreadable)
    return cache


@pytest.fixture
def small_files(monkeypatch):
    """Three records of float32 features in a file."""
    monkeypatch.setattr(feature_files, "_FILE_BYTES", 3 * 4 * 30)


def test_features_come_back_with_labels_and_without_images(tmp_path, small_files):
    source = Noise()
    cache = written(tmp_path, source)
    assert len(cache.files.paths()) == 4 and cache.files.size == 10 * 4 * 30
    source.opened.clear()
    opened = cache.open()
    assert len(opened) == 10
    for i in range(10):
        example = opened[i]
        image = Noise()[i]["image"]
        expected = pooled(image[None])[0]
        np.testing.assert_allclose(example["features"]["pooled"], expected, rtol=1e-4, atol=1e-5)
        assert example["features"]["tokens"].shape == (4, 6)
        assert example["index"] == i and "image" not in example
        np.testing.assert_array_equal(example["targets"], source.annotations(i)["targets"])
    assert not source.opened
    np.testing.assert_array_equal(opened.class_counts(), [10, 0])


def test_size_is_that_of_the_records(tmp_path):
    for dtype, size in (("float32", 120), ("bfloat16", 60), ("int8", 30 + 4 * 5)):
        cache = written(tmp_path, dtype=dtype)
        assert cache.files.record_bytes == size
        on_disk = sum(path.stat().st_size for path, _ in cache.files.paths())
        assert cache.files.size <= on_disk < cache.files.size + 2**17 + 64 * 10  # ArrayRecord's own


def test_bfloat16_and_int8_are_close(tmp_path):
    exact = pooled(np.stack([Noise()[i]["image"] for i in range(10)]))
    low = written(tmp_path, dtype="bfloat16").open()
    for i in range(10):
        found = low[i]["features"]
        assert found["pooled"].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found["pooled"], exact[i].astype(ml_dtypes.bfloat16))
    quantised = written(tmp_path, dtype="int8").open()
    for i in range(10):
        found = quantised[i]["features"]
        assert found["pooled"].dtype == np.int8 and found["tokens_scale"].shape == (4, 1)
        values = found["tokens"] * found["tokens_scale"]
        expected = exact[i] * np.arange(4)[:, None]
        largest = np.abs(expected).max(1, keepdims=True)
        assert (np.abs(values - expected) <= largest / 254 + 1e-6).all()  # zeros stay zeros


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


@pytest.mark.parametrize("fail_at", [0, 4, 9])
def test_a_killed_run_goes_on(tmp_path, small_files, fail_at):
    source = Noise()
    cache = make(tmp_path, source)
    broken = replace(cache, images=replace(cache.images, source=Noise(fail_at=fail_at)))
    with pytest.raises(KeyboardInterrupt):
        features.write(broken, encode, batch_size=1)
    assert not cache.files.ready()
    with pytest.raises(UserError, match="are not complete"):
        cache.open()
    kept = {path: path.stat().st_mtime_ns for path, _ in cache.files.paths() if path.is_file()}
    assert len(kept) == max(0, fail_at - 1) // 3
    source.opened.clear()
    ticks = []
    features.write(cache, encode, batch_size=4, tick=ticks.append)
    assert sum(ticks) == 10
    assert min(source.opened) == 3 * len(kept)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    whole = written(tmp_path / "whole")
    for (path, _), (other, _) in zip(cache.files.paths(), whole.files.paths(), strict=True):
        assert path.read_bytes() == other.read_bytes()
    assert not list(cache.files.folder.glob("*.part"))


@pytest.mark.parametrize("damage", ["missing", "short", "note", "other key", "no note"])
def test_a_damaged_cache_is_not_used(tmp_path, small_files, damage):
    cache = written(tmp_path)
    expected = [cache.open()[i]["features"]["pooled"].tolist() for i in range(10)]
    path, note = cache.files.paths()[1][0], cache.files.folder / "cache.json"
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "note":
        note.write_text("{")
    elif damage == "other key":
        note.write_text(note.read_text().replace('"a"', '"b"'))
    else:
        note.unlink()
    assert not cache.files.ready()
    features.write(cache, encode, batch_size=4)
    assert [cache.open()[i]["features"]["pooled"].tolist() for i in range(10)] == expected


def test_changed_bytes_are_noticed(tmp_path):
    cache = written(tmp_path)
    path = cache.files.paths()[0][0]
    content = bytearray(path.read_bytes())
    record = cache.open()[4]["features"]["tokens"].tobytes()
    at = bytes(content).index(record)
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"image features in .* are damaged .*remove this folder"):
        cache.open()[4]


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


def test_one_writer_at_a_time(tmp_path):
    cache = make(tmp_path)
    cache.files.folder.mkdir()
    with (cache.files.folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is writing the image features"):
            features.write(cache, encode, batch_size=4)
    features.write(cache, encode, batch_size=4)
    assert cache.files.ready()


def test_a_full_disk_is_told_before(tmp_path, monkeypatch):
    monkeypatch.setattr(
        feature_files.shutil, "disk_usage", lambda folder: type("U", (), {"free": 1100})
    )
    cache = make(tmp_path)
    with pytest.raises(UserError, match=r"image features need 0\.00114 MiB more in .*where 0\.00"):
        feature_files.check_space([cache.files], tmp_path / "new")
    assert (tmp_path / "new").is_dir()
    feature_files.check_space([written(tmp_path).files], tmp_path)  # nothing more is needed


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


def test_note_is_readable(tmp_path):
    note = json.loads((written(tmp_path).files.folder / "cache.json").read_text())
    assert note["key"]["encoder"] == {"weights": "a"} and note["key"]["dtype"] == "float32"
