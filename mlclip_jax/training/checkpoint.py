"""Checkpoints: everything that differs from the named backbone, and how to continue.

A checkpoint of step N in `<workdir>/checkpoints/N` holds arrays (Orbax) and a JSON description.
Arrays: step, key, trained leaves, optimizer state, moving average, BatchNorm statistics that move,
and the frozen leaves that the backbone's files do not hold (other modules, and backbone leaves
that an earlier stage trained). The backbone itself is there by name and digest only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from mlclip_jax.data.registry import DataSplits
from mlclip_jax.data.sources import ImageSource
from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.training.config import TrainConfig
from mlclip_jax.training.step import Leaves, State

FOLDER = "checkpoints"
BACKBONE_PREFIX = "clip/"
# Packages whose versions a checkpoint notes.
_VERSIONED = ("mlclip-jax", "jax", "flax", "optax", "orbax-checkpoint")


@dataclass(frozen=True)
class Restored:
    """A restored checkpoint.

    Attributes:
      step: global step.
      meta: the JSON description.
      state: the training state (None where only leaves were asked for).
      leaves: model leaves that differ from the backbone, by path.
    """

    step: int
    meta: dict[str, Any]
    state: State | None
    leaves: Leaves


def describe(
    config: TrainConfig,
    space: LabelSpace,
    digest: str,
    train_space: LabelSpace | None = None,
    data: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What every description says of its run: settings, labels, data, backbone's weights, versions.

    Args:
      config: of the run.
      space: labels of evaluation.
      digest: of the backbone's weights.
      train_space: labels of training where they are others.
      data: from `fingerprints`; None: of a run that does not go on.
    """
    return {
        "data": data,
        "config": config.source,
        "label_space": space.to_json(),
        "train_space": train_space and train_space.to_json(),
        "backbone": {"name": config.backbone.name, "digest": digest},
        "versions": {name: metadata.version(name) for name in _VERSIONED},
    }


def fingerprints(data: DataSplits) -> dict[str, dict[str, Any]]:
    """What tells the examples of training and of each evaluation from others, wherever they are.

    Examples that are drawn, not read from files, are known by their settings and left out.
    """
    sources = {"training": data.train}
    sources |= {f"evaluation on {split}": source for split, source in data.evals.items()}
    return {
        use: source.fingerprint()
        for use, source in sources.items()
        if isinstance(source, ImageSource)
    }


def check_data(
    saved: Mapping[str, Mapping[str, Any]], found: Mapping[str, Mapping[str, Any]], workdir: Path
) -> None:
    """Raises unless a run that goes on has the examples that it had before.

    Args:
      saved, found: `fingerprints` in the checkpoint and of the data now.
      workdir: named in the message.

    Raises:
      UserError: saying what has changed.
    """
    for use in sorted(saved.keys() & found.keys(), reverse=True):  # training first
        then, now = saved[use], found[use]
        if changed := _changed(then, now):
            raise UserError(
                f"{changed} of {use} changed since the run in {workdir} began: put the old data "
                "back to go on, or use another workdir"
            )


def _changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What differs between two fingerprints of one split, in words."""
    if then["count"] != now["count"]:
        return f"the number of images ({then['count']:,} then, {now['count']:,} now)"
    if then["images"] != now["images"]:
        return f"the names or the order of the {now['count']:,} images"
    for what in ("labels", "captions"):
        if then[what] != now[what]:
            return f"the {what} of the {now['count']:,} images"
    for key in sorted(then["files"].keys() & now["files"].keys()):
        if then["files"][key] != now["files"][key]:
            return f"the content of the image {key}"
    return None


def saved_frozen(frozen: Leaves, trained_before: set[str]) -> Leaves:
    """The frozen leaves that a checkpoint has to hold: what the backbone's files do not give."""
    return {
        path: leaf
        for path, leaf in frozen.items()
        if not path.startswith(BACKBONE_PREFIX) or path in trained_before
    }


def _metric(weights: str) -> Any:
    """Reads the selection metric of raw or averaged weights; a NaN is the worst."""

    def read(metrics: Mapping[str, float]) -> float:
        value = metrics.get(weights, -math.inf)
        return -math.inf if math.isnan(value) else value

    return read


def _numbers(tree: Any) -> Any:
    """JSON-ready copy: numpy scalars become Python's."""
    if isinstance(tree, Mapping):
        return {str(key): _numbers(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_numbers(value) for value in tree]
    return tree.item() if isinstance(tree, np.generic) else tree


class Checkpoints:
    """The checkpoints of a working directory: the latest and the best are kept.

    The best are chosen twice, by the metric of the raw and of the averaged weights.

    Args:
      workdir: directory of the run.
      keep: number of latest checkpoints to keep.
    """

    def __init__(self, workdir: str | Path, *, keep: int = 1) -> None:
        self.directory = Path(workdir).absolute() / FOLDER
        kept = [policies.LatestN(keep)]
        for weights in ("raw", "ema"):
            kept.append(
                policies.BestN(
                    get_metric_fn=_metric(weights), n=1, keep_checkpoints_without_metrics=False
                )
            )
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept),
                best_fn=_metric("raw"),  # without it Orbax does not store metrics
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def wait(self) -> None:
        """Waits for saves under way."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for saves under way and ends."""
        self.wait()
        self._manager.close()

    def steps(self) -> list[int]:
        """Steps of the checkpoints that exist, in order."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: State,
        frozen: Leaves,
        meta: Mapping[str, Any],
        metrics: Mapping[str, float] | None,
    ) -> None:
        """Saves in the background; the arrays are copied before this returns.

        Args:
          step: global step.
          state: training state.
          frozen: from `saved_frozen`.
          meta: JSON description.
          metrics: selection metric by "raw" and "ema", where this step was evaluated.
        """
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave({**state, "frozen": frozen}),
                meta=ocp.args.JsonSave(_numbers(meta)),
            ),
            metrics=_numbers(metrics or {}),
        )
        if not saved:
            raise RuntimeError(f"checkpoint {step} exists already in {self.directory}")

    def best_step(self, weights: str) -> int | None:
        """Step of the best evaluated checkpoint by the metric of these weights, or None."""
        read = _metric(weights)
        scores = {}
        for step in self.steps():
            with self._reading(step):
                metrics = self._manager.metrics(step)
            if weights in (metrics or {}):
                scores[step] = read(metrics)
        return max(scores, key=lambda step: scores[step]) if scores else None

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON description of a checkpoint.

        Raises:
          UserError: it is damaged, or not one of ours.
        """
        with self._reading(step):
            items = self._manager.restore(
                step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
            )
            meta = items["meta"]
            if not meta.keys() >= {"step_in_stage", "label_space", "backbone"}:
                raise KeyError("no description of a training run")
            return meta

    @contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Makes one line of what Orbax raises on checkpoints that are damaged or of others."""
        try:
            yield
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            raise UserError(
                f"checkpoint {step} in {self.directory} cannot be read: it is damaged, or not of a "
                f"training run ({type(error).__name__}); delete its folder to go on from the one "
                "before, or use another workdir"
            ) from error

    def restore_state(self, step: int, state: State, frozen: Leaves) -> Restored:
        """The state of a checkpoint, shaped and placed like `state` and `frozen`.

        Args:
          step: of the checkpoint.
          state: arrays or shapes with shardings, as the stage starts.
          frozen: likewise for the frozen leaves that are saved.

        Raises:
          UserError: leaves are missing, unexpected or of other shapes: all are listed.
        """
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            {**state, "frozen": frozen},
        )
        self._check(step, target)
        arguments = ocp.checkpoint_utils.construct_restore_args(target)
        restored = self._restore(step, item=target, restore_args=arguments)
        frozen = restored.pop("frozen")
        leaves = {**frozen, **restored["trainable"], **restored["batch_stats"]}
        return Restored(step, self.meta(step), restored, leaves)

    def restore_leaves(self, step: int, weights: str) -> Restored:
        """The model leaves of a checkpoint as numpy arrays: what to put into the backbone.

        Args:
          step: of the checkpoint.
          weights: "raw" or "ema".

        Raises:
          UserError: averaged weights are asked for and the run kept none.
        """
        tree = self._tree(step)
        if weights == "ema" and not tree["ema"]:
            raise UserError(
                f"{self.directory.parent} holds no averaged weights: the run had no ema_decay; "
                "use the raw ones"
            )
        parts = ["frozen", "ema"] if weights == "ema" else ["frozen", "trainable", "batch_stats"]
        wanted = {part: tree[part] for part in parts if tree[part]}
        if not wanted:
            return Restored(step, self.meta(step), None, {})
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        restored = self._restore(step, item=wanted, restore_args=arguments, partial_restore=True)
        leaves = {path: leaf for part in parts for path, leaf in restored.get(part, {}).items()}
        return Restored(step, self.meta(step), None, leaves)

    def _tree(self, step: int) -> dict[str, Any]:
        """Shapes of all arrays in a checkpoint, once their files are seen to be there.

        Tensorstore prints a traceback from its threads for every array it does not find.
        """
        with self._reading(step):
            folder = self.directory / str(step) / "state"
            for manifest in (folder / "manifest.ocdbt", *folder.glob("*/manifest.ocdbt")):
                if not manifest.stat().st_size or not any((manifest.parent / "d").iterdir()):
                    raise FileNotFoundError(f"no arrays in {manifest.parent}")
            return dict(self._manager.item_metadata(step)["state"].tree)

    def _restore(self, step: int, **arguments: Any) -> dict[str, Any]:
        """Arrays of a checkpoint."""
        state = ocp.args.PyTreeRestore(**arguments)
        with self._reading(step):
            return self._manager.restore(step, args=ocp.args.Composite(state=state))["state"]

    def _check(self, step: int, target: Any) -> None:
        """Raises one error that lists every difference between a checkpoint and `target`."""

        def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
            leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
            return {_name(path): tuple(leaf.shape) for path, leaf in leaves}

        saved, wanted = shapes(self._tree(step)), shapes(target)
        problems = [f"missing {name}" for name in sorted(wanted.keys() - saved.keys())]
        problems += [f"unexpected {name}" for name in sorted(saved.keys() - wanted.keys())]
        problems += [
            f"{name} is {list(saved[name])}, not {list(wanted[name])}"
            for name in sorted(saved.keys() & wanted.keys())
            if saved[name] != wanted[name]
        ]
        if problems:
            raise UserError(
                f"checkpoint {step} in {self.directory} does not fit this configuration: "
                f"{'; '.join(problems)}. Continue with the configuration that wrote it, or use "
                "another workdir"
            )


def _name(path: tuple[Any, ...]) -> str:
    """A key path as text, alike for the named tuples of optax and what Orbax makes of them."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def open_checkpoints(workdir: str | Path) -> Checkpoints:
    """The checkpoints of a finished or running run, for reading.

    Raises:
      UserError: there is no checkpoint.
    """
    directory = Path(workdir) / FOLDER
    if not directory.is_dir() or not any(path.name.isdigit() for path in directory.iterdir()):
        raise UserError(
            f"no checkpoint in {directory}: train first with "
            f"python -m mlclip_jax.train --config=... --workdir={workdir}"
        )
    return Checkpoints(workdir)


def restore_model(workdir: str | Path, *, which: str = "best", weights: str = "auto") -> Restored:
    """Model leaves of a run for evaluation and tagging.

    Args:
      workdir: of the run.
      which: "best" by the selection metric of these weights (the latest where nothing was
        evaluated), or "latest".
      weights: "raw", "ema", or "auto": averaged where the run kept an average.

    Raises:
      UserError: no checkpoint, or no averaged weights.
    """
    if which not in ("best", "latest") or weights not in ("auto", "raw", "ema"):
        raise UserError(f"which={which!r}, weights={weights!r}: best|latest and auto|raw|ema exist")
    with open_checkpoints(workdir) as checkpoints:
        latest = checkpoints.steps()[-1]
        newest = checkpoints.meta(latest)
        if weights == "auto":
            weights = "ema" if newest["ema"] else "raw"
        best = checkpoints.best_step(weights) if which == "best" else None
        restored = checkpoints.restore_leaves(latest if best is None else best, weights)
        restored.meta["weights"] = weights
        # The data may have moved since.
        restored.meta["config"]["data"] = newest["config"]["data"]
        return restored
