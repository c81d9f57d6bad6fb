"""Prompt encoding: all 77 positions, trimmed to the longest prompt, or with a shared prefix.

    python benchmarks/text_tower.py --out benchmarks/results/text_tower_cpu.json

Forward and backward with respect to a unified context, random weights; 80 classes, width 512,
12 layers, 8 heads: the text tower of CLIP ViT-B/16 on COCO. The three give the same features.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing
from flax import nnx

from mlclip_jax.clip import PromptTokens, TextConfig, TextTower

SOT, EOT, PERIOD = 49406, 49407, 269


def make_prompts(classes: int, n_ctx: int) -> PromptTokens:
    """[SOS][V1..Vk][name of 1 to 3 tokens]["."][EOT]."""
    rng = np.random.default_rng(0)
    own = np.zeros((classes, 5), np.int32)
    eot = np.zeros((classes,), np.int32)
    for i in range(classes):
        row = [*rng.integers(1000, 40000, 1 + i % 3), PERIOD, EOT]
        own[i, : len(row)] = row
        eot[i] = len(row) - 1
    prefix = np.array([SOT, *(-(j + 1) for j in range(n_ctx))], np.int32)
    return PromptTokens(jnp.asarray(prefix), jnp.asarray(own), jnp.asarray(eot))


def encoders(dtype: jnp.dtype) -> dict[str, Callable[[TextTower, Any, Any], jax.Array]]:
    """The three ways to encode, each (tower, prompts, context) -> [c d]."""

    def plain(tower: TextTower, p: PromptTokens, context: jax.Array, length: int) -> jax.Array:
        c, k = p.own.shape[0], p.prefix.shape[0]
        ids = jnp.concatenate([jnp.broadcast_to(p.prefix, (c, k)), p.own], axis=1)
        ids = jnp.pad(ids, ((0, 0), (0, length - ids.shape[1])))
        hidden = tower.hidden_states(tower.embed(ids, context).astype(dtype))
        return hidden[jnp.arange(c), k + p.eot] @ tower.projection[...].astype(dtype)

    return {
        "plain_77": lambda t, p, c: plain(t, p, c, 77),
        "trimmed": lambda t, p, c: plain(t, p, c, p.prefix.shape[0] + p.own.shape[1]),
        "shared_prefix": lambda t, p, c: t.encode_prompts(p, c, dtype=dtype),
    }


def compile_cases(classes: int, n_ctx: int, dtype: jnp.dtype) -> dict[str, tuple[Any, tuple]]:
    """Compiled value-and-gradient of each encoder, and its arguments."""
    tower = TextTower(TextConfig(), 512, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(tower)
    rng = np.random.default_rng(1)
    arguments = (
        jnp.asarray(0.02 * rng.normal(size=(n_ctx, 512)), jnp.float32),
        nnx.to_pure_dict(state),
        make_prompts(classes, n_ctx),
        jnp.asarray(rng.normal(size=(classes, 512)), jnp.float32),
    )
    compiled = {}
    for name, encode in encoders(dtype).items():

        def score(context: jax.Array, state: Any, prompts: Any, weights: jax.Array) -> jax.Array:
            features = encode(nnx.merge(graphdef, state), prompts, context)  # noqa: B023
            features = features.astype(jnp.float32)
            unit = features / jnp.linalg.norm(features, axis=-1, keepdims=True)
            return (unit * weights).sum()

        compiled[name] = jax.jit(jax.value_and_grad(score)).lower(*arguments).compile()
    return {name: (function, arguments) for name, function in compiled.items()}


def main() -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    results = []
    print(f"{'context':>7}  {'encoding':<14} {'ms':>9} {'spread':>8} {'faster':>7} {'temp MB':>8}")
    for n_ctx in args.contexts:
        cases = compile_cases(args.classes, n_ctx, jnp.dtype(args.dtype))
        values = {name: function(*arguments) for name, (function, arguments) in cases.items()}
        gap = max(
            float(jnp.abs(grad - values["plain_77"][1]).max()) for _, grad in values.values()
        ) / float(jnp.abs(values["plain_77"][1]).max())
        timings = timing.measure(
            {name: lambda f=f, a=a: f(*a) for name, (f, a) in cases.items()}, repeats=args.repeats
        )
        faster = timing.ratios(timings, to="plain_77")
        for name, (function, _) in cases.items():
            memory = function.memory_analysis().temp_size_in_bytes / 2**20
            took = timings[name]
            results.append(
                {"n_ctx": n_ctx, "encoding": name, "time": took, "times_faster": faster[name],
                 "temp_mib": memory, "max_relative_gradient_gap": gap}
            )  # fmt: skip
            print(
                f"{n_ctx:>7}  {name:<14} {1e3 * took.median_s:>9.1f} {1e3 * took.iqr_s:>8.1f} "
                f"{faster[name]:>6.1f}x {memory:>8.0f}"
            )
        print(f"{'':>7}  gradients agree to {gap:.1e} of their largest entry")
    if args.out:
        setting = {"classes": args.classes, "width": 512, "layers": 12, "dtype": args.dtype}
        timing.save(args.out, {"setting": setting, "rows": results})


if __name__ == "__main__":
    main()
