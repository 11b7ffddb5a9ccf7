"""Training losses, one value for each example, so that the caller may average, bucket or weight them."""

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.process import loss_weight, target


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
