"""CUB-200-2011 with attributes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlclip_jax.data.manifest import Rows
from mlclip_jax.data.raw import cub
from mlclip_jax.errors import UserError
from mlclip_jax.labels import catalog

sys.path.insert(0, str(Path(__file__).parents[1]))
import raw_folders_more as folders

LABELS = "CUB_200_2011/attributes/image_attribute_labels.txt"
IMAGES = "CUB_200_2011/images.txt"
SPLIT = "CUB_200_2011/train_test_split.txt"


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """One folder for all tests, which leave it as it was."""
    folder = tmp_path_factory.mktemp("cub")
    folders.cub(folder)
    return folder


@pytest.fixture
def own(tmp_path):
    """A folder that the test may change."""
    folders.cub(tmp_path)
    return tmp_path


@pytest.mark.parametrize("part", ["train", "test"])
def test_images_in_the_order_of_images_txt_with_their_attributes(raw, part):
    manifest = cub.read(raw, part)
    wanted = [i for i, split in enumerate(folders.CUB_SPLIT) if split == (part == "train")]
    assert manifest.keys.tolist() == [
        f"CUB_200_2011/images/{folders.CUB_IMAGES[i]}" for i in wanted
    ]
    assert manifest.space == catalog.cub()
    expected = [[a - 1 for a in folders.cub_attributes(i + 1)] for i in wanted]
    assert manifest.positives == Rows.from_lists(expected)
    assert all((raw / key).is_file() for key in manifest.keys)


def test_example_lines(own):
    """Lines of the official files; the pair (1, 5) is present, whatever its certainty."""
    first = (own / IMAGES).read_text().splitlines()[0]
    assert first == "1 001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg"
    assert (own / SPLIT).read_text().startswith("1 0\n")
    assert (own / "attributes.txt").read_text().startswith("1 has_bill_shape::curved_(up_or_down)")
    lines = (own / LABELS).read_text().splitlines()
    assert {len(line.split()) for line in lines} == {5, 6, 7}
    lines[0], lines[4] = "1 1 0 3 27.7080", "1 5 1 3 27.7080"
    (own / LABELS).write_text("\n".join(lines))
    positives = cub.read(own, "test").positives.row(0)
    assert 4 in positives and 0 not in positives


@pytest.mark.parametrize("place", ["attributes.txt", "CUB_200_2011/attributes.txt", None])
def test_attributes_txt_may_lie_in_the_folder_or_be_absent(own, place):
    text = (own / "attributes.txt").read_bytes()
    (own / "attributes.txt").unlink()
    if place:
        (own / place).write_bytes(text.replace(b"\n", b"\r\n"))
    assert len(cub.read(own, "train")) == 4


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (LABELS, b"1 2 0 3 27.7080\n", b"", r"lacks 1 pairs of image and attribute, .* is 1 2:"),
        (LABELS, b"1 2 0", b"1 3 0", "labels.txt, line 3: image 1 has attribute 3 a second time"),
        (LABELS, b"\n1 2 0", b"\n1 313 0", "labels.txt, line 2: unknown label '313'"),
        (LABELS, b"\n1 2 0", b"\n9 2 0", "labels.txt, line 2: image 9 is not in images.txt"),
        (LABELS, b"\n1 2 0", b"\n1 2 2", "labels.txt, line 2: '1 2 2 3 27.7080' should begin"),
        (LABELS, b"\n1 2 0 3 27.7080", b"\n1 2", "labels.txt, line 2: '1 2' should begin"),
        (IMAGES, b"\n3 ", b"\n2 ", "images.txt, line 3: 2 stands on line 2 too"),
        (IMAGES, b"\n3 ", b"\n3", "images.txt, line 3: '3002.Laysan.* should be a number"),
        (IMAGES, b"\n3 ", b"\n3 ../../", "images.txt, line 3: .* is no path of an image"),
        (IMAGES, b"0009_34", b"0046_18", "images.txt, line 2: .* stands on line 1 too"),
        (SPLIT, b"1 0\n", b"", "split.txt lacks 1 images of images.txt, the first is number 1"),
        (SPLIT, b"1 0\n", b"1 2\n", "split.txt, line 1: image 1 has '2', not 0 or 1"),
        (SPLIT, b"1 0\n", b"1 0\n8 0\n", "split.txt, line 2: image 8 is not in images.txt"),
        ("attributes.txt", b"dagger", b"hooked", r"attributes.txt, line 2: .* 'dagger bill'"),
        ("attributes.txt", b"\n312 ", b"\n313 ", "attributes.txt, line 312: unknown label '313'"),
    ],
)
def test_what_is_malformed_is_named(own, file, old, new, message):
    path = own / file
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        cub.read(own, "train")


def test_a_list_of_attributes_that_is_cut_off(own):
    path = own / "attributes.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:300]))
    with pytest.raises(UserError, match=r"attributes.txt has 300 attributes, not 312"):
        cub.read(own, "train")


@pytest.mark.parametrize("file", [LABELS, IMAGES, SPLIT])
def test_a_missing_file_is_named(own, file):
    (own / file).unlink()
    with pytest.raises(UserError, match=f"cannot read .*{Path(file).name}"):
        cub.read(own, "train")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@settings(max_examples=15)
@given(data=st.data())
def test_round_trip(scratch, data):
    """Any attributes, image numbers and order of lines."""
    numbers = data.draw(st.lists(st.integers(1, 11_788), min_size=1, max_size=3, unique=True))
    bits = data.draw(st.lists(st.binary(min_size=39, max_size=39), min_size=3, max_size=3))
    present = np.unpackbits(np.frombuffer(b"".join(bits), np.uint8).reshape(3, 39), axis=1)
    folders.write(scratch / IMAGES, "".join(f"{n} a/{n} b.jpg\n" for n in numbers))
    folders.write(scratch / SPLIT, "".join(f"{n} 1\n" for n in sorted(numbers)))
    rows = [
        f"{n} {a + 1} {present[i, a]} 3 1.0\n" for i, n in enumerate(numbers) for a in range(312)
    ]
    np.random.default_rng(len(numbers)).shuffle(rows)
    folders.write(scratch / LABELS, "".join(rows))
    manifest = cub.read(scratch, "train")
    assert manifest.keys.tolist() == [f"CUB_200_2011/images/a/{n} b.jpg" for n in numbers]
    np.testing.assert_array_equal(manifest.positives.dense(312), present[: len(numbers)])
    assert len(cub.read(scratch, "test")) == 0


@settings(max_examples=40)
@given(file=st.sampled_from([LABELS, IMAGES, SPLIT, "attributes.txt"]), data=st.data())
def test_any_damage_is_read_or_named(raw, file, data):
    folders.check_damage(data, raw / file, lambda: cub.read(raw, "train"))
