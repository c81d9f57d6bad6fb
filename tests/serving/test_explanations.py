"""Explanations: the tagger's maps and labels, their pictures, the command, mistakes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from mlclip_jax import methods, tag
from mlclip_jax.clip import weights
from mlclip_jax.data.scenes import Scenes
from mlclip_jax.errors import UserError
from mlclip_jax.evaluation.maps import map_fn
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.serving import explanations
from mlclip_jax.serving.explanations import Explanation, Folder, overlay
from mlclip_jax.serving.export import Origin, fold
from mlclip_jax.serving.tagger import Tagger

sys.path.insert(0, str(Path(__file__).parent))
from small_clip import write_clip

LABELS = ("cat", "dog", "red car", "sky")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def tagger(folder):
    return Tagger.from_clip(folder, LABELS, batch_size=2)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (32, 32, 3), np.uint8) for _ in range(3)]


def maps_of(tagger, kind, image, chosen):
    run = map_fn(tagger._graphdef, kind)
    chosen = np.array([chosen], np.int32)
    return np.asarray(run(tagger._state, image[None], tagger._features, tagger._labels, chosen))[0]


@pytest.mark.parametrize("kind", ["contrast", "patches", "grad_cam"])
def test_the_highest_labels_and_named_ones(tagger, images, kind):
    expected = tagger.tag(images, top_k=2)
    found = tagger.explain(images, kind=kind, top_k=2)  # three images in batches of two
    assert len(found) == 3
    for of, tags, image in zip(found, expected, images, strict=True):
        assert [x["label"] for x in of.tags] == [x["label"] for x in tags]
        assert [x["score"] for x in of.tags] == pytest.approx([x["score"] for x in tags], abs=2e-5)
        np.testing.assert_array_equal(of.pixels, image)
        own = maps_of(tagger, kind, image, [LABELS.index(x["label"]) for x in tags])
        np.testing.assert_allclose(of.maps, own, atol=2e-4 * abs(own).max())
        assert of.maps.shape == (2, 4, 4)
    for of in tagger.explain(images, ["sky", "cat"], kind=kind):
        assert [x["label"] for x in of.tags] == ["sky", "cat"]
        own = maps_of(tagger, kind, of.pixels, [3, 0])
        np.testing.assert_allclose(of.maps, own, atol=2e-4 * abs(own).max())


@pytest.mark.parametrize("kind", ["contrast", "grad_cam"])
def test_a_classifier_explains_as_the_method_it_was_made_of(folder, tagger, images, kind):
    checkpoint = weights.resolve(folder)
    space, encoder = LabelSpace(LABELS), checkpoint.tokenizer()
    spec = {"name": "zero_shot"}
    method = methods.build(spec, checkpoint.load(), space=space, encoder=encoder, rngs=nnx.Rngs(0))
    origin = Origin("zero_shot", "small", "0", 0, "raw")
    folded = Tagger(fold(method, space, encoder, origin), space, None, tagger.preprocess)
    pairs = zip(folded.explain(images, kind=kind), tagger.explain(images, kind=kind), strict=True)
    for of, expected in pairs:
        assert [x["label"] for x in of.tags] == [x["label"] for x in expected.tags]
        bar = 1e-3 * abs(expected.maps).max()
        np.testing.assert_allclose(of.maps, expected.maps, atol=bar)


def test_a_threshold_leaves_out_labels_with_their_maps(tagger, images):
    limit = tagger.tag(images[:1])[0][1]["score"] - 1e-4
    (some,) = tagger.explain(images[:1], top_k=3, threshold=limit)
    assert len(some.tags) == len(some.maps) == 2
    (none,) = tagger.explain(images[:1], threshold=1.0)
    assert none.tags == [] and none.maps.shape == (0, 4, 4)
    assert none.picture().size == (224 + 24, 224 + 36 + 24)
    assert tagger.explain([]) == []


def test_mistakes_are_named(folder, tagger, images, tmp_path):
    with pytest.raises(UserError, match="did you mean cat"):
        tagger.explain(images, ["catt"])
    with pytest.raises(UserError, match="unknown kind of maps 'heat'"):
        tagger.explain(images, kind="heat")
    with pytest.raises(UserError, match="top_k"):
        tagger.explain(images, top_k=0)
    one = Tagger.from_clip(folder, ("cat",))
    with pytest.raises(UserError, match="there is one: take patches or grad_cam"):
        one.explain(images)
    assert one.explain(images[:1], kind="patches")[0].maps.any()
    (tmp_path / "old.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        Folder(tmp_path)


def test_an_overlay_is_brightest_where_the_map_is_highest():
    values = np.linspace(-3, 5, 48)[None].repeat(48, 0)
    grey = np.asarray(overlay(Image.new("RGB", (48, 48), "white"), values).convert("L"), int)
    assert (np.diff(grey[10]) >= 0).all() and grey[10, -1] - grey[10, 0] > 120
    flat = np.asarray(overlay(Image.new("RGB", (48, 48)), np.zeros((48, 48))))
    assert np.ptp(flat, axis=(0, 1)).max() == 0
    # The image's edges are seen, its brightness is not taken for the map's.
    half = np.zeros((48, 48, 3), np.uint8)
    half[:, 24:] = 255
    seen = np.asarray(overlay(Image.fromarray(half), np.zeros((48, 48))).convert("L"), int)[10]
    assert seen[24] - seen[23] > 60 and abs(seen[-1] - seen[0]) < 4


def test_a_picture_has_a_panel_for_each_label():
    pixels = np.full((64, 64, 3), (200, 30, 30), np.uint8)
    maps = np.zeros((7, 8, 8), np.float32)
    maps[2, 0, 7] = 1
    tags = [{"label": "a name that is far too long for a panel" * 3, "score": 0.5}] * 7
    page = np.asarray(Explanation(pixels, tags, maps).picture())
    assert page.shape == (2 * (224 + 36 + 12) + 12, 6 * 236 + 12, 3)
    assert (page[100, 100] == (200, 30, 30)).all()  # the image itself comes first
    bright = page[12 : 12 + 224, 12 + 3 * 236 : 12 + 3 * 236 + 224].sum(-1)
    assert bright[:28, -28:].min() > bright[60:, :150].max()
    gaps = page[:, [x + k * 236 for k in range(7) for x in range(12)]]
    assert (gaps == 255).all()  # long names are cut


def test_the_command_writes_a_picture_of_each_image(folder, tmp_path, capsys):
    scenes = Scenes("test", 3)
    for where, i in (("a/one.png", 0), ("b/one.png", 1), ("b/two.jpg", 2)):
        path = tmp_path / "photos" / where
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scenes.image(i)).save(path)
    (tmp_path / "photos/broken.png").write_text("no picture")
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    out = tmp_path / "pictures"
    options = [f"--clip={folder}", f"--labels={tmp_path / 'labels.txt'}", f"--explain={out}"]
    arguments = [str(tmp_path / "photos"), *options, "--top_k=2"]
    assert tag.main([*arguments, "--map=grad_cam"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    pictures = {Path(x["file"]).name: x.get("picture") for x in lines}
    assert pictures["broken.png"] is None
    names = [Path(x["picture"]).name for x in lines if "picture" in x]
    assert names == ["one.png", "one-2.png", "two.png"]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    for path in out.iterdir():
        with Image.open(path) as picture:
            picture.load()
            assert picture.format == "PNG" and picture.size == (3 * 236 + 12, 224 + 36 + 24)
    assert tag.main(arguments) == 2  # what is there is not written over
    assert "is not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tag.main([str(tmp_path / "photos"), *options[:2], "--map=patches"])
    assert "--map belongs to --explain" in capsys.readouterr().err


def test_brightness_of_the_colours_rises_evenly():
    colours = explanations._COLOURS @ (0.2126, 0.7152, 0.0722)
    steps = np.diff(colours)
    assert steps.min() > 0.3 * steps.max()
