"""Training losses, one value for each example."""

import jax
import jax.numpy as jnp

from ldm_jax.diffusion.forward import gather, noise_level, target
from ldm_jax.diffusion.likelihood import vlb_term
from ldm_jax.diffusion.prediction import to_z0
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.weighting import loss_weights


def diffusion_loss(
    output: jax.Array,
    z0: jax.Array,
    eps: jax.Array,
    t: jax.Array,
    *,
    prediction: str,
    weighting: str,
    process: Process,
    gamma: float = 5.0,
) -> jax.Array:
    """Weighted mean squared error between the network's output and its target (Ho 2020, eq. 14, for eps and uniform).

    Args:
      output: [B, ...] the network's output at z_t = q_sample(z0, t, eps, process); any float type.
      z0, eps: [B, ...] clean latents, and the noise in z_t.
      t: [B] int32 in [0, T).
      prediction: the target, a key of `prediction.PREDICTIONS`.
      weighting, gamma: see `weighting.loss_weights`.
      process: the forward process.

    Returns:
      [B] float32, the mean over all axes but the first, times the weight of t.

    Raises:
      ValueError: unknown option, a prediction that does not fit the process, or an output not shaped like z0.
    """
    if output.shape != z0.shape:
        raise ValueError(f"the network's output must have the shape of z0, {z0.shape}, got {output.shape}")
    error = output.astype(jnp.float32) - target(prediction, z0, eps, t, process)
    per_example = jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))
    return gather(loss_weights(weighting, prediction, process, gamma), t) * per_example


def variance_loss(
    output: jax.Array,
    var_frac: jax.Array,
    z0: jax.Array,
    z_t: jax.Array,
    t: jax.Array,
    *,
    prediction: str,
    process: Process,
    num_bins: int | None = None,
) -> jax.Array:
    """L_t of the VLB as a loss of the variance alone (Nichol 2021, section 3.1): no gradient reaches the mean.

    Args:
      output: [B, ...] the network's prediction, from which the mean is computed.
      var_frac: [B, ...] the network's variance: see `likelihood.log_variance`.
      z0, z_t, t, prediction, process: as in `diffusion_loss`.
      num_bins: see `likelihood.vlb_term`.

    Returns:
      [B] bits per dimension. T times the mean over all t is the VLB without L_T, which has no parameters.
    """
    alpha, sigma = noise_level(t, process).broadcast_to(z_t)
    z0_hat = to_z0(prediction, jax.lax.stop_gradient(output), z_t, alpha, sigma)
    return vlb_term(z0, z_t, z0_hat, t, process, variance="learned", var_frac=var_frac, num_bins=num_bins)
