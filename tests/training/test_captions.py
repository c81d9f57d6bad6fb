"""Captions in training: tokens, features computed once, and captions in place of images."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlclip_jax.data import registry
from mlclip_jax.data.captions import CaptionsAsImages
from mlclip_jax.data.pipeline import train_batches
from mlclip_jax.errors import UserError
from mlclip_jax.methods.base import image_features
from mlclip_jax.training import captions
from mlclip_jax.training.build import batch_shape, build_method, load_backbone
from mlclip_jax.training.captions import encode_captions, reads_no_images, with_captions
from mlclip_jax.training.config import parse_config
from mlclip_jax.training.loop import fit
from mlclip_jax.training.mesh import make_mesh

DATA = {"name": "scenes", "num_train": 16, "num_validation": 8, "num_test": 8}


def config_of(method, **fields):
    base = {"method": method, "data": DATA, "batch_size": 8, "compilation_cache": False}
    return {**base, **fields}


@pytest.fixture(scope="module")
def world():
    backbone = load_backbone(parse_config(config_of({"name": "zero_shot"})).backbone)
    return backbone, registry.load(DATA, image_size=64, splits=())


def build(world, **method):
    (stage,) = parse_config(config_of(method)).stages
    return build_method(stage, world[0], world[1].space, seed=0)


class Some:
    """A source of which some images have no caption."""

    def __init__(self, source, captions):
        self.source, self.captions = source, captions

    def __len__(self):
        return len(self.source)

    def __getattr__(self, name):
        return getattr(self.source, name)

    def __getitem__(self, i):
        return self.source[i]


def test_features_are_those_of_the_text_tower(world):
    backbone, data = world
    texts = list(data.train.captions)
    texts[3] = ()
    texts[5] = ("a photo of a red three.", "two")
    told = []
    method = build(world, name="lmpt")
    data = replace(data, train=Some(data.train, texts))
    found = with_captions(data, method, backbone.tokenizer, say=told.append).train
    texts = backbone.tokenizer([" ".join(several) for several in texts])
    expected = np.array(jax.jit(backbone.clip.encode_text)(texts))
    assert not found[3]["caption_features"].any()
    expected[3] = 0
    got = np.stack([found[i]["caption_features"] for i in range(16)])
    np.testing.assert_allclose(got, expected, atol=2e-6 * np.abs(expected).max())
    assert "captions of 16 training images" in told[0] and "1 images have none" in told[0]
    batch = next(train_batches(found, 8, seed=0))
    np.testing.assert_array_equal(batch["caption_features"], got[batch["index"]])
    shape = batch_shape(method, 8, 22, make_mesh(jax.devices()[:1]))
    assert shape.caption_features.shape == batch["caption_features"].shape
    assert shape.caption_features.dtype == batch["caption_features"].dtype
    assert shape.caption_tokens is None


def test_tokens_are_cut_as_the_release_cuts_them(world):
    backbone, data = world
    method = build(world, name="lmpt", variant="released")
    captions = [2 * several for several in data.train.captions]  # as two sentences of an image
    data = replace(data, train=Some(data.train, captions))
    found = with_captions(data, method, backbone.tokenizer).train
    texts = [" ".join(several) for several in captions]
    cut, whole = (backbone.tokenizer(t) for t in ([text[:75] for text in texts], texts))
    got = found[2]["caption_tokens"]
    assert not cut[:, len(got) :].any() and (cut[2] != whole[2]).any()
    np.testing.assert_array_equal(got, cut[2, : len(got)])


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_data_without_captions_are_an_error_unless_none_are_read(world, variant):
    backbone, data = world
    for nothing in (None, ((),) * 16):
        without = replace(data, train=Some(data.train, nothing))
        with pytest.raises(UserError, match=r"learns from captions.*captions_list"):
            with_captions(without, build(world, name="lmpt", variant=variant), backbone.tokenizer)
        alone = build(world, name="lmpt", classification_weight=1.0)
        assert with_captions(without, alone, backbone.tokenizer) is without


def test_captions_stand_for_images(world):
    backbone, data = world
    method = build(world, name="tai_dpt", templates=())
    assert reads_no_images(method) and not reads_no_images(build(world, name="lmpt"))
    found = with_captions(data, method, backbone.tokenizer).train
    assert isinstance(found, CaptionsAsImages) and len(found) == 16
    np.testing.assert_array_equal(found.targets, data.train.label_matrix(full=True))
    batch = next(train_batches(found, 8, seed=0))
    texts = [data.train.captions[i][0] for i in batch["index"]]
    ids = backbone.tokenizer(texts)
    pooled, tokens, mask, _ = jax.jit(backbone.clip.encode_captions)(ids)
    length = batch["images"]["tokens"].shape[1]
    assert mask[:, length:].sum() == 0
    np.testing.assert_array_equal(batch["images"]["mask"], mask[:, :length])
    for got, whole in ((batch["images"]["pooled"], pooled), (batch["images"]["tokens"], tokens)):
        whole = np.asarray(whole)[:, :length] if whole.ndim == 3 else np.asarray(whole)
        np.testing.assert_allclose(got, whole, atol=2e-6 * np.abs(whole).max())
    np.testing.assert_array_equal(found.class_counts(), (found.targets > 0).sum(0))
    rows, classes = found.positives()
    assert (found.targets[rows, classes] > 0).all() and len(rows) == (found.targets > 0).sum()


def test_captions_whose_features_are_too_many_are_encoded_in_the_step(world, monkeypatch):
    backbone, data = world
    method, told = build(world, name="tai_dpt", templates=()), []
    kept = next(train_batches(with_captions(data, method, backbone.tokenizer).train, 8, seed=0))
    monkeypatch.setattr(captions, "MAX_BYTES", 1000)
    found = with_captions(data, method, backbone.tokenizer, say=told.append).train
    batch = next(train_batches(found, 8, seed=0))
    assert set(batch["images"]) == {"ids"} and "encoded in every step instead" in told[-1]
    graphdef, state = nnx.split(method)

    @jax.jit
    def features(state, images):
        return image_features(nnx.merge(graphdef, state), images)

    both = (features(state, b["images"])[:3] for b in (batch, kept))
    for got, want in zip(*both, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())


def test_the_pooled_caption_is_its_text_feature(world):
    backbone, _ = world
    ids = backbone.tokenizer(["a red three", "a photo of a blue star and a two"])
    got = encode_captions(backbone.clip, ids, ("pooled", "mask"))
    expected = np.asarray(backbone.clip.encode_text(jnp.asarray(ids)))
    np.testing.assert_allclose(got["pooled"], expected, atol=2e-6 * np.abs(expected).max())
    np.testing.assert_array_equal(got["mask"].sum(1), ids.argmax(1) + 1)


@pytest.mark.slow
@pytest.mark.parametrize("method", [{"name": "lmpt"}, {"name": "tai_dpt"}], ids=["lmpt", "tai_dpt"])
def test_training_with_cached_features_and_captions(tmp_path, method):
    config = config_of(
        method,
        duration="2 steps",
        eval={"splits": ("test",)},
        cache={"folder": str(tmp_path / "cache")},
    )
    result = fit(config, tmp_path / "run", mesh=make_mesh(jax.devices()[:2]), quiet=True)
    assert result.step == 2 and 0 < result.metrics["test"]["raw"]["mAP"] <= 1
    cached = fit(config, tmp_path / "again", mesh=make_mesh(jax.devices()[:2]), quiet=True)
    plain = {**config, "cache": None}
    plain = fit(plain, tmp_path / "plain", mesh=make_mesh(jax.devices()[:2]), quiet=True)
    assert cached.metrics == result.metrics
    assert plain.metrics["test"]["raw"]["mAP"] == pytest.approx(
        result.metrics["test"]["raw"]["mAP"], abs=1e-5
    )
