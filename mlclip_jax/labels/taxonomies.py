"""Taxonomies other than a space's own: clusters, a user's file, and those of HSPNet's ablations.

A taxonomy is data: a method takes whichever the label space brings, and `regroup` puts another in
its place, as `config.data.taxonomy` asks.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace, Taxonomy
from mlclip_jax.spec import parse_call, unknown

NameFeatures = Callable[[Sequence[str]], np.ndarray]


def clusters(features: np.ndarray, groups: int, *, seed: int = 0) -> Taxonomy:
    """Groups labels by k-means over the directions of their features (HSPNet-cluster).

    Args:
      features: of the labels, such as text features [c d]; rows are scaled to unit length.
      groups: how many groups g, 1 to c.
      seed: of the starting centres, the best of ten draws.

    Returns:
      Groups "cluster 1", "cluster 2", ... in the order of their first labels, not `named`.

    Raises:
      UserError: `groups` is not from 1 to c, or the features fall into fewer clusters.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    count = len(features)
    if not 1 <= groups <= count:
        raise UserError(f"cannot make {groups} clusters of {count} labels: ask for 1 to {count}")
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows: told below
        found = KMeans(groups, n_init=10, random_state=seed).fit_predict(unit).tolist()
    number = {old: new for new, old in enumerate(dict.fromkeys(found))}
    if len(number) < groups:
        raise UserError(
            f"the features of the {count} labels fall into {len(number)} clusters, not {groups}: "
            "ask for fewer"
        )
    names = tuple(f"cluster {g + 1}" for g in range(groups))
    return Taxonomy(names, tuple(number[g] for g in found), named=False)


def shuffled(taxonomy: Taxonomy, *, seed: int = 0) -> Taxonomy:
    """The same groups and sizes, labels dealt to them at random (HSPNet's Table 3, "w/o LGP").

    The paper assigns labels at random; that group sizes stay is ours: no group is left empty.
    """
    group_of = np.random.default_rng(seed).permutation(taxonomy.group_of)
    return dataclasses.replace(taxonomy, group_of=tuple(group_of.tolist()))


def renamed(taxonomy: Taxonomy) -> Taxonomy:
    """The same groups, called "group1" to "group<g>" (HSPNet's Table 3, "w/o GRP").

    They count as named: prompts say these names, that is the point of the ablation.
    """
    names = tuple(f"group{g + 1}" for g in range(len(taxonomy)))
    return Taxonomy(names, taxonomy.group_of)


def from_yaml(path: str | Path, space: LabelSpace) -> Taxonomy:
    """The taxonomy in a YAML file: a mapping of each group to the list of its labels.

    Groups keep the order of the file; labels are given by name or by prompt name.

    Raises:
      UserError: the file cannot be read or has another form, names an unknown label, or does not
        put every label of `space` in exactly one group.
    """
    import yaml

    try:
        groups = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read the taxonomy {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(groups, dict) or not groups:
        raise UserError(f"{path} must be a mapping: each group and the list of its labels")
    index = _index_by_name(space)
    found: dict[int, str] = {}
    for group, labels in groups.items():
        for text in (group, *(labels if isinstance(labels, list) else ())):
            if not isinstance(text, str):
                raise UserError(f"{path}: group {group!r}: {text!r} is not text; put it in quotes")
        if not isinstance(labels, list) or not labels:
            raise UserError(f"{path}: group {group!r} must hold a list of labels, at least one")
        for label in labels:
            if label not in index:
                try:
                    space.index(label)
                except UserError as error:
                    raise UserError(f"{path}: group {group!r}: {error}") from None
            if index[label] in found:
                other = found[index[label]]
                where = f"group {group!r} twice" if other == group else f"{other!r} and {group!r}"
                raise UserError(f"{path}: label {label!r} stands in {where}; one group is needed")
            found[index[label]] = group
    missing = [name for i, name in enumerate(space.names) if i not in found]
    if missing:
        first = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise UserError(f"{path}: {len(missing)} of {len(space)} labels in no group: {first}")
    number = {group: g for g, group in enumerate(groups)}
    return Taxonomy(tuple(groups), tuple(number[found[i]] for i in range(len(space))))


def _index_by_name(space: LabelSpace) -> dict[str, int]:
    """Indices by prompt name, where only one label has it, and by name, which goes first."""
    times = Counter(space.prompt_names)
    prompts = {name: i for i, name in enumerate(space.prompt_names) if times[name] == 1}
    return prompts | {name: i for i, name in enumerate(space.names)}


def regroup(space: LabelSpace, spec: str, name_features: NameFeatures | None = None) -> LabelSpace:
    """`space` with the taxonomy that a text asks for.

    Args:
      space: labels, with their own taxonomy or without.
      spec: "own" (as it is), "none", "cluster", "cluster(12, seed=1)", "random", "random(seed=1)",
        "renamed", or a file ending in .yaml or .yml (`from_yaml`). "cluster" makes as many groups
        as the own taxonomy has, or the rounded square root of the number of labels.
      name_features: features of names [n d], for clusters of the prompt names.

    Raises:
      UserError: a text that cannot be read, or groups that cannot be made.
      ValueError: clusters without `name_features`.
    """
    if spec.endswith((".yaml", ".yml")):
        return dataclasses.replace(space, taxonomy=from_yaml(spec, space))

    def own() -> Taxonomy:
        if space.taxonomy is None:
            raise UserError(f"taxonomy {spec!r}: the labels of {space.name!r} have no groups")
        return space.taxonomy

    def cluster(groups: int | None = None, *, seed: int = 0) -> Taxonomy:
        if name_features is None:
            raise ValueError(f"taxonomy {spec!r} needs name_features")
        if groups is None:
            groups = len(space.taxonomy) if space.taxonomy else round(len(space) ** 0.5)
        return clusters(name_features(space.prompt_names), groups, seed=seed)

    makers: dict[str, Callable[..., Taxonomy | None]] = {
        "own": lambda: space.taxonomy,
        "none": lambda: None,
        "cluster": cluster,
        "random": lambda *, seed=0: shuffled(own(), seed=seed),
        "renamed": lambda: renamed(own()),
    }
    name, arguments, keywords = parse_call(spec, what="taxonomy")
    if name not in makers:
        raise unknown("taxonomy", name, [*makers, "<file>.yaml"])
    signature = inspect.signature(makers[name])
    try:
        given = signature.bind(*arguments, **keywords).arguments.values()
        if not all(isinstance(value, int) and value >= 0 for value in given):
            raise TypeError("all arguments are whole numbers")
    except TypeError as error:
        takes = ", ".join(f"{p}=<whole number>" for p in signature.parameters) or "no arguments"
        raise UserError(f"taxonomy {name!r} takes {takes}, not {spec!r}") from error
    return dataclasses.replace(space, taxonomy=makers[name](*arguments, **keywords))
