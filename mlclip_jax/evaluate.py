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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlclip_jax.errors import UserError, exit_code, make_folder

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from mlclip_jax.data.registry import DataSplits
    from mlclip_jax.evaluation.evaluator import EvalResult, Predictor
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
    """What the evaluations of one command share: devices, data, and how a method is scored."""

    def __init__(self, trained: Trained, split: str, batch_size: int) -> None:
        from mlclip_jax.data import registry
        from mlclip_jax.training.mesh import make_mesh

        if batch_size < 1:
            raise UserError(f"--batch_size must be at least 1, not {batch_size}")
        self.tokenizer = trained.tokenizer
        self.predictors: dict[Any, Predictor] = {}  # raw, averaged, validation: compiled once
        self.mesh: Mesh = make_mesh()
        self.batch_size = -(-batch_size // self.mesh.size) * self.mesh.size
        selecting = trained.config.eval.splits
        chosen = (split, "validation") if "validation" in selecting else (split,)
        self.data: DataSplits = registry.load(
            trained.config.data,
            image_size=trained.method.clip.config.image.image_size,
            splits=tuple(dict.fromkeys(chosen)),
        )

    def score(self, method: Method, split: str) -> EvalResult:
        """A method's metrics on a split."""
        from flax import nnx

        from mlclip_jax.data.pipeline import eval_batches
        from mlclip_jax.evaluation.evaluator import evaluate, predict_fn
        from mlclip_jax.training.mesh import replicate, shard_labels

        space, mesh = self.data.space, self.mesh
        graphdef, state = nnx.split(method)
        labels = method.label_inputs(space, self.tokenizer, multiple_of=mesh.size)
        if graphdef not in self.predictors:
            self.predictors[graphdef] = predict_fn(graphdef, mesh)
        return evaluate(
            self.predictors[graphdef],
            (replicate(nnx.to_pure_dict(state), mesh),),
            shard_labels(labels, mesh),
            eval_batches(
                self.data.evals[split], self.batch_size, num_workers=self.data.config.num_workers
            ),
            space,
            mesh=mesh,
        )


def run(options: argparse.Namespace) -> int:
    """Evaluate, print and write; the exit code."""
    from flax import nnx

    from mlclip_jax import methods
    from mlclip_jax.evaluation import report
    from mlclip_jax.training.build import load_backbone, load_trained
    from mlclip_jax.training.loop import use_compilation_cache
    from mlclip_jax.training.writers import METRICS_FILE, read_rows

    # ---- Trained methods: raw and averaged weights -------------------------------------------
    first = "raw" if options.weights == "both" else options.weights
    trained = {first: load_trained(options.workdir, which=options.checkpoint, weights=first)}
    one = trained[first]
    if one.config.compilation_cache:
        use_compilation_cache()
    if options.weights == "both" and one.meta["ema"]:
        trained["ema"] = load_trained(options.workdir, which=options.checkpoint, weights="ema")

    # ---- Scores ------------------------------------------------------------------------------
    evaluation = _Evaluation(one, options.split, options.batch_size)
    folder = options.output or options.workdir / "report" / options.split
    make_folder(folder)  # now rather than after minutes of scoring
    space = evaluation.data.space
    name = one.config.stages[one.meta["stage"]].method["name"]
    results: dict[str, EvalResult] = {}
    if options.baseline and name != "zero_shot":
        backbone = load_backbone(one.config.backbone, seed=one.config.seed)
        zero_shot = methods.build(
            {"name": "zero_shot"}, backbone.clip,
            space=space, encoder=backbone.tokenizer, rngs=nnx.Rngs(0),
        )  # fmt: skip
        results["zero-shot"] = evaluation.score(zero_shot, options.split)
    titles = {"raw": name, "ema": f"{name} (EMA)"}
    for weights, found in trained.items():
        results[titles[weights]] = evaluation.score(found.method, options.split)
    validation = None
    if "validation" in evaluation.data.evals and options.split != "validation":
        validation = evaluation.score(list(trained.values())[-1].method, "validation")

    # ---- Output ------------------------------------------------------------------------------
    source = evaluation.data.evals[options.split]
    steps = ", ".join(f"{titles[w]}: step {found.step}" for w, found in trained.items())
    notes = [
        f"{len(source)} images of the split '{options.split}', {len(space)} labels. Checkpoints "
        f"({options.checkpoint}) of {options.workdir}: {steps}. Metrics are in per cent; mAP is "
        "the mean over classes that have positives.",
    ]
    page = report.write_report(
        folder,
        space,
        results,
        title=f"{name} on {space.name}",
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
        "steps": {titles[weights]: found.step for weights, found in trained.items()},
        "results": {title: _as_json(result, space.names) for title, result in results.items()},
    }
    text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    print(report.plain(report.headline(results)))
    if len(space) <= _MOST_ROWS:
        print("\n" + report.plain(report.class_table(space, results)))
    print(f"\nreport: {page}")
    return 0


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
