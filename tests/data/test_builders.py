"""Prepared data: record i is row i of the manifest, and nothing half-written is taken for whole."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import raw_folders
import raw_folders_more
from PIL import Image

from mlclip_jax.data import builders, sources
from mlclip_jax.data.assemble import manifest_path
from mlclip_jax.data.manifest import Manifest
from mlclip_jax.errors import UserError

CORPORA = {
    "coco": (raw_folders.coco, ("train2014", "val2014")),
    "voc": (raw_folders.voc, ("train2007", "trainval2007", "test2007")),
    "custom": (raw_folders.custom, ("train", "validation", "test")),
    "nuswide": (raw_folders_more.nuswide, ("all", "train", "test_tags")),
    "cub": (raw_folders_more.cub, ("train", "test")),
    "vg": (raw_folders_more.vg, ("train", "test")),
    "openimages": (raw_folders_more.openimages, ("train", "validation", "test")),
    "imagenet": (raw_folders_more.imagenet, ("train", "val")),
}


@pytest.fixture(autouse=True)
def two_images_a_file(monkeypatch):
    monkeypatch.setattr(builders, "_LEAST_ROWS", 2)


def read(corpus, part, raw):
    return importlib.import_module(f"mlclip_jax.data.raw.{corpus}").read(raw, part)


@pytest.fixture
def coco(tmp_path):
    """The raw folder and a function that prepares its five training images in three files."""
    raw = raw_folders.coco(tmp_path / "raw")

    def prepare(**options):
        manifest = read("coco", "train2014", raw)
        return builders.prepare("coco", "train2014", manifest, raw, tmp_path / "out", **options)

    prepare.raw, prepare.folder = raw, tmp_path / "out" / "coco"
    prepare.saved = manifest_path(prepare.folder, "train2014")
    prepare.final = sources.records_folder(prepare.folder, "train2014")
    return prepare


def check(raw, corpus, part, folder, manifest):
    """Compares all records with the manifest and the raw images."""
    saved = Manifest.load(manifest_path(folder, part))
    assert saved.fingerprint() == manifest.fingerprint()
    assert saved.captions == manifest.captions and saved.space == manifest.space
    records = sources.open_records(sources.records_folder(folder, part), sources.SPLIT)
    assert len(records) == len(manifest)
    raw_reader = sources.FolderReader(corpus, raw)
    reader = sources.open_reader(corpus, part, folder, saved)
    assert isinstance(reader, sources.RecordReader)
    rows = {
        name: found
        for name in ("positives", "negatives", "difficult")
        if (found := getattr(manifest, name)) is not None
    } | {f"aux_{name}": found for name, found in manifest.aux.items()}
    captions = {"captions"} if manifest.captions is not None else set()
    for i, key in enumerate(manifest.keys.tolist()):
        record = records[i]
        assert set(record) == {"image", "key", *rows, *captions}
        assert record["key"].decode() == key
        assert record["image"] == raw_reader.read(i, key) == reader.read(i, key)
        for name, found in rows.items():
            assert [int(n) for n in record[name]] == found.row(i).tolist()
        if captions:
            assert tuple(text.decode() for text in record["captions"]) == manifest.captions[i]


@pytest.mark.parametrize("corpus", CORPORA)
def test_records_are_the_rows_of_the_manifest(tmp_path, corpus):
    make, parts = CORPORA[corpus]
    raw, out = tmp_path / "raw", tmp_path / "out"
    make(raw)
    for part in parts:
        manifest = read(corpus, part, raw)
        counted = []
        done = builders.prepare(corpus, part, manifest, raw, out, tick=counted.append)
        folder = out / corpus
        assert done == builders.Prepared(
            sources.records_folder(folder, part), len(manifest), 0, written=True
        )
        assert sum(counted) == len(manifest)
        check(raw, corpus, part, folder, manifest)
        files = [path.name for path in done.folder.glob("*.array_record-*")]
        assert len(files) == -(-len(manifest) // 2)
    left = {path.name for path in (out / corpus).iterdir()}
    assert left == {
        name for part in parts for name in (part, f"{part}.manifest.npz", f".{part}.lock")
    }


def test_classes_of_imagenet_21k(tmp_path, monkeypatch):
    monkeypatch.setattr(builders, "_MOST_FILES", 2)
    raw_folders_more.imagenet21k(tmp_path / "raw")
    manifest = read("imagenet", "21k", tmp_path / "raw")
    builders.prepare("imagenet", "21k", manifest, tmp_path / "raw", tmp_path / "out")
    check(tmp_path / "raw", "imagenet", "21k", tmp_path / "out" / "imagenet", manifest)


def test_tfds_itself_prepares_the_same(tmp_path, coco):
    import tensorflow_datasets as tfds

    final = coco().folder
    manifest, reader = read("coco", "train2014", coco.raw), sources.FolderReader("coco", coco.raw)
    builder = builders.make_builder("coco", "train2014", manifest, reader, tmp_path / "tfds")
    assert builder.info.disable_shuffling
    builder.download_and_prepare()
    ours, theirs = (sources.open_records(Path(f), "images") for f in (final, builder.data_path))
    assert [ours[i] for i in range(5)] == [theirs[i] for i in range(5)]
    named = tfds.data_source(
        "coco/train2014:1.0.0",
        data_dir=tmp_path / "out",
        split="images",
        decoders={"image": tfds.decode.SkipDecoding()},
    )
    assert named[4] == ours[4]
    (coco.raw / manifest.keys[1]).unlink()
    broken = builders.make_builder("coco", "train2014", manifest, reader, tmp_path / "broken")
    with pytest.raises(UserError, match=r"480023|COCO_train2014"):
        broken.download_and_prepare()


def test_no_tensorflow(tmp_path, coco):
    """Even where it is installed: here a package that cannot be imported."""
    stub = tmp_path / "stub" / "tensorflow"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("raise SystemExit('tensorflow was imported')")
    code = (
        "import sys\nfrom mlclip_jax import prepare\n"
        "code = prepare.main(['coco', *sys.argv[1:]])\n"
        "from mlclip_jax.data import registry\n"
        "data = registry.load({'name': 'coco', 'data_dir': sys.argv[2].partition('=')[2],"
        " 'check_sizes': False}, image_size=8, splits=['test'])\n"
        "assert data.train[0]['image'].shape == (8, 8, 3) and len(data.evals['test']) == 2\n"
        "assert 'tensorflow' not in sys.modules\nsys.exit(code)"
    )
    path = os.pathsep.join([str(tmp_path / "stub"), *sys.path])
    args = [sys.executable, "-c", code, f"--raw={coco.raw}", f"--data_dir={tmp_path / 'out'}"]
    done = subprocess.run(args, env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert b"train2014: 5 images in" in done.stdout


class Killed(BaseException):
    """Ends a run as a kill does: nothing of ours catches it."""


def killer(after):
    """A `tick` that kills when `after` images are done."""
    left = [after]

    def tick(images):
        left[0] -= images
        if left[0] <= 0:
            raise Killed

    return tick


@pytest.mark.parametrize("after", [1, 2, 3, 4, 5])
def test_a_killed_run_is_continued(coco, monkeypatch, after):
    with pytest.raises(Killed):
        coco(tick=killer(after))
    assert not coco.saved.exists() and not coco.final.exists()
    rows = []
    original = sources.FolderReader.read
    monkeypatch.setattr(
        sources.FolderReader, "read", lambda *args: rows.append(args[1]) or original(*args)
    )
    assert coco().written
    # A file is done when its last image was counted and the next one asked for.
    finished = (after - 1) // 2 * 2
    assert sorted(rows) == list(range(finished, 5))
    check(coco.raw, "coco", "train2014", coco.folder, read("coco", "train2014", coco.raw))
    assert not list(coco.folder.glob(".incomplete*"))


@pytest.mark.parametrize("step", ["rename", "save", "rmtree"])
def test_killed_while_it_is_published(coco, monkeypatch, step):
    owner = {"rename": builders.Path, "save": Manifest, "rmtree": builders.shutil}[step]

    def kill(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, kill)
        with pytest.raises(Killed):
            coco()
    assert coco.saved.exists() == (step == "rmtree")
    with monkeypatch.context() as patch:  # all images are in files that were finished
        patch.setattr(sources.FolderReader, "read", kill)
        assert coco().written == (step == "rename")
    check(coco.raw, "coco", "train2014", coco.folder, read("coco", "train2014", coco.raw))
    assert not list(coco.folder.glob(".incomplete*"))


def test_a_second_run_does_nothing(coco):
    first = coco()
    before = {path: path.stat().st_mtime_ns for path in coco.final.rglob("*")}
    before[coco.saved] = coco.saved.stat().st_mtime_ns
    again = coco(tick=killer(0))  # which is told nothing
    assert again == builders.Prepared(first.folder, 5, 0, written=False)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert before.keys() == {coco.saved, *coco.final.rglob("*")}
    coco.saved.write_bytes(b"cut off")
    assert not coco().written
    check(coco.raw, "coco", "train2014", coco.folder, read("coco", "train2014", coco.raw))


def test_one_run_at_a_time(coco):
    def meanwhile(images):
        with pytest.raises(UserError, match=r"another run is preparing train2014 in .*out.coco"):
            coco()
        told.append(images)

    told = []
    assert coco(tick=meanwhile).written and sum(told) == 5
    check(coco.raw, "coco", "train2014", coco.folder, read("coco", "train2014", coco.raw))
    with builders.lock(coco.folder, "val2014"):  # other parts may go on beside it
        assert not coco().written


def test_files_are_on_the_disk_before_they_count(coco, monkeypatch):
    events = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda n: events.append(Path(f"/proc/self/fd/{n}").readlink()) or fsync(n)
    )

    def checked(move):
        def moved(source, target):
            files = [source] if source.is_file() else list(source.iterdir())
            assert set(files) <= set(events), source
            events.append(target)
            return move(source, target)

        return moved

    monkeypatch.setattr(Path, "rename", checked(rename))
    monkeypatch.setattr(Path, "replace", checked(replace))
    coco()
    assert events.index(coco.final) < events.index(coco.saved)


@pytest.mark.parametrize("damage", ["gone", "cut off"])
def test_data_that_lost_a_file_are_prepared_anew(coco, damage):
    file = max(coco().folder.glob("*.array_record*"))
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    assert coco().written
    check(coco.raw, "coco", "train2014", coco.folder, read("coco", "train2014", coco.raw))


def test_other_annotations_are_prepared_anew(coco):
    coco()
    with pytest.raises(Killed):  # and what another run began is not taken for theirs
        (coco.raw / "annotations/captions_train2014.json").unlink()
        coco(tick=killer(3))
    assert coco.saved.exists() and Manifest.load(coco.saved).captions is not None
    names = {number: f"{number}.jpg" for number in (3, 4)}
    raw_folders.write_coco(coco.raw, "train2014", names, [(3, 1, 0)])
    for name in names.values():
        raw_folders.write_image(coco.raw / "train2014" / name, 7)
    assert coco().images == 2
    check(coco.raw, "coco", "train2014", coco.folder, read("coco", "train2014", coco.raw))
    assert not list(coco.folder.glob(".incomplete*"))


def damage(raw, keys):
    """Three bad images: one is gone, one cut off, one no image."""
    (raw / keys[1]).unlink()
    content = (raw / keys[2]).read_bytes()
    (raw / keys[2]).write_bytes(content[: len(content) * 2 // 3])
    (raw / keys[3]).write_text("<html>404</html>")
    return content


def test_missing_and_damaged_images_are_listed(coco, monkeypatch):
    manifest = read("coco", "train2014", coco.raw)
    keys = manifest.keys.tolist()
    content = damage(coco.raw, keys)
    with pytest.raises(
        UserError, match=rf"3 of 5 images .*{keys[1]}.* listed in .*unreadable\.txt.*allow_missing"
    ):
        coco()
    assert not coco.saved.exists() and not coco.final.exists()
    listed = (coco.folder / "train2014.unreadable.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == keys[1:4]
    assert "No such file" in listed[0] and "truncated" in listed[1] and "no known" in listed[2]
    # Mended one by one; files of records without gaps are not read again.
    (coco.raw / keys[2]).write_bytes(content)
    rows = []
    original = sources.FolderReader.read
    monkeypatch.setattr(
        sources.FolderReader, "read", lambda *args: rows.append(args[1]) or original(*args)
    )
    with pytest.raises(UserError, match=r"2 of 5 images"):
        coco()
    assert sorted(rows) == [0, 1, 2, 3]
    for i in (1, 3):
        raw_folders.write_image(coco.raw / keys[i], i)
    assert coco().images == 5
    assert not (coco.folder / "train2014.unreadable.txt").exists()
    check(coco.raw, "coco", "train2014", coco.folder, manifest)


def test_missing_images_may_be_left_out(coco):
    manifest = read("coco", "train2014", coco.raw)
    damage(coco.raw, manifest.keys.tolist())  # the second file of records is empty
    done = coco(allow_missing=True)
    assert (done.images, done.left_out) == (2, 3)
    check(coco.raw, "coco", "train2014", coco.folder, manifest.take(np.array([0, 4])))
    assert len((coco.folder / "train2014.unreadable.txt").read_text().splitlines()) == 3
    left_out = {str(manifest.keys[row]): row for row in (1, 2, 3)}
    assert Manifest.load(coco.saved).left_out == left_out
    again = coco(allow_missing=True)
    assert (again.images, again.left_out, again.written) == (2, 3, False)
    for mend in (coco.saved.unlink, lambda: manifest.take(np.array([0, 4])).save(coco.saved)):
        mend()
        assert not coco().written
        assert Manifest.load(coco.saved).left_out == left_out
    check(coco.raw, "coco", "train2014", coco.folder, manifest.take(np.array([0, 4])))


def test_no_image_at_all(coco):
    for path in (coco.raw / "train2014").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"has no images in .*raw: is that the right folder"):
        coco(allow_missing=True)
    assert not coco.saved.exists() and not coco.final.exists()


def test_any_image_that_pillow_reads_is_kept_as_it_is(tmp_path):
    raw = tmp_path / "raw"
    records, pixels = [], np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    kinds = {"L": "png", "CMYK": "jpg", "P": "gif", "RGBA": "png", "I;16": "png", "1": "png"}
    for mode, suffix in kinds.items():
        key = f"bilder mit ü/{mode.replace(';', '')}.{suffix}"
        (raw / key).parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels)
        image = image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)
        image.save(raw / key)
        records.append({"image": key, "labels": [mode]})
    raw_folders.write_custom(raw, records, suffix=".jsonl")
    manifest = read("custom", "train", raw)
    builders.prepare("custom", "train", manifest, raw, tmp_path / "out")
    check(raw, "custom", "train", tmp_path / "out" / "custom", manifest)


def test_a_full_disk_is_called_so(coco, monkeypatch):
    from array_record.python import array_record_module

    class Writer:
        def __init__(self, path, options):
            Path(path).touch()

        def write(self, record):
            pass

        def close(self):
            raise RuntimeError("write() failed: No space left on device; writing x; at byte 9")

    with monkeypatch.context() as patch:
        patch.setattr(array_record_module, "ArrayRecordWriter", Writer)
        with pytest.raises(UserError, match=r"the disk of .*out.coco is full: make room and run"):
            coco()
    assert not coco.saved.exists() and not coco.final.exists()
    assert coco().images == 5


def test_archives_that_point_outside_are_refused(tmp_path):
    raw_folders_more.imagenet(tmp_path / "raw")
    archive = tmp_path / "raw/train/n02012849.tar"
    raw_folders_more.tar(archive, {"../../evil.JPEG": b"x"})
    with pytest.raises(UserError, match=r"n02012849\.tar, member '\.\./\.\./evil\.JPEG'"):
        read("imagenet", "train", tmp_path / "raw")


def test_metadata_says_what_it_was_made_from(coco):
    metadata = json.loads((coco().folder / "metadata.json").read_text())
    manifest = read("coco", "train2014", coco.raw)
    assert metadata["manifest"] == manifest.fingerprint() and metadata["left_out"] == []
    assert metadata["keys"] == sources.keys_digest(manifest.keys)
