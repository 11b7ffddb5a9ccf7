"""Small SVG charts for the report: lines with a smoothed trend, and bars. Numbers in, text out.

A chart is drawn for a width of 460 units and scales with the page. Its classes (`axis`, `raw`, `trend`, `s0` ...) have
their colours from `page.css`, so that a chart follows light and dark mode.
"""

import json
import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 42
MAX_POINTS = 400  # of a curve in the page: more than it has pixels


class Series(NamedTuple):
    """One curve: its name and its points. `trend` draws it pale, with a smoothed line on top."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    trend: bool = True


class Axis(NamedTuple):
    """Values -> positions between `start` and `end`, linear or logarithmic, with the ticks worth labelling."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: list[float]

    def at(self, value: float) -> float:
        """The position of a value, rounded to a tenth of a unit; values beyond the axis lie beyond its ends."""
        low, high, value = (_log10(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)


def number(value: float) -> str:
    """A value for people: 3 significant digits, thousands grouped."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high], about `about` of them."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, 20 ... within [low, high]; only the powers of ten if it spans more than two of them."""
    steps = (1,) if high / low > 100 else (1, 2, 5)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**p for p in powers for m in steps if low <= m * 10.0**p <= high]


def thin(x: Sequence[float], y: Sequence[float], most: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points: the means of equal runs of the finite ones, in order of x."""
    points = np.array(sorted((a, b) for a, b in zip(x, y) if math.isfinite(b)), np.float64).reshape(-1, 2)
    runs = np.array_split(points, min(most, max(1, len(points))))
    means = np.array([run.mean(axis=0) for run in runs if len(run)]).reshape(-1, 2)
    return means[:, 0], means[:, 1]


def smooth(y: np.ndarray, width: float = 0.02) -> np.ndarray:
    """Gaussian-weighted means over `width` of the curve's length on either side; the ends use what they have."""
    index = np.arange(len(y))
    sigma = max(0.5, width * len(y))
    weights = np.exp(-0.5 * ((index[:, None] - index[None]) / sigma) ** 2)
    return weights @ y / weights.sum(axis=1)


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str, from_zero: bool = False) -> str:
    """Curves over a common x; "" if there are no points.

    The y axis is logarithmic if the values span more than a factor of 4; with `from_zero` it is linear from 0.
    """
    curves = [(s, *thin(s.x, s.y)) for s in series]
    curves = [(s, x, y, smooth(y) if s.trend and len(y) > 8 else y) for s, x, y in curves if len(x)]
    if not curves:
        return ""
    every_x = np.concatenate([x for _, x, _, _ in curves])
    # The range is that of the trends and of most raw points; single ones may leave it.
    seen = np.concatenate([np.append(line, np.percentile(y, [5, 95])) for _, _, y, line in curves])
    x_axis = _axis(min(0.0, every_x.min()), every_x.max(), LEFT, WIDTH - RIGHT, log=False)
    lowest, highest = 0.0 if from_zero else seen.min(), seen.max()
    log = lowest > 0 and highest / lowest > 4
    y_axis = _axis(*_padded(lowest, highest, log), HEIGHT - BOTTOM, TOP, log=log)
    body, legend = [], []
    for k, (s, x, y, line) in enumerate(curves):
        if line is not y:
            body.append(f'<polyline class="raw s{k}" points="{_points(x, y, x_axis, y_axis)}"/>')
        body.append(f'<polyline class="trend s{k}" points="{_points(x, line, x_axis, y_axis)}"/>')
        if not s.trend:
            body += [f'<circle class="dot s{k}" cx="{x_axis.at(a)}" cy="{y_axis.at(b)}" r="3"/>' for a, b in zip(x, y)]
        legend.append(s.name)
    shown = [
        {"name": s.name, "x": [x_axis.at(v) for v in x], "text": [f"{a:,.0f}: {number(b)}" for a, b in zip(x, line)]}
        for s, x, _, line in curves
    ]
    frame = _frame(x_axis, y_axis, x_label, y_label)
    clip = f'<svg x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}" '
    clip += f'viewBox="{LEFT} {TOP} {WIDTH - LEFT - RIGHT} {HEIGHT - TOP - BOTTOM}">{"".join(body)}</svg>'
    return _svg(f"{y_label} over {x_label}", frame + clip, legend, points=json.dumps(shown))


def bar_chart(
    groups: Sequence[str], series: Sequence[tuple[str, Sequence[float]]], *, x_label: str, y_label: str
) -> str:
    """A bar for each group and series, the series side by side; "" if there is nothing to draw."""
    values = [value for _, row in series for value in row if math.isfinite(value)]
    if not groups or not values or max(values) <= 0:
        return ""
    y_axis = _axis(0.0, max(values) * 1.05, HEIGHT - BOTTOM, TOP, log=False)
    slot = (WIDTH - LEFT - RIGHT) / len(groups)
    width = 0.8 * slot / len(series)
    body = []
    for g, group in enumerate(groups):
        left = LEFT + (g + 0.1) * slot
        for k, (name, row) in enumerate(series):
            if g < len(row) and math.isfinite(row[g]):
                top, tip = y_axis.at(max(0.0, row[g])), f"{group}, {name}: {number(row[g])}"
                body.append(
                    f'<rect class="bar s{k}" x="{left + k * width:.1f}" y="{top}" width="{width - 1:.1f}" '
                    f'height="{HEIGHT - BOTTOM - top:.1f}"><title>{escape(tip)}</title></rect>'
                )
        if len(groups) <= 6 or g % 2 == 0:
            x = LEFT + (g + 0.5) * slot
            body.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(group)}</text>')
    frame = _frame(None, y_axis, x_label, y_label)
    return _svg(f"{y_label} by {x_label}", frame + "".join(body), [name for name, _ in series])


def _axis(low: float, high: float, start: float, end: float, *, log: bool) -> Axis:
    if high <= low:
        low, high = (low / 2, low * 2) if log else (low - 0.5, low + 0.5)
    return Axis(low, high, start, end, log, log_ticks(low, high) if log else linear_ticks(low, high))


def _padded(low: float, high: float, log: bool) -> tuple[float, float]:
    """Room above and below the curve."""
    if log:
        room = (high / low) ** 0.06
        return low / room, high * room
    room = 0.08 * (high - low) or 0.1 * abs(high)
    return (max(0.0, low - room) if low >= 0 else low - room), high + room


def _log10(value: float) -> float:
    return math.log10(max(value, 1e-30))


def _points(x: np.ndarray, y: np.ndarray, x_axis: Axis, y_axis: Axis) -> str:
    return " ".join(f"{x_axis.at(a)},{y_axis.at(b)}" for a, b in zip(x, y))


def _frame(x_axis: Axis | None, y_axis: Axis, x_label: str, y_label: str) -> str:
    """Grid lines, tick labels and axis labels."""
    bottom, parts = HEIGHT - BOTTOM, []
    for tick in y_axis.ticks:
        y = y_axis.at(tick)
        parts.append(f'<line class="gridline" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4}" text-anchor="end">{number(tick)}</text>')
    for tick in x_axis.ticks if x_axis else ():
        label = f"{tick / 1000:g}k" if x_axis.high >= 10_000 and tick else number(tick)
        parts.append(f'<text x="{x_axis.at(tick)}" y="{bottom + 16}" text-anchor="middle">{label}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    across, middle = (LEFT + WIDTH - RIGHT) / 2, (TOP + bottom) / 2
    parts.append(f'<text x="{across}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    turned = f'x="14" y="{middle}" transform="rotate(-90 14 {middle})"'
    parts.append(f'<text {turned} text-anchor="middle">{escape(y_label)}</text>')
    return "".join(parts)


def _svg(description: str, body: str, legend: Sequence[str], points: str = "") -> str:
    """The chart, with a legend above it if it has more than one series."""
    keys = "".join(f'<span class="key s{k}">{escape(name)}</span>' for k, name in enumerate(legend))
    keys = f'<div class="legend">{keys}</div>' if len(legend) > 1 else ""
    about = f'role="img" aria-label="{escape(description)}"' + (f' data-points="{escape(points)}"' if points else "")
    return f'{keys}<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" {about}>{body}</svg>'
