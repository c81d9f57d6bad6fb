from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlclip_jax.data import protocols
from mlclip_jax.data.manifest import Rows
from mlclip_jax.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "lmpt.npz"

COLE = [0, 1, 4, 0]
REGRESSION = "d217e92f2d7889be0a78460f818618760d130c997f62f3bbbea89b387ac14641"
SUBSETS = {"seen": (0, 1, 2, 3), "unseen": (4, 5, 6, 7)}


def labels(n=400, c=8, share=0.3, seed=0):
    rng = np.random.default_rng(seed)
    return np.where(rng.random((n, c)) < share, 1, -1).astype(np.int8)


ALL = ("full", "single_positive", "partial(0.3)", "few_shot(5)", "few_shot(0.1)", "long_tail(20)",
       "seen", "unseen", "restrict('seen')", "require_positive", "positives_left(0.2)",
       "long_tail+single_positive")  # fmt: skip


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
    if not view.startswith(("full", "seen", "unseen", "restrict", "require")):
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
        ("wiggle", "unknown label view 'wiggle'; known: cole_few_shot"),
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
        ("restrict('other')", "no subset 'other'"),
        ("require_positive('other')", "no subset 'other'"),
        ("restrict", r"'restrict' takes \(subset, seed\)"),
        ("positives_left(0)", "above 0"),
        ("holdout(2)", "above 0"),
        ("holdout(0.2, 'test')", "'train' or 'validation'"),
        ("cole_few_shot(16)", "at most 1"),
        ("sarb_partial(0)", "above 0"),
        ("cole_single_positive(seed=-1)", "seed -1"),
        ("pareto_tail(max=0)", "max >= 1"),
        ("order_by('size')", "by 'name' or by 'id'"),
        ("order_by('id')", "no names"),
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


def test_positives_left_as_splc_counts_them():
    y = labels(n=3000, share=0.5)
    kept = (protocols.apply("positives_left(0.2)", y).targets == 1).sum(1)
    total = (y == 1).sum(1)
    np.testing.assert_array_equal(kept, np.minimum(total, total // 5 + 1))
    half = protocols.apply("positives_left(0.5)", y).targets
    np.testing.assert_array_equal((half == 1).sum(1), np.minimum(total, total // 2 + 1))
    assert (half >= 0).all()
    full = (y == 1).all(1)
    np.testing.assert_allclose((half[full] == 1).mean(0), 5 / 8, atol=0.3)


def test_rows_and_labels_of_a_subset_one_by_one():
    y = -np.ones((4, 8), np.int8)
    y[0, 1] = y[1, 6] = y[2, [2, 7]] = 1
    cut = protocols.apply("restrict('unseen')", y, subsets=SUBSETS)
    assert len(cut.index) == 4 and (cut.targets[:, :4] == 0).all()
    np.testing.assert_array_equal(cut.targets[:, 4:], y[:, 4:])
    rows = protocols.apply("require_positive('unseen')", y, subsets=SUBSETS)
    assert rows.index.tolist() == [1, 2]
    np.testing.assert_array_equal(rows.targets, y[[1, 2]])
    assert protocols.apply("require_positive", y).index.tolist() == [0, 1, 2]
    both = protocols.apply("restrict('seen')+require_positive", y, subsets=SUBSETS)
    seen = protocols.apply("seen", y, subsets=SUBSETS)
    np.testing.assert_array_equal(both.targets, seen.targets)
    np.testing.assert_array_equal(both.index, seen.index)


def test_images_are_ordered_as_released_code_lists_them():
    keys = np.array([f"train2014/COCO_train2014_{i:012d}.jpg" for i in (9, 480023, 57, 1000, 10)])
    y = labels(n=5)
    by_id = protocols.apply("order_by('id')", y, keys=keys)
    assert by_id.index.tolist() == [4, 3, 1, 2, 0]  # "10" "1000" "480023" "57" "9"
    np.testing.assert_array_equal(by_id.targets, y[by_id.index])
    assert protocols.apply("order_by('name')", y, keys=keys).index.tolist() == [0, 4, 2, 3, 1]
    rows = protocols.apply("first(0.6)+order_by('id')", y, keys=keys)
    assert rows.index.tolist() == [1, 2, 0]
    with pytest.raises(UserError, match=r"'a/b1/c\.jpg' has no number"):
        protocols.apply("order_by('id')", y, keys=np.array(["a/b1/c.jpg"] * 5))


def test_single_positives_of_cole_et_al():
    y = np.array(
        [[1, 1, -1, 1, -1], [-1, 1, 1, 1, 1], [1, -1, -1, -1, 1], [1, 1, 1, -1, 1]], np.int8
    )
    rng = np.random.RandomState(1200)
    expected, short = [], []
    for row in y:
        positive, negative = np.nonzero(row == 1)[0], np.nonzero(row == -1)[0]
        rng.shuffle(positive)
        expected.append(positive[0])
        rng.shuffle(negative)
    rng = np.random.RandomState(1200)
    for row in y:
        positive = np.nonzero(row == 1)[0]
        rng.shuffle(positive)
        short.append(positive[0])
    view = protocols.apply("cole_single_positive", y, seed=5)
    assert view.targets.argmax(1).tolist() == expected == COLE
    assert expected != short  # the negatives move the stream on
    assert (view.targets.sum(1) == 1).all() and (view.targets >= 0).all()
    none = protocols.apply("cole_single_positive", -y[:1] * 0 - np.int8(1))
    assert not none.targets.any()


@pytest.mark.parametrize(
    ("n", "train"), [(82_081, 65_665), (5_717, 4_574), (150_000, 120_000), (5_994, 4_795)]
)
def test_holdout_has_the_published_sizes(n, train):
    y = np.zeros((n, 1), np.int8)
    kept = protocols.apply("holdout(0.2)", y).index
    held = protocols.apply("holdout(0.2, part='validation')", y).index
    assert (len(kept), len(held)) == (train, n - train)
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held])), np.arange(n))
    order = np.random.RandomState(1200).permutation(n)
    np.testing.assert_array_equal(kept, np.sort(order[:train]))
    assert (np.diff(held) > 0).all()


def test_few_images_as_largeloss_and_dualcoop_take_them():
    y = labels(n=45)
    few = protocols.apply("cole_few_shot(0.1)", y)
    assert few.index.tolist() == sorted(np.random.RandomState(999).permutation(45)[:4].tolist())
    more = protocols.apply("cole_few_shot(0.5)", y).index
    assert set(few.index) < set(more)
    assert protocols.apply("first(0.1)", y).index.tolist() == [0, 1, 2, 3]


def test_partial_labels_of_sarb():
    rng = np.random.RandomState(0)
    np.testing.assert_allclose(
        rng.random_sample(5), [0.5488, 0.7152, 0.6028, 0.5449, 0.4237], atol=5e-5
    )
    y = labels(n=2000, c=5)
    views = {p: protocols.apply(f"sarb_partial({p})", y).targets for p in (0.1, 0.55, 0.9)}
    assert (views[0.55][0] != 0).tolist() == [True, False, False, True, True]
    for p, targets in views.items():
        assert abs((targets != 0).mean() - p) < 0.02
        assert ((targets == y) | (targets == 0)).all()
    for small, large in ((0.1, 0.55), (0.55, 0.9)):
        assert ((views[small] != 0) <= (views[large] != 0)).all()


def test_reference_of_the_long_tail():
    expected = [800, 529, 359, 248, 175, 125, 91, 67, 50, 38, 29, 23, 18, 14, 11, 9, 7, 6, 5, 4]
    assert protocols.ParetoTail().reference(20).tolist() == expected
    coco = protocols.ParetoTail(max=1200).reference(80)
    assert coco[0] == 1200 and coco[-1] == 6 and (np.diff(coco) <= 0).all()


def slow_pareto_tail(y, most, seed):
    """The published recipe, written for Python 3.9 and a quadratic memory of counts."""
    draw = random.Random(seed)
    c = y.shape[1]
    x = np.linspace(1, 100 ** (1 / 6), c)
    wanted = (6 / x**7 * (most - 1) / 6 + 1).astype(int)
    share = np.zeros((c, c))
    for i in range(c):
        share[i] = y[y[:, i] == 1].sum(0) / max(y[:, i].sum(), 1)
    taken, per_class, count = set(), {i: set() for i in range(c)}, np.zeros(c)
    removed = 0
    for target, i in zip(wanted, np.argsort(-share.sum(0), kind="stable"), strict=True):
        lacks = int(target - count[i])
        sign = 1 if lacks > 0 else -1
        pool = per_class[i]
        if lacks > 0:
            pool = set(np.flatnonzero(y[:, i]).tolist()) - per_class[i]
        for row in draw.sample(tuple(pool), min(abs(lacks), len(pool))):
            removed += lacks < 0
            (taken.add if lacks > 0 else taken.remove)(row)
            count += sign * y[row]
            for j in np.flatnonzero(y[row]):
                (per_class[j].add if lacks > 0 else per_class[j].remove)(row)
    return list(taken), removed


@pytest.mark.parametrize("seed", [0, 3])
def test_long_tail_of_wu_et_al(seed):
    rng = np.random.default_rng(seed)
    shares = np.linspace(0.4, 0.02, 8)
    y = (rng.random((1500, 8)) < shares).astype(np.int8)
    y[:, 1] |= y[:, 0]  # classes that come together: images are taken away again
    y[0] = 0
    view = protocols.apply(f"pareto_tail(max=300, seed={seed})", 2 * y - np.int8(1))
    expected, removed = slow_pareto_tail(y.astype(int), 300, seed)
    assert view.index.tolist() == expected and removed
    assert len(set(view.index.tolist())) == len(view.index) < 1500
    np.testing.assert_array_equal(view.targets, 2 * y[view.index] - 1)
    with pytest.raises(UserError, match="no image has a positive"):
        protocols.apply("pareto_tail", -np.ones((5, 3), np.int8))


@pytest.mark.skipif("MLCLIP_VOC" not in os.environ, reason="needs VOCdevkit (set MLCLIP_VOC)")
def test_voc_lt_is_the_official_one():
    from mlclip_jax.data.raw import voc

    manifest = voc.read(Path(os.environ["MLCLIP_VOC"]), "trainval2012")
    view = protocols.apply("pareto_tail", manifest.label_matrix(difficult="positive"))
    ids = [Path(key).stem for key in manifest.keys[view.index]]
    assert len(ids) == 1142
    assert ids[:6] == [
        "2008_000023", "2008_000028", "2008_000043", "2008_000052", "2010_002361", "2010_002370",
    ]  # fmt: skip
    assert ids[-2:] == ["2010_002255", "2010_002287"]
    np.testing.assert_array_equal((view.targets == 1).sum(0), np.load(GOLDEN)["in/voc_class_freq"])


def test_fingerprints_tell_images_labels_and_order():
    y, keys = labels(n=6), np.array([f"{i}.jpg" for i in range(6)])
    whole = protocols.apply("full", y)
    assert whole.fingerprint(keys) == protocols.apply("full", y.copy()).fingerprint(keys)
    other = y.copy()
    other[3, 2] *= -1
    variants = [
        protocols.apply("full", other).fingerprint(keys),
        whole.take(np.array([1, 0, 2, 3, 4, 5])).fingerprint(keys),
        whole.take(np.arange(5)).fingerprint(keys),
        whole.fingerprint(keys[::-1]),
    ]
    assert len({whole.fingerprint(keys), *variants}) == 5
    view = protocols.apply("order_by('name')+cole_single_positive+holdout(0.2)", y, keys=keys)
    assert view.fingerprint(keys) == REGRESSION


def sparse(y, complete):
    return protocols.SparseTargets(
        Rows.from_lists([np.flatnonzero(row > 0) for row in y]),
        None if complete else Rows.from_lists([np.flatnonzero(row < 0) for row in y]),
        y.shape[1],
    )


@pytest.mark.parametrize("complete", [True, False])
def test_targets_made_row_by_row(complete):
    y = labels(n=40, share=0.05)
    if not complete:
        y[np.random.default_rng(1).random(y.shape) < 0.5] = 0
    keys = np.array([f"{i}.jpg" for i in range(40)])
    start = protocols.Labels(sparse(y, complete), np.arange(40))
    chain = "require_positive('seen')+order_by('name')+holdout(0.5)+cole_few_shot(0.5)"
    dense = protocols.apply(chain, y, subsets=SUBSETS, keys=keys)
    view = protocols.apply(chain, start, subsets=SUBSETS, keys=keys)
    np.testing.assert_array_equal(view.index, dense.index)
    assert view.targets.shape == dense.targets.shape and len(view.index)
    np.testing.assert_array_equal([view.targets[i] for i in range(len(view.index))], dense.targets)
    np.testing.assert_array_equal(view.targets.dense(), dense.targets)
    assert view.fingerprint(keys) != start.fingerprint(keys)
    with pytest.raises(UserError, match=r"'partial': 40 images with 8 labels are too many"):
        protocols.apply("partial(0.5)", start)


CHAINS = st.lists(
    st.sampled_from(
        ["single_positive", "partial(0.5)", "positives_left(0.5)", "few_shot(2)", "long_tail(5)",
         "require_positive", "restrict('seen')", "cole_single_positive", "holdout(0.3)",
         "holdout(0.3, 'validation')", "cole_few_shot(0.5)", "first(0.7)", "sarb_partial(0.6)",
         "order_by('id')", "order_by('name')", "pareto_tail(max=20)"]
    ),
    min_size=1, max_size=4,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(CHAINS, st.integers(0, 9))
def test_no_chain_invents_labels_or_images(chain, seed):
    y = labels(n=60, seed=seed)
    y[np.random.default_rng(seed).random(y.shape) < 0.2] = 0
    keys = np.array([f"{97 * i % 60}.jpg" for i in range(60)])
    try:
        view = protocols.apply("+".join(chain), y, seed=seed, subsets=SUBSETS, keys=keys)
    except UserError as error:
        assert "no image has a positive" in str(error)
        return
    assert view.targets.dtype == np.int8 and view.targets.shape == (len(view.index), 8)
    assert len(set(view.index.tolist())) == len(view.index)
    assert ((view.targets == y[view.index]) | (view.targets == 0)).all()
