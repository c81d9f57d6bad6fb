from __future__ import annotations

import pickle

import numpy as np
import pytest

from mlclip_jax.data import scenes as module
from mlclip_jax.data.scenes import KINDS, SPLITS, Scenes
from mlclip_jax.errors import UserError
from mlclip_jax.labels.catalog import scenes as label_space

NAMES = label_space().names
PIXELS = (620306, 308553068)  # sums of one scene's bytes, plain and weighted


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
