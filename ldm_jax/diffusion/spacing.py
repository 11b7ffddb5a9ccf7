"""The timesteps of a sampler: the noise levels of a process at which it calls the network, in float64."""

from collections.abc import Sequence

import numpy as np

from ldm_jax.diffusion.flow import EVEN, FlowSpacing
from ldm_jax.diffusion.process import Point, Process
from ldm_jax.diffusion.uneven import UNEVEN, uneven_levels

TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")  # even in time
SPACINGS = (*TIMESTEP_SPACINGS, *UNEVEN, "flow")
DISTILLED = 50  # timesteps that latent consistency models are distilled on (Luo 2023), at most


def noise_levels(
    spacing: str | Sequence[int],
    process: Process,
    steps: int,
    *,
    grid: str = "integer",
    steps_offset: int = 0,
    between: str = "linspace",
    distilled_part: float = 1.0,
    flow: FlowSpacing = EVEN,
) -> list[Point]:
    """The noise levels of a sampler, from noise to data.

    Args:
      spacing: `leading`, `trailing` or `linspace`, even in time (see `timesteps`); `karras` (Karras 2022, eq. 5, with
        rho = 7) or `exponential`, even in a power or the logarithm of sigma / alpha (and so in the lambda of Lu 2022);
        `beta`, quantiles of Beta(0.6, 0.6) in sigma / alpha (Lee 2024); `flow`, even in the sigma of rectified
        flow and not rounded to timesteps, whatever the grid; or timesteps, descending.
      process: the forward process, of T timesteps.
      steps: how many; at most T.
      grid: `integer`: timesteps of the process, and for spacings uneven in time the nearest ones as the network's t.
        `endpoint`: the same, but of `leading` and `linspace` the end point counts as one and is left out.
        `continuous`: `linspace` and spacings uneven in time lie between the timesteps: sigma / alpha is linear in t for
        `linspace` (sigma of rectified flow), its logarithm for the others. `fractional`: as `integer`, but the uneven
        ones are not rounded.
        `lcm`: every T // 50th timestep, thinned (Luo 2023).
      steps_offset: see `timesteps`.
      between: the even spacing whose first and last points the uneven ones span on a continuous grid.
      distilled_part: of the grid `lcm`: the fraction of the timesteps, from data on, that the steps are taken from.
      flow: the shift of the spacing `flow`, and how it is placed.

    Raises:
      ValueError: unknown spacing, steps or timesteps out of range, or a spacing uneven in time where alpha = 0.
    """
    T = len(process)
    if not isinstance(spacing, str):
        return _listed(spacing, process, steps)
    if spacing not in SPACINGS:
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")
    if spacing not in TIMESTEP_SPACINGS:
        if grid == "lcm":
            raise ValueError(f"lcm and tcd have timesteps of their own; {spacing} spacing is for the other samplers")
        if spacing == "flow":
            _check_steps(steps, T)
            if not process.is_flow:
                raise ValueError("the spacing flow is for rectified flow, where alpha + sigma = 1; choose another")
            return flow.levels(T, steps)
        return _even_in_ratio(spacing, process, steps, grid, steps_offset, between)
    if grid == "continuous" and spacing == "linspace":
        _check_steps(steps, T)
        t = np.linspace(0, T - 1, steps, dtype=np.float32)[::-1].astype(np.float64)
        if process.is_flow:  # alpha and sigma are linear in t
            alpha, sigma = (np.interp(t, np.arange(T), table) for table in (process.alpha, process.sigma))
            return [Point(*map(float, level)) for level in zip(t, alpha, sigma)]
        ratio = np.interp(t, np.arange(T), [process.point(i).ratio for i in range(T)])
        return [process.point(int(t)) if t % 1 == 0 else process.between(t, r) for t, r in zip(t, ratio)]
    if grid == "lcm":
        t = _lcm_timesteps(T, steps, distilled_part)
    elif grid == "endpoint" and spacing != "trailing":
        if not 1 <= steps < T:
            raise ValueError(f"{spacing} spacing needs steps in 1..{T - 1} with this solver, got {steps}")
        t = timesteps(spacing, T, steps + 1, steps_offset)[:-1]
    else:
        t = timesteps(spacing, T, steps, steps_offset)
    return [process.point(t) for t in t]


def _check_steps(steps: int, T: int) -> None:
    if not 1 <= steps <= T:
        raise ValueError(f"steps must lie in 1..{T} for a schedule of {T} timesteps, got {steps}")


def _listed(t: Sequence[int], process: Process, steps: int) -> list[Point]:
    t, T = np.asarray(t), len(process)
    fits = t.ndim == 1 and len(t) and np.issubdtype(t.dtype, np.integer) and (np.diff(t) < 0).all()
    if not fits or t[0] >= T or t[-1] < 0:
        raise ValueError(f"timesteps must be descending whole numbers in 0..{T - 1}, got {t.tolist()}")
    if len(t) != steps:
        raise ValueError(f"{len(t)} timesteps are listed for {steps} steps")
    return [process.point(t) for t in t]


def _even_in_ratio(
    spacing: str, process: Process, steps: int, grid: str, steps_offset: int, between: str
) -> list[Point]:
    """`karras`, `exponential` and `beta`; see `noise_levels`."""
    _check_steps(steps, len(process))
    if process.alpha[-1] <= 0:
        raise ValueError(f"{spacing} spacing needs a schedule that ends above alpha = 0 (zero terminal SNR)")
    first, last = process.point(-1), process.point(0)
    if grid == "continuous":
        ends = noise_levels(between, process, steps, grid=grid, steps_offset=steps_offset)
        first, last = ends[0], ends[-1]
    ratio = uneven_levels(spacing, first.ratio, last.ratio, steps)
    points = [process.between(t, r) for t, r in zip(process.time_of(ratio), ratio)]
    if grid in ("continuous", "fractional"):
        return points
    return [point._replace(t=float(np.round(point.t))) for point in points]


def num_distilled(T: int) -> int:
    """The number of timesteps of latent consistency models: 50, or all, if T is less (Luo 2023).

    Raises ValueError if 50 does not divide a larger T: the highest of them would not be T - 1, where z is noise.
    """
    if T > DISTILLED and T % DISTILLED:
        raise ValueError(f"consistency models need a multiple of {DISTILLED} timesteps, or fewer; got {T}")
    return min(DISTILLED, T)


def _lcm_timesteps(T: int, steps: int, part: float) -> np.ndarray:
    """`steps` of the lower `part` of the timesteps that latent consistency models are distilled on (Luo 2023)."""
    distilled = num_distilled(T)
    available = int(distilled * part)
    if not 1 <= steps <= available:
        of = f" with strength {part}: of {distilled} timesteps {available} are left" if part < 1 else ""
        raise ValueError(f"lcm and tcd need steps in 1..{available}{of}, got {steps}")
    t = np.arange(available, 0, -1) * (T // distilled) - 1
    return t[np.floor(np.linspace(0, available, steps, endpoint=False)).astype(int)]


def timesteps(spacing: str, T: int, steps: int, steps_offset: int = 0) -> np.ndarray:
    """The timesteps of an even spacing in [0, T), [steps] int64, strictly descending, with the rounding of diffusers.

    `leading` is 0 and every T // steps above it, plus steps_offset (1 in Stable Diffusion), `trailing` is T - 1 and
    every T / steps below it, `linspace` has both ends (Lin 2023, table 2); a single step of it is at 0, near
    the data, as in diffusers.
    Raises ValueError for unknown spacing, steps out of range, or an offset that leaves [0, T).
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
        raise ValueError(f"spacing must be one of {', '.join(TIMESTEP_SPACINGS)} here, got {spacing!r}")
    return t.astype(np.int64)
