"""The first stage (Rombach 2022, section 3.1) as three pure functions, whatever its kind, and the latents' scale.

Raw latents are what the encoder gives; `z = (raw - shift) * scale` is what the diffusion model sees. Both directions
of that are here and nowhere else. Pixel diffusion is the first stage that does nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from ldm_jax.models.autoencoder import VQModel
from ldm_jax.models.pixels import to_pixels, to_uint8

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0  # as in diffusers' DiagonalGaussianDistribution


class FirstStage(NamedTuple):
    """Pixels to latents and back.

    encode: (params, x [B, H, W, C]) -> moments [B, h, w, 2c] (kl), or the latents themselves (vq, none).
    draw: (moments, keys [B]) -> raw latents [B, h, w, c], each example with its own key.
    mode: moments -> raw latents, the most likely ones.
    decode: (params, raw) -> x.
    """

    encode: Callable[[Any, jax.Array], jax.Array]
    draw: Callable[[jax.Array, jax.Array], jax.Array]
    mode: Callable[[jax.Array], jax.Array]
    decode: Callable[[Any, jax.Array], jax.Array]


def make_first_stage(module: nn.Module | None) -> FirstStage:
    """The first stage of an `AutoencoderKL`, of a `VQModel`, or of None for pixel space."""
    if module is None:
        return FirstStage(lambda params, x: x, _keep, _keep, lambda params, raw: raw)

    def encode(params: Any, x: jax.Array) -> jax.Array:
        return module.apply({"params": params}, x, method="encode")

    def decode(params: Any, raw: jax.Array) -> jax.Array:
        return module.apply({"params": params}, raw, method="decode")

    if isinstance(module, VQModel):  # `decode` looks the codes up
        return FirstStage(encode, _keep, _keep, decode)
    return FirstStage(encode, draw, lambda moments: jnp.split(moments, 2, axis=-1)[0], decode)


def draw(moments: jax.Array, keys: jax.Array) -> jax.Array:
    """raw = mean + exp(logvar / 2) * noise (Kingma 2014, eq. 10); moments [B, h, w, 2c], keys [B]."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
    return mean + jnp.exp(0.5 * jnp.clip(logvar, LOGVAR_MIN, LOGVAR_MAX)) * noise


def kl_divergence(moments: jax.Array) -> jax.Array:
    """KL(q(raw | x) || N(0, 1)) of each example, summed over its latents, in nats [B] (Kingma 2014, appendix B)."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    logvar = jnp.clip(logvar, LOGVAR_MIN, LOGVAR_MAX)
    return 0.5 * jnp.sum(mean**2 + jnp.exp(logvar) - 1.0 - logvar, axis=(1, 2, 3))


def to_latents(raw: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """z = (raw - shift) * scale, about unit variance; shift and scale [c]."""
    return (raw - shift) * scale


def from_latents(z: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """raw = z / scale + shift."""
    return z / scale + shift


def reconstruct(first_stage: FirstStage, params: Any, images: jax.Array) -> jax.Array:
    """Images through the encoder and, from the most likely latents, back: uint8 [B, H, W, C] to the same."""
    moments = first_stage.encode(params, to_pixels(images))
    return to_uint8(first_stage.decode(params, first_stage.mode(moments)))


def _keep(moments: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    return moments
