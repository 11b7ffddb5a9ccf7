"""The variational bound on log p(z0), term by term, and the reverse variance that may be learned (Nichol 2021).

All values are bits for each dimension, one for each example: nats / log 2, averaged over all axes but the first.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.process import at, posterior_coefficients, q_posterior

VARIANCES = ("fixed_small", "fixed_large", "learned")


def log_variance_bounds(alpha_bar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log beta_tilde_t and log beta_t, [T] float64: the least and the greatest that a reverse step may want.

    beta_tilde_0 = 0 has no logarithm; it takes the value of beta_tilde_1, as in Nichol & Dhariwal's code.
    """
    alpha_bar = np.asarray(alpha_bar, np.float64)
    before = np.append(1.0, alpha_bar[:-1])
    small = posterior_coefficients(alpha_bar, before)[2]
    small[0] = small[1] if len(small) > 1 else 1 - alpha_bar[0]
    return np.log(small), np.log(1 - alpha_bar / before)


def log_variance(variance: str, t: jax.Array, alpha_bar: np.ndarray, learned: jax.Array | None = None) -> jax.Array:
    """The log variance of p(z_{t-1} | z_t).

    Args:
      variance: `fixed_small` (beta_tilde), `fixed_large` (beta), or `learned`: between the two (Nichol 2021, eq. 15).
      t: [B] int32.
      alpha_bar: [T] float64 table of the schedule.
      learned: [B, ...] the network's v, -1 for beta_tilde and 1 for beta; may lie beyond.

    Raises:
      ValueError: an unknown variance.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance must be one of {', '.join(VARIANCES)}, got {variance!r}")
    ndim = learned.ndim if variance == "learned" else 1
    small, large = (at(table, t, ndim) for table in log_variance_bounds(alpha_bar))
    if variance != "learned":
        return small if variance == "fixed_small" else large
    share = (learned.astype(jnp.float32) + 1) / 2
    return share * large + (1 - share) * small


def gaussian_kl(mean: jax.Array, log_var: jax.Array, other_mean: jax.Array, other_log_var: jax.Array) -> jax.Array:
    """KL(N(mean, var) || N(other_mean, other_var)) in nats, elementwise."""
    ratio = jnp.exp(log_var - other_log_var)
    return 0.5 * (other_log_var - log_var + ratio - 1 + (mean - other_mean) ** 2 * jnp.exp(-other_log_var))


def discretized_gaussian_nll(x: jax.Array, mean: jax.Array, log_var: jax.Array, levels: int = 256) -> jax.Array:
    """-log P of pixels at `levels` even levels in [-1, 1] under a Gaussian cut into bins (Ho 2020, eq. 13), in nats.

    The bins at the ends are open. Differences of the distribution function below 1e-12 count as that.
    """
    std, half = jnp.exp(log_var / 2), 1 / (levels - 1)
    below = jnp.where(x <= -1 + half / 2, 0.0, jax.scipy.stats.norm.cdf((x - half - mean) / std))
    above = jnp.where(x >= 1 - half / 2, 1.0, jax.scipy.stats.norm.cdf((x + half - mean) / std))
    return -jnp.log(jnp.maximum(above - below, 1e-12))


def bound_term(
    z0: jax.Array,
    z_t: jax.Array,
    z0_hat: jax.Array,
    t: jax.Array,
    alpha_bar: np.ndarray,
    *,
    variance: str = "fixed_small",
    learned: jax.Array | None = None,
    levels: int | None = None,
) -> jax.Array:
    """L_t of the variational bound (Ho 2020, eq. 5): KL(q(z_{t-1} | z_t, z0) || p), and for t = 0 -log p(z0 | z_0).

    Args:
      z0: [B, ...] the data; pixels at `levels` levels, or, if that is None, of a continuous density.
      z_t: [B, ...] noised to t.
      z0_hat: [B, ...] what the model takes z0 to be.
      t: [B] int32.
      alpha_bar: [T] float64 table of the schedule.
      variance, learned: see `log_variance`.
      levels: 256 for 8-bit pixels.

    Returns:
      [B] bits per dimension.
    """
    true_mean, true_variance = q_posterior(z0, z_t, t, alpha_bar)
    mean, _ = q_posterior(z0_hat, z_t, t, alpha_bar)
    model = log_variance(variance, t, alpha_bar, learned)
    model = model.reshape(model.shape + (1,) * (z0.ndim - model.ndim))
    kl = gaussian_kl(true_mean, jnp.log(jnp.maximum(true_variance, 1e-30)), mean, model)
    if levels is None:
        decoder = 0.5 * (jnp.log(2 * jnp.pi) + model + (z0 - mean) ** 2 * jnp.exp(-model))
    else:
        decoder = discretized_gaussian_nll(z0, mean, model, levels)
    nats = jnp.where((t == 0).reshape(-1, *[1] * (z0.ndim - 1)), decoder, kl)
    return nats.mean(tuple(range(1, z0.ndim))) / jnp.log(2.0)


def prior_term(z0: jax.Array, alpha_bar: np.ndarray) -> jax.Array:
    """L_T: KL(q(z_T | z0) || N(0, I)), [B] bits per dimension. No network can change it."""
    last = alpha_bar[-1]
    nats = gaussian_kl(np.sqrt(last) * z0, np.log1p(-last), 0.0, 0.0)
    return nats.mean(tuple(range(1, z0.ndim))) / jnp.log(2.0)
