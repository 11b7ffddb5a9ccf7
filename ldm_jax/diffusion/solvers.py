"""Every sampler as a function from the noise levels it visits to the rows of a table, in the paper's symbols.

A move leads from the point `now` to the point `after`, of less noise.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import numpy as np

from ldm_jax.diffusion.prediction import coefficient_tables
from ldm_jax.diffusion.process import CLEAN, VARIANCES, Point, Process, forward_step, posterior
from ldm_jax.diffusion.spacing import visits
from ldm_jax.diffusion.tables import NOISE, Row, Table, X, Z, tabulate

GRID_OF = {
    "ddpm": "integer",
    "ddim": "integer",
    "plms": "integer",
    "euler": "continuous",
    "euler_a": "continuous",
    "heun": "continuous",
    "edm": "continuous",
    "dpmpp_2m": "endpoint",
    "dpmpp_2m_sde": "endpoint",
    "dpmpp_2s": "endpoint",
    "unipc": "endpoint",
    "lcm": "lcm",
}
SOLVERS = tuple(GRID_OF)


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
    """The rows of a solver on a forward process.

    Args:
      solver: one of SOLVERS. `ddpm` is ancestral (Ho 2020; respaced as Nichol 2021 when steps < T), `ddim` Song 2021,
        `plms` Liu 2022 as in CompVis' repository, `euler`, `euler_a` and `heun` k-diffusion's, `edm` Karras 2022's
        stochastic one, `dpmpp_2m`, `dpmpp_2m_sde` and `dpmpp_2s` DPM-Solver++ (Lu 2022), second order, `unipc` Zhao
        2023, second order with the corrector, and `lcm` the multistep sampling of consistency models (Luo 2023).
      process: the one that the network was trained with; T is its length.
      steps: in [1, T]; network calls but for `heun` and `edm` (2 steps - 1) and `plms` (steps + 1).
      prediction: of the network; only checked against the process, as a table works on z0.
      eta: ddim's fraction of the ancestral noise, in [0, 1]; 0 is deterministic, 1 is ddpm with the small variance.
      churn: edm's S_churn, the noise added before each step, divided over the steps; 0 is `heun`.
      variance: ddpm's: `fixed_small` is the posterior's, `fixed_large` the forward step's (Ho 2020, section 3.2),
        `learned` is predicted by the network (Nichol 2021, eq. 15).
      spacing: the timesteps: see `spacing.visits`, as for `between` and `steps_offset`.
      set_alpha_to_one: whether the last row ends on clean data or at timestep 0 (Stable Diffusion's DDIM;
        `final_sigmas_type` "zero" and "sigma_min" in diffusers' DPM-Solver).
      strength: the fraction of the steps that is run, in (0, 1], rounded down as in diffusers: less than 1 begins in
        the middle, at the noise level of the first row, from a noised image.

    Raises:
      ValueError: unknown option, one out of range or of another solver, or a prediction that does not fit the process.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if variance not in VARIANCES:
        raise ValueError(f"variance must be one of {', '.join(VARIANCES)}, got {variance!r}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    if churn < 0:
        raise ValueError(f"churn must be 0 or more, got {churn}")
    for name, value, owner in (("variance", variance, "ddpm"), ("eta", eta, "ddim"), ("churn", churn, "edm")):
        if value not in (0, "fixed_small") and solver != owner:
            raise ValueError(f"{name} is for {owner} only, got {name} = {value} with solver {solver!r}")
    coefficient_tables(prediction, process)

    points = visits(spacing, process, steps, grid=GRID_OF[solver], steps_offset=steps_offset, between=between)
    last = CLEAN if set_alpha_to_one else process.point(0)
    points = [*points[first_step(steps, strength) :], last]
    if solver == "ddpm":
        rows = _ddpm(points, variance)
    elif solver == "ddim":
        rows = _ddim(points, eta)
    elif solver == "edm":
        rows = _edm(points, churn, process)
    elif solver == "lcm":
        rows = _lcm(points)
    else:
        rows = _PLAIN[solver](points)
    return tabulate(rows, len(process))


def make_inversion_table(process: Process, steps: int, *, spacing: str = "leading", steps_offset: int = 0) -> Table:
    """DDIM inversion, from data to noise (Song 2021, section 4.3; the convention of Mokady 2022 and diffusers).

    Each row calls the network at the timestep it goes to, where the sampler would have called it. The data are taken to
    be at timestep 0, as clean data and a z0_hat do not determine eps. Arguments and errors are those of `make_table`.
    """
    points = [process.point(0), *visits(spacing, process, steps, steps_offset=steps_offset)[::-1]]
    rows = []
    for now, after in pairwise(points):
        at = now._replace(t=after.t)
        rows.append(Row(at, after, after.alpha * X[0] + after.sigma * _eps(0, at)))
    return tabulate(rows, len(process))


def first_step(steps: int, strength: float) -> int:
    """How many of the steps a strength skips, as diffusers counts."""
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


def _ddpm(points: list[Point], variance: str) -> Iterator[Row]:
    """Ho 2020, eq. 7 and algorithm 2, between the timesteps that are kept. The last row adds no noise."""
    for now, after in pairwise(points):
        levels = now.alpha, now.sigma, after.alpha, after.sigma
        on_z0, on_z, small = posterior(*levels)
        _, large = forward_step(*levels)
        noisy = after is not points[-1]
        std = noisy * np.sqrt(large if variance == "fixed_large" else small)
        log_std_ratio = np.log(large / small) / 2 if noisy and variance == "learned" else 0.0
        yield Row(now, after, on_z * Z[0] + on_z0 * X[0] + std * NOISE, log_std_ratio)


def _ddim(points: list[Point], eta: float) -> Iterator[Row]:
    """Song 2021, eq. 12 and 16.

    The next level is that of the next row, whatever the spacing; subtracting T // steps from t, as diffusers does, is
    right for leading spacing only.
    """
    for now, after in pairwise(points):
        std = eta * np.sqrt(posterior(now.alpha, now.sigma, after.alpha, after.sigma)[2])
        direction = np.sqrt(max(after.sigma**2 - std**2, 0))  # 0 up to rounding when eta = 1, alpha = 0
        yield Row(now, after, after.alpha * X[0] + direction * _eps(0, now) + std * NOISE)


def _plms(points: list[Point]) -> Iterator[Row]:
    """Liu 2022, eq. 12, with Adams-Bashforth over eps, begun by one Heun step (CompVis' PLMS).

    The network is called twice at the second point; the first of these predictions is not used again.
    """
    weights = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
    yield Row(points[0], points[1], points[1].alpha * X[0] + points[1].sigma * _eps(0, points[0]))
    if len(points) == 2:
        return
    start, after = points[:2]
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


def _euler(points: list[Point]) -> Iterator[Row]:
    """Karras 2022, algorithm 1 without the correction: in alpha and sigma, DDIM."""
    return _ddim(points, eta=0.0)


def _euler_a(points: list[Point]) -> Iterator[Row]:
    """k-diffusion's ancestral Euler: down to sigma_down, up again by noise of sigma_up, both in units of alpha."""
    for now, after in pairwise(points):
        r = _decay(now, after)  # = sigma' / sigma, so sigma_down / sigma = r^2 and sigma_up = sigma' sqrt(1 - r^2)
        down = after.sigma * r * _eps(0, now)
        yield Row(now, after, after.alpha * X[0] + down + after.sigma * np.sqrt(1 - r**2) * NOISE)


def _heun(points: list[Point]) -> Iterator[Row]:
    """Karras 2022, algorithm 1: an Euler step, then the same with the mean of both slopes d = eps of z / alpha.

    A step from alpha = 0 or to sigma = 0 is Euler's alone: one of the two has no slope.
    """
    for now, after in pairwise(points):
        yield from _heun_step(now, after)


def _heun_step(now: Point, after: Point) -> Iterator[Row]:
    yield Row(now, after, after.alpha * X[0] + after.sigma * _eps(0, now))
    if now.alpha > 0 and after.sigma > 0:
        half_step = (after.ratio - now.ratio) / 2
        yield Row(after, after, Z[0] + after.alpha * half_step * (_eps(0, after) - _eps(1, now)))


def _edm(points: list[Point], churn: float, process: Process) -> Iterator[Row]:
    """Karras 2022, algorithm 2, with S_noise = 1 and no bounds on sigma: before each step, noise is added.

    The noise belongs to the last row of the step before. The first step needs none, as it starts from noise alone; the
    raised sigma / alpha never exceeds that of the process.
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
        if noisy:
            r = _decay(now, after)
            move = after.alpha * (1 - r**2) * D + after.sigma * np.sqrt(1 - r**2) * NOISE
            yield Row(now, after, after.sigma / now.sigma * r * Z[0] + move)
        else:
            on_z = after.sigma / now.sigma
            yield Row(now, after, on_z * Z[0] + (after.alpha - now.alpha * on_z) * D)
        h_before = h


def _dpmpp_2s(points: list[Point]) -> Iterator[Row]:
    """Lu 2022 (DPM-Solver++), algorithm 1: pairs of rows, of which the second starts again from where the first did.

    First order alone: a row from alpha = 0, one that ends on clean data, and one that is left over.
    """
    lead, tail = int(points[0].alpha == 0), int(points[-1].sigma == 0)
    pairs = (len(points) - 1 - lead - tail) // 2
    second = {lead + 2 * k + 1 for k in range(pairs)}
    for i, (now, after) in enumerate(pairwise(points)):
        if i not in second:
            yield Row(now, after, after.alpha * X[0] + after.sigma * _eps(0, now))
            continue
        start = points[i - 1]
        r = (now.half_log_snr - start.half_log_snr) / (after.half_log_snr - start.half_log_snr)
        on_z = after.sigma / start.sigma
        D = X[1] + (X[0] - X[1]) / (2 * r)
        yield Row(now, after, on_z * Z[1] + (after.alpha - start.alpha * on_z) * D)


def _unipc(points: list[Point]) -> Iterator[Row]:
    """Zhao 2023, algorithm 5 and 6 with B(h) = e^-h - 1 (bh2), order 2 with the corrector, for z0_hat.

    A row first corrects its own z by the z0_hat predicted there, then predicts the next z. Order 1 in the first and the
    last row, and next to alpha = 0.
    """
    n = len(points) - 1
    level = [point.half_log_snr for point in points]
    order = [2 if 0 < i < n - 1 and np.isfinite(level[i - 1]) else 1 for i in range(n)]
    for i, (now, after) in enumerate(pairwise(points)):
        z = Z[0] if i == 0 else Z[0] + _unipc_correction(points[: i + 1], order[i - 1])
        on_z = after.sigma / now.sigma
        z = on_z * z + (after.alpha - now.alpha * on_z) * X[0]
        if order[i] == 2:
            h = level[i + 1] - level[i]
            slope = (X[1] - X[0]) * h / (level[i - 1] - level[i])
            z = z - after.alpha * np.expm1(-h) * slope / 2
        yield Row(now, after, z)


def _unipc_correction(points: list[Point], order: int) -> np.ndarray:
    """UniC minus UniP: the corrector's change of the z that the last predictor, of this order, made."""
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


_PLAIN = {
    "plms": _plms,
    "euler": _euler,
    "euler_a": _euler_a,
    "heun": _heun,
    "dpmpp_2m": _dpmpp_2m,
    "dpmpp_2m_sde": partial(_dpmpp_2m, noisy=True),
    "dpmpp_2s": _dpmpp_2s,
    "unipc": _unipc,
}
