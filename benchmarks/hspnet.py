"""HSPNet, its ablations and its baselines on Scenes, paired over seeds.

    python benchmarks/hspnet.py --out benchmarks/results/hspnet_scenes

Every row trains the same image tower for the same steps with the same averaging; the text tower is
frozen. Each row's learning rate is chosen from one grid by validation scenes of a seed that no
table uses; epoch and weights (raw or EMA) by validation scenes of the run. Every seed draws its own
scenes, order and starting values, and clusters and random groups where a row has them; all rows see
the same, so differences are paired. Test scenes choose nothing.

Writes OUT.json and OUT.md. With --resume, runs that OUT.json has are not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import timing

from mlclip_jax.train import load_config
from mlclip_jax.training.loop import fit

CONFIG = Path(__file__).parents[1] / "configs" / "hspnet" / "scenes.py"
ZERO_SHOT = CONFIG.parents[1] / "zero_shot" / "scenes.py"
#: title: arguments of the config
ROWS = {
    "SPL (CoOp)": "row=spl",
    "SPL + GCN": "row=spl_gcn",
    "HCP": "row=hcp",
    "HCP + HGCN (HSPNet)": "row=hspnet",
    "without inter-group": "row=no_group_graph",
    "without inter-label": "row=no_label_graph",
    "HSPNet-cluster": "row=hspnet,taxonomy=cluster(3,seed={seed})",
    "random groups (w/o LGP)": "row=hspnet,taxonomy=random(seed={seed})",
    "renamed groups (w/o GRP)": "row=hspnet,taxonomy=renamed",
}
BASE, OURS = "SPL (CoOp)", "HCP + HGCN (HSPNet)"
CURVE_ROWS = ("SPL (CoOp)", "SPL + GCN", "HCP", "HCP + HGCN (HSPNet)")
CURVES = {
    "few-shot": ("few_shot({share})+single_positive", (0.1, 0.3, 0.5)),
    "partial": ("partial({share})", (0.1, 0.5, 0.9)),
}
RATES = (1e-4, 3e-4, 1e-3)
TUNING_SEED = 1000


class Runs:
    """Runs by what decides them, each done once and written at once."""

    def __init__(self, path: Path | None, resume: bool) -> None:
        self.path, self.found = path, {}
        if resume and path is not None and path.exists():
            self.found = json.loads(path.read_text())["runs"]

    def score(self, arguments: str, seed: int, rate: float | None) -> dict[str, float]:
        """"validation" and "test" mAP in per cent where validation is highest, and where that is."""
        key = f"{arguments} seed={seed} rate={rate}"
        if key not in self.found:
            self.found[key] = run(arguments.format(seed=seed), seed, rate)
            print(key, self.found[key], flush=True)
            if self.path is not None:
                timing.save(self.path, {"runs": self.found})
        return self.found[key]


def run(arguments: str, seed: int, rate: float | None) -> dict[str, Any]:
    """One training run; zero-shot where there is no rate."""
    if rate is None:
        config = load_config(f"{ZERO_SHOT}:backbone=clip-mini-rn")
    else:
        config = load_config(f"{CONFIG}:{arguments}")
        config.optim.learning_rate = rate
    config.seed = config.data.seed = seed
    with tempfile.TemporaryDirectory() as folder:
        fit(config, folder, quiet=True)
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]
    scores: dict[tuple[int, str], dict[str, Any]] = {}
    for row in rows:
        if row["split"] in ("validation", "test"):
            at = scores.setdefault((row["step"], row["weights"]), {})
            at[row["split"]] = round(100 * row["mAP"], 3)
            at |= {"step": row["step"], "weights": row["weights"]}
    return max(scores.values(), key=lambda score: score["validation"])


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
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    json_path = args.out.with_suffix(".json") if args.out else None
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
    runs = Runs(json_path, args.resume)

    rates = {}
    for title, arguments in ROWS.items():
        tried = {r: runs.score(arguments, TUNING_SEED, r)["validation"] for r in RATES}
        rates[title] = max(tried, key=tried.get)
    zero = [runs.score("zero-shot", seed, None)["test"] for seed in range(args.seeds)]
    tests = {
        title: [runs.score(arguments, s, rates[title])["test"] for s in range(args.seeds)]
        for title, arguments in ROWS.items()
    }
    curves = {
        (name, share): {
            title: [
                runs.score(f"{ROWS[title]},view={view.format(share=share)}", s, rates[title])[
                    "test"
                ]
                for s in range(args.curve_seeds)
            ]
            for title in CURVE_ROWS
        }
        for name, (view, shares) in CURVES.items()
        for share in shares
    }
    page = markdown(args, rates, zero, tests, curves)
    print(page)
    if args.out:
        args.out.with_suffix(".md").write_text(page)


def markdown(
    args: argparse.Namespace,
    rates: dict[str, float],
    zero: list[float],
    tests: dict[str, list[float]],
    curves: dict[tuple[str, float], dict[str, list[float]]],
) -> str:
    """All tables."""

    def gaps(values: list[float], base: list[float]) -> str:
        pairs = zip(values, base, strict=True)
        return cell([a - b for a, b in pairs], signed=True)

    lines = [
        f"# HSPNet on Scenes with single positive labels, clip-mini-rn, {args.seeds} seeds",
        "",
        f"    python benchmarks/hspnet.py --out {args.out}",
        "",
        "Test mAP in per cent, ± standard error; differences are paired over seeds.",
        "",
        "| row | learning rate | mAP | above SPL | above HSPNet |",
        "|---|---:|---:|---:|---:|",
        f"| zero-shot | | {cell(zero)} | {gaps(zero, tests[BASE])} | {gaps(zero, tests[OURS])} |",
    ]
    for title, values in tests.items():
        to_base = "" if title == BASE else gaps(values, tests[BASE])
        to_ours = "" if title == OURS else gaps(values, tests[OURS])
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
            at = curves[name, share]
            lines.append(
                f"| {share:g} | "
                + " | ".join(cell(at[title]) for title in CURVE_ROWS)
                + f" | {gaps(at[OURS], at[BASE])} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
