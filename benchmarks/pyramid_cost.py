"""What high resolution costs: a pyramid of crops against a plain ViT at that size, by the compiler.

    python benchmarks/pyramid_cost.py --out benchmarks/results/pyramid_cost

The forward pass of ViT-L/14's image tower on one image (at 336 pixels and more ViT-L/14-336's), in
bfloat16, all tokens: as a pyramid of crops of the tower's size, and whole, with interpolated
positions (sizes that 14 does not divide take the next multiple). TFLOP by formula: two for each
multiply-add of the matrix products. Memory is what the TPU compiler plans for scratch on a v5p
chip, which has 95 GiB (needs no TPU, but `pip install "mlclip-jax[tpu]"`).

Writes OUT.json and OUT.md.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import timing
from flax import nnx
from jax.sharding import SingleDeviceSharding

from mlclip_jax.clip import CLIP, PRESETS, ViTConfig
from mlclip_jax.modules.pyramid import Pyramid

SIZES = (224, 336, 640, 1344)


def flops(sizes: ViTConfig, dim: int) -> float:
    """Of the tower on one image: patches, blocks with their attention, projection."""
    n, w = 1 + sizes.grid**2, sizes.width
    block = 4 * n * w * w + 2 * n * w * sizes.mlp_width + 2 * n * n * w
    patches = (n - 1) * 3 * sizes.patch_size**2 * w
    return 2 * (patches + sizes.layers * block + n * w * dim)


def scratch(clip_size: int, image_size: int, chip: Any) -> int | None:
    """Bytes of scratch for a batch of one; None where it does not fit the chip."""
    name = "ViT-L/14" if clip_size == 224 else "ViT-L/14-336"
    config = PRESETS[name].at(clip_size)
    abstract = nnx.eval_shape(lambda: CLIP(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    pyramid = Pyramid(clip_size, image_size)
    place = SingleDeviceSharding(chip)

    def run(state: nnx.State, images: jax.Array) -> jax.Array:
        clip = nnx.merge(graphdef, state)

        def tower(crops: jax.Array) -> jax.Array:
            pooled, tokens, *_ = clip.encode_images(crops, tokens=True)
            return jnp.concatenate([pooled[:, None], tokens], axis=1)

        return pyramid.encode(images, tower, None)

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    state = jax.tree.map(placed, state)
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.uint8, sharding=place)
    try:
        compiled = jax.jit(run).lower(state, images).compile()
    except jax.errors.JaxRuntimeError as error:
        if "memory" not in str(error).lower():
            raise
        return None
    return compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    """Compile, print and write the table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--out", type=Path)
    args = options.parse_args()
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    from jax.experimental import topologies

    chip = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices[0]
    lines = [
        "# High resolution as a pyramid and as a whole",
        "",
        f"    python benchmarks/pyramid_cost.py --out {args.out}",
        "",
        "| pixels | crops | tokens | TFLOP | GiB | tokens, whole | TFLOP | GiB |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    rows = []
    for size in SIZES:
        base = min(size, 336)
        config = PRESETS["ViT-L/14" if base == 224 else "ViT-L/14-336"]
        crops = len(Pyramid(base, size).crops)
        whole = replace(config.image, image_size=-(-size // 14) * 14)
        tokens = 1 + config.image.grid**2
        row = {
            "pixels": size,
            "crops": crops,
            "pyramid": (
                crops * tokens,
                crops * flops(config.image, config.embed_dim),
                scratch(base, size, chip),
            ),
            "whole": (
                1 + whole.grid**2,
                flops(whole, config.embed_dim),
                scratch(whole.image_size, whole.image_size, chip),
            ),
        }
        rows.append(row)
        cells = []
        for kind in ("pyramid", "whole"):
            count, operations, memory = row[kind]
            gib = "more than 95" if memory is None else f"{memory / 2**30:.2f}"
            cells.append(f"{count:,} | {operations / 1e12:.2f} | {gib}")
        lines.append(f"| {size} | {crops} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if args.out:
        timing.save(args.out.with_suffix(".json"), {"rows": rows})
        args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
