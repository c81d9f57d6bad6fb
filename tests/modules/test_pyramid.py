"""Pyramid-forwarding: the golden's crops and tokens, resizing like Pillow, maps of tokens."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from references.decoders import pyramid_boxes

from mlclip_jax.clip.arrays import from_state_dict
from mlclip_jax.clip.config_files import infer_config
from mlclip_jax.errors import UserError
from mlclip_jax.modules.pyramid import Pyramid, level_sizes, resize

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [
    (32, 64), (32, 128), (336, 672), (336, 1344), (336, 640), (224, 448), (336, 1008), (224, 640),
]  # fmt: skip


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "adds.npz") as file:
        return {key: value for key, value in file.items() if key.startswith("pyr/")}


@pytest.mark.parametrize(("base", "target"), CASES)
def test_crops_are_the_goldens(golden, base, target):
    name = f"pyr/R1_{base}to{target}"
    assert level_sizes(base, target) == golden[f"{name}/level_sizes"].tolist()
    boxes = golden[f"{name}/boxes"]
    crops = Pyramid(base, target).crops
    np.testing.assert_array_equal(crops, boxes[:, [0, 3, 4]])
    np.testing.assert_array_equal(boxes[:, 5:] - boxes[:, 3:5], base)
    patch = 8 if base == 32 else 14
    tokens = len(crops) * ((base // patch) ** 2 + 1)
    assert tokens == golden[f"{name}/n_tokens_patch14_or_8"]


@pytest.mark.parametrize(("base", "target"), [*CASES, (64, 64), (64, 70), (32, 250), (64, 600)])
def test_crops_are_the_references(base, target):
    expected = [
        (level, y, x) for level, (_, at) in enumerate(pyramid_boxes(base, target)) for y, x in at
    ]
    assert Pyramid(base, target).crops == expected


@pytest.mark.parametrize("name", ["32to64", "32to128", "32to48"])
def test_tokens_equal_golden(golden, name):
    with np.load(GOLDEN / "clip_vit.npz") as file:
        weights = {key[3:]: file[key] for key in file if key.startswith("sd/")}
    clip = from_state_dict(weights, infer_config({k: v.shape for k, v in weights.items()}))
    base, target = map(int, name.split("to"))
    pyramid = Pyramid(base, target)
    levels = [
        jnp.asarray(golden[f"pyr/enc_{name}/level{i}_image"].transpose(0, 2, 3, 1))
        for i in range(len(level_sizes(base, target)))
    ]
    crops = pyramid.cut_levels(levels)
    found = jax.jit(lambda x: clip.encode_images(x, tokens=True))(crops[0])
    tokens = np.concatenate([found.pooled[:, None], found.tokens], axis=1)

    def same(got: np.ndarray, expected: np.ndarray) -> None:
        assert np.abs(got - expected).max() <= 2e-5 * np.abs(expected).max()

    if f"pyr/enc_{name}/tokens" in golden:
        same(tokens.reshape(1, -1, 64), golden[f"pyr/enc_{name}/tokens"])
    else:
        same(tokens[:, :2], golden[f"pyr/enc_{name}/cls_and_first_patch"])
        same(tokens.mean(1), golden[f"pyr/enc_{name}/crop_mean"])


def test_cut_and_encode_keep_the_order():
    """Images that say where their pixels are: crops come level by level, by rows, as they are."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (2, 12, 12, 3)), jnp.uint8)
    pyramid = Pyramid(4, 12)
    crops = np.asarray(pyramid.cut(images))
    assert crops.shape == (2, 21, 4, 4, 3) and crops.dtype == np.uint8
    for number, (level, y, x) in enumerate(pyramid.crops):
        image = np.asarray(resize(images, level_sizes(4, 12)[level]))
        np.testing.assert_array_equal(crops[:, number], image[:, y : y + 4, x : x + 4])
    np.testing.assert_array_equal(crops[:, 5], np.asarray(images)[:, :4, :4])

    def tower(x: jax.Array) -> jax.Array:
        assert x.shape == (42, 4, 4, 3)
        return x.reshape(42, 16, 3).astype(jnp.float32)

    tokens = pyramid.encode(images, tower, None)
    np.testing.assert_array_equal(tokens, crops.reshape(2, 21 * 16, 3))
    top = Pyramid(4, 12, levels=(2,))
    np.testing.assert_array_equal(top.cut(images), crops[:, 5:])
    np.testing.assert_array_equal(Pyramid(4, 12, levels=(0, 2)).cut(images)[:, 1:], crops[:, 5:])


@pytest.mark.parametrize(("size", "to"), [(128, 64), (96, 64), (640, 336)])
def test_resizing_is_pillows(size, to):
    rng = np.random.default_rng(1)
    smooth = rng.integers(0, 256, (9, 9, 3)).astype(np.uint8)
    image = Image.fromarray(smooth).resize((size, size), Image.Resampling.BICUBIC)
    noise = rng.integers(-20, 20, (size, size, 3))
    pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
    got = np.asarray(resize(jnp.asarray(pixels[None]), to)[0]).astype(int)
    expected = Image.fromarray(pixels).resize((to, to), Image.Resampling.BICUBIC)
    error = np.abs(got - np.asarray(expected).astype(int))
    assert error.max() <= 3 and error.mean() < 0.3  # Pillow rounds and clips between both axes


def test_crops_left_out_at_random():
    images = jnp.arange(2 * 16 * 16 * 3).reshape(2, 16, 16, 3).astype(jnp.float32)
    pyramid = Pyramid(4, 16, drop=0.5)
    every = np.asarray(Pyramid(4, 16).cut(images))
    assert (len(pyramid.crops), pyramid.kept) == (21, 11)

    def rows(key: jax.Array | None) -> np.ndarray:
        crops = np.asarray(pyramid.cut(images, key))
        assert crops.shape == (2, 11, 4, 4, 3)
        found = (crops[:, :, None] == every[:, None]).all((3, 4, 5))
        return np.array([[np.flatnonzero(row)[0] for row in image] for image in found])

    drawn = [rows(jax.random.key(i)) for i in range(30)]
    for found in drawn:
        assert (found[:, 0] == 0).all() and (np.diff(found, axis=1) > 0).all()
    assert any((found[0] != found[1]).any() for found in drawn)
    counts = np.bincount(np.concatenate([f.ravel() for f in drawn]), minlength=21)
    assert counts[0] == 60 and counts[1:].min() > 10  # each is seen about half of the time
    fixed = rows(None)
    np.testing.assert_array_equal(fixed[0], fixed[1])
    np.testing.assert_array_equal(fixed, rows(None))


def test_tokens_spread_over_the_image():
    """A token's value lies where its patch is, as much as its area is small."""
    grid = 2
    pyramid = Pyramid(4, 16)  # patches of 2 pixels: maps of 8 x 8
    n = len(pyramid.crops) * 5
    for level, y, x in ((0, 0, 0), (1, 4, 0), (2, 8, 4)):
        number = pyramid.crops.index((level, y, x))
        for cell in range(4):
            values = np.zeros(n)
            values[number * 5 + 1 + cell] = 1.0
            found = np.asarray(pyramid.spread(jnp.asarray(values), grid))
            assert found.shape == (8, 8)
            step = 4 // 2**level  # cells of the map along a patch
            top, left = (a * step // 2 + b * step for a, b in ((y, cell // 2), (x, cell % 2)))
            expected = np.zeros((8, 8))
            expected[top : top + step, left : left + step] = 4.0**level / 16
            np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(found.sum(), 1)  # as much as the token has
    everything = np.asarray(pyramid.spread(jnp.ones((3, n)), grid))
    assert everything.shape == (3, 8, 8)
    np.testing.assert_allclose(everything, 1 + 1 / 4 + 1 / 16)
    class_tokens = np.zeros(n)
    class_tokens[::5] = 1
    assert not np.asarray(pyramid.spread(jnp.asarray(class_tokens), grid)).any()
    overlapping = Pyramid(4, 6)
    found = np.asarray(overlapping.spread(jnp.ones(25), grid))
    np.testing.assert_allclose(found, np.full((3, 3), 1 + (4 / 6) ** 2), rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": 32}, "method.image_size is 32 and the image tower takes 64 pixels"),
        ({"target": 128, "levels": (2,)}, "images of 128 pixels have the levels 0, 1"),
        ({"target": 128, "levels": ()}, "some of these, each once"),
        ({"target": 128, "levels": (1, 1)}, "some of these, each once"),
        ({"target": 128, "drop": 1.0}, "method.drop_crops is 1.0"),
    ],
)
def test_wrong_settings_are_named(fields, message):
    with pytest.raises(UserError) as caught:
        Pyramid(64, **fields)
    assert message in str(caught.value)
