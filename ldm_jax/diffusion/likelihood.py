"""The variational lower bound (VLB) on log p(z0), term by term, and the variance of the reverse process (Nichol 2021).

All values are bits per dimension, one for each example: nats / log 2, averaged over all axes but the first.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_jax.diffusion.forward import gather, q_posterior
from ldm_jax.diffusion.process import VARIANCES, Process, forward_step, neighbours, posterior


def log_variance_bounds(process: Process) -> tuple[np.ndarray, np.ndarray]:
    """log beta_tilde_t and log beta_t, [T] float64: the lower and the upper bound of the reverse variance.

    beta_tilde_0 = 0 is replaced by beta_tilde_1, as in Nichol & Dhariwal's code.
    """
    levels = neighbours(process)
    small, (_, large) = posterior(*levels)[2], forward_step(*levels)
    small[0] = small[1] if len(small) > 1 else large[0]
    return np.log(small), np.log(large)


def log_variance(variance: str, t: Array, process: Process, var_frac: Array | None = None) -> Array:
    """The log variance of p(z_{t-1} | z_t): [B], like t; of a learned variance [B, ...], like var_frac.

    Args:
      variance: `fixed_small` (beta_tilde), `fixed_large` (beta), or `learned`: between the two (Nichol 2021, eq. 15).
      t, process: [B] int32, and the forward process.
      var_frac: [B, ...] the network's interpolation coefficient, 0 for beta_tilde and 1 for beta; may lie beyond.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance must be one of {', '.join(VARIANCES)}, got {variance!r}")
    ndim = var_frac.ndim if variance == "learned" else 1
    small, large = (gather(table, t, ndim) for table in log_variance_bounds(process))
    if variance != "learned":
        return small if variance == "fixed_small" else large
    return var_frac * large + (1 - var_frac) * small


def gaussian_kl(mean: Array, log_var: Array, other_mean: Array, other_log_var: Array) -> Array:
    """KL(N(mean, var) || N(other_mean, other_var)) in nats, elementwise."""
    ratio = jnp.exp(log_var - other_log_var)
    return 0.5 * (other_log_var - log_var + ratio - 1 + (mean - other_mean) ** 2 * jnp.exp(-other_log_var))


def discretized_gaussian_nll(x: Array, mean: Array, log_var: Array, num_bins: int = 256) -> Array:
    """-log P of pixels at `num_bins` even values in [-1, 1] under a discretized Gaussian (Ho 2020, eq. 13), in nats.

    Elementwise. The bins at the ends are open. P is at least 1e-12.
    """
    std, half = jnp.exp(log_var / 2), 1 / (num_bins - 1)
    below = jnp.where(x <= -1 + half / 2, 0.0, jax.scipy.stats.norm.cdf((x - half - mean) / std))
    above = jnp.where(x >= 1 - half / 2, 1.0, jax.scipy.stats.norm.cdf((x + half - mean) / std))
    return -jnp.log(jnp.maximum(above - below, 1e-12))


def vlb_term(
    z0: Array,
    z_t: Array,
    z0_hat: Array,
    t: Array,
    process: Process,
    *,
    variance: str = "fixed_small",
    var_frac: Array | None = None,
    num_bins: int | None = None,
) -> Array:
    """L_t of the VLB [B] (Ho 2020, eq. 5): KL(q(z_{t-1} | z_t, z0) || p(z_{t-1} | z_t)), for t = 0 -log p(z0 | z_0).

    Args:
      z0, z_t, z0_hat: [B, ...] the data, z0 noised to t, and the model's estimate of z0.
      t, process: [B] int32, and the forward process.
      variance, var_frac: see `log_variance`.
      num_bins: of the pixels z0, 256 if they are 8-bit; None for a continuous density of z0.
    """
    true_mean, true_variance = q_posterior(z0, z_t, t, process)
    mean, _ = q_posterior(z0_hat, z_t, t, process)
    log_var = log_variance(variance, t, process, var_frac)
    log_var = log_var.reshape(log_var.shape + (1,) * (z0.ndim - log_var.ndim))
    kl = gaussian_kl(true_mean, jnp.log(jnp.maximum(true_variance, 1e-30)), mean, log_var)
    if num_bins is None:
        decoder = 0.5 * (jnp.log(2 * jnp.pi) + log_var + (z0 - mean) ** 2 * jnp.exp(-log_var))
    else:
        decoder = discretized_gaussian_nll(z0, mean, log_var, num_bins)
    nats = jnp.where((t == 0).reshape(-1, *[1] * (z0.ndim - 1)), decoder, kl)
    return nats.mean(tuple(range(1, z0.ndim))) / jnp.log(2.0)


def prior_kl(z0: Array, process: Process) -> Array:
    """L_T of the VLB: KL(q(z_T | z0) || N(0, I)), [B] bits per dimension. It does not depend on the network."""
    nats = gaussian_kl(process.alpha[-1] * z0, 2 * np.log(process.sigma[-1]), 0.0, 0.0)
    return nats.mean(tuple(range(1, z0.ndim))) / jnp.log(2.0)
