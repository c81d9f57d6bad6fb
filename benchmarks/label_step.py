"""One step of prompt learning, by the number of labels: its time and the memory it takes.

    python benchmarks/label_step.py --out benchmarks/results/label_step

The trainer's own step of CoOp (forward, backward, Adam) with a context of 16 vectors, one for all
labels or one for each, on ViT-B/16's text tower and 64 images whose features are cached, so that
the text tower is what is measured. Names have 1 to 4 tokens, weights are random.

A rule sets `backbone.class_chunk`: all labels at once where their own tokens are at most 12,288, or
else as many labels as have no more. Time is float32 on this machine. Memory is what the compiler
plans for arguments, results and scratch: float32 here, bfloat16 on one TPU v5e chip (needs no TPU,
but `pip install "mlclip-jax[tpu]"`), each beside that of the same step without chunks.

Writes OUT.json and OUT.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice, product, zip_longest
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing

from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.modules.prompts import context_prompts
from mlclip_jax.training.build import Plan, build_method, load_backbone, packaged_tokenizer
from mlclip_jax.training.config import TrainConfig, parse_config
from mlclip_jax.training.dry_run import abstract_step
from mlclip_jax.training.mesh import make_mesh
from mlclip_jax.training.step import init_state, take_apart

#: Labels of VOC, COCO, CUB's attributes, NUS-WIDE's 925 + 81, Open Images.
CLASSES = (20, 80, 312, 1006, 9605)
MAX_TOKENS = 12_288  # of the labels' own at a time
MANY = 2000  # labels from which a step takes minutes here: run once
# Words of one token in the packaged vocabulary.
WORDS = (
    "animal", "background", "black", "blue", "bottom", "bright", "brown", "cartoon", "circle",
    "clean", "color", "cross", "dark", "dirty", "digit",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A row of the table: labels, whether each has its own context, labels at a time."""

    classes: int
    class_specific: bool
    class_chunk: int | None = None

    @property
    def context(self) -> str:
        """As the table says it."""
        return "per class" if self.class_specific else "unified"

    def config(self, dtype: str) -> TrainConfig:
        """The run whose step is measured."""
        return parse_config(
            {
                "backbone": {
                    "name": "ViT-B/16", "weights": "random", "dtype": dtype,
                    "class_chunk": self.class_chunk,
                },
                "method": {"name": "coop", "n_ctx": 16, "class_specific": self.class_specific},
                "data": {"name": "scenes"},  # labels and features are put in its place
                "batch_size": 64,
                "optim": {"name": "adam"},
                "cache": {"folder": "features"},
            }
        )  # fmt: skip


def label_space(classes: int) -> LabelSpace:
    """Names of 1 to 4 words of a token each."""
    by_length = (product(WORDS, repeat=words) for words in (1, 2, 3, 4))
    in_turn = (name for names in zip_longest(*by_length) for name in names if name)
    names = tuple(" ".join(words) for words in islice(in_turn, classes))
    return LabelSpace(names, name=f"{classes} labels")


def with_chunk(case: Case) -> Case:
    """`case` with the chunk that the rule gives it: a multiple of 64, or none."""
    prompts = context_prompts(
        16, label_space(case.classes).names, packaged_tokenizer(77),
        class_specific=case.class_specific,
    )  # fmt: skip
    tokens = prompts.own.shape[1]
    if case.classes * tokens <= MAX_TOKENS:
        return case
    return replace(case, class_chunk=MAX_TOKENS // tokens // 64 * 64)


def compile_step(case: Case, dtype: str, device: jax.Device) -> tuple[Plan, tuple[Any, ...], Any]:
    """The plan, the shapes of the step's arguments, and the step compiled for a device."""
    space, mesh = label_space(case.classes), make_mesh([device])
    ((plan, shapes, _),) = abstract_step(case.config(dtype), mesh=mesh, space=space)
    return plan, shapes, plan.step.lower(*shapes).compile()


def memory(compiled: Any) -> int:
    """Bytes of arguments, results that are not put in their place, and scratch."""
    stats = compiled.memory_analysis()
    return (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
    )


def tpu_memory(case: Case) -> int:
    """Bytes on a TPU v5e chip in bfloat16; compiled in a process that has done nothing else.

    Where they are more than the chip has: scratch alone, which is what the compiler then tells.
    """
    from jax.experimental import topologies

    # Compiling needs no TPU, nor to be alone with it; optimised even where tests are not.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    jax.config.update("jax_disable_most_optimizations", False)
    chip = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    try:
        return memory(compile_step(case, "bfloat16", chip)[2])
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"\(([\d.]+)G\) exceeds available HBM", str(error))
        if found is None:
            raise
        return int(float(found[1]) * 2**30)


@contextmanager
def tpu_compiler() -> Iterator[Callable[[Case], int] | None]:
    """`tpu_memory` in a process of its own; None where libtpu is not installed."""
    if find_spec("libtpu") is None:
        yield None
        return
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda case: pool.submit(tpu_memory, case).result()


def run_step(case: Case, plan: Plan, shapes: tuple[Any, ...], compiled: Any) -> Callable[[], Any]:
    """A function that runs the step once, on random weights and features."""
    config, space = case.config("float32"), label_space(case.classes)
    backbone = load_backbone(config.backbone)
    method = build_method(config.stages[0], backbone, space, seed=0)
    labels = method.label_inputs(space, backbone.tokenizer)
    parts = take_apart(method)
    state = init_state(parts, plan.optimizer, seed=0, ema=False)
    rng = np.random.default_rng(0)
    batch = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes[2])
    held = [state]

    def run() -> Any:
        held[0], metrics = compiled(held[0], parts.frozen, batch, labels)
        return held[0], metrics

    return run


def measure(case: Case, repeats: int, on_tpu: Callable[[Case], int] | None) -> dict[str, Any]:
    """A row: the time of a step, and memory with and without chunks."""
    device = jax.devices()[0]
    plan, shapes, compiled = compile_step(case, "float32", device)
    once = {"warmup": 0, "repeats": 1}
    times = timing.measure(
        {"step": run_step(case, plan, shapes, compiled)},
        **(once if case.classes >= MANY else {"warmup": 1, "repeats": repeats}),
    )
    row = {
        "classes": case.classes,
        "context": case.context,
        "class_chunk": case.class_chunk,
        "time": times["step"],
        "bytes_here": memory(compiled),
        "bytes_v5e": on_tpu and on_tpu(case),
    }
    if case.class_chunk is not None:
        whole = replace(case, class_chunk=None)
        row["bytes_here_at_once"] = memory(compile_step(whole, "float32", device)[2])
        row["bytes_v5e_at_once"] = on_tpu and on_tpu(whole)
    return row


def main() -> None:
    """Measure, print the table, write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, nargs="+", default=CLASSES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    with tpu_compiler() as on_tpu:
        for classes, class_specific in product(args.classes, (False, True)):
            rows.append(measure(with_chunk(Case(classes, class_specific)), args.repeats, on_tpu))
            print(line(rows[-1]), flush=True)
            if args.out:
                results = {"max_tokens": MAX_TOKENS, "rows": rows}
                timing.save(args.out.with_suffix(".json"), results)
                args.out.with_suffix(".md").write_text(markdown(rows, args.out))


def gibibytes(row: dict[str, Any], where: str) -> str:
    """Memory, and in brackets that without chunks."""
    values = [row[where], row.get(f"{where}_at_once")]
    known = [f"{value / 2**30:.2f}" for value in values if value is not None]
    return "{} ({})".format(*known) if len(known) > 1 else "".join(known)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    took = row["time"]
    spread = f" ({took.min_s:.2f}-{took.max_s:.2f})" if took.calls > 1 else ""
    cells = (
        f"{row['classes']:,}",
        row["context"],
        row["class_chunk"] or "all",
        f"{took.median_s:.2f}{spread}",
        gibibytes(row, "bytes_here"),
        gibibytes(row, "bytes_v5e"),
    )
    return f"| {' | '.join(map(str, cells))} |"


def markdown(rows: list[dict[str, Any]], out: Path) -> str:
    """The page."""
    lines = [
        "# A step of prompt learning, by the number of labels",
        "",
        f"    python benchmarks/label_step.py --out {out}",
        "",
        "CoOp with a context of 16 vectors on ViT-B/16's text tower, 64 images from cached",
        "features, names of 1 to 4 tokens, random weights; the trainer's step with Adam.",
        "`class_chunk`: labels encoded at a time, so that their own tokens are at most",
        f"{MAX_TOKENS:,}. Time: median and range in seconds, float32, {os.cpu_count()} CPU cores.",
        "Memory: what the compiler plans, GiB; in brackets without chunks. A v5e chip has 16.",
        "",
        "| labels | context | `class_chunk` | s/step | CPU, float32 | TPU v5e, bfloat16 |",
        "|---:|---|---:|---:|---:|---:|",
        *map(line, rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
