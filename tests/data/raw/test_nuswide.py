"""NUS-WIDE as its archives unpack: lists, human labels and tags, all aligned by row."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlclip_jax.data.manifest import Rows
from mlclip_jax.data.raw import nuswide
from mlclip_jax.errors import UserError
from mlclip_jax.labels import catalog

sys.path.insert(0, str(Path(__file__).parents[1]))
import raw_folders_more as folders

EVERYTHING = sorted([*folders.NUS_TRAIN, *folders.NUS_TEST])


def key(image):
    return "Flickr/" + image.replace("\\", "/")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """One folder for all tests, which leave it as it was."""
    folder = tmp_path_factory.mktemp("nus wide é")
    folders.nuswide(folder)
    return folder


@pytest.fixture
def own(tmp_path):
    """A folder that the test may change."""
    folders.nuswide(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("part", "images"),
    [("train", folders.NUS_TRAIN), ("test", folders.NUS_TEST), ("all", EVERYTHING)],
)
def test_images_in_the_order_of_the_list_with_their_human_labels(raw, part, images):
    manifest = nuswide.read(raw, part)
    assert manifest.name == f"nuswide/{part}"
    assert manifest.keys.tolist() == [key(image) for image in images]
    assert manifest.space == catalog.nus()
    expected = [folders.nus_concepts(EVERYTHING.index(image)) for image in images]
    assert manifest.positives == Rows.from_lists(expected)
    assert manifest.negatives is None and not manifest.aux
    assert all((raw / image).is_file() for image in manifest.keys)


def test_example_lines(raw):
    assert nuswide.read(raw, "train").keys[0] == "Flickr/actor/0001_2124494179.jpg"
    lists = (raw / "ImageList/TrainImagelist.txt").read_bytes()
    assert lists.startswith(b"actor\\0001_2124494179.jpg\r\n")
    assert (raw / "NUS_WID_Tags/Train_Tags1k.dat").read_bytes().startswith(b"1\t0\t0\t1\t0\t0\t\n")


def test_a_photo_under_two_paths_is_two_images(raw):
    keys = nuswide.read(raw, "test").keys.tolist()
    assert keys[:2] == ["Flickr/bus/0018_702409954.jpg", "Flickr/man/0215_702409954.jpg"]


def test_an_image_without_concepts_stays(raw):
    manifest = nuswide.read(raw, "all")
    assert np.flatnonzero(np.diff(manifest.positives.offsets) == 0).tolist() == [1]


@pytest.mark.parametrize("part", ["train", "test"])
def test_tags_are_those_that_are_no_concepts(raw, part):
    manifest = nuswide.read(raw, f"{part}_tags")
    assert manifest.space.names == ("nature", "blue", "red")
    columns = [0, 2, 5]  # of the tag list: sky, water and clouds are concepts
    bits = np.array([[(i + t) % 3 == 0 for t in columns] for i in range(len(manifest))])
    np.testing.assert_array_equal(manifest.positives.dense(3), bits)
    concepts = nuswide.read(raw, part)
    np.testing.assert_array_equal(manifest.keys, concepts.keys)
    assert manifest.aux == {nuswide.CONCEPTS: concepts.positives}


def test_joined_tags_and_concepts(raw):
    manifest = nuswide.read(raw, "test_tags")
    both = nuswide.joined(manifest)
    assert both.space.names == manifest.space.names + catalog.nus().names
    assert both.space.subsets == {"seen": (0, 1, 2), "unseen": tuple(range(3, 84))}
    parts = manifest.label_matrix(), nuswide.read(raw, "test").label_matrix()
    np.testing.assert_array_equal(both.label_matrix(), np.concatenate(parts, axis=1))


BEACH = "Groundtruth/TrainTestLabels/Labels_beach_Train.txt"
TAGS = "NUS_WID_Tags/Train_Tags1k.dat"


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (BEACH, b"0\n", b"", "has 0 rows, but its list of images has 4"),
        (BEACH, None, b"0\n" * 5, "has 5 rows, but its list of images has 4"),
        (BEACH, None, b"0\n0\n2\n0\n", "Labels_beach_Train.txt, line 3: '2' is not 0 or 1"),
        (BEACH, None, b"0\n\n0\n0\n", "Labels_beach_Train.txt, line 2: blank line"),
        (BEACH, None, b"0\n\xff\n0\n0\n", "Labels_beach_Train.txt is not UTF-8 text"),
        (TAGS, b"1\t", b"", r"Tags1k.dat, line 1: 4 values, but .*TagList1k.txt has 6 tags"),
        (TAGS, b"0\t", b"x\t", "Tags1k.dat, line 1: 'x' is not 0 or 1"),
        (TAGS, b"0\t", b"01\t", "Tags1k.dat, line 1: '01' is not 0 or 1"),
        (TAGS, None, b"1\t0\t0\t1\t0\t0\t\n", "Train_Tags1k.dat has 1 rows, but its list"),
        ("NUS_WID_Tags/TagList1k.txt", b"red", b"blue", "line 6: 'blue' stands on line 3 too"),
        ("NUS_WID_Tags/TagList1k.txt", None, b"sky\n", "holds no tag besides the concepts"),
        ("ImageList/TrainImagelist.txt", b"actor", b"..", "line 1: .* is no path of an image"),
        ("ImageList/TrainImagelist.txt", b"actor\\", b"C:\\", "line 1: .* is no path of an image"),
        (
            "ImageList/TrainImagelist.txt",
            b"baby\\0002_2124494180",
            b"actor\\0001_2124494179",
            r"TrainImagelist.txt, line 2: image 'actor.*0001_2124494179.jpg' stands on line 1 too",
        ),
    ],
)
def test_what_is_malformed_is_named(own, file, old, new, message):
    path = own / file
    content = path.read_bytes()
    path.write_bytes(new if old is None else content.replace(old, new))
    with pytest.raises(UserError, match=message):
        nuswide.read(own, "train_tags")


@pytest.mark.parametrize("file", [BEACH, TAGS, "ImageList/TrainImagelist.txt"])
def test_a_missing_file_is_named(own, file):
    (own / file).unlink()
    with pytest.raises(UserError, match=f"cannot read .*{Path(file).name}"):
        nuswide.read(own, "train_tags")


def test_unknown_part(raw):
    with pytest.raises(UserError, match="unknown part of nuswide 'tests'; did you mean 'test"):
        nuswide.read(raw, "tests")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@settings(max_examples=10)
@given(
    bits=st.lists(st.integers(0, 2**81 - 1), min_size=1, max_size=5),
    end=st.sampled_from(["\n", "\r\n"]),
    last=st.sampled_from(["", "\n", "\r\n\r\n"]),
)
def test_round_trip(scratch, bits, end, last):
    """Any labels and line ends."""
    images = [f"a b\\{i:04}_{i}.jpg" for i in range(len(bits))]
    labels = np.array([[b >> c & 1 for c in range(81)] for b in bits], np.int8)
    folders.write(scratch / "ImageList/TrainImagelist.txt", end.join(images) + last)
    for name, column in zip(catalog.nus().names, labels.T, strict=True):
        path = scratch / f"Groundtruth/TrainTestLabels/Labels_{name}_Train.txt"
        folders.write(path, end.join(map(str, column)) + last)
    manifest = nuswide.read(scratch, "train")
    assert manifest.keys.tolist() == [key(image) for image in images]
    np.testing.assert_array_equal(manifest.positives.dense(81), labels)


@settings(max_examples=40)
@given(
    file=st.sampled_from(
        [BEACH, TAGS, "ImageList/TrainImagelist.txt", "NUS_WID_Tags/TagList1k.txt"]
    ),
    data=st.data(),
)
def test_any_damage_is_read_or_named(raw, file, data):
    folders.check_damage(data, raw / file, lambda: nuswide.read(raw, "train_tags"))
