"""MeanFlow: the average velocity of a flow over an interval, by which one network call is a whole sampler (Geng 2025).

On the path z_t = (1 - t) z0 + t eps of rectified flow, with the velocity v(z_t, t), the average velocity over [r, t] is

    u(z_t, r, t) = (z_t - z_r) / (t - r),    so that    z_r = z_t - (t - r) u(z_t, r, t).

Its derivative by t gives the identity u = v - (t - r) du/dt (eq. 6), the target of training. A step of DDIM from t to r
with z0_hat = z_t - t u is the step to z_r, so that `ddim` samples from such a network, in one step or a few.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

Velocity = Callable[[Array, Array, Array], Array]  # (z_t [B, ...], t [B], interval t - r [B]) -> u [B, ...]


def directional_derivative(function: Callable[..., Array], at: Sequence[Array], along: Sequence[Array]) -> Array:
    """The Jacobian-vector product of a function of arrays, [B, ...] like its value.

    `at` are its arguments [B, ...], `along` the direction, of the same shapes.

    Forward-mode differentiation as the transpose of reverse mode, which is linear in the cotangent: `jax.jvp` has no
    rule for functions with a gradient written out (`jax.custom_vjp`), such as the layers of `models/primitives.py`.
    Compiled, it costs what `jax.jvp` costs.
    """
    value, pullback = jax.vjp(function, *at)
    _, pushforward = jax.vjp(pullback, jnp.zeros_like(value))
    return pushforward(tuple(along))[0]


def mean_flow_target(network: Velocity, z_t: Array, t: Array, interval: Array, v: Array, tangent: Array) -> Array:
    """The training target v - (t - r) du/dt (Geng 2025, eq. 10 and 11), [B, ...] without a gradient.

    Args:
      network: the current estimate of u, of parameters without a gradient.
      z_t: [B, ...] noised latents.
      t, interval: [B] in [0, 1], the end of the interval and its length t - r.
      v: [B, ...] the velocity eps - z0 of the sample, perhaps guided.
      tangent: [B, ...] the velocity along which z_t moves in du/dt: v, or the network's estimate of the marginal
        velocity, u over an interval of length 0 (Geng 2025b, section 4.1), with which du/dt has less variance.
    """
    one = jnp.ones_like(t)
    du_dt = directional_derivative(network, (z_t, t, interval), (tangent, one, one))
    return jax.lax.stop_gradient(v - _per_example(interval, z_t) * du_dt)


def guided_velocity(v: Array, u_null: Array, u_cond: Array, scale: float, kappa: float) -> Array:
    """The velocity of classifier-free guidance as a field of its own (Geng 2025, eq. 21), [B, ...] like each.

    With omega = scale (1 - kappa): omega v + kappa u_cond + (1 - omega - kappa) u_null, where u_cond and u_null are the
    network's estimates with and without the condition over an interval of length 0. `scale` is the guidance scale of
    the samples, 1 none; kappa in [0, 1) replaces a part of the sample's velocity by the network's.
    """
    omega = scale * (1 - kappa)
    return omega * v + kappa * u_cond + (1 - omega - kappa) * u_null


def adaptive_loss(error: Array, power: float, eps: float = 1e-2) -> tuple[Array, Array]:
    """The squared error divided by its own (value + eps)^power, without a gradient (Geng 2025, eq. 22), [B].

    Also returns the squared error [B], the sum over the axes of error [B, ...] but the first; power 0 is no weight.
    """
    squared = jnp.sum(jnp.square(error), axis=tuple(range(1, error.ndim)))
    return squared / jax.lax.stop_gradient(squared + eps) ** power, squared


def _per_example(values: Array, like: Array) -> Array:
    """[B] with axes appended to multiply `like` [B, ...]."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
