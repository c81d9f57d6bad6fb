"""ADDS's tasks on Scenes: decoders by their layers, single labels to several, pyramids.

    python benchmarks/adds.py --out benchmarks/results/adds

Every row trains a decoder on clip-mini's frozen tokens for 512 steps of 32 images, with dropout and
the asymmetric loss. Zero-shot: six of the 22 labels are held out of training, ZSL scores them by
themselves; their names are among the tokens' keys in training. Single: training scenes have one
object and one label of its two. Pyramid: scenes of 128 pixels whose objects are as small as in
scenes of 64. Each decoder has, in all tasks, the rate of one grid that is best in the conventional
one on validation scenes of a seed that no table uses; checkpoints are the best on validation scenes
(in zero-shot by seen labels alone). Rows of a task are paired over seeds.

Writes OUT.json and OUT.md. Runs that OUT.json has, with the same settings, are not done again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from paired import Job, Runs, cell, features_of_core, job, parser, train_and_score

CONFIGS = Path(__file__).parents[1] / "configs"
RATES = (1e-3, 3e-3, 1e-2)
TUNING_SEED = 1000
ADDS = "adds/scenes.py:"


class Task(NamedTuple):
    """Rows that are compared: their arguments by title, the base among them, and the figures."""

    title: str
    base: str
    figures: tuple[str, ...]
    rows: Mapping[str, str]


def _layers(task: str) -> dict[str, str]:
    """Both decoders of one, three and six layers (Table 5)."""
    return {
        f"{name} x {layers}": f"{ADDS}task={task},decoder={decoder},layers={layers}"
        for name, decoder in (("ML-Decoder", "ml_decoder"), ("DM-decoder", "dual_modal"))
        for layers in (1, 3, 6)
    }


_RANDOM = f"{ADDS}decoder=ml_decoder,layers=1,embedding=random"
_LARGE = f"{ADDS}layers=3,image_size=128"
TASKS = (
    Task(
        "Conventional",
        "ML-Decoder x 1",
        ("mAP",),
        {**_layers("conventional"), "ML-Decoder x 1, random matrix (Table 6)": _RANDOM},
    ),
    Task("Zero-shot", "ML-Decoder x 1", ("ZSL/mAP", "GZSL/mAP"), _layers("zero_shot")),
    Task(
        "Single labels to several",
        "ML-Decoder x 6",
        ("mAP",),
        {
            "ML-Decoder x 6": f"{ADDS}task=single,decoder=ml_decoder",
            "DM-decoder x 6": f"{ADDS}task=single",
        },
    ),
    Task(
        "Scenes of 128 pixels, DM-decoder x 3",
        "level 0 (resized to 64)",
        ("mAP",),
        {
            "level 0 (resized to 64)": f"{_LARGE},levels=0",
            "level 1 (four crops)": f"{_LARGE},levels=1",
            "levels 0 and 1 (pyramid)": _LARGE,
        },
    ),
)
FIGURES = ("mAP", "ZSL/mAP", "GZSL/mAP")


def settings(job: Job) -> Any:
    """The configuration of a job; a rate of None leaves the config's (zero-shot CLIP)."""
    from mlclip_jax.train import load_config

    config = load_config(str(CONFIGS / job.arguments))
    config.seed = config.data.seed = job.seed
    metric = "mAP/seen" if "task=zero_shot" in job.arguments else "mAP"
    config.eval = {"metric": metric, "splits": ("validation",), "every": "128 steps"}
    if job.rate is not None:
        config.optim.learning_rate = job.rate
        config.ema_decay = None
        config.checkpoint.every = "128 steps"
    return config


def run(settings: Callable[[Job], Any], job: Job) -> tuple[Job, dict[str, Any]]:
    """The metric that selects, in per cent, and test figures where it is highest."""
    from mlclip_jax.evaluation.protocol import PROTOCOLS

    config = settings(job)
    if job.rate is not None:
        config.cache = features_of_core()
    trained, found, space = train_and_score(config)
    measured = PROTOCOLS["nus_zsl"].measure(
        found.scores, found.targets, space, task_scores=found.task_scores
    )
    figures = {"mAP": found.metrics["mAP"]} | {n: measured[n].value for n in FIGURES[1:]}
    validation = trained.meta["metrics"]["validation"]["raw"][config.eval.metric]
    return job, {
        "validation": round(100 * validation, 3),
        "step": trained.step,
        **{name: round(100 * value, 3) for name, value in figures.items()},
    }


def decoder_of(arguments: str) -> tuple[str, ...]:
    """What of a row's arguments decides its rate."""
    given = dict(part.split("=") for part in arguments.removeprefix(ADDS).split(","))
    defaults = {"decoder": "dual_modal", "layers": "6", "embedding": "text"}
    return tuple(given.get(name, value) for name, value in defaults.items())


def table(
    task: Task, scores: Mapping[str, list[dict[str, float]]], rates: Mapping[str, float]
) -> list[str]:
    """Rows of a task in Markdown: each figure, and its difference from the base row."""
    above = [f"{name} above {task.base}" for name in task.figures]
    lines = [
        f"## {task.title}",
        "",
        f"| row | rate | {' | '.join((*task.figures, *above))} |",
        "|---|---:|" + "---:|" * (2 * len(task.figures)),
    ]
    for title, found in scores.items():
        cells = [cell([score[name] for score in found]) for name in task.figures]
        for name in task.figures:
            gaps = [a[name] - b[name] for a, b in zip(found, scores[task.base], strict=True)]
            cells.append("" if title == task.base else cell(gaps, signed=True))
        rate = f"{rates[title]:g}" if title in rates else ""
        lines.append(f"| {title} | {rate} | {' | '.join(cells)} |")
    return [*lines, ""]


def main() -> None:
    """Choose rates, run all rows, print and write the tables."""
    args = parser(__doc__).parse_args()
    runs = Runs(args.out, args.workers, settings, run=run)

    def best(of: str) -> float:
        tried = runs.scores([job(of, TUNING_SEED, rate) for rate in RATES])
        return RATES[max(range(len(RATES)), key=lambda i: tried[i]["validation"])]

    first, everything = TASKS[0].rows.values(), [of for t in TASKS for of in t.rows.values()]
    runs.scores([job(of, TUNING_SEED, rate) for of in first for rate in RATES])
    chosen = {decoder_of(of): best(of) for of in first}
    rates = {of: chosen[decoder_of(of)] for of in everything}
    seeds = range(args.seeds)
    runs.scores([job(of, seed, rates[of]) for seed in seeds for of in everything])
    zero_shot = runs.scores([job("zero_shot/scenes.py", seed) for seed in seeds])
    lines = [
        f"# ADDS on Scenes, {args.seeds} seeds",
        "",
        f"    python benchmarks/adds.py --out {args.out}",
        "",
        "Test figures in per cent, ± standard error; differences are paired over seeds. Rates are",
        f"the best of {', '.join(f'{rate:g}' for rate in RATES)} on validation scenes, in the",
        "conventional task.",
        "",
    ]
    for task in TASKS:
        small = "128" not in task.title
        scores = {"zero-shot CLIP": zero_shot} if small else {}
        scores |= {
            title: runs.scores([job(of, seed, rates[of]) for seed in seeds])
            for title, of in task.rows.items()
        }
        lines += table(task, scores, {title: rates[of] for title, of in task.rows.items()})
    print("\n".join(lines))
    if args.out:
        args.out.with_suffix(".md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
