"""Label spaces: what is being recognised, as strings, on the host.

A `LabelSpace` never becomes part of a model's weights: a method turns it into `LabelInputs` (token
ids, groups, masks) and takes those as an argument, so any label set can be scored by any method.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mlclip_jax.errors import UserError


def readable(name: str) -> str:
    """A label's name as text: underscores are spaces."""
    return name.replace("_", " ")


def split_template(template: str) -> tuple[str, str]:
    """What a template has before and after the label.

    Raises:
      UserError: the template has not exactly one "{}".
    """
    if template.count("{}") != 1:
        raise UserError(f'template {template!r} needs exactly one "{{}}" where the label goes')
    head, tail = template.split("{}")
    return head, tail


def _check_names(names: Sequence[str], what: str, *, unique: bool) -> tuple[str, ...]:
    """Returns `names` as a tuple; raises for an empty list, empty names and (if asked) repeats."""
    if isinstance(names, str):
        raise UserError(f"{what}: expected a sequence of strings, got the single string {names!r}")
    names = tuple(names)
    if not names:
        raise UserError(f"{what}: at least one is needed")
    for i, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{what}: entry {i} is {name!r}, but a non-empty string is needed")
    if unique:
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise UserError(f"{what}: these occur more than once: {', '.join(repeated)}")
    return names


@dataclass(frozen=True)
class Taxonomy:
    """Groups of labels; each of the c classes belongs to exactly one of the g groups.

    Attributes:
      group_names: unique names of the groups [g].
      group_of: the group of each class, `0 <= group_of[i] < g` [c]; every group is used.
      group_prompt_names: the groups' names as prompts say them [g]; default `group_names`.
      named: whether the names mean something. False for clusters: methods then represent a group
        by its labels, not by a prompt.
    """

    group_names: tuple[str, ...]
    group_of: tuple[int, ...]
    group_prompt_names: tuple[str, ...] = ()
    named: bool = True

    def __post_init__(self) -> None:
        names = _check_names(self.group_names, "group names", unique=True)
        prompts = tuple(self.group_prompt_names) or names
        prompts = _check_names(prompts, "group prompt names", unique=False)
        if len(prompts) != len(names):
            raise UserError(f"{len(prompts)} group prompt names for {len(names)} groups")
        group_of = tuple(int(g) for g in self.group_of)
        wrong = sorted({g for g in group_of if not 0 <= g < len(names)})
        if wrong:
            raise UserError(f"group_of holds {wrong}, but there are only {len(names)} groups")
        empty = [name for g, name in enumerate(names) if g not in set(group_of)]
        if empty:
            raise UserError(f"groups without any label: {', '.join(empty)}")
        object.__setattr__(self, "group_names", names)
        object.__setattr__(self, "group_prompt_names", prompts)
        object.__setattr__(self, "group_of", group_of)

    def __len__(self) -> int:
        """The number of groups g."""
        return len(self.group_names)

    def members(self, group: str | int) -> tuple[int, ...]:
        """Indices of the classes in a group, given by name or number."""
        if isinstance(group, str):
            if group not in self.group_names:
                raise UserError(f"no group named {group!r}; groups: {', '.join(self.group_names)}")
            group = self.group_names.index(group)
        return tuple(i for i, g in enumerate(self.group_of) if g == group)

    def select(self, indices: Sequence[int]) -> Taxonomy:
        """The taxonomy of a selection of the classes; groups left empty are dropped."""
        kept = sorted({self.group_of[i] for i in indices})
        new = {g: k for k, g in enumerate(kept)}
        return dataclasses.replace(
            self,
            group_names=tuple(self.group_names[g] for g in kept),
            group_of=tuple(new[self.group_of[i]] for i in indices),
            group_prompt_names=tuple(self.group_prompt_names[g] for g in kept),
        )


@dataclass(frozen=True)
class LabelSpace:
    """An ordered set of c labels.

    Attributes:
      names: unique names [c], as reports show them.
      prompt_names: the names as prompts say them [c] ("television monitor"); default `names`.
      ids: unique ids in the benchmark's files [c] (COCO numbers, WordNet ids); default `names`.
      subsets: named selections of classes, e.g. "seen" and "unseen".
      taxonomy: groups of the labels, or None.
      name: the name of the space, e.g. "coco80".
    """

    names: tuple[str, ...]
    prompt_names: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()
    subsets: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    taxonomy: Taxonomy | None = None
    name: str = "labels"

    def __post_init__(self) -> None:
        names = _check_names(self.names, "label names", unique=True)
        prompts = _check_names(tuple(self.prompt_names) or names, "prompt names", unique=False)
        ids = _check_names(tuple(self.ids) or names, "label ids", unique=True)
        for what, values in (("prompt names", prompts), ("ids", ids)):
            if len(values) != len(names):
                raise UserError(f"{len(values)} {what} for {len(names)} labels")
        subsets = {}
        for key, indices in dict(self.subsets).items():
            indices = tuple(int(i) for i in indices)
            if not indices:
                raise UserError(f"subset {key!r} is empty")
            wrong = [i for i in indices if not 0 <= i < len(names)]
            if wrong:
                raise UserError(f"subset {key!r} holds {wrong}, but there are {len(names)} labels")
            if len(set(indices)) != len(indices):
                raise UserError(f"subset {key!r} holds a label more than once")
            subsets[key] = indices
        if self.taxonomy is not None and len(self.taxonomy.group_of) != len(names):
            raise UserError(
                f"the taxonomy gives groups of {len(self.taxonomy.group_of)} labels, "
                f"but the space has {len(names)}"
            )
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "prompt_names", prompts)
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "subsets", MappingProxyType(subsets))

    def __len__(self) -> int:
        """The number of labels c."""
        return len(self.names)

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    def __reduce__(self) -> tuple[Any, ...]:
        # The read-only view of `subsets` does not pickle; worker processes need the space.
        return type(self).from_json, (self.to_json(),)

    def index(self, name: str) -> int:
        """The index of a label by name; raises UserError with near matches if there is none."""
        try:
            return self.names.index(name)
        except ValueError:
            close = difflib.get_close_matches(str(name), self.names, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(close)}?" if close else f"it has {len(self)} labels"
            raise UserError(f"no label named {name!r} in {self.name!r}; {hint}") from None

    def indices(self, selection: str | Iterable[int | str]) -> tuple[int, ...]:
        """Indices of a subset (by its name) or of labels given by index or name."""
        if isinstance(selection, str):
            if selection not in self.subsets:
                known = ", ".join(self.subsets) or "none"
                raise UserError(f"no subset named {selection!r} in {self.name!r}; it has: {known}")
            return self.subsets[selection]
        out = []
        for item in selection:
            i = self.index(item) if isinstance(item, str) else int(item)
            if not 0 <= i < len(self):
                raise UserError(f"label index {i} in {self.name!r}, which has {len(self)} labels")
            out.append(i)
        return tuple(out)

    def select(self, selection: str | Iterable[int | str]) -> LabelSpace:
        """The space of some of the labels, in the order given.

        Args:
          selection: the name of a subset, or labels by index or name.

        Returns:
          A new space; subsets are cut down to it, those left empty are dropped.
        """
        chosen = self.indices(selection)
        new = {old: k for k, old in enumerate(chosen)}
        subsets = {k: tuple(new[i] for i in v if i in new) for k, v in self.subsets.items()}
        suffix = selection if isinstance(selection, str) else f"{len(chosen)} labels"
        return LabelSpace(
            names=tuple(self.names[i] for i in chosen),
            prompt_names=tuple(self.prompt_names[i] for i in chosen),
            ids=tuple(self.ids[i] for i in chosen),
            subsets={k: v for k, v in subsets.items() if v},
            taxonomy=self.taxonomy.select(chosen) if self.taxonomy is not None else None,
            name=f"{self.name}/{suffix}",
        )

    @classmethod
    def from_file(cls, path: str | Path) -> LabelSpace:
        """Reads one label a line (UTF-8); blank lines and lines starting with # are skipped.

        Raises:
          UserError: no such file, not UTF-8 text, no labels, or a label given twice.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise UserError(f"cannot read the label file {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"the label file {path} is not UTF-8 text") from error
        names, first_line = [], {}
        for number, line in enumerate(text.splitlines(), start=1):
            name = line.strip()
            if not name or name.startswith("#"):
                continue
            if name in first_line:
                raise UserError(
                    f"{path}: {name!r} stands on line {first_line[name]} and on line {number}"
                )
            first_line[name] = number
            names.append(name)
        if not names:
            raise UserError(f"the label file {path} holds no labels (one a line is expected)")
        return cls(names=tuple(names), name=path.stem)

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values; `from_json` reads it back to an equal space."""
        taxonomy = dataclasses.asdict(self.taxonomy) if self.taxonomy is not None else None
        return {
            "name": self.name,
            "names": list(self.names),
            "prompt_names": list(self.prompt_names),
            "ids": list(self.ids),
            "subsets": {k: list(v) for k, v in self.subsets.items()},
            "taxonomy": taxonomy
            and {k: list(v) if isinstance(v, tuple) else v for k, v in taxonomy.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LabelSpace:
        """The inverse of `to_json`."""
        unknown = set(value) - {f.name for f in dataclasses.fields(cls)}
        if unknown or "names" not in value:
            what = f"unknown keys {sorted(unknown)}" if unknown else "no key 'names'"
            raise UserError(f"not a label space: {what}")
        value = dict(value)
        taxonomy = value.pop("taxonomy", None)
        try:
            return cls(**value, taxonomy=Taxonomy(**taxonomy) if taxonomy else None)
        except TypeError as error:
            raise UserError(f"not a label space: {error}") from error

    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything but `name`: equal for spaces that mean the same."""
        value = self.to_json()
        del value["name"]
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
