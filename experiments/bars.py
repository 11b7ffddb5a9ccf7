"""Bar charts of scores by arm, above image strips of samples."""

from collections.abc import Callable

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from experiments import measures, strips, tables
from experiments.runner import Rows


def plot_arms(rows: Rows, in_second_color: Callable[[str], bool]) -> Figure:
    """A figure of FD and recall of each arm, a dot for each seed; below, the samples of the first seed."""
    arms = tables.arms(rows)
    shown = [{"": next(row["images"] for row in rows.values() if row["arm"] == arm)} for arm in arms]
    height = strips.grid_height(shown, 11)
    figure = plt.figure(figsize=(11, 3.6 + height), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[3.6, height])
    for axis, name in zip(above.subplots(1, 2), ("FD-VGG16", "recall")):
        score = measures.SCORES[name][0]
        for place, arm in enumerate(arms):
            color = "C1" if in_second_color(arm) else "C0"
            axis.bar(place, tables.mean(rows, arm, score), color=color, alpha=0.5)
            values = tables.values(rows, arm, score)
            axis.plot([place] * len(values), values, "k.")
        axis.set_xticks(range(len(arms)), arms, rotation=30, ha="right", fontsize=8)
        axis.set(ylabel=f"{name} (dots: seeds)")
        axis.grid(axis="y", alpha=0.3)
    strips.plot_in(below, shown, arms)
    return figure
