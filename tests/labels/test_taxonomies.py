"""Taxonomies that are put in the place of a space's own."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from mlclip_jax.errors import UserError
from mlclip_jax.labels import catalog, taxonomies
from mlclip_jax.labels.space import LabelSpace, Taxonomy

VOC = catalog.voc(pretty=True)


def rays(counts=(5, 3, 4), d=6, seed=0):
    """Features around a few directions, at any length, in a mixed order; and their directions."""
    rng = np.random.default_rng(seed)
    which = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    features = np.eye(d)[which] + 0.05 * rng.standard_normal((len(which), d))
    return features * rng.uniform(0.1, 10, (len(which), 1)), which


def test_clusters_follow_directions_and_are_canonical():
    features, which = rays()
    taxonomy = taxonomies.clusters(features, 3)
    first = {g: i for i, g in enumerate(dict.fromkeys(which.tolist()))}
    assert taxonomy.group_of == tuple(first[g] for g in which.tolist())
    assert taxonomy.group_names == ("cluster 1", "cluster 2", "cluster 3")
    assert not taxonomy.named
    for seed in range(3):
        assert taxonomies.clusters(features, 3, seed=seed) == taxonomy


def test_clusters_that_cannot_be_made():
    features, _ = rays()
    for groups in (0, 13):
        with pytest.raises(UserError, match=f"{groups} clusters of 12 labels: ask for 1 to 12"):
            taxonomies.clusters(features, groups)
    with pytest.raises(UserError, match="fall into 2 clusters, not 3"):
        taxonomies.clusters(np.repeat(np.eye(4)[:2], 5, axis=0), 3)


def test_shuffled_keeps_groups_and_sizes():
    own = VOC.taxonomy
    one, other = taxonomies.shuffled(own, seed=1), taxonomies.shuffled(own, seed=2)
    assert one == taxonomies.shuffled(own, seed=1)
    assert len({own.group_of, one.group_of, other.group_of}) == 3
    assert one.group_names == own.group_names
    assert Counter(one.group_of) == Counter(own.group_of)


def test_renamed_keeps_the_members():
    new = taxonomies.renamed(VOC.taxonomy)
    assert new.group_names == new.group_prompt_names == ("group1", "group2", "group3", "group4")
    assert new.group_of == VOC.taxonomy.group_of and new.named
    blank = Taxonomy(("a",), (0,), named=False)
    assert taxonomies.renamed(blank).named


PETS = LabelSpace(
    names=("cat", "dog", "tvmonitor", "sofa"),
    prompt_names=("cat", "dog", "tv monitor", "sofa"),
    name="pets",
)


def test_yaml_takes_names_and_prompt_names_in_any_order(tmp_path):
    path = tmp_path / "groups.yaml"
    path.write_text("things: [sofa, tv monitor]\nanimals:\n  - dog\n  - cat\n", encoding="utf-8")
    taxonomy = taxonomies.from_yaml(path, PETS)
    assert taxonomy == Taxonomy(("things", "animals"), (1, 1, 0, 0))
    path.write_text("things: [sofa, tvmonitor]\nanimals: [dog, cat]")
    assert taxonomies.from_yaml(path, PETS) == taxonomy
    assert taxonomies.regroup(PETS, str(path)).taxonomy == taxonomy
    with pytest.raises(UserError, match=r"cannot read the taxonomy .*none\.yml"):
        taxonomies.regroup(PETS, str(tmp_path / "none.yml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [cat, dgo]", "group 'a': no label named 'dgo' in 'pets'; did you mean dog"),
        ("a: [cat, dog]\nb: [cat, sofa]", "label 'cat' stands in 'a' and 'b'"),
        ("a: [tvmonitor, tv monitor]", "label 'tv monitor' stands in group 'a' twice"),
        ("a: [cat, sofa]", "2 of 4 labels in no group: dog, tvmonitor"),
        ("a: [cat, dog, sofa, tvmonitor]\nb: []", "group 'b' must hold a list"),
        ("a: cat", "group 'a' must hold a list"),
        ("a: [cat, no]", "group 'a': False is not text; put it in quotes"),
        ("1: [cat]", "group 1: 1 is not text"),
        ("- cat", "must be a mapping"),
        ("", "must be a mapping"),
        ("a: [cat", "is not YAML"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_yaml_errors_name_file_group_and_label(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        taxonomies.from_yaml(path, PETS)
    assert message in str(caught.value) and "mine.yaml" in str(caught.value)


def name_features(names):
    """Stand-in for a text tower."""
    return np.random.default_rng(len(names[0])).standard_normal((len(names), 8))


@pytest.mark.parametrize(
    ("spec", "groups"),
    [("cluster", 4), ("cluster(6)", 6), ("cluster(groups=6, seed=1)", 6), ("cluster(seed=3)", 4)],
)
def test_regroup_by_clusters_of_the_prompt_names(spec, groups):
    seen = []

    def features(names):
        seen.append(tuple(names))
        return name_features(names)

    space = taxonomies.regroup(VOC, spec, features)
    assert len(space.taxonomy) == groups and not space.taxonomy.named
    assert seen == [VOC.prompt_names]
    with pytest.raises(ValueError, match="needs name_features"):
        taxonomies.regroup(VOC, spec)


def test_regroup():
    assert taxonomies.regroup(VOC, "own") == VOC
    none = taxonomies.regroup(VOC, "none")
    assert none.taxonomy is None and none.prompt_names == VOC.prompt_names
    assert len(taxonomies.regroup(none, "cluster", name_features).taxonomy) == 4  # sqrt(20)
    for spec, taxonomy in (
        ("random", taxonomies.shuffled(VOC.taxonomy)),
        ("random(seed=5)", taxonomies.shuffled(VOC.taxonomy, seed=5)),
        ("renamed", taxonomies.renamed(VOC.taxonomy)),
    ):
        assert taxonomies.regroup(VOC, spec).taxonomy == taxonomy


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("clusters", "unknown taxonomy 'clusters'; did you mean 'cluster'"),
        ("groups.json", "should read"),
        ("cluster(0)", "cannot make 0 clusters of 20 labels"),
        ("cluster(2.5)", "takes groups=<whole number>, seed=<whole number>, not 'cluster(2.5)'"),
        ("cluster(k=3)", "takes groups"),
        ("random(seed=-1)", "takes seed=<whole number>"),
        ("random(3)", "takes seed"),
        ("renamed(3)", "takes no arguments"),
    ],
)
def test_regroup_errors(spec, message):
    with pytest.raises(UserError) as caught:
        taxonomies.regroup(VOC, spec, name_features)
    assert message in str(caught.value)


@pytest.mark.parametrize("spec", ["random", "renamed"])
def test_some_need_groups_to_start_from(spec):
    with pytest.raises(UserError, match=f"taxonomy '{spec}': the labels of 'pets' have no groups"):
        taxonomies.regroup(PETS, spec)


def test_named_survives_json_and_selection():
    space = taxonomies.regroup(VOC, "cluster", name_features)
    again = LabelSpace.from_json(json.loads(json.dumps(space.to_json())))
    assert again == space and not again.taxonomy.named
    assert not space.select(space.names[3:9]).taxonomy.named
    assert VOC.select(VOC.names[3:9]).taxonomy.named
    assert space.fingerprint() != VOC.fingerprint()
    old = VOC.to_json()
    del old["taxonomy"]["named"]
    assert LabelSpace.from_json(old) == VOC
