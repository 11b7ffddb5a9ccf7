"""The distribution of the timesteps of training: uniform (Ho 2020), logit-normal and shifted (Esser 2024)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.flow import shifted

DISTRIBUTIONS = ("uniform", "logit_normal")


class TimestepDistribution(NamedTuple):
    """The distribution of a training timestep t = floor(T s), s in [0, 1), where 0 is data and 1 is noise.

    Attributes:
      name: `uniform`, or `logit_normal`: s = sigmoid(mean + std n), n ~ N(0, 1) (Esser 2024, eq. 19).
      mean, std: of the logit-normal distribution; a higher mean is more noise.
      shift: s becomes shift s / (1 + (shift - 1) s) (Esser 2024, eq. 23); above 1 is more noise, for large images.
    """

    name: str = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0


UNIFORM = TimestepDistribution()


def sample_times(keys: Array, distribution: TimestepDistribution) -> Array:
    """Continuous times s [B] float32 in [0, 1), from keys [B]; ValueError for an unknown distribution."""
    name, mean, std, shift = distribution
    if name not in DISTRIBUTIONS:
        raise ValueError(f"the distribution of timesteps must be one of {', '.join(DISTRIBUTIONS)}, got {name!r}")
    if name == "logit_normal":
        s = jax.nn.sigmoid(mean + std * jax.vmap(jax.random.normal)(keys))
    else:
        s = jax.vmap(jax.random.uniform)(keys)
    return shifted(s, shift)


def sample_timesteps(keys: Array, T: int, distribution: TimestepDistribution) -> Array:
    """Timesteps [B] int32 in [0, T), from keys [B]; ValueError for an unknown distribution."""
    if distribution.name == "uniform" and distribution.shift == 1:
        return jax.vmap(partial(jax.random.randint, shape=(), minval=0, maxval=T))(keys)
    return jnp.minimum(sample_times(keys, distribution) * T, T - 1).astype(jnp.int32)
