"""Reports: tables, the numbers as JSON, and a page that needs nothing else."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from mlclip_jax.errors import UserError
from mlclip_jax.evaluation import charts, curves, page, pictures, report
from mlclip_jax.evaluation.evaluator import summarise
from mlclip_jax.evaluation.findings import Entry, as_json, gather
from mlclip_jax.evaluation.metrics import Predictions, best_f1_thresholds
from mlclip_jax.evaluation.protocol import PROTOCOLS
from mlclip_jax.labels.catalog import scenes
from mlclip_jax.labels.space import LabelSpace

ODD = '<b>&"'
VOID = {"meta", "link", "img", "input", "br"}


def result(space, seed, n=30, skill=1.0):
    rng = np.random.default_rng(seed)
    targets = np.where(rng.random((n, len(space))) < 0.2, 1, -1).astype(np.int8)
    targets[0] = 1
    targets[:, 3:4] = -1  # a class without positives
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
    return np.full((48, 64, 3), index % 256, np.uint8)


def findings(space=None, *, n=30, **options):
    space = scenes() if space is None else space
    entries = {
        "zero-shot": Entry(result(space, 0, n, skill=0.2), "zero_shot"),
        "coop (last)": Entry(result(space, 0, n, skill=0.8), "coop", "raw", "last", 20),
        "coop (EMA, best)": Entry(result(space, 0, n), "coop", "ema", "best", 10),
    }
    options = {
        "title": "coop on scenes", "split": "test", "notes": ["A note."], "history": history(),
        "validation": result(space, 1, n), "image": picture,
        "train_counts": np.arange(len(space)) * 10,
    } | options  # fmt: skip
    return gather(space, entries, options.pop("protocol", PROTOCOLS["multi_label"]), **options)


class Checker(HTMLParser):
    """Every tag is closed in order; gathers attributes, ids and text."""

    def __init__(self):
        super().__init__()
        self.stack, self.attributes, self.ids, self.words = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, key, value) for key, value in attrs]
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, key, value) for key, value in attrs]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def parse(text):
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert not checker.stack
    assert len(set(checker.ids)) == len(checker.ids)
    return checker


def test_tables():
    found = findings(paper={"mAP": 71.25})
    header, rows = report.headline(found)
    assert header == ["metric, %", *found.entries, "paper"]
    first = [f"{100 * e.result.metrics['mAP']:.1f}" for e in found.entries.values()]
    assert rows[0] == ["mAP", *first, "71.2"] and rows[1][-1] == ""
    text = report.plain((header, rows)).splitlines()
    assert len(text) == len(rows) + 2 and len(text[1]) == len(text[0])
    header, rows = report.class_table(found)
    assert rows[3] == ["three", "0", "-", "-", "-"]


def test_numbers_of_a_report(tmp_path):
    found = findings(paper={"mAP": 71.25})
    path = report.write_report(tmp_path / "out", found)
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.html", "report.json"]
    numbers = json.loads((path.parent / "report.json").read_text())
    assert numbers["protocol"] == "multi_label" and numbers["num_images"] == 30
    assert numbers["paper"] == {"mAP": 71.25}
    for title, entry in found.entries.items():
        column = numbers["results"][title]
        assert column["metrics"]["mAP"] == pytest.approx(entry.result.metrics["mAP"], abs=1e-12)
        assert (column["weights"], column["checkpoint"], column["step"]) == entry[2:5]
        assert column["per_class_ap"][3] is None
        assert column["per_class_ap"][4] == pytest.approx(entry.result.per_class_ap[4])
        assert set(column["metrics"]) | {"per_class_ap"} == set(numbers["conventions"])
    validation = result(found.space, 1)
    expected = best_f1_thresholds(validation.scores, validation.targets)
    for label, one in enumerate(numbers["classes"]):
        assert one["name"] == found.space.names[label]
        assert one["train_positives"] == 10 * label
        assert one["positives"] == (found.main.result.targets[:, label] > 0).sum()
        threshold = None if np.isnan(expected[label]) else pytest.approx(expected[label])
        assert one["threshold"] == threshold
    assert numbers["threshold"]["chosen_on"] == "validation"
    groups = numbers["groups"]
    assert groups["tail (< 20)"]["num_classes"] == 2 and groups["head (≥ 100)"]["num_classes"] == 12
    tail = np.nanmean(found.main.result.per_class_ap[:2])
    assert groups["tail (< 20)"]["mAP"]["coop (EMA, best)"] == pytest.approx(tail)


def test_the_page_stands_alone():
    found = findings(paper={"mAP": 71.25})
    text = page.render(found)
    checker = parse(text)
    assert not re.search(r"https?:|@import|url\(", text)
    for _, key, value in checker.attributes:
        if key in ("src", "href"):
            assert value.startswith(("data:", "#"))
            assert value[0] != "#" or value[1:] in checker.ids
    words = "".join(checker.words)
    assert "A note." in words and "71.2" in words and "best checkpoint" in words
    for figure in found.figures["zero-shot"].values():
        assert figure.convention in words
    assert all(name in words for name in found.space.names)
    assert "validation images" in words
    assert sum(key == "src" for _, key, _ in checker.attributes) > 20


def test_names_are_escaped():
    names = (ODD, "</script><script>alert(1)</script>", "x\u0301" * 40, "標" * 30)
    space = LabelSpace(names)
    text = page.render(findings(space, title=ODD, notes=[ODD]))
    checker = parse(text)
    assert "<b>&" not in text and "alert(1)</script>" not in text
    words = "".join(checker.words)
    assert all(name in words for name in names)
    drawn = json.loads(
        re.search(r'<script type="application/json" id="curves">(.*?)</script>', text).group(1)
    )
    assert drawn[1]["words"].startswith(f"{ODD}: ")


@pytest.mark.parametrize("classes", [1, 2, 30, 1000])
def test_any_number_of_classes(classes):
    space = LabelSpace(tuple(f"a class with quite a long name, number {i}" for i in range(classes)))
    text = page.render(findings(space, n=40, train_counts=None))
    parse(text)
    assert len(text) < 5e6
    assert text.count("<tr><th") >= classes


def test_a_page_of_little():
    space = LabelSpace(("a", "b"))
    scores = np.zeros((3, 2), np.float32)
    state = Predictions(2)
    state.append(scores, np.full((3, 2), -1, np.int8), index=np.arange(3))
    entries = {"zero_shot": Entry(summarise(state, space), "zero_shot")}
    found = gather(space, entries, PROTOCOLS["multi_label"], title="t", split="test", image=picture)
    text = page.render(found)
    parse(text)
    assert "Examples" not in text and 'id="pick"' not in text
    assert as_json(found)["results"]["zero_shot"]["metrics"]["mAP"] is None


def test_thresholds_on_the_split_itself_are_owned_up_to():
    found = findings(validation=None)
    assert found.chosen_on == "test" and page.render(found).count("which flatters") == 2


def test_papers_numbers_are_checked():
    with pytest.raises(UserError, match="mAPP"):
        findings(paper={"mAPP": 50.0})


def test_series_of_a_run():
    losses, scores = page.training_series(history())
    assert len(losses[0]) == 20 and np.isnan(losses[1][3])
    assert scores == {"test, raw": ([10, 20], [0.5, 0.5]), "test, EMA": ([10, 20], [0.5, 0.5])}


def test_running_mean():
    values = np.arange(40.0)
    values[20] = np.nan
    smooth = curves.running_mean(values)
    assert smooth[10] == pytest.approx(10) and smooth[0] == pytest.approx(1)
    assert smooth[20] == pytest.approx(20) and np.isfinite(smooth).all()


def test_curve_of_a_class():
    scores = np.array([4.0, 3.0, 3.0, 1.0])
    positive = np.array([True, False, True, True])
    recall, precision = curves.class_curve(scores, positive, points=4)
    np.testing.assert_allclose(recall, [0, 1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(precision, [1, 1, 2 / 3, 3 / 4])  # equal scores come together


def test_micro_curve_and_histograms():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 9, (50, 3)).astype(np.float32)
    targets = rng.choice([-1, 0, 1], (50, 3)).astype(np.int8)
    targets[:, 2] = np.abs(targets[:, 2])  # no explicit negative: 0 is negative there
    known = (targets != 0) | (np.arange(3) == 2)
    recall, precision = curves.micro_curve(scores, targets, points=1001)
    flat, positive = scores[known], targets[known] > 0
    for r, p in zip(recall[1:], precision[1:], strict=True):
        matches = [
            np.isclose(r, positive[flat >= cut].sum() / positive.sum())
            and np.isclose(p, positive[flat >= cut].mean())
            for cut in range(9)
        ]
        assert any(matches)
    counts = curves.histograms(scores, targets, bins=9, low=0, high=9)
    for label in range(3):
        for kind in (0, 1):
            chosen = known[:, label] & ((targets[:, label] > 0) == kind)
            expected = np.bincount(scores[chosen, label].astype(int), minlength=9)
            np.testing.assert_array_equal(counts[kind, label], expected)


def test_infinite_scores_have_a_place():
    scores = np.array([[-np.inf], [0.0], [np.inf]], np.float32)
    assert curves.score_range(scores) == (-0.5, 0.5)
    targets = np.array([[-1], [1], [1]], np.int8)
    assert curves.histograms(scores, targets, bins=4).sum() == 3


def test_worst_mistakes():
    scores = np.array([[5, 0], [4, -3], [3, 2], [1, 9]], np.float32)
    targets = np.array([[-1, 1], [-1, 1], [-1, -1], [1, 0]], np.int8)
    cuts = np.array([2.0, 1.0])
    found = pictures.worst(scores, targets, cuts, positive=False)
    # The third image is wrong about both classes, but two of class 0 are there; 0 is unobserved.
    assert [(m.row, m.label, m.margin) for m in found] == [(0, 0, 3), (1, 0, 2), (2, 1, 1)]
    found = pictures.worst(scores, targets, cuts, positive=True)
    assert [(m.row, m.label, m.margin) for m in found] == [(1, 1, 4), (3, 0, 1), (0, 1, 1)]
    assert pictures.worst(scores, targets, np.full(2, np.nan), positive=True) == []


@pytest.mark.parametrize("side, kind", [(64, "png"), (500, "jpeg")])
def test_thumbnails_are_small(side, kind):
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    uri = pictures.data_uri(image)
    assert uri.startswith(f"data:image/{kind};base64,") and len(uri) < 40_000


def test_ticks_and_names_that_are_too_long():
    assert charts.ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert charts.ticks(-7.7, 4.4) == pytest.approx([-7.5, -5, -2.5, 0, 2.5])
    assert charts.shorten("cat", 100) == "cat"
    short = charts.shorten("W" * 100, 100)
    assert short.endswith("…") and charts.text_width(short) <= 100


def test_equal_reports_are_equal_files():
    assert page.render(findings()) == page.render(findings())
