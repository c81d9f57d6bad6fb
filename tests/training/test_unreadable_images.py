"""Runs over a folder with a corrupt image: passed over in training, an error in evaluation."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import toys
from test_loop import arrays, assert_same, one_device, rows, run
from toys import toy_world  # noqa: F401  (a fixture)

from mlclip_jax import cli
from mlclip_jax.errors import UserError
from mlclip_jax.training import scoring

sys.path.append(str(Path(__file__).parents[1] / "data"))
import raw_folders

pytestmark = pytest.mark.usefixtures("toy_world")

BROKEN = "straße 7/3.jpg"


@pytest.fixture
def raw(tmp_path):
    """Four images for training, of which one is cut off."""
    folder = raw_folders.custom(tmp_path / "raw")
    cut_off(folder / BROKEN)
    return folder


def cut_off(path):
    path.write_bytes(path.read_bytes()[:300])


def config(raw, **data):
    return toys.config(
        method={"name": "tower", "train_bn": True},
        data={"name": "custom", "data_dir": str(raw), "augment": "flip_rrc", **data},
        batch_size=2,
        duration="10 steps",
        eval={"splits": ("test",), "batch_size": 2, "every": "0 steps"},
        checkpoint={"every": "3 steps"},
        log_every="1 steps",
    )


def passed_over(caplog):
    """What was said of images that training passes over, since the last call."""
    said = [text for text in caplog.messages if "passed over" in text]
    caplog.clear()
    return said


def test_workers_and_resuming_pass_over_alike(tmp_path, raw, caplog):
    run(tmp_path / "whole", config(raw))
    (said,) = passed_over(caplog)  # once in five epochs
    assert said.startswith(f"{BROKEN}: cannot be read as an image")
    assert said.endswith("(passed over: 1 of at most 10)")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", config(raw), stop_at=5)
    passed_over(caplog)
    run(tmp_path / "resumed", config(raw, num_workers=2))
    assert passed_over(caplog) == [said]
    assert_same(arrays(tmp_path / "resumed"), arrays(tmp_path / "whole"))
    assert rows(tmp_path / "resumed") == rows(tmp_path / "whole")


def test_the_limit_ends_training(tmp_path, raw, caplog):
    with pytest.raises(UserError, match=rf"^{BROKEN}: .* number 1 of .* and 0 may be passed over"):
        run(tmp_path / "run", config(raw, max_unreadable=0))
    assert not passed_over(caplog)
    cut_off(raw / "beach/1.jpg")
    with pytest.raises(UserError, match=r"number 2 of the training images .* and 1 may be"):
        run(tmp_path / "other", config(raw, max_unreadable=1))
    assert len(passed_over(caplog)) == 1


def test_evaluation_passes_over_nothing(tmp_path, raw, monkeypatch, capsys):
    run(tmp_path / "run", config(raw))
    cut_off(raw / "6.jpg")
    with pytest.raises(UserError, match=r"^6\.jpg: cannot be read as an image"):
        run(tmp_path / "other", config(raw))
    monkeypatch.setattr(scoring, "make_mesh", one_device)
    assert cli.main(["evaluate", f"--workdir={tmp_path / 'run'}"]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert line.startswith("error: 6.jpg: cannot be read as an image")
