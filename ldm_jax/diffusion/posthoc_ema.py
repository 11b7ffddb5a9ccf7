"""Post-hoc EMA (Karras 2024, section 3 and appendix C): power function averages, and those of any length made of them.

The average at time t of parameters theta has the weights p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1), 0 <= tau <= t.
Its length sigma_rel is the standard deviation of tau / t, so that longer trainings average more steps. Times are
numbers of updates; all is float64. The update of such an average in training is in `training.state`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

SHORTEST, LONGEST = 0.001, 0.288  # sigma_rel; at 1 / sqrt(12) = 0.2887 gamma is 0, the mean of all updates


class Average(NamedTuple):
    """Power function averages: arrays of one shape, or numbers."""

    time: ArrayLike  # t, above 0
    sigma_rel: ArrayLike  # between SHORTEST and LONGEST


def gamma_of(sigma_rel: ArrayLike) -> np.ndarray:
    """The exponent gamma [...], float64, of averages of length sigma_rel [...].

    The largest real root of gamma^3 + 7 gamma^2 + (16 - s) gamma + 12 - s, s = sigma_rel^-2 (eq. 126, algorithm 2).
    """
    sigma_rel = np.asarray(sigma_rel, np.float64)
    roots = [np.roots([1, 7, 16 - s, 12 - s]).real.max() for s in sigma_rel.ravel() ** -2.0]
    return np.array(roots, np.float64).reshape(sigma_rel.shape)


def sigma_rel_of(gamma: ArrayLike) -> np.ndarray:
    """The length sigma_rel [...] of averages of exponent gamma [...], above -1 (eq. 123): `gamma_of` inverted."""
    gamma = np.asarray(gamma, np.float64)
    return np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def correlation(one: Average, other: Average) -> np.ndarray:
    """The inner products [...] of the weights of averages that broadcast to [...] (eq. 151, algorithm 3)."""
    (t, a), (u, b) = ((np.asarray(each.time, np.float64), gamma_of(each.sigma_rel)) for each in (one, other))
    power = (t / u) ** np.where(t < u, b, -a)
    return (a + 1) * (b + 1) * power / ((a + b + 1) * np.maximum(t, u))


def reconstruction(stored: Average, target: Average) -> tuple[np.ndarray, float]:
    """The coefficients [K] with which K `stored` averages sum to the `target`, and the error of its weights.

    The sum's weights are the nearest to the target's in least squares, scaled to the sum 1 (algorithm 3, as EDM2). The
    error is the norm of the difference of the weights over the norm of the target's: with N = sqrt(correlation(target,
    target)), the sum differs from the target by at most error N sqrt(integral of |theta|^2).
    """
    time, sigma_rel = (np.asarray(part, np.float64) for part in stored)
    products = correlation(Average(time[:, None], sigma_rel[:, None]), stored)
    onto, own = correlation(stored, target), float(correlation(target, target))
    x = np.linalg.solve(products, onto)
    x = x / x.sum()
    return x, float(np.sqrt(max(0.0, x @ products @ x - 2 * x @ onto + own) / own))
