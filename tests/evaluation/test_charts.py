"""Charts: what is plotted, on which axes, as an SVG that stands in a page by itself."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from ldm_jax.evaluation.charts import SERIES, Series, bar_chart, line_chart, number, thin

SVG = "{http://www.w3.org/2000/svg}"


def parse(chart):
    return ElementTree.fromstring(chart)


def texts(chart):
    return {element.text for element in parse(chart).iter(f"{SVG}text")}


def curves(chart, k):
    """The points of each curve in the colour of series k."""
    paths = [e for e in parse(chart).iter(f"{SVG}path") if f"stroke: var(--s{k})" in e.get("style", "")]
    return [np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", e.get("d")), float) for e in paths]


def test_numbers_for_people():
    cases = {0.0: "0", 0.012345: "0.0123", 3.14159: "3.14", 999.4: "999", 12345.6: "12,346", math.inf: "inf"}
    assert {value: number(value) for value in cases} == cases


def test_thin_keeps_the_mean_and_drops_what_is_not_finite():
    x, y = thin(range(1000), [float(k) for k in range(1000)], max_points=10)
    assert len(x) == len(y) == 10
    np.testing.assert_allclose(y, np.arange(10) * 100 + 49.5)
    x, y = thin([3, 1, 2], [30.0, math.nan, 20.0])
    assert (x.tolist(), y.tolist()) == ([2, 3], [20, 30])
    assert len(thin([], [])[0]) == 0


def test_a_line_chart_has_its_labels_and_a_point_for_each_value():
    chart = line_chart([Series("loss", [0, 100], [0.0, 2.0], trend=False)], x_label="step", y_label="<loss>")
    assert {"step", "<loss>", "0", "100", "1", "2"} <= texts(chart)
    ((first, last),) = [curve for curve in curves(chart, 0) if len(curve) == 2]
    assert last[0] > first[0] and last[1] < first[1]  # up
    assert sum(1 for _ in parse(chart).iter(f"{SVG}use")) >= 2  # a marker each


def test_values_over_decades_are_on_a_logarithmic_axis():
    y = [10.0 ** (-k / 10) for k in range(31)]
    chart = line_chart([Series("loss", range(31), y, trend=False)], x_label="step", y_label="loss")
    assert {"1", "0.1", "0.01"} <= texts(chart)
    (curve,) = (curve for curve in curves(chart, 0) if len(curve) > 5)
    steps = np.diff(curve[:, 1]) / np.diff(curve[:, 0])
    np.testing.assert_allclose(steps, steps.mean(), rtol=0.01)  # exponential decay is straight
    linear = line_chart([Series("loss", range(31), y, trend=False)], x_label="step", y_label="loss", from_zero=True)
    assert "0" in texts(linear) and "0.01" not in texts(linear)


def test_a_trend_is_smoother_than_its_values():
    y = 1 + np.random.default_rng(0).uniform(size=1000)
    chart = line_chart([Series("a", range(1000), y), Series("b", [0, 500], [1, 1.5])], x_label="step", y_label="loss")
    raw, trend = (np.ptp(curve[:, 1]) for curve in curves(chart, 0) if len(curve) > 10)
    assert trend < raw / 3
    assert {"a", "b"} <= texts(chart)  # a legend, as there are two


@pytest.mark.parametrize("y", [[], [math.nan, math.inf]])
def test_no_values_make_no_chart(y):
    assert line_chart([Series("loss", range(len(y)), y)], x_label="step", y_label="loss") == ""
    assert bar_chart(["a"] * len(y), [("loss", y)], x_label="t", y_label="loss") == ""


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("y", [[0.5], [0.0, 0.0], [2.0] * 50, [-1.0, -5.0], [0.0, 1e-12], [1e9, 2e9]])
def test_odd_values_still_make_a_chart(y):
    for from_zero in (False, True):
        series = Series("loss", [0] * len(y) if len(y) == 2 else range(len(y)), y)
        chart = line_chart([series], x_label="step", y_label="loss", from_zero=from_zero and min(y) >= 0)
        assert not re.search(r'"[^"]*\b(nan|inf)\b', chart) and parse(chart).get("class") == "chart"


def test_bars_are_in_proportion_and_missing_ones_left_out():
    chart = bar_chart(["p", "q"], [("first", [1.0, 2.0]), ("last", [0.5, math.nan])], x_label="t", y_label="loss")
    heights = {}
    for k in (0, 1):
        paths = [e.get("d") for e in parse(chart).iter(f"{SVG}path") if f"fill: var(--s{k})" in e.get("style", "")]
        corners = [np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", d), float)[:, 1] for d in paths]
        heights[k] = [np.ptp(each) for each in corners][:2]  # the last is of the legend
    assert heights[0][1] == pytest.approx(2 * heights[0][0], rel=0.01)
    assert heights[0][0] == pytest.approx(2 * heights[1][0], rel=0.01) and heights[1][1] == 0
    assert {"p", "q", "t", "loss", "first", "last"} <= texts(chart)


def test_a_chart_has_the_pages_colours_and_asks_nobody_for_anything():
    chart = line_chart([Series("loss", range(9), range(9))], x_label="step", y_label="loss")
    assert "var(--s0)" in chart and "var(--soft)" in chart and not any(color in chart for color in SERIES)
    assert not re.search(r'(src|href)="(?!#)|@import|<!DOCTYPE|<metadata', chart)
    assert chart == line_chart([Series("loss", range(9), range(9))], x_label="step", y_label="loss")
