"""Functions from network to denoiser and from denoiser to denoiser.

A denoiser is `denoise(z_t, level) -> z0_hat`: z_t [B, ...], a `process.Level` of scalars or [B], and the estimate of z0
in float32, or, of a network that has learned its variance, an `Estimate`. That is all a solver sees; conditions,
guidance scales and bounds live in the closures built here, which compose: the outer sees what the inner returns.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.process import Level, check_prediction, from_z0, to_z0


class Estimate(NamedTuple):
    """What a network with a learned variance says at z_t. Guidance changes z0 alone."""

    z0: jax.Array  # [B, ...] z0_hat
    spread: jax.Array  # [B, ...] v of Nichol 2021, eq. 15: -1 for the variance beta_tilde, 1 for beta; may lie beyond


Denoiser = Callable[[jax.Array, Level], jax.Array | Estimate]
ConditionalDenoiser = Callable[[jax.Array, Level, Any], jax.Array | Estimate]


def on_z0(
    change: Callable[..., jax.Array], estimate: jax.Array | Estimate, *others: jax.Array | Estimate
) -> jax.Array | Estimate:
    """`change(z0, *other z0)`, with the spread of the first estimate, if it has one."""
    if isinstance(estimate, Estimate):
        return estimate._replace(z0=change(estimate.z0, *(other.z0 for other in others)))
    return change(estimate, *others)


def from_network(
    network: Callable[[jax.Array, jax.Array, Any], jax.Array], prediction: str, alpha_bar: np.ndarray
) -> ConditionalDenoiser:
    """Makes a conditional denoiser of a network that predicts eps, v or z0.

    Args:
      network: `(z_t [B, ..., c], t [B], context) -> output [B, ..., c]`, or [B, ..., 2c] with the spread behind it.
      prediction: what `output` is: `eps`, `v` or `z0`.
      alpha_bar: [T] float64 table of the schedule the network was trained with.

    Returns:
      `(z_t, level, context) -> z0_hat`, or Estimate.

    Raises:
      ValueError: unknown prediction, or eps on a schedule with alpha_bar = 0.
    """
    check_prediction(prediction, alpha_bar)

    def denoise(z_t: jax.Array, level: Level, context: Any) -> jax.Array:
        t = jnp.broadcast_to(level.t, z_t.shape[:1])
        output = network(z_t, t, context)
        if output.shape[-1] != 2 * z_t.shape[-1]:
            return to_z0(prediction, output, z_t, level)
        output, spread = jnp.split(output, 2, axis=-1)
        return Estimate(to_z0(prediction, output, z_t, level), spread.astype(jnp.float32))

    return denoise


def classifier_free(
    denoise: ConditionalDenoiser,
    context: Any,
    null_context: Any,
    scale: jax.Array,
    *,
    interval: jax.Array | tuple[float, float] = (0, np.inf),
    rescale: jax.Array | float = 0.0,
    prediction: str = "z0",
) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6, in the convention of Rombach 2022: scale = 1 + w).

    z0_hat = z0_null + scale (z0_cond - z0_null). Ho & Salimans write it for eps: at a given z_t, z0 is affine in eps
    (and in v), and the weights, scale and 1 - scale, sum to 1, so guiding any of the three is the same.

    Both halves run as one batch of 2B. Where every scale is 1, or t lies outside the interval, the null half cannot
    matter and is skipped; the choice is made at run time, so that changing scale or interval does not recompile.

    Args:
      denoise: `(z_t, level, context) -> z0_hat`, as made by `from_network`.
      context: the condition, an array or tree of arrays [B, ...] (say, tokens [B, L, D]).
      null_context: the empty (or negative) condition, broadcastable to `context`, leaf by leaf.
      scale: scalar or [B], may be traced. 1 = conditional only, 0 = unconditional only.
      interval: the first and the last timestep that are guided, may be traced; the others are conditional only. At high
        noise guidance costs variety, at low noise it brings nothing (Kynkaanniemi 2024).
      rescale: phi of Lin 2023, eq. 16, in [0, 1], may be traced: how far the standard deviation of each example is
        brought back to what it was without guidance.
      prediction: of what the standard deviation is meant; Lin 2023 and diffusers take the network's own.
    """

    def guided(z_t: jax.Array, level: Level, scale: jax.Array) -> jax.Array:
        both = jax.tree.map(lambda c, n: jnp.concatenate([c, jnp.broadcast_to(n, c.shape)]), context, null_context)
        twice = Level(*(jnp.concatenate([value, value]) for value in level))
        estimate, B = denoise(jnp.concatenate([z_t, z_t]), twice, both), len(z_t)

        def away_from_null(z0_cond: jax.Array, z0_null: jax.Array) -> jax.Array:
            z0 = z0_null + scale.reshape(-1, *[1] * (z_t.ndim - 1)) * (z0_cond - z0_null)
            return _rescaled(z0, z0_cond, z_t, level, prediction, rescale)

        halves = (jax.tree.map(lambda value, half=half: value[half], estimate) for half in (slice(B), slice(B, None)))
        return on_z0(away_from_null, *halves)

    def conditional(z_t: jax.Array, level: Level, scale: jax.Array) -> jax.Array:
        return jax.tree.map(lambda value: value.astype(jnp.float32), denoise(z_t, level, context))

    def guided_if_it_matters(z_t: jax.Array, level: Level) -> jax.Array:
        level = Level(*(jnp.broadcast_to(jnp.asarray(value, jnp.float32), z_t.shape[:1]) for value in level))
        within = (interval[0] <= level.t) & (level.t <= interval[1])
        scale_at_t = jnp.where(within, jnp.asarray(scale, jnp.float32), 1.0)
        return jax.lax.cond(jnp.all(scale_at_t == 1), conditional, guided, z_t, level, scale_at_t)

    return guided_if_it_matters


def _rescaled(
    z0: jax.Array, z0_cond: jax.Array, z_t: jax.Array, level: Level, prediction: str, rescale: jax.Array
) -> jax.Array:
    """Lin 2023, eq. 15 and 16, on the outputs that mean z0 (guided) and z0_cond (not)."""
    axes = tuple(range(1, z_t.ndim))
    output, output_cond = (from_z0(prediction, value, z_t, level) for value in (z0, z0_cond))
    ratio = output_cond.std(axes, keepdims=True) / output.std(axes, keepdims=True)
    rescaled = to_z0(prediction, (1 + rescale * (ratio - 1)) * output, z_t, level)
    return jnp.where(rescale > 0, rescaled, z0)  # z0 -> output -> z0 costs digits


def classifier_guided(
    denoise: Denoiser,
    log_probability: Callable[[jax.Array, jax.Array], jax.Array],
    scale: jax.Array,
    *,
    interval: jax.Array | tuple[float, float] = (0, np.inf),
) -> Denoiser:
    """Classifier guidance (Dhariwal & Nichol 2021, algorithm 2): eps - sigma scale grad log p(y | z_t).

    For z0 that is z0_hat + sigma^2 / alpha scale grad log p(y | z_t). Costs a gradient of the classifier in each call
    but where every scale is 0 or t lies outside the interval: decided at run time, so that neither recompiles.

    Towards alpha = 0 the factor grows beyond all bounds while the true gradient fades as alpha does, which is left to
    `log_probability` (see `models/classifier.py`). At alpha = 0, where z_t tells nothing of y, nothing is added.

    Args:
      denoise: what is guided; itself guided, perhaps.
      log_probability: `(z_t [B, ...], t [B]) -> log p(y | z_t) [B]`, differentiable, of a classifier of noisy latents.
      scale: scalar or [B], may be traced. 1 = the true posterior of a perfect classifier and an unconditional denoiser.
      interval: the first and the last timestep that are guided, may be traced.
    """

    def guided(z_t: jax.Array, level: Level) -> jax.Array:
        t = jnp.broadcast_to(level.t, z_t.shape[:1])
        alpha, sigma = level.beside(z_t)
        within = (interval[0] <= t) & (t <= interval[1])
        weight = jnp.where(within, jnp.asarray(scale, jnp.float32), 0.0)

        def push(z0: jax.Array) -> jax.Array:
            gradient = jax.grad(lambda z: log_probability(z, t).sum())(z_t)
            factor = jnp.where(alpha > 0, sigma**2 / jnp.where(alpha > 0, alpha, 1.0), 0.0)
            return z0 + factor * weight.reshape(-1, *[1] * (z_t.ndim - 1)) * gradient

        def push_if_it_matters(z0: jax.Array) -> jax.Array:
            return jax.lax.cond(jnp.any(weight != 0), push, lambda z0: z0, z0)

        return on_z0(push_if_it_matters, denoise(z_t, level))

    return guided


def similarity_guided(
    denoise: Denoiser,
    similarity: Callable[[jax.Array], jax.Array],
    scale: jax.Array,
    *,
    interval: jax.Array | tuple[float, float] = (0, np.inf),
) -> Denoiser:
    """Guidance by what is seen in the estimate: towards a z0 that is similar to what is asked for, as CLIP tells it.

    The estimate stands for z0 in p(y | z0) ~ exp(scale similarity(z0)) (Chung 2023, theorem 1), so that
    z0_hat + sigma^2 / alpha scale grad similarity(z0_hat(z_t)), through the network: exact where the similarity is
    linear. Costs a gradient of network and similarity in each call but where every scale is 0 or t lies outside the
    interval: decided at run time, so that neither recompiles.

    Args:
      denoise: what is guided; itself guided, perhaps.
      similarity: `z0 [B, ...] -> [B]`, differentiable.
      scale: scalar or [B], may be traced.
      interval: the first and the last timestep that are guided, may be traced.
    """

    def guided(z_t: jax.Array, level: Level) -> jax.Array | Estimate:
        t = jnp.broadcast_to(level.t, z_t.shape[:1])
        alpha, sigma = level.beside(z_t)
        within = (interval[0] <= t) & (t <= interval[1])
        weight = jnp.where(within, jnp.asarray(scale, jnp.float32), 0.0)

        def estimated(z_t: jax.Array) -> jax.Array | Estimate:
            return jax.tree.map(lambda value: value.astype(jnp.float32), denoise(z_t, level))

        def seen(z_t: jax.Array) -> tuple[jax.Array, jax.Array | Estimate]:
            estimate = estimated(z_t)
            return similarity(estimate.z0 if isinstance(estimate, Estimate) else estimate).sum(), estimate

        def push(z_t: jax.Array) -> jax.Array | Estimate:
            gradient, estimate = jax.grad(seen, has_aux=True)(z_t)
            factor = jnp.where(alpha > 0, sigma**2 / jnp.where(alpha > 0, alpha, 1.0), 0.0)
            step = factor * weight.reshape(-1, *[1] * (z_t.ndim - 1)) * gradient
            return on_z0(lambda z0: z0 + step, estimate)

        return jax.lax.cond(jnp.any(weight != 0), push, estimated, z_t)

    return guided


def keep_known(z0: jax.Array, mask: jax.Array) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """A `project` of `sampling.solve` that draws only where the mask says so (Lugmayr 2022, eq. 8; Song 2021, SDEdit).

    After each row, what is known is put back at the level that z has reached, with fresh noise; at the end it is z0.

    Args:
      z0: clean latents, broadcastable to z [B, ...].
      mask: bool, broadcastable to z: True = drawn, False = kept. Where all is drawn, nothing is done.
    """

    def project(z: jax.Array, alpha_bar: jax.Array, keys: jax.Array) -> jax.Array:
        def keep() -> jax.Array:
            eps = jax.vmap(lambda key: jax.random.normal(key, z.shape[1:]))(keys)
            return jnp.where(mask, z, jnp.sqrt(alpha_bar) * z0 + jnp.sqrt(1 - alpha_bar) * eps)

        return jax.lax.cond(jnp.all(mask), lambda: z, keep)

    return project


def clip_z0(denoise: Denoiser, bound: jax.Array) -> Denoiser:
    """Keeps z0_hat within [-bound, bound], for data known to lie there (pixels: 1; Ho 2020's samplers do it).

    bound is a positive scalar and may be traced; infinity leaves z0_hat as it is. Solvers derive eps from the clipped
    z0_hat, which diffusers' DDIM does with `use_clipped_model_output=True`.
    """
    return lambda z_t, level: on_z0(lambda z0: jnp.clip(z0, -bound, bound), denoise(z_t, level))


def threshold_z0(
    denoise: Denoiser, quantile: jax.Array | float = 0.995, highest: jax.Array | float = np.inf
) -> Denoiser:
    """Dynamic thresholding (Saharia 2022, section 2.3), for pixels in [-1, 1] under strong guidance.

    In each example z0_hat is kept within [-s, s] and divided by s, the quantile of |z0_hat|, from 1 to `highest`.
    quantile may be traced; 0 is plain clipping at 1, and costs no more than that.
    """

    def thresholded(z0_hat: jax.Array) -> jax.Array:
        one = jnp.ones((len(z0_hat), *[1] * (z0_hat.ndim - 1)))
        axes = tuple(range(1, z0_hat.ndim))
        s = jax.lax.cond(
            quantile > 0, lambda: jnp.quantile(jnp.abs(z0_hat), quantile, axis=axes, keepdims=True), lambda: one
        )
        s = jnp.clip(s, 1.0, highest)
        return jnp.clip(z0_hat, -s, s) / s

    return lambda z_t, level: on_z0(thresholded, denoise(z_t, level))


Classify = Callable[[Any, jax.Array, jax.Array], jax.Array]


def make_classify(apply: Callable[..., jax.Array], alpha_bar: np.ndarray) -> Classify:
    """`classify(params, z_t [B, ...], t [B]) -> log p(y | z_t) [B, K]`, differentiable; t may be fractional.

    Args:
      apply: `({"params": params}, z_t, t, alpha [B]) -> logits [B, K]`, alpha being sqrt(alpha_bar) of t.
      alpha_bar: [T] float64 table of the schedule.
    """
    timesteps, signal = np.arange(len(alpha_bar), dtype=np.float32), np.sqrt(alpha_bar).astype(np.float32)

    def classify(params: Any, z_t: jax.Array, t: jax.Array) -> jax.Array:
        alpha = jnp.interp(t.astype(jnp.float32), timesteps, signal)
        return jax.nn.log_softmax(apply({"params": params}, z_t, t, alpha))

    return classify


def log_probability(log_p: jax.Array, label: jax.Array) -> jax.Array:
    """log p of each example's own label: [B, K] and [B] -> [B]."""
    return jnp.take_along_axis(log_p, label[:, None], axis=1)[:, 0]
