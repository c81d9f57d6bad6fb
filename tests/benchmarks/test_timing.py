"""The timing module of the benchmarks: who is called when, and what is written."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def timing():
    path = Path(__file__).parents[2] / "benchmarks" / "timing.py"
    spec = importlib.util.spec_from_file_location("timing", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_cases_are_warmed_up_then_timed_in_turn(timing, monkeypatch):
    calls, waited, clock = [], [], [0.0]
    cost = {"slow": [9, 9, 4, 5, 9], "fast": [9, 9, 1, 2, 3]}

    def case(name):
        def run():
            clock[0] += cost[name][calls.count(name)]
            calls.append(name)
            return name

        return run

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(timing.jax, "block_until_ready", waited.append)
    result = timing.measure({n: case(n) for n in cost}, warmup=2, repeats=3)
    assert calls == waited == ["slow"] * 2 + ["fast"] * 2 + ["slow", "fast"] * 3
    slow, fast = result["slow"], result["fast"]
    assert (slow.median_s, slow.min_s, slow.max_s, slow.calls) == (5, 4, 9, 3)
    assert (fast.median_s, fast.iqr_s) == (2, 2)
    assert timing.ratios(result, to="slow") == {"slow": 1, "fast": 2.5}


def test_results_say_what_they_were_taken_on(timing, tmp_path):
    path = tmp_path / "results" / "one.json"
    once = timing.measure({"nothing": lambda: None}, repeats=1)
    timing.save(path, {"rows": [{"time": once["nothing"]}]})
    content = json.loads(path.read_text())
    assert content["rows"][0]["time"].keys() == {"median_s", "min_s", "max_s", "iqr_s", "calls"}
    assert content["machine"]["platform"] == "cpu" and content["machine"]["devices"] == 8
    assert {"python", "jax", "jaxlib", "flax", "numpy", "cpu_cores"} <= content["machine"].keys()
