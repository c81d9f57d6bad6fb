from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlclip_jax.data.manifest import Manifest, Rows
from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace

SPACE = LabelSpace(names=("cat", "dog", "traffic light"), ids=("17", "18", "10"), name="three")
ROWS = st.lists(st.sets(st.integers(0, 2**31 - 1), max_size=5), max_size=6)


def manifest(**changes):
    fields = {
        "name": "toy/train",
        "space": SPACE,
        "keys": np.array(["a/1.jpg", "b/1.jpg", "c ü.jpg"]),
        "positives": Rows.from_lists([[0], [], [1]]),
        "negatives": Rows.from_lists([[1], [], []]),
        "difficult": Rows.from_lists([[2], [0], []]),
        "captions": (("a cat", "one cat"), (), ("ein Hund ü",)),
        "aux": {"tags": Rows.from_lists([[900], [], [3, 7]])},
    }
    return Manifest(**fields | changes)


def same(a, b):
    return (
        a.name == b.name
        and a.space == b.space
        and a.keys.tolist() == b.keys.tolist()
        and a.positives == b.positives
        and a.negatives == b.negatives
        and a.difficult == b.difficult
        and a.captions == b.captions
        and a.aux == b.aux
        and a.left_out == b.left_out
    )


@given(ROWS)
def test_rows_hold_the_sets_they_are_made_of(sets):
    rows = Rows.from_lists([*row, *row] for row in sets)
    assert [rows.row(i).tolist() for i in range(len(sets))] == [sorted(row) for row in sets]
    assert rows.offsets.dtype == np.int64 and rows.values.dtype == np.int32
    images, values = rows.pairs()
    shuffled = np.random.default_rng(0).permutation(len(values))
    assert Rows.from_pairs(images[shuffled], values[shuffled], len(sets)) == rows


@given(ROWS.filter(len), st.data())
def test_rows_take_is_indexing_of_lists(sets, data):
    chosen = data.draw(st.lists(st.integers(0, len(sets) - 1), max_size=8))
    expected = Rows.from_lists(sets[i] for i in chosen)
    assert Rows.from_lists(sets).take(np.array(chosen)) == expected


def test_rows_as_a_matrix():
    dense = Rows.from_lists([[2, 0], [], [1]]).dense(3, -1)
    np.testing.assert_array_equal(dense, [[-1, 0, -1], [0, 0, 0], [0, -1, 0]])
    assert dense.dtype == np.int8


@pytest.mark.parametrize(
    ("offsets", "values", "message"),
    [
        ([0, 2], [1, 0], "ascend without repeats"),
        ([0, 2], [1, 1], "ascend without repeats"),
        ([0, 1], [-1], "negative"),
        ([0, 1], [0, 1], "offsets"),
        ([1, 2], [0, 1], "offsets"),
        ([0, 2, 1, 2], [0, 1], "offsets"),
        ([], [], "shapes"),
    ],
)
def test_rows_that_are_no_sets_are_refused(offsets, values, message):
    with pytest.raises(ValueError, match=message):
        Rows(np.array(offsets, np.int64), np.array(values, np.int32))


def test_rows_of_numbers_out_of_bounds_are_refused():
    with pytest.raises(ValueError, match="int64"):
        Rows(np.array([0, 1], np.int32), np.array([1], np.int32))
    for rows, values in (([2], [0]), ([-1], [0]), ([0], [-1]), ([0], [2**31])):
        with pytest.raises(ValueError, match="numbers"):
            Rows.from_pairs(np.array(rows), np.array(values), 2)


def test_label_matrix_of_explicit_negatives_and_difficult_objects():
    expected = {"positive": 1, "negative": -1, "ignore": 0}
    for policy, value in expected.items():
        matrix = manifest().label_matrix(difficult=policy)
        np.testing.assert_array_equal(matrix, [[1, -1, value], [value, 0, 0], [0, 1, 0]])
        assert matrix.dtype == np.int8
    with pytest.raises(UserError, match=r"policy .*'maybe'"):
        manifest().label_matrix(difficult="maybe")


def test_label_matrix_of_complete_labels():
    matrix = manifest(negatives=None).label_matrix(difficult="ignore")
    np.testing.assert_array_equal(matrix, [[1, -1, 0], [0, -1, -1], [-1, 1, -1]])


def test_take_by_position_and_by_mask():
    whole = manifest()
    part = whole.take(np.array([2, 0]))
    assert part.keys.tolist() == ["c ü.jpg", "a/1.jpg"]
    assert part.captions == (("ein Hund ü",), ("a cat", "one cat"))
    assert part.aux["tags"].row(0).tolist() == [3, 7]
    np.testing.assert_array_equal(part.label_matrix(), whole.label_matrix()[[2, 0]])
    assert same(whole.take(np.array([True, False, True])), whole.take(np.array([0, 2])))
    assert len(whole.take(np.zeros(3, bool))) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"left_out": {"0 ü.jpg": 0, "b/2.jpg": 3}},
        {"negatives": None, "difficult": None, "captions": None, "aux": {}},
    ],
    ids=["all", "left out", "least"],
)
def test_saved_and_pickled_manifests_are_the_same(tmp_path, changes):
    whole = manifest(**changes)
    whole.save(tmp_path / "m.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["m.npz"]
    for again in (Manifest.load(tmp_path / "m.npz"), pickle.loads(pickle.dumps(whole))):
        assert same(again, whole)
        assert again.fingerprint() == whole.fingerprint()


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["C"]), min_size=1).map(
                lambda t: t.replace("\\", "_").replace("/", "_").replace(".", "_")
            ),
            st.sets(st.integers(0, 2)),
        ),
        unique_by=lambda row: row[0],
    )
)
def test_any_manifest_survives_the_disk(tmp_path_factory, images):
    whole = Manifest(
        "any/train",
        SPACE,
        np.array([f"ü/{name}" for name, _ in images], str),
        Rows.from_lists(labels for _, labels in images),
        captions=tuple((name,) * len(labels) for name, labels in images),
    )
    path = tmp_path_factory.mktemp("any") / "m.npz"
    whole.save(path)
    assert same(Manifest.load(path), whole)


@given(st.data())
def test_images_left_out_keep_their_rows(data):
    keys = [f"{i}.jpg" for i in range(data.draw(st.integers(1, 9)))]
    whole = Manifest("toy/train", SPACE, np.array(keys), Rows.from_lists([[0]] * len(keys)))
    rows = data.draw(st.sets(st.integers(0, len(keys) - 1)))
    part = whole.without(rows)
    assert part.keys.tolist() == [key for i, key in enumerate(keys) if i not in rows]
    assert list(part.left_out.items()) == [(keys[i], i) for i in sorted(rows)]
    annotated, index = part.annotated()
    assert annotated.tolist() == keys and index.dtype == np.int64
    assert [i for i, row in enumerate(index) if row == -1] == sorted(rows)
    assert part.keys[index[index >= 0]].tolist() == part.keys.tolist()
    assert (
        part.fingerprint() == whole.take(~np.isin(np.arange(len(keys)), list(rows))).fingerprint()
    )
    assert part.take(np.arange(len(part))).left_out == {}
    if rows:
        with pytest.raises(ValueError, match="left out already"):
            part.without([0])


def test_manifests_of_before_there_was_left_out(tmp_path):
    manifest().save(tmp_path / "m.npz")
    arrays = dict(np.load(tmp_path / "m.npz"))
    text = json.loads(arrays["text"].tobytes())
    assert text.pop("left_out") == {}
    arrays["text"] = np.frombuffer(json.dumps(text).encode(), np.uint8)
    np.savez(tmp_path / "old.npz", **arrays)
    assert same(Manifest.load(tmp_path / "old.npz"), manifest())


def test_fingerprint_sees_keys_and_labels_only():
    whole = manifest()
    wider = np.array([*whole.keys, "x" * 50])[:3]
    assert manifest(keys=wider, name="n", captions=None).fingerprint() == whole.fingerprint()
    others = [
        {"keys": np.array(["a/1.jpg", "b/2.jpg", "c ü.jpg"])},
        {"positives": Rows.from_lists([[0], [], [2]])},
        {"negatives": None},
        {"difficult": None},
        {"aux": {}},
        {"aux": {"other": whole.aux["tags"]}},
        {"space": LabelSpace(names=SPACE.names, name="three")},
    ]
    prints = {manifest(**changes).fingerprint() for changes in others}
    assert len(prints) == len(others) and whole.fingerprint() not in prints


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": np.array(["a.jpg", "b.jpg", "a.jpg"])}, "'a.jpg' occurs more than once"),
        ({"keys": np.array(["a.jpg", "", "b.jpg"])}, "'' is no path"),
        ({"keys": np.array(["a.jpg", "/b.jpg", "c.jpg"])}, "'/b.jpg' is no path"),
        ({"keys": np.array(["a.jpg", "c/../../b", "c.jpg"])}, "is no path"),
        ({"keys": np.array(["a.jpg", "c\\b", "c.jpg"])}, "is no path"),
        ({"keys": np.array(["a.jpg", "c\nb", "c.jpg"])}, "is no path"),
        ({"keys": np.array(["a.jpg", "c\udc80b", "c.jpg"])}, "is no path"),
        ({"keys": np.array(["a", "b", "c"], object)}, "unicode"),
        ({"keys": np.array(["a.jpg", "b.jpg"])}, "3 positives for 2 images"),
        ({"captions": ()}, "0 captions for 3 images"),
        ({"aux": {"tags": Rows.from_lists([[1]])}}, "1 aux.tags for 3"),
        ({"positives": Rows.from_lists([[0], [], [3]])}, "class number 3 among the positives"),
        ({"negatives": Rows.from_lists([[0], [], []])}, "'a/1.jpg' has 'cat' among its positives"),
        ({"difficult": Rows.from_lists([[1], [], []])}, "negatives and its difficult"),
        ({"left_out": {"a/1.jpg": 0}}, "'a/1.jpg' occurs more than once"),
        ({"left_out": {"/d.jpg": 0}}, "'/d.jpg' is no path"),
        ({"left_out": {"d.jpg": 4}}, "are no rows of images that are left out"),
        ({"left_out": {"d.jpg": -1}}, "are no rows of images that are left out"),
        ({"left_out": {"d.jpg": 1, "e.jpg": 1}}, "are no rows of images that are left out"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message.replace("\\", ".")):
        manifest(**changes)


def test_dots_within_a_name_are_no_way_out():
    assert len(manifest(keys=np.array(["a..jpg", "..b/c", "d../e"]))) == 3


def test_a_manifest_that_is_not_whole_is_refused(tmp_path):
    path = tmp_path / "m.npz"
    with pytest.raises(UserError, match=r"cannot read the manifest .*m\.npz"):
        Manifest.load(path)
    manifest().save(path)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:-30]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"m\.npz is no whole manifest"):
            Manifest.load(path)
    np.savez(path.open("wb"), text=np.frombuffer(json.dumps({"format": 99}).encode(), np.uint8))
    with pytest.raises(UserError, match="format 99"):
        Manifest.load(path)
    np.savez(path.open("wb"), text=np.array([{"a": 1}], object))
    with pytest.raises(UserError, match="no whole manifest"):
        Manifest.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.npz"
    manifest().save(path)
    before = path.read_bytes()

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        manifest(name="other").save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.npz"]
