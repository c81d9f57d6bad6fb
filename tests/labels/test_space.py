from __future__ import annotations

import json
import pickle

import pytest

from mlclip_jax.errors import UserError
from mlclip_jax.labels.catalog import scenes
from mlclip_jax.labels.space import LabelSpace, Taxonomy

PETS = LabelSpace(
    names=("cat", "dog", "tv"),
    prompt_names=("cat", "dog", "television"),
    ids=("17", "18", "72"),
    subsets={"seen": (0, 2), "unseen": (1,)},
    taxonomy=Taxonomy(group_names=("animal", "thing"), group_of=(0, 0, 1)),
    name="pets",
)


def test_defaults_are_the_names():
    space = LabelSpace(names=["cat", "dog"])
    assert space.names == space.prompt_names == space.ids == ("cat", "dog")
    assert len(space) == 2 and space.taxonomy is None and not space.subsets


def test_index_and_near_names():
    assert PETS.index("dog") == 1
    with pytest.raises(UserError, match="no label named 'dgo' in 'pets'; did you mean dog"):
        PETS.index("dgo")


def test_select_keeps_everything_in_step():
    chosen = PETS.select(["tv", "cat"])
    assert chosen.names == ("tv", "cat") and chosen.ids == ("72", "17")
    assert chosen.prompt_names == ("television", "cat")
    assert chosen.taxonomy.group_names == ("animal", "thing")
    assert chosen.taxonomy.group_of == (1, 0)
    assert dict(chosen.subsets) == {"seen": (1, 0)}
    unseen = PETS.select("unseen")
    assert unseen.names == ("dog",) and unseen.taxonomy.group_names == ("animal",)
    assert PETS.select([2]).taxonomy.group_of == (0,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LabelSpace(names=()), "at least one"),
        (lambda: LabelSpace(names="cat"), "single string 'cat'"),
        (lambda: LabelSpace(names=("cat", " ")), "entry 1 is ' '"),
        (lambda: LabelSpace(names=("cat", "dog", "cat")), "more than once: cat"),
        (lambda: LabelSpace(names=("cat",), prompt_names=("a", "b")), "2 prompt names for 1 lab"),
        (lambda: LabelSpace(names=("a", "b"), ids=("1", "1")), "label ids: .* more than once: 1"),
        (lambda: LabelSpace(names=("a",), subsets={"seen": (1,)}), r"subset 'seen' holds \[1\]"),
        (lambda: LabelSpace(names=("a",), subsets={"seen": ()}), "subset 'seen' is empty"),
        (lambda: LabelSpace(names=("a",), subsets={"s": (0, 0)}), "a label more than once"),
        (lambda: LabelSpace(names=("a",), taxonomy=PETS.taxonomy), "groups of 3 labels"),
        (lambda: Taxonomy(group_names=("g",), group_of=(0, 1)), "only 1 groups"),
        (lambda: Taxonomy(group_names=("g", "h"), group_of=(0,)), "without any label: h"),
        (lambda: Taxonomy(("g",), (0,), ("x", "y")), "2 group prompt names for 1"),
        (lambda: PETS.select("sene"), "no subset named 'sene'.*seen, unseen"),
        (lambda: PETS.select(["cow"]), "no label named 'cow'"),
        (lambda: PETS.select([3]), "label index 3"),
        (lambda: LabelSpace.from_json({"names": ["a"], "colour": 1}), r"unknown keys \['colour'"),
        (lambda: PETS.taxonomy.members("plant"), "no group named 'plant'"),
    ],
)
def test_errors(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_from_file(tmp_path):
    path = tmp_path / "my_labels.txt"
    path.write_text("\ufeff# animals\ncat\n\n  polar bear \n", encoding="utf-8")
    space = LabelSpace.from_file(path)
    assert space.names == ("cat", "polar bear") and space.name == "my_labels"
    for text, message in (("cat\ndog\ncat\n", "line 1 and on line 3"), ("# none\n", "no labels")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            LabelSpace.from_file(path)
    path.write_bytes(b"\xff\xfe\x00c")
    with pytest.raises(UserError, match="not UTF-8"):
        LabelSpace.from_file(path)
    with pytest.raises(UserError, match="cannot read the label file"):
        LabelSpace.from_file(tmp_path / "none.txt")


def test_json_and_pickle_give_the_same_space_back():
    for space in (PETS, scenes(), LabelSpace(names=("a",))):
        assert LabelSpace.from_json(json.loads(json.dumps(space.to_json()))) == space
        assert pickle.loads(pickle.dumps(space)) == space
        assert hash(space) == hash(pickle.loads(pickle.dumps(space)))


def test_fingerprint_follows_the_meaning():
    same = LabelSpace.from_json({**PETS.to_json(), "name": "animals"})
    assert same.fingerprint() == PETS.fingerprint()
    for key, value in (("prompt_names", ["cat", "dog", "tv"]), ("taxonomy", None)):
        other = LabelSpace.from_json({**PETS.to_json(), key: value})
        assert other.fingerprint() != PETS.fingerprint()


def test_scenes_space():
    space = scenes()
    assert len(space) == 22 and len(space.taxonomy) == 3
    assert [len(space.taxonomy.members(g)) for g in space.taxonomy.group_names] == [10, 6, 6]
    assert sorted(space.subsets["seen"] + space.subsets["unseen"]) == list(range(22))
    for group, subset in zip(range(3), ("digits", "shapes", "colours"), strict=True):
        assert space.taxonomy.members(group) == space.subsets[subset]
        unseen = set(space.subsets["unseen"]) & set(space.subsets[subset])
        assert unseen  # every group has something to find without having seen it
