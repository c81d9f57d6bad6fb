"""The parameter table and the terminal's lines."""

from __future__ import annotations

import io
import json

import toys

from mlclip_jax.training.step import find_moving, take_apart
from mlclip_jax.training.table import parameter_table
from mlclip_jax.training.writers import MetricWriter, ProgressBar


def test_table_names_what_trains_and_folds_what_does_not():
    built, labels = toys.method(train_bn=True, part="clip/image/conv")
    parts = find_moving(take_apart(built), toys.batch(), labels)
    lines = parameter_table(parts, (("bias", 5.0),)).splitlines()
    cells = {line.split()[0]: line for line in lines}
    assert "3x3x3x8" in cells["clip/image/conv/kernel"]
    assert "base x1" in cells["clip/image/conv/kernel"]
    assert "yes" in cells["bias"] and "bias x5" in cells["bias"] and "scalar" in cells["bias"]
    assert "moves" in cells["clip/image/bn/mean"]
    assert cells["clip/text/*"].split()[-1] == "no"
    assert lines[-1].startswith("217 of ")
    assert len(lines) == 12


def test_writer_drops_rows_of_an_interrupted_run(tmp_path):
    writer = MetricWriter(tmp_path, step=0)
    for step in range(1, 6):
        writer.write({"step": step, "split": "train", "loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # the machine stopped here
    writer = MetricWriter(tmp_path, step=3)
    writer.write({"step": 4, "split": "train", "loss": float("nan")})
    writer.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["loss"] is None
    MetricWriter(tmp_path, step=0).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert any((tmp_path / "tensorboard").iterdir())


def test_writer_of_other_processes_writes_nothing(tmp_path):
    writer = MetricWriter(tmp_path / "run", step=0, enabled=False)
    writer.write({"step": 1, "split": "train", "loss": 1.0})
    writer.close()
    assert not (tmp_path / "run").exists()


def test_progress_is_one_line_a_report_without_a_terminal():
    stream = io.StringIO()
    bar = ProgressBar("train", start=0, total=10, stream=stream)
    for _ in range(5):
        bar.step()
    bar.report(5, loss=0.5, images_per_second=100.0)
    bar.say("a line")
    bar.close()
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("train 5/10: loss 0.5000, 100 images/s, 0:00 left")
    assert lines[1:] == ["a line"]


def test_progress_is_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        """Says that it is one."""

        def isatty(self):
            return True

    stream = Terminal()
    bar = ProgressBar("train", start=2, total=10, stream=stream)
    bar.step()
    bar.report(3, loss=0.5, images_per_second=100.0)
    bar.close()
    assert "3/10" in stream.getvalue() and "loss 0.5000, 100 images/s" in stream.getvalue()
