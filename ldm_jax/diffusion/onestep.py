"""One-step solvers, in the papers' symbols: from a sampler's noise levels to the rows of its table.

A step leads from the noise level `now` to the noise level `after`, of less noise, by one network call or two.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from ldm_jax.diffusion.process import Point, Process, forward_step, posterior
from ldm_jax.diffusion.tables import NOISE, Row, X, Z


def eps_of(j: int, at: Point) -> np.ndarray:
    """The eps of call number j ago, whose noise level was `at`; [2 HISTORY + 3], in units of the table."""
    return (Z[j] - at.alpha * X[j]) / at.sigma


def decay(now: Point, after: Point) -> float:
    """e^-h, h the step in lambda = log(alpha / sigma): written so that it is 0 at both infinities."""
    return after.sigma * now.alpha / (after.alpha * now.sigma)


def ddim_step(now: Point, after: Point) -> np.ndarray:
    """Song 2021, eq. 12 with sigma_t = 0, [2 HISTORY + 3]: z0_hat noised to the next level by the eps of this one."""
    return after.alpha * X[0] + after.sigma * eps_of(0, now)


def exponential_step(now: Point, after: Point, z: np.ndarray, D: np.ndarray) -> np.ndarray:
    """sigma'/sigma z - alpha' (e^-h - 1) D: the exact solution for a constant z0_hat = D (Lu 2022, eq. 9).

    z, D and the solution are [2 HISTORY + 3], in units of the table.
    """
    on_z = after.sigma / now.sigma
    return on_z * z + (after.alpha - now.alpha * on_z) * D


def ddpm(points: list[Point], variance: str) -> Iterator[Row]:
    """Ho 2020, eq. 7 and algorithm 2, between the timesteps that are kept. The last row adds no noise."""
    for now, after in pairwise(points):
        on_z0, on_z, small = posterior(*now[1:], *after[1:])
        _, large = forward_step(*now[1:], *after[1:])
        noisy = after is not points[-1]
        std = noisy * np.sqrt(large if variance == "fixed_large" else small)
        log_std_ratio = np.log(large / small) / 2 if noisy and variance == "learned" else 0.0
        yield Row(now, after, on_z * Z[0] + on_z0 * X[0] + std * NOISE, log_std_ratio)


def ddim(points: list[Point], eta: float = 0.0) -> Iterator[Row]:
    """Song 2021, eq. 12 and 16; with eta = 0 also Karras 2022, algorithm 1 without the correction (`euler`).

    The next level is that of the next row; subtracting T // steps from t, as diffusers does, fits leading spacing only.
    """
    for now, after in pairwise(points):
        std = eta * np.sqrt(posterior(*now[1:], *after[1:])[2])
        direction = np.sqrt(max(after.sigma**2 - std**2, 0))  # 0 up to rounding when eta = 1, alpha = 0
        yield Row(now, after, after.alpha * X[0] + direction * eps_of(0, now) + std * NOISE)


def euler_a(points: list[Point]) -> Iterator[Row]:
    """Ancestral Euler of k-diffusion: down to sigma_down, then up by noise of sigma_up, both in units of alpha."""
    for now, after in pairwise(points):
        r = decay(now, after)  # = sigma' / sigma, so sigma_down / sigma = r^2 and sigma_up = sigma' sqrt(1 - r^2)
        down = after.sigma * r * eps_of(0, now)
        yield Row(now, after, after.alpha * X[0] + down + after.sigma * np.sqrt(1 - r**2) * NOISE)


def heun(points: list[Point], process: Process) -> Iterator[Row]:
    """Karras 2022, algorithm 1; of rectified flow, Heun's method for its own dz / ds = eps - z0 (Liu 2022)."""
    step = _flow_heun_step if process.is_flow else _heun_step
    for now, after in pairwise(points):
        yield from step(now, after)


def _flow_heun_step(now: Point, after: Point) -> Iterator[Row]:
    """An Euler step, then the same with the mean of both slopes eps - z0; to sigma = 0 an Euler step alone."""
    yield Row(now, after, ddim_step(now, after))
    if after.sigma > 0:
        slopes = eps_of(0, after) - X[0] + eps_of(1, now) - X[1]
        yield Row(after, after, Z[1] + (after.sigma - now.sigma) / 2 * slopes)


def _heun_step(now: Point, after: Point) -> Iterator[Row]:
    """An Euler step, then the same with the mean of both slopes d = eps of z / alpha.

    A step from alpha = 0 or to sigma = 0 is an Euler step alone, as one of its ends has no slope.
    """
    yield Row(now, after, ddim_step(now, after))
    if now.alpha > 0 and after.sigma > 0:
        half_step = (after.ratio - now.ratio) / 2
        yield Row(after, after, Z[0] + after.alpha * half_step * (eps_of(0, after) - eps_of(1, now)))


def kdpm2(points: list[Point], process: Process) -> Iterator[Row]:
    """Lu 2022 (DPM-Solver-2) as in k-diffusion: Euler to the middle in log(sigma / alpha), then a step by its slope.

    A step from alpha = 0 or to sigma = 0 is an Euler step alone, as it has no such middle.
    """
    for now, after in pairwise(points):
        yield from _midpoint_step(now, after, after, process)


def kdpm2_a(points: list[Point], process: Process) -> Iterator[Row]:
    """Ancestral `kdpm2`: down to sigma_down, then up by noise of sigma_up, both as in `euler_a`."""
    for now, after in pairwise(points):
        r = decay(now, after)
        ratio = after.ratio * r  # sigma_down / alpha
        down = Point(after.t, after.alpha, after.alpha * ratio)  # at the scale of `after`
        *first, last = _midpoint_step(now, down, after, process)
        yield from first
        yield last._replace(weights=last.weights + after.sigma * np.sqrt(1 - r**2) * NOISE)


def _midpoint_step(now: Point, end: Point, after: Point, process: Process) -> Iterator[Row]:
    """The rows of a step of `kdpm2` to the ratio of `end`, counted as a sample at `after`."""
    if now.alpha == 0 or end.sigma == 0:
        yield Row(now, after, ddim_step(now, end))
        return
    ratio = float(np.sqrt(now.ratio * end.ratio))
    middle = process.between(float(process.time_of(ratio)), ratio)
    yield Row(now, middle, ddim_step(now, middle))
    step = (end.ratio - now.ratio) * eps_of(0, middle)
    yield Row(middle, after, end.alpha * (Z[1] / now.alpha + step))


def edm(points: list[Point], churn: float, process: Process, stop: Point) -> Iterator[Row]:
    """Karras 2022, algorithm 2, with S_noise = 1 and no bounds on sigma: noise is added before each step but the first.

    It belongs to the last row of the step before. There is none after the step to `stop`, the last that is taken. The
    raised sigma / alpha never exceeds that of the process.
    """
    gamma = min(churn / (len(points) - 1), np.sqrt(2) - 1)
    highest = process.point(-1).ratio
    now = points[0]
    for after in points[1:]:
        *predictor, last = _heun_step(now, after)
        yield from predictor
        if after == stop or gamma == 0:
            yield last
            now = after
            continue
        raised = min(after.ratio * (1 + gamma), highest)
        now = process.between(float(process.time_of(raised)), raised)
        weights = now.alpha / after.alpha * last.weights
        weights = weights + now.alpha * np.sqrt(max(raised**2 - after.ratio**2, 0)) * NOISE
        yield Row(last.at, now, weights)


def dpmpp_2s(points: list[Point]) -> Iterator[Row]:
    """Lu 2022 (DPM-Solver++), algorithm 1: pairs of rows, both of which start at the first one's z.

    Single rows of first order: from alpha = 0, to clean data, and the last of an odd number.
    """
    lead, tail = int(points[0].alpha == 0), int(points[-1].sigma == 0)
    pairs = (len(points) - 1 - lead - tail) // 2
    second = {lead + 2 * k + 1 for k in range(pairs)}
    for i, (now, after) in enumerate(pairwise(points)):
        if i not in second:
            yield Row(now, after, ddim_step(now, after))
            continue
        start = points[i - 1]
        r = (now.half_log_snr - start.half_log_snr) / (after.half_log_snr - start.half_log_snr)
        yield Row(now, after, exponential_step(start, after, Z[1], X[1] + (X[0] - X[1]) / (2 * r)))


def boundary_scalings(t: Any, sigma_data: float = 0.5, time_scale: float = 10.0) -> tuple[Any, Any]:
    """(c_skip, c_out) of the consistency function c_skip z_t + c_out z0_hat at timesteps t (Luo 2023, eq. 9).

    1 and 0 at t = 0, the boundary condition. t is a number or an array, of NumPy or JAX; the defaults are diffusers'.
    """
    t = t * time_scale
    return sigma_data**2 / (t**2 + sigma_data**2), t / (t**2 + sigma_data**2) ** 0.5


def lcm(points: list[Point]) -> Iterator[Row]:
    """Luo 2023, algorithm 3, with the boundary scalings of its eq. 9: denoise, and noise again up to the next level."""
    for now, after in pairwise(points):
        c_skip, c_out = boundary_scalings(now.t)
        yield Row(now, after, after.alpha * (c_skip * Z[0] + c_out * X[0]) + after.sigma * NOISE)


def tcd(points: list[Point], process: Process, eta: float = 0.0) -> Iterator[Row]:
    """Zheng 2024, algorithm 4, of trajectory consistency models; eta is its gamma. The last row adds no noise.

    A DDIM step to s = (1 - gamma) t', rounded down as in diffusers, then the forward process up to t'.
    """
    for now, after in pairwise(points):
        last = after is points[-1]
        s = after if last or eta == 0 else process.point(int(np.floor((1 - eta) * after.t)))
        keep, variance = forward_step(*after[1:], *s[1:])
        yield Row(now, after, keep * ddim_step(now, s) + np.sqrt(max(variance, 0)) * NOISE)
