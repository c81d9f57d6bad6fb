"""Score a trained method on a split and write a report.

    python -m mlclip_jax.evaluate --workdir=runs/mine --split=test

Prints the table of metrics beside zero-shot CLIP on the same images, and writes `report.json` and
the page `report.html`, which needs no other file, to `<workdir>/report/<split>`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlclip_jax.errors import UserError, exit_code, make_folder

if TYPE_CHECKING:
    from mlclip_jax.data.registry import DataSplits
    from mlclip_jax.evaluation.evaluator import EvalResult
    from mlclip_jax.evaluation.protocol import Protocol
    from mlclip_jax.labels.space import LabelSpace
    from mlclip_jax.methods.base import Method
    from mlclip_jax.training.build import Trained

_MOST_ROWS = 40  # classes whose table still fits a terminal


def _arguments(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mlclip evaluate",
        description="Score a trained method on a split, beside zero-shot CLIP; print the table "
        "and write report.json and report.html.",
    )
    parser.add_argument("--workdir", type=Path, required=True, help="folder of a training run")
    parser.add_argument(
        "--checkpoint", choices=("latest", "best", "both"), default="both",
        help="latest, best by the selection metric of the weights scored, or both (default)",
    )  # fmt: skip
    parser.add_argument("--split", default="test", help="default: test")
    parser.add_argument(
        "--weights", choices=("raw", "ema", "both"), default="both",
        help="both (default) leaves out averaged weights where the run kept none",
    )  # fmt: skip
    parser.add_argument(
        "--baseline", action=argparse.BooleanOptionalAction, default=True,
        help="score zero-shot CLIP on the same images too",
    )  # fmt: skip
    parser.add_argument("--protocol", help="which figures (default: those of the dataset)")
    parser.add_argument(
        "--word_vectors", type=Path, metavar="FILE",
        help="file of word vectors (GloVe's text form) to compare label features with, where the "
        "labels have groups (on nus_zsl: of the 81 unseen labels)",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--output", type=Path, help="folder (default: WORKDIR/report/SPLIT)")
    return parser.parse_args(args)


def run(options: argparse.Namespace) -> int:
    """Evaluate, print and write; the exit code."""
    from mlclip_jax.labels import catalog
    from mlclip_jax.labels.word_vectors import read_word_vectors
    from mlclip_jax.training.loop import use_compilation_cache
    from mlclip_jax.training.scoring import Scorer

    trained = _load(options)
    one = list(trained.values())[-1]
    if one.config.compilation_cache:
        use_compilation_cache()
    selecting = ("validation",) if "validation" in one.config.eval.splits else ()
    scorer = Scorer(one, (options.split, *selecting), options.batch_size)
    protocol = _protocol(options.protocol or scorer.data.protocol)
    vectors = {}
    if options.word_vectors is not None:
        grouped = catalog.grouped(scorer.data.space)
        if grouped is None:
            raise UserError(
                "--word_vectors compares label features by groups, and the labels of "
                f"{scorer.data.space.name!r} have none: leave it out"
            )
        vectors = {"word vectors": read_word_vectors(options.word_vectors, grouped.prompt_names)}
    folder = options.output or options.workdir / "report" / options.split
    make_folder(folder)  # now rather than after minutes of scoring

    # ---- Scores: the baseline, then all trained weights --------------------------------------
    methods = {title: found.method for title, found in trained.items()}
    results: dict[str, EvalResult] = {}
    if options.baseline and _method_name(one) != "zero_shot":
        zero_shot = {"zero-shot": _zero_shot(one, scorer.data.space)}
        results |= scorer.score(zero_shot, options.split)
    subsets = sorted({task.classes for task in protocol.tasks} - {"all"})
    results |= scorer.score(methods, options.split, subsets=subsets)
    validation = None
    if "validation" in scorer.data.evals and options.split != "validation":
        title = list(methods)[-1]
        validation = scorer.score({title: methods[title]}, "validation")[title]

    extra = {"vectors": vectors, "streams": scorer.streams(one.method, options.split)}
    _write(options, folder, scorer.data, protocol, trained, results, validation, extra)
    return 0


def _protocol(name: str) -> Protocol:
    from mlclip_jax.evaluation.protocol import PROTOCOLS
    from mlclip_jax.spec import unknown

    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


def _method_name(trained: Trained) -> str:
    return trained.config.stages[trained.meta["stage"]].method["name"]


def _load(options: argparse.Namespace) -> dict[str, Trained]:
    """The weights that were asked for, by title: last before best, raw before averaged.

    The backbone is loaded once. Where the last checkpoint is the best one too, it is there once.
    """
    from mlclip_jax.training.build import load_trained

    asked = options.checkpoint
    found: dict[tuple[str, int], tuple[set[str], Trained]] = {}
    backbone = None
    for which in ("latest", "best") if asked == "both" else (asked,):
        first = "raw" if options.weights == "both" else options.weights
        load = partial(load_trained, options.workdir, which=which)
        trained = [load(weights=first, backbone=backbone)]
        backbone = trained[0].backbone
        if options.weights == "both" and trained[0].meta["ema"]:
            trained.append(load(weights="ema", backbone=backbone))
        for one in trained:
            known, _ = found.setdefault((one.meta["weights"], one.step), (set(), one))
            known.add(which)
    several = asked == "both" and any(len(known) < 2 for known, _ in found.values())
    order = sorted(found.values(), key=lambda pair: "best" in pair[0])
    titles = {}
    for known, one in order:
        words = ["EMA"] if one.meta["weights"] == "ema" else []
        if several:
            words.append(_checkpoint(known))
        name = _method_name(one)
        one.meta["checkpoint"] = _checkpoint(known)
        titles[f"{name} ({', '.join(words)})" if words else name] = one
    return titles


def _checkpoint(which: set[str]) -> str:
    words = {"latest": "last", "best": "best"}
    return " and ".join(words[key] for key in words if key in which)


def _zero_shot(trained: Trained, space: LabelSpace) -> Method:
    """Zero-shot CLIP on the same backbone."""
    from flax import nnx

    from mlclip_jax import methods

    clip, tokenizer = trained.backbone.clip, trained.backbone.tokenizer
    spec = {"name": "zero_shot"}
    return methods.build(spec, clip, space=space, encoder=tokenizer, rngs=nnx.Rngs(0))


def _write(
    options: argparse.Namespace,
    folder: Path,
    data: DataSplits,
    protocol: Protocol,
    trained: Mapping[str, Trained],
    results: Mapping[str, EvalResult],
    validation: EvalResult | None,
    extra: Mapping[str, Any],
) -> None:
    """The report, and the tables on the terminal."""
    from mlclip_jax.evaluation import report
    from mlclip_jax.evaluation.findings import Entry, gather
    from mlclip_jax.training.writers import METRICS_FILE, read_rows

    source, space = data.evals[options.split], data.space
    entries = {}
    for title, result in results.items():
        if title in trained:
            one = trained[title]
            meta = one.meta
            entries[title] = Entry(
                result,
                _method_name(one),
                meta["weights"],
                meta["checkpoint"],
                one.step,
                one.method.score_kind == "sigmoid",
            )
        else:
            entries[title] = Entry(result, "zero_shot")
    config = list(trained.values())[-1].config
    name = _method_name(list(trained.values())[-1])
    # The paper's numbers are of the dataset's own protocol.
    own = protocol.name == data.protocol
    found = gather(
        space,
        entries,
        protocol,
        title=f"{name} on {space.name}",
        split=options.split,
        notes=[
            f"{len(source)} images of the split “{options.split}”, {len(space)} labels; backbone "
            f"{config.backbone.name}; run {options.workdir}.",
        ],
        paper=config.paper if own else None,
        validation=validation,
        train_counts=data.train_counts(),
        history=read_rows(options.workdir / METRICS_FILE),
        image=lambda index: source[index]["image"],
        **extra,
    )
    page = report.write_report(folder, found)
    print(report.plain(report.headline(found)))
    if len(space) <= _MOST_ROWS:
        print("\n" + report.plain(report.class_table(found)))
    print(f"\nreport: {page}")


def main(args: Sequence[str] | None = None) -> int:
    """The command with its arguments (default: those of the process); the exit code."""
    options = _arguments(args)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
