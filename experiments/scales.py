"""Logarithmic axes of the figures."""

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter


def set_log_scale(axes: Axes, which: str = "xy") -> None:
    """Makes these axes logarithmic, with plain tick labels at 1, 2, 5, 10 ...: matplotlib's default labels overlap."""
    for name in which:
        getattr(axes, f"set_{name}scale")("log")
        scale = getattr(axes, f"{name}axis")
        scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
        scale.set_major_formatter("{x:g}")
        scale.set_minor_formatter(NullFormatter())
