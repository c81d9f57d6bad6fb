"""Reports: tables, the page, and pictures that are complete and not clipped."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mlclip_jax.evaluation import plots, report
from mlclip_jax.evaluation.evaluator import summarise
from mlclip_jax.evaluation.metrics import Predictions
from mlclip_jax.labels.catalog import scenes
from mlclip_jax.labels.space import LabelSpace


def result(space, seed, n=30, skill=1.0):
    rng = np.random.default_rng(seed)
    targets = np.where(rng.random((n, len(space))) < 0.2, 1, -1).astype(np.int8)
    targets[:, 3] = -1  # a class without positives
    state = Predictions(len(space))
    state.append(skill * targets + rng.normal(size=targets.shape), targets, index=np.arange(n))
    return summarise(state, space)


def history():
    rows = [{"step": s, "split": "train", "loss": 1 / (s + 1)} for s in range(20)]
    rows[3]["loss"] = None  # a loss that was not finite
    for step in (10, 20):
        for weights in ("raw", "ema"):
            rows.append({"step": step, "split": "test", "weights": weights, "mAP": 0.5})
    return rows


def picture(index):
    return np.full((48, 64, 3), index, np.uint8)


def margins_are_white(path):
    """Nothing touches the edge of a picture: text that is clipped would."""
    pixels = np.asarray(Image.open(path).convert("L"))
    edges = [pixels[-1], pixels[:, 0], pixels[:, -1], pixels[0]]
    return all((edge > 250).all() for edge in edges)


def test_tables():
    space = scenes()
    results = {"zero-shot": result(space, 0, skill=0.2), "coop": result(space, 0)}
    header, rows = report.headline(results)
    assert header == ["metric, %", "zero-shot", "coop"]
    assert rows[0] == [
        "mAP",
        *(f"{100 * r.metrics['mAP']:.1f}" for r in results.values()),
    ]
    text = report.plain((header, rows)).splitlines()
    assert len(text) == len(rows) + 2 and len({len(line) for line in text[:3]}) == 1
    header, rows = report.class_table(space, results)
    assert rows[3] == ["three", "0", "-", "-"]
    assert report.markdown((["a", "b"], [["x|y", "1"]])).splitlines()[-1] == "| x\\|y | 1 |"


def test_series_of_a_run():
    losses, curves = report.training_series(history())
    assert len(losses[0]) == 20 and np.isnan(losses[1][3])
    assert curves == {"test, raw": ([10, 20], [0.5, 0.5]), "test, EMA": ([10, 20], [0.5, 0.5])}


def test_running_mean():
    values = np.arange(40.0)
    values[20] = np.nan
    smooth = plots._smooth(values)
    assert smooth[10] == pytest.approx(10) and smooth[0] == pytest.approx(1)
    assert smooth[20] == pytest.approx(20) and np.isfinite(smooth).all()


def test_the_page_names_every_picture(tmp_path):
    space = scenes()
    results = {"zero-shot": result(space, 0, skill=0.2), "coop": result(space, 0)}
    page = report.write_report(
        tmp_path / "report",
        space,
        results,
        title="CoOp",
        split="test",
        notes=["A note."],
        image=picture,
        validation=result(space, 1),
        history=history(),
    ).read_text()
    for name in ("per_class.png", "examples.png", "training.png"):
        assert f"({name})" in page
        assert Image.open(tmp_path / "report" / name).size[0] > 400
        assert margins_are_white(tmp_path / "report" / name)
    assert "# CoOp" in page and "A note." in page and "validation images" in page
    assert all(f"| {name} |" in page for name in space.names)


def test_a_page_without_images_or_history(tmp_path):
    space = scenes()
    path = report.write_report(
        tmp_path, space, {"coop": result(space, 0)}, title="CoOp", split="test"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["per_class.png", "report.md"]
    assert "examples" not in path.read_text()


def test_equal_reports_are_equal_files(tmp_path):
    space = scenes()
    for folder in ("a", "b"):
        results = {"coop": result(space, 0)}
        report.write_report(
            tmp_path / folder, space, results, title="CoOp", split="test", image=picture
        )
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize("classes", [1, 25, 80, 300])
def test_bars_for_any_number_of_classes(classes, tmp_path):
    names = tuple(f"a class with quite a long name, number {i}" for i in range(classes))
    space, rng = LabelSpace(names), np.random.default_rng(0)
    values = {name: rng.random(classes) for name in ("zero-shot", "coop", "coop (EMA)")}
    plots.per_class_bars(space, values, tmp_path / "bars.png")
    assert margins_are_white(tmp_path / "bars.png")
    assert Image.open(tmp_path / "bars.png").size[1] < 4000


def test_matplotlib_is_imported_only_for_pictures():
    code = "import sys, mlclip_jax.evaluation.report; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
