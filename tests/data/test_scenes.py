from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest

from mlclip_jax.data import registry
from mlclip_jax.data import scenes as module
from mlclip_jax.data.scenes import KINDS, SPLITS, Scenes
from mlclip_jax.errors import UserError
from mlclip_jax.labels.catalog import scenes as label_space

NAMES = label_space().names
PIXELS = (620306, 308553068)  # sums of one scene's bytes, plain and weighted
DIGESTS = {  # of labels, captions, boxes, names and identities of usual scenes, by image size
    64: "d8933f77a3aaeb0c6ee2c82aef4339baa52ebd7c9d84d851e0e17b245c202321",
    96: "62f2648d70b7d5f2725955ac9ab77e6b6dca4577f7cfb2f9c6cc8c135cafbdbf",
}


def test_a_scene_depends_on_seed_split_and_index_alone():
    a, b = Scenes("train", 50, seed=3), Scenes("train", 200, seed=3)
    for i in (0, 7, 49):
        np.testing.assert_array_equal(a[i]["image"], b[i]["image"])
        np.testing.assert_array_equal(a[i]["targets"], b[i]["targets"])
        assert a.caption(i) == b.caption(i) and a.boxes(i) == b.boxes(i)
    for other in (Scenes("train", 50, seed=4), Scenes("test", 50, seed=3)):
        assert not np.array_equal(a[0]["image"], other[0]["image"])
        assert not np.array_equal(a.label_matrix(), other.label_matrix())
    copy = pickle.loads(pickle.dumps(a))
    np.testing.assert_array_equal(copy[5]["image"], a[5]["image"])


def test_pixels_of_a_known_scene():
    """Packaged weights were trained on these pixels: a change must be seen."""
    image = Scenes("test", 3, seed=0).image(2).astype(np.int64)
    weights = np.arange(image.size).reshape(image.shape) % 1009
    assert (int(image.sum()), int((image * weights).sum())) == PIXELS


@pytest.mark.parametrize("size", DIGESTS)
def test_usual_scenes_stay_as_they_are(size):
    """Caches and checkpoints of runs hold these: settings added later must change none of them."""
    found = hashlib.sha256()
    for split in SPLITS:
        source = Scenes(split, 40, seed=5, image_size=size, view="partial(0.5)")
        things = [(source.caption(i), source.boxes(i), source.label_boxes(i)) for i in range(40)]
        found.update(repr((source, source.identity(), things)).encode())
        found.update(source.label_matrix().tobytes() + source.label_matrix(full=True).tobytes())
    assert found.hexdigest() == DIGESTS[size]
    usual = Scenes("test", 3, image_size=size)
    assert repr(usual) == f"Scenes('test', 3, seed=0, image_size={size}, view='full')"
    assert list(usual.identity()) == ["name", "split", "seed", "image_size", "scenes"]


def test_items():
    source = Scenes("validation", 30, image_size=96)
    item = source[4]
    assert item["image"].shape == (96, 96, 3) and item["image"].dtype == np.uint8
    assert item["targets"].shape == (22,) and item["targets"].dtype == np.int8
    assert item["index"] == 4 and source[-1]["index"] == 29
    with pytest.raises(IndexError):
        source[30]


def test_targets_boxes_and_captions_agree():
    source = Scenes("train", 300)
    for i in range(300):
        objects = source.boxes(i)
        assert 2 <= len(objects) <= 4
        labels = {o.kind for o in objects} | {o.colour for o in objects}
        assert labels == set(np.flatnonzero(source.label_matrix()[i] == 1))
        assert len({o.kind for o in objects}) == len(objects)
        for o in objects:
            assert o.kind < len(KINDS) <= o.colour
            x0, y0, x1, y1 = o.box
            assert 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64
        words = source.caption(i).rstrip(".").replace(",", "").split()
        named = [w for w in words if w in NAMES]
        assert named == [n for o in objects for n in (NAMES[o.colour], NAMES[o.kind])]
        assert words[:3] == ["a", "photo", "of"] and "a orange" not in source.caption(i)


def test_boxes_hold_the_colour_they_name():
    source = Scenes("test", 60)
    rgb = {name: np.array(value) * 255 for name, value in module._RGB.items()}
    right = total = 0
    for i in range(60):
        image = source.image(i).astype(float)
        for o in source.boxes(i):
            x0, y0, x1, y1 = o.box
            pixels = image[y0:y1, x0:x1].reshape(-1, 3)
            saturated = pixels[np.argsort(-np.ptp(pixels, axis=1))[: len(pixels) // 4]].mean(0)
            nearest = min(rgb, key=lambda name: np.linalg.norm(rgb[name] - saturated))
            right += nearest == NAMES[o.colour]
            total += 1
    assert right / total > 0.95


def test_splits_share_no_digit_image():
    parts = module._digit_images()
    for digit in range(10):
        seen = [{image.tobytes() for image in part[digit]} for part in parts]
        assert all(len(s) > 20 for s in seen)
        assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]


def test_labels_of_one_family_occur_together():
    y = Scenes("train", 20_000).label_matrix() > 0
    share = y.mean(0)
    lift = (y.T.astype(float) @ y) / len(y) / np.outer(share, share)
    family = {}
    for number, (colour, shape, digits) in enumerate(module.FAMILIES):
        family.update({NAMES.index(n): number for n in (colour, shape, *digits)})
    same, different = [], []
    for a in range(22):
        for b in range(a):
            (same if family[a] == family[b] else different).append(lift[a, b])
    assert np.mean(same) > 2 * np.mean(different)
    assert np.min(same) > np.max(different)
    assert share[:10].min() > 0.15 and share[:10].max() < 0.25


def test_views_change_targets_and_not_the_ground_truth():
    full, single = Scenes("train", 200), Scenes("train", 200, view="single_positive")
    np.testing.assert_array_equal(single.label_matrix(full=True), full.label_matrix())
    np.testing.assert_array_equal(single[9]["targets"], single.label_matrix()[9])
    assert (single.label_matrix() == 1).sum() == 200 and (single.label_matrix() >= 0).all()
    few = Scenes("train", 200, view="few_shot(0.1)")
    assert len(few) == 20 and few[3]["index"] == 3
    row = int(few._scene[3])
    np.testing.assert_array_equal(few.image(3), full.image(row))
    assert few.caption(3) == full.caption(row) and few.boxes(3) == full.boxes(row)


def test_every_split_works_and_errors_are_clear():
    for split in SPLITS:
        assert len(Scenes(split, 5)) == 5
    for kwargs, message in (
        ({"split": "val", "size": 5}, "no split named 'val'.*validation"),
        ({"split": "train", "size": 0}, "at least one image"),
        ({"split": "train", "size": 5, "image_size": 16}, "at least 32 pixels"),
        ({"split": "train", "size": 5, "object_scale": 1.5}, "object_scale is 1.5: .* to 1"),
        ({"split": "train", "size": 5, "object_scale": 0.0}, "object_scale is 0.0: .*from 0.24"),
        ({"split": "train", "size": 5, "object_scale": 0.2}, "=64 .*from 0.24 .*4 pixels"),
        ({"split": "train", "size": 5, "object_scale": float("nan")}, "object_scale is nan"),
        ({"split": "train", "size": 5, "objects": 0}, "objects .*is 0: use 1 to 4"),
        ({"split": "train", "size": 5, "objects": 5}, "objects .*is 5: use 1 to 4"),
        ({"split": "train", "size": 5, "view": "partal(0.1)"}, "did you mean 'partial'"),
    ):
        with pytest.raises(UserError, match=message):
            Scenes(**kwargs)


def test_boxes_are_where_the_pixels_change(monkeypatch):
    """An object in another colour changes pixels up to its box's four edges, and none outside."""
    source = Scenes("test", 40)
    plain = source._objects
    for i in range(40):
        *others, last = plain(i, source._draws(i))  # nothing is drawn over the last one
        images = []
        for value in (0.3, 0.7):
            found = [*others, (*last[:5], np.full(3, value, np.float32))]
            monkeypatch.setattr(source, "_objects", lambda *_, found=found: found)
            images.append(source.image(i) / 255)
        monkeypatch.undo()
        alpha = (images[1] - images[0]).mean(-1) / 0.4
        x0, y0, x1, y1 = source.boxes(i)[-1].box
        rows, columns = np.nonzero(alpha > 0.31)  # pixels are rounded
        assert rows.min() >= y0 and rows.max() < y1 and columns.min() >= x0 and columns.max() < x1
        rows, columns = np.nonzero(alpha > 0.29)
        assert rows.min() <= y0 and rows.max() >= y1 - 1
        assert columns.min() <= x0 and columns.max() >= x1 - 1


def test_boxes_by_label():
    source = Scenes("train", 60)
    for i in range(60):
        boxes = source.label_boxes(i)
        assert set(boxes) == set(np.flatnonzero(source.label_matrix()[i] == 1))
        for label, of in boxes.items():
            assert of == [o.box for o in source.boxes(i) if label in (o.kind, o.colour)]
    assert any(len(of) > 1 for i in range(60) for of in source.label_boxes(i).values())


def test_object_scale_makes_small_things_in_a_large_image():
    usual, large = Scenes("train", 200), Scenes("train", 200, image_size=128)
    small = Scenes("train", 200, image_size=128, object_scale=0.5)
    np.testing.assert_array_equal(small.label_matrix(), large.label_matrix())
    assert small.captions == large.captions
    spread = []
    for i in range(200):
        for a, b, c in zip(small.boxes(i), usual.boxes(i), large.boxes(i), strict=True):
            assert (a.kind, a.colour) == (b.kind, b.colour) == (c.kind, c.colour)
            box, same, twice = (np.reshape(o.box, (2, 2)) for o in (a, b, c))
            np.testing.assert_array_equal(np.diff(box, axis=0), np.diff(same, axis=0))
            assert abs(2 * np.diff(box, axis=0) - np.diff(twice, axis=0)).max() <= 3
            np.testing.assert_array_equal(box.mean(0) // 64, twice.mean(0) // 64)
            spread.append(box.mean(0) % 64)
        by_label = small.label_boxes(i)
        assert {box for of in by_label.values() for box in of} == {o.box for o in small.boxes(i)}
        found, as_usual = (s._objects(i, s._draws(i)) for s in (small, usual))
        for (*_, alpha, rgb), (*_, same, same_rgb) in zip(found, as_usual, strict=True):
            np.testing.assert_array_equal(alpha, same)  # the very pixels of a 64-pixel scene
            np.testing.assert_array_equal(rgb, same_rgb)
    assert np.min(spread) < 12 and np.max(spread) > 52  # anywhere in their quadrants
    assert small.image(0).shape == large.image(0).shape == (128, 128, 3)
    assert not np.array_equal(small.image(0), large.image(0))


@pytest.mark.parametrize(("image_size", "object_scale"), [(64, 0.236), (128, 0.118), (32, 0.48)])
def test_the_smallest_objects_can_be_seen(image_size, object_scale):
    source = Scenes("train", 300, image_size=image_size, object_scale=object_scale)
    half = image_size / 2
    for i in range(300):
        boxes = [np.reshape(o.box, (2, 2)) for o in source.boxes(i)]
        assert all(np.diff(box, axis=0).min() >= 1 and (box >= 0).all() for box in boxes)
        assert len({tuple(box.mean(0) // half) for box in boxes}) == len(boxes)
        assert min(alpha.shape[0] for *_, alpha, _ in source._objects(i, source._draws(i))) >= 4


@pytest.mark.parametrize("objects", [1, 2, 3, 4])
def test_number_of_objects(objects):
    source, usual = Scenes("train", 100, objects=objects), Scenes("train", 100)
    labels = source.label_matrix() > 0
    assert (labels[:, : len(KINDS)].sum(1) == objects).all()
    for i in range(100):
        found, drawn = source.boxes(i), usual.boxes(i)
        assert len(found) == objects
        assert {o.kind for o in found} | {o.colour for o in found} == set(np.flatnonzero(labels[i]))
        shared = min(len(drawn), objects)
        assert found[:shared] == drawn[:shared]
        if objects == len(drawn):
            np.testing.assert_array_equal(source.image(i), usual.image(i))


def test_scenes_of_one_object():
    source = Scenes("train", 400, seed=2, objects=1)
    labels = source.label_matrix() > 0
    assert (labels[:, : len(KINDS)].sum(1) == 1).all()
    assert (labels[:, len(KINDS) :].sum(1) == 1).all()
    for i in range(400):
        colour, kind = NAMES[source.boxes(i)[0].colour], NAMES[source.boxes(i)[0].kind]
        article = "an" if colour == "orange" else "a"
        assert source.caption(i) == f"a photo of {article} {colour} {kind}."
    single = Scenes("train", 400, seed=2, objects=1, view="single_positive")
    assert ((single.label_matrix() == 1).sum(1) == 1).all()
    np.testing.assert_array_equal(single.label_matrix(full=True), source.label_matrix())

    again, fewer = Scenes("train", 400, seed=2, objects=1), Scenes("train", 9, seed=2, objects=1)
    np.testing.assert_array_equal(again.image(5), source.image(5))
    np.testing.assert_array_equal(fewer.image(5), source.image(5))
    np.testing.assert_array_equal(fewer.label_matrix(), source.label_matrix()[:9])
    for split, seed in (("test", 2), ("validation", 2), ("train", 3)):
        other = Scenes(split, 400, seed=seed, objects=1)
        assert not np.array_equal(other.label_matrix(), source.label_matrix())
        assert not np.array_equal(other.image(5), source.image(5))


def test_unusual_scenes_have_names_of_their_own():
    asked = ({}, {"object_scale": 0.5}, {"objects": 1}, {"objects": 2}, {"object_scale": 0.75})
    asked = (*asked, {"object_scale": 0.5, "objects": 1})
    sources = [Scenes("train", 5, **kwargs) for kwargs in asked]
    assert len({repr(s) for s in sources}) == len({str(s.identity()) for s in sources}) == 6
    assert repr(sources[-1]) == (
        "Scenes('train', 5, seed=0, image_size=64, object_scale=0.5, objects=1, view='full')"
    )
    assert sources[-1].identity().items() >= asked[-1].items()
    same = Scenes("train", 5, object_scale=1, objects=None)
    assert repr(same) == repr(sources[0]) and same.identity() == sources[0].identity()


def test_settings_of_objects_reach_their_splits():
    sizes = {"num_train": 30, "num_validation": 30, "num_test": 30, "train_view": "single_positive"}
    config = {"name": "scenes", **sizes, "train_objects": 1, "object_scale": 0.5}
    data = registry.load(config, image_size=128, splits=("train", "validation", "test"))
    assert ((data.train.label_matrix() == 1).sum(1) == 1).all()
    for name, source in {"": data.train, **data.evals}.items():
        objects = 1 if name in ("", "train") else None
        split = name or "train"
        look = {"image_size": 128, "object_scale": 0.5, "objects": objects}
        same = Scenes(split, 30, **look, view="full" if name else "single_positive")
        assert repr(source) == repr(same)
        np.testing.assert_array_equal(source.image(3), same.image(3))
    for wrong, message in (
        ({"train_objects": 5}, "data.train_objects.* is 5: use 1 to 4"),
        ({"object_scale": 0.1}, "object_scale is 0.1: .*image_size=128 .*from 0.12"),
        ({"train_objects": 1.5}, "data.train_objects"),
    ):
        with pytest.raises(UserError, match=message):
            registry.load(config | wrong, image_size=128, splits=("test",))
