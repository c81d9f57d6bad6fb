"""Labels of captions by their nouns."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

from mlclip_jax.data.scenes import Scenes
from mlclip_jax.errors import UserError
from mlclip_jax.labels import catalog
from mlclip_jax.labels.matching import normalise, read_aliases
from mlclip_jax.labels.nouns import (
    NounFinder,
    forms,
    label_captions,
    report,
    shipped,
    synonyms,
    template_captions,
    words_of,
)
from mlclip_jax.labels.space import LabelSpace

CATALOGUE = [catalog.scenes, catalog.coco, catalog.voc, catalog.nus, catalog.cub, catalog.vg200]


def space(*names, **more):
    return LabelSpace(names=names, **more)


def named(text, space, aliases=None):
    """Names of the labels found, in the order of the space, joined by commas."""
    return ", ".join(space.names[i] for i in sorted(NounFinder(space, aliases)(text)))


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("A hot dog on a plate", "hot dog"),
        ("A dog looks at a hot dog.", "dog, hot dog"),
        ("a teddy bear", "teddy bear"),
        ("A bear beside two teddybears", "bear, teddy bear"),
        ("a hotdog and a dog's bowl", "dog, bowl, hot dog"),
        ("a microwave oven", "microwave"),
        ("an oven and a microwave", "microwave, oven"),
        ("Two men, three women and the children", "person"),
        ("people cutting cake with knives", "person, knife, cake"),
        ("TVs over computer mice", "tv, mouse"),
        ("wine glasses, glasses of wine", "wine glass"),
        ("buses, boxes, SHEEP and skis", "bus, sheep, skis"),
        ("a pair of scissors", "scissors"),
        ("cell-phones and a stop_sign", "stop sign, cell phone"),
        ("neckties on oxen and geese", "bird, cow, tie"),
        ("a television above the sofa", "couch, tv"),
        ("a bird's-eye view of the zebra crossing", ""),
        ("dogged carpet cataracts", ""),
        ("it is hot. Dogs rest", "dog"),
        ("a fire truck at the train station", "truck"),
        ("", ""),
    ],
)
def test_coco(text, labels):
    assert named(text, catalog.coco()) == labels


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("a plane over the sea with clouds", "clouds, ocean, plane"),
        ("one flower, one building, one cloud", "buildings, clouds, flowers"),
        ("leaves in the valleys, skies and cities", "leaf, sky, valley"),
        ("a fire hydrant", ""),
        ("a hydrant on fire", "fire"),
        ("a teddy bear", "toy"),
        ("policemen and soldiers", "military, police"),
    ],
)
def test_nus(text, labels):
    assert named(text, catalog.nus()) == labels


@pytest.mark.parametrize("pretty", [False, True])
def test_voc_by_any_name(pretty):
    voc = catalog.voc(pretty=pretty)
    for text in ("a dining table", "a diningtable", "dinner tables", "the table"):
        assert named(text, voc) == "diningtable"
    assert named("airplanes and aeroplanes", voc) == "aeroplane"
    assert named("a hot dog, a potted plant", voc) == "pottedplant"


def test_the_longest_name_is_found_first_and_then_the_first_in_the_alphabet():
    letters = space("a b", "b c", "c d e", "c", "e")
    assert named("a b c", letters) == "a b, c"
    assert named("b c d e", letters) == "c d e"
    assert named("b c e", letters) == "b c, e"
    assert named("c b a", space("c b", "b a")) == "b a"
    assert named("a b", space("a b c", "a")) == "a"


def test_names_of_the_space_come_before_the_words_that_ship():
    people = space("person", "man", "children")
    assert named("a man", people) == named("men", people) == "man"
    assert named("a child", people) == "children"
    assert named("a woman", people) == "person"


def test_prompt_names_and_the_parts_of_a_name_count():
    fish = space("tench, Tinca tinca", "ray", prompt_names=("tench", "stingray"))
    assert named("tenches; a Tinca  Tinca", fish) == "tench, Tinca tinca"
    assert named("two stingrays", fish) == named("RAY", fish) == "ray"


def test_aliases_of_a_file(tmp_path):
    path = tmp_path / "aliases.yaml"
    path.write_text(
        "TV: [Telly, goggle-box]\norange: []\ntable: []\ndog tag: []\nteddy bear: teddy toy\n"
    )
    aliases, coco = read_aliases(path), catalog.coco()
    assert named("tellies; a goggle box", coco, aliases) == "tv"
    assert named("an orange cat", coco, aliases) == "cat"
    assert named("a table, a dining table", coco, aliases) == "dining table"
    assert named("tables", coco, aliases) == ""
    assert named("a dog tag", coco, aliases) == ""
    assert named("a teddy toy, a teddy", coco, aliases) == "teddy bear"
    blocked = space("hot dog", "dog", prompt_names=("frankfurter dog", "dog"))
    assert named("hot dogs, a frankfurter dog", blocked, {"hot dog": []}) == ""


def test_captions_of_scenes_name_exactly_their_labels():
    scenes = Scenes("train", 200)
    captions = [scenes.caption(i) for i in range(200)]
    targets = label_captions(captions, scenes.space)
    assert targets.dtype == np.int8
    np.testing.assert_array_equal(targets, scenes.label_matrix())


def test_label_captions_and_their_report():
    captions = (text for text in ("a dog and a cat", "two dogs", "", "nothing here", "puppies"))
    pets = space("cat", "dog", "bird", name="pets")
    targets = label_captions(captions, pets)
    expected = [[1, 1, -1], [-1, 1, -1], [-1, -1, -1], [-1, -1, -1], [-1, 1, -1]]
    np.testing.assert_array_equal(targets, expected)
    assert report(targets, pets).splitlines() == [
        "3 of 5 captions name a label of pets, 1.33 each; 2 name none:",
        "  dog: 3",
        "  cat: 1",
        "in no caption: bird",
    ]
    nothing = label_captions([], pets)
    assert nothing.shape == (0, 3) and nothing.dtype == np.int8
    assert report(nothing, pets).startswith("0 of 0 captions")


def test_the_same_under_any_hash_seed():
    code = (
        "from mlclip_jax.labels import catalog, nouns\n"
        "texts = ['a toy teddy bear on a sofa bed', 'men at the wine glass of wine table tennis']\n"
        "for space in (catalog.coco(), catalog.nus()):\n"
        "    print(nouns.label_captions(texts, space).tolist(), list(nouns.synonyms(space)))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and outputs != {b""}


def test_every_key_that_ships_is_a_label_of_the_catalogue():
    labels = {name for make in CATALOGUE for name in make().names}
    assert set(shipped()) <= labels
    for label, words in shipped().items():
        assert words and label == normalise(label)
        assert len(set(words)) == len(words), label
        assert all(word == normalise(word) == " ".join(words_of(word)) for word in words), label


@pytest.mark.parametrize("make", CATALOGUE, ids=lambda make: make.__name__)
def test_no_word_belongs_to_two_labels(make):
    labels = make()
    found, find = synonyms(labels), NounFinder(labels)
    meant: dict[str, int] = {}
    for i, name in enumerate(labels.names):
        for word in (normalise(name), *shipped().get(name, ())):
            assert found[" ".join(words_of(word))] == i, word
            for form in forms(word):
                assert meant.setdefault(form, i) == i, form
            assert find(f"the {word}!") == {i}, word


def test_template_captions():
    pets = space("cat", "wild dog", prompt_names=("cat", "dingo"))
    texts, targets = template_captions(pets, ["a sketch of a {}.", "my {}"])
    assert len(texts) == len(targets) == 22 and targets.dtype == np.int8
    assert texts[:9] == ["a photo of a cat."] * 9
    assert texts[9:12] == ["a sketch of a cat.", "my cat", "a photo of a dingo."]
    assert texts[20:] == ["a sketch of a dingo.", "my dingo"]
    np.testing.assert_array_equal(targets, [[1, -1]] * 11 + [[-1, 1]] * 11)
    assert template_captions(pets, [], repeats=1)[0] == ["a photo of a cat.", "a photo of a dingo."]


@pytest.mark.parametrize(
    ("labels", "aliases", "message"),
    [
        (("dog",), {"dgo": ["hound"]}, "'dgo': 'labels' has no such label; did you mean 'dog'"),
        (("dog",), {"dgo": []}, "no such label"),
        (("dog",), {"hot dog": ["wiener"]}, "no such label"),
        (("dog", "cat"), {"dog": ["pet"], "cat": ["pet"]}, "'pet' stands for both 'dog' and 'cat'"),
        (("cars", "vehicle"), {"vehicle": ["car"]}, "'car' stands for both 'cars' and 'vehicle'"),
        (("crane, bird", "crane, machine"), None, "'crane' stands for both"),
    ],
)
def test_errors_of_names(labels, aliases, message):
    with pytest.raises(UserError, match=message):
        synonyms(space(*labels), aliases)


def test_a_name_of_two_labels_may_be_left_to_one():
    cranes = space("crane, bird", "crane, machine")
    assert named("a crane", cranes, {"crane, bird": []}) == "crane, machine"


def test_errors_of_texts():
    pets = space("cat", "dog")
    with pytest.raises(UserError, match="not the single text 'a cat'"):
        label_captions("a cat", pets)
    with pytest.raises(UserError, match=r"caption 1 is \['a dog'\], but a text is needed"):
        label_captions(["a cat", ["a dog"]], pets)
    with pytest.raises(UserError, match="a list is expected"):
        template_captions(pets, "a {}")
    for template in ("a photo", "{} {}"):
        with pytest.raises(UserError, match=r'needs exactly one "\{\}"'):
            template_captions(pets, ["a {}", template])


def test_plurals():
    cases = {
        "woman": "women", "fireman": "firemen", "child": "children", "person": "people",
        "mouse": "mice", "knife": "knives", "leaf": "leaves", "bus": "buses", "box": "boxes",
        "sheep": "sheep", "tie": "ties", "berry": "berries", "skis": "skis", "goose": "geese",
        "dress": "dresses", "grass": "grass", "tv": "tvs", "wine glass": "wine glasses",
    }  # fmt: skip
    for (one, several), (_, other) in itertools.product(cases.items(), repeat=2):
        assert (one in forms(other)) == (several == other), (one, other)
