"""A run goes on with the data that it began with, wherever they are, and with no other."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import jax
import pytest
import toys
from toys import toy_world  # noqa: F401  (a fixture)

from mlclip_jax import cli
from mlclip_jax.data.manifest import Manifest
from mlclip_jax.errors import UserError
from mlclip_jax.training.build import load_trained
from mlclip_jax.training.checkpoint import Checkpoints, describe
from mlclip_jax.training.loop import fit
from mlclip_jax.training.mesh import make_mesh

sys.path.append(str(Path(__file__).parents[1] / "data"))
import raw_folders

pytestmark = pytest.mark.usefixtures("toy_world")


@pytest.fixture
def raw(tmp_path):
    return raw_folders.custom(tmp_path / "raw")


def run(workdir, folder, steps=2, *, data=(), **fields):
    """Trains on a folder of one's own images; the last metrics."""
    settings = {
        "method": {"name": "tower", "part": "none"},
        "data": {"name": "custom", "data_dir": str(folder), **dict(data)},
        "batch_size": 2,
        "duration": f"{steps} steps",
        "eval": {"splits": ("test",), "batch_size": 2},
    }
    mesh = make_mesh(jax.devices()[:1])
    return fit(toys.config(**{**settings, **fields}), workdir, mesh=mesh, quiet=True).metrics


def edit(folder, old, new):
    path = folder / "labels.csv"
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    raw_folders.write_text(path, text.replace(old, new))


def relabel(folder):
    edit(folder, "car|sky", "car|sea")


def reorder(folder):
    lines = (folder / "labels.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    raw_folders.write_text(folder / "labels.csv", "".join([lines[0], *lines[:0:-1]]))


def repaint(folder):
    raw_folders.write_image(folder / "beach/2.jpg", 99)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (relabel, "the labels of the 4 images of training"),
        (reorder, "the names or the order of the 4 images of training"),
        (lambda f: edit(f, "a car,train", "a car,test"), r"images \(4 then, 3 now\) of training"),
        (lambda f: edit(f, "a car,train", "a bus,train"), "the captions of the 4 images of train"),
        (repaint, r"the content of the image beach/2\.jpg of training"),
        (lambda f: edit(f, "sky,clouds", "sea,clouds"), "the labels .* of evaluation on test"),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_other_data_are_refused(tmp_path, raw, change, message, cached):
    fields = {"cache": {"folder": str(tmp_path / "features")}} if cached else {}
    run(tmp_path / "run", raw, **fields)
    change(raw)
    with pytest.raises(UserError, match=f"{message}.*put the old data back .* another workdir"):
        run(tmp_path / "run", raw, 3, **fields)


def test_the_same_data_elsewhere_go_on(tmp_path, raw, capsys, monkeypatch):
    expected = run(tmp_path / "whole", raw, 4)
    moved = tmp_path / "moved"
    keep = {"checkpoint": {"keep": 9}}
    run(tmp_path / "run", raw, 2, **keep)
    shutil.copytree(raw, moved)
    shutil.rmtree(raw)
    run(tmp_path / "run", moved, 3, **keep)
    assert cli.main(["prepare", "custom", f"--raw={moved}", f"--data_dir={tmp_path}"]) == 0
    capsys.readouterr()
    shutil.rmtree(moved)
    assert run(tmp_path / "run", tmp_path, 4, **keep) == expected
    # An older checkpoint that is the best one is evaluated on the data where they are by now.
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "best_step", lambda checkpoints, weights: 2)
        trained = load_trained(tmp_path / "run")
    assert trained.step == 2 and trained.config.data["data_dir"] == str(tmp_path)
    # Prepared anew with other labels, under the path that the checkpoint has.
    saved = tmp_path / "custom/train.manifest.npz"
    manifest = Manifest.load(saved)
    Manifest(
        manifest.name,
        manifest.space,
        manifest.keys,
        manifest.positives.take([1, 0, 2, 3]),
        captions=manifest.captions,
    ).save(saved)
    with pytest.raises(UserError, match="the labels of the 4 images of training"):
        run(tmp_path / "run", tmp_path, 5)


def test_a_mended_image_is_no_other_data(tmp_path, raw):
    good = (raw / "beach/2.jpg").read_bytes()
    (raw / "beach/2.jpg").write_bytes(good[:200])
    run(tmp_path / "run", raw)
    (raw / "beach/2.jpg").write_bytes(good)
    assert run(tmp_path / "run", raw, 3).keys() == {"test"}  # it went on


def test_other_settings_of_the_data_are_named_before_their_labels(tmp_path, raw):
    run(tmp_path / "run", raw)
    with pytest.raises(UserError, match=r"data\.train_view was 'full' and is 'single_positive'"):
        run(tmp_path / "run", raw, 3, data={"train_view": "single_positive"})


def test_checkpoints_without_fingerprints_go_on_in_their_place(tmp_path, raw, monkeypatch):
    def old(*args):
        found = describe(*args)
        del found["data"]
        return found

    with monkeypatch.context() as patch:
        patch.setattr("mlclip_jax.training.stage.describe", old)
        run(tmp_path / "run", raw)
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert "data" not in checkpoints.meta(2)
    shutil.copytree(raw, tmp_path / "moved")
    with pytest.raises(UserError, match=r"data\.data_dir was '.*raw' and is '.*moved'"):
        run(tmp_path / "run", tmp_path / "moved", 3)
    run(tmp_path / "run", raw, 3)
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.meta(3)["data"]["training"]["count"] == 4
