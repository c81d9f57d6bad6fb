"""Which figures a benchmark reports, and by which conventions.

A `Protocol` turns scores and targets of a label space into a flat dictionary of `Figure`s: a value
and the sentence that says how it came about. `PROTOCOLS` holds those of the benchmarks here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np

from mlclip_jax.errors import UserError
from mlclip_jax.evaluation import ranking
from mlclip_jax.evaluation.decisions import DecisionCounts, count_decisions
from mlclip_jax.evaluation.views import Task, View, class_sets
from mlclip_jax.labels.space import LabelSpace

Scores = Literal["logits", "sigmoid", "softmax_over_classes"]
_UNOBSERVED = {
    True: "unobserved labels count as negative",
    False: "unobserved labels are left out",
    None: "unobserved labels are left out of classes with explicit negatives, else negative",
}


class Figure(NamedTuple):
    """A metric as a fraction (NaN where nothing could be averaged) and its convention in words."""

    value: float
    convention: str


@dataclass(frozen=True)
class AveragePrecision:
    """Mean average precision "mAP", with `weighted` also "WmAP".

    Attributes:
        assume_negative, ties: see `metrics.average_precision`.
        empty: classes without positives are skipped ("skip"), count as 0 ("zero"), or count as 0
            if they have a label other than 0 in the images scored and are skipped otherwise
            ("zero_if_labelled", the rule of BiAM and MKT for GZSL on Open Images).
        weighted: also the mean weighted by positives.
        by_subset: also "mAP/<name>" for each subset and group of the label space, where the task
            has all classes.
        by_frequency: also "mAP/head", "mAP/medium", "mAP/tail", see `metrics.frequency_groups`.
        name: stands for "mAP" in the names, so that a protocol can hold two conventions.
    """

    assume_negative: bool | None = None
    ties: Literal["stable", "grouped"] = "stable"
    empty: Literal["skip", "zero", "zero_if_labelled"] = "skip"
    weighted: bool = False
    by_subset: bool = False
    by_frequency: Literal["released", "paper"] | None = None
    name: str = "mAP"


@dataclass(frozen=True)
class AtThreshold:
    """CP, CR, CF1, CF1_harmonic, OP, OR and OF1, as "<name>/threshold=<t>".

    Attributes:
        threshold: of the protocol's scores, so between 0 and 1 unless they are logits; chosen are
            scores strictly above it.
        assume_negative: what 0 counts as.
    """

    threshold: float
    assume_negative: bool = True


@dataclass(frozen=True)
class AtTopK:
    """The same at the k highest classes of every image, as "<name>/top-<k>"."""

    k: int
    assume_negative: bool = True


@dataclass(frozen=True)
class F1AtK:
    """Micro precision, recall and F1 at K: "P@<k>", "R@<k>", "F1@<k>" (LESA, BiAM, MKT).

    P = hits / (K n) over all n images of the task, R = hits / positives; unobserved labels count
    as negative.

    Attributes:
        k: classes chosen for each image.
        threshold: only scores of the protocol above it are chosen (then P = hits / chosen); named
            "F1@<k>/threshold=<t>". One reading of ADDS, whose F1@3 and F1@5 agree.
    """

    k: int
    threshold: float | None = None


@dataclass(frozen=True)
class Protocol:
    """The figures of a benchmark.

    Attributes:
        name: of the protocol.
        metrics: what is measured.
        tasks: on what; every metric is measured for every task.
        scores: what the logits are turned into. "logits" and "sigmoid" rank alike (ranking is by
            logits, so that saturated probabilities tie nothing) and differ in the meaning of
            thresholds. "softmax_over_classes" (LMPT) takes the softmax of each image over the
            classes of the task, which ranks images otherwise; it is computed as log-softmax.

    Raises:
        ValueError: two metrics would have the same name, or a threshold is no probability.
    """

    name: str
    metrics: tuple[AveragePrecision | AtThreshold | AtTopK | F1AtK, ...]
    tasks: tuple[Task, ...] = (Task(),)
    scores: Scores = "logits"

    def __post_init__(self) -> None:
        for what, keys in {
            "metrics": [_key(metric) for metric in self.metrics],
            "tasks": [task.name for task in self.tasks],
        }.items():
            if len(set(keys)) != len(keys):
                raise ValueError(f"protocol {self.name!r}: two {what} share a name: {keys}")
        for metric in self.metrics:
            self._cut(getattr(metric, "threshold", None))

    def measure(
        self,
        scores: np.ndarray,
        targets: np.ndarray,
        space: LabelSpace,
        *,
        train_counts: np.ndarray | None = None,
        task_scores: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, Figure]:
        """The figures by name, without those of the k highest classes for tasks of fewer than k.

        Args:
            scores: logits float32 `[n c]`, for example of `Predictions.arrays`.
            targets: `[n c]` in {+1, 0, -1}.
            space: the c labels; must have the subsets of the tasks.
            train_counts: `[c]`, positives of each class in the training set, for head, medium and
                tail.
            task_scores: `[n k]` by the name of k classes that were scored by themselves, which
                tasks of these classes are measured by.

        Raises:
            UserError: the space lacks a subset, or training counts are needed and missing.
            ValueError: shapes disagree.
        """
        ranking.check_shapes(scores, targets)
        if targets.shape[1] != len(space):
            raise ValueError(f"{targets.shape[1]} classes were scored, {space.name!r} has others")
        figures: dict[str, Figure] = {}
        for task in self.tasks:
            own = (task_scores or {}).get(task.classes)
            view = View(scores, targets, space, task, self.scores == "softmax_over_classes", own)
            prefix = f"{task.name}/" if task.name else ""
            for metric in self.metrics:
                if isinstance(metric, AveragePrecision):
                    found = self._average_precision(metric, view, space, train_counts)
                elif (getattr(metric, "k", None) or 0) > len(view.classes):
                    continue
                else:
                    found = self._decisions(metric, view)
                figures |= {
                    prefix + name: Figure(value, f"{convention}; {view.words}")
                    for name, (value, convention) in found.items()
                }
        return figures

    def _average_precision(
        self,
        metric: AveragePrecision,
        view: View,
        space: LabelSpace,
        train_counts: np.ndarray | None,
    ) -> dict[str, Figure]:
        per_class = np.full(len(view.classes), np.nan)
        positives, labelled = np.zeros(len(per_class), np.int64), np.zeros(len(per_class), bool)
        for columns, scores, targets in view.column_blocks():
            per_class[columns] = ranking.average_precision(
                scores, targets, assume_negative=metric.assume_negative, ties=metric.ties
            )
            positives[columns] = (targets > 0).sum(axis=0)
            labelled[columns] = targets.any(axis=0)
        filled = per_class.copy()
        if metric.empty != "skip":
            gets_zero = labelled if metric.empty == "zero_if_labelled" else True
            filled[np.isnan(per_class) & gets_zero] = 0.0

        # Ranking by logits is ranking by their sigmoid.
        ranked = "logits" if self.scores == "sigmoid" else self._scores_in_words()
        words = "; ".join(
            [
                f"average precision from {ranked}",
                "equal scores in the order of the images"
                if metric.ties == "stable"
                else "equal scores share the precision at their end (scikit-learn)",
                _UNOBSERVED[metric.assume_negative],
            ]
        )
        empty = {
            "skip": "classes without positives are skipped",
            "zero": "classes without positives count as 0",
            "zero_if_labelled": "classes without positives count as 0, without labels are skipped",
        }[metric.empty]
        mean = f"mean over classes; {empty}; {words}"
        name = metric.name
        figures = {name: Figure(ranking.mean_average_precision(filled), mean)}
        if metric.weighted:
            value = ranking.weighted_mean_average_precision(per_class, positives)
            figures[f"W{name}"] = Figure(value, f"mean weighted by positives; {words}")
        groups = {}
        if metric.by_subset and view.all_classes:
            rule = "over the classes of this group; "
            groups |= {key: (np.array(part), rule) for key, part in class_sets(space).items()}
        if metric.by_frequency is not None:
            if train_counts is None:
                raise UserError(
                    f"protocol {self.name!r} reports head, medium and tail classes: it needs the "
                    "number of training positives of every class (train_counts)"
                )
            edges = {
                "released": "head >= 100, medium 20 to 99, tail < 20 training positives",
                "paper": "head > 100, medium 20 to 100, tail < 20 training positives",
            }[metric.by_frequency]
            counts = np.asarray(train_counts)[view.classes]
            parts = ranking.frequency_groups(counts, rule=metric.by_frequency)
            groups |= {key: (part, f"{edges}; ") for key, part in parts.items()}
        for key, (part, rule) in groups.items():
            value = ranking.mean_average_precision(filled[part])
            figures[f"{name}/{key}"] = Figure(value, f"{rule}{mean}")
        return figures

    def _decisions(self, metric: AtThreshold | AtTopK | F1AtK, view: View) -> dict[str, Figure]:
        k, threshold = getattr(metric, "k", None), getattr(metric, "threshold", None)
        assume_negative = getattr(metric, "assume_negative", True)
        nothing = np.zeros(len(view.classes), np.int64)
        counts = DecisionCounts(nothing, nothing, nothing)
        for scores, targets in view.row_blocks():
            counts += count_decisions(
                scores,
                targets,
                threshold=self._cut(threshold),
                k=k,
                assume_negative=assume_negative,
            )
        rules = [] if k is None else [f"the {k} highest classes of an image"]
        if threshold is not None:
            rules.append(f"{self._scores_in_words()} > {threshold:g}")
        words = f"chosen: {' with '.join(rules)}; {_UNOBSERVED[assume_negative]}"
        found = counts.figures()
        if isinstance(metric, F1AtK):
            micro = {"P": "OP", "R": "OR", "F1": "OF1"}
            return {
                name + _key(metric): Figure(found[key], f"micro over all images; {words}")
                for name, key in micro.items()
            }
        kinds = {
            "CF1": "mean over classes of F1",
            "CF1_harmonic": "harmonic mean of CP and CR",
        } | dict.fromkeys(("CP", "CR"), "mean over classes, 0 for nothing chosen or present")
        return {
            f"{name}/{_key(metric)}": Figure(
                value, f"{kinds.get(name, 'over all decisions together')}; {words}"
            )
            for name, value in found.items()
        }

    def _cut(self, threshold: float | None) -> float | None:
        """The threshold on the scores that are compared: logits or log-softmax."""
        if threshold is None or self.scores == "logits":
            return threshold
        if not 0 < threshold < 1:
            raise ValueError(
                f"protocol {self.name!r}: a threshold of {self.scores} lies between 0 and 1, "
                f"not at {threshold}"
            )
        log = math.log(threshold)
        return log - math.log1p(-threshold) if self.scores == "sigmoid" else log

    def _scores_in_words(self) -> str:
        return {
            "logits": "logits",
            "sigmoid": "the sigmoid of logits",
            "softmax_over_classes": "the softmax of each image over the classes",
        }[self.scores]


def _key(metric: AveragePrecision | AtThreshold | AtTopK | F1AtK) -> str:
    """What tells a metric from the others of a protocol, in the names of its figures."""
    match metric:
        case AveragePrecision():
            return metric.name
        case AtThreshold():
            return f"threshold={metric.threshold:g}"
        case AtTopK():
            return f"top-{metric.k}"
        case F1AtK(threshold=None):
            return f"@{metric.k}"
        case F1AtK():
            return f"@{metric.k}/threshold={metric.threshold:g}"


_ASL = AveragePrecision(assume_negative=True, empty="zero")
_KNOWN = AveragePrecision(assume_negative=False, empty="zero")

PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            # Any data: complete labels or not.
            Protocol("multi_label", (AveragePrecision(by_subset=True),)),
            # Scenes: complete labels of 22 classes in three groups.
            Protocol("scenes", (AveragePrecision(by_subset=True), AtTopK(3))),
            # HSPNet, SPLC, ML-Decoder, DualCoOp on COCO, VOC, NUS, CUB.
            Protocol("asl", (_ASL, AtThreshold(0.5), AtTopK(3)), scores="sigmoid"),
            # ADDS, from single labels to several: with both readings of its F1.
            Protocol(
                "single_to_multi",
                (_ASL, F1AtK(3), F1AtK(5), F1AtK(3, 0.5), F1AtK(5, 0.5), AtThreshold(0.5)),
                scores="sigmoid",
            ),
            # MKT: 81 unseen and 925 seen + 81 unseen labels of NUS-WIDE, every image.
            Protocol(
                "nus_zsl",
                (_KNOWN, F1AtK(3), F1AtK(5)),
                tasks=(Task("ZSL", "unseen"), Task("GZSL")),
            ),
            # ML-Decoder and ADDS: the same labels, and the images with one of those in question.
            Protocol(
                "nus_zsl_mldecoder",
                (_ASL, F1AtK(3), F1AtK(5)),
                tasks=(
                    Task("ZSL", "unseen", images="with_positive"),
                    Task("GZSL", images="with_positive"),
                ),
            ),
            # MKT on Open Images: 400 unseen, and all 7,586 labels.
            Protocol(
                "open_images_zsl",
                (
                    AveragePrecision(
                        assume_negative=False, empty="zero_if_labelled", weighted=True
                    ),
                    F1AtK(10),
                    F1AtK(20),
                ),
                tasks=(
                    Task("ZSL", "unseen", images="with_positive"),
                    Task("GZSL", images="with_positive"),
                ),
            ),
            *(
                # LMPT on COCO-LT and VOC-LT: its code's and its text's classes.
                Protocol(
                    name,
                    (
                        AveragePrecision(
                            assume_negative=True, ties="grouped", empty="zero", by_frequency=rule
                        ),
                        AtThreshold(0.3),
                    ),
                    scores="softmax_over_classes",
                )
                for name, rule in (("long_tail", "released"), ("long_tail_paper", "paper"))
            ),
        )
    }
)
