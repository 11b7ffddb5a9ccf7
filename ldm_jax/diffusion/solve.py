"""The one compiled loop that runs any solver's table, and the randomness of samples.

Randomness is indexed, never consumed: each sample has a key made of (seed, k), and each of its draws a fold of it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.guidance import Denoiser, Estimate
from ldm_jax.diffusion.process import Level
from ldm_jax.diffusion.random import _PROJECT, _fold, _normal
from ldm_jax.diffusion.tables import HISTORY, Table


class Trajectory(NamedTuple):
    """Snapshots of a run, evenly spaced over its rows, the last row included; S = 0 if none were asked for."""

    z_t: jax.Array  # [S, B, ...] after the row
    z0_hat: jax.Array  # [S, B, ...] predicted in the row


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
      denoise: `(z_t [B, ...], level) -> z0_hat`, or an Estimate; a table of a learned variance needs the latter.
      z_T: [B, ...] initial latents at the level of the first row: unit Gaussian noise for a whole run.
      table: from `solvers.make_table`.
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
        z, old_z, old_z0, kept = state
        said = denoise(z, Level(table.t[i], table.alpha[i], table.sigma[i]))
        z0_hat, spread = said if isinstance(said, Estimate) else (said, None)
        z0_hat, weights = z0_hat.astype(jnp.float32), table.weights[i]

        def draw():
            noise = _normal(_fold(keys, i), z.shape[1:])
            return noise if spread is None else noise * jnp.exp(table.widen[i] * (spread + 1) / 2)

        noise = jax.lax.cond(weights[-1] > 0, draw, lambda: jnp.zeros_like(z))
        # A sum, not a dot product: accelerators would round that to bfloat16 or TF32.
        seen_z, seen_z0 = jnp.concatenate([z[None], old_z]), jnp.concatenate([z0_hat[None], old_z0])
        z = sum(weights[k] * term for k, term in enumerate([*seen_z, *seen_z0, noise]))
        if project is not None:
            z = project(z, table.alpha_bar[i], _fold(_fold(keys, _PROJECT), i))
        here = (keep_at == i).reshape(snapshots, *[1] * z.ndim)
        kept = Trajectory(jnp.where(here, z, kept.z_t), jnp.where(here, z0_hat, kept.z0_hat))
        return z, seen_z[:-1], seen_z0[:-1], kept

    nothing = jnp.zeros((snapshots, *z_T.shape))
    old = jnp.zeros((HISTORY, *z_T.shape))
    z, *_, kept = jax.lax.fori_loop(0, table.rows, body, (z_T, old, old, Trajectory(nothing, nothing)))
    return z, kept
