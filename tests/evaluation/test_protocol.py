"""Protocols: each figure against the functions on explicit selections, and the golden arrays."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mlclip_jax.errors import UserError
from mlclip_jax.evaluation import metrics, ranking
from mlclip_jax.evaluation.evaluator import metric_classes
from mlclip_jax.evaluation.protocol import (
    PROTOCOLS,
    AtThreshold,
    AtTopK,
    AveragePrecision,
    F1AtK,
    Protocol,
    Task,
)
from mlclip_jax.labels.space import LabelSpace, Taxonomy

GOLDEN = Path(__file__).parents[1] / "golden"
UNSEEN = (1, 4, 5, 11, 23)  # neither a range nor all of one kind
SPACE = LabelSpace(
    names=tuple(f"label {i}" for i in range(24)),
    subsets={"unseen": UNSEEN, "first": tuple(range(12))},
    taxonomy=Taxonomy(("low", "high"), (0,) * 12 + (1,) * 12),
    name="two dozen",
)
TWELVE = LabelSpace(names=tuple("abcdefghijkl"), name="twelve")


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN / "metrics.npz"))


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(50, 24)).astype(np.float32)
    targets = rng.choice([-1, 0, 1], (50, 24), p=[0.5, 0.4, 0.1]).astype(np.int8)
    targets[:, 4] = -1  # no positive
    targets[:, 7] = 0  # no label at all
    targets[targets[:, list(UNSEEN)].sum(axis=1) < -4] = -1  # images without any positive
    return scores, targets


@pytest.fixture(params=[1 << 22, 60])
def entries(request, monkeypatch):
    """In one block, and in many."""
    monkeypatch.setattr(ranking, "BLOCK_ENTRIES", request.param)


def values(figures):
    return {name: figure.value for name, figure in figures.items()}


def test_the_default_reports_what_training_reports(problem, entries):
    figures = PROTOCOLS["multi_label"].measure(*problem, SPACE)
    ap = metrics.average_precision(*problem)
    assert list(figures) == list(metric_classes(SPACE))
    for name, members in metric_classes(SPACE).items():
        expected = metrics.mean_average_precision(ap[list(members)])
        assert figures[name].value == pytest.approx(expected, rel=1e-12)


def test_asl_on_golden_arrays(golden):
    probabilities = np.clip(golden["in/scores"], 1e-6, 1 - 1e-6)
    logits = np.log(probabilities / (1 - probabilities))
    found = values(PROTOCOLS["asl"].measure(logits, golden["in/labels"], TWELVE))
    assert 100 * found["mAP"] == pytest.approx(float(golden["out/mAP_asl_percent"]), rel=1e-6)
    for ours, theirs in (("threshold=0.5", "thr0.5"), ("top-3", "top3")):
        figures = [100 * found[f"{n}/{ours}"] for n in ("CP", "CR", "CF1", "OP", "OR", "OF1")]
        expected = golden[f"out/CP_CR_CF1_OP_OR_OF1_{theirs}"]
        np.testing.assert_allclose(figures, expected, rtol=1e-6)
        harmonic = float(golden[f"out/CF1_harmonic_of_CP_CR_{theirs}"])
        assert 100 * found[f"CF1_harmonic/{ours}"] == pytest.approx(harmonic, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("long_tail", "out/lt_head_medium_tail"),
        ("long_tail_paper", "out/lt_paper_headstrict_medium20to100_tail"),
    ],
)
def test_long_tail_on_golden_arrays(golden, name, key):
    protocol = dataclasses.replace(PROTOCOLS[name], scores="logits")
    found = values(
        protocol.measure(
            golden["in/scores"], golden["in/labels"], TWELVE, train_counts=golden["in/class_freq"]
        )
    )
    groups = [found[f"mAP/{group}"] for group in ("head", "medium", "tail")]
    np.testing.assert_allclose(groups, golden[key], rtol=1e-6)
    assert found["mAP"] == pytest.approx(float(golden["out/mAP_lmpt_eval_map"]), rel=1e-6)


def test_mkt_on_golden_arrays():
    mkt = dict(np.load(GOLDEN / "mkt.npz"))
    scores, labels = mkt["in/metric_scores"], mkt["in/metric_labels"]
    space = LabelSpace(names=tuple("abcdefghi"), subsets={"unseen": (0, 1, 2, 3, 8)})
    found = values(PROTOCOLS["nus_zsl"].measure(scores, labels, space))
    assert found["GZSL/mAP"] == pytest.approx(float(mkt["out/mAP_mean_all_classes"]), rel=1e-6)
    for k in (3, 5):
        figures = [found[f"GZSL/{name}@{k}"] for name in ("F1", "P", "R")]
        np.testing.assert_allclose(figures, mkt[f"out/F1_P_R_k{k}"], rtol=1e-6)
    unseen = mkt["out/AP"][[0, 1, 2, 3, 8]].mean()
    assert found["ZSL/mAP"] == pytest.approx(unseen, rel=1e-6)


def test_nus_keeps_every_image(problem, entries):
    scores, targets = problem
    found = values(PROTOCOLS["nus_zsl"].measure(scores, targets, SPACE))
    part = scores[:, UNSEEN], targets[:, UNSEEN]
    ap = metrics.average_precision(*part, assume_negative=False)
    assert found["ZSL/mAP"] == pytest.approx(np.nan_to_num(ap).mean(), rel=1e-12)
    figures = metrics.precision_recall_f1(*part, k=3, assume_negative=True)
    assert found["ZSL/F1@3"] == pytest.approx(figures["OF1"], rel=1e-12)
    hits = figures["OP"] * 3 * 50
    assert hits == pytest.approx(round(hits))  # precision over all 50 images


def test_mldecoder_keeps_images_with_a_label_of_the_task(problem, entries):
    scores, targets = problem
    targets = np.where(targets > 0, 1, -1).astype(np.int8)  # its lists are complete
    targets[:5, UNSEEN], targets[:2] = -1, -1
    protocol = PROTOCOLS["nus_zsl_mldecoder"]
    found = values(protocol.measure(scores, targets, SPACE))
    for task, columns in (("ZSL", np.array(UNSEEN)), ("GZSL", np.arange(targets.shape[1]))):
        part = targets[:, columns]
        rows = (part > 0).any(1)
        assert 0 < rows.sum() < len(rows)
        of_all, part = scores[rows][:, columns], part[rows]
        ap = np.nan_to_num(metrics.average_precision(of_all, part, assume_negative=True))
        assert found[f"{task}/mAP"] == pytest.approx(ap.mean(), rel=1e-12)
        figures = metrics.precision_recall_f1(of_all, part, k=3, assume_negative=True)
        assert found[f"{task}/F1@3"] == pytest.approx(figures["OF1"], rel=1e-12)


def test_open_images_keeps_images_with_a_positive(problem, entries):
    scores, targets = problem
    protocol = dataclasses.replace(
        PROTOCOLS["open_images_zsl"],
        metrics=(PROTOCOLS["open_images_zsl"].metrics[0], F1AtK(2), F1AtK(4)),
    )
    figures = protocol.measure(scores, targets, SPACE)
    found = values(figures)

    rows = (targets[:, UNSEEN] > 0).any(axis=1)
    assert 0 < rows.sum() < (targets > 0).any(axis=1).sum() < 50
    part = scores[rows][:, UNSEEN], targets[rows][:, UNSEEN]
    ap = metrics.average_precision(*part, assume_negative=False)
    assert np.isnan(ap).any()  # class 4 counts as 0
    assert found["ZSL/mAP"] == pytest.approx(np.nan_to_num(ap).mean(), rel=1e-12)
    number = (part[1] > 0).sum(axis=0)
    weighted = (number * np.nan_to_num(ap)).sum() / number.sum()
    assert found["ZSL/WmAP"] == pytest.approx(weighted, rel=1e-12)
    expected = metrics.precision_recall_f1(*part, k=2, assume_negative=True)
    assert found["ZSL/P@2"] == pytest.approx(expected["OP"], rel=1e-12)

    rows = (targets > 0).any(axis=1)
    part = scores[rows], targets[rows]
    ap = metrics.average_precision(*part, assume_negative=False)
    labelled = np.arange(24) != 7  # the column without labels is left out, that of negatives is 0
    assert found["GZSL/mAP"] == pytest.approx(np.nan_to_num(ap)[labelled].mean(), rel=1e-12)
    expected = metrics.precision_recall_f1(*part, k=4, assume_negative=True)
    assert found["GZSL/F1@4"] == pytest.approx(expected["OF1"], rel=1e-12)  # over all 24 columns
    assert f"24 classes, {rows.sum()} images" in figures["GZSL/mAP"].convention


def test_softmax_over_classes_ranks_otherwise(problem, entries):
    scores, targets = problem
    protocol = Protocol(
        "softmax",
        (AveragePrecision(assume_negative=True), AtThreshold(0.1), F1AtK(2, threshold=0.2)),
        tasks=(Task(), Task("ZSL", "unseen")),
        scores="softmax_over_classes",
    )
    figures = protocol.measure(scores, targets, SPACE)
    for prefix, columns in (("", range(24)), ("ZSL/", UNSEEN)):
        logits, labels = scores[:, list(columns)].astype(np.float64), targets[:, list(columns)]
        softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        ap = metrics.average_precision(softmax, labels, assume_negative=True)
        other = metrics.average_precision(logits, labels, assume_negative=True)
        expected = metrics.mean_average_precision(ap)
        assert figures[f"{prefix}mAP"].value == pytest.approx(expected, rel=1e-12)
        assert metrics.mean_average_precision(other) != pytest.approx(expected, rel=1e-3)
        rule = {"assume_negative": True}
        cut = metrics.precision_recall_f1(softmax, labels, threshold=0.1, **rule)
        assert figures[f"{prefix}CF1/threshold=0.1"].value == pytest.approx(cut["CF1"], rel=1e-12)
        cut = metrics.precision_recall_f1(softmax, labels, threshold=0.2, k=2, **rule)
        name = f"{prefix}F1@2/threshold=0.2"
        assert figures[name].value == pytest.approx(cut["OF1"], rel=1e-12)
        assert "softmax of each image over the classes > 0.2" in figures[name].convention


def test_softmax_of_huge_logits_is_finite():
    scores = np.array([[1e4, -1e4], [-1e4, 1e4]], np.float32)
    protocol = Protocol("softmax", (AveragePrecision(),), scores="softmax_over_classes")
    assert protocol.measure(scores, np.eye(2, dtype=np.int8), LabelSpace(("a", "b")))["mAP"][0] == 1


def test_thresholds_of_logits_and_of_probabilities(problem):
    scores, targets = problem
    plain = Protocol("logits", (AtThreshold(np.log(0.3 / 0.7)),))
    sigmoid = Protocol("sigmoid", (AtThreshold(0.3),), scores="sigmoid")
    by_logit, by_probability = (
        list(values(p.measure(scores, targets, SPACE)).values()) for p in (plain, sigmoid)
    )
    assert by_logit == by_probability
    decided = 1 / (1 + np.exp(-scores.astype(np.float64))) > 0.3
    expected = metrics.precision_recall_f1(
        decided.astype(np.float32), targets, threshold=0.5, assume_negative=True
    )
    assert by_logit == pytest.approx(list(expected.values()), rel=1e-12)


def test_two_conventions_in_one_protocol(golden):
    protocol = Protocol(
        "both",
        (
            AveragePrecision(assume_negative=True, empty="zero"),
            AveragePrecision(
                assume_negative=True, empty="zero", ties="grouped", name="mAP (scikit-learn)"
            ),
        ),
    )
    figures = protocol.measure(golden["in/scores_ties"], golden["in/labels"], TWELVE)
    expected = float(golden["out/mAP_lmpt_ties"])
    assert figures["mAP (scikit-learn)"].value == pytest.approx(expected, rel=1e-12)
    assert figures["mAP"].value != pytest.approx(expected, rel=1e-3)
    assert "scikit-learn" in figures["mAP (scikit-learn)"].convention
    assert "order of the images" in figures["mAP"].convention


def test_every_figure_says_its_convention(problem):
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name
        ks = [k for m in protocol.metrics if (k := getattr(m, "k", None))]
        space, (scores, targets) = SPACE, problem
        if ks and max(ks) > len(UNSEEN):
            space = LabelSpace(SPACE.names, subsets={"unseen": tuple(range(2, 23))})
        figures = protocol.measure(scores, targets, space, train_counts=np.arange(24) * 7)
        for figure, (value, convention) in figures.items():
            assert 0 <= value <= 1, (name, figure)
            # What was scored, and what an unobserved label counts as, in every case.
            assert " images" in convention and "unobserved labels" in convention
            if "CF1_harmonic" in figure:
                assert "harmonic mean of CP and CR" in convention


def test_selection_of_no_image_is_nan_or_zero():
    scores, targets = np.zeros((4, 24), np.float32), -np.ones((4, 24), np.int8)
    protocol = Protocol(
        "none",
        (AveragePrecision(weighted=True), F1AtK(2)),
        tasks=(Task("ZSL", "unseen", images="with_positive"),),
    )
    found = values(protocol.measure(scores, targets, SPACE))
    assert np.isnan(found["ZSL/mAP"]) and np.isnan(found["ZSL/WmAP"]) and found["ZSL/F1@2"] == 0


def test_figures_of_more_classes_than_there_are_are_left_out(problem):
    """Five classes are unseen: the ten and twenty highest of them are no choice."""
    found = values(PROTOCOLS["open_images_zsl"].measure(*problem, SPACE))
    assert {name for name in found if "@" in name} == {"GZSL/P@10", "GZSL/R@10", "GZSL/F1@10"} | {
        "GZSL/P@20", "GZSL/R@20", "GZSL/F1@20"
    }  # fmt: skip
    assert {"ZSL/mAP", "ZSL/WmAP"} <= set(found)


def test_mistakes_are_named(problem):
    scores, targets = problem
    with pytest.raises(ValueError, match="two metrics share a name"):
        Protocol("p", (AveragePrecision(), AveragePrecision(ties="grouped")))
    with pytest.raises(ValueError, match="two tasks share a name"):
        Protocol("p", (AtTopK(3),), tasks=(Task(), Task(classes="unseen")))
    with pytest.raises(ValueError, match="between 0 and 1"):
        Protocol("p", (AtThreshold(1.5),), scores="sigmoid")
    with pytest.raises(UserError, match="train_counts"):
        PROTOCOLS["long_tail"].measure(scores, targets, SPACE)
    with pytest.raises(UserError, match="no subset named 'unseen'"):
        PROTOCOLS["nus_zsl"].measure(scores, targets, LabelSpace(SPACE.names))
    with pytest.raises(ValueError, match="24 classes were scored"):
        PROTOCOLS["asl"].measure(scores, targets, TWELVE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["multi_label", "asl", "open_images_zsl", "long_tail"])
def test_memory_above_the_inputs_does_not_grow_with_the_classes(name, monkeypatch):
    """125,456 x 7,586, the largest evaluation of the papers, needs at most 2 GiB above its inputs.

    Measured with all of the images and 450 and 900 of the classes: more than the blocks of each
    step hold, so that more classes only mean more blocks and a few numbers for each.
    """
    images, peaks = 125_456, []
    monkeypatch.setattr(ranking, "_THREADS", 8)  # as on a larger machine
    rng = np.random.default_rng(0)
    for classes in (450, 900):
        scores = rng.standard_normal((images, classes), np.float32)
        targets = rng.integers(-1, 2, scores.shape, np.int8)
        unseen = tuple(range(0, classes, 3))
        space = LabelSpace(tuple(map(str, range(classes))), subsets={"unseen": unseen})
        tracemalloc.start()  # counts what NumPy asks for, in every thread
        PROTOCOLS[name].measure(scores, targets, space, train_counts=np.arange(classes))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    small, large = peaks
    assert large < 2**29
    # Were all of the difference growth with the classes, the whole would still fit.
    assert large + (7_586 - 900) * max(0, large - small) / 450 < 2**30
