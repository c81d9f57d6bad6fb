"""Training ADDS from cached tokens: how near an epoch comes to the decoder's time alone.

    python benchmarks/cached_tokens.py --out benchmarks/results/cached_tokens

A decoder of two layers on the 50 tokens of ViT-B/32 (random weights, float32, batches of 32, the 22
labels of Scenes at 224 pixels). Without a cache a step is tower and decoder, from a cache it is the
decoder: (tower + decoder) / decoder is the most that a cache can give. Both steps are timed on
arrays that are on the device, in turn; epochs are timed from the files to the last step, through
the trainer's own input path, with features stored as each type.

The second table is what storing costs in mAP: a decoder of one layer on clip-mini's tokens of
Scenes, with each type, paired over seeds.

Writes OUT.json and OUT.md.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import timing
from paired import cell, parser

from mlclip_jax.data import registry
from mlclip_jax.data.feature_files import Dtype
from mlclip_jax.data.features import CacheConfig
from mlclip_jax.data.pipeline import train_batches
from mlclip_jax.methods.base import Batch
from mlclip_jax.train import load_config
from mlclip_jax.training.build import Plan, build_method, load_backbone, plan_stage
from mlclip_jax.training.config import parse_config
from mlclip_jax.training.feature_cache import cache_features
from mlclip_jax.training.loop import fit
from mlclip_jax.training.mesh import device_batches, make_mesh, replicate, shard_labels
from mlclip_jax.training.stage import Run
from mlclip_jax.training.step import init_state

CONFIG = str(Path(__file__).parents[1] / "configs" / "adds" / "scenes.py")
IMAGES, BATCH = 256, 32
DTYPES: tuple[Dtype, ...] = get_args(Dtype)


class World(NamedTuple):
    """A stage ready to run, as the trainer has it."""

    run: Run
    stage: Any
    method: Any
    plan: Plan
    frozen: Any
    labels: Any

    def state(self) -> Any:
        """A fresh one: steps take it as their own."""
        made = init_state(self.plan.parts, self.plan.optimizer, seed=0, ema=False)
        return replicate(made, self.run.mesh)

    def cached(self, dtype: Dtype, folder: Path) -> Any:
        """The training examples with features of this type, computed if they are not there."""
        stage = replace(self.stage, cache=CacheConfig(str(folder), dtype=dtype))
        arguments = (self.run.data, stage, self.method, self.plan.parts, self.state(), self.frozen)
        return cache_features(self.run, *arguments).train

    def batches(self, source: Any) -> Any:
        """An epoch of batches on the device."""
        return device_batches(train_batches(source, BATCH, seed=0), self.run.mesh)


def build(folder: Path) -> World:
    """ADDS over a random ViT-B/32 at 224 pixels."""
    method = {"name": "adds", "layers": 2}
    data = {"name": "scenes", "num_train": IMAGES}
    settings = {"name": "ViT-B/32", "weights": "random"}
    config = parse_config(
        {"method": method, "data": data, "backbone": settings, "batch_size": BATCH}
        | {"eval": {"splits": ("validation",), "batch_size": BATCH}}
    )
    (stage,) = config.stages
    backbone, mesh = load_backbone(config.backbone), make_mesh()
    loaded = registry.load(config.data, image_size=224, splits=())
    built = build_method(stage, backbone, loaded.space, seed=0)
    labels = built.label_inputs(loaded.space, backbone.tokenizer, multiple_of=mesh.size)
    plan = plan_stage(
        stage, built, labels, classes=len(loaded.space), mesh=mesh, num_examples=IMAGES
    )
    run = Run(config, folder, mesh, backbone, loaded, None, None, quiet=True)
    frozen = replicate(plan.parts.frozen, mesh)
    return World(run, stage, built, plan, frozen, shard_labels(labels, mesh))


def speed() -> dict[str, Any]:
    """Seconds of both steps on the device, and of a step in an epoch from each type of cache."""
    with tempfile.TemporaryDirectory() as folder:
        world = build(Path(folder))
        sources = {dtype: world.cached(dtype, Path(folder)) for dtype in DTYPES}
        batches = {
            name: Batch(**next(iter(world.batches(source))))
            for name, source in ({"pixels": world.run.data.train} | sources).items()
        }
        steps = {
            name: world.plan.step.lower(world.state(), world.frozen, batch, world.labels).compile()
            for name, batch in batches.items()
        }
        states = {name: world.state() for name in steps}

        def one(name: str) -> Any:
            states[name], metrics = steps[name](
                states[name], world.frozen, batches[name], world.labels
            )
            return metrics["loss"]

        device = timing.measure({name: lambda name=name: one(name) for name in steps}, repeats=5)
        epochs: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
        for _ in range(3):
            for dtype, source in sources.items():
                state, start = world.state(), time.perf_counter()
                count = 0
                for arrays in world.batches(source):
                    state, metrics = steps[dtype](
                        state, world.frozen, Batch(**arrays), world.labels
                    )
                    count += 1
                    if count == IMAGES // BATCH:
                        break
                jax.block_until_ready(metrics)
                epochs[dtype].append((time.perf_counter() - start) / count)
        sizes = {dtype: source.files.record_bytes for dtype, source in sources.items()}
    return {
        "device_s": {name: found.median_s for name, found in device.items()},
        "epoch_step_s": {dtype: sorted(found)[1] for dtype, found in epochs.items()},
        "bytes": sizes,
    }


def quality(seeds: int) -> dict[str, list[float]]:
    """Test mAP in per cent by type, a run for each seed."""
    found: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    for seed in range(seeds):
        for dtype in DTYPES:
            config = load_config(f"{CONFIG}:layers=1,seed={seed}")
            config.data.seed = seed
            config.ema_decay = None
            config.eval = {"every": "512 steps", "splits": ("test",)}
            with tempfile.TemporaryDirectory() as folder:
                config.cache = {"folder": folder, "dtype": dtype}
                result = fit(config, Path(folder) / "run", quiet=True)
            found[dtype].append(100 * result.metrics["test"]["raw"]["mAP"])
    return found


def main() -> None:
    """Measure, print and write the tables."""
    args = parser(__doc__).parse_args()
    found, scores = speed(), quality(args.seeds)
    device = found["device_s"]
    lines = [
        "# ADDS from cached tokens",
        "",
        f"    python benchmarks/cached_tokens.py --out {args.out}",
        "",
        f"A step with the tower takes {device['pixels']:.2f} s here.",
        "",
        "| stored as | KB an image | step on the device, s | bound | step in an epoch, s | share |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for dtype in DTYPES:
        bound = device["pixels"] / device[dtype]
        step = found["epoch_step_s"][dtype]
        lines.append(
            f"| {dtype} | {found['bytes'][dtype] / 1e3:.0f} | {device[dtype]:.2f} | {bound:.2f} x "
            f"| {step:.2f} | {100 * device[dtype] / step:.0f} % |"
        )
    lines += [
        "",
        "Bound: (tower + decoder) / decoder. Share: how much of it an epoch reaches.",
        "",
        f"| stored as | test mAP, {args.seeds} seeds | above float32 |",
        "|---|---:|---:|",
    ]
    for dtype in DTYPES:
        gaps = [a - b for a, b in zip(scores[dtype], scores["float32"], strict=True)]
        gap = "" if dtype == "float32" else cell(gaps, signed=True)
        lines.append(f"| {dtype} | {cell(scores[dtype])} | {gap} |")
    print("\n".join(lines))
    if args.out:
        timing.save(args.out.with_suffix(".json"), found | {"mAP": scores})
        args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
