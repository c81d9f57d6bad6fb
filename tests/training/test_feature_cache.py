"""Training from cached image features: the same as without, and only where that is so."""

from __future__ import annotations

import json
import re
from typing import ClassVar

import jax
import numpy as np
import pytest
import toys
from toys import toy_world  # noqa: F401  (a fixture)

from mlclip_jax.clip import ImageFeatures
from mlclip_jax.data import feature_files, features, registry
from mlclip_jax.data.registry import DataSplits
from mlclip_jax.data.transforms import ImageError
from mlclip_jax.errors import UserError
from mlclip_jax.training import feature_cache
from mlclip_jax.training import stage as stage_module
from mlclip_jax.training.build import load_trained
from mlclip_jax.training.loop import fit
from mlclip_jax.training.mesh import make_mesh


class Blocks(toys.Blocks):
    """Toys that can be cached."""

    sign = 1  # of the targets
    read: ClassVar = []  # images, by number

    def __getitem__(self, i):
        self.read.append(i)
        return self.example(i)

    def example(self, i):
        example = super().__getitem__(i)
        return {**example, "targets": self.sign * example["targets"]}

    def annotations(self, i):
        return {name: value for name, value in self.example(i).items() if name != "image"}

    def identity(self):
        return {"name": "blocks", "seed": self.seed}

    def class_counts(self):
        return sum(self.annotations(i)["targets"] > 0 for i in range(len(self)))


class Relabelled(Blocks):
    """The training images with other labels."""

    sign = -1


class Pointing(toys.Tower):
    """Labels are looked for in each place of an image too."""

    reads_tokens = True

    def encode_images(self, images, *, progress=None):
        tower = self.clip.image
        places = tower.bn(tower.conv(self.clip.normalize(images)), train=False)
        tokens = places.reshape(len(images), -1, places.shape[-1]) @ tower.projection[...]
        return ImageFeatures(tokens.mean(1), tokens)

    def logits(self, image_features, label_features, labels, *, progress=None):
        places = (image_features.tokens @ label_features.T).max(1)
        return super().logits(image_features, label_features, labels) + places


@pytest.fixture
def world(toy_world, monkeypatch):  # noqa: F811
    """The toys' world with images that can be cached; counts those that are opened."""
    opened = set()

    def load(config, image_size, splits):
        evals = {split: Blocks(config.num_eval, seed=1 + k) for k, split in enumerate(splits)}
        if "train" in evals:
            evals["train"] = Relabelled(config.num_train)
        return DataSplits(Blocks(config.num_train), evals, toys.SPACE, config)

    original = features.Views.image

    def image(self, record):
        opened.add((self.source.seed, self.start + record))
        return original(self, record)

    monkeypatch.setattr(features.Views, "image", image)
    monkeypatch.setitem(toys.METHODS, "pointing", Pointing)
    entry = (toys.BlocksConfig, load, lambda: toys.SPACE)
    monkeypatch.setitem(registry._DATASETS, "blocks", entry)
    return opened


def config(folder, **fields):
    """A run whose image tower is frozen."""
    base = {"method": {"name": "tower", "part": "none"}, "cache": {"folder": str(folder)}}
    return toys.config(**{**base, **fields})


def run(workdir, settings, devices=1, quiet=True):
    return fit(settings, workdir, mesh=make_mesh(jax.devices()[:devices]), quiet=quiet)


def rows(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "images_per_second"} for line in lines
    ]


def assert_close(left, right, tolerance):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            if isinstance(value, float | list):
                found, expected = (np.array(x, float) for x in (value, b[name]))  # None is NaN
                np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
            else:
                assert value == b[name]


@pytest.mark.parametrize(("devices", "method"), [(1, "tower"), (8, "tower"), (8, "pointing")])
def test_training_from_float32_features_equals_training_from_images(
    tmp_path, world, devices, method, monkeypatch
):
    settings = {"method": {"name": method, "part": "none"}, "ema_decay": 0.5}
    shares, original = set(), feature_cache.shard_batch

    def shard_batch(batch, mesh):
        found = original(batch, mesh)
        shares.update(len(images) / len(images.addressable_data(0)) for images in found)
        return found

    monkeypatch.setattr(feature_cache, "shard_batch", shard_batch)
    plain = run(tmp_path / "plain", config("", cache=None, **settings), devices)
    cached = run(tmp_path / "cached", config(tmp_path / "cache", **settings), devices)
    assert cached.step == plain.step == 10
    assert_close(rows(tmp_path / "cached"), rows(tmp_path / "plain"), 1e-5)
    left, right = (load_trained(tmp_path / name).method.bias[...] for name in ("cached", "plain"))
    np.testing.assert_allclose(left, right, atol=1e-5)
    assert abs(float(left)) > 0.01
    assert shares == {devices}  # each device computed its part


def test_a_real_method_on_scenes(tmp_path):
    base = {
        "method": {"name": "coop", "n_ctx": 2},
        "data": {"name": "scenes", "num_train": 16, "num_validation": 8},
        "batch_size": 8,
        "duration": "3 steps",
        "log_every": "1 steps",
        "eval": {"splits": ("validation",), "batch_size": 8},
        "compilation_cache": False,
    }
    run(tmp_path / "plain", base)
    run(tmp_path / "cached", {**base, "cache": {"folder": str(tmp_path / "cache")}})
    assert_close(rows(tmp_path / "cached"), rows(tmp_path / "plain"), 1e-5)


def test_training_images_can_be_evaluated_too(tmp_path, world, capsys):
    splits = {"batch_size": 6, "splits": ("train", "validation")}
    settings, folder = {"duration": "3 steps", "eval": splits}, tmp_path / "cache"
    run(tmp_path / "plain", config("", cache=None, **settings))
    run(tmp_path / "cached", config(folder, **settings), quiet=False)
    assert_close(rows(tmp_path / "cached"), rows(tmp_path / "plain"), 1e-5)
    # They share files: computed once, though their labels differ.
    assert len(world) == 52 and len(list(folder.iterdir())) == 2
    assert "to compute first: train, validation, 52 images" in capsys.readouterr().out


def test_damaged_files_are_not_trained_on(tmp_path, world):
    settings = config(tmp_path / "cache", duration="2 steps")
    run(tmp_path / "a", settings)
    paths = sorted((tmp_path / "cache").rglob("*.array_record"))
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, contents, strict=True):  # cut short: computed again
        path.write_bytes(content[: len(content) // 2])
    run(tmp_path / "b", settings)
    assert rows(tmp_path / "b") == rows(tmp_path / "a")
    assert [path.read_bytes() for path in paths] == contents
    for path, content in zip(paths, contents, strict=True):  # as long, and full of wrong bits
        path.write_bytes(bytes(255 - byte if byte else 0 for byte in content))
    with pytest.raises(UserError, match=r"image features in .* are damaged .*remove this folder"):
        run(tmp_path / "c", settings)


def test_images_are_opened_once(tmp_path, world, capsys):
    settings = config(tmp_path / "cache", duration="4 epochs")
    run(tmp_path / "a", settings, quiet=False)
    assert len(world) == 40 + 12
    said = capsys.readouterr().out
    assert re.search(
        r"training and evaluation read cached image features, not images: float32, 1 view of each "
        r"training image, 0\.0\d+ MiB in .*cache",
        said,
    )
    assert "to compute first: train, validation, 52 images, 0.0" in said
    run(tmp_path / "b", config(tmp_path / "cache", seed=1), quiet=False)
    assert len(world) == 52  # another seed draws nothing anew: nothing is random
    assert "to compute first" not in capsys.readouterr().out


def test_no_image_is_read_any_more(tmp_path, world):
    settings = config(tmp_path / "cache")
    run(tmp_path / "a", settings)
    Blocks.read.clear()
    run(tmp_path / "b", settings)
    assert len(Blocks.read) == 2 * 8  # a few of each split, for the key
    assert rows(tmp_path / "b") == rows(tmp_path / "a")


def test_other_weights_and_dtypes_have_features_of_their_own(tmp_path, world):
    folder = tmp_path / "cache"
    run(tmp_path / "a", config(folder, duration="1 steps"))
    run(tmp_path / "b", config(folder, duration="1 steps", method={"name": "zero_shot"}, **OFF))
    low = {"folder": str(folder), "dtype": "int8"}
    run(tmp_path / "c", config(folder, duration="1 steps", cache=low))
    assert len(list(folder.iterdir())) == 6


OFF = {"stages": ({"name": "off", "method": {"name": "zero_shot"}, "duration": "0 steps"},)}


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.02), ("int8", 0.02)])
def test_smaller_types_train_about_the_same(tmp_path, world, dtype, tolerance):
    method = {"name": "pointing", "part": "none"}
    run(tmp_path / "plain", config("", cache=None, method=method))
    low = {"folder": str(tmp_path / "cache"), "dtype": dtype}
    run(tmp_path / "low", config("", cache=low, method=method))
    plain, found = (
        [r["loss"] for r in rows(tmp_path / w) if "loss" in r] for w in ("plain", "low")
    )
    np.testing.assert_allclose(found, plain, rtol=tolerance)
    assert found != plain


def test_views_are_flipped_ahead(tmp_path, world):
    data = {"name": "blocks", "mirrored": True}
    cache = {"folder": str(tmp_path / "cache"), "views": 3}
    run(tmp_path / "a", config("", data=data, cache=cache))
    assert len(world) == 3 * 40 + 12
    with pytest.raises(UserError, match=r"cache\.views' is 3, but nothing changes"):
        run(tmp_path / "b", config("", cache=cache))


def test_resumed_equals_uninterrupted(tmp_path, world):
    settings = config(tmp_path / "cache", ema_decay=0.9)
    expected = run(tmp_path / "whole", settings)
    original, served = stage_module.train_batches, [0]

    def interrupted(*args, **kwargs):
        for batch in original(*args, **kwargs):
            if served[0] > 7:
                raise KeyboardInterrupt
            served[0] += 1
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_module, "train_batches", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "broken", settings)
    result = run(tmp_path / "broken", settings)
    assert result.step == 10 and result.metrics == expected.metrics
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
    # A finished run opens no cache; other values are other data.
    for path in (tmp_path / "cache").rglob("cache.json"):
        path.unlink()
    run(tmp_path / "broken", settings)
    with pytest.raises(UserError, match=r"cache\.dtype was 'float32' and is 'int8'"):
        low = {"folder": str(tmp_path / "cache"), "dtype": "int8"}
        run(tmp_path / "broken", {**settings, "cache": low})


def test_a_killed_computation_goes_on(tmp_path, world, monkeypatch):
    monkeypatch.setattr(feature_files, "_FILE_BYTES", 64 * 5)  # five images
    settings = config(tmp_path / "cache")
    original = feature_cache.shard_batch
    calls = []

    def killed(batch, mesh):
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return original(batch, mesh)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_cache, "shard_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", settings)
    assert list((tmp_path / "cache").rglob("*.array_record"))
    assert not list((tmp_path / "cache").rglob("cache.json"))
    assert run(tmp_path / "run", settings).step == 10
    run(tmp_path / "plain", config("", cache=None))
    assert_close(rows(tmp_path / "run"), rows(tmp_path / "plain"), 1e-5)


def test_the_disk_is_looked_at_before(tmp_path, world, monkeypatch):
    full = type("Usage", (), {"free": 100})
    monkeypatch.setattr(feature_files.shutil, "disk_usage", lambda folder: full)
    with pytest.raises(UserError, match=r"image features need 0\.003\d+ MiB more in .*cache"):
        run(tmp_path / "run", config(tmp_path / "cache"))
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("seed", [0, 1], ids=["train", "validation"])
def test_an_unreadable_image_is_passed_over_in_training_only(tmp_path, world, monkeypatch, seed):
    original = Blocks.__getitem__

    def damaged(self, i):
        if self.seed == seed and i == 3:
            raise ImageError("block 3 is damaged")
        return original(self, i)

    monkeypatch.setattr(Blocks, "__getitem__", damaged)
    if seed == 0:
        assert run(tmp_path / "run", config(tmp_path / "cache")).step == 10
    else:
        with pytest.raises(UserError, match=r"block 3 is damaged\. It is number 1 .* and 0 may be"):
            run(tmp_path / "run", config(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ({"name": "tower"}, r"clip/image/bn/bias, clip/image/bn/scale and 2 more train upstream"),
        ({"name": "tower", "part": "clip/image/proj"}, r"clip/image/projection trains upstream"),
        (
            {"name": "tower", "part": "none", "train_bn": True},
            r"training moves the BatchNorm statistics clip/image/bn/mean, clip/image/bn/var",
        ),
    ],
    ids=["tower", "projection", "statistics"],
)
def test_features_that_training_changes_are_not_cached(tmp_path, world, method, why):
    with pytest.raises(UserError, match=rf"stage 'train' image features.*{why}.*set cache=None"):
        run(tmp_path / "run", config(tmp_path / "cache", method=method))
    assert not (tmp_path / "cache").exists()


def test_features_that_change_with_the_step_are_not_cached(tmp_path, world, monkeypatch):
    original = toys.Tower.encode_images

    def fading(self, images, *, progress=None):
        found = original(self, images)
        return found if progress is None else ImageFeatures(found.pooled / (1 + progress.step))

    monkeypatch.setattr(toys.Tower, "encode_images", fading)
    with pytest.raises(UserError, match="because they change with the step or epoch: set"):
        run(tmp_path / "run", config(tmp_path / "cache"))


def test_a_stage_has_its_own_choice(tmp_path, world):
    stages = (
        {"name": "tower", "method": {"part": "clip/image/"}, "duration": "3 steps"},
        {"name": "bias", "cache": {"folder": str(tmp_path / "cache")}, "duration": "4 steps"},
    )
    run(tmp_path / "cached", config("", cache=None, stages=stages))
    plain = (stages[0], {**stages[1], "cache": None})
    run(tmp_path / "plain", config("", cache=None, stages=plain))
    assert len(world) == 52  # of the tower that the first stage trained
    assert_close(rows(tmp_path / "cached"), rows(tmp_path / "plain"), 1e-5)
