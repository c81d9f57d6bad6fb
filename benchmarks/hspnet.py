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
from itertools import product
from pathlib import Path
from typing import Any

from paired import Job, Runs, cell, job, parser

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


def main() -> None:
    """Tune, run all rows and curves, print and write the tables."""
    arguments = parser(__doc__)
    arguments.add_argument("--curve_seeds", type=int, default=3)
    args = arguments.parse_args()
    runs = Runs(args.out, args.workers, settings)

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
