"""Timing for all benchmarks: warm-up, synchronise, interleave, median and spread, JSON.

Machines are noisy, so figures that are compared are measured in turn within one run and given as
ratios. Imports neither grain nor ml_collections: it runs on a bare accelerator machine.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median, minimum, maximum and the interquartile range, over `calls`."""

    median_s: float
    min_s: float
    max_s: float
    iqr_s: float
    calls: int


def measure(
    cases: Mapping[str, Callable[[], Any]], *, warmup: int = 2, repeats: int = 9
) -> dict[str, Timing]:
    """Time each case, in turn, so that a slow minute falls on all of them alike.

    Args:
        cases: name -> function without arguments; what it returns is waited for.
        warmup: calls before the clock counts (compilation among them).
        repeats: timed calls of each case.
    """
    for run in cases.values():
        for _ in range(warmup):
            jax.block_until_ready(run())
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, run in cases.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    return {name: _summary(values) for name, values in seconds.items()}


def _summary(values: list[float]) -> Timing:
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return Timing(
        statistics.median(values),
        min(values),
        max(values),
        quartiles[2] - quartiles[0],
        len(values),
    )


def ratios(timings: Mapping[str, Timing], *, to: str) -> dict[str, float]:
    """How many times faster than `to` each case ran, by medians of the same run."""
    return {name: timings[to].median_s / timing.median_s for name, timing in timings.items()}


def machine() -> dict[str, Any]:
    """What the figures were taken on: device, cores, versions."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cpu_cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
    }


def save(path: Path, results: Mapping[str, Any]) -> None:
    """Write results as JSON, timings as plain fields, the machine beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), **results}
    text = json.dumps(content, indent=2, default=lambda value: asdict(value))
    path.write_text(text + "\n")
