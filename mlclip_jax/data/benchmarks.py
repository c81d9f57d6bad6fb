"""The published benchmarks by name: labels, sizes of the splits, and what training may see.

    "coco_spml_splc"                   single positive labels, the fixed lists of SPLC
    "coco_spml_largeloss"              the same, drawn and split as Cole et al. and LargeLoss do
    "coco_partial(0.3)"                each label observed with probability 0.3
    "coco_spml_splc_few_shot(0.1)"     any of them with a tenth of the training images

Sizes count what the authors' files and code give, after images without labels are left out and
the validation part is split off.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from mlclip_jax.data import protocols
from mlclip_jax.errors import UserError
from mlclip_jax.labels import catalog
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.spec import unknown


@dataclass(frozen=True)
class Benchmark:
    """One benchmark in one setting.

    Attributes:
      name: as configurations write it.
      space: makes its label space.
      num_train, num_validation, num_test: images of each split; None where there is none.
      train_view: what the training labels show, as `data.protocols` reads it.
      source: where splits and labels come from.
      protocol: of `evaluation.protocol.PROTOCOLS`, by which it is reported.
      names_published: whether `space` has class names; if not, training needs a file of them.
    """

    name: str
    space: Callable[[], LabelSpace]
    num_train: int
    num_validation: int | None
    num_test: int
    train_view: str
    source: str
    protocol: str = "multi_label"
    names_published: bool = True


_SPLC = "the single-positive lists of SPLC (Zhang et al., 2021) and HSPNet; no validation part"
_LARGELOSS = "Cole et al. (2021) and LargeLoss (Kim et al., 2022): a fifth held out, seed 1200"
_PARTIAL = "SARB (Pu et al., 2022) as HSPNet runs it"
_SINGLE = "single_positive"

_BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("coco_spml_splc", catalog.coco, 82_081, None, 40_137, _SINGLE, _SPLC),
        Benchmark("voc_spml_splc", catalog.voc, 5_717, None, 5_823, _SINGLE, _SPLC),
        Benchmark("nus_spml_splc", catalog.nus, 119_103, None, 50_720, _SINGLE, _SPLC),
        Benchmark("cub_spml_splc", catalog.cub, 5_994, None, 5_794, _SINGLE, _SPLC),
        Benchmark("coco_spml_largeloss", catalog.coco, 65_665, 16_416, 40_137, _SINGLE, _LARGELOSS),
        Benchmark("voc_spml_largeloss", catalog.voc, 4_574, 1_143, 5_823, _SINGLE, _LARGELOSS),
        Benchmark("nus_spml_largeloss", catalog.nus, 120_000, 30_000, 60_260, _SINGLE, _LARGELOSS),
        Benchmark("cub_spml_largeloss", catalog.cub, 4_795, 1_199, 5_794, _SINGLE, _LARGELOSS),
        # SARB's own code keeps 702 training and 367 test images without any label.
        Benchmark("coco_partial", catalog.coco, 82_081, None, 40_137, "partial", _PARTIAL),
        Benchmark(
            "vg200_partial",
            catalog.vg200,
            82_904,
            None,
            10_000,
            "partial",
            f"{_PARTIAL}; lists of SSGRL (Chen et al., 2019)",
            names_published=False,
        ),
    )
}
NAMES = tuple(_BENCHMARKS)


def resolve(name: str) -> Benchmark:
    """The benchmark that a text names.

    Args:
      name: one of `NAMES`; "..._partial" with the share of labels that is observed, "(0.3)"; and
        at the end, where wanted, "_few_shot(0.1)" with the share of the training images.

    Raises:
      UserError: unknown name, or a share that is missing, superfluous or not a probability.
    """
    base, few, share = name.partition("_few_shot")
    word, bracket, inside = base.partition("(")
    if word not in _BENCHMARKS:
        raise unknown("benchmark", word, NAMES)
    benchmark = _BENCHMARKS[word]
    if bracket and benchmark.train_view != "partial":
        raise UserError(f"benchmark {name!r}: {word} takes nothing in brackets")
    views = [benchmark.train_view + bracket + inside] + [f"few_shot{share}"] * bool(few)
    parsed = protocols.parse("+".join(views))
    if len(parsed) != len(views):
        raise UserError(f"benchmark {name!r}: only '_few_shot(share)' may be added to a name")
    num_train = benchmark.num_train
    if few:
        kept = parsed[-1].amount
        if isinstance(kept, int):
            raise UserError(f"benchmark {name!r}: few_shot takes a fraction of the images")
        num_train = max(1, round(kept * num_train))
    return dataclasses.replace(
        benchmark, name=name, num_train=num_train, train_view="+".join(views)
    )
