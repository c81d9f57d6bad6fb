"""Label features in a report: compactness of groups, places in a picture, the page's section."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import webdriver
from test_page_browser import OVERFLOW
from test_report import ODD, findings, parse

from mlclip_jax.evaluation import charts, label_map, page
from mlclip_jax.evaluation.evaluator import Predictor, evaluate
from mlclip_jax.evaluation.findings import as_json
from mlclip_jax.evaluation.label_features import (
    compactness,
    perplexity,
    project,
    retrieval_accuracy,
    turn,
)
from mlclip_jax.labels.catalog import coco, grouped, nus, scenes
from mlclip_jax.labels.space import LabelSpace, Taxonomy
from mlclip_jax.methods.base import LabelInputs, padded_index

GROUPED = Taxonomy(("odd", "even", "alone"), (0, 1, 0, 1, 0, 2, 1))


def clustered(taxonomy, spread, seed=0, width=16):
    """Features around one centre a group."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(len(taxonomy), width))[np.asarray(taxonomy.group_of)]
    return (centres + spread * rng.normal(size=centres.shape)).astype(np.float32)


def with_features(space, spreads=(2.0, 1.0, 0.3), **options):
    """A report whose columns' label features lie ever closer to their group (None: has none)."""
    found = findings(space, **options)
    for (title, entry), spread in zip(list(found.entries.items()), spreads, strict=True):
        features = None if spread is None else clustered(space.taxonomy, spread)
        result = replace(entry.result, label_features=features)
        found.entries[title] = entry._replace(result=result)
    return found


def section(text):
    return text[text.index('id="at-labels"') : text.index('id="at-training"')]


# ---- Compactness --------------------------------------------------------------------------------
def cosine(a, b):
    return float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))


def test_compactness_against_all_pairs():
    features = clustered(GROUPED, 1.0).astype(np.float64)
    found, group = compactness(features, GROUPED), GROUPED.group_of
    for g in range(3):
        pairs = [(i, j) for i in range(7) for j in range(7) if i != j and group[i] == g]
        within = [cosine(features[i], features[j]) for i, j in pairs if group[j] == g]
        between = [cosine(features[i], features[j]) for i, j in pairs if group[j] != g]
        assert found.between[g] == pytest.approx(np.mean(between), rel=1e-12)
        if within:
            assert found.within[g] == pytest.approx(np.mean(within), rel=1e-12)
            assert found.difference[g] == pytest.approx(np.mean(within) - np.mean(between))
    assert math.isnan(found.within[2]) and math.isnan(found.difference[2])


@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
def test_silhouette_is_that_of_scikit_learn(spread):
    from sklearn.metrics import silhouette_score

    features = clustered(GROUPED, spread).astype(np.float64)
    expected = silhouette_score(features, GROUPED.group_of, metric="cosine")
    assert compactness(features, GROUPED).silhouette == pytest.approx(expected, abs=1e-12)


def test_compactness_by_hand():
    features = np.array([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [-5.0, 0.0]])
    found = compactness(features, Taxonomy(("a", "b"), (0, 0, 1, 1)))
    np.testing.assert_allclose(found.within, [0, 1], atol=1e-15)
    np.testing.assert_allclose(found.between, [-0.5, -0.5], atol=1e-15)
    # Distances: own 1, 1, 0, 0; other group 2, 1, 1.5, 1.5.
    assert found.silhouette == pytest.approx((0.5 + 0 + 1 + 1) / 4)


def test_retrieval_is_the_share_of_near_labels_of_the_group():
    features, group = clustered(GROUPED, 2.0).astype(np.float64), GROUPED.group_of
    right = 0
    for i in range(7):
        others = sorted((-cosine(features[i], features[j]), j) for j in range(7) if j != i)
        right += sum(group[j] == group[i] for _, j in others[:2])
    assert retrieval_accuracy(features, GROUPED, 2) == pytest.approx(right / 14)
    assert 0 < right < 14
    near = clustered(GROUPED, 1e-3)  # groups of 3, 3 and 1: two of three for six labels
    assert compactness(near, GROUPED).retrieval == pytest.approx(6 * 2 / 21)
    assert math.isnan(retrieval_accuracy(features[:3], Taxonomy(("a", "b"), (0, 1, 1))))


def test_compactness_of_odd_features():
    single = compactness(np.eye(3), Taxonomy(("a", "b", "c"), (0, 1, 2)))
    assert math.isnan(single.silhouette) and np.isnan(single.within).all()
    np.testing.assert_allclose(single.between, 0, atol=1e-15)
    same = compactness(np.full((7, 5), 0.3), GROUPED)
    assert same.silhouette == pytest.approx(0, abs=1e-5)
    np.testing.assert_allclose(same.difference[:2], 0, atol=1e-12)
    zeros = compactness(np.zeros((7, 5)), GROUPED)
    np.testing.assert_array_equal(zeros.within[:2], 0)
    assert zeros.silhouette == 0


# ---- Places -------------------------------------------------------------------------------------
def distances(places):
    return np.linalg.norm(places[:, None] - places[None], axis=-1)


@pytest.mark.parametrize("labels", [2, 7, 8, 9, 40])
def test_places_are_centred_alike_and_repeatable(labels):
    features = np.random.default_rng(0).normal(size=(labels, 5)) + 1
    places = project(features)
    assert places.shape == (labels, 2) and places.dtype == np.float64
    np.testing.assert_allclose(places.mean(axis=0), 0, atol=1e-6)
    assert (places**2).sum(axis=1).mean() == pytest.approx(1)
    assert places[:, 0].var() >= places[:, 1].var()
    np.testing.assert_array_equal(project(features), places)
    lengths = 2.0 ** np.arange(labels)[:, None]  # only directions count
    np.testing.assert_array_equal(project(features * lengths), places)


def test_few_labels_lie_as_in_their_plane():
    angles = np.array([0.0, 0.5, 1.1, 2.0, 4.0])
    circle = np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1)
    found, expected = distances(project(circle)), distances(circle)
    np.testing.assert_allclose(found / found[0, 1], expected / expected[0, 1], rtol=1e-9)


def test_groups_that_are_apart_are_drawn_apart():
    space = coco()
    places, group = project(clustered(space.taxonomy, 0.05)), np.array(space.taxonomy.group_of)
    apart = distances(places) + 1e9 * np.eye(len(group))
    nearest = apart.argmin(axis=1)
    several = np.bincount(group)[group] > 1
    assert (group[nearest] == group)[several].all()


def test_features_that_are_all_the_same_have_a_place():
    np.testing.assert_array_equal(project(np.ones((12, 4), np.float32)), 0)


def test_perplexity_fits_the_number_of_labels():
    assert [perplexity(n) for n in (10, 91, 5000)] == [3, 30, 30]


def test_turning_undoes_turns_and_mirrors():
    places = np.random.default_rng(0).normal(size=(20, 2))
    angle = 2.3
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    for other in (places @ rotation, places @ rotation * [1, -1]):
        np.testing.assert_allclose(turn(other, places), places, atol=1e-12)
    other = np.random.default_rng(1).normal(size=(20, 2))
    turned = turn(other, places)
    np.testing.assert_allclose(distances(turned), distances(other), atol=1e-12)
    assert np.linalg.norm(turned - places) < np.linalg.norm(other - places)


# ---- From the evaluator -------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["vectors", "two sets", "of each image", "tuple"])
def test_label_features_of_an_evaluation(form):
    index, mask = padded_index(7, 8)
    labels = LabelInputs((), index, mask)
    space = LabelSpace(tuple("abcdefg"), taxonomy=GROUPED)
    features = jnp.arange(32.0, dtype=jnp.bfloat16).reshape(8, 4)
    made = {
        "vectors": features,
        "two sets": jnp.stack([features, features], axis=1),
        "of each image": jnp.zeros((3, 4)),
        "tuple": (features, features),
    }[form]
    predictor = Predictor(
        jax.jit(lambda state, labels: made),
        lambda state, images, features, labels: jnp.zeros((2, 8)),
        lambda state, images, features, labels, masks: {"": jnp.zeros((2, 8))},
    )
    batch = {
        "images": np.zeros((2, 4, 4, 3), np.uint8),
        "targets": np.ones((2, 7), np.int8),
        "index": np.arange(2),
        "mask": np.ones(2, bool),
    }
    found = evaluate(predictor, {"raw": ()}, labels, [batch], space)["raw"].label_features
    if form == "vectors":
        assert found.dtype == np.float32  # and the class that only pads is gone
        np.testing.assert_array_equal(found, np.arange(28.0).reshape(7, 4))
    else:
        assert found is None


# ---- The report ---------------------------------------------------------------------------------
def test_numbers_of_a_report():
    found = with_features(scenes(), (2.0, None, 0.3))
    numbers = as_json(found)
    assert "Silhouette" not in numbers["conventions"]["mAP"]
    assert "silhouette" in numbers["conventions"]["group_compactness"]
    columns = list(numbers["results"].values())
    assert "group_compactness" not in columns[1]
    expected = found.compactness()["zero-shot"]
    shown = columns[0]["group_compactness"]
    assert shown["silhouette"] == expected.silhouette
    assert shown["top-3 retrieval"] == expected.retrieval
    # Word vectors are compared too, and are no column of the figures.
    vectors = {"word vectors": clustered(scenes().taxonomy, 0.1)}
    both = replace(found, vectors=vectors)
    of_words = as_json(both)["label_vectors"]["word vectors"]["group_compactness"]
    assert (
        of_words["top-3 retrieval"] == compactness(*vectors.values(), scenes().taxonomy).retrieval
    )
    assert list(as_json(both)["results"]) == list(numbers["results"])
    assert "word vectors" in section(page.render(both))
    assert list(shown["groups"]) == ["digit", "shape", "colour"]
    for g, figures in enumerate(shown["groups"].values()):
        assert figures["within"] - figures["between"] == pytest.approx(figures["difference"])
        assert figures["within"] == expected.within[g]
    assert columns[2]["group_compactness"]["silhouette"] > shown["silhouette"]


def test_groups_of_unseen_labels_that_are_nuswides():
    """Where names come from files, as on NUS-WIDE's ZSL, labels have no groups of their own."""
    names = nus().names[::-1]  # in another order than the catalog's
    seen = ("nikon", "2008", "sky blue")
    subsets = {"seen": range(3), "unseen": range(3, 84)}
    space = LabelSpace(seen + names, subsets=subsets, name="nus1006")
    groups = [nus().taxonomy.group_of[nus().index(name)] for name in names]
    features = np.random.default_rng(0).normal(size=(84, 8)).astype(np.float32)
    found = findings(space)
    title, entry = list(found.entries.items())[-1]
    found.entries[title] = entry._replace(result=replace(entry.result, label_features=features))
    shown = as_json(found)["results"][title]["group_compactness"]
    unit = features[3:] / np.linalg.norm(features[3:], axis=1, keepdims=True)
    cosines = unit.astype(np.float64) @ unit.T - 2 * np.eye(81)
    nearest = np.argsort(-cosines, axis=1)[:, :3]
    right = np.mean([groups[j] == groups[i] for i in range(81) for j in nearest[i]])
    assert shown["top-3 retrieval"] == pytest.approx(right)
    assert list(shown["groups"]) == list(nus().taxonomy.group_names)
    with_words = replace(found, vectors={"word vectors": features[3:]})
    of_words = as_json(with_words)["label_vectors"]["word vectors"]["group_compactness"]
    assert of_words == shown
    part = section(page.render(found))
    assert part.count('<use href="#mark') == 81 and "81 labels in 6 groups" in part
    assert "<title>sky (" in part and "<title>nikon (" not in part


@pytest.mark.parametrize(
    "space",
    [
        LabelSpace(("a", "b")),
        LabelSpace(("a", "sky"), subsets={"unseen": (0, 1)}),  # not all are NUS-WIDE's
        LabelSpace(("a", "sky"), subsets={"unseen": (1,)}),  # of one group
        LabelSpace(("a", "b"), taxonomy=Taxonomy(("one",), (0, 0))),
    ],
)
def test_labels_without_groups(space):
    assert grouped(space) is None


def test_section_of_the_page():
    space = coco()
    text = page.render(with_features(space))
    parse(text)
    part = section(text)
    assert part.count("<title>cat (animal)</title>") == 3
    assert part.count('<use href="#mark') == 3 * len(space)
    assert "perplexity 26.3" in part and "silhouette 0." in part
    for group in space.taxonomy.group_names:
        assert group in part
    # The baseline and what matters side by side, then the others.
    heads = re.findall(r"<h3>([^<]+) <span", part)
    assert heads == ["zero-shot", "coop (EMA, best)", "coop (last)"]
    assert "80 labels in 12 groups" in part


@pytest.mark.parametrize(
    "space",
    [
        LabelSpace(tuple("abcdefgh")),
        LabelSpace(tuple("abcdefgh"), taxonomy=Taxonomy(("all",), (0,) * 8)),
    ],
)
def test_no_section_without_two_groups(space):
    found = findings(space)
    for title, entry in list(found.entries.items()):
        result = replace(entry.result, label_features=np.eye(8, dtype=np.float32))
        found.entries[title] = entry._replace(result=result)
    assert "at-labels" not in page.render(found)
    assert "group_compactness" not in as_json(found)["conventions"]


def test_methods_of_other_forms_are_left_out():
    assert "at-labels" not in page.render(with_features(scenes(), (None, None, None)))
    part = section(page.render(with_features(scenes(), (None, 1.0, None))))
    assert re.findall(r"<h3>([^<]+) <span", part) == ["coop (last)"]
    assert 'class="line solid s1"' in part and 'class="line solid s0"' not in part


def test_few_labels_odd_names_and_features_without_spread():
    taxonomy = Taxonomy((ODD, "x"), (0, 1, 1, 0))
    space = LabelSpace((ODD, "W" * 80, "標" * 40, "d"), taxonomy=taxonomy)
    found = with_features(space, (1.0, 0.0, 0.0))
    for entry in list(found.entries.values())[1:]:
        entry.result.label_features[:] = 1.0
    text = page.render(found)
    parse(text)
    assert "<b>&" not in text
    part = section(text)
    assert "principal components of" in part and "t-SNE" not in part and "nan" not in part


def test_a_thousand_labels_make_a_small_section(monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(label_map, "project", lambda features: rng.normal(size=(len(features), 2)))
    space = LabelSpace(
        tuple(f"a class with quite a long name, number {i}" for i in range(1000)),
        taxonomy=Taxonomy(tuple(f"group {g}" for g in range(40)), tuple(np.arange(1000) % 40)),
    )
    part = section(page.render(with_features(space)))
    assert part.count('<use href="#mark') == 3000  # every label has its mark
    assert len(part) < 600_000
    pictures = part[: part.index("Compactness of the groups")]
    assert 0 < pictures.count("<text") <= 3 * label_map._MOST_NAMES


def test_thirty_groups_look_different():
    looks = {(g % label_map._COLOURS, g % len(label_map._MARKS)) for g in range(30)}
    assert len(looks) == 30
    css = page._asset("page.css")
    for g in range(label_map._COLOURS):
        assert css.count(f"--g{g}:") == 2  # light and dark
        assert f".g{g} {{ fill: var(--g{g}); }}" in css


def test_lines_of_compactness():
    values = {1: (np.array([0.2, 0.5]), np.array([0.6, np.nan]))}
    drawn = charts.spans(["a", "b"], values, (0.0, 1.0), title="t")
    assert drawn.count("<circle") == 1 and drawn.count('<path class="line solid s1"') == 2
    assert ">+0.40<" in drawn and ">-<" in drawn and "nan" not in drawn


# ---- In a browser -------------------------------------------------------------------------------
# Names that are shown in pictures: those that leave it, and pairs that lie over each other.
UNREADABLE = """
return [...document.querySelectorAll('.maps svg')].flatMap(svg => {
  const all = svg.getBoundingClientRect();
  const boxes = [...svg.querySelectorAll('text')].map(e => [e.textContent,
    e.getBoundingClientRect()]).filter(([, b]) => b.width);
  const out = boxes.filter(([, b]) => b.left < all.left || b.right > all.right
    || b.top < all.top - 2 || b.bottom > all.bottom + 2);
  const over = boxes.filter(([, a], i) => boxes.some(([, b], j) => i < j && a.left < b.right
    && b.left < a.right && a.top + 3 < b.bottom && b.top + 3 < a.bottom));
  return [...out, ...over].map(([words]) => words);
});
"""
SHOWN = """
return [...document.querySelectorAll('.maps svg')].map(svg =>
  [...svg.querySelectorAll('text')].filter(e => e.getBoundingClientRect().width).length);
"""


@pytest.mark.browser
@pytest.mark.skipif(
    not (webdriver.CHROMIUM and webdriver.DRIVER), reason="no chromium and chromedriver here"
)
def test_names_are_readable(tmp_path):
    path = tmp_path / "report.html"
    path.write_text(page.render(with_features(coco())), encoding="utf-8")
    shown = {}
    with webdriver.Browser() as browser:
        for width in (1280, 390, 320):
            browser.resize(width, 800)
            browser.open(path)
            assert browser.run(UNREADABLE) == []
            assert browser.run(OVERFLOW) == []
            assert browser.console() == []
            shown[width] = browser.run(SHOWN)
        fills = set()
        for dark in (False, True):
            browser.resize(1280, 800, dark=dark)
            fill = "return getComputedStyle(document.querySelector('.maps .g1')).fill"
            fills.add(browser.run(fill))
    assert len(fills) == 2
    assert min(shown[390]) > 20
    assert sum(shown[1280]) > sum(shown[390])  # smaller letters leave room for more
