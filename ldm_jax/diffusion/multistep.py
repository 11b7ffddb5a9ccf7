"""Multistep solvers, in the papers' symbols: from a sampler's noise levels to the rows of its table.

A step leads from the noise level `now` to the noise level `after`, of less noise, and uses the predictions of the steps
before it.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from ldm_jax.diffusion.onestep import ddim_step, decay, eps_of, exponential_step
from ldm_jax.diffusion.process import Point
from ldm_jax.diffusion.tables import NOISE, Row, X, Z


def plms(points: list[Point]) -> Iterator[Row]:
    """Liu 2022, eq. 12, with Adams-Bashforth over eps, begun by one Heun step (CompVis' PLMS).

    The network is called twice at the second point; the first of these predictions is not used again.
    """
    weights = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
    start, after = points[:2]
    yield Row(start, after, ddim_step(start, after))
    if len(points) == 2:
        return
    eps = (eps_of(0, after) + eps_of(1, start)) / 2
    z0 = (Z[1] - start.sigma * eps) / start.alpha if start.alpha else X[1]
    yield Row(after, after, after.alpha * z0 + after.sigma * eps)
    for i, (now, after) in enumerate(pairwise(points[1:]), start=2):
        calls = [*range(i, 1, -1), 0][:4]  # newest first; call i stands at point i - 1, call 0 at point 0
        where = [points[max(call - 1, 0)] for call in calls]
        past = [eps_of(i - call, point) for call, point in zip(calls, where)]
        eps = sum(weight * e for weight, e in zip(weights[len(calls)], past))
        z0 = (Z[0] - now.sigma * eps) / now.alpha
        yield Row(now, after, after.alpha * z0 + after.sigma * eps)


def lms(points: list[Point]) -> Iterator[Row]:
    """Adams-Bashforth of order 4 on uneven steps for d(z / alpha) / d(sigma / alpha) = eps (k-diffusion's LMS).

    The lower orders begin it; a first row from alpha = 0, where sigma / alpha is infinite, is an Euler step.
    """
    yield from _adams_bashforth(points, 4, _integrals_of_lagrange)


def deis(points: list[Point], order: int = 2) -> Iterator[Row]:
    """Zhang 2022, eq. 15: eps is a polynomial of log rho, rho = sigma / alpha, over the last calls (tAB-DEIS, log rho).

    First order in the first row, after one from alpha = 0, in a last row that ends on clean data, and in the last of
    fewer than 15 rows, as in diffusers.
    """
    yield from _adams_bashforth(points, order, _integrals_in_log_rho, lower_order_final=True)


def _adams_bashforth(
    points: list[Point],
    order: int,
    integrals: Callable[[float, float, list[float]], Sequence[float]],
    *,
    lower_order_final: bool = False,
) -> Iterator[Row]:
    """z' / alpha' = z / alpha + sum_j c_j eps of j calls ago, where rho' - rho = sum_j c_j.

    `integrals(rho, rho', [rho of j calls ago])` are the c_j: of each call's basis polynomial from rho to rho'.
    """
    n = len(points) - 1
    for i, (now, after) in enumerate(pairwise(points)):
        past = [point for point in points[i::-1] if point.alpha > 0][:order]
        if lower_order_final:  # the last row is of order 1, the row before it of order 2 at most
            past = past[: n - i] if n < 15 or (i == n - 1 and after.sigma == 0) else past
        if len(past) < 2 or after.ratio == now.ratio:
            yield Row(now, after, ddim_step(now, after))
            continue
        c = integrals(now.ratio, after.ratio, [point.ratio for point in past])
        change = sum(weight * eps_of(j, point) for j, (weight, point) in enumerate(zip(c, past)))
        yield Row(now, after, after.alpha * (Z[0] / now.alpha + change))


def _integrals_of_lagrange(start: float, end: float, nodes: list[float]) -> list[float]:
    """The integrals from start to end of the Lagrange polynomials of the nodes."""
    u = (np.array(nodes) - start) / (end - start)
    integrals = []
    for j, node in enumerate(u):
        others = np.delete(u, j)
        antiderivative = np.polyint(np.poly(others) / np.prod(node - others))
        integrals.append((end - start) * np.polyval(antiderivative, 1.0))
    return integrals


def _integrals_in_log_rho(start: float, end: float, nodes: list[float]) -> np.ndarray:
    """The integrals over rho from start to end of the polynomials of log(rho) that interpolate at the nodes."""
    x = np.log(np.array(nodes) / start)  # of rho = start e^x the integrals of x^k are moments
    log_end = np.log(end / start)
    moments = [end - start]
    for k in range(1, len(nodes)):  # by parts: x^k rho - k times the one before
        moments.append(end * log_end**k - k * moments[-1])
    return np.linalg.solve(np.vander(x, increasing=True).T, moments)


def dpmpp_2m(points: list[Point], noisy: bool = False) -> Iterator[Row]:
    """Lu 2022 (DPM-Solver++), algorithm 2, in lambda = log(alpha / sigma), h = the step of lambda, r = h_before / h:

        z' = sigma'/sigma z - alpha' (e^-h - 1) D,    D = (1 + 1/(2r)) z0_hat - 1/(2r) z0_hat_before

    and its stochastic variant (section 4.4): sigma'/sigma e^-h z + alpha' (1 - e^-2h) D + sigma' sqrt(1 - e^-2h) noise.
    First order (D = z0_hat) in the first row, after a row of infinite h (from alpha = 0), in a last row that ends on
    clean data, and in the last of fewer than 15 rows, as in diffusers.
    """
    steps = list(pairwise(points))
    h_before = np.inf
    for i, (now, after) in enumerate(steps):
        h = after.half_log_snr - now.half_log_snr
        last = i == len(steps) - 1 and (after.sigma == 0 or len(steps) < 15)
        D = X[0] if last or np.isinf(h_before) else X[0] + h / h_before / 2 * (X[0] - X[1])
        h_before = h
        if not noisy:
            yield Row(now, after, exponential_step(now, after, Z[0], D))
            continue
        r = decay(now, after)
        change = after.alpha * (1 - r**2) * D + after.sigma * np.sqrt(1 - r**2) * NOISE
        yield Row(now, after, after.sigma / now.sigma * r * Z[0] + change)


def dpmpp_3m(points: list[Point]) -> Iterator[Row]:
    """DPM-Solver++ of third order, in the symbols of `dpmpp_2m` (Lu 2022; diffusers' solver_order = 3).

    The lower orders begin it, also after a row from alpha = 0. Of fewer than 15 rows the last but one is of second
    order and the last of first, as in diffusers; a last row that ends on clean data always is.
    """
    steps = list(pairwise(points))
    h_before: list[float] = []  # newest first
    for i, (now, after) in enumerate(steps):
        h = after.half_log_snr - now.half_log_snr
        left = len(steps) - i
        order = min(3, 1 + len(h_before), left if len(steps) < 15 else 3)
        if order == 1 or after.sigma == 0 or h == 0:
            yield Row(now, after, exponential_step(now, after, Z[0], X[0]))
        else:
            slope = (X[0] - X[1]) * h / h_before[0]
            if order == 2:
                yield Row(now, after, exponential_step(now, after, Z[0], X[0] + slope / 2))
            else:
                yield Row(now, after, _third_order(now, after, slope, h, h_before))
        h_before = [h, *h_before][:2] if np.isfinite(h) else []


def _third_order(now: Point, after: Point, slope: np.ndarray, h: float, h_before: list[float]) -> np.ndarray:
    """The update with the first and second divided differences of z0_hat, D1 and D2; `slope` is the newest."""
    r0, r1 = h_before[0] / h, h_before[1] / h
    bend = (slope - (X[1] - X[2]) / r1) / (r0 + r1)
    D1, D2 = slope + r0 * bend, bend
    phi_1 = -np.expm1(-h)  # 1 - e^-h
    change = (1 - phi_1 / h) * D1 - ((h - phi_1) / h**2 - 1 / 2) * D2
    return exponential_step(now, after, Z[0], X[0]) + after.alpha * change


def unipc(points: list[Point]) -> Iterator[Row]:
    """Zhao 2023, algorithm 5 and 6 with B(h) = e^-h - 1 (bh2), order 2 with the corrector, for z0_hat.

    A row corrects its z by the z0_hat predicted there, then predicts the next z. Order 1 in the first and the last row,
    and next to alpha = 0.
    """
    n = len(points) - 1
    level = [point.half_log_snr for point in points]
    order = [2 if 0 < i < n - 1 and np.isfinite(level[i - 1]) else 1 for i in range(n)]
    for i, (now, after) in enumerate(pairwise(points)):
        z = Z[0] if i == 0 else Z[0] + _unipc_correction(points[: i + 1], order[i - 1])
        z = exponential_step(now, after, z, X[0])
        if order[i] == 2:
            h = level[i + 1] - level[i]
            slope = (X[1] - X[0]) * h / (level[i - 1] - level[i])
            z = z - after.alpha * np.expm1(-h) * slope / 2
        yield Row(now, after, z)


def _unipc_correction(points: list[Point], order: int) -> np.ndarray:
    """UniC minus UniP: how the corrector changes the z of the last predictor, which had this order."""
    *_, before, now = points
    h = now.half_log_snr - before.half_log_snr
    B = np.expm1(-h)
    difference = X[0] - X[1]
    if order == 1:
        return -now.alpha * B * difference / 2
    r = (points[-3].half_log_snr - before.half_log_snr) / h
    slope = (X[2] - X[1]) / r
    phi_2 = -B / h - 1
    phi_3 = -phi_2 / h - 1 / 2
    rho = np.linalg.solve([[1, 1], [r, 1]], [phi_2 / B, 2 * phi_3 / B])
    return -now.alpha * B * (rho[0] * slope + rho[1] * difference - slope / 2)
