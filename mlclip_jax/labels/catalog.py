"""Label spaces that ship with the package: Scenes and the published benchmarks.

Names, order and groups are those of the benchmarks' own files; where a benchmark has no groups of
its own they are HSPNet's (Wang et al., ACM MM 2023, Figures 4 and 5).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace, Taxonomy

SCENES_DIGITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
)  # fmt: skip
SCENES_SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
SCENES_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
# Held out of training by the seen/unseen view: some of each group.
SCENES_UNSEEN = ("three", "six", "eight", "triangle", "star", "purple")

# Supercategories in the order in which the annotation files first name them; laid end to end,
# their members are the 80 categories in the order of their ids.
_COCO = {
    "person": "person",
    "vehicle": "bicycle, car, motorcycle, airplane, bus, train, truck, boat",
    "outdoor": "traffic light, fire hydrant, stop sign, parking meter, bench",
    "animal": "bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe",
    "accessory": "backpack, umbrella, handbag, tie, suitcase",
    "sports": "frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, "
    "skateboard, surfboard, tennis racket",
    "kitchen": "bottle, wine glass, cup, fork, knife, spoon, bowl",
    "food": "banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake",
    "furniture": "chair, couch, potted plant, bed, dining table, toilet",
    "electronic": "tv, laptop, mouse, remote, keyboard, cell phone",
    "appliance": "microwave, oven, toaster, sink, refrigerator",
    "indoor": "book, clock, vase, scissors, teddy bear, hair drier, toothbrush",
}
_COCO_UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # of 1..90

_VOC = {
    "vehicles": "aeroplane, bicycle, boat, bus, car, motorbike, train",
    "household": "bottle, chair, diningtable, pottedplant, sofa, tvmonitor",
    "animals": "bird, cat, cow, dog, horse, sheep",
    "person": "person",
}
_VOC_PRETTY = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "tvmonitor": "tv monitor",
}

_NUS = {
    "activity": "dancing, earthquake, fire, protest, running, soccer, surf, swimmers, wedding",
    "program": "sports",
    "scene": "airport, beach, bridge, buildings, castle, cityscape, clouds, frost, garden, "
    "glacier, grass, harbor, house, lake, moon, mountain, nighttime, ocean, plants, railroad, "
    "rainbow, reflection, road, sky, snow, street, sunset, temple, town, valley, water, "
    "waterfall, window",
    "people": "military, person, police, tattoo",
    "object": "animal, bear, birds, boats, book, cars, cat, computer, coral, cow, dog, elk, fish, "
    "flags, flowers, food, fox, horses, leaf, plane, rocks, sand, sign, statue, sun, tiger, "
    "tower, toy, train, tree, vehicle, whales, zebra",
    "graphics": "map",
}

_CUB_COLOURS = (
    "blue, brown, iridescent, purple, rufous, grey, yellow, olive, green, pink, orange, black, "
    "white, red, buff"
)
_CUB_PATTERNS = "solid, spotted, striped, multi-colored"
# The attribute types of attributes.txt with their values, in its order.
_CUB_ATTRIBUTES = {
    "bill_shape": "curved_(up_or_down), dagger, hooked, needle, hooked_seabird, spatulate, "
    "all-purpose, cone, specialized",
    "wing_color": _CUB_COLOURS,
    "upperparts_color": _CUB_COLOURS,
    "underparts_color": _CUB_COLOURS,
    "breast_pattern": _CUB_PATTERNS,
    "back_color": _CUB_COLOURS,
    "tail_shape": "forked_tail, rounded_tail, notched_tail, fan-shaped_tail, pointed_tail, "
    "squared_tail",
    "upper_tail_color": _CUB_COLOURS,
    "head_pattern": "spotted, malar, crested, masked, unique_pattern, eyebrow, eyering, plain, "
    "eyeline, striped, capped",
    "breast_color": _CUB_COLOURS,
    "throat_color": _CUB_COLOURS,
    "eye_color": _CUB_COLOURS.replace("iridescent, ", ""),
    "bill_length": "about_the_same_as_head, longer_than_head, shorter_than_head",
    "forehead_color": _CUB_COLOURS,
    "under_tail_color": _CUB_COLOURS,
    "nape_color": _CUB_COLOURS,
    "belly_color": _CUB_COLOURS,
    "wing_shape": "rounded-wings, pointed-wings, broad-wings, tapered-wings, long-wings",
    "size": "large_(16_-_32_in), small_(5_-_9_in), very_large_(32_-_72_in), medium_(9_-_16_in), "
    "very_small_(3_-_5_in)",
    "shape": "upright-perching_water-like, chicken-like-marsh, long-legged-like, duck-like, "
    "owl-like, gull-like, hummingbird-like, pigeon-like, tree-clinging-like, hawk-like, "
    "sandpiper-like, upland-ground-like, swallow-like, perching-like",
    "back_pattern": _CUB_PATTERNS,
    "tail_pattern": _CUB_PATTERNS,
    "belly_pattern": _CUB_PATTERNS,
    "primary_color": _CUB_COLOURS,
    "leg_color": _CUB_COLOURS,
    "bill_color": _CUB_COLOURS,
    "crown_color": _CUB_COLOURS,
    "wing_pattern": _CUB_PATTERNS,
}
# HSPNet's groups in its order; "upper" and "under" are of the tail.
_CUB_PARTS = (
    "throat", "breast", "crown", "head", "forehead", "primary", "back", "shape", "belly", "bill",
    "nape", "underparts", "upperparts", "wing", "under", "upper", "leg", "tail", "size", "eye",
)  # fmt: skip


def scenes() -> LabelSpace:
    """The 22 labels of Scenes: ten digits, six shapes, six colours, in these three groups.

    Subsets: "seen" (16) and "unseen" (6), and one for each group: "digits", "shapes", "colours".
    """
    groups = {"digit": SCENES_DIGITS, "shape": SCENES_SHAPES, "colour": SCENES_COLOURS}
    names = sum(groups.values(), ())
    unseen = tuple(names.index(n) for n in SCENES_UNSEEN)
    return LabelSpace(
        names=names,
        subsets={
            "seen": tuple(i for i in range(len(names)) if i not in unseen),
            "unseen": unseen,
            **{f"{g}s": tuple(map(names.index, members)) for g, members in groups.items()},
        },
        taxonomy=_taxonomy(names, groups),
        name="scenes",
    )


def coco() -> LabelSpace:
    """The 80 categories of MS-COCO in 12 supercategories; ids are the annotation files' (1..90)."""
    groups = _members(_COCO)
    names = sum(groups.values(), ())
    ids = tuple(str(i) for i in range(1, 91) if i not in _COCO_UNUSED_IDS)
    return LabelSpace(names=names, ids=ids, taxonomy=_taxonomy(names, groups), name="coco")


def voc(*, pretty: bool = False) -> LabelSpace:
    """The 20 classes of Pascal VOC, alphabetical, in HSPNet's 4 groups.

    Args:
      pretty: prompts say "dining table", "airplane"; otherwise, as in the published work, the
        class ids themselves ("diningtable", "aeroplane"). Names and ids are the class ids.
    """
    groups = _members(_VOC)
    names = tuple(sorted(sum(groups.values(), ())))
    return LabelSpace(
        names=names,
        prompt_names=tuple(_VOC_PRETTY.get(n, n) for n in names) if pretty else (),
        taxonomy=_taxonomy(names, groups),
        name="voc",
    )


def nus() -> LabelSpace:
    """The 81 concepts of NUS-WIDE, alphabetical as in Concepts81.txt, in 6 groups.

    "program" (sports) and "graphics" (map) have one label each.
    """
    groups = _members(_NUS)
    names = tuple(sorted(sum(groups.values(), ())))
    return LabelSpace(names=names, taxonomy=_taxonomy(names, groups), name="nus")


def grouped(space: LabelSpace) -> LabelSpace | None:
    """The labels of a space that have groups: all, or its unseen ones where they are NUS-WIDE's.

    None: no two groups are known.
    """
    if space.taxonomy is None and "unseen" in space.subsets:
        known, unseen = nus(), space.select("unseen")
        if set(unseen.names) <= set(known.names):
            of = known.taxonomy.select([known.index(name) for name in unseen.names])
            space = dataclasses.replace(unseen, taxonomy=of)
    return space if space.taxonomy is not None and len(space.taxonomy) > 1 else None


def cub() -> LabelSpace:
    """The 312 attributes of CUB-200-2011 in 20 groups by part of the bird.

    The label of `has_<type>::<value>` is "<value> <part>": the value without what stands in
    brackets, and the first word of the type ("curved bill", "blue upper", "forked_tail tail");
    prompts have spaces for underscores. Ids are the numbers of attributes.txt (1..312). One label
    differs from HSPNet's file, which has "upright-perching-water-like" for attributes.txt's
    "upright-perching_water-like".
    """
    names, groups = [], {part: [] for part in _CUB_PARTS}
    for kind, values in _CUB_ATTRIBUTES.items():
        part = kind.split("_")[0]
        for value in values.split(", "):
            name = f"{re.sub(r'_[(].*[)]', '', value)} {part}"
            names.append(name)
            groups[part].append(name)
    return LabelSpace(
        names=tuple(names),
        prompt_names=tuple(n.replace("_", " ") for n in names),
        ids=tuple(str(i + 1) for i in range(len(names))),
        taxonomy=_taxonomy(names, groups),
        name="cub",
    )


def vg200() -> LabelSpace:
    """The 200 classes of VG-200 with stand-ins for their names, "class 0" to "class 199".

    No names are published, only indices (the ids). The stand-ins serve what needs their number
    alone, such as a dry run; `with_names` puts the names of a file in their place. No groups.
    """
    count = range(200)
    return LabelSpace(
        names=tuple(f"class {i}" for i in count), ids=tuple(map(str, count)), name="vg200"
    )


def with_names(space: LabelSpace, path: str | Path) -> LabelSpace:
    """`space` with the names, for reports and prompts, that a file gives, one a line in its order.

    Raises:
      UserError: the file cannot be read, repeats a name, or has not one name for each label.
    """
    names = LabelSpace.from_file(path).names
    if len(names) != len(space):
        raise UserError(
            f"{path} has {len(names)} names, but {space.name!r} has {len(space)} labels"
        )
    return dataclasses.replace(space, names=names, prompt_names=names)


def _members(groups: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    return {group: tuple(names.split(", ")) for group, names in groups.items()}


def _taxonomy(names: Sequence[str], groups: Mapping[str, Sequence[str]]) -> Taxonomy:
    """The groups of `names`, numbered in the order in which `groups` gives them."""
    group_of = {name: g for g, members in enumerate(groups.values()) for name in members}
    return Taxonomy(tuple(groups), tuple(group_of[name] for name in names))
