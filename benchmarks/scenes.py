"""Trained methods against their baseline on Scenes, paired over seeds.

    python benchmarks/scenes.py --out benchmarks/results/scenes

Every seed draws its own scenes (training, validation and test) and its own order; the baseline
scores the same test scenes. Epoch and weights (raw or EMA) are selected on validation scenes.
Writes OUT.json and OUT.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import timing

from mlclip_jax.train import load_config
from mlclip_jax.training.loop import fit

CONFIGS = Path(__file__).parents[1] / "configs"
#: name: (config of the method, config of its baseline), for each backbone
PAIRS = {
    "CoOp": ("coop/scenes.py:backbone={}", "zero_shot/scenes.py:backbone={}"),
    "CoOp, class-specific": (
        "coop/scenes.py:backbone={},class_specific",
        "zero_shot/scenes.py:backbone={}",
    ),
}
BACKBONES = ("clip-mini", "clip-mini-rn")


def test_map(config_text: str, seed: int) -> float:
    """Test mAP of one run, at the evaluation whose validation mAP is highest."""
    config = load_config(str(CONFIGS / config_text))
    config.seed = seed
    config.data.seed = seed
    with tempfile.TemporaryDirectory() as folder:
        fit(config, folder, quiet=True)
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]
    scores: dict[tuple[int, str], dict[str, float]] = {}
    for row in rows:
        if row["split"] in ("validation", "test"):
            scores.setdefault((row["step"], row["weights"]), {})[row["split"]] = row["mAP"]
    return max(scores.values(), key=lambda score: score["validation"])["test"]


def compare(method: str, backbone: str, seeds: range) -> dict:
    """Means, the paired difference and its standard error, in per cent."""
    ours, baseline = (template.format(backbone) for template in PAIRS[method])
    pairs = [(100 * test_map(ours, s), 100 * test_map(baseline, s)) for s in seeds]
    gains = [a - b for a, b in pairs]
    return {
        "method": method,
        "backbone": backbone,
        "seeds": len(seeds),
        "mAP": statistics.mean(a for a, _ in pairs),
        "zero-shot mAP": statistics.mean(b for _, b in pairs),
        "gain": statistics.mean(gains),
        "standard error": (
            statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
        ),
        "each gain": gains,
    }


def markdown(rows: list[dict]) -> str:
    """The table of all comparisons."""
    lines = [
        "| method | backbone | mAP, % | zero-shot, % | gain ± standard error | smallest gain |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['method']} | {row['backbone']} | {row['mAP']:.1f} | "
            f"{row['zero-shot mAP']:.1f} | {row['gain']:+.2f} ± {row['standard error']:.2f} | "
            f"{min(row['each gain']):+.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run all comparisons, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for backbone in args.backbones:
        for method in args.methods:
            rows.append(compare(method, backbone, range(args.seeds)))
            print(markdown(rows[-1:]).splitlines()[-1], flush=True)
    if args.out:
        page = (
            f"# Scenes, {args.seeds} seeds\n\n    python benchmarks/scenes.py --out {args.out}\n\n"
        )
        args.out.parent.mkdir(parents=True, exist_ok=True)
        timing.save(args.out.with_suffix(".json"), {"rows": rows})
        args.out.with_suffix(".md").write_text(page + markdown(rows) + "\n")


if __name__ == "__main__":
    main()
