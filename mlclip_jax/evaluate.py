"""Score a trained method on a split and write a report.

    python -m mlclip_jax.evaluate --workdir=runs/mine --split=test

Prints the table of metrics beside zero-shot CLIP on the same images, and writes `evaluation.json`,
`report.md` and its pictures to `<workdir>/report/<split>`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlclip_jax.errors import UserError, exit_code, make_folder

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from mlclip_jax.data.registry import DataSplits
    from mlclip_jax.evaluation.evaluator import EvalResult, Predictor
    from mlclip_jax.labels.space import LabelSpace
    from mlclip_jax.methods.base import Method
    from mlclip_jax.training.build import Trained

_MOST_ROWS = 40  # classes whose table still fits a terminal


def _arguments(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mlclip evaluate",
        description="Score a trained method on a split, beside zero-shot CLIP; print the table "
        "and write evaluation.json, report.md and its pictures.",
    )
    parser.add_argument("--workdir", type=Path, required=True, help="folder of a training run")
    parser.add_argument(
        "--checkpoint", choices=("latest", "best"), default="best",
        help="latest, or best by the selection metric of the weights scored (default)",
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
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--output", type=Path, help="folder (default: WORKDIR/report/SPLIT)")
    return parser.parse_args(args)


class _Evaluation:
    """What the evaluations of one command share: devices, data, and how methods are scored."""

    def __init__(self, trained: Trained, split: str, batch_size: int) -> None:
        from mlclip_jax.data import registry
        from mlclip_jax.training.mesh import make_mesh

        if batch_size < 1:
            raise UserError(f"--batch_size must be at least 1, not {batch_size}")
        self.tokenizer = trained.backbone.tokenizer
        self.predictors: dict[Any, Predictor] = {}  # test and validation: compiled once
        self.mesh: Mesh = make_mesh()
        self.batch_size = -(-batch_size // self.mesh.size) * self.mesh.size
        selecting = trained.config.eval.splits
        chosen = (split, "validation") if "validation" in selecting else (split,)
        self.data: DataSplits = registry.load(
            trained.config.data,
            image_size=trained.method.clip.config.image.image_size,
            splits=tuple(dict.fromkeys(chosen)),
        )

    def score(self, methods: Mapping[str, Method], split: str) -> dict[str, EvalResult]:
        """Metrics on a split by title, in one pass; the methods differ in their weights only."""
        from flax import nnx

        from mlclip_jax.data.pipeline import eval_batches
        from mlclip_jax.evaluation.evaluator import evaluate, predict_fn
        from mlclip_jax.training.mesh import replicate, shard_labels

        space, mesh = self.data.space, self.mesh
        states = {}
        for title, method in methods.items():
            graphdef, state = nnx.split(method)
            states[title] = (replicate(nnx.to_pure_dict(state), mesh),)
        labels = method.label_inputs(space, self.tokenizer, multiple_of=mesh.size)
        if graphdef not in self.predictors:
            self.predictors[graphdef] = predict_fn(graphdef, mesh)
        return evaluate(
            self.predictors[graphdef],
            states,
            shard_labels(labels, mesh),
            eval_batches(
                self.data.evals[split], self.batch_size, num_workers=self.data.config.num_workers
            ),
            space,
            mesh=mesh,
        )


def run(options: argparse.Namespace) -> int:
    """Evaluate, print and write; the exit code."""
    from mlclip_jax.training.loop import use_compilation_cache

    trained = _load(options)
    one = next(iter(trained.values()))
    if one.config.compilation_cache:
        use_compilation_cache()
    evaluation = _Evaluation(one, options.split, options.batch_size)
    folder = options.output or options.workdir / "report" / options.split
    make_folder(folder)  # now rather than after minutes of scoring

    # ---- Scores: the baseline, then all trained weights in one pass --------------------------
    results: dict[str, EvalResult] = {}
    if options.baseline and _method_name(one) != "zero_shot":
        zero_shot = {"zero-shot": _zero_shot(one, evaluation.data.space)}
        results |= evaluation.score(zero_shot, options.split)
    methods = {title: found.method for title, found in trained.items()}
    results |= evaluation.score(methods, options.split)
    validation = None
    if "validation" in evaluation.data.evals and options.split != "validation":
        title, method = list(methods.items())[-1]
        validation = evaluation.score({title: method}, "validation")[title]

    _write(options, folder, evaluation.data, trained, results, validation)
    return 0


def _method_name(trained: Trained) -> str:
    return trained.config.stages[trained.meta["stage"]].method["name"]


def _load(options: argparse.Namespace) -> dict[str, Trained]:
    """The trained method with the weights that were asked for, by title; its backbone once."""
    from mlclip_jax.training.build import load_trained

    load = partial(load_trained, options.workdir, which=options.checkpoint)
    first = load(weights="raw" if options.weights == "both" else options.weights)
    name = _method_name(first)
    if options.weights == "both" and first.meta["ema"]:
        averaged = load(weights="ema", backbone=first.backbone)
        return {name: first, f"{name} (EMA)": averaged}
    return {name if first.meta["weights"] == "raw" else f"{name} (EMA)": first}


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
    trained: Mapping[str, Trained],
    results: Mapping[str, EvalResult],
    validation: EvalResult | None,
) -> None:
    """The report, the figures as JSON, and the tables on the terminal."""
    from mlclip_jax.evaluation import report
    from mlclip_jax.training.writers import METRICS_FILE, read_rows

    source, space = data.evals[options.split], data.space
    steps = {title: found.step for title, found in trained.items()}
    listed = ", ".join(f"{title}: step {step}" for title, step in steps.items())
    notes = [
        f"{len(source)} images of the split '{options.split}', {len(space)} labels. Checkpoints "
        f"({options.checkpoint}) of {options.workdir}: {listed}. Metrics are in per cent; mAP is "
        "the mean over classes that have positives.",
    ]
    page = report.write_report(
        folder,
        space,
        results,
        title=f"{_method_name(next(iter(trained.values())))} on {space.name}",
        split=options.split,
        notes=notes,
        image=lambda index: source[index]["image"],
        validation=validation,
        history=read_rows(options.workdir / METRICS_FILE),
    )
    summary = {
        "workdir": str(options.workdir),
        "split": options.split,
        "num_images": len(source),
        "checkpoint": options.checkpoint,
        "steps": steps,
        "results": {title: _as_json(result, space.names) for title, result in results.items()},
    }
    text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    print(report.plain(report.headline(results)))
    if len(space) <= _MOST_ROWS:
        print("\n" + report.plain(report.class_table(space, results)))
    print(f"\nreport: {page}")


def _as_json(result: EvalResult, names: Sequence[str]) -> Mapping[str, Any]:
    """Metrics and AP by class as fractions; null where a class has no positives."""
    per_class = dict(zip(names, map(_number, result.per_class_ap), strict=True))
    metrics = {name: _number(value) for name, value in result.metrics.items()}
    return {"metrics": metrics, "per_class_ap": per_class}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def main(args: Sequence[str] | None = None) -> int:
    """The command with its arguments (default: those of the process); the exit code."""
    options = _arguments(args)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
