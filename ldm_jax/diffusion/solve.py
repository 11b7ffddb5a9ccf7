"""The compiled sampling loop that runs any solver's table."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_jax.diffusion.denoiser import Denoiser, Estimate
from ldm_jax.diffusion.forward import NoiseLevel
from ldm_jax.diffusion.random import Stream, fold, normal
from ldm_jax.diffusion.tables import HISTORY, Table


class Trajectory(NamedTuple):
    """Snapshots of a sampling run, evenly spaced over its rows, the last row included."""

    z_t: Array  # [S, B, ...] after the row
    z0_hat: Array  # [S, B, ...] predicted in the row


class State(NamedTuple):
    """The state of a sampling run between two rows of its table."""

    z: Array  # [B, ...] after the last row
    old_z: Array  # [HISTORY, B, ...] when the network was called in earlier rows, the last one first
    old_z0: Array  # [HISTORY, B, ...] z0_hat of those rows
    kept: Trajectory


def solve(
    denoise: Denoiser,
    z_T: Array,
    table: Table,
    keys: Array,
    *,
    project: Callable[[Array, NoiseLevel, Array], Array] | None = None,
    snapshots: int = 0,
) -> tuple[Array, Trajectory]:
    """Samples by a solver's table, from noise to data: z [B, ...] float32 at the last noise level, and the trajectory.

    For use inside jit or pmap, with the table as an argument: another solver, step count or eta does not recompile.

    Args:
      denoise: `(z_t [B, ...], level) -> z0_hat`, or an Estimate; a table of a learned variance needs the latter. With
        `z0_null` (CFG++) each row must be a sum of z0_hat, eps and noise, as those of ddim, euler and euler_a are.
      z_T: [B, ...] initial latents at the noise level of the first row: unit Gaussian noise for a whole run.
      table: from `solvers.make_table`.
      keys: [B] keys, from `random.sample_keys`. The noise of row i for sample k comes from fold_in(keys[k], i).
      project: `(z, level, keys) -> z`, applied after each row (inpainting, say), at the scalar noise level of z and
        with new keys [B].
      snapshots: S, how many states of the trajectory to keep; static.
    """
    state = initial_state(z_T, snapshots)
    state = solve_rows(denoise, state, table, keys, 0, table.rows, project=project)
    return state.z, state.kept


def initial_state(z_T: Array, snapshots: int = 0) -> State:
    """The state before the first row, from initial latents z_T [B, ...]; `snapshots` as in `solve`."""
    z_T = z_T.astype(jnp.float32)
    empty = jnp.zeros((snapshots, *z_T.shape))
    old = jnp.zeros((HISTORY, *z_T.shape))
    return State(z_T, old, old, Trajectory(empty, empty))


def solve_rows(
    denoise: Denoiser,
    state: State,
    table: Table,
    keys: Array,
    start: Array | int,
    stop: Array | int,
    *,
    project: Callable[[Array, NoiseLevel, Array], Array] | None = None,
) -> State:
    """Runs the rows `start` to `stop - 1`, scalars, of a solver's table: in parts as in one, for previews between them.

    The other arguments are those of `solve`, with keys [B].
    """
    table = jax.tree.map(lambda c: jnp.asarray(c, c.dtype if c.dtype == np.int32 else jnp.float32), table)
    snapshots = len(state.kept.z_t)
    keep_at = (jnp.arange(1, snapshots + 1) * table.rows + snapshots - 1) // max(snapshots, 1) - 1  # [S] row numbers

    def body(i, state):
        z, old_z, old_z0, kept = state
        interval = jnp.maximum(table.sigma[i] - table.reached_sigma[i], 0)
        estimate = denoise(z, NoiseLevel(table.t[i], table.alpha[i], table.sigma[i], interval))
        z0_hat, var_frac, z0_null = estimate if isinstance(estimate, Estimate) else (estimate, None, None)
        z0_hat, weights = z0_hat.astype(jnp.float32), table.weights[i]

        def sample_noise():
            noise = normal(fold(keys, i), z.shape[1:])
            return noise if var_frac is None else noise * jnp.exp(table.log_std_ratio[i] * var_frac)

        noise = jax.lax.cond(weights[-1] > 0, sample_noise, lambda: jnp.zeros_like(z))
        # A sum, not a dot product: accelerators would round that to bfloat16 or TF32.
        all_z, all_z0 = jnp.concatenate([z[None], old_z]), jnp.concatenate([z0_hat[None], old_z0])
        z = sum(weights[k] * term for k, term in enumerate([*all_z, *all_z0, noise]))
        if z0_null is not None:  # CFG++: the row's z - alpha z0_hat, sigma times eps, is z - alpha z0_null
            z = z + weights[0] * table.alpha[i] * (z0_hat - z0_null)
        if project is not None:
            reached = NoiseLevel(table.t[i], table.reached_alpha[i], table.reached_sigma[i])
            z = project(z, reached, fold(fold(keys, Stream.PROJECT), i))
        here = (keep_at == i).reshape(snapshots, *[1] * z.ndim)
        kept = Trajectory(jnp.where(here, z, kept.z_t), jnp.where(here, z0_hat, kept.z0_hat))
        return State(z, all_z[:-1], all_z0[:-1], kept)

    return jax.lax.fori_loop(start, stop, body, state)
