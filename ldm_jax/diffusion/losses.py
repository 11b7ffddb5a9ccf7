"""Training losses, one value for each example."""

import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.diffusion.forward import gather, noise_level, target
from ldm_jax.diffusion.likelihood import vlb_term
from ldm_jax.diffusion.prediction import to_z0
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.weighting import loss_weights


def diffusion_loss(
    output: Array,
    z0: Array,
    eps: Array,
    t: Array,
    *,
    prediction: str,
    weighting: str,
    process: Process,
    gamma: float = 5.0,
) -> Array:
    """The weighted mean squared error of the network's output, [B] float32 (Ho 2020, eq. 14, for eps and uniform).

    Args:
      output: [B, ...] the network's output at z_t = q_sample(z0, t, eps, process); any float type.
      z0, eps: [B, ...] clean latents, and the noise in z_t.
      t: [B] int32 in [0, T).
      prediction: the target, a key of `prediction.PREDICTIONS`.
      weighting, gamma: see `weighting.loss_weights`.
      process: the forward process.

    Raises ValueError for unknown option, a prediction that does not fit the process, or an output not shaped like z0.
    """
    if output.shape != z0.shape:
        raise ValueError(f"the network's output must have the shape of z0, {z0.shape}, got {output.shape}")
    error = output.astype(jnp.float32) - target(prediction, z0, eps, t, process)
    per_example = jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))
    return gather(loss_weights(weighting, prediction, process, gamma), t) * per_example


def variance_loss(
    output: Array,
    var_frac: Array,
    z0: Array,
    z_t: Array,
    t: Array,
    *,
    prediction: str,
    process: Process,
    num_bins: int | None = None,
) -> Array:
    """L_t of the VLB as a loss of the variance (Nichol 2021, section 3.1), [B] bits per dimension.

    No gradient reaches the mean, which comes from `output` [B, ...], the prediction. T times the mean over all t is the
    VLB without L_T, which has no parameters. For the other arguments see `diffusion_loss` and `likelihood.vlb_term`.
    """
    alpha, sigma = noise_level(t, process).broadcast_to(z_t)
    z0_hat = to_z0(prediction, jax.lax.stop_gradient(output), z_t, alpha, sigma)
    return vlb_term(z0, z_t, z0_hat, t, process, variance="learned", var_frac=var_frac, num_bins=num_bins)
