"""Solver tables: the coefficients of a sampler in float64, one row for each network call.

Every sampler here is linear in the states and predictions of the last calls. Row i is network call i:

    z0_hat = denoise(z, (t, alpha, sigma))
    z      = sum_j weight[Z_j] (z of j calls ago) + weight[X_j] (z0_hat of j calls ago) + weight[NOISE] (fresh noise)

For a network with a learned variance (see `denoiser.Estimate`) the noise is exp(log_std_ratio var_frac) times that.

Z[0], X[0], Z[1], ... and NOISE are unit vectors, so that a paper's update in terms of them is the row. Columns have one
length, with the number of rows as data, so that `solve.solve` compiles once for all tables.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ldm_jax.diffusion.process import Point, forward_step

HISTORY = 4  # earlier calls that a row may use

_UNITS = np.eye(2 * (HISTORY + 1) + 1)
Z, X, NOISE = _UNITS[: HISTORY + 1], _UNITS[HISTORY + 1 : -1], _UNITS[-1]


class Row(NamedTuple):
    """One network call and the update after it."""

    at: Point  # the noise level of the network call
    reached: Point  # the noise level after the update
    weights: np.ndarray  # [2 HISTORY + 3], in terms of Z, X and NOISE
    log_std_ratio: float = 0.0  # log sqrt(beta / beta_tilde) where the variance is predicted by the network


class Table(NamedTuple):
    """A solver's table: [R] float64 columns, of which the first `rows` are run; the others are 0."""

    t: np.ndarray  # [R] the timestep that the network is conditioned on
    alpha: np.ndarray  # [R] z = alpha z0 + sigma eps when the network is called
    sigma: np.ndarray
    weights: np.ndarray  # [R, 2 HISTORY + 3]
    log_std_ratio: np.ndarray  # [R] 0 where the variance is fixed
    reached_alpha: np.ndarray  # [R] after row i z is a sample of q at this level; alpha 1 and sigma 0 are clean data
    reached_sigma: np.ndarray
    rows: np.ndarray  # [] int32


def tabulate(rows: Iterator[Row] | Sequence[Row], T: int) -> Table:
    """The table of rows, padded to 2 T; ValueError for more than 2 T rows."""
    rows = list(rows)
    if len(rows) > 2 * T:
        raise ValueError(f"a table holds {2 * T} network calls, this solver needs {len(rows)}; take fewer steps")
    columns = zip(*((*row.at, row.weights, row.log_std_ratio, *row.reached[1:]) for row in rows))
    pad = 2 * T - len(rows)
    padded = [np.pad(np.asarray(c, np.float64), [(0, pad)] + [(0, 0)] * (np.ndim(c) - 1)) for c in columns]
    return Table(*padded, rows=np.asarray(len(rows), np.int32))


def with_resampling(table: Table, times: int, jump: int) -> Table:
    """The table of RePaint (Lugmayr 2022, algorithm 1): every `jump` rows are noised back and run `times` times in all.

    With a `project` that pastes the known region, the repetitions harmonize it with the rest. Raises ValueError for
    times or jump below 1, a jump of all rows, which repeats none, a multistep solver, a learned variance, or more rows
    than a table holds.
    """
    if times < 1 or jump < 1:
        raise ValueError(f"resampling needs times and jump of 1 or more, got {times} and {jump}")
    if times > 1 and jump >= table.rows:
        no_effect = f"resampling by jumps of {jump} has no effect on {table.rows} steps"
        raise ValueError(f"{no_effect}, the last of which are run once; the jump must be less")
    now = np.isin(np.arange(len(_UNITS)), [0, HISTORY + 1, len(_UNITS) - 1])
    if table.weights[:, ~now].any():
        raise ValueError("resampling needs a one-step solver: ddpm, ddim, euler or euler_a")
    if table.log_std_ratio.any():
        raise ValueError("resampling needs a fixed variance: fixed_small or fixed_large")
    at, reached = zip(table.t, table.alpha, table.sigma), zip(table.reached_alpha, table.reached_sigma)
    once = [Row(Point(*a), Point(0.0, *r), w) for a, r, w in zip(at, reached, table.weights)][: table.rows]
    rows = []
    for start in range(0, len(once), jump):
        part = once[start : start + jump]
        if start + jump < len(once):  # the last part ends on clean data and is run once
            rows += [*part[:-1], _noised_back(part[-1], part[0].at)] * (times - 1)
        rows += part
    return tabulate(rows, len(table.t) // 2)


def _noised_back(row: Row, to: Point) -> Row:
    """The row, followed by the forward process up to the level `to` (Ho 2020, eq. 2)."""
    keep, variance = forward_step(to.alpha, to.sigma, row.reached.alpha, row.reached.sigma)
    weights = keep * row.weights
    weights[-1] = np.hypot(weights[-1], np.sqrt(variance))
    return Row(row.at, to, weights)
