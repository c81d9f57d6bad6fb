"""The files of a feature cache: values, resuming, damage, full disks, runs at the same time."""

from __future__ import annotations

import json
import multiprocessing
import time
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from cached_noise import SHAPES, Noise, encode, exactly, make, values, written

from mlclip_jax.data import feature_files, features
from mlclip_jax.errors import UserError


@pytest.fixture
def small_files(monkeypatch):
    """Three records of float32 features in a file."""
    monkeypatch.setattr(feature_files, "_FILE_BYTES", 3 * 4 * 30)


def test_features_come_back_with_labels_and_without_images(tmp_path, small_files):
    source = Noise()
    cache = written(tmp_path, source)
    assert len(cache.files.paths()) == 4 and cache.files.size == 10 * 4 * 30
    source.opened.clear()
    opened, expected = cache.open(), exactly(Noise())
    assert len(opened) == 10
    for i in range(10):
        example = opened[i]
        for name, shape in SHAPES.items():  # float32 comes back bit for bit
            assert example["features"][name].shape == shape
            assert example["features"][name].dtype == np.float32
            np.testing.assert_array_equal(example["features"][name], expected[name][i])
        assert example["index"] == i and "image" not in example
        np.testing.assert_array_equal(example["targets"], source.annotations(i)["targets"])
    assert not source.opened
    np.testing.assert_array_equal(opened.class_counts(), [10, 0])


def test_size_is_that_of_the_records(tmp_path):
    for dtype, size in (("float32", 120), ("bfloat16", 60), ("int8", 30 + 4 * 5)):
        cache = written(tmp_path, dtype=dtype)
        assert cache.files.record_bytes == size
        on_disk = sum(path.stat().st_size for path, _ in cache.files.paths())
        assert cache.files.size <= on_disk < cache.files.size + 2**17 + 64 * 10  # ArrayRecord's own


def test_bfloat16_and_int8_are_close(tmp_path):
    exact = exactly(Noise())
    low = values(written(tmp_path, dtype="bfloat16"))
    for name, expected in exact.items():
        assert low[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(low[name], expected.astype(ml_dtypes.bfloat16))
    found = values(written(tmp_path, dtype="int8"))
    assert found["tokens_scale"].shape == (10, 4, 1)  # one for each token
    for name, expected in exact.items():
        assert found[name].dtype == np.int8 and found[f"{name}_scale"].dtype == np.float32
        back = found[name] * found[f"{name}_scale"]
        largest = np.abs(expected).max(-1, keepdims=True)
        assert (np.abs(back - expected) <= largest * (1 / 254 + 1e-6)).all()  # zeros stay zeros
        assert np.abs(back - expected).max() > 0  # it was rounded


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_no_numbers_are_an_error(tmp_path, dtype, value):
    def broken(images, readable):
        found = encode(images, readable)
        found["tokens"][1, 2, 3] = value
        return found

    cache = make(tmp_path, dtype=dtype)
    with pytest.raises(UserError, match="tokens image features are not all finite: check the"):
        features.write(cache, broken, batch_size=4)
    assert not cache.files.ready()


@pytest.mark.parametrize("fail_at", [0, 4, 9])
def test_a_killed_run_goes_on(tmp_path, small_files, fail_at):
    source = Noise()
    cache = make(tmp_path, source)
    broken = replace(cache, images=replace(cache.images, source=Noise(fail_at=fail_at)))
    with pytest.raises(KeyboardInterrupt):
        features.write(broken, encode, batch_size=1)
    assert not cache.files.ready()
    with pytest.raises(UserError, match="are not complete"):
        cache.open()
    kept = {path: path.stat().st_mtime_ns for path, _ in cache.files.paths() if path.is_file()}
    assert len(kept) == max(0, fail_at - 1) // 3
    source.opened.clear()
    ticks = []
    features.write(cache, encode, batch_size=4, tick=ticks.append)
    assert sum(ticks) == 10
    assert min(source.opened) == 3 * len(kept)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    whole = written(tmp_path / "whole")
    for (path, _), (other, _) in zip(cache.files.paths(), whole.files.paths(), strict=True):
        assert path.read_bytes() == other.read_bytes()
    assert not list(cache.files.folder.glob("*.part"))


@pytest.mark.parametrize(
    "damage", ["missing", "short", "empty", "longer", "note", "no text", "other key", "no note"]
)
def test_a_damaged_cache_is_not_used(tmp_path, small_files, damage):
    cache = written(tmp_path)
    expected = values(cache)
    path, note = cache.files.paths()[1][0], cache.files.folder / "cache.json"
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "longer":
        path.write_bytes(path.read_bytes() + bytes(1 << 16))
    elif damage == "note":
        note.write_text(note.read_text()[:-9])
    elif damage == "no text":
        note.write_bytes(b"\xff\xfe\x00")
    elif damage == "other key":
        note.write_text(note.read_text().replace('"a"', '"b"'))
    else:
        note.unlink()
    assert not cache.files.ready()
    with pytest.raises(UserError, match="are not complete"):
        cache.open()
    features.write(cache, encode, batch_size=4)
    for name, found in values(cache).items():
        np.testing.assert_array_equal(found, expected[name])


def test_records_are_counted(tmp_path, small_files):
    cache = written(tmp_path)
    path = cache.files.paths()[1][0]
    size = path.stat().st_size
    feature_files._write_file(path, [bytes(cache.files.record_bytes)] * 2)
    assert path.stat().st_size == size  # ArrayRecord pads: the sizes say nothing here
    with pytest.raises(UserError, match=r"are damaged \(9 records in place of 10\)"):
        cache.open()
    (cache.files.folder / "cache.json").unlink()
    assert cache.files.done() == 3
    features.write(cache, encode, batch_size=4)
    assert len(cache.open()) == 10


def test_changed_bytes_are_noticed(tmp_path):
    cache = written(tmp_path)
    path = cache.files.paths()[0][0]
    content = bytearray(path.read_bytes())
    record = cache.open()[4]["features"]["tokens"].tobytes()
    at = bytes(content).index(record)
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"image features in .* are damaged .*remove this folder"):
        cache.open()[4]


def test_no_changed_bit_gives_other_features(tmp_path, small_files):
    cache = written(tmp_path)
    expected = values(cache)
    path = cache.files.paths()[1][0]
    content = path.read_bytes()
    used = np.flatnonzero(np.frombuffer(content, np.uint8))  # the rest is padding
    outcomes = set()
    for k, at in enumerate(used[::5].tolist()):
        changed = bytearray(content)
        changed[at] ^= 1 << k % 8
        path.write_bytes(changed)
        try:
            opened = cache.open()
        except UserError as error:
            assert "are damaged" in str(error)
            outcomes.add("when opened")
            continue
        try:
            found = [opened[i]["features"] for i in range(10)]
        except UserError as error:
            assert "are damaged" in str(error)
            outcomes.add("when read")
            continue
        outcomes.add("harmless")
        for name in SHAPES:
            np.testing.assert_array_equal(np.stack([f[name] for f in found]), expected[name])
    assert outcomes >= {"when opened", "when read"}


class Stuck(Noise):
    """Noise whose example 7 never comes."""

    def __getitem__(self, i):
        if i == 7:
            time.sleep(600)
        return super().__getitem__(i)


def write_and_hang(folder):
    """Writes two files of three records and waits for example 7; runs in another process."""
    feature_files._FILE_BYTES = 3 * 4 * 30
    cache = make(folder)
    broken = replace(cache, images=replace(cache.images, source=Stuck()))
    features.write(broken, encode, batch_size=1)


def test_two_runs_and_a_killed_one(tmp_path, small_files):
    cache = make(tmp_path)
    other = multiprocessing.get_context("spawn").Process(target=write_and_hang, args=(tmp_path,))
    other.start()
    try:
        second = cache.files.paths()[1][0]
        until = time.monotonic() + 60
        while not second.exists() and time.monotonic() < until:
            time.sleep(0.02)
        assert second.exists()
        with pytest.raises(UserError, match="another run is writing the image features"):
            features.write(cache, encode, batch_size=4)
    finally:
        other.kill()
        other.join()
    assert not cache.files.ready() and cache.files.done() == 6
    times = [path.stat().st_mtime_ns for path, _ in cache.files.paths()[:2]]
    features.write(cache, encode, batch_size=4)
    assert times == [path.stat().st_mtime_ns for path, _ in cache.files.paths()[:2]]
    for name, expected in exactly(Noise()).items():
        np.testing.assert_array_equal(values(cache)[name], expected)


def test_what_another_run_has_finished_meanwhile_is_left_alone(tmp_path):
    cache = make(tmp_path)
    written(tmp_path)
    opened = cache.open()
    (path, _), *_ = cache.files.paths()
    before = path.stat().st_mtime_ns

    def unused(images, readable):
        raise AssertionError("computed again")

    features.write(cache, unused, batch_size=4)
    assert path.stat().st_mtime_ns == before and cache.files.ready() and opened[3]


@pytest.mark.parametrize("name", ["features-00001-of-00004.array_record", "cache.json"])
def test_a_disk_that_gets_full_is_told_and_what_is_done_kept(tmp_path, small_files, name):
    cache = make(tmp_path)
    cache.files.folder.mkdir()
    part = cache.files.folder / f"{name}.part"
    part.symlink_to("/dev/full")
    with pytest.raises(UserError, match=rf"cannot write .*{name}.*No space left .*make room and"):
        features.write(cache, encode, batch_size=4)
    assert not cache.files.ready()
    assert cache.files.done() == (3 if name.startswith("features") else 10)
    part.unlink()
    features.write(cache, encode, batch_size=4)
    assert len(values(cache)["pooled"]) == 10


def test_faults_of_the_tower_are_not_called_a_full_disk(tmp_path):
    def broken(images, readable):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory") as caught:
        features.write(make(tmp_path), broken, batch_size=4)
    assert not isinstance(caught.value, UserError)


def test_a_full_disk_is_told_before(tmp_path, monkeypatch):
    monkeypatch.setattr(
        feature_files.shutil, "disk_usage", lambda folder: type("U", (), {"free": 1100})
    )
    cache = make(tmp_path)
    with pytest.raises(UserError, match=r"image features need 0\.00114 MiB more in .*where 0\.00"):
        feature_files.check_space([cache.files], tmp_path / "new")
    assert (tmp_path / "new").is_dir()
    full = written(tmp_path).files
    feature_files.check_space([full], tmp_path)  # nothing more is needed
    with pytest.raises(UserError, match=r"image features need 0\.00114 MiB more"):
        feature_files.check_space([full, make(tmp_path, seed=1, flip=True).files], tmp_path)


def test_note_is_readable(tmp_path):
    note = json.loads((written(tmp_path).files.folder / "cache.json").read_text())
    assert note["key"]["encoder"] == {"weights": "a"} and note["key"]["dtype"] == "float32"
