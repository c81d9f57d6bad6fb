"""Labelled images from records and raw files alike, in workers too."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import pickle
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import raw_folders
import raw_folders_more

from mlclip_jax.data import assemble, builders, foreign, registry, sources
from mlclip_jax.data.manifest import Manifest
from mlclip_jax.data.pipeline import AugmentedSource, eval_batches, train_batches
from mlclip_jax.data.protocols import Labels, SparseTargets
from mlclip_jax.data.raw import coco, imagenet, voc
from mlclip_jax.data.sources import ImageConfig, ImageSource
from mlclip_jax.data.transforms import ImageError, Preprocess
from mlclip_jax.errors import UserError

SETTINGS = ImageConfig(resize="squash", interpolation="bilinear", augment="flip_rrc")


@pytest.fixture
def raw(tmp_path):
    return raw_folders.coco(tmp_path / "raw")


@pytest.fixture
def prepared(tmp_path, raw, monkeypatch):
    """The folder of the prepared corpus; its five images are in three files."""
    monkeypatch.setattr(builders, "_LEAST_ROWS", 2)
    manifest = coco.read(raw, "train2014")
    builders.prepare("coco", "train2014", manifest, raw, tmp_path / "out")
    return tmp_path / "out" / "coco"


def labelled(folder):
    """The training images with a label, in another order."""
    manifest, folder = assemble.open_part("coco", "train2014", str(folder))
    index = np.array([4, 0, 3])
    return assemble.LabelledPart(
        manifest, Labels(manifest.label_matrix()[index], index), "coco", "train2014", folder
    )


def same(one, two):
    return one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)


def test_examples_are_those_of_the_raw_folder(raw, prepared, caplog):
    with caplog.at_level(logging.INFO):
        files = sources.open_images(labelled(raw), SETTINGS, 16, train=True)
        records = sources.open_images(labelled(prepared), SETTINGS, 16, train=True)
    assert isinstance(files.reader, sources.FolderReader)
    assert isinstance(records.reader, sources.RecordReader)
    said = [line for line in caplog.messages if line.startswith("coco/train2014: images from")]
    assert len(said) == 2 and f"files in {raw}" in said[0] and "train2014/1.0.0" in said[1]
    assert isinstance(files, AugmentedSource) and len(files) == len(records) == 3
    keys = coco.read(raw, "train2014").keys
    exact = Preprocess(16, "squash", "bilinear", fast_decode=True)
    for i, row in enumerate((4, 0, 3)):
        assert same(files[i], records[i]) and files[i]["index"] == i
        np.testing.assert_array_equal(files[i]["image"], exact(raw / keys[row]))
        np.testing.assert_array_equal(files[i]["targets"], files.label_matrix()[i])
        rngs = [np.random.default_rng(i) for _ in range(2)]
        changed = [s.augmented(i, rng) for s, rng in zip((files, records), rngs, strict=True)]
        assert same(*changed) and not same(changed[0], files[i])
    assert files.captions == records.captions
    assert files.captions[1] == ("picture 480023, version 0.", "picture 480023, version 1.")


def test_evaluation_decodes_exactly_and_changes_nothing(raw):
    source = sources.open_images(labelled(raw), SETTINGS, 16, train=False)
    assert source.transform.preprocess == Preprocess(16, "squash", "bilinear")
    changed = source.augmented(0, np.random.default_rng(0))
    assert same(changed, source[0])
    default = sources.open_images(labelled(raw), registry.BenchmarkConfig(), 16, train=True)
    assert default.transform.preprocess == Preprocess(16, "clip", "bicubic", fast_decode=True)
    with pytest.raises(UserError, match="unknown augmentation 'flp'"):
        sources.open_images(labelled(raw), ImageConfig(augment="flp"), 16, train=True)


def test_pickled_sources(raw, prepared):
    for folder in (raw, prepared):
        source = sources.open_images(labelled(folder), SETTINGS, 16, train=True)
        source[0]  # with its files open
        copy = pickle.loads(pickle.dumps(source))
        assert all(same(copy[i], source[i]) for i in range(3))
        assert copy.captions is None


def test_workers_give_the_same_batches(prepared):
    source = sources.open_images(labelled(prepared), SETTINGS, 16, train=True)

    def batches(workers):
        with closing(train_batches(source, 3, seed=1, num_workers=workers)) as found:
            return list(itertools.islice(found, 3))

    for one, two in zip(batches(0), batches(2), strict=True):
        assert same(one, two)
    found = list(eval_batches(source, 2))
    assert [batch["index"].tolist() for batch in found] == [[0, 1], [2, 2]]


def test_targets_made_row_by_row(raw):
    part = labelled(raw)
    rows = part.manifest.positives
    sparse = Labels(SparseTargets(rows, None, 80)[part.labels.index], part.labels.index)
    reader, transform = sources.FolderReader("coco", raw), SETTINGS.transform(16, train=False)
    source, dense = (
        ImageSource(part.manifest, x, reader, transform) for x in (sparse, part.labels)
    )
    assert all(same(source[i], dense[i]) for i in range(3))
    np.testing.assert_array_equal(source.label_matrix(), dense.label_matrix())


def test_an_unreadable_file_is_an_image_error(raw, tmp_path):
    source = sources.open_images(labelled(raw), SETTINGS, 16, train=True)
    path = raw / source.keys[0]
    path.write_bytes(b"no image")
    with pytest.raises(ImageError, match=f"{source.keys[0]}: cannot be read"):
        source[0]
    path.unlink()
    with pytest.raises(ImageError, match=f"{path}: No such file"):
        source[0]
    raw_folders_more.vg(tmp_path / "vg")
    (tmp_path / "vg/VG_100K/2360596.jpg").unlink()
    with pytest.raises(ImageError, match="neither"):
        sources.FolderReader("vg", tmp_path / "vg").read(0, "2360596.jpg")


def test_records_of_other_data_are_refused(raw, prepared, tmp_path):
    part = labelled(prepared)
    saved = assemble.manifest_path(prepared, "train2014")
    manifest = Manifest.load(saved)
    manifest.take(np.array([1, 0, 2, 3, 4])).save(saved)
    with pytest.raises(UserError, match=r"not those of the manifest of coco/train2014.*prepare"):
        sources.open_images(labelled(prepared), SETTINGS, 16, train=True)
    # Whoever puts reader and manifest together himself is told of the first wrong record.
    reader = sources.RecordReader(sources.records_folder(prepared, "train2014"), "images")
    other = manifest.take(np.array([1, 0, 2, 3, 4]))
    source = ImageSource(other, part.labels, reader, SETTINGS.transform(16, train=True))
    source[0]
    with pytest.raises(UserError, match=r"record 0 of .* is the image .*not of one data set"):
        source[1]
    manifest.save(saved)
    # Labels may be others than the manifest's own: a benchmark selects and joins them.
    fewer = assemble.select_labels(manifest, manifest.space.select([0, 1]))
    sources.open_images(dataclasses.replace(part, manifest=fewer), SETTINGS, 16, train=True)


def test_damaged_prepared_data(prepared):
    part = labelled(prepared)
    folder = sources.records_folder(prepared, "train2014")

    def opened():
        return sources.open_images(part, SETTINGS, 16, train=True)

    first = sorted(folder.glob("*.array_record-*"))[0]
    good = first.read_bytes()
    content = bytearray(good)
    content[400] ^= 255  # in the first record
    first.write_bytes(content)
    source = opened()
    source[0], source[2]
    with pytest.raises(ImageError, match=r"record 0 of .* cannot be read .*prepare the data again"):
        source[1]
    first.unlink()
    with pytest.raises(ImageError, match="record 0 of"):
        opened()[1]
    first.write_bytes(good)
    metadata = (folder / "metadata.json").read_text()
    (folder / "metadata.json").write_text("{")
    with pytest.raises(UserError, match="was not written by `mlclip prepare`, or is damaged"):
        opened()
    (folder / "metadata.json").write_text(metadata)
    (folder / "features.json").write_text("{")
    with pytest.raises(UserError, match="is no data set that TFDS can read"):
        opened()
    (folder / "dataset_info.json").unlink()
    with pytest.raises(UserError, match=r"a manifest of train2014 but no records in .*1\.0\.0"):
        opened()


def test_a_benchmark_from_raw_and_prepared_data(raw, tmp_path):
    for part in ("train2014", "val2014"):
        builders.prepare("coco", part, coco.read(raw, part), raw, tmp_path / "out")
    found = []
    for folder in (raw, tmp_path / "out"):
        config = {"name": "coco_partial(0.5)", "data_dir": str(folder), "check_sizes": False}
        found.append(registry.load(config, image_size=8, splits=["test"]))
    one, two = found
    assert one.fingerprints == two.fingerprints
    for a, b in ((one.train, two.train), (one.evals["test"], two.evals["test"])):
        assert len(a) == len(b) > 0
        assert all(same(a[i], b[i]) for i in range(len(a)))


# ---- Data sets that TFDS's own builders prepared ---------------------------------------------


def tfds_folder(root, name, config, features, splits, *, file_format="array_record"):
    """A data set with the features of TFDS's builder, in an order of its own."""
    import tensorflow_datasets as tfds

    class Foreign(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.1.0")
        BUILDER_CONFIGS = (tfds.core.BuilderConfig(name=config),) if config else ()
        code_path = None

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features(tfds.features))
            )

        def _split_generators(self, manager):
            return {split: iter(records.items()) for split, records in splits.items()}

        def _generate_examples(self):
            raise NotImplementedError

    Foreign.name = name
    builder = Foreign(data_dir=root, file_format=file_format)
    builder.download_and_prepare()
    return Path(builder.data_path)


def objects_features(names, **more):
    def make(features):
        label = features.ClassLabel(names=names)
        return {
            "image": features.Image(encoding_format="jpeg"),
            "image/filename": features.Text(),
            "objects": features.Sequence({"label": label, **dict.fromkeys(more, np.bool_)}),
        }

    return make


def coco_records(raw, split):
    manifest = coco.read(raw, f"{split}2014")
    names = manifest.space.names
    return {
        str(number): {
            "image": (raw / manifest.keys[i]).read_bytes(),
            "image/filename": Path(manifest.keys[i]).name,
            "objects": [{"label": names[c], "is_crowd": False} for c in manifest.positives.row(i)],
        }
        for i, number in enumerate(raw_folders.COCO[split])
    }


def by_key(manifest):
    """Labels by key, names of classes as text."""
    matrix = manifest.label_matrix(difficult="ignore")
    return {
        key: {manifest.space.ids[c]: int(matrix[i, c]) for c in np.flatnonzero(matrix[i] >= 0)}
        for i, key in enumerate(manifest.keys.tolist())
    }


def check_link(raw, corpus, part, out, manifest):
    """The linked part has the labels and images of the raw one, in the order of the keys."""
    linked, folder = assemble.open_part(corpus, part, str(out))
    assert linked.name == manifest.name and linked.space == manifest.space
    assert by_key(linked) == by_key(manifest)
    assert linked.keys.tolist() == sorted(manifest.keys.tolist())
    reader = sources.open_reader(corpus, part, folder, linked)
    raw_reader = sources.FolderReader(corpus, raw)
    for row, key in enumerate(linked.keys.tolist()):
        assert reader.read(row, key) == raw_reader.read(row, key)
    return pickle.loads(pickle.dumps(reader))


@pytest.fixture
def tfds_coco(raw, tmp_path):
    names = sorted(coco.read(raw, "train2014").space.names)  # not in the order of ours
    splits = {"train": coco_records(raw, "train"), "validation": coco_records(raw, "val")}
    features = objects_features(names, is_crowd=False)
    return tfds_folder(tmp_path / "tfds", "coco", "2014", features, splits)


def test_tfds_coco(raw, tfds_coco, tmp_path):
    out = tmp_path / "out"
    counted = []
    done = foreign.link("coco", "train2014", tfds_coco, out, tick=counted.append)
    assert done == builders.Prepared(tfds_coco, 5, 0, written=True) and sum(counted) == 5
    foreign.link("coco", "val2014", tfds_coco, out)
    for part in ("train2014", "val2014"):
        check_link(raw, "coco", part, out, coco.read(raw, part))
    right = {"corpus": "coco", "part": "train2014", "folder": tfds_coco, "data_dir": out}
    for wrong, message in (
        ({"part": "train2017"}, "is coco/2014, which has not the images of coco/train2017"),
        (
            {"corpus": "voc", "part": "train2012"},
            "is coco/2014, which has not the images of voc/train2012",
        ),
        ({"corpus": "cub", "part": "train"}, "only coco, voc, imagenet can be taken from TFDS"),
        ({"folder": tmp_path}, "is no data set that TFDS can read"),
    ):
        with pytest.raises(UserError, match=message):
            foreign.link(**(right | wrong))


def test_a_link_that_no_longer_holds(raw, tfds_coco, tmp_path):
    out = tmp_path / "out"
    foreign.link("coco", "train2014", tfds_coco, out)
    manifest, folder = assemble.open_part("coco", "train2014", str(out))
    link = sources.link_path(folder, "train2014")
    content = json.loads(link.read_text())

    def opened(manifest=manifest, **changes):
        link.write_text(json.dumps(content | changes))
        return sources.open_reader("coco", "train2014", folder, manifest)

    opened()
    with pytest.raises(UserError, match="not those of the manifest of coco/train2014"):
        opened(manifest.take(np.arange(4)))
    with pytest.raises(UserError, match="has 5 records and had 4"):
        opened(order=content["order"][:4])
    with pytest.raises(UserError, match=r"has the splits .'train', 'validation'.*not .'test'"):
        opened(split="test")
    with pytest.raises(UserError, match="is damaged: run"):
        opened(order="x")
    with pytest.raises(UserError, match=r"record .* is the image"):
        opened(order=content["order"][::-1]).read(0, str(manifest.keys[0]))
    # Records of one's own take the place of the link.
    own = coco.read(raw, "train2014")
    builders.prepare("coco", "train2014", own, raw, out)
    assert not link.exists()
    with pytest.raises(UserError, match="holds records of coco/train2014 already"):
        foreign.link("coco", "train2014", tfds_coco, out)


def test_tfds_voc(tmp_path):
    raw, out = raw_folders.voc(tmp_path / "raw"), tmp_path / "out"
    names = voc.read(raw, "train2007").space.names
    splits = {
        split: {
            name: {
                "image": (raw / f"VOCdevkit/VOC2007/JPEGImages/{name}.jpg").read_bytes(),
                "image/filename": f"{name}.jpg",
                "objects": [{"label": k, "is_difficult": bool(d)} for k, d in objects],
            }
            for name, objects in raw_folders.VOC[part].items()
        }
        for split, part in (("train", "train"), ("validation", "val"), ("test", "test"))
    }
    features = objects_features(names, is_difficult=True)
    folder = tfds_folder(tmp_path / "tfds", "voc", "2007", features, splits)
    for part in ("train2007", "trainval2007", "test2007"):
        foreign.link("voc", part, folder, out)
        manifest = voc.read(raw, part)
        reader = check_link(raw, "voc", part, out, manifest)
        assert reader.read(0, min(manifest.keys.tolist()))[:2] == b"\xff\xd8"
        linked = assemble.open_part("voc", part, str(out))[0]
        order = np.argsort(manifest.keys)
        assert linked.fingerprint() == manifest.take(order).fingerprint()


def test_tfds_imagenet(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw_folders_more.imagenet(raw)
    # TFDS names an image by its file alone, whether it was in a folder or an archive.
    manifest = imagenet.read(raw, "val")
    reader = sources.FolderReader("imagenet", raw)
    records = {}
    for i, key in enumerate(manifest.keys.tolist()):
        label = manifest.space.ids[int(manifest.positives.row(i)[0])]
        name = {"label": label, "file_name": Path(key).name}
        records[key] = {"image": reader.read(i, key), **name}

    def features(features):
        label = features.ClassLabel(names=["n01440764", "n02012849", "n03126707"])
        image = features.Image(encoding_format="jpeg")
        return {"image": image, "label": label, "file_name": features.Text()}

    folder = tfds_folder(tmp_path / "tfds", "imagenet2012", None, features, {"validation": records})
    foreign.link("imagenet", "val", folder, out, raw=raw)
    linked, _ = assemble.open_part("imagenet", "val", str(out))
    assert linked.keys.tolist() == [k.replace(".tar/", "/") for k in manifest.keys.tolist()]
    assert linked.space == manifest.space and linked.positives == manifest.positives
    found = sources.open_reader("imagenet", "val", out / "imagenet", linked)
    for i, key in enumerate(linked.keys.tolist()):
        assert found.read(i, key) == reader.read(i, str(manifest.keys[i]))
    with pytest.raises(UserError, match="give with --raw the folder of synset_words"):
        foreign.link("imagenet", "val", folder, out)
    with pytest.raises(
        UserError, match="is imagenet2012, which has not the images of imagenet/21k"
    ):
        foreign.link("imagenet", "21k", folder, out, raw=raw)


def test_tfrecord_is_refused_with_the_mend(prepared, tmp_path):
    folder = sources.records_folder(prepared, "train2014")
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match=r"format tfrecord.*file_format='array_record'.*prepare"):
        sources.RecordReader(folder, "images")
