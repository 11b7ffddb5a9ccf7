"""From a network to a denoiser, and bounds on its estimate of z0.

A denoiser is `denoise(z_t, level) -> z0_hat`: z_t [B, ...], a `forward.NoiseLevel` of scalars or [B], and the estimate
of z0 in float32, or, of a network with a learned variance, an `Estimate`. Solvers need nothing else; conditions,
guidance scales and bounds live in closures, which compose: the outer one changes what the inner one returns.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.forward import NoiseLevel
from ldm_jax.diffusion.prediction import coefficient_tables, to_z0
from ldm_jax.diffusion.process import Process


class Estimate(NamedTuple):
    """The prediction of a network with a learned variance at z_t. Guidance changes z0 alone."""

    z0: jax.Array  # [B, ...] z0_hat
    var_frac: jax.Array  # [B, ...] Nichol 2021, eq. 15: 0 for the variance beta_tilde, 1 for beta; may lie beyond


Denoiser = Callable[[jax.Array, NoiseLevel], jax.Array | Estimate]
ConditionalDenoiser = Callable[[jax.Array, NoiseLevel, Any], jax.Array | Estimate]


def on_z0(
    change: Callable[..., jax.Array], estimate: jax.Array | Estimate, *others: jax.Array | Estimate
) -> jax.Array | Estimate:
    """`change(z0, *other z0)`, with the variance of the first estimate, if it has one."""
    if isinstance(estimate, Estimate):
        return estimate._replace(z0=change(estimate.z0, *(other.z0 for other in others)))
    return change(estimate, *others)


def from_network(
    network: Callable[[jax.Array, jax.Array, Any], jax.Array], prediction: str, process: Process
) -> ConditionalDenoiser:
    """The conditional denoiser of a network.

    Args:
      network: `(z_t [B, ..., c], t [B], cond) -> output [B, ..., c]`, or [B, ..., 2c] with a learned variance behind
        the prediction, -1 for beta_tilde and 1 for beta.
      prediction: a key of `prediction.PREDICTIONS`.
      process: the forward process that the network was trained with.

    Returns:
      `(z_t, level, cond) -> z0_hat`, or Estimate.

    Raises:
      ValueError: an unknown prediction, or one that does not fit the process.
    """
    coefficient_tables(prediction, process)

    def denoise(z_t: jax.Array, level: NoiseLevel, cond: Any) -> jax.Array | Estimate:
        output = network(z_t, jnp.broadcast_to(level.t, z_t.shape[:1]), cond)
        alpha, sigma = level.broadcast_to(z_t)
        if output.shape[-1] != 2 * z_t.shape[-1]:
            return to_z0(prediction, output, z_t, alpha, sigma)
        output, variance = jnp.split(output, 2, axis=-1)
        return Estimate(to_z0(prediction, output, z_t, alpha, sigma), to_var_frac(variance))

    return denoise


def to_var_frac(variance: jax.Array) -> jax.Array:
    """The network's variance channels, in [-1, 1] when between the bounds, as a fraction in [0, 1], float32."""
    return (variance.astype(jnp.float32) + 1) / 2


def clip_z0(denoise: Denoiser, clip_range: jax.Array) -> Denoiser:
    """Keeps z0_hat within [-clip_range, clip_range], for data known to lie there (pixels: 1; Ho 2020's samplers do it).

    clip_range is a positive scalar and may be traced; infinity leaves z0_hat as it is. Solvers derive eps from the
    clipped z0_hat, which diffusers' DDIM does with `use_clipped_model_output=True`.
    """
    return lambda z_t, level: on_z0(lambda z0: jnp.clip(z0, -clip_range, clip_range), denoise(z_t, level))


def threshold_z0(
    denoise: Denoiser, quantile: jax.Array | float = 0.995, highest: jax.Array | float = np.inf
) -> Denoiser:
    """Dynamic thresholding (Saharia 2022, section 2.3), for pixels in [-1, 1] under strong guidance.

    In each example z0_hat is kept within [-s, s] and divided by s, the quantile of |z0_hat|, from 1 to `highest`.
    quantile may be traced; 0 is plain clipping at 1, and costs no more than that.
    """

    def thresholded(z0_hat: jax.Array) -> jax.Array:
        one = jnp.ones((len(z0_hat), *[1] * (z0_hat.ndim - 1)))
        axes = tuple(range(1, z0_hat.ndim))
        s = jax.lax.cond(
            quantile > 0, lambda: jnp.quantile(jnp.abs(z0_hat), quantile, axis=axes, keepdims=True), lambda: one
        )
        s = jnp.clip(s, 1.0, highest)
        return jnp.clip(z0_hat, -s, s) / s

    return lambda z_t, level: on_z0(thresholded, denoise(z_t, level))


def paste_known(z0: jax.Array, mask: jax.Array) -> Callable[[jax.Array, NoiseLevel, jax.Array], jax.Array]:
    """A `project` of `solve.solve` for inpainting (Lugmayr 2022, eq. 8; Song 2021; SDEdit).

    After each row, the known region is replaced by z0 noised to the level of z, with new noise; at the end it is z0.

    Args:
      z0: clean latents, broadcastable to z [B, ...].
      mask: bool, broadcastable to z: True = sampled, False = known. Where everything is sampled, nothing is done.
    """

    def project(z: jax.Array, level: NoiseLevel, keys: jax.Array) -> jax.Array:
        def paste() -> jax.Array:
            eps = jax.vmap(lambda key: jax.random.normal(key, z.shape[1:]))(keys)
            return jnp.where(mask, z, level.alpha * z0 + level.sigma * eps)

        return jax.lax.cond(jnp.all(mask), lambda: z, paste)

    return project
