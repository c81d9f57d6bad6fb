"""Pictures of an evaluation, drawn with matplotlib on no display.

The colours are those of Okabe and Ito, which people with any form of colour blindness can tell
apart; nothing is said by colour alone. matplotlib is imported when a picture is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlclip_jax.labels.space import LabelSpace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Steps and the values there.
Series = tuple[list[float], list[float]]

BLUE, ORANGE, GREEN, VERMILION, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
INK, GREY, PALE = "#222222", "#9A9A9A", "#E4E4E4"
SERIES = (GREY, BLUE, ORANGE, GREEN, PURPLE)
_HATCHES = (None, None, "///", "...", "xxx")
_MOST_UPRIGHT = 24  # classes; more are drawn as horizontal bars
_MOST_CLASSES = 100  # of more, the best and the worst halves are drawn


def figure(width: float, height: float) -> Figure:
    """An empty figure (inches) in the house style; needs no display and leaves pyplot alone."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    mpl.rcParams["font.family"] = "DejaVu Sans"
    made = Figure(figsize=(width, height), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(made)
    return made


def save(made: Figure, path: Path) -> None:
    """Write a PNG without the creation time, so that equal pictures are equal files."""
    made.savefig(path, metadata={"Software": None})


def tidy(axes: Axes, *, grid: str = "y") -> None:
    """Remove the box, soften the rest."""
    for side in ("top", "right", "left" if grid == "y" else "bottom"):
        axes.spines[side].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(GREY)
    axes.tick_params(colors=INK, length=0)
    axes.grid(axis=grid, color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)


def per_class_bars(space: LabelSpace, per_class: Mapping[str, np.ndarray], path: Path) -> None:
    """Average precision of every class, one bar for each named result.

    Up to 24 classes with short names stand upright in groups of the taxonomy; others lie and are
    sorted by the last result; of more than 100 the 50 best and the 50 worst are shown.

    Args:
        space: names (and groups) of the classes.
        per_class: AP fractions `[c]` by name, the baseline first; NaN (no positives) has no bar.
        path: PNG to write.
    """
    short = max(map(len, space.names)) <= 14
    if short and len(space) <= _MOST_UPRIGHT:
        made = _upright_bars(space, per_class)
    else:
        made = _lying_bars(space, per_class)
    save(made, path)


def _upright_bars(space: LabelSpace, per_class: Mapping[str, np.ndarray]) -> Figure:
    if space.taxonomy is None:
        groups = {"": tuple(range(len(space)))}
    else:
        groups = {name: space.taxonomy.members(name) for name in space.taxonomy.group_names}
    order = [label for members in groups.values() for label in members]
    group_of = np.repeat(np.arange(len(groups)), [len(members) for members in groups.values()])
    position = np.arange(len(order)) + 0.8 * group_of  # a gap between groups
    made = figure(max(6.0, 1.6 + 0.46 * position[-1]), 4.6)
    axes = made.subplots()
    width = 0.8 / len(per_class)
    for number, (name, values) in enumerate(per_class.items()):
        offset = (number - (len(per_class) - 1) / 2) * width
        heights = 100 * np.nan_to_num(np.asarray(values)[order])
        axes.bar(position + offset, heights, width * 0.92, label=name, **_look(number))
    axes.set_xticks(position, [space.names[label] for label in order], rotation=45, ha="right",
                    rotation_mode="anchor")  # fmt: skip
    start = 0
    for name, members in groups.items():
        middle = position[start : start + len(members)].mean()
        axes.text(middle, 103, name, ha="center", va="bottom", color=INK, weight="bold")
        start += len(members)
    axes.set_ylim(0, 112 if len(groups) > 1 else 102)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("average precision, %", color=INK)
    axes.margins(x=0.01)
    tidy(axes)
    _legend(made, per_class)
    return made


def _lying_bars(space: LabelSpace, per_class: Mapping[str, np.ndarray]) -> Figure:
    last = np.asarray(list(per_class.values())[-1])
    order = np.argsort(-np.nan_to_num(last, nan=-1.0), kind="stable")
    note = "sorted by the last result"
    rows = np.arange(len(order), dtype=np.float64)
    if len(order) > _MOST_CLASSES:
        half = _MOST_CLASSES // 2
        note = f"the {half} best and the {half} worst of {len(order)} classes"
        order = np.concatenate([order[:half], order[-half:]])
        rows = np.arange(len(order)) + 2.0 * (np.arange(len(order)) >= half)  # a gap between
    made = figure(8.0, 1.4 + (rows[-1] + 1) * (0.1 + 0.05 * len(per_class)))
    axes = made.subplots()
    width = 0.82 / len(per_class)
    for number, (name, values) in enumerate(per_class.items()):
        offset = (number - (len(per_class) - 1) / 2) * width
        lengths = 100 * np.nan_to_num(np.asarray(values)[order])
        axes.barh(rows + offset, lengths, width * 0.95, label=name, **_look(number))
    axes.set_yticks(rows, [_shorten(space.names[label], 32) for label in order], fontsize=8)
    axes.set_ylim(rows[-1] + 0.6, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"average precision, % ({note})", color=INK)
    tidy(axes, grid="x")
    axes.tick_params(axis="x", labeltop=True)
    _legend(made, per_class)
    return made


def _look(number: int) -> dict[str, Any]:
    number %= len(SERIES)
    return {
        "color": SERIES[number], "hatch": _HATCHES[number], "edgecolor": "white", "linewidth": 0.3,
    }  # fmt: skip


def _legend(made: Figure, per_class: Mapping[str, np.ndarray]) -> None:
    made.legend(
        loc="outside upper left", ncols=min(len(per_class), 4), frameon=False, labelcolor=INK
    )


def _shorten(name: str, length: int) -> str:
    """The name, or its beginning and end around an ellipsis."""
    tail = length // 3
    return name if len(name) <= length else f"{name[: length - tail - 1]}…{name[-tail:]}"


# What a chip under a picture says: symbol, fill, edge, text colour, line style.
_CHIPS = {
    "correct": ("✓", BLUE, BLUE, "white", "-"),
    "missed": ("○", "white", INK, INK, (0, (2, 2))),
    "wrong": ("✗", VERMILION, VERMILION, "white", "-"),
}
_MOST_CHIPS = 9


def example_grid(
    space: LabelSpace,
    images: Sequence[np.ndarray],
    targets: np.ndarray,
    decisions: np.ndarray,
    path: Path,
    *,
    columns: int = 5,
) -> None:
    """Test images with their labels as chips: correct, missed and wrong.

    Args:
        space: names of the classes.
        images: uint8 `[h w 3]` each.
        targets: `[n c]` in {+1, 0, -1}; a label that is chosen but unobserved counts as wrong.
        decisions: bool `[n c]`, the labels chosen.
        path: PNG to write.
        columns: pictures in a row.
    """
    cell, strip, head = 2.1, 1.0, 0.5  # inches: width of a cell, height of its chips, legend
    columns = min(columns, max(2, len(images)))
    rows = -(-len(images) // columns)
    width, height = columns * cell, rows * (cell + strip) + head
    made = figure(width, height)
    made.set_layout_engine("none")
    page = made.add_axes((0, 0, 1, 1))
    page.set(xlim=(0, width), ylim=(height, 0))
    page.axis("off")
    _flow(page, [(kind, kind) for kind in _CHIPS], 0.12, 0.14, width, size=10)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        left, top = column * cell, head + row * (cell + strip)
        pad = 0.1
        side = cell - 2 * pad
        box = (left + pad) / width, 1 - (top + cell - pad) / height, side / width, side / height
        picture = made.add_axes(box)
        picture.imshow(image, interpolation="nearest" if max(image.shape) < 150 else "antialiased")
        picture.set(xticks=[], yticks=[])
        for spine in picture.spines.values():
            spine.set_color(PALE)
        chips = _chips(space, targets[number] > 0, decisions[number])
        _flow(page, chips, left + pad, top + cell - 0.04, left + cell - pad, size=8)
    save(made, path)


def _chips(space: LabelSpace, present: np.ndarray, chosen: np.ndarray) -> list[tuple[str, str]]:
    kinds = {
        "correct": present & chosen, "missed": present & ~chosen, "wrong": ~present & chosen,
    }  # fmt: skip
    chips = [
        (kind, _shorten(space.names[label], 22))
        for kind, which in kinds.items()
        for label in np.flatnonzero(which)
    ]
    more = len(chips) - _MOST_CHIPS
    return chips if more <= 0 else [*chips[:_MOST_CHIPS], ("", f"+{more}")]


def _flow(
    page: Axes,
    chips: Sequence[tuple[str, str]],
    left: float,
    top: float,
    right: float,
    *,
    size: int,
) -> None:
    """Set chips in lines from (left, top) to the right edge, in inches of the page."""
    made = page.figure
    renderer = made.canvas.get_renderer()
    pad, line, x = 0.06, 0.026 * size, left
    for kind, name in chips:
        symbol, fill, edge, ink, style = _CHIPS.get(kind, ("", "none", "none", INK, "-"))
        box = {
            "boxstyle": "round,pad=0.25,rounding_size=0.4", "facecolor": fill, "edgecolor": edge,
            "linestyle": style, "linewidth": 0.9,
        }  # fmt: skip
        words = f"{symbol} {name}".strip()
        text = page.text(x, top, words, size=size, color=ink, va="top", bbox=box)
        long = text.get_window_extent(renderer).width / made.dpi + 2 * pad
        if x > left and x + long > right:
            x, top = left, top + line
        text.set_position((x + 0.04, top + 0.04))
        x += long + 0.02


def training_curves(
    losses: Series,
    scores: Mapping[str, Series],
    path: Path,
    *,
    baseline: tuple[str, float] | None = None,
) -> None:
    """Loss and mAP over the steps of training, side by side.

    Args:
        losses: (steps, values).
        scores: (steps, mAP fractions) by name, for example "validation, raw".
        path: PNG to write.
        baseline: name and mAP fraction of a level to compare with, drawn as a line.
    """
    made = figure(11.0, 3.8)
    left, right = made.subplots(1, 2)
    steps, values = np.asarray(losses[0]), np.asarray(losses[1], np.float64)
    left.plot(steps, values, color=GREY, linewidth=1, alpha=0.6, label="each log entry")
    if len(values) >= 10:
        left.plot(steps, _smooth(values), color=BLUE, linewidth=2, label="running mean")
        left.legend(frameon=False, labelcolor=INK)
    left.set_title("Training loss", color=INK, loc="left")
    styles = ("-", "--", ":", "-.")
    for number, (name, (at, mean)) in enumerate(scores.items()):
        right.plot(
            at, 100 * np.asarray(mean), label=name, linewidth=2, markersize=5,
            color=SERIES[1 + number % 4], linestyle=styles[number % 4], marker="osD^"[number % 4],
        )  # fmt: skip
    if baseline is not None:
        right.axhline(100 * baseline[1], color=GREY, linewidth=1.5, label=baseline[0])
    right.set_title("mAP, %", color=INK, loc="left")
    if scores or baseline:
        right.legend(frameon=False, labelcolor=INK, loc="center left", bbox_to_anchor=(1.01, 0.5))
    for axes in (left, right):
        axes.set_xlabel("step", color=INK)
        axes.xaxis.get_major_locator().set_params(integer=True)
        tidy(axes)
    save(made, path)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean of the finite values in a centred window of about a tenth of the run."""
    reach = max(1, len(values) // 20)
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    number = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(len(values))
    first, last = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    number = number[last] - number[first]
    sums = total[last] - total[first]
    return np.divide(sums, number, out=np.full(len(values), np.nan), where=number > 0)
