"""What the training step of a config needs of each chip of a TPU slice, by its compiler alone.

    python benchmarks/tpu_memory.py --out benchmarks/results/mkt_tpu \
        --config=configs/mkt/benchmark.py:data=openimages_zsl --chips v5p:2x2x1:1 v5e:2x4:8

Needs no TPU, but `pip install "mlclip-jax[tpu]"`. The trainer's own step at full size, in bfloat16,
classes and images spread over the chips. GiB of arguments, results and scratch; TFLOP of a step;
bytes that collectives move. Minutes for each row.

Writes OUT.json and OUT.md.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

import jax
import timing
from label_step import memory

from mlclip_jax.train import load_config
from mlclip_jax.training.config import parse_config
from mlclip_jax.training.dry_run import abstract_step
from mlclip_jax.training.mesh import make_mesh

_COLLECTIVE = re.compile(r"= \S+ (all-gather|all-reduce|all-to-all|reduce-scatter)(?:-start)?\(")


def measure(config: str, chips: str, batch_size: int | None = None) -> list[dict[str, Any]]:
    """A row for each stage of a config on "topology:number of chips"."""
    from jax.experimental import topologies

    topology, _, number = chips.rpartition(":")
    count = int(number) if number.isdecimal() else 0
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    if not 1 <= count <= len(devices):
        raise SystemExit(f"--chips {chips}: {topology} has {len(devices)} chips, give 1 to those")
    settings = load_config(config)
    settings.backbone.dtype = "bfloat16"
    if batch_size is not None:
        settings.batch_size = batch_size
    parsed = parse_config(settings)
    rows = []
    mesh = make_mesh(list(devices[:count]))
    for stage, (plan, shapes, _) in zip(
        parsed.stages, abstract_step(parsed, mesh=mesh), strict=True
    ):
        compiled = plan.step.lower(*shapes).compile()
        try:
            found = _COLLECTIVE.findall(compiled.as_text())
        except jax.errors.JaxRuntimeError:  # libtpu 0.0.52 cannot print some programs of v5p
            found = None
        rows.append(
            {
                "config": config,
                "chips": f"{count} x {topology.partition(':')[0]}",
                "stage": stage.name,
                "batch_size": stage.batch_size,
                "bytes": memory(compiled),
                "flops": compiled.cost_analysis().get("flops"),
                "collectives": None if found is None else {k: found.count(k) for k in set(found)},
            }
        )
        print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    made = row["collectives"]
    words = "-" if made is None else ", ".join(f"{n} {k}" for k, n in sorted(made.items()))
    cells = (
        row["chips"],
        row["stage"],
        row["batch_size"],
        f"{row['bytes'] / 2**30:.2f}",
        f"{row['flops'] / 1e12:.2f}",
        words or "none",
    )
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Compile, print the table, write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--chips", nargs="+", required=True, metavar="TOPOLOGY:NUMBER")
    parser.add_argument("--batch_size", type=int, help="in place of the config's")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    rows: list[dict[str, Any]] = []
    batch = "" if args.batch_size is None else f"--batch_size={args.batch_size} "
    for chips in args.chips:
        rows += measure(args.config, chips, args.batch_size)
        if args.out:
            timing.save(args.out.with_suffix(".json"), {"rows": rows})
            page = [
                f"# The training step of {args.config} on TPUs, compiled",
                "",
                f"    python benchmarks/tpu_memory.py --out {args.out} \\",
                f"        --config={args.config} {batch}--chips {' '.join(args.chips)}",
                "",
                "| chips | stage | batch | GiB a chip | TFLOP a chip | collectives |",
                "|---|---|---:|---:|---:|---|",
                *map(line, rows),
            ]
            args.out.with_suffix(".md").write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    main()
