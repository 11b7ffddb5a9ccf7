"""Noise levels that are uneven in time: even in a power, in the logarithm, or in the quantiles of a distribution."""

import numpy as np
from scipy.special import betaincinv

UNEVEN = ("karras", "exponential", "beta")
RHO = 7  # of Karras 2022


def uneven_levels(spacing: str, first: float, last: float, steps: int) -> np.ndarray:
    """Noise levels from `first` down to `last`, above 0, [steps] float64.

    `karras` (Karras 2022, eq. 5), `exponential`, or `beta`, quantiles of Beta(0.6, 0.6) (Lee 2024).
    """
    if spacing == "karras":
        return np.linspace(first ** (1 / RHO), last ** (1 / RHO), steps) ** RHO
    if spacing == "exponential":
        return np.exp(np.linspace(np.log(first), np.log(last), steps))
    return last + betaincinv(0.6, 0.6, 1 - np.linspace(0, 1, steps)) * (first - last)
