"""Write a trained method as a plain classifier, and prove that it gives the same logits.

    python -m mlclip_jax.export --workdir=runs/mine --output=model/

The folder holds the image tower, a matrix and a description; `mlclip tag --classifier` and
`Tagger.from_classifier` read it. It appears only after the classifier, read back from disk, has
scored a split as the method does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlclip_jax.errors import UserError, exit_code

if TYPE_CHECKING:
    from mlclip_jax.data.registry import DataSplits
    from mlclip_jax.evaluation.evaluator import EvalResult
    from mlclip_jax.methods.base import Method
    from mlclip_jax.serving.export import Classifier
    from mlclip_jax.training.build import Trained

#: Largest difference of logits, relative to the largest logit. bfloat16 has 8 bits, and label
#: features that several devices encode together are not rounded like those that were folded.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def _arguments(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mlclip export",
        description="Write a trained method as a plain classifier (image tower and matrix), after "
        "comparing its logits with the method's on a split.",
    )
    parser.add_argument("--workdir", type=Path, required=True, help="folder of a training run")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--checkpoint", choices=("best", "latest"), default="best", help="default: best"
    )
    parser.add_argument(
        "--weights", choices=("auto", "raw", "ema"), default="auto",
        help="auto (default): averaged where the run kept an average",
    )  # fmt: skip
    parser.add_argument("--split", default="test", help="to compare on (default: test)")
    parser.add_argument("--batch_size", type=int, default=100)
    return parser.parse_args(args)


def run(options: argparse.Namespace) -> int:
    """Fold, write, read back, compare, print; the exit code."""
    import numpy as np

    from mlclip_jax.data import registry
    from mlclip_jax.serving import export
    from mlclip_jax.training.build import load_trained
    from mlclip_jax.training.loop import use_compilation_cache

    if options.batch_size < 1:
        raise UserError(f"--batch_size must be at least 1, not {options.batch_size}")
    with export.new_folder(options.output) as part:
        trained = load_trained(options.workdir, which=options.checkpoint, weights=options.weights)
        if trained.config.compilation_cache:
            use_compilation_cache()
        data = registry.load(
            {**trained.config.data, "taxonomy": "own"},  # the run's groups are in its label space
            image_size=trained.method.clip.config.image.image_size,
            splits=(options.split,),
        )
        origin = export.Origin.of(trained)
        encoder = trained.backbone.tokenizer
        export.save(export.fold(trained.method, trained.space, encoder, origin), part)
        classifier = export.load(part)

        expected = _score(trained.method, trained, data, options)
        found = _score(classifier, trained, data, options)
        largest = np.abs(expected.scores).max()
        difference = np.abs(found.scores - expected.scores).max()
        print(
            f"{origin.method} ({origin.weights} weights of step {origin.step}): "
            f"mAP {100 * expected.metrics['mAP']:.2f} on {options.split}\n"
            f"classifier, read back: mAP {100 * found.metrics['mAP']:.2f}\n"
            f"logits differ by at most {difference:.2g}, the largest is {largest:.3g}"
        )
        if not difference <= TOLERANCE[classifier.config.dtype] * largest:
            raise UserError(
                "classifier and method disagree, nothing is written: tag with --workdir instead"
            )
    print(f"classifier of {len(trained.space)} labels: {options.output}")
    return 0


def _score(
    method: Method | Classifier, trained: Trained, data: DataSplits, options: argparse.Namespace
) -> EvalResult:
    """Scores of the split on all devices."""
    from flax import nnx

    from mlclip_jax.data.pipeline import eval_batches
    from mlclip_jax.evaluation.evaluator import evaluate, predict_fn
    from mlclip_jax.training.mesh import make_mesh, replicate, shard_labels

    mesh, space = make_mesh(), trained.space
    batch_size = -(-options.batch_size // mesh.size) * mesh.size
    graphdef, state = nnx.split(method)
    labels = method.label_inputs(space, trained.backbone.tokenizer, multiple_of=mesh.size)
    results = evaluate(
        predict_fn(graphdef, mesh),
        {"": (replicate(nnx.to_pure_dict(state), mesh),)},
        shard_labels(labels, mesh),
        eval_batches(data.evals[options.split], batch_size, num_workers=data.config.num_workers),
        space,
        mesh=mesh,
    )
    return results[""]


def main(args: Sequence[str] | None = None) -> int:
    """The command with its arguments (default: those of the process); the exit code."""
    options = _arguments(args)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
