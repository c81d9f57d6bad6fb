"""The published label spaces: sizes, order, ids and groups."""

from __future__ import annotations

import pytest

from mlclip_jax.errors import UserError
from mlclip_jax.labels import catalog

SPACES = {s.name: s for s in (catalog.coco(), catalog.voc(), catalog.nus(), catalog.cub())}
GROUP_SIZES = {
    "coco": (1, 8, 5, 10, 5, 10, 7, 10, 6, 6, 5, 7),
    "voc": (7, 6, 6, 1),
    "nus": (9, 1, 33, 4, 33, 1),
    "cub": (15, 19, 15, 11, 15, 15, 19, 14, 19, 27, 15, 15, 15, 24, 15, 15, 15, 10, 5, 14),
}
COCO_FIRST = (0, 1, 9, 14, 24, 29, 39, 46, 56, 62, 68, 73)
# Attributes of each part of the bird, numbered from 0, as HSPNet's own file has them.
CUB_RANGES = {
    "throat": "120-134", "breast": "54-57,105-119", "crown": "293-307", "head": "94-104",
    "forehead": "152-166", "primary": "248-262", "back": "58-72,236-239", "shape": "222-235",
    "belly": "197-211,244-247", "bill": "0-8,149-151,278-292", "nape": "182-196",
    "underparts": "39-53", "upperparts": "24-38", "wing": "9-23,212-216,308-311",
    "under": "167-181", "upper": "79-93", "leg": "263-277", "tail": "73-78,240-243",
    "size": "217-221", "eye": "135-148",
}  # fmt: skip


def ranges(text):
    ends = (part.split("-") for part in text.split(","))
    return tuple(i for first, last in ends for i in range(int(first), int(last) + 1))


@pytest.mark.parametrize("name", SPACES)
def test_groups_have_the_published_sizes_and_hold_every_label_once(name):
    space = SPACES[name]
    groups = [space.taxonomy.members(g) for g in space.taxonomy.group_names]
    assert tuple(map(len, groups)) == GROUP_SIZES[name]
    assert sorted(i for group in groups for i in group) == list(range(len(space)))
    assert space.taxonomy.named


def test_coco():
    space = SPACES["coco"]
    assert len(space) == 80
    firsts = [space.taxonomy.members(g)[0] for g in range(12)]
    assert tuple(firsts) == COCO_FIRST
    assert space.taxonomy.group_of == tuple(sorted(space.taxonomy.group_of))
    assert space.taxonomy.group_names[-3:] == ("electronic", "appliance", "indoor")
    ids = dict(zip(space.names, map(int, space.ids), strict=True))
    assert list(ids.values()) == sorted(ids.values())
    known = {"person": 1, "stop sign": 13, "bowl": 51, "chair": 62, "tv": 72, "book": 84}
    assert {name: ids[name] for name in known} == known and max(ids.values()) == 90


def test_voc_and_its_readable_prompts():
    space = SPACES["voc"]
    assert len(space) == 20 and space.names == space.prompt_names == space.ids
    assert space.names == tuple(sorted(space.names)) and space.names[14] == "person"
    pretty = catalog.voc(pretty=True)
    assert pretty.names == pretty.ids == space.names
    assert pretty.taxonomy == space.taxonomy
    changed = [(a, b) for a, b in zip(pretty.names, pretty.prompt_names, strict=True) if a != b]
    assert ("diningtable", "dining table") in changed and len(changed) == 5


def test_nus():
    space = SPACES["nus"]
    assert len(space) == 81 and space.names == tuple(sorted(space.names))
    assert space.names[0] == "airport" and space.names[-1] == "zebra"
    for absent_from_tags in ("map", "tattoo", "computer", "whales", "swimmers", "fire"):
        assert absent_from_tags in space.names
    assert [space.names[i] for i in space.taxonomy.members("graphics")] == ["map"]


def test_cub():
    space = SPACES["cub"]
    assert len(space) == 312 and space.ids[0] == "1" and space.ids[-1] == "312"
    assert space.taxonomy.group_names == tuple(CUB_RANGES)
    for part, text in CUB_RANGES.items():
        assert space.taxonomy.members(part) == ranges(text)
        assert all(space.names[i].endswith(f" {part}") for i in ranges(text))
    name = dict(enumerate(space.names))
    assert (name[0], name[9], name[73]) == ("curved bill", "blue wing", "forked_tail tail")
    assert (name[79], name[217], name[311]) == ("blue upper", "large size", "multi-colored wing")
    assert name[222] == "upright-perching_water-like shape"
    assert space.prompt_names[73] == "forked tail tail"
    assert not any("_" in prompt or "(" in prompt for prompt in space.prompt_names)
    assert "iridescent eye" not in space.names and "iridescent bill" in space.names


def test_vg_takes_its_names_from_a_file(tmp_path):
    space = catalog.vg200()
    assert len(space) == 200 and space.ids[199] == "199" and space.taxonomy is None
    path = tmp_path / "names.txt"
    path.write_text("\n".join(f"thing {i}" for i in range(200)))
    named = catalog.with_names(space, path)
    assert named.names[7] == named.prompt_names[7] == "thing 7"
    assert named.ids == space.ids and named.name == "vg200"
    path.write_text("sky\ntree\n")
    with pytest.raises(UserError, match=r"names.txt has 2 names, but 'vg200' has 200 labels"):
        catalog.with_names(space, path)
