"""Training losses, one value for each example, so that the caller may average, bucket or weight them."""

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.likelihood import bound_term
from ldm_jax.diffusion.process import level_at, loss_weight, target, to_z0


def diffusion_loss(
    output: jax.Array,
    z0: jax.Array,
    eps: jax.Array,
    t: jax.Array,
    *,
    prediction: str,
    weighting: str,
    alpha_bar: np.ndarray,
    gamma: float = 5.0,
) -> jax.Array:
    """Weighted mean squared error between the network's output and its target (Ho 2020, eq. 14, for eps and uniform).

    Args:
      output: [B, ...] what the network said at z_t = q_sample(z0, t, eps, alpha_bar); any float type.
      z0: [B, ...] clean latents.
      eps: [B, ...] the noise in z_t.
      t: [B] int32 in [0, T).
      prediction: `eps`, `v` or `z0`: what the network is asked for.
      weighting: `uniform` or `min_snr`.
      alpha_bar: [T] float64 table of the schedule.
      gamma: where min_snr clips the SNR (Hang 2023 recommend 5).

    Returns:
      [B] float32, the mean over all axes but the first, times the weight of t.

    Raises:
      ValueError: unknown option, eps on a schedule with alpha_bar = 0, or an output not shaped like z0.
    """
    if output.shape != z0.shape:
        raise ValueError(f"the network's output must have the shape of z0, {z0.shape}, got {output.shape}")
    error = output.astype(jnp.float32) - target(prediction, z0, eps, t, alpha_bar)
    per_example = jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))
    return loss_weight(weighting, prediction, t, alpha_bar, gamma) * per_example


def variance_loss(
    output: jax.Array,
    spread: jax.Array,
    z0: jax.Array,
    z_t: jax.Array,
    t: jax.Array,
    *,
    prediction: str,
    alpha_bar: np.ndarray,
    levels: int | None = None,
) -> jax.Array:
    """L_t of the variational bound as a loss of the variance alone (Nichol 2021, section 3.1): no gradient to the mean.

    Args:
      output: [B, ...] the network's prediction, of which the mean is made.
      spread: [B, ...] where it says that the variance lies: see `likelihood.log_variance`.
      z0, z_t, t, prediction, alpha_bar: as in `diffusion_loss`.
      levels: see `likelihood.bound_term`.

    Returns:
      [B] bits per dimension. T times its mean over all t is the bound, up to the prior term, which is no network's.
    """
    z0_hat = to_z0(prediction, jax.lax.stop_gradient(output), z_t, level_at(t, alpha_bar))
    return bound_term(z0, z_t, z0_hat, t, alpha_bar, variance="learned", learned=spread, levels=levels)
