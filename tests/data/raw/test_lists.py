from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import raw_folders
import raw_folders_more
from hypothesis import given, settings
from hypothesis import strategies as st

from mlclip_jax.data.manifest import Manifest, Rows
from mlclip_jax.data.raw import coco, lists, voc
from mlclip_jax.errors import UserError
from mlclip_jax.labels import catalog
from mlclip_jax.labels.space import LabelSpace

COCO, VOC, CUB = catalog.coco(), catalog.voc(), catalog.cub()
SPACE = LabelSpace(names=("sky", "water", "cat", "map"), name="four")
KEYS = ("Flickr/actor/0001_2124494179.jpg", "Flickr/bus/0018_702409954.jpg",
        "Flickr/man/0215_702409954.jpg", "Flickr/zoo/0007_11.jpg")  # fmt: skip


def corpus(keys=KEYS, space=SPACE, **parts):
    rows = Rows.from_lists([[i % len(space)] for i in range(len(keys))])
    return Manifest("toy/train", space, np.array(keys, str), rows, **parts)


def write(folder, text, name="list.txt"):
    raw_folders.write_text(folder / name, text)
    return folder / name


def test_splc_lists_as_published(tmp_path):
    manifest = corpus(
        ["VOCdevkit/VOC2012/JPEGImages/2008_000008.jpg",
         "VOCdevkit/VOC2012/JPEGImages/2008_000003.jpg"], VOC)  # fmt: skip
    path = write(tmp_path, "2008_000003.jpg,14 18")  # no line end
    targets, index = lists.apply(manifest, lists.read_text(path, VOC))
    assert index.tolist() == [1] and index.dtype == np.int64 and targets.dtype == np.int8
    assert np.flatnonzero(targets[0] == 1).tolist() == [14, 18] and targets.sum() == 2
    manifest = corpus(["train2014/COCO_train2014_000000480023.jpg"], COCO)
    path = write(tmp_path, "COCO_train2014_000000480023.jpg,52\r\n")
    targets, index = lists.apply(manifest, lists.read_text(path, COCO))
    assert index.tolist() == [0] and COCO.names[int(targets[0].argmax())] == "hot dog"
    key = "CUB_200_2011/images/001.Black_footed_Albatross/Black_Footed_Albatross_0009_34.jpg"
    path = write(tmp_path, "001.Black_footed_Albatross/Black_Footed_Albatross_0009_34.jpg, 212\n")
    targets, index = lists.apply(corpus([key], CUB), lists.read_text(path, CUB))
    assert index.tolist() == [0] and np.flatnonzero(targets[0]).tolist() == [212]


def test_lmpt_lists_as_published_with_an_empty_row(tmp_path):
    manifest = corpus(["val2017/000000226111.jpg", "train2017/000000554625.jpg"], COCO)
    path = write(tmp_path, "train2017/000000554625.jpg 0 62 64 66\n\nval2017/000000226111.jpg\n")
    listed = lists.read_text(path, COCO, complete=True)
    targets, index = lists.apply(manifest, listed)
    assert index.tolist() == [1, 0]
    assert np.flatnonzero(targets[0] == 1).tolist() == [0, 62, 64, 66]
    assert (targets[0] == -1).sum() == 76 and (targets[1] == -1).all()
    assert listed.places == (1, 3)


def test_dbl_ids_take_the_labels_of_the_corpus(tmp_path):
    manifest = voc.read(raw_folders.voc(tmp_path / "voc"), "train2007")
    targets, index = lists.apply(manifest, lists.read_ids(write(tmp_path, "000026\n000012")))
    assert index.tolist() == [3, 0]
    np.testing.assert_array_equal(targets, manifest.label_matrix()[[3, 0]])
    manifest = coco.read(raw_folders.coco(tmp_path / "coco", year=2017), "train2017")
    path = write(tmp_path, "57\n480023\n", "img_id.pkl")
    assert lists.apply(manifest, lists.read_ids(path))[1].tolist() == [3, 0]
    path.write_bytes(pickle.dumps(["57", "480023"]))
    with pytest.raises(UserError, match=r"img_id.pkl"):
        lists.apply(manifest, lists.read_ids(path))


def test_lmpt_captions_as_published(tmp_path):
    key = "VOCdevkit/VOC2012/JPEGImages/2008_000023.jpg"
    text = "a bottle of beer and a candle on a table with pizza and a television."
    manifest = corpus(["VOCdevkit/VOC2012/JPEGImages/2008_000008.jpg", key], VOC)
    captioned = lists.with_captions(manifest, write(tmp_path, f"{key} {text}\n"))
    assert captioned.captions == ((), (text,)) and manifest.captions is None
    with pytest.raises(UserError, match=r"line 1: image .* has no caption"):
        lists.with_captions(manifest, write(tmp_path, f"{key} \n"))
    with pytest.raises(UserError, match=r"line 2: image .* is listed before, at line 1"):
        lists.with_captions(manifest, write(tmp_path, f"{key} {text}\n2008_000023.jpg x\n"))


def test_largeloss_arrays(tmp_path):
    names = np.array([r"bus\0018_702409954.jpg", "actor/0001_2124494179.jpg"])
    full = np.array([[1, 0, 0, 1], [0, 1, 0, 0]])
    np.save(tmp_path / "images.npy", names)
    for dtype in (np.float64, np.int64, bool):
        np.save(tmp_path / "labels.npy", full.astype(dtype))
        listed = lists.read_arrays(tmp_path / "images.npy", tmp_path / "labels.npy", SPACE)
        targets, index = lists.apply(corpus(), listed)
        assert index.tolist() == [1, 0]
        np.testing.assert_array_equal(targets, 2 * full - 1)
    np.save(tmp_path / "labels.npy", [[1, 0, -1, 0], [0, 1, 0, 0]])
    listed = lists.read_arrays(tmp_path / "images.npy", tmp_path / "labels.npy", SPACE)
    np.testing.assert_array_equal(listed.targets, [[1, 0, -1, 0], [0, 1, 0, 0]])


@pytest.mark.parametrize(
    ("names", "labels", "message"),
    [
        (["a", "b"], [[1, 0, 0]], r"labels.npy has the shape \[1, 3\].*need \[2, 4\]"),
        (["a"], [[1, 0, 0, 2]], "must hold 1, 0 and -1"),
        (["a"], [[1, 0, 0, np.nan]], "must hold 1, 0 and -1"),
        (["a"], [["1", "0", "0", "1"]], "must hold 1, 0 and -1"),
        ([1], [[1, 0, 0, 0]], "must hold names"),
        (np.array(["a"], object), [[1, 0, 0, 0]], "images.npy is no whole .npy array"),
        (["a"], np.array([[1, 0, 0, 0]], object), "labels.npy is no whole .npy array"),
        (np.zeros(0, "U1"), np.zeros((0, 4)), "images.npy lists no images"),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path, names, labels, message):
    np.save(tmp_path / "images.npy", names)
    np.save(tmp_path / "labels.npy", labels)
    with pytest.raises(UserError, match=message):
        lists.read_arrays(tmp_path / "images.npy", tmp_path / "labels.npy", SPACE)


def test_files_that_are_no_arrays_are_named(tmp_path):
    np.save(tmp_path / "labels.npy", np.eye(4))
    path = tmp_path / "images.npy"
    with pytest.raises(UserError, match=r"cannot read .*images.npy"):
        lists.read_arrays(path, tmp_path / "labels.npy", SPACE)
    array = (tmp_path / "labels.npy").read_bytes()
    huge = array.replace(b"(4, 4), }             ", b"(9999999999999999,), }")
    assert len(huge) == len(array) and huge != array
    for content in (b"", b"text", array[:100], huge):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"images.npy is no whole .npy array") as caught:
            lists.read_arrays(path, tmp_path / "labels.npy", SPACE)
        assert "allow_pickle" not in str(caught.value)
    np.savez(path.open("wb"), a=np.eye(2))
    with pytest.raises(UserError, match=r"images.npy is an archive"):
        lists.read_arrays(path, tmp_path / "labels.npy", SPACE)


def mldecoder(tmp_path, text, classes=None):
    classes = classes or {"train class": ["sky", "water"], "test class": ["cat"]}
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    return write(tmp_path, text, "data.csv"), tmp_path / "classes.json"


CSV = """filepath,label,split_name
actor/0001_2124494179.jpg,"['sky', 'water']",train
bus/0018_702409954.jpg,"['sky', 'cat']",train
man/0215_702409954.jpg,['cat'],train
zoo/0007_11.jpg,"['sky', 'cat']",val
"""


@pytest.mark.parametrize("text", [CSV, CSV.partition("\n")[2], CSV.rstrip()])
def test_mldecoder_files(tmp_path, text):
    files = mldecoder(tmp_path, text)
    manifest = lists.over_classes(corpus(aux={"x": Rows.from_lists([[0]] * 4)}), files[1])
    space = manifest.space
    assert space.names == ("sky", "water", "cat") and not manifest.positives.values.size
    assert space.subsets == {"seen": (0, 1), "unseen": (2,)} and not manifest.aux
    seen = lists.read_mldecoder(*files, space.select("seen"), split="train")
    # No sky nor water in the third: left out.
    assert seen.names == ("actor/0001_2124494179.jpg", "bus/0018_702409954.jpg")
    np.testing.assert_array_equal(seen.targets, [[1, 1], [1, -1]])
    targets, index = lists.apply(manifest, lists.read_mldecoder(*files, space, split="train"))
    assert index.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(targets, [[1, 1, -1], [1, -1, 1], [-1, -1, 1]])
    listed = lists.read_mldecoder(*files, space, split="val")
    np.testing.assert_array_equal(listed.targets, [[1, -1, 1]])


@pytest.mark.parametrize(
    ("text", "classes", "message"),
    [
        ("a.jpg,['sky']\n", None, "line 1: 2 columns"),
        ("a.jpg,['sky'],train\nb.jpg,sky,train", None, "line 2: 'sky' is no list of names"),
        ("a.jpg,[sky],train", None, "line 1: .* is no list of names"),
        ("a.jpg,[3],train", None, "line 1: .* is no list of names"),
        ("a.jpg," + "[" * 5000 + ",train", None, "line 1: .* is no list of names"),
        ("a.jpg,['skyy'],train", None, "line 1: unknown label 'skyy'; did you mean 'sky'"),
        ("a.jpg,\"['sky'],train", None, "line 1: not CSV"),
        ("a.jpg,['sky'],test", None, "no image of the split 'train' with one of the 4 labels"),
        ("a.jpg,['sky'],train", {"train class": ["sky"]}, "'test class'"),
        (
            "a.jpg,['sky'],train",
            {"train class": ["sky", "sea"], "test class": ["sea"]},
            r"classes.json, its classes: .*sea",
        ),
    ],
)
def test_malformed_mldecoder_files_are_named(tmp_path, text, classes, message):
    files = mldecoder(tmp_path, text, classes)
    with pytest.raises(UserError, match=message):
        lists.read_mldecoder(*files, SPACE, split="train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0007_11.jpg,3\n0007_12.jpg,1\n", r"list.txt, line 2: toy/train has no image .*0007_12"),
        ("other/0007_11.jpg,3\n", "line 1: toy/train has no image"),
        ("0007_11.jpg,3\nzoo/0007_11.jpg 1\n", "line 2: .* is listed before, at line 1"),
        ("\n0007_11.jpg,4\n", "line 2: '4' is no label number from 0 to 3"),
        ("0007_11.jpg,-1\n", "line 1: '-1' is no label number"),
        ("0007_11.jpg,1,2\n", "line 1: '1,2' is no label number"),
        ("0007_11.jpg,sky\n", "line 1: 'sky' is no label number"),
        ("0007_11.jpg,²\n", "line 1: '²' is no label number"),
        (",1\n", "line 1: a line must begin"),
        ("\n\n", "lists no images"),
    ],
)
def test_malformed_lists_are_named(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=message):
        lists.apply(corpus(), lists.read_text(path, SPACE))


def test_other_errors_are_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none.txt"):
        lists.read_text(tmp_path / "none.txt", SPACE)
    path = tmp_path / "latin.txt"
    path.write_bytes("ü.jpg,1".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.txt is not UTF-8"):
        lists.read_text(path, SPACE)
    with pytest.raises(UserError, match="line 1: 'a b' is not the id"):
        lists.read_ids(write(tmp_path, "a b\n"))
    with pytest.raises(ValueError, match="over 20 labels, but toy/train has 4"):
        lists.apply(corpus(), lists.read_text(write(tmp_path, "0007_11.jpg,3\n"), VOC))


def test_names_are_matched_by_whole_folders(tmp_path):
    manifest = corpus(["a/1.jpg", "b/1.jpg", "xa/1.jpg", "1.jpg"])

    def rows(name):
        return lists.apply(manifest, lists.read_ids(write(tmp_path, name)))[1].tolist()

    assert rows("a/1.jpg") == [0] and rows("xa/1.jpg") == [2]
    assert rows("1.jpg") == [3]  # an exact key, not one of four
    with pytest.raises(UserError, match="has 4 images with the name '1'"):
        rows("1")
    with pytest.raises(UserError, match=r"has no image with the name 'c/2.jpg'"):
        rows("c/2.jpg")
    manifest = corpus(["a/2.jpg", "b/2.jpg", "c/2.jpg"])
    assert rows("\ufeffdata\\nus\\b/2.jpg") == [1]
    with pytest.raises(UserError, match=r"has 3 images with the name '2.jpg'"):
        rows("2.jpg")


def test_splc_names_of_nus_are_rows_of_the_whole_list(tmp_path):
    def rows(text):
        return lists.apply(corpus(), lists.read_text(write(tmp_path, text), SPACE))[1].tolist()

    assert rows("2_702409954_02a15f03aa_m.jpg,0\n0_2124494179_aa_m.jpg,1\n") == [2, 0]
    for name in ("0_702409954_02a15f03aa_m.jpg", "123940_1158315062_02a15f03aa_m.jpg"):
        with pytest.raises(UserError, match=f"line 1: .* has no image .*{name}"):
            rows(f"{name},0\n")


def test_images_that_were_left_out_are_passed_over(tmp_path):
    manifest = corpus().without([0, 2])
    text = "zoo/0007_11.jpg,3\nactor/0001_2124494179.jpg,1\nFlickr/bus/0018_702409954.jpg,0\n"
    targets, index = lists.apply(manifest, lists.read_text(write(tmp_path, text), SPACE))
    assert index.tolist() == [1, 0]
    np.testing.assert_array_equal(targets, [[0, 0, 0, 1], [1, 0, 0, 0]])
    # Rows of the whole list, of which the first and the third are not there.
    text = "2_702409954_02a15f03aa_m.jpg,0\n3_11_aa_m.jpg,1\n1_702409954_bb.jpg,2\n"
    targets, index = lists.apply(manifest, lists.read_text(write(tmp_path, text), SPACE))
    assert index.tolist() == [1, 0] and targets.argmax(1).tolist() == [1, 2]
    _, index = lists.apply(manifest, lists.read_ids(write(tmp_path, "0007_11\n0215_702409954\n")))
    assert index.tolist() == [1]
    text = "".join(f"{key} picture {i}\n" for i, key in enumerate(KEYS))
    captions = lists.with_captions(manifest, write(tmp_path, text)).captions
    assert captions == (("picture 1",), ("picture 3",))
    # What is wrong in a list is so whether or not images are left out.
    for text, message in (
        ("zoo/0007_12.jpg,3\n", "line 1: toy/train has no image"),
        ("0_11_aa.jpg,3\n", "line 1: toy/train has no image"),
        (f"{KEYS[0]},3\n{KEYS[0]},3\n", "line 2: .* is listed before, at line 1"),
        (f"{KEYS[0]},3\n{KEYS[2]},3\n", r"all images of .*list\.txt were left out"),
    ):
        with pytest.raises(UserError, match=message):
            lists.apply(manifest, lists.read_text(write(tmp_path, text), SPACE))
    with pytest.raises(UserError, match=r"has 2 images with the name '1.jpg'"):
        part = corpus(["a/1.jpg", "b/1.jpg"]).without([0])
        lists.apply(part, lists.read_ids(write(tmp_path, "1.jpg")))


@settings(max_examples=50)
@given(
    st.dictionaries(st.integers(0, 99), st.lists(st.integers(0, 3), max_size=4), min_size=1),
    st.sampled_from([",", ", ", " "]),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.booleans(),
)
def test_any_list_reads_back(tmp_path_factory, images, comma, end, last, complete):
    manifest = corpus([f"train/{i:03d}.jpg" for i in range(100)])
    text = end.join(f"{i:03d}.jpg{comma}{' '.join(map(str, row))}" for i, row in images.items())
    path = write(tmp_path_factory.mktemp("lists"), text + end * last)
    targets, index = lists.apply(manifest, lists.read_text(path, SPACE, complete=complete))
    assert index.tolist() == list(images)
    expected = Rows.from_lists(images.values()).dense(4)
    np.testing.assert_array_equal(targets, 2 * expected - 1 if complete else expected)


@settings(max_examples=50)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_list_or_a_clear_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("bytes") / "list.txt"
    path.write_bytes(content)
    for read in (lambda: lists.read_text(path, SPACE), lambda: lists.read_ids(path)):
        try:
            lists.apply(corpus(), read())
        except UserError as error:
            assert "list.txt" in str(error)


FORMS = {
    "data.csv": lambda at: lists.read_mldecoder(
        at / "data.csv", at / "classes.json", SPACE, split="train"
    ),
    "images.npy": lambda at: lists.read_arrays(at / "images.npy", at / "labels.npy", SPACE),
}
FORMS |= {"classes.json": FORMS["data.csv"], "labels.npy": FORMS["images.npy"]}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    mldecoder(folder, CSV)
    np.save(folder / "images.npy", np.array(KEYS[:2]))
    np.save(folder / "labels.npy", np.eye(2, 4))
    raw_folders.write_text(folder / "captions.txt", "".join(f"{key} a sky\n" for key in KEYS))
    return folder


@settings(max_examples=80)
@given(file=st.sampled_from([*FORMS, "captions.txt"]), data=st.data())
def test_any_damage_is_read_or_named(published, file, data):
    def read():
        if file == "captions.txt":
            return lists.with_captions(corpus(), published / file)
        targets, index = lists.apply(corpus(), FORMS[file](published))
        assert targets.shape == (len(index), 4) and targets.dtype == np.int8
        return corpus().take(index)

    raw_folders_more.check_damage(data, published / file, read)
