"""Open Images v4: verified image-level labels, seen and unseen classes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlclip_jax.data.manifest import Rows
from mlclip_jax.data.raw import openimages
from mlclip_jax.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1]))
import raw_folders_more as folders

TRAIN = "train-annotations-human-imagelabels.csv"
TEST = "test-annotations-human-imagelabels.csv"
NAMES = "class-descriptions.csv"
SEEN = "classes-trainable.txt"
TOP = "top_400_unseen.csv"
HEADER = "ImageID,Source,LabelName,Confidence\n"


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """One folder for all tests, which leave it as it was."""
    folder = tmp_path_factory.mktemp("open images")
    folders.openimages(folder)
    return folder


@pytest.fixture
def own(tmp_path):
    """A folder that the test may change."""
    folders.openimages(tmp_path)
    return tmp_path


def test_seen_classes_in_their_order_then_the_unseen_of_the_list(raw):
    """Candidates are the test's classes that are not seen, sorted: 0100nhbf, 0rare, 0sky2."""
    space = openimages.read(raw, "train").space
    assert space.ids == (*folders.OPEN_IMAGES_SEEN, "/m/0rare", "/m/0100nhbf")
    assert space.names == ("Head", "Sky", "Unused", "Rare, and with a comma", "Sprenger's tulip")
    assert space.subsets == {"seen": (0, 1, 2), "unseen": (3, 4)}
    for part in openimages.PARTS[1:]:
        assert openimages.read(raw, part).space == space


def test_confidence_0_and_1_are_negatives_and_positives(raw):
    manifest = openimages.read(raw, "train")
    assert manifest.keys.tolist() == [
        "train/0000000000000002.jpg",
        "train/0000000000000003.jpg",
        "train/000026e7ee790996.jpg",
        "train/fffe000000000001.jpg",
    ]
    assert manifest.label_matrix().tolist() == [
        [0, 1, 0, 0, 0],
        [1, 0, 0, 0, 1],
        [-1, 1, 0, 0, 0],
        [1, 0, 0, 0, 0],
    ]
    assert all((raw / key).is_file() for key in manifest.keys)


def test_labels_outside_the_space_are_dropped_and_their_images_stay(raw):
    manifest = openimages.read(raw, "test")
    assert len(manifest) == 3
    # /m/0sky2 of the second image is no label: it is neither seen nor chosen.
    assert manifest.positives == Rows.from_lists([[3], [], [1, 4]])
    assert manifest.negatives == Rows.from_lists([[1], [3], []])


def test_without_the_list_the_unseen_are_the_most_frequent(own, monkeypatch):
    (own / TOP).unlink()
    rows = "".join(f"00000000000000c{i},verification,/m/0sky2,1\n" for i in range(2))
    folders.write(own / TEST, (own / TEST).read_text() + rows)
    space = openimages.read(own, "validation").space
    # Two positives, then one each in the order of the ids; classes of one name differ by id.
    assert space.ids[3:] == ("/m/0sky2", "/m/0100nhbf", "/m/0rare")
    assert space.names[1] == "Sky (/m/01bqvp)" and space.names[3] == "Sky (/m/0sky2)"
    assert space.prompt_names[1] == space.prompt_names[3] == "Sky"
    monkeypatch.setattr(openimages, "UNSEEN", 1)
    assert openimages.read(own, "test").space.ids[3:] == ("/m/0sky2",)


def test_example_lines(own):
    lines = (own / TRAIN).read_text().splitlines()
    assert lines[0] == "ImageID,Source,LabelName,Confidence"
    assert lines[1] == "000026e7ee790996,verification,/m/04hgtk,0"
    assert lines[2] == "000026e7ee790996,crowdsource-verification,/m/01bqvp,1"
    assert (own / NAMES).read_text().startswith("/m/0100nhbf,Sprenger's tulip\n")
    assert (own / TOP).read_bytes().startswith(b"\xef\xbb\xbf1\r\n")


def test_annotations_may_lie_in_the_folder_of_their_part(own):
    expected = openimages.read(own, "train")
    for part in openimages.PARTS:
        name = f"{part}-annotations-human-imagelabels.csv"
        (own / name).rename(own / part / name)
    assert openimages.read(own, "train").fingerprint() == expected.fingerprint()


def test_the_last_of_several_lines_on_one_label_counts(own):
    image, other = "00000000000000d1", "00000000000000d2"
    rows = [(image, 1), (other, 0), (image, 0), (other, 1), (other, 1)]
    text = "".join(f"{name},verification,/m/04hgtk,{value}\n" for name, value in rows)
    folders.write(own / TRAIN, "\ufeff" + HEADER + text)
    assert openimages.read(own, "train").label_matrix()[:, 0].tolist() == [-1, 1]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (TRAIN, "", f"{TRAIN}, line 1: the columns should be ImageID,Source,LabelName,Confidence"),
        (TRAIN, "a,b\n", f"{TRAIN}, line 1: the columns should be"),
        (TRAIN, HEADER + "0000000000000002,x,/m/04hgtk\n", "line 2: 3 columns, not ImageID"),
        (TRAIN, HEADER + "\n\n000000000000002,x,/m/04hgtk,1\n", "line 4: '000000000000002' is no"),
        (TRAIN, HEADER + "0x00000000000002,x,/m/04hgtk,1\n", "line 2: '0x00000000000002' is no"),
        (TRAIN, HEADER + "0000000000000002,x,/m/nothing,1\n", "line 2: unknown label '/m/nothing'"),
        (TRAIN, HEADER + "0000000000000002,x,/m/04hgtk,0.7\n", "line 2: confidence '0.7'"),
        (TRAIN, HEADER + '0000000000000002,"x"y,/m/04hgtk,1\n', f"{TRAIN}, line 2: not CSV"),
        (TRAIN, b"\xff\xfe", f"{TRAIN} is not UTF-8 text"),
        (SEEN, "/m/04hgtk\n/m/none\n", f"{SEEN}, line 2: unknown label '/m/none'"),
        (SEEN, "/m/04hgtk\n/m/04hgtk\n", f"{SEEN}, line 2: .* stands on line 1 too"),
        (NAMES, "/m/04hgtk\n", f"{NAMES}, line 1: '/m/04hgtk' should be a class and its name"),
        (NAMES, "/m/a,A\n/m/a,B\n", f"{NAMES}, line 2: class '/m/a' stands there a second time"),
        (TOP, "0\n3\n", f"{TOP}, line 2: '3' is no candidate for an unseen class from 0 to 2"),
        (TOP, "0\n1\n0\n", f"{TOP}, line 3: 0 stands on line 1 too"),
    ],
)
def test_what_is_malformed_is_named(own, file, content, message):
    folders.write(own / file, content)
    with pytest.raises(UserError, match=message):
        openimages.read(own, "train")


@pytest.mark.parametrize("file", [TRAIN, TEST, NAMES, SEEN])
def test_a_missing_file_is_named(own, file):
    (own / file).unlink()
    with pytest.raises(UserError, match=f"cannot read .*{file}"):
        openimages.read(own, "train")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scratch")
    folders.openimages(folder)
    return folder


@settings(max_examples=30)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 3, 4]), st.booleans()),
        min_size=1,
        max_size=30,
        unique_by=lambda row: row[:2],
    )
)
def test_round_trip(scratch, rows):
    """Any ids and labels, in any order."""
    ids = openimages.read(scratch, "test").space.ids
    text = "".join(f"{i:016x},verification,{ids[c]},{int(yes)}\n" for i, c, yes in rows)
    folders.write(scratch / TRAIN, HEADER + text)
    manifest = openimages.read(scratch, "train")
    images = sorted({i for i, _, _ in rows})
    assert manifest.keys.tolist() == [f"train/{i:016x}.jpg" for i in images]
    expected = np.zeros((len(images), len(ids)), np.int8)
    for i, c, yes in rows:
        expected[images.index(i), c] = 1 if yes else -1
    np.testing.assert_array_equal(manifest.label_matrix(), expected)


@settings(max_examples=60)
@given(file=st.sampled_from([TRAIN, TEST, NAMES, SEEN, TOP]), data=st.data())
def test_any_damage_is_read_or_named(raw, file, data):
    folders.check_damage(data, raw / file, lambda: openimages.read(raw, "train"))


_MEASURE = """
import resource, sys
from pathlib import Path
from mlclip_jax.data.raw import openimages
before = resource.getrusage(resource.RUSAGE_SELF)
manifest = openimages.read(Path(sys.argv[1]), "train")
after = resource.getrusage(resource.RUSAGE_SELF)
entries = len(manifest.positives.values) + len(manifest.negatives.values)
print(len(manifest), entries, after.ru_maxrss, after.ru_utime - before.ru_utime)
"""


@pytest.mark.slow
def test_a_million_rows_in_little_memory(tmp_path):
    """A million rows over all 7,186 + 400 classes; a dense matrix of their images has 2.5 GB."""
    rng = np.random.default_rng(0)
    mids = [f"/m/{i:06x}" for i in range(9_780)]  # 7,186 seen and 2,594 others
    folders.write(tmp_path / NAMES, "".join(f"{mid},Class {mid}\n" for mid in mids))
    folders.write(tmp_path / SEEN, "".join(f"{mid}\n" for mid in mids[:7_186]))
    tests = "".join(f"{i:016x},verification,{mid},1\n" for i, mid in enumerate(mids))
    folders.write(tmp_path / TEST, HEADER + tests)
    images = np.sort(rng.integers(0, 2**63, 333_334)).repeat(3)[:1_000_000]
    # Three rows an image, whose classes are 7 apart and so differ.
    classes = (np.arange(1_000_000) * 7 + images) % 9_780
    with (tmp_path / TRAIN).open("w") as file:
        file.write(HEADER)
        for i, (image, c) in enumerate(zip(images.tolist(), classes.tolist(), strict=True)):
            file.write(f"{image:016x},verification,{mids[c]},{i % 2}\n")
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE, tmp_path], check=True, capture_output=True, text=True
    )
    found, entries, peak, seconds = result.stdout.split()
    assert int(found) == 333_334
    assert int(entries) == (classes < 7_586).sum()  # the first 400 others: all have one positive
    assert int(peak) < 1_000_000  # KiB, everything imported included; the bar is 2 GB
    assert float(seconds) < 60
