"""What the stages share: phrases, scores, files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mlclip_jax.data.scenes import KINDS, Scenes
from mlclip_jax.labels import catalog

SPACE = catalog.scenes()
COLOURS = catalog.SCENES_COLOURS
PAIRS = tuple(f"{colour} {kind}" for kind in KINDS for colour in COLOURS)
PHRASES = PAIRS + SPACE.names
GROUPS = ("digits", "shapes", "colours")
SEED = 20


def log(**values: Any) -> None:
    """One JSON line on stderr."""
    shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
    print(json.dumps(shown), file=sys.stderr, flush=True)


def average_precision(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """AP of each class: scores float [n c], targets in {+1, -1} [n c] -> [c]."""
    order = np.argsort(-scores, axis=0, kind="stable")
    hits = np.take_along_axis(targets > 0, order, axis=0)
    precision = np.cumsum(hits, axis=0) / np.arange(1, len(hits) + 1)[:, None]
    return (precision * hits).sum(0) / hits.sum(0)


def by_group(values: np.ndarray) -> dict[str, float]:
    """Means over each group and over all labels of per-label values [22]."""
    means = {g: float(values[list(SPACE.subsets[g])].mean()) for g in GROUPS}
    return {**means, "all": float(values.mean())}


def phrase_targets(scenes: Scenes, i: int, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Which phrases are true of scene i [118], and of each cell of a grid [grid*grid 118]."""
    whole = np.zeros(len(PHRASES), np.float32)
    cells = np.zeros((grid, grid, len(PHRASES)), np.float32)
    edges = np.arange(grid + 1) * (scenes.image_size / grid)
    for item in scenes.boxes(i):
        pair = item.kind * len(COLOURS) + item.colour - len(KINDS)
        phrases = [pair, len(PAIRS) + item.kind, len(PAIRS) + item.colour]
        whole[phrases] = 1
        x0, y0, x1, y1 = item.box
        share_x = np.clip(np.minimum(edges[1:], x1) - np.maximum(edges[:-1], x0), 0, None)
        share_y = np.clip(np.minimum(edges[1:], y1) - np.maximum(edges[:-1], y0), 0, None)
        covered = share_y[:, None] * share_x > 0.3 * min(edges[1] ** 2, (x1 - x0) * (y1 - y0))
        cells[:, :, phrases] = np.maximum(cells[:, :, phrases], covered[:, :, None])
    return whole, cells.reshape(grid * grid, -1)


def rendered(split: str, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n h w 3] and full labels [n 22] of the first scenes of a split."""
    scenes = Scenes(split, size, seed=seed)
    return np.stack([scenes.image(i) for i in range(size)]), scenes.label_matrix()


def unit(x: jax.Array) -> jax.Array:
    """L2-normalised along the last axis."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def save_npz(path: Path, tree: dict[str, Any]) -> None:
    """Writes a nested dict of arrays, paths joined by "/"."""
    flat = traverse_util.flatten_dict(tree)
    np.savez(path, **{"/".join(map(str, k)): np.asarray(v) for k, v in flat.items()})


def load_npz(path: Path) -> dict[str, Any]:
    """The inverse of `save_npz`; numbers in paths become integers, as in NNX's dicts."""
    with np.load(path) as file:
        flat = {
            tuple(int(k) if k.isdigit() else k for k in name.split("/")): jnp.asarray(file[name])
            for name in file.files
        }
    return traverse_util.unflatten_dict(flat)
