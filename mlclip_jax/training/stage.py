"""One stage of training while it runs: steps, reports, evaluations, checkpoints."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from mlclip_jax.data.pipeline import eval_batches, train_batches
from mlclip_jax.data.registry import DataSplits
from mlclip_jax.errors import UserError
from mlclip_jax.evaluation.evaluator import evaluate, predict_fn
from mlclip_jax.methods.base import Batch
from mlclip_jax.training.build import Backbone, Plan
from mlclip_jax.training.checkpoint import Checkpoints, describe, saved_frozen
from mlclip_jax.training.config import StageConfig, TrainConfig, to_steps
from mlclip_jax.training.mesh import device_batches
from mlclip_jax.training.optim import reduce_on_plateau
from mlclip_jax.training.step import Leaves, State, all_leaves, nest
from mlclip_jax.training.writers import MetricWriter, ProgressBar

# The host runs at most this many steps ahead of the device. Without a bound, CPU collectives
# deadlock, and accelerators pile up batches.
IN_FLIGHT = 2


@dataclass
class Interval:
    """Sums of the metrics since the last report; saved, so that a resumed report is the same."""

    count: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, float]) -> None:
        """One more step."""
        self.count += 1
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def take(self) -> dict[str, float]:
        """Means since the last call."""
        means = {name: value / self.count for name, value in self.sums.items()}
        self.count, self.sums = 0, {}
        return means


@dataclass
class Run:
    """What the stages of a run share: its pieces, and what one stage leaves to the next.

    Attributes:
      fingerprints: what tells `data` from other data, for the checkpoints.
      step: global step.
      metrics: last evaluation: metrics by split, then "raw" and "ema".
      leaves: values that earlier stages ended with.
      trained_before: backbone leaves that earlier stages changed.
    """

    config: TrainConfig
    workdir: Path
    mesh: jax.sharding.Mesh
    backbone: Backbone
    data: DataSplits
    checkpoints: Checkpoints
    writer: MetricWriter
    quiet: bool
    fingerprints: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    metrics: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    leaves: Leaves = field(default_factory=dict)
    trained_before: set[str] = field(default_factory=set)

    def say(self, text: str) -> None:
        """Prints unless the run is quiet."""
        if not self.quiet:
            print(text, flush=True)


class StageRun:
    """A stage while it runs.

    Args:
      run: what all stages share.
      index: number of the stage.
      config: its settings.
      plan: its method, optimizer and step.
      state, frozen: on the devices.
      labels, eval_labels: label inputs of training and of evaluation, on the devices.
      interval: sums since the last report.
      done: steps of the stage that are done already.
      data: examples of the stage, with captions and cached features where it reads them.
    """

    def __init__(
        self,
        run: Run,
        index: int,
        config: StageConfig,
        plan: Plan,
        state: State,
        frozen: Leaves,
        labels: Any,
        eval_labels: Any,
        interval: Interval,
        done: int,
        data: DataSplits,
    ) -> None:
        self.run, self.index, self.config, self.plan = run, index, config, plan
        self.state, self.frozen = state, frozen
        self.labels, self.eval_labels = labels, eval_labels
        self.interval, self.done = interval, done
        self.data = data
        self.waiting: deque[tuple[int, dict[str, jax.Array]]] = deque()
        self.progress = ProgressBar(
            config.name, start=done, total=plan.steps, enabled=not run.quiet
        )
        self.clock, self.timed = time.monotonic(), 0
        self.predictor = predict_fn(plan.parts.graphdef, run.mesh)
        settings = run.config
        self.intervals = {
            where: to_steps(
                every,
                batch_size=config.batch_size,
                num_examples=len(data.train),
                where=where,
            )
            for where, every in (
                ("eval.every", settings.eval.every),
                ("checkpoint.every", settings.checkpoint.every),
                ("log_every", settings.log_every),
            )
        }

    def train(self) -> None:
        """The remaining steps."""
        run, plan = self.run, self.plan
        host_batches = train_batches(
            self.data.train,
            self.config.batch_size,
            seed=run.config.seed + self.index,
            sampling=self.config.sampling,
            start_step=self.done,
            max_unreadable=run.data.config.max_unreadable,
            num_workers=run.data.config.num_workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        step = None
        with closing(host_batches), closing(self.progress):
            for arrays in device_batches(host_batches, run.mesh):
                batch = Batch(**arrays)
                if step is None:
                    step = self._compile(batch)
                    self.clock = time.monotonic()
                with jax.transfer_guard("disallow"):  # what a step takes is on the devices already
                    self.state, metrics = step(self.state, self.frozen, batch, self.labels)
                self.done += 1
                run.step += 1
                self.progress.step()
                self.waiting.append((self.done, metrics))
                while len(self.waiting) > IN_FLIGHT:
                    self._retire()
                self.finish_step()
                if self.done == plan.steps:
                    break

    def finish_step(self) -> None:
        """Evaluates and saves where the step that was started last calls for it."""
        last = self.done == self.plan.steps
        evaluates = last or self._due("eval.every", self.done)
        if evaluates or self._due("checkpoint.every", self.done):
            while self.waiting:
                self._retire()
            pause = time.monotonic()
            scores = self._evaluate() if evaluates else None
            self._save(scores)
            self.clock += time.monotonic() - pause

    def _due(self, what: str, done: int) -> bool:
        steps = self.intervals[what]
        return steps > 0 and done % steps == 0

    def _compile(self, batch: Batch) -> Any:
        """The step compiled ahead of time, and a line about its cost."""
        begin = time.monotonic()
        compiled = self.plan.step.lower(self.state, self.frozen, batch, self.labels).compile()
        seconds = time.monotonic() - begin
        cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
        line = f"compiled the step of stage '{self.config.name}' in {seconds:.1f} s"
        if "flops" in cost:
            line += f"; per device {cost['flops'] / 1e9:.3g} GFLOP"
        if memory is not None:
            held, scratch = memory.argument_size_in_bytes, memory.temp_size_in_bytes
            line += f", {held / 2**20:.4g} MiB of arguments, {scratch / 2**20:.4g} MiB of scratch"
        if not self.run.quiet:
            self.progress.say(line)
        return compiled

    def _retire(self) -> None:
        """Waits for the oldest step under way, checks it and reports where a report is due."""
        done, metrics = self.waiting.popleft()
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        step = self.run.step - self.done + done
        if not values.pop("finite"):
            self.run.checkpoints.wait()
            good = self.run.checkpoints.steps()
            mend = (
                f"the last good checkpoint is step {good[-1]} in {self.run.checkpoints.directory}"
                if good
                else "there is no checkpoint yet"
            )
            raise UserError(
                f"loss, gradient or BatchNorm statistics are not finite at step {step} (loss "
                f"{values['loss']}, gradient norm {values['grad_norm']}): {mend}; lower "
                "optim.learning_rate or set optim.clip_norm"
            )
        self.interval.add(values)
        self.timed += 1
        if self._due("log_every", done):
            now = time.monotonic()
            speed = self.timed * self.config.batch_size / max(now - self.clock, 1e-9)
            self.clock, self.timed = now, 0
            means = self.interval.take()
            row = self._row(step, done, "train") | means | {"images_per_second": speed}
            self.run.writer.write(row)
            self.progress.report(done, loss=means["loss"], images_per_second=speed)

    def _row(self, step: int, done: int, split: str) -> dict[str, Any]:
        epoch = done / self.plan.epoch_steps
        return {"step": step, "stage": self.config.name, "epoch": epoch, "split": split}

    def _evaluate(self) -> dict[str, float]:
        """Scores all splits with raw and averaged weights; the selection metric by weights."""
        run, settings = self.run, self.run.config.eval
        run.metrics, selection = {}, {}
        batch_size = -(-settings.batch_size // run.mesh.size) * run.mesh.size
        states = {}
        for weights in ("raw", "ema") if self.state["ema"] else ("raw",):
            leaves = all_leaves(self.state, self.frozen, ema=weights == "ema")
            states[weights] = (nest(leaves, self.plan.parts.paths),)
        for split, source in self.data.evals.items():
            batches = eval_batches(source, batch_size, num_workers=run.data.config.num_workers)
            results = evaluate(
                self.predictor, states, self.eval_labels, batches, run.data.space, mesh=run.mesh
            )
            run.metrics[split] = {weights: found.metrics for weights, found in results.items()}
            for weights, found in results.items():
                row = self._row(run.step, self.done, split) | {"weights": weights}
                per_class = {"per_class_ap": found.per_class_ap.tolist()}
                run.writer.write(row | found.metrics | per_class)
                self.progress.say(
                    f"step {run.step} {split} ({weights}): "
                    f"{settings.metric} {100 * found.metrics[settings.metric]:.2f}"
                )
                if split == settings.splits[0]:
                    selection[weights] = found.metrics[settings.metric]
        if self.config.optim.schedule == "plateau":
            self.state["opt_state"] = reduce_on_plateau(
                self.state["opt_state"], selection["raw"], self.config.optim
            )
        return selection

    def _save(self, scores: Mapping[str, float] | None) -> None:
        """A checkpoint of the present step."""
        run = self.run
        meta = {
            "step": run.step,
            "stage": self.index,
            "stage_name": self.config.name,
            "step_in_stage": self.done,
            "interval": {"count": self.interval.count, "sums": self.interval.sums},
            "trained_before": sorted(run.trained_before),
            "ema": self.config.ema_decay is not None,
            "metrics": run.metrics,
            **describe(
                run.config,
                run.data.space,
                run.backbone.digest,
                run.data.train_space,
                run.fingerprints,
            ),
        }
        extra = saved_frozen(self.frozen, run.trained_before)
        # The best checkpoint is one of the last stage, whatever earlier methods scored.
        is_last_stage = self.index == len(run.config.stages) - 1
        run.checkpoints.save(run.step, self.state, extra, meta, scores if is_last_stage else None)
