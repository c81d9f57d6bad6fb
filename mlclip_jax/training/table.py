"""The table of parameters that a run prints at its start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mlclip_jax.training.optim import learning_rate_groups
from mlclip_jax.training.step import Parts


def _count(leaves: Mapping[str, Any]) -> int:
    return sum(math.prod(leaf.shape) for leaf in leaves.values())


def _fold(paths: list[str], others: set[str]) -> dict[str, list[str]]:
    """Groups `paths` under the shortest prefixes that hold none of `others`."""
    folded: dict[str, list[str]] = {}
    for path in paths:
        parts = path.split("/")
        label = path
        for depth in range(1, len(parts)):
            prefix = "/".join(parts[:depth]) + "/"
            if not any(other.startswith(prefix) for other in others):
                label = prefix + "*"
                break
        folded.setdefault(label, []).append(path)
    return folded


def parameter_table(parts: Parts, groups: tuple[tuple[str, float], ...]) -> str:
    """Path, shape, trainable and learning-rate group of every leaf, as text.

    A subtree that is frozen as a whole is one line, and so is one that trains as a whole within
    one learning-rate group, so that a large tower stays readable.

    Args:
      parts: the method taken apart.
      groups: learning-rate groups of the stage's optimizer.
    """
    assigned = learning_rate_groups(list(parts.trainable), groups)
    kinds = {path: f"{group} x{multiplier:g}" for path, (group, multiplier) in assigned.items()}
    kinds |= dict.fromkeys(parts.moving, "statistics")
    kinds |= dict.fromkeys(parts.frozen, "")
    leaves = {**parts.trainable, **parts.moving, **parts.frozen}
    rows = []
    for kind in dict.fromkeys(kinds.values()):
        mine = [path for path in parts.paths if kinds[path] == kind]
        others = {path for path in parts.paths if kinds[path] != kind}
        for label, members in _fold(mine, others).items():
            shape = "x".join(map(str, leaves[members[0]].shape)) or "scalar"
            if len(members) > 1:
                shape = f"{len(members)} leaves"
            elif label.endswith("*"):
                label = members[0]
            size = _count({path: leaves[path] for path in members})
            status = {"": "no", "statistics": "moves"}.get(kind, "yes")
            rows.append((label, shape, f"{size:,}", status, kind if status == "yes" else ""))
    rows.sort(key=lambda row: ("yes", "moves", "no").index(row[3]))
    header = ("parameter", "shape", "values", "trains", "learning-rate group")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, tuple("-" * width for width in widths), *rows]
    ]
    total, trained = _count(leaves), _count(parts.trainable)
    lines.append(f"{trained:,} of {total:,} values train ({trained / max(total, 1):.2%})")
    return "\n".join(lines)
