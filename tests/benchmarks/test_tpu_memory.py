"""The benchmark of TPU memory: numbers of chips that a topology does not have are named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from jax.experimental import topologies


@pytest.mark.parametrize("number", ["9", "0", "-1", "all", ""])
def test_chips_that_there_are_not(monkeypatch, number):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import tpu_memory

    found = SimpleNamespace(devices=list(range(8)))
    monkeypatch.setattr(topologies, "get_topology_desc", lambda **_: found)
    with pytest.raises(SystemExit, match="v5e:2x4 has 8 chips, give 1 to those"):
        tpu_memory.measure("config.py", f"v5e:2x4:{number}")
