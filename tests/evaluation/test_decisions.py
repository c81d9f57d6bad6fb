"""Precision, recall, F1 and thresholds: golden arrays, scikit-learn, brute force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlclip_jax.evaluation import metrics, ranking

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ("CP", "CR", "CF1", "OP", "OR", "OF1")


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN / "metrics.npz"))


def random_problem(seed, n=40, c=7, distinct=True):
    rng = np.random.default_rng(seed)
    scores = rng.permutation(n * c).reshape(n, c) if distinct else rng.integers(0, 5, (n, c))
    targets = rng.choice([-1, 0, 1], (n, c), p=[0.5, 0.2, 0.3]).astype(np.int8)
    return scores.astype(np.float32) - 3, targets


@pytest.mark.parametrize(
    ("rule", "choice"),
    [("thr0.5", {"threshold": 0.5}), ("thr0.3", {"threshold": 0.3}), ("top3", {"k": 3})],
)
def test_class_wise_and_overall(golden, rule, choice):
    figures = metrics.precision_recall_f1(golden["in/scores"], golden["in/labels"], **choice)
    ours = [100 * figures[name] for name in NAMES]
    np.testing.assert_allclose(ours, golden[f"out/CP_CR_CF1_OP_OR_OF1_{rule}"], rtol=1e-6)
    harmonic = float(golden[f"out/CF1_harmonic_of_CP_CR_{rule}"])
    assert 100 * figures["CF1_harmonic"] == pytest.approx(harmonic, rel=1e-6)


@pytest.mark.parametrize("k", [3, 5])
def test_micro_at_k_on_complete_labels(golden, k):
    figures = metrics.precision_recall_f1(golden["in/scores"], golden["in/labels"], k=k)
    ours = [figures[name] for name in ("OF1", "OP", "OR")]
    np.testing.assert_allclose(ours, golden[f"out/mkt_F1_P_R_k{k}"], rtol=1e-6)
    percent = golden[f"out/dualcoop_F1_P_R_k{k}_percent"]
    np.testing.assert_allclose([100 * x for x in ours], percent, rtol=1e-6)
    if k == 5:
        expected = golden["out/lmpt_zero_shot_F1_score_top5_P_R_F1"]
        np.testing.assert_allclose(np.roll(ours, -1), expected, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_micro_at_k_counts_unknown_labels_as_wrong(k):
    mkt = dict(np.load(GOLDEN / "mkt.npz"))
    scores, labels = mkt["in/metric_scores"], mkt["in/metric_labels"]
    figures = metrics.precision_recall_f1(scores, labels, k=k, assume_negative=True)
    ours = [figures[name] for name in ("OF1", "OP", "OR")]
    np.testing.assert_allclose(ours, mkt[f"out/F1_P_R_k{k}"], rtol=1e-6)
    left_out = metrics.precision_recall_f1(scores, labels, k=k, assume_negative=False)
    assert left_out["OP"] > figures["OP"]


@pytest.mark.parametrize("choice", [{"threshold": 0.0}, {"k": 2}])
def test_against_scikit_learn(choice):
    from sklearn.metrics import precision_recall_fscore_support

    scores, targets = random_problem(0, distinct=False)
    if "k" in choice:
        rank = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1)
        decided = rank < choice["k"]
    else:
        decided = scores > choice["threshold"]
    figures = metrics.precision_recall_f1(scores, targets, assume_negative=True, **choice)
    for average, names in (("macro", ("CP", "CR", "CF1")), ("micro", ("OP", "OR", "OF1"))):
        expected = precision_recall_fscore_support(
            targets > 0, decided, average=average, zero_division=0
        )
        assert [figures[name] for name in names] == pytest.approx(expected[:3], rel=1e-12)


@pytest.mark.parametrize("assume_negative", [True, False, None])
@pytest.mark.parametrize("choice", [{"threshold": 0.0}, {"k": 3}, {"threshold": 1.5, "k": 3}])
def test_counts_are_those_of_loops(assume_negative, choice, monkeypatch):
    scores, targets = random_problem(1, n=15, c=5, distinct=False)
    targets[:, 1] = np.abs(targets[:, 1])  # no explicit negative
    hits, chosen, present = (np.zeros(5, int) for _ in range(3))
    for values, labels in zip(scores, targets, strict=True):
        best = sorted(range(5), key=lambda c, values=values: (-values[c], c))
        for c in range(5):
            out = assume_negative is False or (assume_negative is None and -1 in targets[:, c])
            yes = values[c] > choice.get("threshold", -np.inf)
            yes &= best.index(c) < choice.get("k", 5) and not (out and labels[c] == 0)
            chosen[c] += yes
            present[c] += labels[c] > 0
            hits[c] += yes and labels[c] > 0
    for entries in (1 << 22, 10):  # at once, and two images at a time
        monkeypatch.setattr(ranking, "BLOCK_ENTRIES", entries)
        counts = metrics.count_decisions(scores, targets, assume_negative=assume_negative, **choice)
        np.testing.assert_array_equal(counts.hits, hits)
        np.testing.assert_array_equal(counts.chosen, chosen)
        np.testing.assert_array_equal(counts.present, present)


def test_counts_of_parts_add_up():
    scores, targets = random_problem(2, distinct=False)

    def count(rows):
        return metrics.count_decisions(scores[rows], targets[rows], k=2, assume_negative=True)

    parts = count(slice(0, 7)) + count(slice(7, 30)) + count(slice(30, None))
    assert parts.figures() == count(slice(None)).figures()


def test_a_threshold_for_every_class():
    scores, targets = random_problem(3)
    thresholds = np.linspace(0, 200, 7)
    counts = metrics.count_decisions(scores, targets, threshold=thresholds, assume_negative=True)
    np.testing.assert_array_equal(counts.chosen, (scores > thresholds).sum(axis=0))


@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_top_k_is_a_stable_sort(distinct, k):
    scores, _ = random_problem(4, distinct=distinct)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(metrics.top_k(scores, k), expected)


def everything_wrong():
    return np.zeros((3, 2), np.float32), -np.ones((3, 2), np.int8)


def test_nothing_to_find_is_zero():
    scores, targets = everything_wrong()
    for choice in ({"threshold": -1.0}, {"threshold": 1.0}):
        figures = metrics.precision_recall_f1(scores, targets, **choice)
        assert set(figures.values()) == {0.0}


def candidates(scores):
    values = np.unique(scores)
    return [*(values - 0.5), values[-1]]


@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("assume_negative", [True, False, None])
def test_best_threshold_by_trying_all(distinct, assume_negative, monkeypatch):
    scores, targets = random_problem(6, distinct=distinct)

    def f1(threshold):
        return metrics.precision_recall_f1(
            scores, targets, threshold=threshold, assume_negative=assume_negative
        )["OF1"]

    best = metrics.best_f1_threshold(scores, targets, assume_negative=assume_negative)
    assert f1(best) == pytest.approx(max(map(f1, candidates(scores))), abs=1e-12)
    monkeypatch.setattr(ranking, "BLOCK_ENTRIES", 30)
    assert metrics.best_f1_threshold(scores, targets, assume_negative=assume_negative) == best


def test_best_threshold_of_every_class():
    scores, targets = random_problem(7)
    targets[:, 2] = -1
    found = metrics.best_f1_thresholds(scores, targets)
    for c in range(7):
        column = slice(c, c + 1)
        if c == 2:
            assert np.isnan(found[c])
        else:
            assert found[c] == metrics.best_f1_threshold(scores[:, column], targets[:, column])


@pytest.mark.parametrize("low", [0.0, -3e38, 1.0, -np.inf])
@pytest.mark.parametrize("high", [np.nextafter(np.float32(1), np.float32(2)), 3e38, np.inf])
def test_best_threshold_parts_neighbours_in_float32(low, high):
    scores = np.array([[low], [high], [high]], np.float32)
    targets = np.array([[-1], [1], [1]], np.int8)
    best = metrics.best_f1_threshold(scores, targets)
    np.testing.assert_array_equal(scores > np.float32(best), targets > 0)
    np.testing.assert_array_equal(scores > best, targets > 0)


def test_best_threshold_without_a_negative_takes_everything():
    scores = np.array([[3e38], [5.0]], np.float32)
    assert metrics.best_f1_threshold(scores, np.ones((2, 1), np.int8)) < 5.0
    big = np.full((2, 1), 3e38, np.float32)
    assert (big > metrics.best_f1_threshold(big, np.ones((2, 1), np.int8))).all()


def test_mistakes_are_named():
    scores, targets = everything_wrong()
    with pytest.raises(ValueError, match="no class has a positive"):
        metrics.best_f1_threshold(scores, targets)
    with pytest.raises(ValueError, match="threshold, a k, or both"):
        metrics.count_decisions(scores, targets)
    for k in (0, 3):
        with pytest.raises(ValueError, match="between 1 and the number of classes 2"):
            metrics.top_k(scores, k)
    with pytest.raises(ValueError, match="must both be"):
        metrics.count_decisions(scores, targets[:2], k=1)
