"""Labels of captions by their nouns: what lets a method train on texts in place of images.

TaI-DPT (Guo et al., CVPR 2023) takes a caption for an image of what it names: a label is positive
where the caption holds its name or a synonym, and negative everywhere else.

Words are compared in lower case and in the singular. The longest names are looked for first, those
of equal length in alphabetical order, and what one has found no other finds again: a "hot dog" is
no "dog". The release tags parts of speech and lemmatises with WordNet, which cannot be shipped, and
takes overlapping names in the order of a hash. Here plurals follow a few rules and verbs are not
told from nouns: "he sinks the ball" has a sink.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mlclip_jax.errors import UserError
from mlclip_jax.labels.matching import names_of, normalised, read_aliases, singulars
from mlclip_jax.labels.space import LabelSpace, readable, split_template
from mlclip_jax.spec import hint

# Letters and digits, or one mark: no name goes across a comma. Hyphens separate as blanks do.
_TOKEN = re.compile(r"[^\W_]+|[^\w\s-]")
_POSSESSIVE = re.compile(r"['\u2019]s\b")

# Beyond `singulars` and "men".
_IRREGULAR = {
    "people": "person", "children": "child", "mice": "mouse", "geese": "goose", "oxen": "ox",
    "feet": "foot", "teeth": "tooth", "knives": "knife", "wives": "wife", "lives": "life",
    "leaves": "leaf", "loaves": "loaf", "wolves": "wolf", "calves": "calf", "halves": "half",
    "shelves": "shelf", "elves": "elf", "scarves": "scarf", "hooves": "hoof", "thieves": "thief",
    "skis": "ski", "taxis": "taxi", "tvs": "tv", "pcs": "pc",
}  # fmt: skip

# What is not one of the things that its words name, unless it is a label itself.
_COMPOUNDS = (
    "hot dog, corn dog, chili dog, teddy bear, stuffed bear, stuffed animal, rubber duck, "
    "sea lion, zebra crossing, bird house, dog house, bird's eye, birds eye, bull's eye, "
    "fire hydrant, fire truck, fire engine, fire extinguisher, fire escape, fire station, "
    "fire alarm, power plant, sand castle, rock star, rock band, rock concert, mountain bike, "
    "jet ski, ski lift, ski resort, bus stop, bus station, train station, train track, "
    "phone booth, pay phone, tie dye, pool table, table tennis, toilet paper, oven mitt, "
    "orange juice, book shelf, book case"
)


@functools.cache
def shipped() -> dict[str, tuple[str, ...]]:
    """The words that ship with the package, `synonyms.yaml`, by the label's name."""
    return read_aliases(Path(__file__).with_name("synonyms.yaml"))


def without_possessives(text: str) -> str:
    """A text in lower case; "Dog's" is "dog"."""
    return _POSSESSIVE.sub("", text.lower())


def words_of(text: str) -> list[str]:
    """The words and marks of a text in lower case; "dog's" is "dog"."""
    return _TOKEN.findall(without_possessives(text))


def forms(name: str) -> tuple[str, ...]:
    """How a name of words and blanks may be looked up: itself, in the singular, and in one word."""
    *before, last = name.split(" ")
    found = [name, *singulars(name)]
    if last in _IRREGULAR or last.endswith("men"):
        found.append(" ".join((*before, _IRREGULAR.get(last, last[:-2] + "an"))))
    if before:
        found += [form.replace(" ", "") for form in found]
    return tuple(found)


def synonyms(
    space: LabelSpace, aliases: Mapping[str, Sequence[str]] | None = None
) -> dict[str, int]:
    """Every name that is looked for, in any of its `forms`, with the label it stands for.

    These are the names and prompt names of the labels, their aliases, and the words that ship with
    the package for labels of these names, save those that already mean something else. -1 stands
    for none: such a name is only kept from being what it, or a word of it, would name.

    Args:
      space: the labels.
      aliases: further names of a label, by its name, as `matching.read_aliases` has them. A label
        with none of them (an empty sequence) is never found. So can a word that ships with the
        package be taken out ("table": []), and a name of several words that is no label be kept
        from being what they are ("dog tag": []).

    Raises:
      UserError: aliases of a label that the space does not have, or a name of two labels.
    """
    aliases = normalised(aliases)
    active, own = names_of(space, aliases)
    known = dict.fromkeys(name for names in own for name in names)
    words = {word for more in shipped().values() for word in more}
    for name, more in aliases.items():
        if name not in known and (more or not (" " in name or name in words)):
            raise UserError(
                f"aliases of {name!r}: {space.name!r} has no such label; {hint(name, known)}"
            )
    found: dict[str, int] = {}
    meaning: dict[str, int] = {}  # of every form

    def add(name: str, label: int) -> int:
        """Adds a name unless it means another label, which is returned."""
        key = " ".join(words_of(name))
        other = next((meaning[f] for f in forms(key) if meaning.get(f, label) != label), label)
        if key and other == label:
            found[key] = label
            meaning.update(dict.fromkeys(forms(key), label))
        return other

    for label, names in enumerate(active):
        for name in names:
            other = add(name, label)
            if other != label:
                raise UserError(
                    f"{name!r} stands for both {space.names[other]!r} and {space.names[label]!r} "
                    f"of {space.name!r}: leave it to one of them, or give one an empty list of "
                    "aliases, so that no text has it"
                )
    blocked = [names for names, left in zip(own, active, strict=True) if not left]
    for name in (*(n for n, more in aliases.items() if not more), *sum(blocked, ())):
        add(name, -1)
    for label, names in enumerate(own):
        for name in names if active[label] else ():
            for word in shipped().get(name, ()):
                add(word, label)
    for name in _COMPOUNDS.split(", "):
        add(name, -1)
    return found


class NounFinder:
    """Finds the labels of a space in texts.

    Args:
      space, aliases: see `synonyms`.
    """

    def __init__(
        self, space: LabelSpace, aliases: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        self._label: dict[str, int] = {}
        self._lengths: dict[str, set[int]] = {}  # in words, of the longer names, by the first word
        for name, label in synonyms(space, aliases).items():
            for form in forms(name):
                self._label.setdefault(form, label)
            first, *rest = name.split(" ")
            if rest:
                self._lengths.setdefault(first, set()).add(1 + len(rest))
        # Texts repeat their words: the forms of each are tried once.
        self._named = functools.cache(self._look_up)

    def _look_up(self, words: str) -> str | None:
        """The form of some words that is a name, if there is one."""
        return next((form for form in forms(words) if form in self._label), None)

    def __call__(self, text: str) -> set[int]:
        """Indices of the labels that a text names."""
        words = words_of(text)
        spans = []
        for at, word in enumerate(words):
            for length in self._lengths.get(word, ()):
                name = self._named(" ".join(words[at : at + length]))
                if name is not None and at + length <= len(words):  # not cut short by the end
                    spans.append((-length, name, at))
        found = set()
        for length, name, at in sorted(spans):
            span = slice(at, at - length)
            if all(words[span]):
                found.add(self._label[name])
                words[span] = [""] * -length
        found.update(self._label[name] for word in words if word and (name := self._named(word)))
        return found - {-1}


def label_captions(
    captions: Iterable[str],
    space: LabelSpace,
    aliases: Mapping[str, Sequence[str]] | None = None,
) -> np.ndarray:
    """Labels of captions: +1 where one names the label and -1 everywhere else, int8 [n c].

    A caption without any label is all -1; training leaves those out.

    Args:
      captions: texts [n].
      space, aliases: see `synonyms`.

    Raises:
      UserError: a caption is no text, or see `synonyms`.
    """
    if isinstance(captions, str):
        raise UserError(f"captions: a list of texts is expected, not the single text {captions!r}")
    find = NounFinder(space, aliases)
    hits = []
    for i, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise UserError(f"caption {i} is {caption!r}, but a text is needed")
        hits.append(find(caption))
    targets = np.full((len(hits), len(space)), -1, np.int8)
    targets[
        [i for i, labels in enumerate(hits) for _ in labels],
        [label for labels in hits for label in labels],
    ] = 1
    return targets


def report(targets: np.ndarray, space: LabelSpace) -> str:
    """What was found, a label a line, most frequent first: to be read before a run.

    Args:
      targets: int8 [n c], from `label_captions`.
      space: the labels [c].
    """
    counts = np.count_nonzero(targets > 0, axis=0)
    named = int(np.count_nonzero((targets > 0).any(1)))
    lines = [
        f"{named} of {len(targets)} captions name a label of {space.name}, "
        f"{counts.sum() / max(named, 1):.2f} each; {len(targets) - named} name none:"
    ]
    order = [int(i) for i in np.argsort(-counts, kind="stable")]
    lines += [f"  {space.names[i]}: {counts[i]}" for i in order if counts[i]]
    if not counts.all():
        lines.append(f"in no caption: {', '.join(space.names[i] for i in order if not counts[i])}")
    return "\n".join(lines)


def check_templates(templates: Sequence[str]) -> None:
    """Raises unless each template has a place for the label.

    Raises:
      UserError: one has not one "{}".
    """
    if isinstance(templates, str):
        raise UserError(f"templates: a list is expected, not the single text {templates!r}")
    for template in templates:
        split_template(template)


def template_captions(
    space: LabelSpace, templates: Sequence[str], *, repeats: int = 9
) -> tuple[list[str], np.ndarray]:
    """Captions that TaI-DPT adds for every class, and their one-hot labels.

    Args:
      space: the labels [c]; captions say their prompt names.
      templates: each with one "{}" where the label goes; each gives one caption of every class.
      repeats: how often "a photo of a {}." stands before them (the release: 9).

    Returns:
      Texts [n], class by class, and targets int8 [n c], +1 and -1.

    Raises:
      UserError: a template has not one "{}".
    """
    check_templates(templates)
    each = ["a photo of a {}."] * repeats + list(templates)
    names = map(readable, space.prompt_names)
    texts = [template.replace("{}", name) for name in names for template in each]
    one_hot = 2 * np.eye(len(space), dtype=np.int8) - np.int8(1)
    return texts, np.repeat(one_hot, len(each), axis=0)
