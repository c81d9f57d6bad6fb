"""Charts as inline SVG, 360 units wide so that their text is readable on a phone.

Colours come from the page by class name (`s0`, `s1`, ... for series, see page.css), which also
serves its dark scheme; lines differ in dashes too, bars in their order and by the number behind.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

WIDTH = 360
LEFT, RIGHT, TOP, BOTTOM = 44.0, 350.0, 12.0, 200.0  # the plot inside a chart of lines
_HEIGHT, _TEXT = 240, 11
_PANEL = 25  # most rows of a lying chart
_BESIDE = 118.0  # a name of a bar that is wider stands above it
SERIES = 6  # styles of series in page.css


class Curve(NamedTuple):
    """A line: its name, points (y may be NaN: a gap) and number of style."""

    name: str
    x: np.ndarray
    y: np.ndarray
    style: int
    thin: bool = False


def text_width(text: str, size: float = _TEXT) -> float:
    """A width that the text does not exceed in a usual sans-serif font."""
    return size * sum(
        0.0 if unicodedata.combining(c)
        else 1.1 if unicodedata.east_asian_width(c) in "WF"
        else 1.02 if c in "mwMW@%—…"
        else 0.75 if c.isupper()
        else 0.6
        for c in text
    )  # fmt: skip


def shorten(text: str, room: float, size: float = _TEXT) -> str:
    """The text, or as much of its beginning as fits with an ellipsis."""
    if text_width(text, size) <= room:
        return text
    while text and text_width(text + "…", size) > room:
        text = text[:-1]
    return text.rstrip() + "…"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers in [low, high], at most `most` + 1."""
    span = high - low
    raw = span / most
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * k for k in (1, 2, 2.5, 5, 10) if unit * k >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def scale(values: np.ndarray, low: float, high: float, start: float, end: float) -> np.ndarray:
    """Values in [low, high] as positions in [start, end]."""
    return start + (np.asarray(values, np.float64) - low) / (high - low) * (end - start)


def path(x: np.ndarray, y: np.ndarray) -> str:
    """Path data through points `[n]` each; a NaN interrupts the line."""
    parts, pen = [], "M"
    for a, b in zip(x, y, strict=True):
        if math.isfinite(a) and math.isfinite(b):
            parts.append(f"{pen}{a:.4g} {b:.4g}")
            pen = "L"
        else:
            pen = "M"
    return "".join(parts)


def steps_path(edges: np.ndarray, heights: np.ndarray) -> str:
    """Closed path data of a histogram: positions of edges `[k+1]` and of tops `[k]`."""
    parts = [f"M{edges[0]:.4g} {BOTTOM:.4g}"]
    for left, right, top in zip(edges, edges[1:], heights, strict=False):
        parts.append(f"L{left:.4g} {top:.4g}H{right:.4g}")
    return "".join(parts) + f"V{BOTTOM:.4g}Z"


def svg(height: float, body: str, title: str, description: str = "") -> str:
    """An SVG element that scales with its box.

    A screen reader says the title, and the description where there is one.
    """
    more = f"<desc>{escape(description)}</desc>" if description else ""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}">'
        f"{more}{body}</svg>"
    )


def legend(titles: Iterable[str] | Mapping[int, str], *, dashes: bool = False) -> str:
    """Names of series (by style) beside what they look like: squares of bars, dashes of lines."""
    styles = titles if isinstance(titles, Mapping) else dict(enumerate(titles))
    mark = '<i class="key s{0}"></i>'
    if dashes:
        line = '<path class="line s{0}" d="M0 5H28"/>'
        mark = f'<svg viewBox="0 0 28 10" aria-hidden="true">{line}</svg>'
    items = (f"<span>{mark.format(i)}{escape(name)}</span>" for i, name in styles.items())
    return f'<div class="legend">{"".join(items)}</div>'


def panels(rows: int) -> list[slice]:
    """Rows of a lying chart dealt evenly to as many charts as they need."""
    size = -(-rows // -(-rows // _PANEL))
    return [slice(start, start + size) for start in range(0, rows, size)]


def text(x: float, y: float, words: str, *, anchor: str = "start", name: str = "") -> str:
    """Text whose baseline starts (or ends, or is centred) at a place."""
    marks = f' class="{name}"' if name else ""
    return f'<text x="{x:.4g}" y="{y:.4g}" text-anchor="{anchor}"{marks}>{escape(words)}</text>'


def axes(
    x: tuple[float, float],
    y: tuple[float, float] | None,
    x_label: str,
    y_label: str,
    *,
    percent: bool = False,
) -> str:
    """Grid, numbers and labels of the plot area; y None: no numbers there."""
    body = []
    if y is not None:
        for value in ticks(*y):
            at = float(scale(value, *y, BOTTOM, TOP))
            shown = f"{100 * value:.4g}" if percent else f"{value:.4g}"
            body.append(f'<path class="grid" d="M{LEFT:g} {at:.4g}H{RIGHT:g}"/>')
            body.append(text(LEFT - 5, at + 4, shown, anchor="end"))
    for value in ticks(*x):
        at = float(scale(value, *x, LEFT, RIGHT))
        anchor = "end" if at > RIGHT - 12 else "middle"
        body.append(f'<path class="axis" d="M{at:.4g} {BOTTOM:g}v4"/>')
        body.append(text(min(at, WIDTH - 1.0), BOTTOM + 17, f"{value:.6g}", anchor=anchor))
    body.append(f'<path class="axis" d="M{LEFT:g} {BOTTOM:g}H{RIGHT:g}"/>')
    body.append(text((LEFT + RIGHT) / 2, _HEIGHT - 6, x_label, anchor="middle"))
    middle = (TOP + BOTTOM) / 2
    body.append(
        f'<text transform="translate(11 {middle:g})rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    return "".join(body)


def lines(
    curves: Sequence[Curve],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    percent: bool = False,
    extra: str = "",
) -> str:
    """A chart of lines; ranges follow the points where they are not given."""
    x_range = x_range or value_range([curve.x for curve in curves])
    y_range = y_range or value_range([curve.y for curve in curves])
    body = [axes(x_range, y_range, x_label, y_label, percent=percent)]
    for curve in curves:
        x = scale(curve.x, *x_range, LEFT, RIGHT)
        y = scale(curve.y, *y_range, BOTTOM, TOP)
        thin = " thin" if curve.thin else ""
        name = f"<title>{escape(curve.name)}</title>"
        body.append(f'<path class="line{thin} s{curve.style}" d="{path(x, y)}">{name}</path>')
        if len(x) <= 30 and not curve.thin:
            body += [
                f'<circle class="dot s{curve.style}" cx="{a:.4g}" cy="{b:.4g}" r="2.5"/>'
                for a, b in zip(x, y, strict=True)
                if math.isfinite(a) and math.isfinite(b)
            ]
    return svg(_HEIGHT, "".join(body) + extra, title)


def value_range(values: Sequence[np.ndarray]) -> tuple[float, float]:
    """Smallest and largest finite value, a little wider; never empty."""
    everything = np.concatenate([np.zeros(0), *(np.asarray(v, np.float64) for v in values)])
    everything = everything[np.isfinite(everything)]
    if not len(everything):
        return 0.0, 1.0
    low, high = float(everything.min()), float(everything.max())
    pad = 0.03 * (high - low) or max(abs(high), 1.0) * 0.05
    return low - pad, high + pad


def histogram(
    negatives: str,
    positives: str,
    x_range: tuple[float, float],
    cut: float | None,
    *,
    title: str,
) -> str:
    """Two histograms over each other (path data) and a line at the threshold `cut`.

    The one with a threshold is the one that the page's script redraws for a class.
    """
    names = ("", "") if cut is None else (' id="negatives"', ' id="positives"')
    body = [axes(x_range, None, "logit", "share of images, highest bin = top")]
    body.append(f'<path class="area negative"{names[0]} d="{negatives}"/>')
    body.append(f'<path class="area positive"{names[1]} d="{positives}"/>')
    if cut is None:
        return svg(_HEIGHT, "".join(body), title)
    inside = x_range[0] <= cut <= x_range[1]
    at = float(scale(cut, *x_range, LEFT, RIGHT)) if inside else LEFT
    hidden = "" if inside else " hidden"
    body.append(f'<path class="cut{hidden}" id="cut" d="M{at:.4g} {TOP:g}V{BOTTOM:g}"/>')
    return svg(_HEIGHT, "".join(body), title)


class _Rows:
    """The rows of a lying chart: a name, beside or (where one is long) above, and its series.

    A name longer than the chart is shortened, with the whole in a tooltip.
    """

    def __init__(self, names: Sequence[str], series: int) -> None:
        longest = max([0.0, *map(text_width, names)])
        self.above = 15.0 if longest > _BESIDE else 0.0
        self.left = 6.0 if self.above else longest + 8
        self.room = WIDTH - self.left - 36
        self.thick = 11.0 if series < 3 else 9.0
        self.row = self.thick * series + 8 + self.above
        self.height = self.row * len(names) + 22

    def grid(self, at: float, words: str) -> str:
        """A line over all rows, and its number below."""
        line = f'<path class="grid" d="M{at:.4g} 0V{self.height - 18:g}"/>'
        return line + text(at, self.height - 5, words, anchor="middle")

    def name(self, number: int, name: str) -> str:
        """The name of a row."""
        top = number * self.row + 4
        if self.above:
            label = text(self.left, top + 10, shorten(name, WIDTH - self.left - 2))
        else:
            label = text(self.left - 6, top + (self.row - 8) / 2 + 4, name, anchor="end")
        return f"<g><title>{escape(name)}</title>{label}</g>"

    def top(self, number: int, order: int) -> float:
        """Where a series of a row begins."""
        return number * self.row + 4 + self.above + order * self.thick


def bars(names: Sequence[str], values: Mapping[str, np.ndarray], *, title: str) -> str:
    """Lying bars from 0 to 100 %: for each name one bar for each series.

    Args:
        names: of the rows.
        values: fractions by series `[rows]`; NaN has a dash instead of a bar.
        title: what it shows.
    """
    rows = _Rows(names, len(values))
    left, room, size = rows.left, rows.room, rows.thick - 1.5
    body = [rows.grid(left + room * v, f"{100 * v:g}") for v in (0, 0.25, 0.5, 0.75, 1)]
    for number, name in enumerate(names):
        body.append(rows.name(number, name))
        for order, fractions in enumerate(values.values()):
            value, at = float(fractions[number]), rows.top(number, order)
            if math.isfinite(value):
                body.append(
                    f'<rect class="s{order}" x="{left:.4g}" y="{at:.4g}" '
                    f'width="{room * value:.4g}" height="{size:g}"/>'
                )
            words = f"{100 * value:.1f}" if math.isfinite(value) else "-"
            end = left + room * (value if math.isfinite(value) else 0) + 3
            body.append(text(end, at + size - 0.8, words, name="small"))
    return svg(rows.height, "".join(body), title)


def spans(
    names: Sequence[str],
    values: Mapping[int, tuple[np.ndarray, np.ndarray]],
    x_range: tuple[float, float],
    *,
    title: str,
) -> str:
    """Lying lines from a stroke to a dot, for each name one for each series; behind, the length.

    Args:
        names: of the rows.
        values: by style of the series where the lines start and end `[rows]`; an end that is NaN
            leaves the stroke alone, with a dash behind.
        x_range: of the chart; it holds all finite values.
        title: what it shows.
    """
    rows = _Rows(names, len(values))
    inside = (rows.left + 4, rows.left + rows.room - 6)
    body = []
    for value in ticks(*x_range, most=4):
        body.append(rows.grid(float(scale(value, *x_range, *inside)), f"{value:.4g}"))
    for number, name in enumerate(names):
        body.append(rows.name(number, name))
        for order, (style, (starts, ends)) in enumerate(values.items()):
            middle = rows.top(number, order) + rows.thick / 2
            start, end = (float(scale(v[number], *x_range, *inside)) for v in (starts, ends))
            drawn, words = f"M{start:.4g} {middle - 3.5:.4g}v7", "-"
            if math.isfinite(end):
                drawn += f"M{start:.4g} {middle:.4g}H{end:.4g}"
                words = f"{ends[number] - starts[number]:+.2f}"
            body.append(f'<path class="line solid s{style}" d="{drawn}"/>')
            if math.isfinite(end):
                body.append(f'<circle class="s{style}" cx="{end:.4g}" cy="{middle:.4g}" r="3.5"/>')
            body.append(text(WIDTH - 2, middle + 3.2, words, anchor="end", name="small"))
    return svg(rows.height, "".join(body), title)
