"""Samplers as tables of coefficients, made on the host in float64, and the one compiled loop that runs any table.

Every solver here moves z linearly in what it knows: z itself, the current and the last few predictions of z0, and fresh
noise. Row i of a table is network call i:

    z0_hat = denoise(z, t[i])
    z      = on_z[i] z + on_z0[i] z0_hat + sum_j on_old[i, j] z0_hat of j + 1 calls ago + on_noise[i] noise

Columns are padded to the length of the schedule and the number of rows is data, so a compiled loop serves every solver,
step count and eta. To add a solver: write a function from the levels alpha_bar before and after each row to these
columns, and give it a branch in `make_table`.

Randomness is indexed, never consumed: each sample has a key made of (seed, k), and each of its draws a fold of it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.guidance import Denoiser
from ldm_jax.diffusion.process import check_prediction, posterior_coefficients
from ldm_jax.diffusion.schedules import Schedule, timesteps

SOLVERS = ("ddpm", "ddim", "dpmpp_2m")
VARIANCES = ("fixed_small", "fixed_large")
HISTORY = 2  # earlier predictions of z0 that a row may use

# Names of the random streams, far above any row or step number. A key that has children is never drawn from.
_SAMPLES, _INITIAL, _PROJECT = 2**32 - 1, 2**32 - 2, 2**32 - 3


class Table(NamedTuple):
    """A solver: [R] float64 columns, of which the first `rows` are meant; padding is 0 and never run."""

    t: np.ndarray  # [R] int32, the timestep the network is called with
    on_z: np.ndarray
    on_z0: np.ndarray
    on_old: np.ndarray  # [R, HISTORY], newest first
    on_noise: np.ndarray
    alpha_bar: np.ndarray  # the level reached: z after row i is a sample of q at this alpha_bar; 1 = clean
    rows: np.ndarray  # [] int32


class Trajectory(NamedTuple):
    """Snapshots of a run, evenly spaced over its rows, the last row included; S = 0 if none were asked for."""

    z_t: jax.Array  # [S, B, ...] after the row
    z0_hat: jax.Array  # [S, B, ...] predicted in the row


def make_table(
    solver: str,
    schedule: Schedule,
    steps: int,
    *,
    prediction: str = "eps",
    eta: float = 0.0,
    variance: str = "fixed_small",
    spacing: str = "leading",
    steps_offset: int = 0,
    set_alpha_to_one: bool = True,
) -> Table:
    """Computes the coefficients of a solver.

    Args:
      solver: `ddpm` (ancestral, Ho 2020; respaced as Nichol 2021 when steps < T), `ddim` (Song 2021) or `dpmpp_2m`
        (DPM-Solver++, second order, multistep, Lu 2022).
      schedule: the one the network was trained with; T is its length.
      steps: network calls, in [1, T].
      prediction: what the network predicts; only checked against the schedule (a table knows z0 alone).
      eta: ddim's share of the ancestral noise, in [0, 1]; 0 is deterministic, 1 is ddpm with the small variance.
      variance: ddpm's: `fixed_small` is the posterior's, `fixed_large` beta (Ho 2020, section 3.2).
      spacing: `leading`, `trailing` or `linspace`: see `schedules.timesteps`. For dpmpp_2m the end point counts as one
        of the `leading` and `linspace` times, as in diffusers, so it needs steps < T there.
      steps_offset: see `schedules.timesteps`.
      set_alpha_to_one: whether the last row ends on clean data, alpha_bar = 1, or at alpha_bar[0] (Stable Diffusion's
        DDIM; `final_sigmas_type` "zero" and "sigma_min" in diffusers' DPM-Solver).

    Raises:
      ValueError: unknown option, steps or eta out of range, eta without ddim, variance without ddpm, or eps on a
        schedule with alpha_bar = 0.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if variance not in VARIANCES:
        raise ValueError(f"variance must be one of {', '.join(VARIANCES)}, got {variance!r}")
    if variance != "fixed_small" and solver != "ddpm":
        raise ValueError(f"variance {variance!r} is for ddpm only, got solver {solver!r}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    if eta > 0 and solver != "ddim":
        raise ValueError(f"eta is for ddim only, got eta = {eta} with solver {solver!r}")
    check_prediction(prediction, schedule.alpha_bar)

    T = len(schedule.alpha_bar)
    t = _row_timesteps(solver, spacing, T, steps, steps_offset)
    level = schedule.alpha_bar[t]
    level_next = np.append(level[1:], 1.0 if set_alpha_to_one else schedule.alpha_bar[0])
    if solver == "ddpm":
        coefficients = _ddpm(level, level_next, variance)
    elif solver == "ddim":
        coefficients = _ddim(level, level_next, eta)
    else:
        coefficients = _dpmpp_2m(level, level_next)
    columns = [_pad(column, T) for column in (t.astype(np.int32), *coefficients, level_next)]
    return Table(*columns, rows=np.asarray(steps, np.int32))


def _row_timesteps(solver: str, spacing: str, T: int, steps: int, steps_offset: int) -> np.ndarray:
    if solver != "dpmpp_2m" or spacing == "trailing":
        return timesteps(spacing, T, steps, steps_offset)
    if not 1 <= steps < T:
        raise ValueError(f"dpmpp_2m with {spacing} spacing needs steps in 1..{T - 1}, got {steps}")
    return timesteps(spacing, T, steps + 1, steps_offset)[:-1]


def _pad(column: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([column, np.zeros((length - len(column), *column.shape[1:]), column.dtype)])


def _ddpm(level: np.ndarray, level_next: np.ndarray, variance: str) -> tuple[np.ndarray, ...]:
    """Ho 2020, eq. 7 and algorithm 2, between the timesteps that are kept. The last row adds no noise."""
    on_z0, on_z, posterior_variance = posterior_coefficients(level, level_next)
    on_noise = np.sqrt(posterior_variance if variance == "fixed_small" else 1 - level / level_next)
    on_noise[-1] = 0
    return on_z, on_z0, _no_history(level), on_noise


def _ddim(level: np.ndarray, level_next: np.ndarray, eta: float) -> tuple[np.ndarray, ...]:
    """Song 2021, eq. 12 and 16, with eps = (z - sqrt(alpha_bar) z0_hat) / sqrt(1 - alpha_bar).

    The next level is that of the next row, whatever the spacing; subtracting T // steps from t, as diffusers does, is
    right for leading spacing only.
    """
    _, _, posterior_variance = posterior_coefficients(level, level_next)
    on_noise = eta * np.sqrt(posterior_variance)
    direction = np.sqrt(np.maximum(1 - level_next - on_noise**2, 0))  # 0 up to rounding when eta = 1, level = 0
    on_z = direction / np.sqrt(1 - level)
    on_z0 = np.sqrt(level_next) - np.sqrt(level) * on_z
    return on_z, on_z0, _no_history(level), on_noise


def _dpmpp_2m(level: np.ndarray, level_next: np.ndarray) -> tuple[np.ndarray, ...]:
    """Lu 2022 (DPM-Solver++), algorithm 2, in lambda = log(alpha / sigma), h = the step of lambda, r = h_before / h:

        z' = sigma'/sigma z - alpha' (e^-h - 1) D,    D = (1 + 1/(2r)) z0_hat - 1/(2r) z0_hat_before

    e^-h is written without lambda, which is infinite at alpha_bar = 0 and 1. First order (D = z0_hat) in the first row,
    in a last row that ends on clean data (h infinite), and in the last of fewer than 15 rows, as in diffusers.
    """
    alpha, sigma = np.sqrt(level), np.sqrt(1 - level)
    alpha_next, sigma_next = np.sqrt(level_next), np.sqrt(1 - level_next)
    on_z = sigma_next / sigma
    on_D = alpha_next - alpha * on_z  # = -alpha' (e^-h - 1)
    half_inverse_r = np.zeros_like(level)
    with np.errstate(divide="ignore", invalid="ignore"):
        h = np.log(alpha_next / sigma_next) - np.log(alpha / sigma)
        half_inverse_r[1:] = h[1:] / h[:-1] / 2  # 0 after a row that came from alpha_bar = 0: h_before is infinite
    if level_next[-1] == 1 or len(level) < 15:
        half_inverse_r[-1] = 0
    on_old = _no_history(level)
    on_old[:, 0] = -half_inverse_r * on_D
    return on_z, (1 + half_inverse_r) * on_D, on_old, np.zeros_like(level)


def _no_history(level: np.ndarray) -> np.ndarray:
    return np.zeros((len(level), HISTORY))


def sample_keys(seed: jax.Array | int, index: jax.Array) -> jax.Array:
    """The keys of samples `index` [B] of the run with this seed: a key array [B]. Apart from training's streams."""
    samples = jax.random.fold_in(jax.random.key(seed), _SAMPLES)
    return jax.vmap(jax.random.fold_in, (None, 0))(samples, jnp.asarray(index, jnp.uint32))


def initial_latents(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """z_T ~ N(0, I): [B, *shape] float32, sample k from keys[k] alone."""
    return _normal(_fold(keys, _INITIAL), shape)


def solve(
    denoise: Denoiser,
    z_T: jax.Array,
    table: Table,
    keys: jax.Array,
    *,
    project: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None,
    snapshots: int = 0,
) -> tuple[jax.Array, Trajectory]:
    """Runs a table from noise to data. For use inside jit or pmap, with the table as an argument.

    Only shapes, `snapshots` and the schedule's length are compiled in: another solver, step count or eta is another
    table of the same shape.

    Args:
      denoise: `(z_t [B, ...], t [B] int32) -> z0_hat`.
      z_T: [B, ...] initial latents at the level of the first row: unit Gaussian noise for a whole run.
      table: from `make_table`.
      keys: [B] keys, from `sample_keys`. The noise of row i for sample k is drawn from fold_in(keys[k], i).
      project: `(z, alpha_bar, keys) -> z`, applied after each row (inpainting, say): alpha_bar, a float32 scalar, is
        the level z has reached (1 = clean), and keys [B] are fresh ones for this row.
      snapshots: how many states to keep on the way, a static number.

    Returns:
      z [B, ...] float32 at the last level, and a Trajectory of `snapshots` states.
    """
    z_T = z_T.astype(jnp.float32)
    table = jax.tree.map(lambda c: jnp.asarray(c, c.dtype if c.dtype == np.int32 else jnp.float32), table)
    keep_at = (jnp.arange(1, snapshots + 1) * table.rows + snapshots - 1) // max(snapshots, 1) - 1  # [S] row numbers

    def body(i, state):
        z, old, kept = state
        z0_hat = denoise(z, jnp.full(z.shape[:1], table.t[i])).astype(jnp.float32)
        on_noise = table.on_noise[i]
        noise = jax.lax.cond(on_noise > 0, lambda: _normal(_fold(keys, i), z.shape[1:]), lambda: jnp.zeros_like(z))
        # A sum, not a dot product: accelerators would round that to bfloat16 or TF32.
        history = sum(table.on_old[i, j] * old[j] for j in range(HISTORY))
        z = table.on_z[i] * z + table.on_z0[i] * z0_hat + history + on_noise * noise
        if project is not None:
            z = project(z, table.alpha_bar[i], _fold(_fold(keys, _PROJECT), i))
        here = (keep_at == i).reshape(snapshots, *[1] * z.ndim)
        kept = Trajectory(jnp.where(here, z, kept.z_t), jnp.where(here, z0_hat, kept.z0_hat))
        return z, jnp.concatenate([z0_hat[None], old[:-1]]), kept

    nothing = jnp.zeros((snapshots, *z_T.shape))
    old = jnp.zeros((HISTORY, *z_T.shape))
    z, _, kept = jax.lax.fori_loop(0, table.rows, body, (z_T, old, Trajectory(nothing, nothing)))
    return z, kept


def _fold(keys: jax.Array, name: jax.Array | int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, jnp.asarray(name, jnp.uint32))


def _normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
