"""Guidance rules: functions from denoiser to denoiser (see `denoiser`)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ldm_jax.diffusion.denoiser import ConditionalDenoiser, Denoiser, Estimate, on_z0
from ldm_jax.diffusion.forward import NoiseLevel
from ldm_jax.diffusion.prediction import from_z0, to_z0
from ldm_jax.diffusion.process import Process

Interval = Array | tuple[float, float]  # the first and the last timestep that are guided; see `_within`
ALWAYS = (0, np.inf)


class Projection(NamedTuple):
    """Adaptive projected guidance (Sadat 2024, algorithm 1, without momentum, which a denoiser has no state for).

    It changes d = z0_cond - z0_null [B, ...] of each example, by two scalars, which may be traced. The default is plain
    classifier-free guidance.
    """

    parallel: Array | float = 1.0  # eta: the weight of d's part along z0_cond, which oversaturates; the paper has 0
    max_norm: Array | float = np.inf  # r: |d| is at most this, above 0


PLAIN = Projection()


def classifier_free(
    denoise: ConditionalDenoiser,
    cond: Any,
    null_cond: Any,
    scale: Array,
    *,
    interval: Interval = ALWAYS,
    rescale: Array | float = 0.0,
    prediction: str = "z0",
    projection: Projection = PLAIN,
) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6, in the convention of Rombach 2022: scale = 1 + w).

    z0_hat = z0_null + scale (z0_cond - z0_null). Ho & Salimans guide eps: at a given z_t, z0 and v are affine in it and
    the weights, scale and 1 - scale, sum to 1, so guiding any of the three is the same.

    Both halves run as one batch of 2B. The null half is skipped where every scale is 1 or t lies outside the interval:
    decided at run time, so that changing scale or interval does not recompile.

    Args:
      denoise: `(z_t, level, cond) -> z0_hat`, from `denoiser.from_network`.
      cond, null_cond: trees of arrays [B, ...]: the condition, and the null (or negative) one, broadcastable to it.
      scale: scalar or [B], may be traced. 1 = conditional only, 0 = unconditional only.
      interval: the first and the last timestep that are guided, may be traced; the others are conditional only. At high
        noise guidance costs variety, at low noise it has no benefit (Kynkaanniemi 2024).
      rescale: phi of Lin 2023, eq. 16, in [0, 1], may be traced: how far the standard deviation of each example is
        brought back to that without guidance.
      prediction: whose standard deviation is rescaled; Lin 2023 and diffusers take that of the network's output.
      projection: adaptive projected guidance.
    """
    halves = _halves(denoise, cond, null_cond)
    return _extrapolated(
        halves, lambda z_t, level: denoise(z_t, level, cond), scale, interval, rescale, prediction, projection
    )


def _halves(
    denoise: ConditionalDenoiser, cond: Any, null_cond: Any
) -> Callable[[Array, NoiseLevel], tuple[Array | Estimate, Array | Estimate]]:
    """Both estimates, by the condition and by the null one, from one batch of 2B."""

    def halves(z_t: Array, level: NoiseLevel) -> tuple[Array | Estimate, Array | Estimate]:
        both = jax.tree.map(lambda c, n: jnp.concatenate([c, jnp.broadcast_to(n, c.shape)]), cond, null_cond)
        twice = NoiseLevel(*(jnp.concatenate([value, value]) for value in level))
        estimate, B = denoise(jnp.concatenate([z_t, z_t]), twice, both), len(z_t)
        return tuple(
            jax.tree.map(lambda value, half=half: value[half], estimate) for half in (slice(B), slice(B, None))
        )

    return halves


def cfg_plus_plus(
    denoise: ConditionalDenoiser, cond: Any, null_cond: Any, scale: Array, *, interval: Interval = ALWAYS
) -> Denoiser:
    """CFG++ (Chung 2024, algorithm 2): z0_hat is guided, and noised again by the unconditional eps, that of z0_null.

    z0_hat = z0_null + scale (z0_cond - z0_null), with a scale (lambda) in [0, 1]: 0 is the unconditional model, 1 is
    *not* the conditional one. It is an `Estimate` with z0_null, for solvers whose steps have a z0_hat and an eps.

    Args:
      denoise, cond, null_cond: see `classifier_free`.
      scale: scalar or [B], may be traced. For Stable Diffusion 0.2, 0.6 and 1 are like 2.5, 7.5 and 12.5 there.
      interval: as in `classifier_free`; outside of it z0_null is z0_cond, so that the step is conditional only.
    """
    halves = _halves(denoise, cond, null_cond)

    def to_float32(estimate: Array | Estimate) -> Estimate:
        estimate = estimate if isinstance(estimate, Estimate) else Estimate(estimate)
        return jax.tree.map(lambda value: value.astype(jnp.float32), estimate)

    def guided(z_t: Array, level: NoiseLevel, within: Array) -> Estimate:
        estimate, null = map(to_float32, halves(z_t, level))
        inside, w = (
            jnp.reshape(values, (-1, *[1] * (z_t.ndim - 1))) for values in (within, jnp.asarray(scale, jnp.float32))
        )
        z0_null = jnp.where(inside, null.z0, estimate.z0)
        z0 = jnp.where(inside, z0_null + w * (estimate.z0 - z0_null), estimate.z0)
        return estimate._replace(z0=z0, z0_null=z0_null)

    def conditional(z_t: Array, level: NoiseLevel, within: Array) -> Estimate:
        estimate = to_float32(denoise(z_t, level, cond))
        return estimate._replace(z0_null=estimate.z0)

    def guided_or_conditional(z_t: Array, level: NoiseLevel) -> Estimate:
        level = NoiseLevel(*(jnp.broadcast_to(jnp.asarray(value, jnp.float32), z_t.shape[:1]) for value in level))
        within = _within(level.t, interval)
        return jax.lax.cond(jnp.any(within), guided, conditional, z_t, level, within)

    return guided_or_conditional


def autoguided(
    denoise: Denoiser,
    weak: Denoiser,
    scale: Array,
    *,
    interval: Interval = ALWAYS,
    rescale: Array | float = 0.0,
    prediction: str = "z0",
    projection: Projection = PLAIN,
) -> Denoiser:
    """Autoguidance (Karras 2024a, eq. 4): away from a weaker denoiser of the same condition, or without any.

    z0_hat = z0_weak + scale (z0 - z0_weak), with z0_weak of an earlier checkpoint or a smaller network. The weaker
    denoiser is not called where every scale is 1 or t lies outside the interval: decided at run time.

    Args:
      denoise, weak: `(z_t [B, ...], level) -> z0_hat` at the same latents and noise levels; a learned variance is that
        of `denoise`.
      scale, interval, rescale, prediction, projection: see `classifier_free`; z0_weak takes the place of z0_null.
    """

    def both(z_t: Array, level: NoiseLevel) -> tuple[Array | Estimate, Array | Estimate]:
        strong, other = denoise(z_t, level), weak(z_t, level)
        z0_weak = other.z0 if isinstance(other, Estimate) else other
        return strong, on_z0(lambda z0: z0_weak, strong)

    return _extrapolated(both, denoise, scale, interval, rescale, prediction, projection)


def _extrapolated(
    both: Callable[[Array, NoiseLevel], tuple[Array | Estimate, Array | Estimate]],
    conditional: Denoiser,
    scale: Array,
    interval: Interval,
    rescale: Array | float,
    prediction: str,
    projection: Projection,
) -> Denoiser:
    """The second estimate of `both` plus scale times the difference of the first, that of `conditional`, from it."""

    def guided(z_t: Array, level: NoiseLevel, scale: Array) -> Array | Estimate:
        def extrapolate(z0_cond: Array, z0_null: Array) -> Array:
            w = scale.reshape(-1, *[1] * (z_t.ndim - 1))
            z0 = _projected(z0_null + w * (z0_cond - z0_null), z0_cond, z0_null, w, projection)
            return _rescaled(z0, z0_cond, z_t, level, prediction, rescale)

        return on_z0(extrapolate, *both(z_t, level))

    def unguided(z_t: Array, level: NoiseLevel, scale: Array) -> Array | Estimate:
        return jax.tree.map(lambda value: value.astype(jnp.float32), conditional(z_t, level))

    def guided_or_conditional(z_t: Array, level: NoiseLevel) -> Array | Estimate:
        level = NoiseLevel(*(jnp.broadcast_to(jnp.asarray(value, jnp.float32), z_t.shape[:1]) for value in level))
        within = _within(level.t, interval)
        scale_at_t = jnp.where(within, jnp.asarray(scale, jnp.float32), 1.0)
        return jax.lax.cond(jnp.all(scale_at_t == 1), unguided, guided, z_t, level, scale_at_t)

    return guided_or_conditional


def _projected(z0: Array, z0_cond: Array, z0_null: Array, w: Array, projection: Projection) -> Array:
    """Sadat 2024, algorithm 1, in place of z0, which is plainly guided by the scale w."""
    parallel, max_norm = projection
    axes, tiny, large = tuple(range(1, z0.ndim)), 1e-20, 1e15  # so that gradients are finite where d or z0_cond is 0

    def dot(a: Array, b: Array) -> Array:
        return jnp.sum(a * b, axes, keepdims=True)

    d = z0_cond - z0_null
    d = d * jnp.minimum(1, jnp.minimum(max_norm, large) / jnp.sqrt(jnp.maximum(dot(d, d), tiny)))
    along = dot(d, z0_cond) / jnp.maximum(dot(z0_cond, z0_cond), tiny) * z0_cond
    projected = z0_cond + (w - 1) * (d + (parallel - 1) * along)
    return jnp.where((parallel != 1) | (max_norm < np.inf), projected, z0)


def _rescaled(z0: Array, z0_cond: Array, z_t: Array, level: NoiseLevel, prediction: str, rescale: Array) -> Array:
    """Lin 2023, eq. 15 and 16, on the network outputs of z0 (guided) and of z0_cond."""
    axes, (alpha, sigma) = tuple(range(1, z_t.ndim)), level.broadcast_to(z_t)
    output, output_cond = (from_z0(prediction, value, z_t, alpha, sigma) for value in (z0, z0_cond))
    ratio = output_cond.std(axes, keepdims=True) / output.std(axes, keepdims=True)
    rescaled = to_z0(prediction, (1 + rescale * (ratio - 1)) * output, z_t, alpha, sigma)
    return jnp.where(rescale > 0, rescaled, z0)  # z0 -> output -> z0 costs digits


def classifier_guided(
    denoise: Denoiser, log_probability: Callable[[Array, Array], Array], scale: Array, *, interval: Interval = ALWAYS
) -> Denoiser:
    """Classifier guidance (Dhariwal & Nichol 2021, algorithm 2): eps - sigma scale grad log p(y | z_t).

    For z0 that is z0_hat + sigma^2 / alpha scale grad log p(y | z_t). Each call costs a gradient of the classifier,
    except where every scale is 0 or t lies outside the interval: decided at run time, so that neither recompiles.

    Towards alpha = 0 the factor grows without bound while the true gradient fades as alpha does: that is up to
    `log_probability` (see `models/classifier.py`). At alpha = 0, where z_t is independent of y, nothing is added.

    Args:
      denoise: the denoiser; may be guided already.
      log_probability: `(z_t [B, ...], t [B]) -> log p(y | z_t) [B]`, differentiable, of a classifier of noisy latents.
      scale: scalar or [B], may be traced. 1 = the true posterior of a perfect classifier and an unconditional denoiser.
      interval: the first and the last timestep that are guided, may be traced.
    """

    def guided(z_t: Array, level: NoiseLevel) -> Array | Estimate:
        t, active, weight = _guidance_weight(z_t, level, scale, interval)

        def add_gradient(z0: Array) -> Array:
            return z0 + weight * jax.grad(lambda z: log_probability(z, t).sum())(z_t)

        return on_z0(lambda z0: jax.lax.cond(active, add_gradient, lambda z0: z0, z0), denoise(z_t, level))

    return guided


def similarity_guided(
    denoise: Denoiser, similarity: Callable[[Array], Array], scale: Array, *, interval: Interval = ALWAYS
) -> Denoiser:
    """Guidance by a function of the estimate of z0, such as CLIP's similarity to a prompt (Chung 2023).

    With z0_hat for z0 in p(y | z0) ~ exp(scale similarity(z0)) (Chung 2023, theorem 1), z0 is
    z0_hat + sigma^2 / alpha scale grad similarity(z0_hat(z_t)), through the network: exact where the similarity is
    linear and z0 given z_t is Gaussian. Costs a gradient of network and similarity in each call, and none where
    `classifier_guided` costs none.

    Args:
      denoise, scale, interval: see `classifier_guided`.
      similarity: `z0 [B, ...] -> [B]`, differentiable.
    """

    def guided(z_t: Array, level: NoiseLevel) -> Array | Estimate:
        _, active, weight = _guidance_weight(z_t, level, scale, interval)

        def estimated(z_t: Array) -> Array | Estimate:
            return jax.tree.map(lambda value: value.astype(jnp.float32), denoise(z_t, level))

        def similarity_at(z_t: Array) -> tuple[Array, Array | Estimate]:
            estimate = estimated(z_t)
            return similarity(estimate.z0 if isinstance(estimate, Estimate) else estimate).sum(), estimate

        def add_gradient(z_t: Array) -> Array | Estimate:
            gradient, estimate = jax.grad(similarity_at, has_aux=True)(z_t)
            return on_z0(lambda z0: z0 + weight * gradient, estimate)

        return jax.lax.cond(active, add_gradient, estimated, z_t)

    return guided


def _within(t: Array, interval: Interval) -> Array:
    """Whether timesteps [B] are in an interval, bool [B].

    One that begins at 0 has no lower limit: samplers of rectified flow go to less noise than timestep 0 has.
    """
    return ((interval[0] <= 0) | (interval[0] <= t)) & (t <= interval[1])


def _guidance_weight(z_t: Array, level: NoiseLevel, scale: Array, interval: Interval) -> tuple[Array, Array, Array]:
    """t [B]; whether any example is guided, []; sigma^2 / alpha scale, to multiply z_t, 0 where alpha = 0."""
    t = jnp.broadcast_to(level.t, z_t.shape[:1])
    alpha, sigma = level.broadcast_to(z_t)
    within = _within(t, interval)
    factor = jnp.where(alpha > 0, sigma**2 / jnp.where(alpha > 0, alpha, 1.0), 0.0)
    scale = jnp.where(within, jnp.asarray(scale, jnp.float32), 0.0)
    return t, jnp.any(scale != 0), factor * scale.reshape(-1, *[1] * (z_t.ndim - 1))


def class_log_probabilities(apply: Callable[..., Array], process: Process) -> Callable[[Any, Array, Array], Array]:
    """The class probabilities `(params, z_t [B, ...], t [B]) -> log p(y | z_t) [B, K]` of a classifier, differentiable.

    `apply` is `({"params": params}, z_t, t, alpha [B]) -> logits [B, K]`, see `models/classifier.py`. t may be
    fractional.
    """
    timesteps, alphas = np.arange(len(process), dtype=np.float32), process.alpha.astype(np.float32)

    def log_probabilities(params: Any, z_t: Array, t: Array) -> Array:
        alpha = jnp.interp(t.astype(jnp.float32), timesteps, alphas)
        return jax.nn.log_softmax(apply({"params": params}, z_t, t, alpha))

    return log_probabilities


def log_probability(log_p: Array, label: Array) -> Array:
    """log p of each example's label: [B, K] and [B] -> [B]."""
    return jnp.take_along_axis(log_p, label[:, None], axis=1)[:, 0]
