"""Charts: where the ink goes. The SVG is parsed, so it is also well formed."""

import json
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from ldm_jax.evaluation.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Series,
    bar_chart,
    line_chart,
    linear_ticks,
    log_ticks,
    number,
    smooth,
    thin,
)


def parse(chart):
    return ElementTree.fromstring(f"<div>{chart}</div>")


def lines(chart, kind):
    found = [e for e in parse(chart).iter("polyline") if kind in e.get("class").split()]
    return [[tuple(map(float, point.split(","))) for point in e.get("points").split()] for e in found]


def texts(chart):
    return [e.text for e in parse(chart).iter("text")]


def test_numbers_for_people():
    cases = {0.0: "0", 0.012345: "0.0123", 3.14159: "3.14", 999.4: "999", 12345.6: "12,346", math.inf: "inf"}
    assert {value: number(value) for value in cases} == cases


def test_ticks_are_round_and_inside():
    assert linear_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert linear_ticks(-3, 27) == [0, 10, 20]
    assert linear_ticks(0.013, 0.027) == [0.015, 0.02, 0.025]
    assert log_ticks(0.03, 3) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2])
    assert log_ticks(0.003, 3) == pytest.approx([0.01, 0.1, 1])


def test_thin_keeps_the_mean_and_drops_what_is_not_finite():
    x, y = thin(range(1000), [float(k) for k in range(1000)], most=10)
    assert len(x) == len(y) == 10
    np.testing.assert_allclose(y, np.arange(10) * 100 + 49.5)
    x, y = thin([3, 1, 2], [30.0, math.nan, 20.0])
    assert (x.tolist(), y.tolist()) == ([2, 3], [20, 30])
    assert len(thin([], [])[0]) == 0


def test_smooth_keeps_constants_and_lines_but_not_noise():
    np.testing.assert_allclose(smooth(np.full(50, 3.0)), 3)
    ramp = np.arange(200.0)
    np.testing.assert_allclose(smooth(ramp)[50:150], ramp[50:150])
    noise = np.random.default_rng(0).normal(size=400)
    assert smooth(noise).std() < 0.4 * noise.std()


def test_line_chart_maps_its_corners():
    chart = line_chart([Series("loss", [0, 100], [0.0, 2.0], trend=False)], x_label="step", y_label="loss")
    ((first, last),) = lines(chart, "trend")
    assert first[0] == LEFT and last[0] == WIDTH - RIGHT
    assert TOP < last[1] < first[1] <= HEIGHT - BOTTOM
    assert {"step", "loss", "0", "100", "1", "2"} <= set(texts(chart))
    assert "legend" not in chart  # one series needs none
    assert len(list(parse(chart).iter("circle"))) == 2


def test_line_chart_takes_a_log_axis_when_values_span_decades():
    y = [10.0 ** (-k / 10) for k in range(31)]
    chart = line_chart([Series("loss", range(31), y, trend=False)], x_label="step", y_label="loss")
    (points,) = lines(chart, "trend")
    steps = np.diff([y for _, y in points])
    np.testing.assert_allclose(steps, steps.mean(), atol=0.2)  # exponential decay is straight
    assert {"1", "0.1", "0.01"} <= set(texts(chart))
    linear = line_chart([Series("loss", range(31), y, trend=False)], x_label="step", y_label="loss", from_zero=True)
    assert "0" in texts(linear) and "0.01" not in texts(linear)


def test_line_chart_draws_raw_points_below_a_trend_and_tells_values_on_hover():
    y = np.random.default_rng(0).uniform(1, 2, 1000)
    chart = line_chart(
        [Series("a", range(1000), y), Series("b", [0, 500], [1.0, 1.5])], x_label="step", y_label="<loss>"
    )
    assert [len(points) for points in lines(chart, "raw")] == [400]
    assert [len(points) for points in lines(chart, "trend")] == [400, 2]
    assert [e.text for e in parse(chart).iter("span")] == ["a", "b"]
    svg = next(e for e in parse(chart).iter("svg") if e.get("data-points"))
    shown = json.loads(svg.get("data-points"))
    assert [s["name"] for s in shown] == ["a", "b"]
    assert shown[1]["text"] == ["0: 1", "500: 1.5"]
    assert "&lt;loss&gt;" in chart


@pytest.mark.parametrize("y", [[], [math.nan, math.inf]])
def test_nothing_to_draw_is_no_chart(y):
    assert line_chart([Series("loss", range(len(y)), y)], x_label="step", y_label="loss") == ""
    assert bar_chart(["a"] * len(y), [("loss", y)], x_label="t", y_label="loss") == ""


@pytest.mark.parametrize("y", [[0.5], [0.0, 0.0], [2.0] * 50, [-1.0, -5.0], [0.0, 1e-12], [1e9, 2e9]])
def test_odd_values_still_make_a_chart_inside_its_box(y):
    chart = line_chart(
        [Series("loss", [0] * len(y) if len(y) == 2 else range(len(y)), y)], x_label="step", y_label="loss"
    )
    for points in lines(chart, "trend"):
        assert all(LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM for x, y in points)
    assert not re.search(r"nan|inf", chart)


def test_bars_stand_on_the_axis_in_proportion():
    chart = bar_chart(["p", "q"], [("first", [1.0, 2.0]), ("last", [0.5, math.nan])], x_label="t", y_label="loss")
    bars = list(parse(chart).iter("rect"))
    assert [e.get("class") for e in bars] == ["bar s0", "bar s1", "bar s0"]
    heights = [float(e.get("height")) for e in bars]
    assert heights[2] == pytest.approx(2 * heights[0], abs=0.2) and heights[0] == pytest.approx(2 * heights[1], abs=0.2)
    assert all(float(e.get("y")) + float(e.get("height")) == pytest.approx(HEIGHT - BOTTOM, abs=0.1) for e in bars)
    assert [e.find("title").text for e in bars] == ["p, first: 1", "p, last: 0.5", "q, first: 2"]
    assert {"p", "q", "t", "loss"} <= set(texts(chart))
