"""The configuration of one training run as frozen dataclasses.

A config file returns a dictionary; `parse_config` turns it into a `TrainConfig` once, so that a
key that nothing reads is an error that names it. `config.method` and `config.data` stay mappings
here: the method's and the dataset's own dataclasses check them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mlclip_jax.data.features import CacheConfig
from mlclip_jax.data.pipeline import steps_per_epoch
from mlclip_jax.data.sampling import Sampling
from mlclip_jax.errors import UserError
from mlclip_jax.fields import from_mapping, plain, unknown_key

# Keys that a stage may override; everything else belongs to the whole run.
_STAGE_KEYS = ("method", "optim", "batch_size", "sampling", "duration", "ema_decay", "cache")


@dataclass(frozen=True)
class BackboneConfig:
    """Which CLIP to start from.

    Attributes:
      name: preset name, packaged mini, folder, or hub id.
      revision: hub revision; None takes the default one.
      dtype: compute type of the towers (parameters stay float32).
      image_size: side of the images in pixels; None keeps the checkpoint's (positional
        embeddings are interpolated otherwise).
      image_norm: statistics that pixels are normalised with, on the device: "clip", or "imagenet"
        as MKT and LMPT do; None keeps the checkpoint's.
      weights: "random" builds the preset `name` with fresh weights.
      remat: recompute the towers' blocks in the backward pass: less memory, more time.
      class_chunk: encode at most this many labels at a time, recomputed in the backward pass, so
        that memory hardly grows with their number; a multiple of the devices. None: all at once.
    """

    name: str = "clip-mini"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    image_size: int | None = None
    image_norm: Literal["clip", "imagenet"] | None = None
    weights: Literal["pretrained", "random"] = "pretrained"
    remat: bool = False
    class_chunk: int | None = None


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, learning-rate schedule and decay of one stage.

    Weight decay is coupled (added to the gradient, as torch's Adam and SGD do) for "adam" and
    "sgd", decoupled for "adamw". It applies to parameters of two or more dimensions.

    Attributes:
      name: "adamw", "adam" or "sgd".
      learning_rate: peak learning rate.
      schedule: "constant", "cosine", "onecycle" or "plateau".
      schedule_duration: length the schedule is laid out for where it differs from the stage's
        (a run stopped before its schedule ends); None takes the stage's.
      schedule_unit: "epoch" holds the rate of "cosine" constant within each epoch.
      warmup: length of the linear warm-up from 0 (not for "onecycle", which has its own).
      warmup_rate: constant rate of the warm-up in place of the linear one; None rises linearly.
      min_learning_rate: where "cosine" ends and below which "plateau" does not go.
      pct_start, div_factor, final_div_factor, cycle_momentum: as torch's OneCycleLR names them;
        cycle_momentum moves Adam's beta1 from .95 to .85 and back.
      plateau_factor, plateau_patience: "plateau" multiplies the rate by the factor once the
        selection metric has not improved for more than `patience` evaluations.
      weight_decay: strength; 0 turns it off.
      momentum: of "sgd".
      beta1, beta2, eps: of "adam" and "adamw".
      clip_norm: largest global norm of the gradient; None does not clip.
      groups: learning-rate multipliers as (regex, multiplier) pairs or a mapping; the first
        pattern found in the "/"-joined path of a parameter decides.
    """

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine", "onecycle", "plateau"] = "cosine"
    schedule_duration: str | None = None
    schedule_unit: Literal["step", "epoch"] = "step"
    warmup: str = "0 steps"
    warmup_rate: float | None = None
    min_learning_rate: float = 0.0
    pct_start: float = 0.2
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    cycle_momentum: bool = True
    plateau_factor: float = 0.1
    plateau_patience: int = 5
    weight_decay: float = 0.0
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = None
    groups: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class EvalConfig:
    """When and on what to evaluate.

    Attributes:
      every: interval; also evaluated at the end of every stage.
      batch_size: images in an evaluation batch.
      splits: names of the evaluation splits; the first one selects the best checkpoint.
      metric: name of the metric that selects.
    """

    every: str = "1 epochs"
    batch_size: int = 100
    splits: tuple[str, ...] = ("validation", "test")
    metric: str = "mAP"


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and how many of the latest checkpoints to keep (the best are always kept)."""

    every: str = "1 epochs"
    keep: int = 1


@dataclass(frozen=True)
class StageConfig:
    """One stage: what trains, how and for how long; one stage is the ordinary case.

    Attributes:
      name: label of the stage in metrics and messages.
      method: fields of the method's own Config, `name` among them.
      optim: optimizer of the stage.
      batch_size: images in a batch over all devices.
      duration: length as "N steps", "N epochs" or "N examples".
      ema_decay: decay of the moving average of the weights per step; None keeps none.
      cache: train and evaluate from image features that are computed once; None reads images.
      sampling: "uniform" shows every training image once an epoch; "class_aware" shows each class
        about as often, whatever its share of the images (`data.sampling`), as many images an epoch.
    """

    name: str
    method: Mapping[str, Any]
    optim: OptimConfig
    batch_size: int
    duration: str
    ema_decay: float | None
    cache: CacheConfig | None = None
    sampling: Sampling = "uniform"


@dataclass(frozen=True)
class TrainConfig:
    """A whole run.

    Attributes:
      paper: what the authors published for this row, in per cent by name of the protocol's figure
        ("mAP"); shown in the report beside the run's own.
      source: the plain dictionary it came from, kept for the checkpoint.
    """

    seed: int
    backbone: BackboneConfig
    data: Mapping[str, Any]
    stages: tuple[StageConfig, ...]
    eval: EvalConfig
    checkpoint: CheckpointConfig
    log_every: str
    compilation_cache: bool
    paper: Mapping[str, float]
    source: Mapping[str, Any]


@dataclass(frozen=True)
class _Root:
    """The keys of a config file with their defaults."""

    method: Mapping[str, Any]
    data: Mapping[str, Any]
    seed: int = 0
    backbone: BackboneConfig = BackboneConfig()
    batch_size: int = 32
    sampling: Sampling = "uniform"
    duration: str = "1 epochs"
    optim: Mapping[str, Any] | None = None
    ema_decay: float | None = None
    cache: Mapping[str, Any] | None = None
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log_every: str = "10 steps"
    compilation_cache: bool = True
    paper: Mapping[str, Any] | None = None
    stages: tuple[Mapping[str, Any], ...] = ()


def parse_config(config: Mapping[str, Any]) -> TrainConfig:
    """The typed configuration of `config` (a ConfigDict, or the dictionary of a checkpoint).

    Raises:
      UserError: an unknown key, a wrong type or an impossible value, named.
    """
    source = plain(config)
    root = from_mapping(_Root, source)
    for key in ("method", "data"):
        if not isinstance(getattr(root, key).get("name"), str):
            raise UserError(f"config key '{key}.name' is missing: it says which {key} to use")
    base = {key: getattr(root, key) for key in _STAGE_KEYS}
    overrides = root.stages or ({},)
    _stage(base, {}, 0)  # so that an error in the run's own settings is named as theirs
    stages = tuple(_stage(base, override, index) for index, override in enumerate(overrides))
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise UserError(f"config key 'stages' repeats a stage name: {', '.join(names)}")
    for where, duration in (
        ("eval.every", root.eval.every),
        ("checkpoint.every", root.checkpoint.every),
        ("log_every", root.log_every),
    ):
        parse_duration(duration, where)
    _positive("eval.batch_size", root.eval.batch_size)
    _positive("checkpoint.keep", root.checkpoint.keep)
    if root.backbone.class_chunk is not None:
        _positive("backbone.class_chunk", root.backbone.class_chunk)
    if not root.eval.splits:
        raise UserError("config key 'eval.splits' is empty: name at least one split")
    return TrainConfig(
        seed=root.seed,
        backbone=root.backbone,
        data=root.data,
        stages=stages,
        eval=root.eval,
        checkpoint=root.checkpoint,
        log_every=root.log_every,
        compilation_cache=root.compilation_cache,
        paper=_paper(root.paper or {}),
        source=source,
    )


def _paper(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Published figures in per cent, checked."""
    for name, value in numbers.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= 100:
            raise UserError(
                f"config key 'paper.{name}' must be a number between 0 and 100, not {value!r}"
            )
    return {name: float(value) for name, value in numbers.items()}


def _stage(base: Mapping[str, Any], override: Mapping[str, Any], index: int) -> StageConfig:
    """The stage that `override` makes of the run's own settings."""
    where = f"stages[{index}]" if override else ""
    for key in override:
        if key not in (*_STAGE_KEYS, "name"):
            raise unknown_key(key, (*_STAGE_KEYS, "name"), where)
    merged = {**base, **{key: override[key] for key in _STAGE_KEYS if key in override}}
    for key in ("method", "optim"):
        merged[key] = {**(base[key] or {}), **(override.get(key) or {})}
    if isinstance(merged["optim"].get("groups"), Mapping):
        merged["optim"]["groups"] = tuple(merged["optim"]["groups"].items())
    prefix = f"{where}." if where else ""
    optim = from_mapping(OptimConfig, merged["optim"], f"{prefix}optim")
    if merged["cache"] is not None:
        merged["cache"] = from_mapping(CacheConfig, merged["cache"], f"{prefix}cache")
    default_name = "train" if not override else f"stage{index + 1}"
    stage = from_mapping(
        StageConfig,
        {**merged, "optim": asdict(optim), "name": override.get("name", default_name)},
        where,
    )
    _positive(f"{prefix}batch_size", stage.batch_size)
    if stage.ema_decay is not None and not 0.0 <= stage.ema_decay < 1.0:
        raise UserError(f"config key '{prefix}ema_decay' must lie in [0, 1), not {stage.ema_decay}")
    for name in ("learning_rate", "clip_norm"):
        value = getattr(optim, name)
        if value is not None and not value > 0.0:
            raise UserError(f"config key '{prefix}optim.{name}' must be above 0, not {value}")
    parse_duration(stage.duration, f"{prefix}duration")
    parse_duration(optim.warmup, f"{prefix}optim.warmup")
    if optim.warmup_rate is not None and (
        optim.schedule == "onecycle" or not parse_duration(optim.warmup)[0]
    ):
        raise UserError(
            f"config key '{prefix}optim.warmup_rate' has no effect without '{prefix}optim.warmup' "
            "(and 'onecycle' has a warm-up of its own)"
        )
    if optim.schedule_duration is not None:
        parse_duration(optim.schedule_duration, f"{prefix}optim.schedule_duration")
    return stage


def _positive(where: str, value: int) -> None:
    if value < 1:
        raise UserError(f"config key '{where}' must be at least 1, not {value}")


def parse_duration(duration: str, where: str = "duration") -> tuple[float, str]:
    """(3.0, "epochs") of "3 epochs", checked.

    Raises:
      UserError: not a number followed by steps, epochs or examples.
    """
    words = duration.split() if isinstance(duration, str) else []
    try:
        amount = float(words[0])
        unit = words[1].rstrip("s") + "s"
        valid = len(words) == 2 and math.isfinite(amount) and amount >= 0
    except (IndexError, ValueError):
        valid = False
    if not valid or unit not in ("steps", "epochs", "examples"):
        raise UserError(
            f"config key '{where}': {duration!r} is no length; "
            "write 'N steps', 'N epochs' or 'N examples'"
        )
    return amount, unit


def to_steps(duration: str, *, batch_size: int, num_examples: int, where: str = "duration") -> int:
    """Number of steps in `duration`, at least 1 unless it is 0; epochs may be fractions.

    Args:
      duration: "N steps", "N epochs" or "N examples".
      batch_size: images in a batch over all devices.
      num_examples: training examples.
      where: config key, for messages.
    """
    amount, unit = parse_duration(duration, where)
    if unit == "epochs":
        amount *= steps_per_epoch(batch_size=batch_size, num_examples=num_examples)
    elif unit == "examples":
        amount = math.ceil(amount / batch_size)
    return max(round(amount), 1) if amount else 0
