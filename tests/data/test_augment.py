"""Recipes: their distributions, what the operations do, and that a seed decides it all."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mlclip_jax.data import augment
from mlclip_jax.data.augment import RECIPES, Augment, Recipe, example_rng, recipe
from mlclip_jax.data.transforms import ImageError, Preprocess
from mlclip_jax.errors import UserError


def picture(width=160, height=120):
    """Columns in red, rows in green, a wave in blue, as a JPEG."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([255 * x / width, 255 * y / height, 127 + 100 * np.sin(x * y / 99)], -1)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_function_of_seed_epoch_and_example(name):
    apply = Augment(Preprocess(32, fast_decode=True), recipe(name))
    content = picture()
    image = apply(content, example_rng(3, 1, 7))
    assert image.dtype == np.uint8 and image.shape == (32, 32, 3)
    np.testing.assert_array_equal(image, apply(content, example_rng(3, 1, 7)))
    plain = Preprocess(32, fast_decode=True)(content)
    np.testing.assert_array_equal(apply(content), plain)  # no random numbers: as in evaluation
    changed = [
        (apply(content, example_rng(*key)) != image).any()
        for key in ((4, 1, 7), (3, 2, 7), (3, 1, 8), (3, 7, 1))
    ]
    # Flips are the training step's: these two leave the host's pixels alone.
    assert sum(changed) >= (0 if name in ("none", "flip") else 3)
    if name in ("none", "flip"):
        np.testing.assert_array_equal(image, plain)


def test_recipes_are_those_of_the_papers():
    flips = {name for name, found in RECIPES.items() if found.flip}
    assert flips == {"flip", "flip_rrc", "randaugment", "multi_scale_crop"}
    timm = recipe("randaugment").rand_augment
    assert (timm.count, timm.probability, len(timm.operations)) == (2, 0.5, 15)
    vision = recipe("cutout_randaugment").rand_augment
    assert (vision.count, vision.probability, len(vision.operations)) == (2, 1.0, 14)
    with pytest.raises(UserError, match="unknown augmentation 'flip_rcc'; did you mean 'flip_rrc'"):
        recipe("flip_rcc")


def test_seeds_may_be_negative_or_large():
    assert example_rng(-1, 0, 0).random() == example_rng(2**32 - 1, 0, 0).random()


def test_random_resized_boxes_have_the_stated_areas_and_shapes():
    draw, size = rng(), (640, 480)
    boxes = np.array([augment._random_resized_box(*size, draw) for _ in range(4000)])
    left, top, right, bottom = boxes.T
    assert left.min() == top.min() == 0 and right.max() == 640 and bottom.max() == 480
    w, h = right - left, bottom - top
    area, ratio = w * h / (640 * 480), w / h
    assert 0.075 < area.min() < 0.085 and 0.9 < area.max() <= 1
    assert 0.745 < ratio.min() < 0.76 and 1.32 < ratio.max() < 1.34
    # Where every draw fits (small areas), area is uniform and the logarithm of the shape too.
    small = area < 0.5
    assert abs(np.mean(area[small]) - (0.08 + 0.5) / 2) < 0.01
    quarters = np.histogram(np.log(ratio[small]), 4, np.log([3 / 4, 4 / 3]))[0]
    assert np.abs(quarters / small.sum() - 0.25).max() < 0.03
    # The place is uniform in what is left over.
    assert abs(np.mean(left / np.maximum(640 - w, 1)) - 0.5) < 0.02
    assert abs(np.mean(top / np.maximum(480 - h, 1)) - 0.5) < 0.02


@pytest.mark.parametrize(
    ("size", "expected"),
    [((3000, 1), (1499, 0, 1500, 1)), ((1, 3000), (0, 1499, 1, 1500)), ((1, 1), (0, 0, 1, 1))],
)
def test_needles_give_their_middle(size, expected):
    class Large:
        """A generator of the largest areas."""

        def uniform(self, low, high):
            return high

        def integers(self, *args, **kwargs):
            return 0

    assert augment._random_resized_box(*size, Large()) == expected
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    shown = Augment(Preprocess(16), recipe("flip_rrc"))(pixels, rng())
    assert shown.shape == (16, 16, 3)


def test_multi_scale_crops_are_squares_of_the_squashed_image():
    apply = Augment(Preprocess(448), recipe("multi_scale_crop"))
    seen = set()
    for seed in range(300):
        left, top, right, bottom = apply._square_box(640, 480, rng(seed))
        x, y = left * 512 / 640, top * 512 / 480  # in the squashed image
        width, height = (right - left) * 512 / 640, (bottom - top) * 512 / 480
        assert width == pytest.approx(height)
        assert x == pytest.approx(round(x)) and y == pytest.approx(round(y))
        assert min(x, y) >= 0 and max(x + width, y + height) < 512.001
        seen.add(round(width))
    assert seen == {512, 448, 384, 320, 256}


def test_multi_scale_crop_equals_squashing_first():
    content = picture(640, 480)
    apply = Augment(Preprocess(112), recipe("multi_scale_crop"))
    squashed = Image.open(io.BytesIO(content)).resize((128, 128), Image.Resampling.BICUBIC)
    for seed in range(6):
        box = np.array(apply._square_box(640, 480, rng(seed)))
        crop = squashed.crop(tuple(np.round(box * [0.2, 128 / 480, 0.2, 128 / 480]).astype(int)))
        expected = np.asarray(crop.resize((112, 112), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(apply(content, rng(seed)) - expected).mean() < 4


def test_cutout_paints_a_quarter_less_what_hangs_over():
    grey = Image.new("RGB", (64, 64), (7, 7, 7))
    shares = []
    for seed in range(400):
        image = np.asarray(augment._cut_out(grey, 0.5, rng(seed)))
        painted = (image != 7).any(-1)
        if not painted.any():  # a colour of 7, 7, 7 would be very rare
            continue
        rows, columns = np.flatnonzero(painted.any(1)), np.flatnonzero(painted.any(0))
        block = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (block == block[0, 0]).all()
        assert 16 <= len(rows) <= 32 and 16 <= len(columns) <= 32
        shares.append(painted.mean())
    assert np.asarray(grey).max() == 7  # the original is left alone
    # Each side is 32 in the middle half and loses 8 on average in the outer halves: 28 of 64.
    assert abs(np.mean(shares) - (28 / 64) ** 2) < 0.01


def settings(**fields):
    return replace(RECIPES["randaugment"].rand_augment, **fields)


def operate(name, pixels, level=1.0, sign=1.0, **fields):
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    fields = {"filter": Image.Resampling.NEAREST, **fields}
    return np.asarray(augment._OPERATIONS[name](image, level, sign, settings(**fields))).astype(int)


def test_every_operation_has_its_name_in_the_table():
    named = {n for r in RECIPES.values() if r.rand_augment for n in r.rand_augment.operations}
    assert named == set(augment._OPERATIONS)


def test_geometry():
    x = np.broadcast_to(np.arange(100)[None, :, None], (100, 100, 3))
    y = x.transpose(1, 0, 2)
    fill = (124, 116, 104)
    # The strongest shift shows what lies 45 per cent to the right.
    shifted = operate("translate_x", x)
    np.testing.assert_array_equal(shifted[:, :55], x[:, 45:])
    assert (shifted[:, 55:] == fill).all()
    np.testing.assert_array_equal(operate("translate_y", y), shifted.transpose(1, 0, 2))
    np.testing.assert_array_equal(operate("translate_x", x, sign=-1.0)[:, 45:], x[:, :55])
    np.testing.assert_array_equal(operate("translate_x", x, level=0.0), x)
    # The strongest shear moves a row by three tenths of its height.
    sheared = operate("shear_x", x)[:, 50, 0]
    assert np.abs(sheared[:90] - (50 + 0.3 * np.arange(90))).max() <= 1
    sheared = operate("shear_y", y)[50, :, 0]
    assert np.abs(sheared[:90] - (50 + 0.3 * np.arange(90))).max() <= 1
    # The strongest turn is by 30 degrees: sin 30 = 1/2.
    turned = operate("rotate", x)[40:60, 50, 0]
    slope = np.polyfit(np.arange(20), turned, 1)[0]
    assert abs(abs(slope) - 0.5) < 0.03
    assert operate("rotate", x)[0, 0].tolist() == list(fill)
    backwards = operate("rotate", x, sign=-1.0)[40:60, 50, 0]
    assert np.polyfit(np.arange(20), backwards, 1)[0] == pytest.approx(-slope, abs=0.03)


def test_colour():
    values = np.repeat(np.arange(256)[None, :, None], 3, -1)
    ramp = np.arange(256)
    row = {
        name: operate(name, values)[0, :, 0]
        for name in ("invert", "solarize", "solarize_add", "posterize", "brightness")
    }
    np.testing.assert_array_equal(row["invert"], 255 - ramp)
    np.testing.assert_array_equal(row["solarize"], 255 - ramp)  # at full strength all of them
    np.testing.assert_array_equal(
        row["solarize_add"], np.where(ramp < 128, np.minimum(ramp + 110, 255), ramp)
    )
    np.testing.assert_array_equal(row["posterize"], ramp & 0b10000000)
    assert np.abs(row["brightness"] - np.minimum(1.9 * ramp, 255)).max() <= 1
    darker = operate("brightness", values, sign=-1.0)[0, :, 0]
    assert np.abs(darker - 0.1 * ramp).max() <= 1
    # Strength 0.3, as torchvision's 9 of 30: 7 bits; values from 180 on inverted.
    weak = operate("posterize", values, level=0.3, posterize_bits=8)[0, :, 0]
    np.testing.assert_array_equal(weak, ramp & 0b11111110)
    weak = operate("solarize", values, level=0.3)[0, :, 0]
    np.testing.assert_array_equal(weak, np.where(ramp < 180, ramp, 255 - ramp))
    # Mean grey stays what contrast is measured from; without colour the channels are equal.
    flat = np.full((8, 8, 3), 90)
    np.testing.assert_array_equal(operate("contrast", flat), flat)
    red = np.broadcast_to(np.array([200, 50, 50]), (8, 8, 3))
    spread = np.ptp(operate("color", red, sign=-1.0), -1)
    assert spread.max() <= 16  # a tenth of 150, rounded
    low = operate("auto_contrast", 60 + values // 4)
    assert low.min() == 0 and low.max() == 255
    assert operate("equalize", np.repeat(values // 8, 16, 0)).max() > 200
    stripes = np.repeat((values % 2) * 255, 16, 0)
    blurred = operate("sharpness", stripes, sign=-1.0)
    assert np.abs(np.diff(blurred[8, 5:-5, 0])).max() < 200
    assert np.abs(np.diff(operate("sharpness", stripes // 2)[8, 5:-5, 0])).min() > 127
    np.testing.assert_array_equal(operate("identity", values), values)


def test_rand_augment_draws_as_its_settings_say(monkeypatch):
    calls = []

    def record(name):
        def call(image, level, sign, settings):
            calls.append((name, level, sign))
            return image

        return call

    for name in augment._OPERATIONS:
        monkeypatch.setitem(augment._OPERATIONS, name, record(name))
    image, draw, count = Image.new("RGB", (4, 4)), rng(), 3000
    for _ in range(count):
        RECIPES["randaugment"].rand_augment(image, draw)
    assert abs(len(calls) / count - 1.0) < 0.05  # two, each with probability a half
    names, levels, signs = (np.array(column) for column in zip(*calls, strict=True))
    shares = [np.mean(names == name) for name in RECIPES["randaugment"].rand_augment.operations]
    assert abs(np.array(shares) - 1 / 15).max() < 0.02
    assert abs(levels.mean() - 0.9) < 0.005 and levels.max() <= 1
    assert abs(levels[levels < 1].std() - 0.048) < 0.005
    assert abs(signs.mean()) < 0.06
    calls.clear()
    for _ in range(50):
        RECIPES["cutout_randaugment"].rand_augment(image, draw)
    assert len(calls) == 100 and {level for _, level, _ in calls} == {0.3}


def test_bad_images_are_named():
    apply = Augment(Preprocess(16), recipe("flip_rrc"))
    with pytest.raises(ImageError, match=r"^a\.jpg: cannot be read as an image"):
        apply(picture()[:900], rng(), name="a.jpg")
    with pytest.raises(ImageError, match="no such image file"):
        apply("nowhere/b.jpg", rng())


def test_the_default_recipe_changes_nothing():
    assert Augment(Preprocess(16)).recipe == Recipe() == recipe("none")
