"""Metrics against the golden arrays, scikit-learn, brute force and their own invariants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlclip_jax.errors import UserError
from mlclip_jax.evaluation import metrics, ranking

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN / "metrics.npz"))


@pytest.fixture(scope="module")
def mkt():
    return dict(np.load(GOLDEN / "mkt.npz"))


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
    ap = metrics.average_precision(golden["in/scores"], golden["in/labels"], assume_negative=True)
    expected = golden["out/AP_asl_per_class"]
    # Theirs divides by the number of positives + 1e-8.
    np.testing.assert_allclose(np.nan_to_num(ap), expected, atol=1e-7, rtol=0)
    np.testing.assert_allclose(np.nan_to_num(ap), golden["out/AP_apmeter_per_class"], atol=1e-7)
    np.testing.assert_allclose(np.nan_to_num(ap), golden["out/AP_lmpt_eval_map_per_class"])
    zero = metrics.mean_average_precision(ap, empty="zero")
    assert 100 * zero == pytest.approx(float(golden["out/mAP_asl_percent"]), abs=1e-5)
    assert zero == pytest.approx(float(golden["out/mAP_lmpt_eval_map"]), rel=1e-12)
    skip = metrics.mean_average_precision(ap)
    assert skip == pytest.approx(float(golden["own/mAP_ignoring_empty_classes"]), rel=1e-6)


def test_mkt_convention(golden):
    signed = np.where(golden["in/labels"] > 0, 1, -1).astype(np.int8)
    ap = metrics.average_precision(golden["in/scores"], signed, assume_negative=False)
    np.testing.assert_allclose(np.nan_to_num(ap), golden["out/AP_mkt_per_class"], atol=1e-7)
    zero = metrics.mean_average_precision(ap, empty="zero")
    assert zero == pytest.approx(float(golden["out/mAP_mkt"]), rel=1e-6)


def test_mkt_convention_with_unknown_labels(mkt):
    scores, labels = mkt["in/metric_scores"], mkt["in/metric_labels"]
    assert (labels == 0).any()
    ap = metrics.average_precision(scores, labels, assume_negative=False)
    np.testing.assert_allclose(np.nan_to_num(ap), mkt["out/AP"], rtol=1e-6)
    for empty, name in (("zero", "out/mAP_mean_all_classes"), ("skip", "out/mAP_mean_nonempty")):
        mean = metrics.mean_average_precision(ap, empty=empty)
        assert mean == pytest.approx(float(mkt[name]), rel=1e-6)


def test_grouped_ties_are_those_of_scikit_learn(golden):
    scores, labels = golden["in/scores_ties"], golden["in/labels"]
    ap = metrics.average_precision(scores, labels, ties="grouped")
    np.testing.assert_allclose(np.nan_to_num(ap), golden["out/AP_lmpt_ties_per_class"], atol=1e-12)
    zero = metrics.mean_average_precision(ap, empty="zero")
    assert zero == pytest.approx(float(golden["out/mAP_lmpt_ties"]), rel=1e-12)


@pytest.mark.parametrize("distinct", [True, False])
def test_grouped_ties_against_scikit_learn_itself(distinct):
    from sklearn.metrics import average_precision_score

    scores, targets = random_problem(9, n=300, distinct=distinct)
    ap = metrics.average_precision(scores, targets, assume_negative=True, ties="grouped")
    expected = [average_precision_score(t > 0, s) for s, t in zip(scores.T, targets.T, strict=True)]
    np.testing.assert_allclose(ap, expected, rtol=1e-12)


def test_average_precision_over_the_classes_of_an_image(golden):
    scores, labels = golden["in/scores"].T, golden["in/labels"].T
    ap = metrics.average_precision(scores, labels, assume_negative=True)
    mean = metrics.mean_average_precision(ap)
    expected = float(golden["out/samplewise_mAP_zero_shot_compute_mAP"])
    assert mean == pytest.approx(expected, rel=1e-6)


def test_weighted_mean(golden):
    labels = golden["in/labels"]
    ap = metrics.average_precision(golden["in/scores"], labels)
    positives = metrics.count_positives(labels)
    np.testing.assert_array_equal(positives, (labels > 0).sum(axis=0))
    weighted = metrics.weighted_mean_average_precision(ap, positives)
    expected = float(golden["own/WmAP_positive_count_weighted"])
    assert weighted == pytest.approx(expected, rel=1e-6)
    assert np.isnan(metrics.weighted_mean_average_precision(np.array([np.nan]), np.array([0])))


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        ("released", "out/lt_head_medium_tail"),
        ("paper", "out/lt_paper_headstrict_medium20to100_tail"),
    ],
)
def test_head_medium_tail(golden, rule, name):
    ap = np.nan_to_num(metrics.average_precision(golden["in/scores"], golden["in/labels"]))
    groups = metrics.frequency_groups(golden["in/class_freq"], rule=rule)
    assert list(groups) == ["head", "medium", "tail"]
    assert sorted(np.concatenate(list(groups.values()))) == list(range(12))
    np.testing.assert_allclose([ap[g].mean() for g in groups.values()], golden[name], rtol=1e-6)


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


@pytest.mark.parametrize("ties", ["stable", "grouped"])
def test_classes_in_chunks_equal_all_at_once(monkeypatch, ties):
    scores, targets = random_problem(1, distinct=False)
    whole = metrics.average_precision(scores, targets, ties=ties)
    positives = metrics.count_positives(targets)
    monkeypatch.setattr(ranking, "BLOCK_ENTRIES", 90)  # two classes at a time, in threads
    monkeypatch.setattr(ranking, "_TRANSPOSED_ROWS", 7)
    found = metrics.average_precision(scores, targets, ties=ties)
    np.testing.assert_array_equal(found, whole)
    np.testing.assert_array_equal(metrics.count_positives(targets), positives)


def test_infinite_scores_have_a_rank():
    scores, targets = np.array([[-np.inf], [np.inf], [0.0]]), np.array([[1], [-1], [1]], np.int8)
    assert metrics.average_precision(scores, targets)[0] == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_mean_over_no_class_is_nan():
    empty = metrics.average_precision(np.zeros((0, 3)), np.zeros((0, 3), np.int8))
    assert np.isnan(empty).all() and np.isnan(metrics.mean_average_precision(empty))
    assert metrics.mean_average_precision(empty, empty="zero") == 0.0


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


@st.composite
def problems(draw):
    """Scores with ties, targets, and a permutation of the images."""
    n, c = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    cells = st.lists(st.integers(-3, 3), min_size=n * c, max_size=n * c)
    scores = np.array(draw(cells), np.float32).reshape(n, c)
    labels = st.lists(st.sampled_from([-1, 0, 1]), min_size=n * c, max_size=n * c)
    targets = np.array(draw(labels), np.int8).reshape(n, c)
    return scores, targets, np.array(draw(st.permutations(range(n))))


@given(problems(), st.lists(st.integers(0, 12), max_size=4), st.randoms(use_true_random=False))
def test_merging_in_any_order_equals_the_whole(problem, cuts, random):
    scores, targets, order = problem  # ties: the order of rows must not leak
    index = np.arange(len(scores)) * 3
    parts = np.split(order, sorted(cuts))
    random.shuffle(parts)
    merged = gather(scores, targets, index, parts).arrays()
    for ours, whole in zip(merged, (scores, targets, index), strict=True):
        np.testing.assert_array_equal(ours, whole)


@given(problems())
def test_grouped_ties_do_not_depend_on_the_order_of_images(problem):
    scores, targets, order = problem
    np.testing.assert_array_equal(
        metrics.average_precision(scores, targets, ties="grouped"),
        metrics.average_precision(scores[order], targets[order], ties="grouped"),
    )


@given(problems())
def test_order_of_images_is_irrelevant_for_distinct_scores(problem):
    scores, targets, order = problem
    scores = np.argsort(np.argsort(scores, axis=0, kind="stable"), axis=0)
    np.testing.assert_array_equal(
        metrics.average_precision(scores, targets),
        metrics.average_precision(scores[order], targets[order]),
    )


@given(
    problems(),
    st.sampled_from(["stable", "grouped"]),
    st.sampled_from([np.exp, np.arctan, lambda x: x**3, lambda x: 1000 * x - 7]),
)
def test_increasing_functions_of_the_scores_change_nothing(problem, ties, function):
    scores, targets, _ = problem
    np.testing.assert_array_equal(
        metrics.average_precision(scores, targets, ties=ties),
        metrics.average_precision(function(scores), targets, ties=ties),
    )


@given(problems(), st.sampled_from([True, False, None]))
def test_average_precision_is_its_definition_on_anything(problem, assume_negative):
    scores, targets, _ = problem
    expected = []
    for values, labels in zip(scores.T, targets.T, strict=True):
        everything = assume_negative or (assume_negative is None and -1 not in labels)
        expected.append(brute_force_ap(values, labels, (labels != 0) | bool(everything)))
    ap = metrics.average_precision(scores, targets, assume_negative=assume_negative)
    np.testing.assert_allclose(ap, expected, rtol=1e-12)


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
    with pytest.raises(ValueError, match="must both be"):
        metrics.average_precision(np.zeros((2, 3)), np.zeros((2, 2), np.int8))
    with pytest.raises(ValueError, match="NaN"):
        metrics.average_precision(np.full((2, 1), np.nan), np.zeros((2, 1), np.int8))
