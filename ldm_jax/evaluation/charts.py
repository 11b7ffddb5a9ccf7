"""Charts of the report, as SVG by matplotlib, in the colours of `page.css` for light and dark mode."""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter1d

SIZE = (4.6, 2.5)  # inches
MAX_POINTS = 400  # of a curve, about its width in pixels
SMOOTHING = 0.02  # standard deviation of a trend's Gaussian weights, as a fraction of the curve
# Colours that matplotlib writes -> the page's.
SERIES = ("#2a6fdb", "#d9622b", "#178f68", "#9a5fc9", "#b08900")
SOFT, LINE = "#6b6b73", "#e4e4e2"
PALETTE = {color: f"var(--s{k})" for k, color in enumerate(SERIES)} | {SOFT: "var(--soft)", LINE: "var(--line)"}


class Series(NamedTuple):
    """One curve: its name and points; with `trend` it is pale, with a smoothed line on top."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    trend: bool = True


def number(value: float) -> str:
    """A number as text: 3 significant digits, thousands grouped."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def thin(x: Sequence[float], y: Sequence[float], max_points: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """A curve x [n], y [n] of n <= `max_points`: the means of equal runs of the finite points, in order of x."""
    points = np.array(sorted((a, b) for a, b in zip(x, y) if math.isfinite(b)), np.float64).reshape(-1, 2)
    runs = np.array_split(points, min(max_points, max(1, len(points))))
    means = np.array([run.mean(axis=0) for run in runs if len(run)]).reshape(-1, 2)
    return means[:, 0], means[:, 1]


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str, from_zero: bool = False) -> str:
    """A chart of curves over one x axis, as an SVG element; "" if there are no points.

    The y axis is logarithmic if the values span more than a factor of 4; with `from_zero` it is linear from 0.
    """
    curves = [(each, x, y) for each in series for x, y in [thin(each.x, each.y)] if len(x)]
    if not curves:
        return ""

    def plot(axes: Any) -> None:
        values = []
        for color, (each, x, y) in zip(SERIES, curves):
            line = gaussian_filter1d(y, SMOOTHING * len(y), mode="nearest") if each.trend and len(y) > 8 else y
            if line is not y:
                axes.plot(x, y, color=color, linewidth=0.8, alpha=0.3)
            marker = None if each.trend else "o"
            axes.plot(x, line, color=color, linewidth=1.6, marker=marker, markersize=4, label=each.name)
            values += [*line, *np.percentile(y, [5, 95])]  # single points may leave the range
        low, high = min(values), max(values)
        if from_zero:
            axes.set_ylim(0, 1.08 * high or 1)
        elif low > 0 and high / low > 4:
            _log_axis(axes, low, high)
        elif high > low:
            axes.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))

    return _svg(plot, x_label, y_label, legend=len(curves) > 1)


def bar_chart(
    groups: Sequence[str], series: Sequence[tuple[str, Sequence[float]]], *, x_label: str, y_label: str
) -> str:
    """A bar chart, in each group a bar for each series, as an SVG element; "" without positive values."""
    values = [value for _, row in series for value in row if math.isfinite(value)]
    if not groups or not values or max(values) <= 0:
        return ""

    def plot(axes: Any) -> None:
        width = 0.8 / len(series)
        for k, (color, (name, row)) in enumerate(zip(SERIES, series)):
            places = np.arange(len(row)) + (k - (len(series) - 1) / 2) * width
            axes.bar(places, np.nan_to_num(row), 0.92 * width, color=color, label=name)
        every = 1 if len(groups) <= 6 else 2
        axes.set_xticks(range(0, len(groups), every), groups[::every])

    return _svg(plot, x_label, y_label, legend=len(series) > 1)


def _log_axis(axes: Any, low: float, high: float) -> None:
    from matplotlib import ticker

    axes.set_yscale("log")
    axes.set_ylim(low / (high / low) ** 0.06, high * (high / low) ** 0.06)
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1,) if high / low > 100 else (1, 2, 5)))
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def _svg(plot: Callable[[Any], None], x_label: str, y_label: str, *, legend: bool) -> str:
    """The chart that `plot(axes)` fills."""
    import matplotlib as mpl  # here, as only the end of a run needs it
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": "ldm_jax", "font.size": 8, "font.family": "sans-serif"}
    style |= {"text.color": SOFT, "axes.labelcolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT}
    style |= {"axes.edgecolor": SOFT, "grid.color": LINE, "axes.spines.top": False, "axes.spines.right": False}
    style |= {"figure.facecolor": "none", "axes.facecolor": "none"}
    with mpl.rc_context(style):
        figure = Figure(SIZE, layout="constrained")
        axes = figure.subplots()
        plot(axes)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.yaxis.set_major_formatter(lambda value, place: number(value))
        if legend:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(SERIES), frameon=False)
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg ", '<svg class="chart" ', 1)
    for color, variable in PALETTE.items():
        svg = svg.replace(color, variable)
    return svg
