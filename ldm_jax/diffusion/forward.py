"""The forward process on the device: noising, its posterior, and the noise levels of denoisers.

Shapes: latents [B, ...], t a scalar or [B] int32 in [0, T). Coefficients are float64 on the host and cast to float32
once, whatever the network's dtype. A concrete t outside [0, T) raises ValueError; a traced one gives NaN, where JAX's
indexing would clamp or wrap it silently.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_jax.diffusion import process as processes
from ldm_jax.diffusion.prediction import coefficient_tables
from ldm_jax.diffusion.process import Process


class NoiseLevel(NamedTuple):
    """A noise level z = alpha z0 + sigma eps, scalars or [B]."""

    t: Array  # the timestep that the network is conditioned on; a solver's may be fractional
    alpha: Array
    sigma: Array
    interval: Array | float = 0.0  # how much sigma falls in the step of the solver: see `mean_flow`

    def broadcast_to(self, z: Array) -> tuple[Array, Array]:
        """alpha and sigma in float32, with axes appended to multiply z [B, ...]."""
        alpha, sigma = (jnp.asarray(value, jnp.float32) for value in (self.alpha, self.sigma))
        return tuple(value.reshape(value.shape + (1,) * (z.ndim - value.ndim)) for value in (alpha, sigma))


def noise_level(t: Array, process: Process) -> NoiseLevel:
    """The noise level of timestep t, a scalar or [B] int32."""
    return NoiseLevel(jnp.asarray(t, jnp.float32), gather(process.alpha, t), gather(process.sigma, t))


def q_sample(z0: Array, t: Array, eps: Array, process: Process) -> Array:
    """z_t ~ q(z_t | z0) = N(alpha_t z0, sigma_t^2 I), from eps ~ N(0, I) (Ho 2020, eq. 4); [B, ...] like z0."""
    return gather(process.alpha, t, z0.ndim) * z0 + gather(process.sigma, t, z0.ndim) * eps


def q_posterior(z0: Array, z_t: Array, t: Array, process: Process) -> tuple[Array, Array]:
    """The posterior q(z_{t-1} | z_t, z0) (Ho 2020, eq. 6 and 7), at t = 0 the point z0.

    Returns the mean, like z0, and the variance, [B, 1, ...] or [1, ...].
    """
    tables = processes.posterior(*processes.neighbours(process))
    on_z0, on_z, variance = (gather(table, t, z0.ndim) for table in tables)
    return on_z0 * z0 + on_z * z_t, variance


def target(prediction: str, z0: Array, eps: Array, t: Array, process: Process) -> Array:
    """The training target of a prediction, [B, ...] like z0 and eps; ValueError as `coefficient_tables`."""
    row = coefficient_tables(prediction, process)
    return gather(row.on_z0, t, z0.ndim) * z0 + gather(row.on_eps, t, z0.ndim) * eps


def gather(table: np.ndarray, t: Array, ndim: int = 0) -> Array:
    """table[t] in float32 for a table [T], with axes of length 1 appended up to `ndim`."""
    T = len(table)
    if not isinstance(t, jax.core.Tracer):
        outside = [int(i) for i in np.ravel(t) if not 0 <= i < T]
        if outside:
            raise ValueError(f"t must lie in 0..{T - 1} for a schedule of {T} timesteps, got {outside[0]}")
    t = jnp.asarray(t)
    values = jnp.asarray(table, jnp.float32).at[t].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    return values.reshape(values.shape + (1,) * (ndim - values.ndim))
