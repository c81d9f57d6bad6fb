"""Where maps of labels point on test scenes: the pointing game, for CLIP and a trained run.

    python benchmarks/pointing.py
    python benchmarks/pointing.py --workdir=runs/mkt --out benchmarks/results/pointing

The share of pairs of an image and a label it shows whose map is highest inside a box of the label,
in per cent; a colour has the boxes of all its objects. Chance is the share of the image that the
boxes cover. Nothing is chosen here: kinds of maps and their settings were chosen on other scenes.

Writes OUT.json and OUT.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

import numpy as np
import timing

from mlclip_jax.data.scenes import Scenes
from mlclip_jax.evaluation.maps import Kind, pointing_game, upsample
from mlclip_jax.serving.tagger import Tagger

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


def main() -> None:
    """Score every kind of map, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, help="a run on Scenes, such as MKT's")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    scenes = Scenes("test", args.images, seed=args.seed)
    taggers = {
        f"zero-shot, {name}": Tagger.from_clip(name, scenes.space, batch_size=100)
        for name in BACKBONES
    }
    if args.workdir:
        trained = Tagger.from_workdir(args.workdir, labels=scenes.space, batch_size=100)
        taggers["trained run"] = trained
    images = [scenes.image(i) for i in range(args.images)]
    rows = []
    for title, tagger in taggers.items():
        for kind in get_args(Kind):
            explained = tagger.explain(images, scenes.space.names, kind=kind)
            figures = score(np.stack([of.maps for of in explained]), scenes)
            rows.append({"model": title, "maps": kind, **figures})
    names = ("all", *scenes.space.taxonomy.group_names)
    lines = [f"| model | maps | {' | '.join(names)} |", "|---|---|" + "---:|" * len(names)]
    chance = [f"{rows[0][f'chance, {name}']:.1f}" for name in names]
    lines.append(f"| chance | | {' | '.join(chance)} |")
    for row in rows:
        cells = " | ".join(f"{row[name]:.1f}" for name in names)
        lines.append(f"| {row['model']} | {row['maps']} | {cells} |")
    print("\n".join(lines))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        timing.save(args.out.with_suffix(".json"), {"images": args.images, "rows": rows})
        text = [f"# The pointing game on {args.images} test scenes, per cent", ""]
        if args.workdir:
            text.append("    mlclip train --config=configs/mkt/scenes.py --workdir=runs/mkt")
        command = "--workdir=runs/mkt " * bool(args.workdir)
        text += [f"    python benchmarks/pointing.py {command}--out {args.out}", "", *lines]
        args.out.with_suffix(".md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
