"""The first stage (Rombach 2022, section 3.1): pixels to latents and back, and the scale of the latents.

Raw latents are the encoder's; `z = (raw - shift) * scale` is what the diffusion model is trained on. Both directions of
that are here and nowhere else. Diffusion on pixels has the identity as its first stage.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.models.autoencoder import AutoencoderKL, VQModel
from ldm_jax.models.pixels import to_pixels, to_uint8
from ldm_jax.models.tiled_autoencoder import PARTS, in_tiles

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0  # as in diffusers' DiagonalGaussianDistribution


@dataclass(frozen=True)
class FirstStage:
    """An autoencoder's pure functions, equal and hashed by its fields; `params` are those of the module, {} of pixels.

    Attributes:
      module: None for diffusion on pixels.
      sample_size: side in pixels of the images that it was trained on, which is the side of a tile.
      tiled: encode and decode larger images in tiles, for less memory.
    """

    module: AutoencoderKL | VQModel | None
    sample_size: int = 32
    tiled: bool = False

    def __post_init__(self) -> None:
        if self.tiled and self.sample_size % (PARTS * self.downsampling):
            raise ValueError(f"a tile of {self.sample_size} pixels must be a multiple of {PARTS} x {self.downsampling}")

    @property
    def downsampling(self) -> int:
        """Pixels per latent, in height and in width."""
        return 1 if self.module is None else self.module.downsampling

    @property
    def stochastic(self) -> bool:
        """Whether the encoder gives the moments of a Gaussian."""
        return isinstance(self.module, AutoencoderKL)

    def encode(self, params: Any, x: jax.Array) -> jax.Array:
        """x [B, H, W, C] in [-1, 1] -> moments (mean, logvar) [B, h, w, 2c], of a VQ autoencoder [B, h, w, c]."""
        if self.module is None:
            return x
        encode = lambda x: self.module.apply({"params": params}, x, method="encode")  # noqa: E731
        tile = self.sample_size
        return in_tiles(encode, x, tile, tile // self.downsampling) if self.tiled else encode(x)

    def sample(self, moments: jax.Array, keys: jax.Array) -> jax.Array:
        """Raw latents [B, h, w, c] of the posterior, each example with its own key; keys [B]."""
        return sample_posterior(moments, keys) if self.stochastic else moments

    def mode(self, moments: jax.Array) -> jax.Array:
        """The most likely raw latents, [B, h, w, c]."""
        return jnp.split(moments, 2, axis=-1)[0] if self.stochastic else moments

    def decode(self, params: Any, raw: jax.Array) -> jax.Array:
        """Raw latents [B, h, w, c] -> x [B, H, W, C]; a VQ autoencoder quantizes them first."""
        if self.module is None:
            return raw
        decode = lambda raw: self.module.apply({"params": params}, raw, method="decode")  # noqa: E731
        tile = self.sample_size
        return in_tiles(decode, raw, tile // self.downsampling, tile) if self.tiled else decode(raw)

    def reconstruct(self, params: Any, images: jax.Array) -> jax.Array:
        """Images uint8 [B, H, W, C] encoded and, from the most likely latents, decoded."""
        return to_uint8(self.decode(params, self.mode(self.encode(params, to_pixels(images)))))


def sample_posterior(moments: jax.Array, keys: jax.Array) -> jax.Array:
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
    """raw [B, h, w, c] = z / scale + shift, with shift and scale [c]."""
    return z / scale + shift
