from __future__ import annotations

import numpy as np
import pytest
import raw_folders
import raw_folders_more
from hypothesis import given, settings
from hypothesis import strategies as st

from mlclip_jax.data.raw import common, voc
from mlclip_jax.errors import UserError
from mlclip_jax.labels import catalog

NAMES = catalog.voc().names
OBJECTS = st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 1)), max_size=5)


def matrix(manifest, **policy):
    return {
        key[-10:-4]: {NAMES[i]: v for i, v in enumerate(row.tolist()) if v != -1}
        for key, row in zip(manifest.keys.tolist(), manifest.label_matrix(**policy), strict=True)
    }


def sets(raw, name):
    return raw / "VOCdevkit/VOC2007/ImageSets/Main" / name


def test_the_published_example(tmp_path):
    folder = tmp_path / "VOCdevkit/VOC2012"
    main = folder / "ImageSets" / "Main"
    raw_folders.write_text(main / "train.txt", "2008_000008")
    raw_folders.write_text(main / "horse_train.txt", "2008_000008  1\r\n")
    raw_folders.write_text(main / "cow_train.txt", "2008_000008 -1\n\n")
    text = f"<annotation>{raw_folders.VOC_LINE}</annotation>"
    raw_folders.write_text(folder / "Annotations" / "2008_000008.xml", text)
    manifest = voc.read(tmp_path, "train2012")
    assert manifest.name == "voc2012/train"
    assert manifest.keys.tolist() == ["VOCdevkit/VOC2012/JPEGImages/2008_000008.jpg"]
    assert manifest.positives.row(0).tolist() == [12] == [NAMES.index("horse")]
    assert len(manifest.difficult.row(0)) == 0


def test_three_policies_for_difficult_objects(tmp_path):
    manifest = voc.read(raw_folders.voc(tmp_path), "train2007")
    sure = {
        "000012": {"horse": 1, "person": 1},
        "000017": {"dog": 1},
        "000023": {"bicycle": 1},
        "000026": {},
    }
    assert matrix(manifest, difficult="negative") == sure
    for policy, value in (("positive", 1), ("ignore", 0)):
        expected = sure | {"000017": {"dog": 1, "person": value}, "000026": {"car": value}}
        assert matrix(manifest, difficult=policy) == expected
    assert common.counts(manifest) == {"images": 4, "labelled": 4, "positives": 6}


def test_parts_follow_their_lists(tmp_path):
    raw_folders.voc(tmp_path)
    train, val, both = (voc.read(tmp_path, f"{s}2007") for s in ("train", "val", "trainval"))
    assert both.keys.tolist() == [*train.keys, *val.keys]
    assert voc.read(tmp_path, "test2007").name == "voc2007/test"
    assert set(voc.EXPECTED) == set(voc.PARTS)


def test_lists_by_class_may_be_absent(tmp_path):
    before = voc.read(raw_folders.voc(tmp_path), "train2007")
    for path in sets(tmp_path, "").glob("*_train.txt"):
        path.unlink()
    assert voc.read(tmp_path, "train2007").fingerprint() == before.fingerprint()


@settings(max_examples=20)
@given(st.dictionaries(st.from_regex(r"[0-9]{4}_[0-9]{6}", fullmatch=True), OBJECTS, max_size=5))
def test_any_corpus_reads_back(tmp_path_factory, images):
    raw = tmp_path_factory.mktemp("voc")
    raw_folders.write_voc(raw, {"val": images}, year=2012)
    manifest = voc.read(raw, "val2012")
    assert [key.rpartition("/")[2] for key in manifest.keys] == [f"{name}.jpg" for name in images]
    expected = np.full((len(images), 20), -1)
    for row, objects in enumerate(images.values()):
        for name, difficult in objects:
            value = 0 if difficult else 1
            expected[row, NAMES.index(name)] = max(value, expected[row, NAMES.index(name)])
    np.testing.assert_array_equal(manifest.label_matrix(difficult="ignore"), expected)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("train.txt", "000012\n000017\n000012\n", "line 3: image '000012' stands on line 1"),
        ("train.txt", "000012 1\n", "train.txt, line 1: '000012 1' is no image id"),
        ("train.txt", "../000012\n", "line 1: '../000012' is no image id"),
        ("train.txt", "000012\n999999\n", "cannot read .*999999.xml"),
        ("dog_train.txt", "000012 -1\n000017  0\n", "line 2: image '000017' has 0, .* says 1"),
        ("car_train.txt", "000012 -1\n000017 -1\n000023 -1\n000026  1", "line 4: .* says 0"),
        ("dog_train.txt", "000012 -1 3\n", 'line 1: .* should read "<image id> 1"'),
        ("dog_train.txt", "000012 yes\n", "line 1: .* should read"),
        ("dog_train.txt", "000099 -1\n", "line 1: image '000099' is not in the list"),
        ("dog_train.txt", "000012 -1\n000012 -1\n", "line 2: image '000012' stands here before"),
        ("dog_train.txt", "000012 -1\n", "dog_train.txt lacks the image '000017'"),
    ],
)  # fmt: skip
def test_malformed_lists_are_named(tmp_path, file, text, message):
    raw_folders.voc(tmp_path)
    sets(tmp_path, file).write_text(text)
    with pytest.raises(UserError, match=message):
        voc.read(tmp_path, "train2007")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<annotation>\n<object>", r"000012.xml, line 2: not XML"),
        (b"", "line 1: not XML"),
        (b"<html><body/></html>", "000012.xml, <html>: an annotation of VOC begins with"),
        (b"<annotation><object><name>hors</name></object></annotation>",
         "object 1: unknown label 'hors'; did you mean 'horse'"),
        (b"<annotation><object/></annotation>", "object 1: unknown label ''"),
        (b"<annotation><object><name>dog</name><difficult>2</difficult></object></annotation>",
         "object 1: <difficult> is '2'"),
        (b"<?xml version='1.0' encoding='nonsense'?><annotation/>", "unknown encoding"),
    ],
)  # fmt: skip
def test_malformed_annotations_are_named(tmp_path, content, message):
    raw_folders.voc(tmp_path)
    (tmp_path / "VOCdevkit/VOC2007/Annotations/000012.xml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        voc.read(tmp_path, "train2007")


def test_a_wrong_folder_is_named(tmp_path):
    raw_folders.voc(tmp_path)
    with pytest.raises(UserError, match="give the folder that holds VOCdevkit"):
        voc.read(tmp_path / "VOCdevkit", "train2007")
    with pytest.raises(UserError, match="part of voc 'test2012'"):
        voc.read(tmp_path, "test2012")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return raw_folders.voc(tmp_path_factory.mktemp("voc"))


@settings(max_examples=60)
@given(
    file=st.sampled_from(
        ["Annotations/000012.xml", "ImageSets/Main/train.txt", "ImageSets/Main/dog_train.txt"]
    ),
    data=st.data(),
)
def test_any_damage_is_read_or_named(raw, file, data):
    path = raw / "VOCdevkit/VOC2007" / file
    raw_folders_more.check_damage(data, path, lambda: voc.read(raw, "train2007"))
