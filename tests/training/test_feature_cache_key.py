"""What cached image features are keyed by and depend on, and their settings."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
import toys

from mlclip_jax.data.features import CacheConfig
from mlclip_jax.errors import UserError
from mlclip_jax.methods.base import image_features
from mlclip_jax.training.config import parse_config
from mlclip_jax.training.dry_run import abstract_step
from mlclip_jax.training.feature_cache import encoder_key, upstream
from mlclip_jax.training.step import find_moving, take_apart


def test_methods_with_the_same_image_features_share_them():
    def key(name, **fields):
        method, _ = toys.method(name, **fields)
        leaves = take_apart(method).frozen
        image = {path: leaf for path, leaf in leaves.items() if path.startswith("clip/image/")}
        return encoder_key(method, image), image, method

    first, image, method = key("coop", n_ctx=2)
    assert first == key("zero_shot")[0] == key("coop", n_ctx=2, logit_bias=True)[0]
    # What it encodes with, where that is its own, and how: with the same weights.
    tower, leaves, own = key("tower", part="none")
    own.config = replace(own.config, train_bn=True)
    assert encoder_key(own, leaves)["settings"] != tower["settings"]

    class Other(toys.Tower):
        def encode_images(self, images, *, progress=None):
            raise NotImplementedError

    own.__class__ = Other
    assert encoder_key(own, leaves)["function"] != tower["function"]
    clip = method.clip.config
    method.clip.config = replace(clip, image=replace(clip.image, heads=4))
    assert encoder_key(method, image)["tower"] != first["tower"]
    method.clip.config = clip.normalized_as("imagenet")
    assert encoder_key(method, image)["image_norm"] != first["image_norm"]
    moved = {**image, "clip/image/projection": image["clip/image/projection"] + 1e-6}
    assert encoder_key(method, moved)["weights"] != first["weights"]
    method.clip.dtype = np.dtype("float16")
    assert encoder_key(method, image)["dtype"] != first["dtype"]

    class WithTokens(type(method)):
        reads_tokens = True

    method.__class__ = WithTokens
    assert encoder_key(method, image)["tokens"] != first["tokens"]


def test_upstream_is_found_by_tracing():
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), np.uint8)
    for name in ("coop", "zero_shot"):
        method, labels = toys.method(name, **({"n_ctx": 2} if name == "coop" else {}))
        reaching, moved = upstream(take_apart(method), images)
        assert all(path.startswith("clip/image/") for path in reaching) and not moved
        assert "clip/image/projection" in reaching and len(reaching) > 15
    method, labels = toys.method("tower", part="none", train_bn=True)
    parts = find_moving(take_apart(method), toys.batch(2), labels)
    assert upstream(parts, images)[1] == {"clip/image/bn/mean", "clip/image/bn/var"}


def test_cached_features_are_restored_in_the_dtype_of_the_tower():
    method, _ = toys.method("zero_shot")
    values = np.array([[127, -64]], np.int8)
    stored = {"pooled": values, "pooled_scale": np.array([[0.5]], np.float32)}
    found = image_features(method, stored)
    assert found.tokens is None and found.pooled.dtype == method.clip.dtype
    np.testing.assert_allclose(found.pooled, [[63.5, -32.0]])


def test_dry_run_has_features_for_images():
    base = {
        "method": {"name": "coop"},
        "data": {"name": "scenes"},
        "backbone": {"name": "clip-mini", "dtype": "bfloat16"},
        "cache": {"folder": "features", "dtype": "int8"},
    }
    ((_, arguments, (_, metrics)),) = abstract_step(base)
    images = arguments[2].images
    assert {name: (x.shape, str(x.dtype)) for name, x in images.items()} == {
        "pooled": ((32, 64), "int8"),
        "pooled_scale": ((32, 1), "float32"),
    }
    assert metrics["loss"].shape == ()
    with pytest.raises(UserError, match="train upstream of them"):
        abstract_step({**base, "method": {"name": "coop", "train_image_encoder": True}})


def test_settings_are_checked():
    def parse(**cache):
        return parse_config(toys.config(cache=cache)).stages[0].cache

    assert parse(folder="x") == CacheConfig("x", 1, "float32")
    for wrong, message in (
        ({"folder": "x", "view": 2}, r"unknown config key 'cache\.view': did you mean 'views'"),
        ({"folder": "x", "dtype": "float16"}, r"'cache\.dtype' must be one of 'float32'"),
        ({"folder": "x", "views": 0}, r"'cache\.views' must be at least 1"),
        ({"folder": ""}, r"'cache\.folder' is empty"),
        ({}, r"'cache\.folder' is missing"),
    ):
        with pytest.raises(UserError, match=message):
            parse(**wrong)
