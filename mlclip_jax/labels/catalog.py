"""Label spaces that ship with the package."""

from __future__ import annotations

from mlclip_jax.labels.space import LabelSpace, Taxonomy

SCENES_DIGITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
)  # fmt: skip
SCENES_SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
SCENES_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
# Held out of training by the seen/unseen view: some of each group.
SCENES_UNSEEN = ("three", "six", "eight", "triangle", "star", "purple")


def scenes() -> LabelSpace:
    """The 22 labels of Scenes: ten digits, six shapes, six colours, in these three groups.

    Subsets: "seen" (16) and "unseen" (6), and one for each group: "digits", "shapes", "colours".
    """
    names = SCENES_DIGITS + SCENES_SHAPES + SCENES_COLOURS
    group_of = (0,) * len(SCENES_DIGITS) + (1,) * len(SCENES_SHAPES) + (2,) * len(SCENES_COLOURS)
    unseen = tuple(names.index(n) for n in SCENES_UNSEEN)
    return LabelSpace(
        names=names,
        subsets={
            "seen": tuple(i for i in range(len(names)) if i not in unseen),
            "unseen": unseen,
            "digits": tuple(i for i, g in enumerate(group_of) if g == 0),
            "shapes": tuple(i for i, g in enumerate(group_of) if g == 1),
            "colours": tuple(i for i, g in enumerate(group_of) if g == 2),
        },
        taxonomy=Taxonomy(group_names=("digit", "shape", "colour"), group_of=group_of),
        name="scenes",
    )
