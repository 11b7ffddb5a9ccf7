"""Denoisers: made of a network, and with z0_hat clipped, thresholded or pasted over.

A denoiser is `denoise(z_t, level) -> z0_hat`: z_t [B, ...], a `forward.NoiseLevel` of scalars or [B], and the estimate
of z0 in float32, or an `Estimate`, of a network with a learned variance and of CFG++. Conditions, guidance scales and
clipping live in closures, each around the denoiser that it changes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_jax.diffusion.forward import NoiseLevel
from ldm_jax.diffusion.prediction import coefficient_tables, to_z0
from ldm_jax.diffusion.process import Process


class Estimate(NamedTuple):
    """The prediction of a network with a learned variance at z_t, or of CFG++. Guidance changes z0 alone."""

    z0: Array  # [B, ...] z0_hat
    var_frac: Array | None = None  # [B, ...] Nichol 2021, eq. 15: 0 for beta_tilde, 1 for beta; may lie beyond
    z0_null: Array | None = None  # [B, ...] CFG++: the estimate whose eps noises z0 again; None: that of z0 itself


Denoiser = Callable[[Array, NoiseLevel], Array | Estimate]
ConditionalDenoiser = Callable[[Array, NoiseLevel, Any], Array | Estimate]


def on_z0(change: Callable[..., Array], estimate: Array | Estimate, *others: Array | Estimate) -> Array | Estimate:
    """`change(z0, *other z0)`, z0 [B, ...], with the variance of the first estimate, if it has one."""
    if isinstance(estimate, Estimate):
        return estimate._replace(z0=change(estimate.z0, *(other.z0 for other in others)))
    return change(estimate, *others)


def from_network(
    network: Callable[[Array, Array, Any], Array], prediction: str, process: Process
) -> ConditionalDenoiser:
    """The conditional denoiser `(z_t, level, cond) -> z0_hat, or Estimate` of a network.

    The network is `(z_t [B, ..., c], t [B], cond) -> output [B, ..., c]`, or [B, ..., 2c] with a learned variance after
    the prediction, -1 for beta_tilde and 1 for beta; `process` is the one of its training.
    Raises ValueError for an unknown prediction, or one that does not fit the process.
    """
    coefficient_tables(prediction, process)

    def denoise(z_t: Array, level: NoiseLevel, cond: Any) -> Array | Estimate:
        output = network(z_t, jnp.broadcast_to(level.t, z_t.shape[:1]), cond)
        alpha, sigma = level.broadcast_to(z_t)
        if output.shape[-1] != 2 * z_t.shape[-1]:
            return to_z0(prediction, output, z_t, alpha, sigma)
        output, variance = jnp.split(output, 2, axis=-1)
        return Estimate(to_z0(prediction, output, z_t, alpha, sigma), to_var_frac(variance))

    return denoise


def over_interval(denoise: ConditionalDenoiser) -> ConditionalDenoiser:
    """The conditional denoiser whose network is conditioned on the solver's step too: cond["interval"] [B].

    Of MeanFlow: z0_hat = z_t - t u(z_t, r, t) for a step from t to r (see `mean_flow`).
    """

    def denoise_over(z_t: Array, level: NoiseLevel, cond: Any) -> Array | Estimate:
        interval = jnp.broadcast_to(jnp.asarray(level.interval, jnp.float32), z_t.shape[:1])
        return denoise(z_t, level, cond | {"interval": interval})

    return denoise_over


def to_var_frac(variance: Array) -> Array:
    """Variance channels [B, ..., c] of a network, -1 (beta_tilde) to 1 (beta), as var_frac from 0 to 1, float32."""
    return (variance.astype(jnp.float32) + 1) / 2


def clip_z0(denoise: Denoiser, clip_range: Array) -> Denoiser:
    """Clips z0_hat to [-clip_range, clip_range], the range of the data (pixels: 1), as the samplers of Ho 2020 do.

    clip_range is a positive scalar, may be traced, and may be infinite. Solvers derive eps from the clipped z0_hat, as
    diffusers' DDIM does with `use_clipped_model_output=True`.
    """
    return lambda z_t, level: on_z0(lambda z0: jnp.clip(z0, -clip_range, clip_range), denoise(z_t, level))


def threshold_z0(denoise: Denoiser, quantile: Array | float = 0.995, highest: Array | float = np.inf) -> Denoiser:
    """Dynamic thresholding (Saharia 2022, section 2.3), for pixels in [-1, 1] under strong guidance.

    Each example's z0_hat is clipped to [-s, s] and divided by s, the quantile of |z0_hat|, itself clipped to
    [1, highest]. quantile may be traced; 0 is plain clipping to [-1, 1], at no more cost.
    """

    def threshold(z0_hat: Array) -> Array:
        axes = tuple(range(1, z0_hat.ndim))
        ones = jnp.ones((len(z0_hat), *[1] * len(axes)))
        s = jax.lax.cond(
            quantile > 0, lambda: jnp.quantile(jnp.abs(z0_hat), quantile, axes, keepdims=True), lambda: ones
        )
        s = jnp.clip(s, 1.0, highest)
        return jnp.clip(z0_hat, -s, s) / s

    return lambda z_t, level: on_z0(threshold, denoise(z_t, level))


def paste_known(z0: Array, mask: Array) -> Callable[[Array, NoiseLevel, Array], Array]:
    """The inpainting `project` of `solve.solve` (Lugmayr 2022, eq. 8; Song 2021; SDEdit).

    After each row, the known region is replaced by z0 noised to the level of z, with new noise; at the end it is z0.

    z0, clean latents, and mask, bool, are broadcastable to z [B, ...]: True = sampled, False = known. All True changes
    nothing and costs nothing.
    """

    def project(z: Array, level: NoiseLevel, keys: Array) -> Array:
        def paste() -> Array:
            eps = jax.vmap(lambda key: jax.random.normal(key, z.shape[1:]))(keys)
            return jnp.where(mask, z, level.alpha * z0 + level.sigma * eps)

        return jax.lax.cond(jnp.all(mask), lambda: z, paste)

    return project
