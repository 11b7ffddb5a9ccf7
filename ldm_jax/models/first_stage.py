"""The first stage (Rombach 2022, section 3.1): pixels to latents and back, and the scale of the latents.

Raw latents are the encoder's; the diffusion model is trained on z = (raw - shift) * scale. For diffusion on pixels the
first stage is the identity.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ldm_jax.models.autoencoder import AutoencoderKL, VQModel
from ldm_jax.models.pixels import to_pixels, to_uint8
from ldm_jax.models.tiled_autoencoder import PARTS, in_tiles

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0  # as in diffusers' DiagonalGaussianDistribution


@dataclass(frozen=True)
class FirstStage:
    """A first stage as pure functions, equal and hashed by its fields; `params` are those of the module, or {}.

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
        """f, the ratio of image size to latent size."""
        return 1 if self.module is None else self.module.downsampling

    @property
    def stochastic(self) -> bool:
        """Whether the encoder's output is the moments of a Gaussian."""
        return isinstance(self.module, AutoencoderKL)

    def encode(self, params: Any, x: Array) -> Array:
        """x [B, H, W, C] in [-1, 1] -> moments (mean, logvar) [B, h, w, 2c], or raw latents if not stochastic."""
        return self._apply(params, x, "encode", self.sample_size, self.sample_size // self.downsampling)

    def sample(self, moments: Array, keys: Array) -> Array:
        """Raw latents [B, h, w, c] sampled from the posterior; keys [B]."""
        return sample_posterior(moments, keys) if self.stochastic else moments

    def mode(self, moments: Array) -> Array:
        """The most likely raw latents, [B, h, w, c]."""
        return jnp.split(moments, 2, axis=-1)[0] if self.stochastic else moments

    def decode(self, params: Any, raw: Array) -> Array:
        """Raw latents [B, h, w, c] -> x [B, H, W, C]; a VQ autoencoder quantizes them first."""
        return self._apply(params, raw, "decode", self.sample_size // self.downsampling, self.sample_size)

    def _apply(self, params: Any, x: Array, method: str, tile: int, result: int) -> Array:
        if self.module is None:
            return x
        function = partial(self.module.apply, {"params": params}, method=method)
        return in_tiles(function, x, tile, result) if self.tiled else function(x)

    def reconstruct(self, params: Any, images: Array) -> Array:
        """The reconstruction of images uint8 [B, H, W, C] from their most likely latents."""
        return to_uint8(self.decode(params, self.mode(self.encode(params, to_pixels(images)))))


def sample_posterior(moments: Array, keys: Array) -> Array:
    """raw = mean + exp(logvar / 2) * noise (Kingma 2014, eq. 10); moments [B, h, w, 2c], keys [B]."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
    return mean + jnp.exp(0.5 * jnp.clip(logvar, LOGVAR_MIN, LOGVAR_MAX)) * noise


def kl_divergence(moments: Array) -> Array:
    """KL(q(raw | x) || N(0, 1)) of each example, summed over its latents, in nats [B] (Kingma 2014, appendix B)."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    logvar = jnp.clip(logvar, LOGVAR_MIN, LOGVAR_MAX)
    return 0.5 * jnp.sum(mean**2 + jnp.exp(logvar) - 1.0 - logvar, axis=(1, 2, 3))


def to_latents(raw: Array, shift: Array, scale: Array) -> Array:
    """z = (raw - shift) * scale, about unit variance; shift and scale [c]."""
    return (raw - shift) * scale


def from_latents(z: Array, shift: Array, scale: Array) -> Array:
    """raw [B, h, w, c] = z / scale + shift, with shift and scale [c]."""
    return z / scale + shift
