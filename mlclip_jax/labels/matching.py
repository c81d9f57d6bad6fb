"""Which labels of two spaces mean the same, by name: what trained on one is tested on the other.

Names are compared in lower case with "_" and "-" as spaces. A name with commas, as WordNet and
ImageNet have them ("tench, Tinca tinca"), stands for each of its parts, and the last word may be
plural on one side ("horses", "horse"). Everything else, from "airplane" and "aeroplane" on, is for
a file of aliases.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.spec import hint

DropFrom = Literal["none", "train", "eval", "both"]


class Pair(NamedTuple):
    """Labels that mean the same: their indices, and the words by which they were found."""

    first: int
    second: int
    words: str


@dataclass(frozen=True)
class Matching:
    """Labels of two spaces that mean the same; one label may be in several pairs.

    Attributes:
      first, second: the spaces.
      pairs: in the order of `second`, then of `first`.
    """

    first: LabelSpace
    second: LabelSpace
    pairs: tuple[Pair, ...]

    def unmatched(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Indices of the labels of either space that are in no pair."""
        matched = {pair.first for pair in self.pairs}, {pair.second for pair in self.pairs}
        spaces = self.first, self.second
        return tuple(
            tuple(i for i in range(len(space)) if i not in found)
            for space, found in zip(spaces, matched, strict=True)
        )

    def report(self) -> str:
        """The pairs, one a line, and what `second` has beyond them: to be read before a run."""
        _, alone = self.unmatched()
        found = len(self.second) - len(alone)
        lines = [
            f"{found} of the {len(self.second)} labels of {self.second.name} are among the "
            f"{len(self.first)} of {self.first.name}:"
        ]
        for pair in self.pairs:
            lines.append(
                f"  {self.second.names[pair.second]} = {self.first.names[pair.first]} "
                f"({self.first.ids[pair.first]}), by {pair.words!r}"
            )
        if alone:
            lines.append(f"not found: {', '.join(self.second.names[i] for i in alone)}")
        return "\n".join(lines)


def normalise(name: str) -> str:
    """`name` in lower case, with single spaces for "_", "-" and white space."""
    return " ".join(re.split(r"[\s_-]+", name.lower())).strip()


def singulars(name: str) -> tuple[str, ...]:
    """What a normalised name may be the plural of, by its last word; () if it is no plural."""
    if len(name.split(" ")[-1]) < 4 or not name.endswith("s") or name.endswith(("ss", "us", "is")):
        return ()
    found = [name[:-1]]
    if name.endswith("ies"):
        found.append(name[:-3] + "y")
    if name.endswith(("ses", "xes", "zes", "ches", "shes", "oes")):
        found.append(name[:-2])
    return tuple(found)


def match(
    first: LabelSpace, second: LabelSpace, aliases: Mapping[str, Sequence[str]] | None = None
) -> Matching:
    """Finds the labels of `second` among those of `first`.

    Args:
      first, second: the spaces; names and prompt names count.
      aliases: further names of a label of either space, by its name; a label with none of them
        (an empty sequence) is kept from matching at all.

    Raises:
      UserError: aliases of a label that neither space has.
    """
    aliases = normalised(aliases)
    ours, theirs = (names_of(space, aliases) for space in (first, second))
    for name in aliases:
        if not any(name in names for names in (*ours[1], *theirs[1])):
            raise UserError(
                f"aliases of {name!r}: neither {first.name!r} nor {second.name!r} has this label; "
                f"{hint(name, second.names)}"
            )
    index: dict[str, list[int]] = {}
    plurals: dict[str, list[int]] = {}
    for i, names in enumerate(ours[0]):
        for name in names:
            index.setdefault(name, []).append(i)
            for singular in singulars(name):
                plurals.setdefault(singular, []).append(i)
    pairs = {}
    for j, names in enumerate(theirs[0]):
        for name in names:
            found = [i for form in (name, *singulars(name)) for i in index.get(form, ())]
            for i in found + plurals.get(name, []):
                pairs.setdefault((j, i), Pair(i, j, name))
    return Matching(first, second, tuple(pairs[key] for key in sorted(pairs)))


def normalised(aliases: Mapping[str, Sequence[str]] | None) -> dict[str, tuple[str, ...]]:
    """`aliases` with all names normalised; {} for None."""
    return {normalise(name): tuple(map(normalise, more)) for name, more in (aliases or {}).items()}


def names_of(
    space: LabelSpace, aliases: Mapping[str, Sequence[str]]
) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """For each label the names that take part, and all that it has in the space.

    Args:
      space: the labels.
      aliases: normalised; see `match`.
    """
    active, own = [], []
    for label in zip(space.names, space.prompt_names, strict=True):
        whole = [normalise(name) for name in label]
        parts = [normalise(part) for name in label for part in name.split(",")]
        names = tuple(dict.fromkeys(filter(None, parts + whole)))
        given = [aliases[name] for name in names if name in aliases]
        own.append(names)
        blocked = any(not more for more in given)
        active.append(() if blocked else tuple(dict.fromkeys((*names, *sum(given, ())))))
    return active, own


def read_aliases(path: str | Path) -> dict[str, tuple[str, ...]]:
    """The aliases in a YAML file: a mapping of a label to another name of it, or a list of them.

        airplane: [airliner, warplane]
        crane: []            # the bird is not the machine: keep it from matching

    Raises:
      UserError: the file cannot be read or has another form.
    """
    import yaml

    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read the aliases {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must be a mapping of each label to the list of its other names")
    found = {}
    for label, names in value.items():
        names = [names] if isinstance(names, str) else names
        texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not isinstance(label, str) or not texts:
            raise UserError(f"{path}: {label!r} must have a list of names, not {names!r}")
        found[label] = tuple(names)
    return found


def without_overlap(matching: Matching, drop_from: DropFrom) -> tuple[LabelSpace, LabelSpace]:
    """The spaces of training (`matching.first`) and evaluation without the labels they share.

    ADDS says "without overlapped classes" of both: its tables read as if they were left out of
    evaluation in one (3, 4) and of training in the other (8).

    Args:
      matching: what the spaces share.
      drop_from: where shared labels are dropped.

    Raises:
      UserError: nothing would be left.
    """
    spaces = []
    for side, space, kept in zip(
        ("train", "eval"), (matching.first, matching.second), matching.unmatched(), strict=True
    ):
        if drop_from not in (side, "both") or len(kept) == len(space):
            spaces.append(space)
        elif kept:
            spaces.append(space.select(kept))
        else:
            raise UserError(
                f"all labels of {space.name!r} overlap: drop_from={drop_from!r} leaves none"
            )
    return spaces[0], spaces[1]
