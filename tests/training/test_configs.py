"""Every file in configs/ builds its full-size training step, without weights or data."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlclip_jax.train import load_config
from mlclip_jax.training.build import check_settings
from mlclip_jax.training.config import parse_config
from mlclip_jax.training.dry_run import abstract_step

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_config_dry_run(path):
    config = parse_config(load_config(str(path)))
    check_settings(config)
    for plan, _, (_, metrics) in abstract_step(config):
        assert plan.steps >= 0 and metrics["loss"].shape == ()
