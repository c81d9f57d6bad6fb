"""MKT, its ablations and CLIP-FT on Scenes with six labels held out, paired over seeds.

    python benchmarks/mkt.py --out benchmarks/results/mkt

ZSL: the six unseen labels, scored by themselves; GZSL: all 22. All rows train the last two blocks
of clip-mini's image tower for 256 steps of 32 images, with the labels of sixteen classes; rows with
prompt tuning then train the prompt for half as many. Learning rates are chosen from one grid, and
checkpoints, by the mAP of *seen* labels on validation scenes (the rates: of a seed that no table
uses): unseen labels and test scenes choose nothing, but scores have unit length over all 22 labels
in training too, so that the names of the unseen ones take part in it. The local stream has the rate
of both; the global one is CLIP-FT. Every seed draws its own scenes, order and starting values; all
rows see the same, so differences are paired.

Writes OUT.json and OUT.md. Runs that OUT.json has, with the same settings, are not done again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paired import Job, Runs, cell, job, parser, train_and_score

CONFIGS = Path(__file__).parents[1] / "configs"
RATES = (3e-5, 1e-4, 3e-4)
PROMPT_RATES = (3e-4, 1e-3, 3e-3)  # of the second stage, whose first has its row's rate
TUNING_SEED = 1000
MKT = "mkt/scenes.py:row="
#: Rows by title: the config and its arguments, and perhaps settings after a blank.
ROWS = {
    "CLIP-FT (the global stream)": "clip_ft/scenes.py:view=seen",
    "local": f"{MKT}local",
    "both streams": f"{MKT}neither",
    "+ distillation": f"{MKT}distillation",
    "+ prompt tuning": f"{MKT}prompt",
    "+ both (MKT)": f"{MKT}mkt",
}
#: Rows with a prompt stage, and the row whose rate their first stage has.
TUNED = {"+ prompt tuning": "both streams", "+ both (MKT)": "+ distillation"}
#: Rows that have another's rate without being tried.
ALIKE = {"local": "both streams"}
#: Figure 5, at the rate of the row they vary.
SWEEPS = {
    "+ distillation": {
        f"lambda {value:g}": f"{MKT}distillation distillation_weight={value}"
        for value in (0.1, 0.3, 3.0)
    },
    "both streams": {f"k {k}": f"{MKT}neither top_k={k}" for k in (1, 6, 64)},
}
SWEEP_SEEDS = 3
BASE = "both streams"
FIGURES = ("ZSL/mAP", "ZSL/F1@3", "GZSL/mAP", "GZSL/F1@3", "GZSL/F1@5")


def settings(job: Job) -> Any:
    """The configuration of a job; a rate of None leaves the config's (zero-shot).

    The rate of the prompt's stage follows the arguments as "prompt=".
    """
    from mlclip_jax.train import load_config

    arguments, *changes = job.arguments.split(" ")
    config = load_config(str(CONFIGS / arguments))
    config.seed = config.data.seed = job.seed
    config.eval = {"metric": "mAP/seen", "splits": ("validation",)}
    if job.rate is None:
        return config
    config.optim.learning_rate = job.rate
    config.ema_decay = None
    config.batch_size = 32
    config.eval.every = config.checkpoint.every = "64 steps"
    for change in changes:
        key, _, value = change.partition("=")
        if key == "prompt":
            config.stages[1]["optim"]["learning_rate"] = float(value)
        else:
            config.method[key] = _number(value)
    return config


def _number(text: str) -> float | int:
    return int(text) if text.isdigit() else float(text)


def run(settings: Callable[[Job], Any], job: Job) -> tuple[Job, dict[str, Any]]:
    """Validation mAP of seen labels in per cent where it is highest, and test figures there."""
    from mlclip_jax.evaluation.protocol import PROTOCOLS

    protocol = PROTOCOLS["nus_zsl"]
    trained, found, space = train_and_score(settings(job))
    figures = protocol.measure(found.scores, found.targets, space, task_scores=found.task_scores)
    validation = trained.meta["metrics"]["validation"]["raw"]["mAP/seen"]
    return job, {
        "validation": round(100 * validation, 3),
        "step": trained.step,
        **{name: round(100 * figures[name].value, 3) for name in FIGURES},
    }


def table(scores: Mapping[str, list[dict[str, float]]], words: Mapping[str, str]) -> list[str]:
    """Rows in Markdown: each figure, and its difference from the base row."""
    lines = [
        f"| row | rates | {' | '.join(FIGURES)} | ZSL/mAP above {BASE} | GZSL/mAP above it |",
        "|---|---|" + "---:|" * (len(FIGURES) + 2),
    ]
    for title, found in scores.items():
        cells = [cell([score[name] for score in found]) for name in FIGURES]
        for name in ("ZSL/mAP", "GZSL/mAP"):
            pairs = zip(found, scores[BASE], strict=False)  # sweeps have fewer seeds
            gaps = [a[name] - b[name] for a, b in pairs]
            cells.append("" if title == BASE else cell(gaps, signed=True))
        lines.append(f"| {title} | {words.get(title, '')} | {' | '.join(cells)} |")
    return lines


def _grid(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def main() -> None:
    """Choose rates, run all rows, print and write the table."""
    args = parser(__doc__).parse_args()
    runs = Runs(args.out, args.workers, settings, run=run)

    def best(jobs: Mapping[float, Job]) -> float:
        found = dict(zip(jobs, runs.scores(list(jobs.values())), strict=True))
        return max(found, key=lambda rate: found[rate]["validation"])

    first = {title: of for title, of in ROWS.items() if title not in TUNED | ALIKE}
    grid = [job(of, TUNING_SEED, rate) for of in first.values() for rate in RATES]
    runs.scores(grid)  # all at once, then by row
    rates = {
        title: best({rate: job(of, TUNING_SEED, rate) for rate in RATES})
        for title, of in first.items()
    }
    rates |= {title: rates[other] for title, other in ALIKE.items()}
    prompt_rates = {}
    for title in TUNED:
        rates[title] = rates[TUNED[title]]
        prompt_rates[title] = best(
            {p: job(f"{ROWS[title]} prompt={p}", TUNING_SEED, rates[title]) for p in PROMPT_RATES}
        )
    rows = {"zero-shot": ("zero_shot/scenes.py", None)}
    for title, of in ROWS.items():
        prompt = f" prompt={prompt_rates[title]}" if title in TUNED else ""
        rows[title] = (of + prompt, rates[title])
    for base, sweep in SWEEPS.items():
        rows |= {title: (of, rates[base]) for title, of in sweep.items()}
    seeds = dict.fromkeys(rows, args.seeds)
    seeds |= {title: min(SWEEP_SEEDS, args.seeds) for sweep in SWEEPS.values() for title in sweep}
    wanted = {
        title: [job(of, seed, rate) for seed in range(seeds[title])]
        for title, (of, rate) in rows.items()
    }
    found = iter(runs.scores([one for jobs in wanted.values() for one in jobs]))
    scores = {title: [next(found) for _ in jobs] for title, jobs in wanted.items()}
    words = {title: f"{rate:g}" for title, (_, rate) in rows.items() if rate is not None}
    words |= {title: f"{words[title]}, {rate:g}" for title, rate in prompt_rates.items()}
    chosen = [(RATES, rates[title]) for title in first]
    chosen += [(PROMPT_RATES, rate) for rate in prompt_rates.values()]
    at_edges = ["All rates that were chosen lie at an edge of their grids."]
    if any(rate not in (grid[0], grid[-1]) for grid, rate in chosen):
        at_edges = []
    lines = [
        f"# MKT on Scenes with six labels held out, {args.seeds} seeds",
        "",
        f"    python benchmarks/mkt.py --out {args.out}",
        "",
        "Test figures in per cent, ± standard error; differences are paired over seeds. Rates and",
        "checkpoints are chosen by the mAP of seen labels on validation scenes, the rates from",
        f"{_grid(RATES)}, those of the prompt (second) from {_grid(PROMPT_RATES)}. Scores have",
        "unit length over all 22 labels in training too: names of unseen labels take part in it.",
        f"Values of lambda and k (Figure 5): {SWEEP_SEEDS} seeds.",
        *at_edges,
        "",
        *table(scores, words),
    ]
    page = "\n".join(lines) + "\n"
    print(page)
    if args.out:
        args.out.with_suffix(".md").write_text(page)


if __name__ == "__main__":
    main()
