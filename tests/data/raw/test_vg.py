"""VG-200: the lists and the index of SSGRL, images in two folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlclip_jax.data.manifest import Rows
from mlclip_jax.data.raw import vg
from mlclip_jax.errors import UserError
from mlclip_jax.labels import catalog

sys.path.insert(0, str(Path(__file__).parents[1]))
import raw_folders_more as folders

INDEX = "vg_category_500_labels_index.json"
TRAIN = "train_list_500.txt"


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """One folder for all tests, which leave it as it was."""
    folder = tmp_path_factory.mktemp("vg")
    folders.vg(folder)
    return folder


@pytest.fixture
def own(tmp_path):
    """A folder that the test may change."""
    folders.vg(tmp_path)
    return tmp_path


def test_classes_from_200_on_are_dropped_and_images_stay(raw):
    manifest = vg.read(raw, "train")
    assert manifest.keys.tolist() == ["2360596.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert manifest.positives == Rows.from_lists([[3, 17], [0], [199], []])
    assert manifest.space == catalog.vg200() and manifest.negatives is None
    assert vg.read(raw, "test").keys.tolist() == ["4.jpg", "5.jpg"]


def test_example_lines(raw):
    assert (raw / TRAIN).read_text().splitlines()[0] == "2360596.jpg"
    assert (raw / INDEX).read_text().startswith('{"2360596.jpg":[3, 17, 421]')


def test_images_are_found_in_both_folders(raw):
    paths = [vg.image_path(raw, key) for key in vg.read(raw, "train").keys]
    assert [path.parent.name for path in paths] == ["VG_100K", "VG_100K_2"] * 2
    assert all(path.is_file() for path in paths)
    with pytest.raises(UserError, match=r"VG_100K/9.jpg nor .*VG_100K_2/9.jpg"):
        vg.image_path(raw, "9.jpg")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (TRAIN, "1.jpg\r\n2.jpg\r\n1.jpg", "list_500.txt, line 3: '1.jpg' stands on line 1 too"),
        (TRAIN, "1.jpg\n\n77.jpg\n", f"list_500.txt, line 3: '77.jpg' is not in {INDEX}"),
        (TRAIN, "../1.jpg\n", "list_500.txt, line 1: .* is no path of an image"),
        (TRAIN, b"\xff\n", "list_500.txt is not UTF-8"),
        (INDEX, "[1]", f"{INDEX}, .*an object with the field '2360596.jpg'"),
        (INDEX, '{"2360596.jpg": 3}', f"{INDEX}, .*2360596.jpg: '3' is no list"),
        (INDEX, '{"2360596.jpg": [500]}', f"{INDEX}, 2360596.jpg: '500' is no class from 0 to"),
        (INDEX, '{"2360596.jpg": [3], "2360596.jpg": [4]}', "key '2360596.jpg' is there twice"),
        (INDEX, '{"2360596.jpg": [true]}', "'True' is no class"),
        (INDEX, '{"2360596.jpg": [3,\n}', f"{INDEX}, line 2: not JSON"),
    ],
)
def test_what_is_malformed_is_named(own, file, content, message):
    folders.write(own / file, content)
    with pytest.raises(UserError, match=message):
        vg.read(own, "train")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@settings(max_examples=30)
@given(
    classes=st.lists(st.sets(st.integers(0, 499)), min_size=1, max_size=8),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_round_trip(scratch, classes, end):
    names = [f"{i}.jpg" for i in range(len(classes))]
    folders.write(scratch / TRAIN, end.join(names))
    index = {name: sorted(found) for name, found in zip(names, classes, strict=True)}
    folders.write(scratch / INDEX, json.dumps(index))
    manifest = vg.read(scratch, "train")
    assert manifest.keys.tolist() == names
    assert manifest.positives == Rows.from_lists([{i for i in f if i < 200} for f in classes])


@settings(max_examples=60)
@given(file=st.sampled_from([TRAIN, INDEX]), data=st.data())
def test_any_damage_is_read_or_named(raw, file, data):
    folders.check_damage(data, raw / file, lambda: vg.read(raw, "train"))
