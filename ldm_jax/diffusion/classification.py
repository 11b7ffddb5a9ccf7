"""From a classifier network to log p(y | z_t), which classifier guidance takes the gradient of."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Classify = Callable[[Any, jax.Array, jax.Array], jax.Array]


def make_classify(apply: Callable[..., jax.Array], alpha_bar: np.ndarray) -> Classify:
    """`classify(params, z_t [B, ...], t [B]) -> log p(y | z_t) [B, K]`, differentiable; t may be fractional.

    Args:
      apply: `({"params": params}, z_t, t, alpha [B]) -> logits [B, K]`, alpha being sqrt(alpha_bar) of t.
      alpha_bar: [T] float64 table of the schedule.
    """
    timesteps, signal = np.arange(len(alpha_bar), dtype=np.float32), np.sqrt(alpha_bar).astype(np.float32)

    def classify(params: Any, z_t: jax.Array, t: jax.Array) -> jax.Array:
        alpha = jnp.interp(t.astype(jnp.float32), timesteps, signal)
        return jax.nn.log_softmax(apply({"params": params}, z_t, t, alpha))

    return classify


def log_probability(log_p: jax.Array, label: jax.Array) -> jax.Array:
    """log p of each example's own label: [B, K] and [B] -> [B]."""
    return jnp.take_along_axis(log_p, label[:, None], axis=1)[:, 0]
