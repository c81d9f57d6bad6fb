from __future__ import annotations

import numpy as np
import pytest

from mlclip_jax.data import protocols
from mlclip_jax.errors import UserError

SUBSETS = {"seen": (0, 1, 2, 3), "unseen": (4, 5, 6, 7)}


def labels(n=400, c=8, share=0.3, seed=0):
    rng = np.random.default_rng(seed)
    return np.where(rng.random((n, c)) < share, 1, -1).astype(np.int8)


ALL = ("full", "single_positive", "partial(0.3)", "few_shot(5)", "few_shot(0.1)", "long_tail(20)",
       "seen", "unseen", "long_tail+single_positive")  # fmt: skip


@pytest.mark.parametrize("view", ALL)
def test_views_are_pure_seeded_and_only_take_away(view):
    y = labels()
    before = y.copy()
    first = protocols.apply(view, y, seed=1, subsets=SUBSETS)
    again = protocols.apply(view, y, seed=1, subsets=SUBSETS)
    np.testing.assert_array_equal(y, before)
    np.testing.assert_array_equal(first.targets, again.targets)
    np.testing.assert_array_equal(first.index, again.index)
    assert first.targets.dtype == np.int8 and first.index.dtype == np.int64
    assert (np.diff(first.index) > 0).all()
    kept = y[first.index]
    assert ((first.targets == kept) | (first.targets == 0)).all()
    if view not in ("full", "seen", "unseen"):
        other = protocols.apply(view, y, seed=2, subsets=SUBSETS)
        same = np.array_equal(first.index, other.index)
        assert not (same and np.array_equal(first.targets, other.targets))


def test_single_positive_is_one_uniform_positive():
    y = labels(n=20_000, c=4, share=0.5)
    y[0] = -1
    view = protocols.apply("single_positive", y)
    ones = (view.targets == 1).sum(1)
    np.testing.assert_array_equal(ones, (y == 1).any(1))
    assert (view.targets >= 0).all()
    full = (y == 1).all(1)
    share = (view.targets[full] == 1).mean(0)
    np.testing.assert_allclose(share, 0.25, atol=0.05)


def test_partial_observes_its_share_of_both_kinds():
    y = labels(n=5000)
    view = protocols.apply("partial(0.3)", y)
    for value in (1, -1):
        assert abs((view.targets[y == value] != 0).mean() - 0.3) < 0.02
    np.testing.assert_array_equal(protocols.apply("partial(1)", y).targets, y)


def test_few_shot_by_class_and_by_share():
    y = labels()
    view = protocols.apply("few_shot(5)", y)
    assert ((view.targets == 1).sum(0) >= 5).all() and len(view.index) <= 40
    assert len(protocols.apply("few_shot(0.1)", y).index) == 40
    rare = -np.ones((10, 2), np.int8)
    rare[:, 0] = 1
    rare[3, 1] = 1
    view = protocols.apply("few_shot(2)", rare)
    assert 3 in view.index and (view.targets == 1).sum(0).tolist() == [2, 1]


def test_long_tail_stays_under_a_falling_curve():
    y = labels(n=4000, share=0.2)
    counts = (y == 1).sum(0)
    limits = protocols.LongTail(50).limits(counts)
    view = protocols.apply("long_tail(50)", y)
    kept = (view.targets == 1).sum(0)
    assert (kept <= limits).all() and (kept > 0).all()
    ranked = kept[np.argsort(-counts, kind="stable")]
    assert ranked[-1] == limits.min() == round(counts.max() / 50)
    assert ranked[0] > 10 * ranked[-1]
    assert protocols.LongTail(1).limits(counts).tolist() == counts.tolist()


def test_seen_and_unseen():
    y = labels()
    view = protocols.apply("seen", y, subsets=SUBSETS)
    assert (view.targets[:, 4:] == 0).all()
    np.testing.assert_array_equal(view.targets[:, :4], y[view.index][:, :4])
    np.testing.assert_array_equal(view.index, np.flatnonzero((y[:, :4] == 1).any(1)))
    assert (protocols.apply("subset('unseen')", y, subsets=SUBSETS).targets[:, :4] == 0).all()


def test_views_compose_from_left_to_right():
    y = labels()
    view = protocols.apply("few_shot(0.5) + single_positive + partial(0.5)", y)
    assert len(view.index) == 200
    assert 0 < (view.targets == 1).sum() < 200
    chain = protocols.parse("long_tail(20)+partial(share=0.5, seed=3)")
    assert chain == (protocols.LongTail(20), protocols.Partial(0.5, seed=3))


def test_a_view_may_bring_its_seed():
    y = labels()
    one = protocols.apply("partial(0.5, seed=9)", y, seed=1)
    two = protocols.apply("full + partial(0.5, seed=9)", y, seed=2)
    np.testing.assert_array_equal(one.targets, two.targets)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ("single_positve", "did you mean 'single_positive'"),
        ("wiggle", "unknown label view 'wiggle'; known: few_shot"),
        ("partial", r"'partial' takes \(share, seed\)"),
        ("partial(0)", "above 0"),
        ("partial('a')", "takes"),
        ("partial(q)", "should read"),
        ("few_shot(1.5)", "whole number"),
        ("few_shot(True)", "whole number"),
        ("long_tail(0.5)", "at least 1"),
        ("full * 3", "should read"),
        ("full(", "cannot read"),
        ("partial(0.3, seed=-1)", "seed -1 is no whole number"),
        ("partial(0.3, seed=0.5)", "seed 0.5 is no whole number"),
        ("subset('other')", "no subset 'other'; it has: seen, unseen"),
    ],
)
def test_errors(view, message):
    with pytest.raises(UserError, match=message):
        protocols.apply(view, labels(), subsets=SUBSETS)


def test_wrong_arrays_are_refused():
    with pytest.raises(ValueError, match="int8"):
        protocols.apply("full", labels().astype(np.float32))
    with pytest.raises(UserError, match="seed -1"):
        protocols.apply("full", labels(), seed=-1)
    with pytest.raises(UserError, match="no image has a positive"):
        protocols.apply("seen", -np.ones((5, 8), np.int8), subsets=SUBSETS)
