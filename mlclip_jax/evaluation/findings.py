"""Everything a report says, gathered once; `report.json` is its plain form."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from mlclip_jax.errors import UserError
from mlclip_jax.evaluation.evaluator import EvalResult
from mlclip_jax.evaluation.label_features import RETRIEVED, Compactness, compactness
from mlclip_jax.evaluation.metrics import (
    best_f1_threshold,
    best_f1_thresholds,
    count_positives,
    frequency_groups,
)
from mlclip_jax.evaluation.protocol import Figure, Protocol
from mlclip_jax.evaluation.ranking import mean_average_precision
from mlclip_jax.evaluation.streams import Streams
from mlclip_jax.evaluation.views import class_sets
from mlclip_jax.labels import catalog
from mlclip_jax.labels.space import LabelSpace

AP_CONVENTION = (
    "average precision from logits; equal scores in the order of the images; unobserved labels are "
    "left out of classes with explicit negatives, else negative"
)
COMPACTNESS_CONVENTION = (
    "mean cosine of the label features of a group with each other (within; none for a single "
    "label) and with those of all other groups (between); silhouette: mean over all labels, with "
    "the distance 1 - cosine, 0 for a single label; retrieval: share of the three labels "
    "nearest to each that are of its group"
)


class Entry(NamedTuple):
    """One column of a report: scores, and the weights that gave them.

    Attributes:
        result: of the split reported.
        method: name of the method.
        weights: "raw", "ema", or None for a method that trained nothing.
        checkpoint: "last", "best", "last and best" (one step is both), or None.
        step: of the checkpoint.
        sigmoid: whether the sigmoid of a logit says if its label is there.
    """

    result: EvalResult
    method: str
    weights: str | None = None
    checkpoint: Literal["last", "best", "last and best"] | None = None
    step: int | None = None
    sigmoid: bool = False


@dataclass(frozen=True)
class Findings:
    """What a report shows.

    Attributes:
        title, split, notes: heading, name of the split, paragraphs below the heading.
        space: the c labels.
        entries: columns by title: the baseline first (where there is one), what matters last.
        protocol: which figures.
        figures: by title and name of the figure, with their conventions.
        paper: the paper's numbers in per cent by name of the figure.
        positives: int64 `[c]`, positives in the split.
        train_counts: int64 `[c]`, positives in the training set as it was seen; None: unknown.
        thresholds: `[c]`, of the highest F1 of each class; NaN: no positive to choose it by.
        threshold: of the highest overall F1; None: no class has a positive.
        chosen_on: the split on which the thresholds were chosen.
        history: rows of the run's metrics.jsonl.
        image: uint8 `[h w 3]` of an index of the results.
        vectors: `[n d]` by title, label features of no method (word vectors) of the labels that
            have groups, compared with those.
        streams: of which the logits of the last column are put together; None: of one piece.
    """

    title: str
    split: str
    notes: Sequence[str]
    space: LabelSpace
    entries: Mapping[str, Entry]
    protocol: Protocol
    figures: Mapping[str, Mapping[str, Figure]]
    paper: Mapping[str, float]
    positives: np.ndarray
    train_counts: np.ndarray | None
    thresholds: np.ndarray
    threshold: float | None
    chosen_on: str
    history: Sequence[Mapping[str, Any]]
    image: Callable[[int], np.ndarray] | None
    vectors: Mapping[str, np.ndarray]
    streams: Streams | None

    @property
    def main(self) -> Entry:
        """The column that matters."""
        return self.entries[list(self.entries)[-1]]

    @property
    def shown(self) -> dict[str, Entry]:
        """The columns that curves compare: the first and the one that matters."""
        titles = list(self.entries)
        return {title: self.entries[title] for title in dict.fromkeys((titles[0], titles[-1]))}

    def class_groups(self) -> dict[str, np.ndarray]:
        """Classes by subset, group, and number of training positives; empty ones left out."""
        groups = {name: np.array(part) for name, part in class_sets(self.space).items()}
        if self.train_counts is not None:
            words = {"head": "head (≥ 100)", "medium": "medium (20 to 99)", "tail": "tail (< 20)"}
            parts = frequency_groups(self.train_counts)
            groups |= {words[name]: part for name, part in parts.items()}
        return {name: part for name, part in groups.items() if len(part)}

    def group_means(self, groups: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """mAP of each group, by title `[g]`."""
        return {
            title: np.array(
                [mean_average_precision(e.result.per_class_ap[p]) for p in groups.values()]
            )
            for title, e in self.entries.items()
        }

    def compactness(self) -> dict[str, Compactness]:
        """How the label features lie by group, by title.

        Empty where no two groups are known; without methods that have one vector for each label.
        """
        features = self.label_features
        return {title: compactness(of, self.grouped.taxonomy) for title, of in features.items()}

    @functools.cached_property
    def grouped(self) -> LabelSpace | None:
        """The n labels that have groups, see `catalog.grouped`."""
        return catalog.grouped(self.space)

    @property
    def label_features(self) -> dict[str, np.ndarray]:
        """`[n d]` by title: of methods that have one vector for each label, then of none."""
        if self.grouped is None:
            return {}
        rows = list(self.space.indices(self.grouped.names))
        own = {title: entry.result.label_features for title, entry in self.entries.items()}
        found = {title: of[rows] for title, of in own.items() if of is not None}
        return found | dict(self.vectors)


def gather(
    space: LabelSpace,
    entries: Mapping[str, Entry],
    protocol: Protocol,
    *,
    title: str,
    split: str,
    notes: Sequence[str] = (),
    paper: Mapping[str, float] | None = None,
    validation: EvalResult | None = None,
    train_counts: np.ndarray | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    image: Callable[[int], np.ndarray] | None = None,
    vectors: Mapping[str, np.ndarray] = MappingProxyType({}),
    streams: Streams | None = None,
) -> Findings:
    """Measure and gather; see `Findings` for the arguments.

    Args:
        validation: evaluation of the last entry's weights on other images, where thresholds are
            chosen; None chooses them on the split itself, and the report says so.

    Raises:
        UserError: the paper's numbers name a figure that the protocol has not.
    """
    main = list(entries.values())[-1].result
    figures = {
        name: protocol.measure(
            entry.result.scores,
            entry.result.targets,
            space,
            train_counts=train_counts,
            task_scores=entry.result.task_scores,
        )
        for name, entry in entries.items()
    }
    known = next(iter(figures.values()))
    for name in paper or {}:
        if name not in known:
            raise UserError(
                f"config key 'paper' names {name!r}, which protocol {protocol.name!r} does not "
                f"report; it reports {', '.join(known)}"
            )
    by = main if validation is None else validation
    return Findings(
        title=title,
        split=split,
        notes=notes,
        space=space,
        entries=entries,
        protocol=protocol,
        figures=figures,
        paper=dict(paper or {}),
        positives=count_positives(main.targets),
        train_counts=train_counts,
        thresholds=best_f1_thresholds(by.scores, by.targets),
        threshold=best_f1_threshold(by.scores, by.targets) if (by.targets > 0).any() else None,
        chosen_on=split if validation is None else "validation",
        history=history,
        image=image,
        vectors=vectors,
        streams=streams,
    )


def as_json(found: Findings) -> dict[str, Any]:
    """The numbers of a report: fractions in 0 to 1 (the paper's in per cent), null for none."""
    names = found.space.names
    results = {}
    for title, entry in found.entries.items():
        results[title] = {
            "method": entry.method,
            "weights": entry.weights,
            "checkpoint": entry.checkpoint,
            "step": entry.step,
            "metrics": {name: _number(f.value) for name, f in found.figures[title].items()},
            "per_class_ap": [_number(value) for value in entry.result.per_class_ap],
        }
    compact = found.compactness()
    vectors = {title: {} for title in found.vectors if title in compact}
    for title, one in compact.items():
        (results | vectors)[title]["group_compactness"] = {
            "silhouette": _number(one.silhouette),
            f"top-{RETRIEVED} retrieval": _number(one.retrieval),
            "groups": {
                name: {
                    "within": _number(one.within[g]),
                    "between": _number(one.between[g]),
                    "difference": _number(one.difference[g]),
                }
                for g, name in enumerate(found.grouped.taxonomy.group_names)
            },
        }
    groups = found.class_groups()
    means = found.group_means(groups)
    return {
        "title": found.title,
        "split": found.split,
        "num_images": len(found.main.result.index),
        "protocol": found.protocol.name,
        "conventions": {
            name: figure.convention for name, figure in next(iter(found.figures.values())).items()
        }
        | {"per_class_ap": AP_CONVENTION}
        | ({"group_compactness": COMPACTNESS_CONVENTION} if compact else {}),
        "paper": found.paper,
        "results": results,
        "label_vectors": vectors,
        "groups": {
            name: {
                "num_classes": len(part),
                "mAP": {title: _number(values[i]) for title, values in means.items()},
            }
            for i, (name, part) in enumerate(groups.items())
        },
        "threshold": {"overall": found.threshold, "chosen_on": found.chosen_on},
        "classes": [
            {
                "name": name,
                "positives": int(found.positives[i]),
                "train_positives": (
                    None if found.train_counts is None else int(found.train_counts[i])
                ),
                "threshold": _number(found.thresholds[i]),
            }
            for i, name in enumerate(names)
        ],
    }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
