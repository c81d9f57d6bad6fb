"""Every loss, value and gradient, from 80 classes to 9,605.

    python benchmarks/losses.py --out benchmarks/results/losses_cpu.json

Random logits (for the last two, distances and features of the same shape); about 3 positives an
image, one entry in ten unobserved. The losses of one size are timed in turn. The ranking loss
stands beside its direct form over all pairs where the [b c c] array of that fits into --direct_gib.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import timing
from jax import Array

from mlclip_jax import losses

SIZES = ((128, 80), (128, 1006), (64, 9605))
SETTINGS = {"expected_positives": "expected_positives(expected=3)"}
Function = Callable[[Array, Array], Array]


def direct_ranking(logits: Array, targets: Array) -> Array:
    """The ranking loss from the array of all pairs."""
    pair = (targets > 0)[:, :, None] & (targets < 0)[:, None, :]
    term = jax.nn.relu(jnp.where(pair, 1 + logits[:, None, :] - logits[:, :, None], 0))
    return (term.sum((1, 2)) / jnp.maximum((term > 0).sum((1, 2)), 1)).mean()


def make_batch(images: int, classes: int) -> tuple[Array, Array]:
    """Logits float32 and targets int8, [b c]."""
    rng = np.random.default_rng(0)
    draw = rng.random((images, classes))
    targets = np.where(draw < 3 / classes, 1, np.where(draw > 0.9, 0, -1)).astype(np.int8)
    return jnp.asarray(3 * rng.normal(size=targets.shape), jnp.float32), jnp.asarray(targets)


def cases(images: int, classes: int, direct_gib: float) -> dict[str, Function]:
    """Functions of logits and targets by name."""
    counts = np.maximum(20_000 * 0.99 ** np.arange(classes), 1).astype(np.float32)
    inputs = {
        "progress": losses.Progress(step=100, epoch=5),
        "class_counts": counts,
        "num_images": 100_000,
    }

    def bind(name: str) -> Function:
        loss = losses.get(SETTINGS.get(name, name))
        return lambda logits, targets: loss(logits, targets, **inputs)

    found = {name: bind(name) for name in losses.LOSSES}
    for alias in ("assume_negative", "multi_label_soft_margin"):
        del found[alias]
    found["class_specific_embedding"] = lambda logits, targets: losses.class_specific_embedding(
        logits, targets, class_counts=counts
    )
    found["l1_distillation"] = lambda logits, targets: losses.l1_distillation(logits, logits[::-1])
    if 4 * images * classes**2 <= direct_gib * 2**30:
        found["ranking, all pairs"] = direct_ranking
    return found


def main() -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--direct_gib", type=float, default=1.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    rows = []
    print(f"{'images':>6} {'classes':>7}  {'loss':<28} {'ms':>9} {'spread':>8} {'temp MB':>8}")
    for images, classes in SIZES:
        batch = make_batch(images, classes)
        compiled = {
            name: jax.jit(jax.value_and_grad(function)).lower(*batch).compile()
            for name, function in cases(images, classes, args.direct_gib).items()
        }
        timings = timing.measure(
            {name: lambda f=f, batch=batch: f(*batch) for name, f in compiled.items()},
            repeats=args.repeats,
        )
        for name, took in timings.items():
            memory = compiled[name].memory_analysis().temp_size_in_bytes / 2**20
            rows.append(
                {"images": images, "classes": classes, "loss": name, "time": took,
                 "temp_mib": memory}
            )  # fmt: skip
            print(
                f"{images:>6} {classes:>7}  {name:<28} {1e3 * took.median_s:>9.3f} "
                f"{1e3 * took.iqr_s:>8.3f} {memory:>8.1f}"
            )
    if args.out:
        timing.save(args.out, {"setting": {"dtype": "float32"}, "rows": rows})


if __name__ == "__main__":
    main()
