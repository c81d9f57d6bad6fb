"""What the configs of prompt methods and baselines on Scenes share: data, length and optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from mlclip_jax.spec import parse_arg


def parse(arg: str | None, **own: Any) -> SimpleNamespace:
    """The arguments that all of these configs know, with those of one (and its defaults)."""
    return parse_arg(arg, **({"backbone": "clip-mini", "view": "full", "seed": 0} | own))


def scenes(
    arg: SimpleNamespace, method: Mapping[str, Any], *, rate: float, num_train: int = 2048
) -> ConfigDict:
    """The settings of a run: 256 steps of Adam, whatever share of the images a view leaves.

    Args:
      arg: from `parse`.
      method: `config.method`.
      rate: largest learning rate.
      num_train: scenes of which the view takes some.
    """
    config = ConfigDict()
    config.seed = arg.seed
    config.backbone = {"name": arg.backbone}
    config.method = dict(method)
    config.data = {"name": "scenes", "train_view": arg.view, "num_train": num_train}
    config.batch_size = 64
    config.duration = "256 steps"
    config.optim = {"name": "adam", "learning_rate": rate, "warmup": "20 steps"}
    config.ema_decay = 0.98
    config.eval = {"every": "64 steps"}
    config.checkpoint = {"every": "64 steps"}
    return config
