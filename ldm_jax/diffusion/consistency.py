"""Consistency distillation of a diffusion model (Song 2023; of latents, with guidance, Luo 2023).

A consistency function f(z_t, t) maps every point of a trajectory of the probability flow ODE to its end at t = 0, so
that one call is a sample. It is trained to have one value at both ends of a step of the teacher's solver.
"""

import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.spacing import num_distilled


def distilled_steps(t: Array, T: int) -> tuple[Array, Array]:
    """(start, end) of the teacher's steps over timesteps t [B] in [0, T), [B] int32 each.

    The starts are the 50 timesteps of `lcm` (all, if T is less), the skipping step of Luo 2023 is T / 50. ValueError if
    that is no whole number.
    """
    count = num_distilled(T)
    skip = T // count
    start = jnp.minimum(t // skip, count - 1) * skip + skip - 1
    return start, jnp.maximum(start - skip, 0)


def pseudo_huber(error: Array, c: float) -> Array:
    """The pseudo-Huber loss sqrt(error^2 + c^2) - c of error [B, ...], the mean of each example, [B].

    Of each element, as in diffusers' training script; Song 2024 takes the norm of the whole example.
    """
    return jnp.mean(jnp.sqrt(jnp.square(error) + c**2) - c, axis=tuple(range(1, error.ndim)))
