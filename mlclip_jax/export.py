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
    import numpy as np

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
    parser.add_argument(
        "--split", default="test",
        help="to compare on (default: test); none: on images of noise, where the data are not here",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=100)
    return parser.parse_args(args)


def run(options: argparse.Namespace) -> int:
    """Fold, write, read back, compare, print; the exit code."""
    import numpy as np

    from mlclip_jax.serving import export
    from mlclip_jax.training.build import load_trained
    from mlclip_jax.training.loop import use_compilation_cache
    from mlclip_jax.training.scoring import Scorer

    with export.new_folder(options.output) as part:
        trained = load_trained(options.workdir, which=options.checkpoint, weights=options.weights)
        if trained.config.compilation_cache:
            use_compilation_cache()
        scorer = None
        if options.split != "none":
            scorer = Scorer(trained, (options.split,), options.batch_size)
        origin = export.Origin.of(trained)
        name = f"{origin.method} ({origin.weights} weights of step {origin.step})"
        export.save(
            export.fold(
                trained.method,
                trained.space,
                trained.backbone.tokenizer,
                origin,
                preprocess=trained.preprocess,
            ),
            part,
        )
        classifier = export.load(part)
        both = {name: trained.method, "classifier, read back": classifier}
        if scorer is None:
            scores = [_of_noise(method, trained) for method in both.values()]
        else:
            found = scorer.score(both, options.split)
            scores = [result.scores for result in found.values()]
            for title, result in found.items():
                print(f"{title}: mAP {100 * result.metrics['mAP']:.2f} on {options.split}")
        largest = np.abs(scores[0]).max()
        difference = np.abs(scores[1] - scores[0]).max()
        print(f"logits differ by at most {difference:.2g}, the largest is {largest:.3g}")
        if not difference <= TOLERANCE[classifier.config.dtype] * largest:
            raise UserError(
                "classifier and method disagree, nothing is written: tag with --workdir instead"
            )
    print(f"classifier of {len(trained.space)} labels: {options.output}")
    return 0


def _of_noise(method: Method | Classifier, trained: Trained) -> np.ndarray:
    """Logits of eight images of noise, float32 [b c]."""
    import numpy as np
    from flax import nnx

    from mlclip_jax.evaluation.evaluator import predict_fn

    size = trained.method.image_size
    images = np.random.default_rng(0).integers(0, 256, (8, size, size, 3)).astype(np.uint8)
    graphdef, state = nnx.split(method)
    leaves = (nnx.to_pure_dict(state),)
    labels = method.label_inputs(trained.space, trained.backbone.tokenizer)
    predict = predict_fn(graphdef)
    features = predict.encode_labels(leaves, labels)
    return np.asarray(predict.logits(leaves, images, features, labels))


def main(args: Sequence[str] | None = None) -> int:
    """The command with its arguments (default: those of the process); the exit code."""
    options = _arguments(args)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
