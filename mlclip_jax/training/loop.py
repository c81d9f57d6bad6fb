"""Training: everything from a configuration to checkpoints and metrics, in execution order."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from mlclip_jax.data import registry
from mlclip_jax.errors import UserError, make_folder
from mlclip_jax.evaluation.evaluator import metric_classes
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.spec import unknown
from mlclip_jax.training.build import (
    build_method,
    check_backbone,
    check_settings,
    image_size,
    load_backbone,
    name_features,
    plan_stage,
    with_absolute_paths,
    with_leaves,
)
from mlclip_jax.training.captions import reads_no_images, with_captions
from mlclip_jax.training.checkpoint import (
    BACKBONE_PREFIX,
    Checkpoints,
    check_data,
    fingerprints,
    saved_frozen,
)
from mlclip_jax.training.config import StageConfig, TrainConfig, parse_config
from mlclip_jax.training.feature_cache import cache_features
from mlclip_jax.training.mesh import make_mesh, replicate, shard_labels
from mlclip_jax.training.stage import Interval, Run, StageRun
from mlclip_jax.training.step import all_leaves, init_state
from mlclip_jax.training.table import parameter_table
from mlclip_jax.training.writers import MetricWriter

#: What was read from files: `registry.DataSplits.report`.
DATA_FILE = "data.txt"


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
      workdir: directory of the run.
      step: global step reached.
      metrics: last evaluation: metrics by split, then "raw" and "ema".
    """

    workdir: Path
    step: int
    metrics: dict[str, dict[str, dict[str, float]]]


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX is told another place."""
    if jax.config.jax_compilation_cache_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(base) / "mlclip_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def fit(
    config: TrainConfig | Mapping[str, Any],
    workdir: str | Path,
    *,
    mesh: Mesh | None = None,
    quiet: bool = False,
) -> Result:
    """Trains what `config` says in `workdir`, continuing from its latest checkpoint.

    An interrupted run that is started again gives the same weights and metrics, bit for bit, as
    one that was not interrupted.

    Args:
      config: a config dictionary or its parsed form.
      workdir: gets checkpoints, `metrics.jsonl`, TensorBoard files and, of data that are read from
        files, `data.txt`, which says what they are.
      mesh: devices to train on; None takes all.
      quiet: print nothing.

    Raises:
      UserError: the configuration, the data or the checkpoint cannot be used, or the loss is no
        longer finite.
    """
    config = config if isinstance(config, TrainConfig) else parse_config(config)
    check_settings(config)
    config = with_absolute_paths(config)
    workdir = Path(workdir)
    make_folder(workdir)
    main = jax.process_index() == 0
    quiet = quiet or not main

    # ---- Devices -----------------------------------------------------------------------------
    if config.compilation_cache:
        use_compilation_cache()
    mesh = make_mesh() if mesh is None else mesh

    # ---- Backbone and data -------------------------------------------------------------------
    backbone = load_backbone(config.backbone, seed=config.seed)
    # It waits on the host: the devices hold only the copy that a stage works on.
    nnx.update(backbone.clip, jax.device_get(nnx.state(backbone.clip)))
    data = registry.load(
        config.data,
        image_size=image_size(config, backbone.clip.config),
        splits=config.eval.splits,
        name_features=name_features(backbone),
    )
    metrics = metric_classes(data.space)
    if config.eval.metric not in metrics:
        raise unknown("metric in config key 'eval.metric':", config.eval.metric, metrics)
    found = fingerprints(data)

    # ---- Checkpoints -------------------------------------------------------------------------
    with Checkpoints(workdir, keep=config.checkpoint.keep) as checkpoints:
        steps = checkpoints.steps()
        meta = checkpoints.meta(steps[-1]) if steps else None
        if meta is not None:
            if "converted" in meta:
                raise UserError(
                    f"{workdir} holds a checkpoint converted from {meta['converted']['file']}, "
                    "without an optimizer's state: it can be evaluated and served; train in "
                    "another workdir"
                )
            check_backbone(meta, backbone, config.backbone.name)
            data = with_trained_spaces(data, meta, workdir)
            known = meta.get("data")  # None: of a time that noted no fingerprints
            check_unchanged(parse_config(meta["config"]), config, workdir, paths=not known)
            check_data(known or {}, found, workdir)
            changed = differences(meta["config"], config.source)
            if changed and not quiet:
                print(f"the configuration differs from the checkpoint's in: {', '.join(changed)}")
        writer = MetricWriter(workdir, step=steps[-1] if steps else 0, enabled=main)
        run = Run(config, workdir, mesh, backbone, data, checkpoints, writer, quiet, found)
        if report := data.report():
            run.say(data.report(short=True))
            if main:
                (workdir / DATA_FILE).write_text(f"{report}\n", encoding="utf-8")

        # ---- Stages --------------------------------------------------------------------------
        try:
            for index, stage in enumerate(config.stages):
                if meta is None or index >= meta["stage"]:
                    run_stage(run, index, stage, meta if meta and index == meta["stage"] else None)
        finally:
            writer.close()
        return Result(workdir, run.step, run.metrics)


def with_trained_spaces(
    data: registry.DataSplits, meta: Mapping[str, Any], workdir: Path
) -> registry.DataSplits:
    """`data` with the label spaces of the checkpoint that training is to go on from.

    Raises:
      UserError: it was trained on other labels or groups.
    """
    of_training = meta.get("train_space")  # None: those of evaluation
    if (of_training is None) == (data.train_space is None):
        space = trained_space(meta["label_space"], data.space, workdir)
        train = of_training and trained_space(of_training, data.train_space, workdir)
        return replace(data, space=space, train_space=train)
    raise other_labels(workdir)


def trained_space(saved: Mapping[str, Any], space: LabelSpace, workdir: Path) -> LabelSpace:
    """The label space that a checkpoint holds, to go on with the labels in `space`.

    Clusters are those of the checkpoint: another device might draw them differently.

    Raises:
      UserError: it is of other labels or groups.
    """
    trained = LabelSpace.from_json(saved)
    clustered = [s.taxonomy is not None and not s.taxonomy.named for s in (trained, space)]
    known = replace(space, taxonomy=trained.taxonomy) if all(clustered) else space
    if known.to_json() != trained.to_json():
        raise other_labels(workdir)
    return known


def other_labels(workdir: Path) -> UserError:
    """What is said of a workdir whose run had other labels."""
    return UserError(
        f"the checkpoint in {workdir} was trained on other labels or groups: use another workdir"
    )


def check_unchanged(
    old: TrainConfig, new: TrainConfig, workdir: Path, *, paths: bool = True
) -> None:
    """Raises unless a run that goes on sees the same examples and trains the same method.

    Lengths, intervals and the optimizer's settings may change, and unless `paths` is set the places
    of the data, which are then known by their fingerprints.

    Raises:
      UserError: naming the keys with their old and new values.
    """
    changed = differences(check_settings(old, paths=paths), check_settings(new, paths=paths))
    if changed:
        values = "; ".join(f"{key} was {a!r} and is {b!r}" for key, (a, b) in changed.items())
        raise UserError(
            f"the configuration differs from that of the checkpoint in {workdir}: {values}. Put "
            "the old values back to go on, or use another workdir"
        )


def differences(old: Any, new: Any, where: str = "") -> dict[str, tuple[Any, Any]]:
    """Both values by dotted key where two plain configurations differ; tuples equal lists."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        prefix = f"{where}." if where else ""
        keys = sorted(old.keys() | new.keys())
        inner = [(f"{prefix}{key}", old.get(key), new.get(key)) for key in keys]
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        inner = [(f"{where}[{i}]", *pair) for i, pair in enumerate(zip(old, new, strict=True))]
    else:
        return {} if old == new else {where: (old, new)}
    return {key: pair for at, a, b in inner for key, pair in differences(a, b, at).items()}


def run_stage(run: Run, index: int, stage: StageConfig, meta: Mapping[str, Any] | None) -> None:
    """Runs one stage, from the checkpoint that `meta` describes or from its start."""
    if meta is not None:
        run.step = meta["step"] - meta["step_in_stage"]
        run.trained_before = set(meta["trained_before"])
        run.metrics = meta["metrics"]
    live = start_stage(run, index, stage, meta)
    run.step += live.done
    if live.done < live.plan.steps:
        live.train()
    elif meta is None:
        live.finish_step()
    run.leaves = all_leaves(live.state, live.frozen)
    changed = {*live.state["trainable"], *live.state["batch_stats"]}
    run.trained_before |= {path for path in changed if path.startswith(BACKBONE_PREFIX)}


def start_stage(
    run: Run, index: int, stage: StageConfig, meta: Mapping[str, Any] | None
) -> StageRun:
    """A stage on the devices, whose values only `state` and `frozen` hold from here on."""
    config, mesh = run.config, run.mesh

    # ---- Method, optimizer, step -----------------------------------------------------------------
    space, tokenizer = run.data.train_space or run.data.space, run.backbone.tokenizer
    method = build_method(stage, run.backbone, space, seed=config.seed)
    data = with_captions(run.data, method, tokenizer, say=run.say)
    host_labels = method.label_inputs(space, tokenizer, multiple_of=mesh.size)
    eval_labels = None
    if data.train_space is not None:
        eval_labels = method.label_inputs(data.space, tokenizer, multiple_of=mesh.size)
    if method.needs_counts():
        host_labels = host_labels.with_counts(data.train.class_counts(), len(data.train))
    plan = plan_stage(
        stage,
        method,
        host_labels,
        classes=len(space),
        mesh=mesh,
        num_examples=len(data.train),
        first_step=run.step,
        augment_flip=data.config.flip and stage.cache is None and not reads_no_images(method),
    )
    if plan.steps == 0 and len(config.stages) > 1:
        raise UserError(f"stage '{stage.name}' has no steps: leave it out or make it longer")
    start = method.starting_leaves(run.leaves.keys()) if meta is None else {}
    parts = with_leaves(plan.parts, {**start, **run.leaves}, strict=False)
    state = init_state(
        parts, plan.optimizer, seed=config.seed, step=run.step, ema=stage.ema_decay is not None
    )
    state, frozen = replicate(state, mesh), replicate(parts.frozen, mesh)
    run.say(parameter_table(parts, stage.optim.groups))
    run.leaves = {}
    plan = replace(plan, parts=replace(parts, trainable={}, frozen={}, moving={}))

    # ---- Resume ----------------------------------------------------------------------------------
    done, interval = 0, Interval()
    if meta is not None:
        extra = saved_frozen(frozen, run.trained_before)
        restored = run.checkpoints.restore_state(meta["step"], state, extra)
        state, done = restored.state, meta["step_in_stage"]
        frozen.update({path: restored.leaves[path] for path in extra})
        interval = Interval(**meta["interval"])
        if done < plan.steps:
            run.say(f"continuing stage '{stage.name}' after {done} of {plan.steps} steps")
        else:
            asked = f"{done} steps are done, {plan.steps} asked for"
            run.say(f"stage '{stage.name}' is finished: {asked}")
    labels = shard_labels(host_labels, mesh)
    eval_labels = labels if eval_labels is None else shard_labels(eval_labels, mesh)

    # ---- Cached image features -------------------------------------------------------------------
    if stage.cache is not None and (meta is None or done < plan.steps):
        data = cache_features(run, data, stage, method, plan.parts, state, frozen)
    return StageRun(
        run, index, stage, plan, state, frozen, labels, eval_labels, interval, done, data
    )
