from __future__ import annotations

import json

import pytest
import raw_folders
import raw_folders_more
from hypothesis import given, settings
from hypothesis import strategies as st

from mlclip_jax.data.raw import coco, common
from mlclip_jax.errors import UserError
from mlclip_jax.labels import catalog

IDS = [int(number) for number in catalog.coco().ids]


def names(manifest, row):
    return [manifest.space.names[i] for i in manifest.positives.row(row)]


def instances(tmp_path, part="train2014"):
    return tmp_path / "annotations" / f"instances_{part}.json"


def edit(tmp_path, change):
    """The tiny corpus with its parsed train file changed in place."""
    raw_folders.coco(tmp_path)
    content = json.loads(instances(tmp_path).read_text())
    change(content)
    instances(tmp_path).write_text(json.dumps(content))


def test_the_published_example(tmp_path):
    raw_folders.write_text(instances(tmp_path), raw_folders.COCO_LINE)
    manifest = coco.read(tmp_path, "train2014")
    assert manifest.name == "coco2014/train"
    assert manifest.keys.tolist() == ["train2014/COCO_train2014_000000480023.jpg"]
    assert names(manifest, 0) == ["hot dog"]
    assert manifest.positives.row(0).tolist() == [52]
    assert manifest.captions is None and manifest.negatives is None


def test_crowds_count_empty_images_stay_and_ids_have_gaps(tmp_path):
    manifest = coco.read(raw_folders.coco(tmp_path), "train2014")
    assert [int(key[-16:-4]) for key in manifest.keys] == [480023, 9, 1000, 57, 8]
    labels = [names(manifest, row) for row in range(5)]
    assert labels == [["hot dog"], ["person"], [], ["person", "toothbrush"], ["car"]]
    matrix = manifest.label_matrix()
    assert matrix.shape == (5, 80) and matrix[3, 79] == 1 and (matrix[2] == -1).all()
    assert common.counts(manifest) == {"images": 5, "labelled": 4, "positives": 5}


def test_captions_in_the_order_of_their_file(tmp_path):
    manifest = coco.read(raw_folders.coco(tmp_path), "val2014")
    assert manifest.captions[1] == ("picture 73, version 0.", "picture 73, version 1.")
    raw_folders.write_json(
        tmp_path / "annotations" / "captions_val2014.json",
        {"annotations": [{"image_id": 74, "id": 1, "caption": "a bench\n"}]},
    )
    assert coco.read(tmp_path, "val2014").captions == ((), (), ("a bench",))


def test_2017_has_its_own_names(tmp_path):
    manifest = coco.read(raw_folders.coco(tmp_path, year=2017), "val2017")
    assert manifest.name == "coco2017/val"
    assert manifest.keys.tolist()[0] == "val2017/000000000042.jpg"


@settings(max_examples=30)
@given(
    st.dictionaries(
        st.integers(1, 10**6), st.lists(st.tuples(st.sampled_from(IDS), st.integers(0, 1)))
    )
)
def test_any_corpus_reads_back(tmp_path_factory, images):
    raw = tmp_path_factory.mktemp("coco")
    files = {number: f"{number:012d}.jpg" for number in images}
    pairs = [(number, *entry) for number, entries in images.items() for entry in entries]
    raw_folders.write_coco(raw, "train2017", files, reversed(pairs))
    manifest = coco.read(raw, "train2017")
    assert manifest.keys.tolist() == [f"train2017/{name}" for name in files.values()]
    for row, entries in enumerate(images.values()):
        assert manifest.positives.row(row).tolist() == sorted({IDS.index(c) for c, _ in entries})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), r"top level: .*'images'"),
        (lambda c: c.update(annotations={}), r"annotations: '{}' is no list"),
        (lambda c: c["images"][1].pop("id"), r"images\[1\]: .*'id'"),
        (lambda c: c["images"].insert(0, 3), r"images\[0\]: an object"),
        (lambda c: c["images"][1].update(id="9"), r"images\[1\].id: '9' is no int"),
        (lambda c: c["images"][1].update(id=True), r"images\[1\].id: 'True' is no int"),
        (lambda c: c["images"][1].update(id=57), r"images\[3\].id: image 57 is listed before"),
        (lambda c: c["images"][1].update(file_name="../x.jpg"), r"images\[1\].file_name: '../x"),
        (
            lambda c: c["images"][1].update(file_name="\ud800"),
            r"images\[1\].file_name: .* no path",
        ),
        (
            lambda c: c["images"][1].update(file_name=c["images"][0]["file_name"]),
            r"images\[1\].file_name: 'COCO_train2014_000000480023.jpg' is images\[0\] too",
        ),
        (lambda c: c["annotations"][2].update(image_id=4), r"\[2\].image_id: image 4 is not among"),
        (lambda c: c["annotations"][2].update(category_id=12), r"\[2\].category_id: .* 12"),
        (lambda c: c["annotations"][2].pop("category_id"), r"annotations\[2\]: .*'category_id'"),
        (lambda c: c["categories"][0].update(name="car"), "'car', but in COCO it is 'person'"),
        (lambda c: c["categories"][0].update(id=91), "but in COCO it is None"),
    ],
)
def test_malformed_content_is_named(tmp_path, change, message):
    edit(tmp_path, change)
    with pytest.raises(UserError, match=message) as caught:
        coco.read(tmp_path, "train2014")
    assert "instances_train2014.json" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"line 1: not JSON \(Expecting value, column 1\)"),
        (b'{"images": [\n{"id": 4,', "line 2: not JSON"),
        (b"[]", "top level: an object"),
        (b"[" * 100_000, "no annotation file"),
        (b'{"images": [' + b"1" * 10_000 + b"]}", "no annotation file"),
        (b'{"images": "\xff"}', "not UTF-8"),
        (b'{"images": [{"id": 4, "id": 5}]}', "an object: the key 'id' is there twice"),
    ],
)
def test_files_that_are_not_json_are_named(tmp_path, content, message):
    raw_folders.coco(tmp_path)
    instances(tmp_path).write_bytes(content)
    with pytest.raises(UserError, match=rf"instances_train2014.json.*{message}"):
        coco.read(tmp_path, "train2014")


def test_missing_files_and_unknown_parts_are_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*instances_val2014.json"):
        coco.read(tmp_path, "val2014")
    with pytest.raises(UserError, match="part of coco 'val2015'; did you mean"):
        coco.read(tmp_path, "val2015")
    raw_folders.coco(tmp_path)
    path = tmp_path / "annotations" / "captions_val2014.json"
    raw_folders.write_json(path, {"annotations": [{"image_id": 3, "caption": "x"}]})
    with pytest.raises(UserError, match=r"captions.*annotations\[0\].image_id: image 3"):
        coco.read(tmp_path, "val2014")
    raw_folders.write_json(path, {"annotations": [{"image_id": 42, "caption": "half \ud83d"}]})
    with pytest.raises(UserError, match=r"captions.*annotations\[0\].caption: .* no Unicode text"):
        coco.read(tmp_path, "val2014")


def test_outlines_are_dropped_while_parsing(tmp_path, monkeypatch):
    """They are most of the file: tens of millions of numbers in the real ones."""
    read_json, kept = common.read_json, []

    def spy(*args, **kwargs):
        kept.append(read_json(*args, **kwargs))
        return kept[-1]

    monkeypatch.setattr(coco, "read_json", spy)
    coco.read(raw_folders.coco(tmp_path), "train2014")
    assert "segmentation" in instances(tmp_path).read_text()
    assert kept[0]["annotations"] and "segmentation" not in json.dumps(kept[0])


def test_published_sizes_are_compared(tmp_path):
    manifest = coco.read(raw_folders.coco(tmp_path), "val2014")
    assert common.differences(manifest, {"images": 3, "labelled": 2}) == []
    assert common.differences(manifest, coco.EXPECTED["val2014"]) == [
        "coco2014/val: 3 images, but 40,504 are published",
        "coco2014/val: 2 labelled, but 40,137 are published",
    ]
    assert set(coco.EXPECTED) == set(coco.PARTS)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return raw_folders.coco(tmp_path_factory.mktemp("coco"))


@settings(max_examples=60)
@given(
    file=st.sampled_from(
        ["annotations/instances_train2014.json", "annotations/captions_train2014.json"]
    ),
    data=st.data(),
)
def test_any_damage_is_read_or_named(raw, file, data):
    path = raw / file
    raw_folders_more.check_damage(data, path, lambda: coco.read(raw, "train2014"))
