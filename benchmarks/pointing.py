"""Where maps of labels point on test scenes: the pointing game, for CLIP and for trained methods.

    python benchmarks/pointing.py --out benchmarks/results/pointing \
        --configs configs/mkt/scenes.py configs/adds/scenes.py

The share of pairs of an image and a label it shows whose map is highest inside a box of the label,
in per cent; a colour has the boxes of all its objects. Chance is the share of the image that the
boxes cover. Each seed has its own scenes and its own training run of each config. Kinds of maps and
their settings were chosen on validation scenes.

Writes OUT.json and OUT.md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from typing import get_args

import numpy as np
import timing
from paired import cell, parser

from mlclip_jax.data.scenes import Scenes
from mlclip_jax.evaluation.maps import Kind, pointing_game, upsample
from mlclip_jax.serving.tagger import Tagger
from mlclip_jax.train import load_config
from mlclip_jax.training.loop import fit

BACKBONES = ("clip-mini", "clip-mini-rn")


def score(maps: np.ndarray, scenes: Scenes) -> dict[str, float]:
    """Hits in per cent of maps [n c h w]: of all labels and of each group; and the chance."""
    labels, hits, chance = [], [], []
    for i, own in enumerate(maps):
        boxes = scenes.label_boxes(i)
        found = pointing_game(upsample(own, scenes.image_size)[list(boxes)], [*boxes.values()])
        labels += boxes
        hits += [*found.hits]
        chance += [*found.chance]
    taxonomy = scenes.space.taxonomy
    group = np.array(taxonomy.group_of)[labels]
    rows = {"all": np.ones(len(labels), bool)}
    rows |= {name: group == number for number, name in enumerate(taxonomy.group_names)}
    found = {name: float(100 * np.mean(hits, where=of)) for name, of in rows.items()}
    odds = {f"chance, {name}": float(100 * np.mean(chance, where=of)) for name, of in rows.items()}
    return found | odds


def taggers(configs: Sequence[str], scenes: Scenes, seed: int) -> Iterator[tuple[str, Tagger]]:
    """Zero-shot CLIP, and a run of each config."""
    for name in BACKBONES:
        yield f"zero-shot, {name}", Tagger.from_clip(name, scenes.space, batch_size=100)
    for config in configs:
        settings = load_config(config)
        settings.seed = settings.data.seed = seed
        with tempfile.TemporaryDirectory() as folder:
            fit(settings, folder, quiet=True)
            tagger = Tagger.from_workdir(folder, labels=scenes.space, batch_size=100)
        yield config, tagger


def main() -> None:
    """Score every kind of map, print and write the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--configs", nargs="*", default=(), help="to train, on Scenes")
    arguments.add_argument("--images", type=int, default=500)
    args = arguments.parse_args()
    rows: dict[tuple[str, str], list[dict[str, float]]] = {}
    for seed in range(args.seeds):
        scenes = Scenes("test", args.images, seed=seed)
        images = [scenes.image(i) for i in range(args.images)]
        for title, tagger in taggers(args.configs, scenes, seed):
            for kind in get_args(Kind):
                explained = tagger.explain(images, scenes.space.names, kind=kind)
                figures = score(np.stack([of.maps for of in explained]), scenes)
                rows.setdefault((title, kind), []).append(figures)
                print(seed, title, kind, round(figures["all"], 1), flush=True)
    names = ("all", *scenes.space.taxonomy.group_names)
    first = next(iter(rows.values()))
    chance = " | ".join(cell([of[f"chance, {name}"] for of in first]) for name in names)
    lines = [
        f"# The pointing game on {args.images} test scenes, per cent, {args.seeds} seeds",
        "",
        f"    python benchmarks/pointing.py --out {args.out} \\",
        f"        --configs {' '.join(args.configs)}",
        "",
        f"| model | maps | {' | '.join(names)} |",
        "|---|---|" + "---:|" * len(names),
        f"| chance | | {chance} |",
    ]
    for (title, kind), found in rows.items():
        cells = " | ".join(cell([of[name] for of in found]) for name in names)
        lines.append(f"| {title} | {kind} | {cells} |")
    print("\n".join(lines))
    if args.out:
        named = [{"model": title, "maps": kind, "seeds": of} for (title, kind), of in rows.items()]
        timing.save(args.out.with_suffix(".json"), {"images": args.images, "rows": named})
        args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
