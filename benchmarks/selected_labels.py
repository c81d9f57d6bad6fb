"""A step of ADDS by the number of labels, where it sees its positives and a draw of the others.

    python benchmarks/selected_labels.py --out benchmarks/results/selected_labels

ADDS on ImageNet with ViT-B/32's tokens from a cache, batches of 56 with one positive each: a step
sees 224 labels, however many there are. What is left to grow with the labels: targets [b c], a
random number for each label, the choice among them, and their text features, which stay on the
device. Times in turn, float32 on this machine, of a decoder of one layer (of six, the share of the
choice is smaller); memory as the compiler plans it for six.

Writes OUT.json and OUT.md.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing
from label_step import memory
from paired import parser

from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.train import load_config
from mlclip_jax.training.config import parse_config
from mlclip_jax.training.dry_run import abstract_step
from mlclip_jax.training.mesh import make_mesh

CONFIG = Path(__file__).parents[1] / "configs" / "adds" / "benchmark.py"
CLASSES = (1_000, 21_841)


def compiled(classes: int, layers: int) -> tuple[Any, tuple[Any, ...]]:
    """The step for so many labels, and the shapes of its arguments."""
    arguments = f"data=imagenet21k_to_nus,backbone=ViT-B/32,layers={layers},cache=unused"
    config = parse_config(load_config(f"{CONFIG}:{arguments}"))
    space = LabelSpace(tuple(f"label {i}" for i in range(classes)), name="labels")
    mesh = make_mesh(jax.devices()[:1])
    ((plan, shapes, _),) = abstract_step(config, mesh=mesh, space=space)
    return plan.step.lower(*shapes).compile(), shapes


def filled(shapes: Any, classes: int) -> tuple[Any, ...]:
    """Arguments of these shapes: small random numbers, and one positive for each image."""
    rng = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            value = rng.normal(size=leaf.shape).astype(np.float32) * 0.02
        else:
            value = np.ones(leaf.shape, leaf.dtype)
        return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

    state, frozen, batch, labels = jax.tree.map(fill, shapes)
    targets = -np.ones(batch.targets.shape, np.int8)
    targets[np.arange(len(targets)), rng.integers(0, classes, len(targets))] = 1
    placed = jax.device_put(targets, batch.targets.sharding)
    return state, frozen, replace(batch, targets=placed), labels


def main() -> None:
    """Measure, print and write the table."""
    args = parser(__doc__).parse_args()
    steps, states, rest = {}, {}, {}
    for classes in CLASSES:
        steps[classes], shapes = compiled(classes, 1)
        states[classes], *rest[classes] = filled(shapes, classes)

    def one(classes: int) -> Any:
        states[classes], metrics = steps[classes](states[classes], *rest[classes])
        assert float(metrics["labels"]) <= 224
        return metrics["loss"]

    times = timing.measure({str(c): lambda c=c: one(c) for c in CLASSES}, warmup=1, repeats=7)
    planned = {c: memory(compiled(c, 6)[0]) for c in CLASSES}
    few = CLASSES[0]
    lines = [
        "# A step of ADDS by the number of labels",
        "",
        f"    python benchmarks/selected_labels.py --out {args.out}",
        "",
        "| labels | s/step, one layer | to 1,000 | GiB, six layers | to 1,000 |",
        "|---:|---:|---:|---:|---:|",
    ]
    for c in CLASSES:
        seconds, base = times[str(c)].median_s, times[str(few)].median_s
        lines.append(
            f"| {c:,} | {seconds:.2f} | {seconds / base:.3f} | {planned[c] / 2**30:.3f} | "
            f"{planned[c] / planned[few]:.3f} |"
        )
    print("\n".join(lines))
    if args.out:
        found = {"times": times, "bytes": planned}
        timing.save(args.out.with_suffix(".json"), found)
        args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
