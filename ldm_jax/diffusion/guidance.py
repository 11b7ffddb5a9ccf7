"""Functions from network to denoiser and from denoiser to denoiser.

A denoiser is `denoise(z_t, t) -> z0_hat`: z_t [B, ...], t [B] int32, and the estimate of z0 in float32. That is all a
solver sees; conditions, guidance scales and bounds live in the closures built here.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.process import check_prediction, to_z0

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]
ConditionalDenoiser = Callable[[jax.Array, jax.Array, Any], jax.Array]


def from_network(
    network: Callable[[jax.Array, jax.Array, Any], jax.Array], prediction: str, alpha_bar: np.ndarray
) -> ConditionalDenoiser:
    """Makes a conditional denoiser of a network that predicts eps, v or z0.

    Args:
      network: `(z_t [B, ...], t [B], context) -> output [B, ...]`.
      prediction: what `output` is: `eps`, `v` or `z0`.
      alpha_bar: [T] float64 table of the schedule the network was trained with.

    Returns:
      `(z_t, t, context) -> z0_hat`.

    Raises:
      ValueError: unknown prediction, or eps on a schedule with alpha_bar = 0.
    """
    check_prediction(prediction, alpha_bar)

    def denoise(z_t: jax.Array, t: jax.Array, context: Any) -> jax.Array:
        return to_z0(prediction, network(z_t, t, context), z_t, t, alpha_bar)

    return denoise


def classifier_free(
    denoise: ConditionalDenoiser,
    context: Any,
    null_context: Any,
    scale: jax.Array,
    interval: jax.Array | tuple[float, float] = (0, np.inf),
) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6, in the convention of Rombach 2022: scale = 1 + w).

    z0_hat = z0_null + scale (z0_cond - z0_null). Ho & Salimans write it for eps: at a given z_t, z0 is affine in eps
    (and in v), and the weights, scale and 1 - scale, sum to 1, so guiding any of the three is the same.

    Both halves run as one batch of 2B. Where every scale is 1, or t lies outside the interval, the null half cannot
    matter and is skipped; the choice is made at run time, so that changing scale or interval does not recompile.

    Args:
      denoise: `(z_t, t, context) -> z0_hat`, as made by `from_network`.
      context: the condition, an array or tree of arrays [B, ...] (say, tokens [B, L, D]).
      null_context: the empty (or negative) condition, broadcastable to `context`, leaf by leaf.
      scale: scalar or [B], may be traced. 1 = conditional only, 0 = unconditional only.
      interval: the first and the last timestep that are guided, may be traced; the others are conditional only. At high
        noise guidance costs variety, at low noise it brings nothing (Kynkaanniemi 2024).
    """

    def guided(z_t: jax.Array, t: jax.Array, scale: jax.Array) -> jax.Array:
        both = jax.tree.map(lambda c, n: jnp.concatenate([c, jnp.broadcast_to(n, c.shape)]), context, null_context)
        z0_hat = denoise(jnp.concatenate([z_t, z_t]), jnp.concatenate([t, t]), both)
        z0_cond, z0_null = jnp.split(z0_hat, 2)
        return z0_null + scale.reshape(-1, *[1] * (z_t.ndim - 1)) * (z0_cond - z0_null)

    def conditional(z_t: jax.Array, t: jax.Array, scale: jax.Array) -> jax.Array:
        return denoise(z_t, t, context).astype(jnp.float32)

    def guided_if_it_matters(z_t: jax.Array, t: jax.Array) -> jax.Array:
        t = jnp.broadcast_to(t, z_t.shape[:1])
        scale_at_t = jnp.where((interval[0] <= t) & (t <= interval[1]), jnp.asarray(scale, jnp.float32), 1.0)
        return jax.lax.cond(jnp.all(scale_at_t == 1), conditional, guided, z_t, t, scale_at_t)

    return guided_if_it_matters


def clip_z0(denoise: Denoiser, bound: jax.Array) -> Denoiser:
    """Keeps z0_hat within [-bound, bound], for data known to lie there (pixels: 1; Ho 2020's samplers do it).

    bound is a positive scalar and may be traced; infinity leaves z0_hat as it is. Solvers derive eps from the clipped
    z0_hat, which diffusers' DDIM does with `use_clipped_model_output=True`.
    """
    return lambda z_t, t: jnp.clip(denoise(z_t, t), -bound, bound)
