"""Scales of figures."""

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter


def logarithmic(axes: Axes, which: str = "xy") -> None:
    """These scales, with plain numbers at 1, 2, 5, 10, 20 and so on: matplotlib's own run into each other."""
    for name in which:
        getattr(axes, f"set_{name}scale")("log")
        scale = getattr(axes, f"{name}axis")
        scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
        scale.set_major_formatter("{x:g}")
        scale.set_minor_formatter(NullFormatter())
