"""Matching of label spaces by name."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlclip_jax.errors import UserError
from mlclip_jax.labels import catalog, matching
from mlclip_jax.labels.matching import match, read_aliases, singulars, without_overlap
from mlclip_jax.labels.space import LabelSpace

IMAGENET = LabelSpace(
    names=(
        "tench, Tinca tinca",
        "crane, n02012849",
        "crane, n03126707",
        "African elephant, Loxodonta africana",
        "cellular telephone, cellular phone, cellphone, cell, mobile phone",
        "banana",
        "zebra",
        "sports-car, sport car",
    ),
    prompt_names=(
        "tench", "crane", "crane", "African elephant", "cellular telephone", "banana", "zebra",
        "sports-car",
    ),
    ids=tuple(f"n{i:08d}" for i in range(8)),
    name="imagenet",
)  # fmt: skip


def pairs(found):
    return [(found.first.names[p.first], found.second.names[p.second]) for p in found.pairs]


def space(*names, **more):
    return LabelSpace(names=names, **more)


def test_imagenet_and_coco():
    found = match(IMAGENET, catalog.coco())
    assert pairs(found) == [("zebra", "zebra"), ("banana", "banana")]
    aliases = {"cell phone": ["cellphone"], "elephant": ["African elephant"]}
    assert pairs(match(IMAGENET, catalog.coco(), aliases)) == [
        ("African elephant, Loxodonta africana", "elephant"),
        ("zebra", "zebra"),
        ("banana", "banana"),
        ("cellular telephone, cellular phone, cellphone, cell, mobile phone", "cell phone"),
    ]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("horse", "horses", True),
        ("Horses", "HORSE", True),
        ("traffic_light", "traffic-lights", True),
        ("bus", "buses", True),
        ("berry", "berries", True),
        ("tomato", "tomatoes", True),
        ("box", "boxes", True),
        ("dish", "dishes", True),
        ("bird", "birds of prey", False),
        ("glass", "glas", False),
        ("cans", "canes", False),
        ("grass", "gras", False),
        ("tennis", "tenni", False),
        ("gas", "ga", False),
        ("sky", "ski", False),
        ("sports car", "sport car", False),
        ("couch, lounge", "lounge", True),
        ("Tinca  tinca", "tinca tinca", True),
    ],
)
def test_the_small_rules(one, other, same):
    for a, b in ((one, other), (other, one)):
        assert bool(match(space(a), space(b)).pairs) == same


def test_one_label_may_match_several_and_may_be_kept_apart():
    birds = space("crane", "tench")
    found = match(IMAGENET, birds)
    assert [(p.first, p.second, p.words) for p in found.pairs] == [
        (1, 0, "crane"),
        (2, 0, "crane"),
        (0, 1, "tench"),
    ]
    assert found.unmatched() == ((3, 4, 5, 6, 7), ())
    assert [p.second for p in match(IMAGENET, birds, {"Crane": []}).pairs] == [1]
    apart = match(IMAGENET, birds, {"crane, n03126707": []})
    assert [p.first for p in apart.pairs] == [1, 0]
    with pytest.raises(
        UserError, match="neither 'imagenet' nor 'labels' has this label; did you mean 'crane'"
    ):
        match(IMAGENET, birds, {"cranes": ["x"]})


def test_report_names_every_pair_and_what_is_left():
    report = match(IMAGENET, space("banana", "crane", "sky", name="mine")).report()
    assert report.splitlines() == [
        "2 of the 3 labels of mine are among the 8 of imagenet:",
        "  banana = banana (n00000005), by 'banana'",
        "  crane = crane, n02012849 (n00000001), by 'crane'",
        "  crane = crane, n03126707 (n00000002), by 'crane'",
        "not found: sky",
    ]


def test_overlap_is_dropped_where_asked():
    found = match(IMAGENET, space("banana", "crane", "sky"))
    sizes = {
        drop: tuple(map(len, without_overlap(found, drop)))
        for drop in ("none", "train", "eval", "both")
    }
    assert sizes == {"none": (8, 3), "train": (5, 3), "eval": (8, 1), "both": (5, 1)}
    train, evaluated = without_overlap(found, "both")
    assert evaluated.names == ("sky",) and "banana" not in train.names
    assert train.ids == tuple(IMAGENET.ids[i] for i in (0, 3, 4, 6, 7))
    with pytest.raises(UserError, match="drop_from='eval' leaves none"):
        without_overlap(match(IMAGENET, space("banana")), "eval")


def test_aliases_of_a_file(tmp_path):
    path = tmp_path / "aliases.yaml"
    path.write_text("airplane: [airliner, warplane]\ncrane: []\ntv: television\n")
    assert read_aliases(path) == {
        "airplane": ("airliner", "warplane"),
        "crane": (),
        "tv": ("television",),
    }
    for text, message in (
        ("- airplane", "must be a mapping"),
        ("airplane: 3", "'airplane' must have a list of names, not 3"),
        ("airplane: [3]", "must have a list of names"),
        ("3: [a]", "3 must have a list"),
        ("a: [", "is not YAML"),
        ("", "must be a mapping"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_aliases(path)
    with pytest.raises(UserError, match="cannot read the aliases"):
        read_aliases(tmp_path / "none.yaml")


NAMES = st.lists(st.text("abos -_,", min_size=1).filter(str.strip), min_size=1, unique=True)


@settings(max_examples=50, deadline=None)
@given(NAMES, NAMES)
def test_matching_has_no_direction(first, second):
    one, other = space(*first), space(*second)
    there = {(p.first, p.second) for p in match(one, other).pairs}
    back = {(p.second, p.first) for p in match(other, one).pairs}
    assert there == back


@settings(max_examples=50, deadline=None)
@given(NAMES)
def test_every_name_matches_itself(names):
    found = {(p.first, p.second) for p in match(space(*names), space(*names)).pairs}
    own = {i for i, name in enumerate(names) if matching.normalise(name).strip(", ")}
    assert {(i, i) for i in own} <= found


def test_singulars():
    assert singulars("glasses") == ("glasse", "glass")
    assert singulars("sky") == singulars("bus") == singulars("is") == ()
