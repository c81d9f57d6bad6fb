from __future__ import annotations

import json

import numpy as np
import pytest
import raw_folders
import raw_folders_more
from hypothesis import given, settings
from hypothesis import strategies as st

from mlclip_jax.data.raw import custom
from mlclip_jax.errors import UserError

WORD = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="|"), min_size=1)


def labels(manifest, of="positives"):
    rows = getattr(manifest, of)
    return [[manifest.space.names[i] for i in rows.row(row)] for row in range(len(manifest))]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_both_forms_say_the_same(tmp_path, suffix):
    raw = raw_folders.custom(tmp_path, suffix=suffix)
    train = custom.read(raw, "train")
    assert train.name == "custom/train" and train.space.name == "custom"
    assert train.space.names == ("car", "sea", "sky")
    assert train.keys.tolist() == [r["image"] for r in raw_folders.CUSTOM[:4]]
    assert labels(train) == [["sea", "sky"], ["sea"], ["car", "sky"], ["car"]]
    assert train.captions == (("two boats, off a beach",), ("a wave", "the sea"), (), ("a car",))
    assert train.negatives is None
    np.testing.assert_array_equal(train.label_matrix()[0], [-1, 1, 1])
    validation, test = custom.read(raw, "validation"), custom.read(raw, "test")
    assert labels(validation) == [[]] and labels(test) == [["sky"], ["car", "sea"]]
    # One order of labels for all parts, whichever of them occur.
    assert validation.space == test.space == train.space


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_without_splits_everything_is_for_training(tmp_path, suffix):
    raw = raw_folders.custom(tmp_path, suffix=suffix, splits=())
    assert len(custom.read(raw, "train")) == len(raw_folders.CUSTOM)
    with pytest.raises(UserError, match="no images of the part 'test': add a column 'split'"):
        custom.read(raw, "test")
    raw_folders.custom(tmp_path, suffix=suffix, splits=("train",) * 6 + ("test",))
    with pytest.raises(
        UserError, match=r"part 'validation': give .*, or leave it out of .*splits'"
    ):
        custom.read(raw, "validation")


def test_a_file_gives_the_order_of_labels(tmp_path):
    raw = raw_folders.custom(tmp_path)
    raw_folders.write_text(raw / "labels.txt", "sky\nsnow\nsea\ncar\n")
    manifest = custom.read(raw, "train")
    assert manifest.space.names == ("sky", "snow", "sea", "car")
    assert manifest.positives.row(0).tolist() == [0, 2]
    raw_folders.write_text(raw / "labels.txt", "skyy\nsea\ncar\n")
    with pytest.raises(UserError, match=r"labels.csv, line 2: unknown label 'sky'; .*'skyy'"):
        custom.read(raw, "train")


def test_negatives_leave_the_rest_unobserved(tmp_path):
    raw_folders.write_text(
        tmp_path / "labels.csv", "labels,image,negatives\ncat,1.jpg,dog\n,2.jpg,\n"
    )
    manifest = custom.read(tmp_path, "train")
    np.testing.assert_array_equal(manifest.label_matrix(), [[1, -1], [0, 0]])
    (tmp_path / "labels.csv").unlink()
    lines = [{"image": "1.jpg", "labels": ["cat"]}, {"image": "2.jpg", "labels": []}]
    lines[0]["negatives"] = ["dog", "owl"]
    raw_folders.write_custom(tmp_path, lines, suffix=".jsonl")
    np.testing.assert_array_equal(custom.read(tmp_path, "train").label_matrix()[1], [0, 0, 0])


def test_spreadsheets_oddities(tmp_path):
    text = '\ufeffimage , labels,captions\r\n./a b\\ü.jpg, cat | cat|dog ,"one,\n""two"""\r\n\r\n'
    raw_folders.write_text(tmp_path / "labels.csv", text)
    manifest = custom.read(tmp_path, "train")
    assert manifest.keys.tolist() == ["a b/ü.jpg"]
    assert labels(manifest) == [["cat", "dog"]]
    assert manifest.captions == (('one,\n"two"',),)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@settings(max_examples=40)
@given(st.data())
def test_any_folder_reads_back(tmp_path_factory, suffix, data):
    words = st.lists(WORD, max_size=3)
    path = st.lists(WORD.filter(lambda w: not set(w) & set("/\\:.")), min_size=1, max_size=3)
    images = data.draw(st.lists(path.map("/".join), unique=True, min_size=1, max_size=5))
    records = [
        {"image": image, "labels": data.draw(words), "captions": data.draw(words)}
        for image in images
    ]
    names = sorted({name for record in records for name in record["labels"]})
    raw = tmp_path_factory.mktemp("custom")
    raw_folders.write_custom(raw, records, suffix=suffix)
    if not names:
        with pytest.raises(UserError, match="no labels at all"):
            custom.read(raw, "train")
        return
    manifest = custom.read(raw, "train")
    assert manifest.keys.tolist() == images
    assert list(manifest.space.names) == names
    assert labels(manifest) == [sorted(set(record["labels"])) for record in records]
    assert [list(captions) for captions in manifest.captions] == [r["captions"] for r in records]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: there is no column 'image'"),
        ("image,label\n", "line 1: unknown column 'label'; did you mean 'labels'"),
        ("image;labels\na.jpg;cat\n", "line 1: columns are parted by ';': save it with commas"),
        ("image\tlabels\n", r"line 1: columns are parted by '\\t'"),
        ("image,labels\n", "labels.csv lists no images"),
        ("image,caption,labels\n", "unknown column 'caption'; did you mean 'captions'"),
        ("image,labels,image\n", "line 1: a column is there twice"),
        ("image,labels\na.jpg,cat\nb.jpg,dog,cat\n", "line 3: 3 columns, but .* names 2"),
        ("image,labels\na.jpg\n", "line 2: 1 columns"),
        ("image,labels\na.jpg,cat||dog\n", "line 2: an entry of 'labels' is empty"),
        ("image,labels\na.jpg,cat\nb.jpg,\na.jpg,dog\n", "line 4: image 'a.jpg' stands on line 2"),
        ("image,labels\na.jpg,cat\n./a.jpg,dog\n", "line 3: image 'a.jpg' stands on line 2"),
        ("image,labels\n/a.jpg,cat\n", "line 2: '/a.jpg' is no path"),
        ("image,labels\nC:\\a.jpg,cat\n", "line 2: .* is no path"),
        ("image,labels\nb/../../a.jpg,cat\n", "line 2: .* is no path"),
        ("image,labels\n,cat\n", "line 2: '' is no path"),
        ("image,labels\na\x00.jpg,cat\n", "line 2: .* is no path|line 2: not CSV"),
        ("image,labels,split\na.jpg,cat,trian\n", "line 2: unknown split .*mean 'train'"),
        ("image,labels,split\na.jpg,cat,\n", "line 2: unknown split ''"),
        ("image,labels,split\na.jpg,cat,test\n", "part 'train': give some the split 'train'$"),
        ("image,labels,negatives\na.jpg,cat,cat\n", "line 2: 'cat' is among"),
        ("image,labels\na.jpg,\n", "labels.csv has no labels at all: .*labels.txt"),
        ('image,labels\na.jpg,"cat\nb.jpg,dog\n', "line 2: not CSV .*: text in double quotes must"),
        ("image,labels\na.jpg," + "x" * 200_000, "line 2: not CSV"),
    ],
)  # fmt: skip
def test_malformed_csv_is_named(tmp_path, text, message):
    raw_folders.write_text(tmp_path / "labels.csv", text)
    with pytest.raises(UserError, match=message) as caught:
        custom.read(tmp_path, "train")
    assert "labels.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "b.jpg", "labels": ["cat"]', "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ('{"image": "b.jpg", "labels": [' + "1" * 5000 + "]}", "line 2: not JSON"),
        ("3", "line 2: each line must be an object by itself"),
        ("{", r"line 2: not JSON \(Expecting property .*, column 2\): each line must be an object"),
        (
            '{"image": "b.jpg", "image": "c.jpg", "labels": []}',
            "line 2: the key 'image' is there twice",
        ),
        ('{"image": "\\ud800.jpg", "labels": []}', "line 2: .* is no path"),
        (
            '{"image": "b.jpg", "labels": ["\\ud800"]}',
            "line 2: .* in 'labels' is no Unicode text",
        ),
        ('{"image": "b.jpg"}', "line 2: there is no column 'labels'"),
        ('{"image": 3, "labels": []}', "line 2: 'image' must be a string"),
        ('{"image": "b.jpg", "labels": "cat"}', "line 2: 'labels' must be a list of strings"),
        ('{"image": "b.jpg", "labels": [3]}', "line 2: 'labels' must be a list of strings"),
        ('{"image": "b.jpg", "labels": [" "]}', "line 2: an entry of 'labels' is empty"),
        ('{"image": "b.jpg", "labels": [], "id": 3}', "line 2: unknown column 'id'"),
        ('{"image": "a.jpg", "labels": []}', "line 2: image 'a.jpg' stands on line 1"),
    ],
)
def test_malformed_jsonl_is_named(tmp_path, line, message):
    first = json.dumps({"image": "a.jpg", "labels": ["cat"]})
    raw_folders.write_text(tmp_path / "labels.jsonl", f"{first}\n{line}\n")
    with pytest.raises(UserError, match=message) as caught:
        custom.read(tmp_path, "train")
    assert "labels.jsonl" in str(caught.value)


def test_folders_without_one_file_of_labels_are_named(tmp_path):
    with pytest.raises(UserError, match=r"has neither labels.csv nor labels.jsonl"):
        custom.read(tmp_path, "train")
    raw_folders.custom(tmp_path, suffix=".csv")
    raw_folders.custom(tmp_path, suffix=".jsonl")
    with pytest.raises(UserError, match="has both"):
        custom.read(tmp_path, "train")
    with pytest.raises(UserError, match="part of custom 'val'"):
        custom.read(tmp_path, "val")


@settings(max_examples=50)
@given(st.binary(max_size=200), st.sampled_from(["labels.csv", "labels.jsonl"]))
def test_any_bytes_are_labels_or_a_clear_error(tmp_path_factory, content, name):
    raw = tmp_path_factory.mktemp("bytes")
    (raw / name).write_bytes(b"image,labels\n" * (name == "labels.csv") + content)
    try:
        custom.read(raw, "train")
    except UserError as error:
        assert name in str(error)


@pytest.fixture(scope="module", params=[".csv", ".jsonl"])
def raw(request, tmp_path_factory):
    return raw_folders.custom(tmp_path_factory.mktemp("custom"), suffix=request.param)


@settings(max_examples=60)
@given(data=st.data())
def test_any_damage_is_read_or_named(raw, data):
    (path,) = raw.glob("labels.*")
    raw_folders_more.check_damage(data, path, lambda: custom.read(raw, "train"))
