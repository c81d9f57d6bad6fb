"""The tagger against the tower's own cosines, its options, and images it cannot read."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from mlclip_jax import methods
from mlclip_jax.clip import weights
from mlclip_jax.data.scenes import Scenes
from mlclip_jax.data.transforms import Preprocess
from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.serving.tagger import Tagger

sys.path.insert(0, str(Path(__file__).parent))
from small_clip import write_clip

LABELS = ("cat", "dog", "red car", "sky")
TEMPLATE = "a photo of a {}."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def tagger(folder):
    return Tagger.from_clip(folder, LABELS, batch_size=4)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (32, 32, 3), np.uint8) for _ in range(7)]


def cosines(folder, images):
    checkpoint = weights.resolve(folder)
    clip, tokenizer = checkpoint.load(), checkpoint.tokenizer()
    text = np.asarray(clip.encode_text(tokenizer([TEMPLATE.format(name) for name in LABELS])))
    image = np.asarray(clip.encode_images(np.stack(images)).pooled)
    text = text / np.linalg.norm(text, axis=1, keepdims=True)
    image = image / np.linalg.norm(image, axis=1, keepdims=True)
    return image @ text.T, float(np.exp(clip.logit_scale[...]))


def assert_same(tagged, expected):
    """Equal tags, up to what another size of batch changes."""
    assert len(tagged) == len(expected)
    for tags, others in zip(tagged, expected, strict=True):
        assert [tag["label"] for tag in tags] == [tag["label"] for tag in others]
        for tag, other in zip(tags, others, strict=True):
            assert tag["score"] == pytest.approx(other["score"], abs=2e-5)


def test_zero_shot_scores(folder, tagger, images):
    expected, scale = cosines(folder, images)
    shares = np.exp(scale * expected)
    shares /= shares.sum(axis=1, keepdims=True)
    tagged = tagger.tag(images)  # 7 images in batches of 4: the second is padded
    assert tagger.score_kind == "softmax" and len(tagged) == 7
    for row, tags in enumerate(tagged):
        assert [tag["score"] for tag in tags] == sorted((t["score"] for t in tags), reverse=True)
        for tag in tags:
            label = LABELS.index(tag["label"])
            assert tag["cosine"] == pytest.approx(expected[row, label], abs=2e-5)
            assert tag["score"] == pytest.approx(shares[row, label], abs=2e-5)


def test_trained_scores_are_sigmoids_of_logits(folder, images):
    checkpoint = weights.resolve(folder)
    clip, encoder, space = checkpoint.load(), checkpoint.tokenizer(), LabelSpace(LABELS)
    spec = {"name": "coop", "n_ctx": 2}
    method = methods.build(spec, clip, space=space, encoder=encoder, rngs=nnx.Rngs(0))
    tagger = Tagger(method, space, encoder, Preprocess(32), batch_size=2)
    labels = method.label_inputs(space, encoder)
    logits = method.logits(
        method.encode_images(np.stack(images[:3])), method.encode_labels(labels), labels
    )
    expected = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    assert tagger.score_kind == "sigmoid"
    np.testing.assert_allclose(tagger.logits(images[:3]), logits, atol=2e-5, rtol=2e-5)
    for row, tags in enumerate(tagger.tag(images[:3])):
        found = {tag["label"]: tag["score"] for tag in tags}
        assert [found[name] for name in LABELS] == pytest.approx(list(expected[row]), abs=2e-5)


def test_top_k_and_threshold(tagger, images):
    everything = tagger.tag(images)
    assert tagger.tag(images, top_k=2) == [tags[:2] for tags in everything]
    limit = everything[0][1]["score"]
    kept = tagger.tag(images, threshold=limit)
    assert kept == [[tag for tag in tags if tag["score"] >= limit] for tags in everything]
    assert tagger.tag(images, threshold=limit, top_k=1) == [tags[:1] for tags in kept]
    with pytest.raises(UserError, match="top_k must be at least 1"):
        tagger.tag(images, top_k=0)
    with pytest.raises(UserError, match="between 0 and 1"):
        tagger.tag(images, threshold=20.0)


def test_scores_that_are_logits(folder, images):
    """MKT's: between -1 and 1 among two labels or more, or inner products of any size."""
    checkpoint = weights.resolve(folder)
    clip, encoder, space = checkpoint.load(), checkpoint.tokenizer(), LabelSpace(LABELS)
    for score, kind in (("normalized", "relative"), ("sum", "raw")):
        spec = {"name": "mkt", "top_k": 2, "train_blocks": 1, "score": score}
        method = methods.build(spec, clip, space=space, encoder=encoder, rngs=nnx.Rngs(0))
        tagger = Tagger(method, space, encoder, Preprocess(32), batch_size=2)
        assert tagger.score_kind == kind
        logits = tagger.logits(images[:2])
        everything = tagger.tag(images[:2])
        for row, tags in zip(logits, everything, strict=True):
            assert [t["score"] for t in tags] == pytest.approx(sorted(row.tolist())[::-1], abs=1e-5)
        limit = everything[0][1]["score"]
        kept = tagger.tag(images[:2], threshold=limit)
        assert kept == [[tag for tag in tags if tag["score"] >= limit] for tags in everything]
        if kind == "relative":
            with pytest.raises(UserError, match="between -1 and 1; got"):
                tagger.tag(images, threshold=1.5)
            with pytest.raises(UserError, match="there is one: give two or more"):
                Tagger(method, LabelSpace(LABELS[:1]), encoder, Preprocess(32))
        else:
            assert tagger.tag(images[:1], threshold=1e6) == [[]]
            one = Tagger(method, LabelSpace(LABELS[:1]), encoder, Preprocess(32))
            np.testing.assert_allclose(one.logits(images[:2])[:, 0], logits[:, 0], rtol=1e-4)
        with pytest.raises(UserError, match="got nan"):
            tagger.tag(images, threshold=float("nan"))


def test_files_pixels_and_pillow_images_agree(tagger, images, tmp_path):
    path = tmp_path / "one.png"
    Image.fromarray(images[0]).save(path)
    forms = [images[0], path, str(path), path.read_bytes(), Image.fromarray(images[0])]
    first, *others = tagger.tag(forms)
    assert_same(others, [first] * 4)


def test_unreadable_images_keep_their_place(tagger, images, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_text("no picture")
    sources = [broken, images[0], broken, *images[1:], tmp_path / "none.png"]
    results = list(tagger.stream(sources, workers=2))
    assert [source is expected for (source, _), expected in zip(results, sources, strict=True)]
    assert [isinstance(tags, UserError) for _, tags in results] == [True, False, True] + [
        False
    ] * 6 + [True]
    assert_same([tags for _, tags in results if isinstance(tags, list)], tagger.tag(images))
    with pytest.raises(UserError, match=r"broken\.jpg"):
        tagger.tag([images[0], broken])


def test_a_batch_of_unreadable_images(tagger, images, tmp_path):
    missing = [tmp_path / f"{i}.png" for i in range(5)]
    results = list(tagger.stream([*missing, images[0]]))
    assert sum(isinstance(tags, UserError) for _, tags in results) == 5
    assert_same([results[-1][1]], tagger.tag(images[:1]))
    assert tagger.tag([]) == [] and tagger.logits([]).shape == (0, len(LABELS))


def test_an_endless_source_is_read_only_as_far_as_needed(tagger, images):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield images[0]

    stream = tagger.stream(endless(), workers=2)
    next(stream)
    stream.close()
    assert taken < 40


def test_mistakes_are_named(folder, tmp_path):
    with pytest.raises(UserError, match="batch size"):
        Tagger.from_clip(folder, LABELS, batch_size=0)
    with pytest.raises(UserError, match="template"):
        Tagger.from_clip(folder, LABELS, templates="a photo")
    with pytest.raises(UserError, match="nowhere"):
        Tagger.from_clip(tmp_path / "nowhere", LABELS)


def test_the_packaged_clip_finds_colours():
    scenes = Scenes("test", 40)
    colours = scenes.space.select("colours")
    tagger = Tagger.from_clip("clip-mini", colours)
    best = [tags[0]["label"] for tags in tagger.tag([scenes.image(i) for i in range(40)], top_k=1)]
    chosen = [scenes.space.index(name) for name in best]
    present = scenes.label_matrix()[np.arange(40), chosen] > 0
    assert present.mean() > 0.8  # a random colour: about 0.33
