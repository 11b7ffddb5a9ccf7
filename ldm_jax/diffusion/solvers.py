"""Solvers of the reverse process, from a sampler's noise levels to the rows of its table, in the papers' symbols.

A step leads from the noise level `now` to the noise level `after`, of less noise.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import numpy as np

from ldm_jax.diffusion.prediction import coefficient_tables
from ldm_jax.diffusion.process import CLEAN, VARIANCES, Point, Process, forward_step, posterior
from ldm_jax.diffusion.spacing import noise_levels
from ldm_jax.diffusion.tables import NOISE, Row, Table, X, Z, tabulate


def make_table(
    solver: str,
    process: Process,
    steps: int,
    *,
    prediction: str = "eps",
    eta: float = 0.0,
    churn: float = 0.0,
    variance: str = "fixed_small",
    spacing: str | Sequence[int] = "leading",
    between: str = "linspace",
    steps_offset: int = 0,
    set_alpha_to_one: bool = True,
    strength: float = 1.0,
) -> Table:
    """The coefficient table of a solver on a forward process.

    Args:
      solver: a key of SOLVERS.
      process: the forward process that the network was trained with; T is its length.
      steps: in [1, T]; network calls but for `heun` and `edm` (2 steps - 1) and `plms` (steps + 1).
      prediction: of the network; only checked against the process, as a table works on z0.
      eta: ddim's fraction of the ancestral noise, in [0, 1]; 0 is deterministic, 1 is ddpm with the small variance.
      churn: edm's S_churn, the noise added before each step, divided over the steps; 0 is `heun`.
      variance: ddpm's: `fixed_small` is the posterior's, `fixed_large` the forward step's (Ho 2020, section 3.2),
        `learned` is predicted by the network (Nichol 2021, eq. 15).
      spacing, between, steps_offset: of the timesteps, see `spacing.noise_levels`.
      set_alpha_to_one: whether the last row ends on clean data or at timestep 0 (Stable Diffusion's DDIM;
        `final_sigmas_type` "zero" and "sigma_min" in diffusers' DPM-Solver).
      strength: the fraction of the steps that is run, in (0, 1], rounded down as in diffusers; below 1 the first row
        is at a noise level in the middle, for a noised image.

    Raises:
      ValueError: unknown option, one out of range or of another solver, or a prediction that does not fit the process.
    """
    for name, value, choices in (("solver", solver, SOLVERS), ("variance", variance, VARIANCES)):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    if churn < 0:
        raise ValueError(f"churn must be 0 or more, got {churn}")
    for name, value, owner in (("variance", variance, "ddpm"), ("eta", eta, "ddim"), ("churn", churn, "edm")):
        if value not in (0, "fixed_small") and solver != owner:
            raise ValueError(f"{name} is for {owner} only, got {name} = {value} with solver {solver!r}")
    coefficient_tables(prediction, process)

    grid, rows = SOLVERS[solver]
    options = {"ddpm": {"variance": variance}, "ddim": {"eta": eta}, "edm": {"churn": churn, "process": process}}
    points = noise_levels(spacing, process, steps, grid=grid, steps_offset=steps_offset, between=between)
    last = CLEAN if set_alpha_to_one else process.point(0)
    points = [*points[first_step(steps, strength) :], last]
    return tabulate(rows(points, **options.get(solver, {})), len(process))


def make_inversion_table(process: Process, steps: int, *, spacing: str = "leading", steps_offset: int = 0) -> Table:
    """The table of DDIM inversion, from data to noise (Song 2021, section 4.3, as Mokady 2022 and diffusers do it).

    Each row calls the network at the timestep on which it ends, where the sampler would call it. The data count as
    timestep 0, as clean data and a z0_hat do not determine eps. Arguments and errors: see `make_table`.
    """
    points = [process.point(0), *noise_levels(spacing, process, steps, steps_offset=steps_offset)[::-1]]
    rows = (Row(now._replace(t=after.t), after, _ddim_step(now, after)) for now, after in pairwise(points))
    return tabulate(rows, len(process))


def first_step(steps: int, strength: float) -> int:
    """The index of the first step that is run at a strength, counted as in diffusers."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength must lie above 0 and up to 1, got {strength}")
    done = int(steps * strength)
    if done == 0:
        raise ValueError(f"strength {strength} of {steps} steps runs none; use {int(np.ceil(1 / strength))} or more")
    return steps - done


def _eps(j: int, at: Point) -> np.ndarray:
    """The eps of call number j ago, whose noise level was `at`."""
    return (Z[j] - at.alpha * X[j]) / at.sigma


def _decay(now: Point, after: Point) -> float:
    """e^-h, h the step in lambda = log(alpha / sigma): written so that it is 0 at both infinities."""
    return after.sigma * now.alpha / (after.alpha * now.sigma)


def _ddim_step(now: Point, after: Point) -> np.ndarray:
    """Song 2021, eq. 12 with sigma_t = 0: z0_hat noised to the next level by the eps of this one."""
    return after.alpha * X[0] + after.sigma * _eps(0, now)


def _exponential_step(now: Point, after: Point, z: np.ndarray, D: np.ndarray) -> np.ndarray:
    """sigma'/sigma z - alpha' (e^-h - 1) D: the exact solution for a constant z0_hat = D (Lu 2022, eq. 9)."""
    on_z = after.sigma / now.sigma
    return on_z * z + (after.alpha - now.alpha * on_z) * D


def _ddpm(points: list[Point], variance: str) -> Iterator[Row]:
    """Ho 2020, eq. 7 and algorithm 2, between the timesteps that are kept. The last row adds no noise."""
    for now, after in pairwise(points):
        on_z0, on_z, small = posterior(*now[1:], *after[1:])
        _, large = forward_step(*now[1:], *after[1:])
        noisy = after is not points[-1]
        std = noisy * np.sqrt(large if variance == "fixed_large" else small)
        log_std_ratio = np.log(large / small) / 2 if noisy and variance == "learned" else 0.0
        yield Row(now, after, on_z * Z[0] + on_z0 * X[0] + std * NOISE, log_std_ratio)


def _ddim(points: list[Point], eta: float = 0.0) -> Iterator[Row]:
    """Song 2021, eq. 12 and 16; with eta = 0 also Karras 2022, algorithm 1 without the correction (`euler`).

    The next level is that of the next row; subtracting T // steps from t, as diffusers does, fits leading spacing only.
    """
    for now, after in pairwise(points):
        std = eta * np.sqrt(posterior(*now[1:], *after[1:])[2])
        direction = np.sqrt(max(after.sigma**2 - std**2, 0))  # 0 up to rounding when eta = 1, alpha = 0
        yield Row(now, after, after.alpha * X[0] + direction * _eps(0, now) + std * NOISE)


def _plms(points: list[Point]) -> Iterator[Row]:
    """Liu 2022, eq. 12, with Adams-Bashforth over eps, begun by one Heun step (CompVis' PLMS).

    The network is called twice at the second point; the first of these predictions is not used again.
    """
    weights = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
    start, after = points[:2]
    yield Row(start, after, _ddim_step(start, after))
    if len(points) == 2:
        return
    eps = (_eps(0, after) + _eps(1, start)) / 2
    z0 = (Z[1] - start.sigma * eps) / start.alpha if start.alpha else X[1]
    yield Row(after, after, after.alpha * z0 + after.sigma * eps)
    for i, (now, after) in enumerate(pairwise(points[1:]), start=2):
        calls = [*range(i, 1, -1), 0][:4]  # newest first; call i stands at point i - 1, call 0 at point 0
        where = [points[max(call - 1, 0)] for call in calls]
        past = [_eps(i - call, point) for call, point in zip(calls, where)]
        eps = sum(weight * e for weight, e in zip(weights[len(calls)], past))
        z0 = (Z[0] - now.sigma * eps) / now.alpha
        yield Row(now, after, after.alpha * z0 + after.sigma * eps)


def _euler_a(points: list[Point]) -> Iterator[Row]:
    """Ancestral Euler of k-diffusion: down to sigma_down, then up by noise of sigma_up, both in units of alpha."""
    for now, after in pairwise(points):
        r = _decay(now, after)  # = sigma' / sigma, so sigma_down / sigma = r^2 and sigma_up = sigma' sqrt(1 - r^2)
        down = after.sigma * r * _eps(0, now)
        yield Row(now, after, after.alpha * X[0] + down + after.sigma * np.sqrt(1 - r**2) * NOISE)


def _heun(points: list[Point]) -> Iterator[Row]:
    """Karras 2022, algorithm 1."""
    for now, after in pairwise(points):
        yield from _heun_step(now, after)


def _heun_step(now: Point, after: Point) -> Iterator[Row]:
    """An Euler step, then the same with the mean of both slopes d = eps of z / alpha.

    A step from alpha = 0 or to sigma = 0 is an Euler step alone, as one of its ends has no slope.
    """
    yield Row(now, after, _ddim_step(now, after))
    if now.alpha > 0 and after.sigma > 0:
        half_step = (after.ratio - now.ratio) / 2
        yield Row(after, after, Z[0] + after.alpha * half_step * (_eps(0, after) - _eps(1, now)))


def _edm(points: list[Point], churn: float, process: Process) -> Iterator[Row]:
    """Karras 2022, algorithm 2, with S_noise = 1 and no bounds on sigma: noise is added before each step but the first.

    It belongs to the last row of the step before. The raised sigma / alpha never exceeds that of the process.
    """
    gamma = min(churn / (len(points) - 1), np.sqrt(2) - 1)
    highest = process.point(-1).ratio
    now = points[0]
    for after in points[1:]:
        *predictor, last = _heun_step(now, after)
        yield from predictor
        if after.sigma == 0 or gamma == 0:
            yield last
            now = after
            continue
        raised = min(after.ratio * (1 + gamma), highest)
        now = process.between(float(process.time_of(raised)), raised)
        weights = now.alpha / after.alpha * last.weights
        weights = weights + now.alpha * np.sqrt(max(raised**2 - after.ratio**2, 0)) * NOISE
        yield Row(last.at, now, weights)


def _dpmpp_2m(points: list[Point], noisy: bool = False) -> Iterator[Row]:
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
            yield Row(now, after, _exponential_step(now, after, Z[0], D))
            continue
        r = _decay(now, after)
        change = after.alpha * (1 - r**2) * D + after.sigma * np.sqrt(1 - r**2) * NOISE
        yield Row(now, after, after.sigma / now.sigma * r * Z[0] + change)


def _dpmpp_2s(points: list[Point]) -> Iterator[Row]:
    """Lu 2022 (DPM-Solver++), algorithm 1: pairs of rows, both of which start at the first one's z.

    Single rows of first order: from alpha = 0, to clean data, and the last of an odd number.
    """
    lead, tail = int(points[0].alpha == 0), int(points[-1].sigma == 0)
    pairs = (len(points) - 1 - lead - tail) // 2
    second = {lead + 2 * k + 1 for k in range(pairs)}
    for i, (now, after) in enumerate(pairwise(points)):
        if i not in second:
            yield Row(now, after, _ddim_step(now, after))
            continue
        start = points[i - 1]
        r = (now.half_log_snr - start.half_log_snr) / (after.half_log_snr - start.half_log_snr)
        yield Row(now, after, _exponential_step(start, after, Z[1], X[1] + (X[0] - X[1]) / (2 * r)))


def _unipc(points: list[Point]) -> Iterator[Row]:
    """Zhao 2023, algorithm 5 and 6 with B(h) = e^-h - 1 (bh2), order 2 with the corrector, for z0_hat.

    A row corrects its z by the z0_hat predicted there, then predicts the next z. Order 1 in the first and the last row,
    and next to alpha = 0.
    """
    n = len(points) - 1
    level = [point.half_log_snr for point in points]
    order = [2 if 0 < i < n - 1 and np.isfinite(level[i - 1]) else 1 for i in range(n)]
    for i, (now, after) in enumerate(pairwise(points)):
        z = Z[0] if i == 0 else Z[0] + _unipc_correction(points[: i + 1], order[i - 1])
        z = _exponential_step(now, after, z, X[0])
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


def _lcm(points: list[Point], sigma_data: float = 0.5, time_scale: float = 10.0) -> Iterator[Row]:
    """Luo 2023, algorithm 3, with the boundary scalings of its eq. 9: denoise, and noise again up to the next level."""
    for now, after in pairwise(points):
        t = now.t * time_scale
        c_skip = sigma_data**2 / (t**2 + sigma_data**2)
        c_out = t / np.hypot(t, sigma_data)
        yield Row(now, after, after.alpha * (c_skip * Z[0] + c_out * X[0]) + after.sigma * NOISE)


# Each solver: its grid of timesteps (see `spacing.noise_levels`), and the rows of its table.
SOLVERS: dict[str, tuple[str, Callable[..., Iterator[Row]]]] = {
    "ddpm": ("integer", _ddpm),  # ancestral sampling (Ho 2020), respaced as Nichol 2021 when steps < T
    "ddim": ("integer", _ddim),  # Song 2021
    "plms": ("integer", _plms),  # Liu 2022, as in CompVis' repository
    "euler": ("continuous", _ddim),  # this and the next two as in k-diffusion
    "euler_a": ("continuous", _euler_a),
    "heun": ("continuous", _heun),
    "edm": ("continuous", _edm),  # the stochastic sampler of Karras 2022
    "dpmpp_2m": ("endpoint", _dpmpp_2m),  # this and the next two: DPM-Solver++ (Lu 2022), second order
    "dpmpp_2m_sde": ("endpoint", partial(_dpmpp_2m, noisy=True)),
    "dpmpp_2s": ("endpoint", _dpmpp_2s),
    "unipc": ("endpoint", _unipc),  # Zhao 2023, second order with the corrector
    "lcm": ("lcm", _lcm),  # multistep sampling of latent consistency models (Luo 2023)
}
