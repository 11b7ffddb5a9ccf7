"""Noise schedules as float64 tables on the host, and the timesteps at which a sampler visits them.

Every schedule is variance preserving and discrete: t in [0, T), alpha_bar decreasing, t = T - 1 the noisiest. The
tables stay in NumPy float64 until a function of `process` or `solvers` casts what it needs from them, once, to float32.
"""

from typing import NamedTuple

import numpy as np

SCHEDULES = ("linear", "scaled_linear", "cosine")
SPACINGS = ("leading", "trailing", "linspace")


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
    if not 1 <= steps <= T:
        raise ValueError(f"steps must lie in 1..{T} for a schedule of {T} timesteps, got {steps}")
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
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")
    return t.astype(np.int64)
