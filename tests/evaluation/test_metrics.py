"""Metrics against the golden arrays, scikit-learn, brute force and their own invariants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlclip_jax.errors import UserError
from mlclip_jax.evaluation import metrics

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics.npz"


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


def brute_force_ap(scores, targets, valid):
    """Definition: mean over positives of (positives at or above it) / (entries at or above it)."""
    rows = [i for i in range(len(scores)) if valid[i]]
    rows.sort(key=lambda i: (-scores[i], i))
    hits, precisions = 0, []
    for rank, row in enumerate(rows, start=1):
        if targets[row] > 0:
            hits += 1
            precisions.append(hits / rank)
    return np.mean(precisions) if precisions else np.nan


def random_problem(seed, n=40, c=7, distinct=True):
    rng = np.random.default_rng(seed)
    scores = rng.permutation(n * c).reshape(n, c) if distinct else rng.integers(0, 5, (n, c))
    targets = rng.choice([-1, 0, 1], (n, c), p=[0.5, 0.2, 0.3]).astype(np.int8)
    return scores.astype(np.float32), targets


def test_asl_convention(golden):
    ap = metrics.average_precision(golden["in/scores"], golden["in/labels"])
    expected = golden["out/AP_asl_per_class"]
    np.testing.assert_allclose(np.nan_to_num(ap), expected, atol=1e-7, rtol=0)
    zero = metrics.mean_average_precision(ap, empty="zero")
    assert 100 * zero == pytest.approx(float(golden["out/mAP_asl_percent"]), abs=1e-5)
    skip = metrics.mean_average_precision(ap)
    assert skip == pytest.approx(float(golden["own/mAP_ignoring_empty_classes"]), rel=1e-6)


def test_mkt_convention(golden):
    signed = np.where(golden["in/labels"] > 0, 1, -1).astype(np.int8)
    ap = metrics.average_precision(golden["in/scores"], signed, assume_negative=False)
    np.testing.assert_allclose(np.nan_to_num(ap), golden["out/AP_mkt_per_class"], atol=1e-6)


def test_grouped_ties_are_those_of_scikit_learn(golden):
    scores, labels = golden["in/scores_ties"], golden["in/labels"]
    ap = metrics.average_precision(scores, labels, ties="grouped")
    np.testing.assert_allclose(np.nan_to_num(ap), golden["out/AP_lmpt_ties_per_class"], atol=1e-12)


@pytest.mark.parametrize("rule", ["thr0.5", "thr0.3", "top3"])
def test_precision_recall_f1(golden, rule):
    scores, labels = golden["in/scores"], golden["in/labels"]
    by_rank = rule == "top3"
    decisions = metrics.top_k_decisions(scores, 3) if by_rank else scores > float(rule[3:])
    figures = metrics.precision_recall_f1(decisions, labels)
    ours = [100 * figures[name] for name in ("CP", "CR", "CF1", "OP", "OR", "OF1")]
    np.testing.assert_allclose(ours, golden[f"out/CP_CR_CF1_OP_OR_OF1_{rule}"], rtol=1e-6)
    harmonic = float(golden[f"out/CF1_harmonic_of_CP_CR_{rule}"])
    assert 100 * figures["CF1_harmonic"] == pytest.approx(harmonic, rel=1e-6)


@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("assume_negative", [True, False])
def test_average_precision_is_its_definition(distinct, assume_negative):
    scores, targets = random_problem(0, distinct=distinct)
    scores -= scores.mean()  # both signs, and zero
    valid = np.ones(targets.shape, bool) if assume_negative else targets != 0
    ap = metrics.average_precision(scores, targets, assume_negative=assume_negative)
    expected = [
        brute_force_ap(*columns) for columns in zip(scores.T, targets.T, valid.T, strict=True)
    ]
    np.testing.assert_allclose(ap, expected, rtol=1e-12)


def test_unobserved_entries_follow_the_class_by_default():
    scores = np.array([[3.0, 3.0], [2.0, 2.0], [1.0, 1.0], [0.0, 0.0]])
    targets = np.array([[0, 0], [1, 1], [-1, 0], [0, 0]], np.int8)
    # Class 0 has an explicit negative: its zeros do not count. Class 1 has none: they do.
    np.testing.assert_allclose(metrics.average_precision(scores, targets), [1.0, 0.5])
    both = metrics.average_precision(scores, targets, assume_negative=True)
    np.testing.assert_allclose(both, [0.5, 0.5])


def test_negative_zero_ties_with_zero():
    scores, targets = np.array([[-0.0], [0.0]]), np.array([[1], [-1]], np.int8)
    assert metrics.average_precision(scores, targets)[0] == 1.0


def test_classes_in_chunks_equal_all_at_once(monkeypatch):
    scores, targets = random_problem(1)
    whole = metrics.average_precision(scores, targets)
    monkeypatch.setattr(metrics, "_CHUNK_ENTRIES", 90)  # two classes at a time
    np.testing.assert_array_equal(metrics.average_precision(scores, targets), whole)


def test_mean_over_no_class_is_nan():
    empty = metrics.average_precision(np.zeros((0, 3)), np.zeros((0, 3), np.int8))
    assert np.isnan(empty).all() and np.isnan(metrics.mean_average_precision(empty))
    assert metrics.mean_average_precision(empty, empty="zero") == 0.0


@pytest.mark.parametrize("distinct", [True, False])
def test_best_threshold_by_trying_all(distinct):
    scores, targets = random_problem(6, distinct=distinct)

    def f1(threshold):
        return metrics.precision_recall_f1(scores > threshold, targets)["OF1"]

    best = metrics.best_f1_threshold(scores, targets)
    everything = [f1(value - 0.5) for value in np.unique(scores)]
    assert f1(best) == pytest.approx(max(everything), abs=1e-12)
    with pytest.raises(ValueError, match="no class has a positive"):
        metrics.best_f1_threshold(scores, -np.ones_like(targets))


def gather(scores, targets, index, parts):
    states = []
    for rows in parts:
        state = metrics.Predictions(scores.shape[1])
        state.append(scores[rows], targets[rows], index=index[rows])
        states.append(state)
    merged = metrics.Predictions(scores.shape[1])
    for state in states:
        merged = merged.merge(state)
    return merged


@pytest.mark.parametrize("seed", range(5))
def test_merging_in_any_order_equals_the_whole(seed):
    scores, targets = random_problem(seed, distinct=False)  # ties: row order must not leak
    index = np.arange(len(scores)) * 3
    rng = np.random.default_rng(seed)
    parts = np.array_split(rng.permutation(len(scores)), 5)
    merged = gather(scores, targets, index, parts).arrays()
    for ours, whole in zip(merged, (scores, targets, index), strict=True):
        np.testing.assert_array_equal(ours, whole)


def test_order_of_images_is_irrelevant_for_distinct_scores():
    scores, targets = random_problem(3)
    order = np.random.default_rng(3).permutation(len(scores))
    np.testing.assert_array_equal(
        metrics.average_precision(scores, targets),
        metrics.average_precision(scores[order], targets[order]),
    )


def test_padded_rows_and_classes_do_not_count():
    scores, targets = random_problem(4, n=6, c=3)
    whole = metrics.Predictions(3)
    whole.append(scores, targets)
    padded = metrics.Predictions(3)
    wide = np.concatenate([scores, np.full((6, 2), np.nan, np.float32)], axis=1)
    rows = np.concatenate([wide, np.full((2, 5), np.nan, np.float32)])
    labels = np.concatenate([targets, np.ones((2, 3), np.int8)])
    padded.append(rows, labels, mask=np.arange(8) < 6)
    for ours, expected in zip(padded.arrays(), whole.arrays(), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_empty_merge():
    scores, targets = random_problem(5, n=4, c=2)
    state = metrics.Predictions(2)
    state.append(scores, targets)
    both = metrics.Predictions(2).merge(state).merge(metrics.Predictions(2))
    assert len(both) == 4 and len(metrics.Predictions(2)) == 0
    np.testing.assert_array_equal(both.arrays()[0], scores)
    assert metrics.Predictions(2).arrays()[0].shape == (0, 2)


def test_appended_arrays_are_copied():
    scores = np.zeros((2, 2), np.float32)
    state = metrics.Predictions(2)
    state.append(scores, np.zeros((2, 2), np.int8))
    scores += 1  # a loader may reuse its buffers
    assert not state.arrays()[0].any()


def test_mistakes_are_named():
    state = metrics.Predictions(3)
    with pytest.raises(ValueError, match="must both be"):
        state.append(np.zeros((2, 2)), np.zeros((2, 3)))
    with pytest.raises(UserError, match=r"NaN: .*use an earlier checkpoint"):
        state.append(np.full((1, 3), np.nan), np.zeros((1, 3)))
    with pytest.raises(ValueError, match="cannot merge"):
        state.merge(metrics.Predictions(2))
    state.append(np.zeros((2, 3)), np.zeros((2, 3)), index=[4, 4])
    with pytest.raises(ValueError, match="scored twice"):
        state.arrays()
