"""LMPT, its ablations and the prompt-learning baselines on Scenes, paired over seeds.

    python benchmarks/prompt_learning.py --out benchmarks/results/prompt_learning

Three settings: long-tailed scenes with captions (LMPT's Tables 1 to 3), partial labels (DualCoOp),
and captions alone (TaI-DPT). Towers are frozen and image features computed once; every row trains
for the same steps with the same averaging. Each row's learning rate is chosen from one grid by
validation scenes of a seed that no table uses; epoch and weights (raw or EMA) by validation scenes
of the run. Every seed draws its own scenes, order and starting values; all rows see the same, so
differences are paired. Test scenes choose nothing.

Writes OUT.json and OUT.md. Runs that OUT.json has, with the same settings, are not done again.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from paired import Job, Runs, cell, job, parser

CONFIGS = Path(__file__).parents[1] / "configs"
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
TUNING_SEED = 1000


class Setting(NamedTuple):
    """A table: its title, config of zero-shot CLIP, rows by title (the config and its arguments),
    the row that the others are compared with, and whether classes are told apart by frequency."""

    title: str
    zero_shot: str
    rows: Mapping[str, str]
    base: str
    long_tail: bool = False


LMPT, PARTIAL = "lmpt/scenes.py:", "backbone=clip-mini-rn,view=partial({})"
COOP = "CoOp (soft prompts)"
SETTINGS = (
    Setting(
        "Long-tailed scenes with captions, a context a class, clip-mini (LMPT, Tables 1 to 3)",
        "zero_shot/scenes.py",
        {
            COOP: f"{LMPT}row=coop",
            "+ embedding loss": f"{LMPT}row=embedding",
            "+ class-aware margin": f"{LMPT}row=margin",
            "+ re-weighting (LMPT)": f"{LMPT}row=lmpt",
            "+ embedding loss, mean over classes": f"{LMPT}row=embedding,mean",
            "+ class-aware margin, mean over classes": f"{LMPT}row=margin,mean",
            "LMPT, as released": f"{LMPT}variant=released",
            "LMPT, class-aware re-sampling": f"{LMPT}row=lmpt,sampling=class_aware",
            "CoCoOp": "cocoop/scenes.py",
            "DualCoOp": "dual_coop/scenes.py:backbone=clip-mini,view=long_tail",
            "TaI-DPT, captions alone": "tai_dpt/scenes.py:backbone=clip-mini,view=long_tail",
            "linear probe": "linear_probe/scenes.py",
            "LMPT with BCE (= MLS)": f"{LMPT}loss=bce",
            "LMPT with focal loss": f"{LMPT}loss=focal",
            "LMPT with CB loss": f"{LMPT}loss=cb",
            "LMPT with R-BCE-focal": f"{LMPT}loss=r_bce_focal",
            "LMPT with ASL": f"{LMPT}loss=asl",
        },
        COOP,
        long_tail=True,
    ),
    Setting(
        "Long-tailed scenes with captions, one context for all, clip-mini",
        "zero_shot/scenes.py",
        {"CoOp": f"{LMPT}row=coop,unified", "LMPT": f"{LMPT}row=lmpt,unified"},
        "CoOp",
        long_tail=True,
    ),
    *(
        Setting(
            f"{100 * share:g} % of the labels, clip-mini-rn (DualCoOp)",
            "zero_shot/scenes.py:backbone=clip-mini-rn",
            {
                "CoOp": f"dual_coop/scenes.py:row=coop,{PARTIAL.format(share)}",
                "DualCoOp": f"dual_coop/scenes.py:{PARTIAL.format(share)}",
            },
            "CoOp",
        )
        for share in (0.1, 0.3, 0.5)
    ),
    *(
        Setting(
            f"Captions alone, {backbone} (TaI-DPT)",
            f"zero_shot/scenes.py:backbone={backbone}",
            {
                "TaI (global prompts)": f"tai_dpt/scenes.py:backbone={backbone},only_global",
                "TaI-DPT": f"tai_dpt/scenes.py:backbone={backbone}",
            },
            "zero-shot",
        )
        for backbone in ("clip-mini-rn", "clip-mini")
    ),
)
GROUPS = ("head", "medium", "tail")


def settings(job: Job) -> Any:
    """The configuration of a job; a rate of None leaves the config's (zero-shot)."""
    from mlclip_jax.train import load_config

    config = load_config(str(CONFIGS / job.arguments))
    if job.rate is not None:
        config.optim.learning_rate = job.rate
    config.seed = config.data.seed = job.seed
    return config


@functools.cache
def frequency_groups(seed: int) -> dict[str, np.ndarray]:
    """Classes by their number of training images, which differs from seed to seed."""
    from mlclip_jax.data import registry
    from mlclip_jax.evaluation import ranking

    data = settings(Job(f"{LMPT}row=lmpt", seed, 1e-3)).data
    counts = registry.load(data, image_size=64, splits=()).train.class_counts()
    return dict(ranking.frequency_groups(counts, rule="released"))


def by_group(scores: list[dict[str, Any]]) -> list[list[float]]:
    """Test mAP of all, head, medium and tail classes by seed."""
    rows = []
    for seed, score in enumerate(scores):
        groups = frequency_groups(seed)
        per_class = np.array(score["per_class"])
        rows.append([score["test"], *(float(per_class[groups[name]].mean()) for name in GROUPS)])
    return [list(column) for column in zip(*rows, strict=True)]


def table(
    setting: Setting, scores: Mapping[str, list[dict[str, Any]]], rates: Mapping[str, float]
) -> list[str]:
    """A setting's table in Markdown."""
    columns = ["mAP", f"above {setting.base}"]
    if setting.long_tail:
        columns += [f"{name} classes" for name in GROUPS]
    lines = [
        f"## {setting.title}",
        "",
        f"| row | learning rate | {' | '.join(columns)} |",
        "|---|---:|" + "---:|" * len(columns),
    ]
    base = [score["test"] for score in scores[setting.base]]
    for title, found in scores.items():
        tests = [score["test"] for score in found]
        gaps = [a - b for a, b in zip(tests, base, strict=True)]
        cells = [cell(tests), "" if title == setting.base else cell(gaps, signed=True)]
        if setting.long_tail:
            cells += [cell(values) for values in by_group(found)[1:]]
        rate = f"{rates[title]:g}" if title in rates else ""
        lines.append(f"| {title} | {rate} | {' | '.join(cells)} |")
    return [*lines, ""]


def main() -> None:
    """Tune, run all rows, print and write the tables."""
    args = parser(__doc__).parse_args()
    runs = Runs(args.out, args.workers, settings, per_class=True, cached=True)

    rows = {(s.title, title): of for s in SETTINGS for title, of in s.rows.items()}
    tuning = {(key, rate): job(of, TUNING_SEED, rate) for key, of in rows.items() for rate in RATES}
    tuned = dict(zip(tuning, runs.scores(list(tuning.values())), strict=True))
    rates = {key: max(RATES, key=lambda rate: tuned[key, rate]["validation"]) for key in rows}

    wanted: dict[tuple[str, str], list[Job]] = {}
    for setting in SETTINGS:
        fixed = [job(setting.zero_shot, seed) for seed in range(args.seeds)]
        wanted[setting.title, "zero-shot"] = fixed
        for title, of in setting.rows.items():
            key = setting.title, title
            wanted[key] = [job(of, seed, rates[key]) for seed in range(args.seeds)]
    found = iter(runs.scores([one for jobs in wanted.values() for one in jobs]))
    scores = {key: [next(found) for _ in jobs] for key, jobs in wanted.items()}

    lines = [
        f"# Prompt learning on Scenes, {args.seeds} seeds",
        "",
        f"    python benchmarks/prompt_learning.py --out {args.out}",
        "",
        "Test mAP in per cent from logits, ± standard error; differences are paired over seeds.",
        "",
    ]
    for setting in SETTINGS:
        own = {title: values for (of, title), values in scores.items() if of == setting.title}
        lines += table(setting, own, {t: rates[setting.title, t] for t in setting.rows})
    page = "\n".join(lines)
    print(page)
    if args.out:
        args.out.with_suffix(".md").write_text(page)


if __name__ == "__main__":
    main()
