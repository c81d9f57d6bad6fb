"""Runs that are compared over seeds: each done once, kept in a file, two at a time.

All rows of a table see the same scenes, order and starting values at a seed, so differences are
paired. Rates, epochs and weights (raw or EMA) are chosen on validation scenes; test scenes choose
nothing.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import timing


class Job(NamedTuple):
    """One run: the config with its arguments, the seed, the learning rate."""

    arguments: str
    seed: int
    rate: float | None


def job(arguments: str, seed: int, rate: float | None = None) -> Job:
    """A job whose arguments may name the seed."""
    return Job(arguments.format(seed=seed), seed, rate)


def parser(description: str) -> argparse.ArgumentParser:
    """Of the arguments that all comparisons have: --seeds, --workers and --out."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument("--seeds", type=int, default=5)
    made.add_argument("--workers", type=int, default=os.cpu_count())
    made.add_argument("--out", type=Path, help="results, without suffix: .json and .md are written")
    return made


class Runs:
    """Runs by what decides them, each done once and written at once, several at a time.

    Every worker has a core to itself: small convolutions do not fill two.

    Args:
        out: place of the JSON file of the runs, whatever its suffix, read and written; runs of
            other settings are done again.
        workers: processes.
        settings: configuration of a job; a function that can be imported.
        per_class: keep the average precision of each class on "test" too.
        cached: image features of rows that train are computed once, in a folder of the worker's.
        run: what does a job in place of `_run`.
    """

    def __init__(
        self,
        out: Path | None,
        workers: int,
        settings: Callable[[Job], Any],
        *,
        per_class: bool = False,
        cached: bool = False,
        run: Callable[..., tuple[Job, dict[str, Any]]] | None = None,
    ) -> None:
        self.path, self.workers, self.found = out and out.with_suffix(".json"), workers, {}
        self.settings = settings
        self.run = functools.partial(_run, settings, per_class=per_class, cached=cached)
        if run is not None:
            self.run = functools.partial(run, settings)
        if self.path is not None and self.path.exists():
            self.found = json.loads(self.path.read_text())["runs"]

    def scores(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """The score of each job, as `_run` gives it."""
        digests = {job: digest(self.settings(job)) for job in jobs}
        missing = [
            job for job in digests if self.found.get(str(job), {}).get("config") != digests[job]
        ]
        context = multiprocessing.get_context("spawn")
        cores = context.Queue()
        for core in sorted(os.sched_getaffinity(0)) * self.workers:
            cores.put(core)
        with ProcessPoolExecutor(self.workers, context, _pin, (cores,)) as pool:
            todo = [pool.submit(self.run, job) for job in missing]
            for done in as_completed(todo):
                job, score = done.result()
                self.found[str(job)] = score | {"config": digests[job]}
                print(job, score, flush=True)
                if self.path is not None:
                    timing.save(self.path, {"runs": self.found})
        return [self.found[str(job)] for job in jobs]


def _pin(cores: Any) -> None:
    os.sched_setaffinity(0, {cores.get()})


def digest(config: Any) -> str:
    """Of all settings: runs of others are done again."""
    return hashlib.sha256(config.to_json(sort_keys=True).encode()).hexdigest()[:16]


def features_of_core() -> dict[str, str]:
    """`config.cache` of a run that shares image features with the others on its core."""
    place = Path(tempfile.gettempdir()) / "mlclip_jax_features"
    return {"folder": str(place / str(min(os.sched_getaffinity(0))))}


def train_and_score(config: Any) -> tuple[Any, Any, Any]:
    """The best checkpoint of a run, its result on "test" with ZSL by itself, and the labels."""
    from mlclip_jax.training.build import load_trained
    from mlclip_jax.training.loop import fit
    from mlclip_jax.training.scoring import Scorer

    with tempfile.TemporaryDirectory() as folder:
        fit(config, folder, quiet=True)
        trained = load_trained(folder, which="best")
        scorer = Scorer(trained, ("test",), 100)
        found = scorer.score({"it": trained.method}, "test", subsets=("unseen",))["it"]
    return trained, found, scorer.data.space


def _run(
    settings: Callable[[Job], Any], job: Job, *, per_class: bool = False, cached: bool = False
) -> tuple[Job, dict[str, Any]]:
    """A run's mAP in per cent on "validation", where it is highest, and on "test", there."""
    from mlclip_jax.training.loop import fit

    config = settings(job)
    if cached and job.rate is not None:
        config.cache = features_of_core()
    with tempfile.TemporaryDirectory() as folder:
        fit(config, folder, quiet=True)
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]
    scores: dict[tuple[int, str], dict[str, Any]] = {}
    for row in rows:
        if row["split"] in ("validation", "test"):
            at = scores.setdefault((row["step"], row["weights"]), {})
            at[row["split"]] = round(100 * row["mAP"], 3)
            at |= {"step": row["step"], "weights": row["weights"]}
            if per_class and row["split"] == "test":
                at["per_class"] = [round(100 * ap, 2) for ap in row["per_class_ap"]]
    return job, max(scores.values(), key=lambda score: score["validation"])


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error of the mean."""
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return statistics.mean(values), spread / len(values) ** 0.5


def cell(values: list[float], *, signed: bool = False) -> str:
    """ "mean ± standard error"."""
    mean, error = mean_and_error(values)
    return f"{mean:+.2f} ± {error:.2f}" if signed else f"{mean:.2f} ± {error:.2f}"
