"""The forward process and everything that follows from it: its posterior, the three prediction targets, SNR weights.

Throughout, z_t = sqrt(alpha_bar_t) z0 + sqrt(1 - alpha_bar_t) eps (Ho 2020, eq. 4). Shapes: latents [B, ...], t a
scalar or [B] int32 in [0, T), `alpha_bar` the schedule's [T] float64 NumPy table: coefficients are computed from it in
float64 on the host and cast once, so even a bfloat16 network is scheduled in float32. A concrete t outside [0, T) is
refused; a traced one gives NaN, where JAX's own indexing would clamp or wrap it silently.

Training looks t up in the schedule. A solver may stand between two timesteps, so what it needs takes a `Level`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PREDICTIONS = ("eps", "v", "z0")
WEIGHTINGS = ("uniform", "min_snr")


class Level(NamedTuple):
    """A place on the way from data to noise, z = alpha z0 + sigma eps with alpha^2 + sigma^2 = 1: scalars or [B]."""

    t: jax.Array  # the time that the network is told; may be fractional
    alpha: jax.Array
    sigma: jax.Array

    def beside(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """alpha and sigma, ready to multiply z [B, ...]."""
        alpha, sigma = (jnp.asarray(value, jnp.float32) for value in (self.alpha, self.sigma))
        return tuple(value.reshape(value.shape + (1,) * (z.ndim - value.ndim)) for value in (alpha, sigma))


def level_at(t: jax.Array, alpha_bar: np.ndarray) -> Level:
    """The level of timestep t of the schedule."""
    return Level(jnp.asarray(t, jnp.float32), *_signal_and_noise(alpha_bar, t))


def check_prediction(prediction: str, alpha_bar: np.ndarray) -> None:
    """Refuses an unknown prediction, and eps on a schedule that reaches alpha_bar = 0, where eps tells nothing of z0.

    Raises:
      ValueError: in either case.
    """
    _check_known(prediction)
    if prediction == "eps" and np.min(alpha_bar) <= 0:
        raise ValueError(
            "prediction 'eps' cannot recover z0 where alpha_bar = 0 (zero terminal SNR); predict 'v' or 'z0', "
            "or turn zero_terminal_snr off"
        )


def _check_known(prediction: str) -> None:
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")


def q_sample(z0: jax.Array, t: jax.Array, eps: jax.Array, alpha_bar: np.ndarray) -> jax.Array:
    """Draws z_t ~ q(z_t | z0) from eps ~ N(0, I) (Ho 2020, eq. 4). float32, like z0 in shape."""
    signal, noise = _signal_and_noise(alpha_bar, t, z0.ndim)
    return signal * z0 + noise * eps


def posterior_coefficients(alpha_bar: np.ndarray, alpha_bar_prev: np.ndarray) -> tuple[np.ndarray, ...]:
    """The Gaussian q(z_prev | z_t, z0) = N(on_z0 z0 + on_z z_t, variance I) between any two levels (Ho 2020, eq. 7).

    Between neighbouring timesteps beta is the schedule's own; a sampler that skips some gets the beta of the whole jump
    (Nichol 2021, section 4). float64 in, (on_z0, on_z, variance) float64 out, elementwise.
    """
    alpha = alpha_bar / alpha_bar_prev
    beta = 1 - alpha
    on_z0 = np.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar)
    on_z = np.sqrt(alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar)
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * beta
    return on_z0, on_z, variance


def q_posterior(z0: jax.Array, z_t: jax.Array, t: jax.Array, alpha_bar: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """q(z_{t-1} | z_t, z0) (Ho 2020, eq. 6 and 7), where alpha_bar_{-1} = 1: at t = 0 it is the point z0.

    Returns:
      mean, like z0; variance, [B, 1, ...] or [1, ...], to broadcast against it.
    """
    alpha_bar = np.asarray(alpha_bar, np.float64)
    coefficients = posterior_coefficients(alpha_bar, np.append(1.0, alpha_bar[:-1]))
    on_z0, on_z, variance = (at(table, t, z0.ndim) for table in coefficients)
    return on_z0 * z0 + on_z * z_t, variance


def target(prediction: str, z0: jax.Array, eps: jax.Array, t: jax.Array, alpha_bar: np.ndarray) -> jax.Array:
    """What the network is asked for: eps (Ho 2020), z0, or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) z0.

    v is that of Salimans & Ho 2022, section 4. Raises ValueError as `check_prediction`.
    """
    check_prediction(prediction, alpha_bar)
    if prediction == "eps":
        return eps
    if prediction == "z0":
        return z0
    signal, noise = _signal_and_noise(alpha_bar, t, z0.ndim)
    return signal * eps - noise * z0


def to_z0(prediction: str, output: jax.Array, z_t: jax.Array, level: Level) -> jax.Array:
    """The z0 that a network's output means at z_t: the inverse of `target`. float32; for eps, alpha must not be 0."""
    _check_known(prediction)
    output = output.astype(jnp.float32)
    alpha, sigma = level.beside(z_t)
    if prediction == "eps":
        return (z_t - sigma * output) / alpha
    if prediction == "v":
        return alpha * z_t - sigma * output
    return output


def from_z0(prediction: str, z0: jax.Array, z_t: jax.Array, level: Level) -> jax.Array:
    """The output that means z0 at z_t: the inverse of `to_z0`. float32; for eps and v, sigma must not be 0."""
    _check_known(prediction)
    z0 = z0.astype(jnp.float32)
    alpha, sigma = level.beside(z_t)
    if prediction == "eps":
        return (z_t - alpha * z0) / sigma
    if prediction == "v":
        return (alpha * z_t - z0) / sigma
    return z0


def to_eps(prediction: str, output: jax.Array, z_t: jax.Array, level: Level) -> jax.Array:
    """The eps that a network's output means at z_t. float32; for z0, sigma must not be 0."""
    _check_known(prediction)
    output = output.astype(jnp.float32)
    alpha, sigma = level.beside(z_t)
    if prediction == "eps":
        return output
    if prediction == "v":
        return sigma * z_t + alpha * output
    return (z_t - alpha * output) / sigma


def snr(t: jax.Array, alpha_bar: np.ndarray) -> jax.Array:
    """Signal-to-noise ratio alpha_bar / (1 - alpha_bar) (Kingma 2021, eq. 2), shaped like t, float32."""
    return at(_snr_table(alpha_bar), t)


def loss_weight(weighting: str, prediction: str, t: jax.Array, alpha_bar: np.ndarray, gamma: float = 5.0) -> jax.Array:
    """The weight of timestep t on the squared error of `prediction`, shaped like t, float32.

    `uniform` is 1 on whatever is predicted. `min_snr` is min(SNR, gamma) on the squared error of z0 (Hang 2023,
    section 3.4). The errors of eps and v are those of z0 times SNR and SNR + 1, so their weights are divided by these.

    Raises:
      ValueError: unknown weighting, gamma <= 0, or as `check_prediction`.
    """
    check_prediction(prediction, alpha_bar)
    if weighting == "uniform":
        return at(np.ones(len(alpha_bar)), t)
    if weighting != "min_snr":
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    if gamma <= 0:
        raise ValueError(f"min_snr needs gamma > 0, got {gamma}")
    ratio = _snr_table(alpha_bar)
    error_relative_to_z0 = {"eps": ratio, "v": ratio + 1, "z0": 1}[prediction]
    return at(np.minimum(ratio, gamma) / error_relative_to_z0, t)


def _snr_table(alpha_bar: np.ndarray) -> np.ndarray:
    alpha_bar = np.asarray(alpha_bar, np.float64)
    return alpha_bar / (1 - alpha_bar)


def _signal_and_noise(alpha_bar: np.ndarray, t: jax.Array, ndim: int = 0) -> tuple[jax.Array, jax.Array]:
    """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), ready to multiply latents of `ndim` axes."""
    alpha_bar = np.asarray(alpha_bar, np.float64)
    return at(np.sqrt(alpha_bar), t, ndim), at(np.sqrt(1 - alpha_bar), t, ndim)


def at(table: np.ndarray, t: jax.Array, ndim: int = 0) -> jax.Array:
    """table[t] in float32, with axes of length 1 appended up to `ndim`."""
    T = len(table)
    if not isinstance(t, jax.core.Tracer):
        outside = [int(i) for i in np.ravel(t) if not 0 <= i < T]
        if outside:
            raise ValueError(f"t must lie in 0..{T - 1} for a schedule of {T} timesteps, got {outside[0]}")
    t = jnp.asarray(t)
    values = jnp.asarray(table, jnp.float32).at[t].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    return values.reshape(values.shape + (1,) * (ndim - values.ndim))
