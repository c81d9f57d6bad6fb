"""HSPNet, its ablations and its baselines on Scenes, paired over seeds.

    python benchmarks/hspnet.py --out benchmarks/results/hspnet_scenes

Every row trains the same image tower for the same steps with the same averaging; the text tower is
frozen. Each row's learning rate is chosen from one grid by validation scenes of a seed that no
table uses; epoch and weights (raw or EMA) by validation scenes of the run. Every seed draws its own
scenes, order and starting values, and clusters and random groups where a row has them; all rows see
the same, so differences are paired. Test scenes choose nothing.

Writes OUT.json and OUT.md. Runs that OUT.json has, with the same settings, are not done again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import timing

CONFIG = Path(__file__).parents[1] / "configs" / "hspnet" / "scenes.py"
ZERO_SHOT = CONFIG.parents[1] / "zero_shot" / "scenes.py"
#: title: arguments of the config
ROWS = {
    "SPL (CoOp)": "row=spl",
    "SPL + GCN": "row=spl_gcn",
    "HCP": "row=hcp",
    "HCP, prompt [s, w]": "row=hcp,prompt=concat",
    "HCP, prompt s + w": "row=hcp,prompt=add",
    "HCP + HGCN (HSPNet)": "row=hspnet",
    "without inter-group": "row=no_group_graph",
    "without inter-label": "row=no_label_graph",
    "HSPNet-cluster": "row=hspnet,taxonomy=cluster(3,seed={seed})",
    "random groups (w/o LGP)": "row=hspnet,taxonomy=random(seed={seed})",
    "renamed groups (w/o GRP)": "row=hspnet,taxonomy=renamed",
}
BASE, OURS = "SPL (CoOp)", "HCP + HGCN (HSPNet)"
CURVE_ROWS = (BASE, "SPL + GCN", OURS)
CURVES = {
    "few-shot": ("few_shot({share})+single_positive", (0.1, 0.3, 0.5)),
    "partial": ("partial({share})", (0.1, 0.3, 0.5)),
}
RATES = (1e-4, 3e-4, 1e-3)
TUNING_SEED = 1000


class Job(NamedTuple):
    """One run: the config's arguments, the seed, the learning rate."""

    arguments: str
    seed: int
    rate: float | None


def job(arguments: str, seed: int, rate: float | None = None) -> Job:
    """A job whose arguments may name the seed."""
    return Job(arguments.format(seed=seed), seed, rate)


class Runs:
    """Runs by what decides them, each done once and written at once, several at a time.

    Every worker has a core to itself: small convolutions do not fill two.
    """

    def __init__(self, path: Path | None, workers: int) -> None:
        self.path, self.workers, self.found = path, workers, {}
        if path is not None and path.exists():
            self.found = json.loads(path.read_text())["runs"]

    def scores(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """The score of each job, as `run` gives it."""
        digests = {job: digest(settings(job)) for job in jobs}
        missing = [
            job for job in digests if self.found.get(str(job), {}).get("config") != digests[job]
        ]
        context = multiprocessing.get_context("spawn")
        cores = context.Queue()
        for core in sorted(os.sched_getaffinity(0)) * self.workers:
            cores.put(core)
        with ProcessPoolExecutor(self.workers, context, _pin, (cores,)) as pool:
            for done in as_completed([pool.submit(run, job) for job in missing]):
                job, score = done.result()
                self.found[str(job)] = score | {"config": digests[job]}
                print(job, score, flush=True)
                if self.path is not None:
                    timing.save(self.path, {"runs": self.found})
        return [self.found[str(job)] for job in jobs]


def _pin(cores: Any) -> None:
    os.sched_setaffinity(0, {cores.get()})


def settings(job: Job) -> Any:
    """The configuration of a job; without a rate: zero-shot."""
    from mlclip_jax.train import load_config

    if job.rate is None:
        config = load_config(f"{ZERO_SHOT}:backbone=clip-mini-rn")
    else:
        config = load_config(f"{CONFIG}:{job.arguments}")
        config.optim.learning_rate = job.rate
    config.seed = config.data.seed = job.seed
    return config


def digest(config: Any) -> str:
    """Of all settings: runs of others are done again."""
    return hashlib.sha256(config.to_json(sort_keys=True).encode()).hexdigest()[:16]


def run(job: Job) -> tuple[Job, dict[str, Any]]:
    """A run's mAP in per cent on "validation", where it is highest, and on "test", there."""
    from mlclip_jax.training.loop import fit

    config = settings(job)
    with tempfile.TemporaryDirectory() as folder:
        fit(config, folder, quiet=True)
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]
    scores: dict[tuple[int, str], dict[str, Any]] = {}
    for row in rows:
        if row["split"] in ("validation", "test"):
            at = scores.setdefault((row["step"], row["weights"]), {})
            at[row["split"]] = round(100 * row["mAP"], 3)
            at |= {"step": row["step"], "weights": row["weights"]}
    return job, max(scores.values(), key=lambda score: score["validation"])


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error of the mean."""
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return statistics.mean(values), spread / len(values) ** 0.5


def cell(values: list[float], *, signed: bool = False) -> str:
    """ "mean ± standard error"."""
    mean, error = mean_and_error(values)
    return f"{mean:+.2f} ± {error:.2f}" if signed else f"{mean:.2f} ± {error:.2f}"


def main() -> None:
    """Tune, run all rows and curves, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--curve_seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    json_path = args.out.with_suffix(".json") if args.out else None
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
    runs = Runs(json_path, args.workers)

    tuning = {(t, r): job(a, TUNING_SEED, r) for t, a in ROWS.items() for r in RATES}
    tuned = dict(zip(tuning, runs.scores(list(tuning.values())), strict=True))
    rates = {t: max(RATES, key=lambda r: tuned[t, r]["validation"]) for t in ROWS}

    wanted: dict[tuple, list[Job]] = {("zero-shot",): [job("", s) for s in range(args.seeds)]}
    for title, arguments in ROWS.items():
        wanted[title,] = [job(arguments, s, rates[title]) for s in range(args.seeds)]
    for name, (view, shares) in CURVES.items():
        for share, title in product(shares, CURVE_ROWS):
            arguments = f"{ROWS[title]},view={view.format(share=share)}"
            seeds = range(args.curve_seeds)
            wanted[name, share, title] = [job(arguments, s, rates[title]) for s in seeds]
    scores = iter(runs.scores([one for jobs in wanted.values() for one in jobs]))
    tests = {key: [next(scores)["test"] for _ in jobs] for key, jobs in wanted.items()}
    page = markdown(args, rates, tests)
    print(page)
    if args.out:
        args.out.with_suffix(".md").write_text(page)


def markdown(
    args: argparse.Namespace, rates: dict[str, float], tests: dict[tuple, list[float]]
) -> str:
    """All tables."""

    def gaps(values: list[float], base: list[float]) -> str:
        return cell([a - b for a, b in zip(values, base, strict=True)], signed=True)

    spl, ours, zero = tests[BASE,], tests[OURS,], tests["zero-shot",]
    lines = [
        f"# HSPNet on Scenes with single positive labels, clip-mini-rn, {args.seeds} seeds",
        "",
        f"    python benchmarks/hspnet.py --out {args.out}",
        "",
        "Test mAP in per cent, ± standard error; differences are paired over seeds. Rates are",
        "chosen with all images and single positive labels, and kept in the other settings.",
        "",
        "| row | learning rate | mAP | above SPL | above HSPNet |",
        "|---|---:|---:|---:|---:|",
        f"| zero-shot | | {cell(zero)} | {gaps(zero, spl)} | {gaps(zero, ours)} |",
    ]
    for title in ROWS:
        values = tests[title,]
        to_base = "" if title == BASE else gaps(values, spl)
        to_ours = "" if title == OURS else gaps(values, ours)
        lines.append(f"| {title} | {rates[title]:g} | {cell(values)} | {to_base} | {to_ours} |")
    for name, (view, shares) in CURVES.items():
        lines += [
            "",
            f"## {name.capitalize()}: `{view.replace('{share}', 'p')}`, {args.curve_seeds} seeds",
            "",
            "| p | " + " | ".join(CURVE_ROWS) + " | HSPNet above SPL |",
            "|---:|" + "---:|" * (len(CURVE_ROWS) + 1),
        ]
        for share in shares:
            at = {title: tests[name, share, title] for title in CURVE_ROWS}
            cells = " | ".join(cell(values) for values in at.values())
            lines.append(f"| {share:g} | {cells} | {gaps(at[OURS], at[BASE])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
