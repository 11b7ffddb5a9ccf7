"""Noise schedules as float64 tables on the host, and the timesteps at which a sampler visits them.

Every schedule is variance preserving and discrete: t in [0, T), alpha_bar decreasing, t = T - 1 the noisiest. The
tables stay in NumPy float64 until a function of `process` or `solvers` casts what it needs from them, once, to float32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SCHEDULES = ("linear", "scaled_linear", "cosine")
EVEN = ("leading", "trailing", "linspace")
SPACINGS = (*EVEN, "karras", "exponential")
GRIDS = ("integer", "endpoint", "continuous", "lcm")


class Schedule(NamedTuple):
    """A forward process, q(z_t | z_{t-1}) = N(sqrt(1 - beta_t) z_{t-1}, beta_t I) (Ho 2020, eq. 2)."""

    beta: np.ndarray  # [T] float64 in (0, 1]
    alpha_bar: np.ndarray  # [T] float64 in [0, 1), the cumulative product of (1 - beta)


def make_schedule(
    name: str, T: int, *, beta_start: float = 0.00085, beta_end: float = 0.012, zero_terminal_snr: bool = False
) -> Schedule:
    """Builds a schedule of T steps.

    Args:
      name: `linear` (beta linear: Ho 2020, section 4, with 1e-4 and 0.02), `scaled_linear` (sqrt(beta) linear: what
        CompVis calls linear; its values are the defaults here), or `cosine` (Nichol 2021).
      T: number of timesteps, at least 1.
      beta_start: first beta. `cosine` has no use for it.
      beta_end: last beta. `cosine` has no use for it.
      zero_terminal_snr: rescale so that alpha_bar[T - 1] = 0 (Lin 2023); no eps prediction can be trained on that.

    Raises:
      ValueError: unknown name, or T or a beta out of range.
    """
    if T < 1:
        raise ValueError(f"a schedule needs T >= 1 timesteps, got T = {T}")
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"betas must satisfy 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}")
    if name == "linear":
        beta = np.linspace(beta_start, beta_end, T, dtype=np.float64)
    elif name == "scaled_linear":
        beta = np.linspace(beta_start**0.5, beta_end**0.5, T, dtype=np.float64) ** 2
    elif name == "cosine":
        beta = _cosine_beta(T)
    else:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {name!r}")
    if zero_terminal_snr:
        beta = rescale_zero_terminal_snr(beta)
    return Schedule(beta, np.cumprod(1 - beta))


def _cosine_beta(T: int, s: float = 0.008, beta_max: float = 0.999) -> np.ndarray:
    """Nichol 2021, eq. 17 and below: alpha_bar = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) pi/2), beta clipped."""
    f = np.cos((np.arange(T + 1) / T + s) / (1 + s) * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], beta_max)


def rescale_zero_terminal_snr(beta: np.ndarray) -> np.ndarray:
    """Lin 2023, algorithm 1: shifts and scales sqrt(alpha_bar) so that its first value stays and its last is 0.

    Args:
      beta: [T] float64, T >= 2.

    Returns:
      [T] float64; the last value is 1.
    """
    if len(beta) < 2:
        raise ValueError(f"zero terminal SNR needs T >= 2 timesteps, got T = {len(beta)}")
    root = np.sqrt(np.cumprod(1 - np.asarray(beta, np.float64)))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = root**2
    return 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])


class Point(NamedTuple):
    """A place that a sampler visits, in float64: the time that the network is told, and the level of the noise."""

    t: float
    alpha_bar: float

    @property
    def alpha(self) -> float:
        """The weight of z0."""
        return np.sqrt(self.alpha_bar)

    @property
    def sigma(self) -> float:
        """The weight of eps."""
        return np.sqrt(1 - self.alpha_bar)

    @property
    def ve_sigma(self) -> float:
        """sigma / alpha, the noise on z / alpha, which Karras 2022 calls sigma."""
        with np.errstate(divide="ignore"):
            return np.divide(self.sigma, self.alpha)

    @property
    def half_log_snr(self) -> float:
        """lambda = log(alpha / sigma) (Lu 2022)."""
        with np.errstate(divide="ignore"):
            return np.log(np.divide(self.alpha, self.sigma))


def visits(
    spacing: str | Sequence[int],
    alpha_bar: np.ndarray,
    steps: int,
    *,
    grid: str = "integer",
    steps_offset: int = 0,
    between: str = "linspace",
) -> list[Point]:
    """The places that a sampler visits, from noise to data.

    Args:
      spacing: `leading`, `trailing` or `linspace`, even in time (see `timesteps`); `karras` (Karras 2022, eq. 5, with
        rho = 7) or `exponential`, even in a power or the logarithm of sigma / alpha; or timesteps, descending.
      alpha_bar: [T] float64 table of the schedule.
      steps: how many; at most T.
      grid: `integer`: timesteps of the schedule, and for `karras` and `exponential` the nearest ones as the time told.
        `endpoint`: the same, but of `leading` and `linspace` the end point counts as one and is left out.
        `continuous`: `linspace`, `karras` and `exponential` stand between the timesteps: sigma / alpha is linear in t
        for `linspace`, its logarithm for the others. `lcm`: every T // 50th timestep, thinned (Luo 2023).
      steps_offset: see `timesteps`.
      between: the even spacing whose first and last points `karras` and `exponential` span on a continuous grid.

    Raises:
      ValueError: unknown spacing, steps or timesteps out of range, or `karras` or `exponential` where alpha_bar = 0.
    """
    T = len(alpha_bar)
    if not isinstance(spacing, str):
        return _listed(spacing, alpha_bar, steps)
    if spacing not in SPACINGS:
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")
    if spacing not in EVEN:
        if grid == "lcm":
            raise ValueError(f"lcm has timesteps of its own, {spacing} spacing is for the others")
        return _even_in_sigma(spacing, alpha_bar, steps, grid, steps_offset, between)
    if grid == "continuous" and spacing == "linspace":
        _check_steps(steps, T)
        t = np.linspace(0, T - 1, steps, dtype=np.float32)[::-1].astype(np.float64)
        sigma = np.interp(t, np.arange(T), [Point(0, level).ve_sigma for level in alpha_bar])
        level = np.where(t % 1 == 0, alpha_bar[np.round(t).astype(int)], 1 / (1 + sigma**2))
        return [Point(*point) for point in zip(t, level)]
    if grid == "lcm":
        t = _lcm_timesteps(T, steps)
    elif grid == "endpoint" and spacing != "trailing":
        if not 1 <= steps < T:
            raise ValueError(f"{spacing} spacing needs steps in 1..{T - 1} with this solver, got {steps}")
        t = timesteps(spacing, T, steps + 1, steps_offset)[:-1]
    else:
        t = timesteps(spacing, T, steps, steps_offset)
    return [Point(float(t), alpha_bar[t]) for t in t]


def _check_steps(steps: int, T: int) -> None:
    if not 1 <= steps <= T:
        raise ValueError(f"steps must lie in 1..{T} for a schedule of {T} timesteps, got {steps}")


def _listed(t: Sequence[int], alpha_bar: np.ndarray, steps: int) -> list[Point]:
    t, T = np.asarray(t), len(alpha_bar)
    fits = t.ndim == 1 and len(t) and np.issubdtype(t.dtype, np.integer) and (np.diff(t) < 0).all()
    if not fits or t[0] >= T or t[-1] < 0:
        raise ValueError(
            f"timesteps must be whole numbers that fall, from {T - 1} at most to 0 at least, got {t.tolist()}"
        )
    if len(t) != steps:
        raise ValueError(f"{len(t)} timesteps are listed for {steps} steps")
    return [Point(float(t), alpha_bar[t]) for t in t]


def _even_in_sigma(
    spacing: str, alpha_bar: np.ndarray, steps: int, grid: str, steps_offset: int, between: str
) -> list[Point]:
    """`karras` and `exponential`; see `visits`."""
    _check_steps(steps, len(alpha_bar))
    if alpha_bar[-1] <= 0:
        raise ValueError(f"{spacing} spacing needs a schedule that ends above alpha_bar = 0 (zero terminal SNR)")
    first, last = alpha_bar[-1], alpha_bar[0]
    if grid == "continuous":
        ends = visits(between, alpha_bar, steps, grid=grid, steps_offset=steps_offset)
        first, last = ends[0].alpha_bar, ends[-1].alpha_bar
    first, last = Point(0, first).ve_sigma, Point(0, last).ve_sigma
    if spacing == "karras":
        sigma = np.linspace(first ** (1 / 7), last ** (1 / 7), steps) ** 7
    else:
        sigma = np.exp(np.linspace(np.log(first), np.log(last), steps))
    t = time_of(sigma, alpha_bar)
    return [Point(*point) for point in zip(t if grid == "continuous" else np.round(t), 1 / (1 + sigma**2))]


def time_of(ve_sigma: np.ndarray, alpha_bar: np.ndarray) -> np.ndarray:
    """The fractional timestep of a noise level sigma / alpha, by linear interpolation of its logarithm; clipped."""
    with np.errstate(divide="ignore"):
        table = np.log((1 - alpha_bar) / alpha_bar) / 2
    return np.interp(np.log(ve_sigma), table, np.arange(len(alpha_bar)))


def _lcm_timesteps(T: int, steps: int, distilled: int = 50) -> np.ndarray:
    """`steps` of the `distilled` timesteps that latent consistency models are distilled on (Luo 2023)."""
    distilled = min(distilled, T)
    if not 1 <= steps <= distilled:
        raise ValueError(f"lcm needs steps in 1..{distilled}, got {steps}")
    t = np.arange(distilled, 0, -1) * (T // distilled) - 1
    return t[np.floor(np.linspace(0, distilled, steps, endpoint=False)).astype(int)]


def timesteps(spacing: str, T: int, steps: int, steps_offset: int = 0) -> np.ndarray:
    """The timesteps a sampler visits (Lin 2023, table 2), with the rounding of diffusers.

    Args:
      spacing: `leading` (0 and every T // steps above it), `trailing` (T - 1 and every T / steps below it) or
        `linspace` (both ends).
      T: length of the schedule.
      steps: how many to visit, in [1, T].
      steps_offset: added to `leading` timesteps, and to no others (Stable Diffusion has 1).

    Returns:
      [steps] int64, strictly descending, in [0, T).

    Raises:
      ValueError: unknown spacing, steps out of range, or an offset that leaves [0, T).
    """
    _check_steps(steps, T)
    if spacing == "leading":
        t = np.arange(steps)[::-1] * (T // steps) + steps_offset
        if t[0] >= T or t[-1] < 0:
            highest = T - 1 - (steps - 1) * (T // steps)
            raise ValueError(f"steps_offset must lie in 0..{highest} for {steps} of {T} timesteps, got {steps_offset}")
    elif spacing == "trailing":
        t = np.round(np.arange(T, 0, -T / steps)[:steps]) - 1  # float rounding may give arange one element too many
    elif spacing == "linspace":
        t = np.round(np.linspace(0, T - 1, steps))[::-1]
    else:
        raise ValueError(f"spacing must be one of {', '.join(EVEN)} here, got {spacing!r}")
    return t.astype(np.int64)
