"""Streams of scores: gathered for the first images of a split, and drawn in a report."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from test_report import findings

from mlclip_jax.evaluation import gallery, page
from mlclip_jax.evaluation.protocol import PROTOCOLS
from mlclip_jax.evaluation.streams import Streams, distributions
from mlclip_jax.labels import catalog
from mlclip_jax.training.build import Trained, build_method, load_backbone
from mlclip_jax.training.config import parse_config
from mlclip_jax.training.scoring import Scorer

PIXELS = np.zeros((4, 4, 3), np.uint8)


@pytest.fixture(scope="module")
def scorer():
    data = {"name": "scenes", "num_train": 8, "num_test": 12}
    config = parse_config({"method": {"name": "mkt"}, "data": data})
    backbone = load_backbone(config.backbone)
    method = build_method(config.stages[0], backbone, catalog.scenes(), seed=0)
    trained = Trained(method, catalog.scenes(), backbone, config, {}, 0)
    return Scorer(trained, ("test",), 8), method, backbone, config


def test_streams_join_to_the_scores_of_an_evaluation(scorer):
    scorer, method, *_ = scorer
    assert scorer.batch_size == 8  # of 12 images: the second batch is padded
    whole = scorer.score({"it": method}, "test", subsets=("unseen",))["it"]
    for images, seen in ((10, 10), (8, 8), (3, 3), (500, 12)):
        found = scorer.streams(method, "test", images=images)
        assert set(found.scores) == {"local", "global"} and found.targets.shape == (seen, 22)
        joined = (found.scores["local"] + found.scores["global"]) / 2
        np.testing.assert_allclose(joined, whole.scores[:seen], atol=1e-5)
        np.testing.assert_array_equal(found.targets, whole.targets[:seen])
    # The unseen labels by themselves have unit length in each stream, so their scores differ.
    unseen = list(catalog.scenes().indices("unseen"))
    assert whole.task_scores["unseen"].shape == (12, 6)
    assert np.abs(whole.task_scores["unseen"] - whole.scores[:, unseen]).max() > 0.05


def test_a_method_of_one_piece_has_none(scorer):
    scorer, _, backbone, config = scorer
    (stage,) = parse_config({"method": {"name": "coop"}, "data": dict(config.data)}).stages
    method = build_method(stage, backbone, catalog.scenes(), seed=0)
    assert scorer.streams(method, "test") is None
    assert distributions(None) == ""


def test_histograms_are_of_positives_and_negatives():
    scores = {"local": np.array([[0.0, 1.0], [0.0, 1.0]]), "global": np.array([[0.0, 1], [1, 0]])}
    made = distributions(Streams(scores, np.array([[-1, 1], [-1, 1]], np.int8)))
    assert re.findall(r"<h3>(\w+)</h3>", made) == ["Local", "Global"]
    areas = re.findall(r'class="area (\w+)" d="([^"]+)"', made)
    assert [kind for kind, _ in areas] == 2 * ["negative", "positive"]
    (_, low), (_, high), (_, first), (_, second) = areas
    # Local: negatives in the first bin alone, positives in the last; global: both in both.
    assert low != high and first == second and 'id="' not in made


def test_the_page_has_them():
    found = findings()
    assert "Scores by stream" not in page.render(found)
    scores = {"local": np.zeros((2, 3)), "global": np.ones((2, 3))}
    text = page.render(replace(found, streams=Streams(scores, np.ones((2, 3), np.int8))))
    assert "Scores by stream" in text and text.count('id="negatives"') == 1


def test_examples_have_the_highest_labels_beside_those_of_the_baseline():
    found = replace(findings(), protocol=PROTOCOLS["nus_zsl"], image=lambda i: PIXELS)
    space = replace(found.space, subsets={"unseen": (1, 2)})
    result = found.main.result
    row = int(result.index[0])
    scores = np.zeros_like(result.scores[:, [1, 2]])
    scores[0] = [1, 2]
    entries = dict(found.entries)
    last = list(entries)[-1]
    own = replace(result, task_scores={"unseen": scores})
    entries[last] = entries[last]._replace(result=own)
    text = gallery.examples(replace(found, space=space, entries=entries))
    first = text.split("<figure>")[1]

    def names(order):
        present = result.targets[0] > 0
        return ", ".join(
            f"<strong>{space.names[i]}</strong>" if present[i] else space.names[i] for i in order
        )

    assert f'alt="image {row}"' in first
    assert f"ZSL {last}: {names([2, 1])}" in first  # by its own scores
    order = np.argsort(-result.scores[0], kind="stable")[:8]
    assert f"GZSL {last}: {names(order)}" in first
    title = next(iter(entries))
    baseline = entries[title].result.scores[0]
    assert f"ZSL {title}: {names(sorted((1, 2), key=lambda i: -baseline[i]))}" in first
    # With probabilities, and a bar where they fall below one half.
    for scored, expected in (
        ([-1, 2], "{2}&nbsp;0.88 | {1}&nbsp;0.27"),
        ([0.5, 2], "{2}&nbsp;0.88, {1}&nbsp;0.62"),
        ([-1, -2], "| {1}&nbsp;0.27, {2}&nbsp;0.12"),
    ):
        scores[0] = scored
        entries[last] = entries[last]._replace(result=own, sigmoid=True)
        text = gallery.examples(replace(found, space=space, entries=entries))
        named = {f"{{{i}}}": names([i]) for i in (1, 2)}
        for place, name in named.items():
            expected = expected.replace(place, name)
        assert f"ZSL {last}: {expected}<br>" in text
