"""A class-conditional VAE (Kingma & Welling 2014) with one latent vector per image.

The likelihood of a pixel is a discretized logistic (Salimans 2017, eq. 2), so the VLB is that of discrete pixels.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments.baselines.squeeze import squeeze, unsqueeze
from ldm_jax.models.first_stage import kl_divergence, sample_posterior
from ldm_jax.models.pixels import to_pixels, to_uint8


class VAE(nn.Module):
    """The VAE's encoder and decoder, for images of `shape` [H, W, C]; H and W are multiples of 4."""

    num_classes: int
    shape: tuple[int, int, int]
    features: int = 64
    latent: int = 64

    def setup(self) -> None:
        f, (height, width, channels) = self.features, self.shape
        self.embed_encoder, self.embed_decoder = (nn.Embed(self.num_classes, f) for _ in range(2))
        self.down = [nn.Conv(f, (3, 3)), nn.Conv(2 * f, (3, 3))]
        self.to_moments = nn.Dense(2 * self.latent)
        self.from_latent = nn.Dense(height // 4 * (width // 4) * 2 * f)
        self.up = [nn.Conv(4 * f, (3, 3)), nn.Conv(4 * (f // 2), (3, 3))]
        self.to_likelihood = nn.Conv(2 * channels, (3, 3))

    def encode(self, x: jax.Array, label: jax.Array) -> jax.Array:
        """x [B, H, W, C] in [-1, 1] -> mean and log variance of the posterior, [B, 1, 1, 2 latent]."""
        first, second = self.down
        hidden = nn.silu(first(squeeze(x)) + self.embed_encoder(label)[:, None, None])
        hidden = nn.silu(second(squeeze(hidden)))
        return self.to_moments(hidden.reshape(len(x), -1))[:, None, None]

    def decode(self, z: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
        """z [B, 1, 1, latent] -> mean and log scale of the logistic at each pixel, in units of [-1, 1]."""
        height, width, _ = self.shape
        hidden = jnp.concatenate([z[:, 0, 0], self.embed_decoder(label)], axis=-1)
        hidden = nn.silu(self.from_latent(hidden)).reshape(len(z), height // 4, width // 4, 2 * self.features)
        for layer in self.up:
            hidden = nn.silu(unsqueeze(layer(hidden)))
        mean, log_scale = jnp.split(self.to_likelihood(hidden), 2, axis=-1)
        return mean, jnp.clip(log_scale - 2.0, -7.0, 3.0)

    def __call__(self, x: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Encodes and decodes by the mean; `init` makes all parameters by it."""
        mean, _ = jnp.split(self.encode(x, label), 2, axis=-1)
        return self.decode(mean, label)


def log_likelihood(images: jax.Array, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
    """Log-likelihood in nats of each pixel of uint8 images under discretized logistics; 0 and 255 include the tails."""
    x, half = to_pixels(images), 1.0 / 255.0
    upper, lower = ((x + side * half - mean) * jnp.exp(-log_scale) for side in (1, -1))
    inside = jnp.log(jnp.maximum(nn.sigmoid(upper) - nn.sigmoid(lower), 1e-12))
    return jnp.where(images == 0, nn.log_sigmoid(upper), jnp.where(images == 255, nn.log_sigmoid(-lower), inside))


def bits_per_dim(model: VAE, params, images: jax.Array, label: jax.Array, keys: jax.Array) -> jax.Array:
    """The VLB in bits per dim [B] (Kingma & Welling 2014, eq. 3), from one posterior sample per key [B]."""
    moments = model.apply({"params": params}, to_pixels(images), label, method="encode")
    z = sample_posterior(moments, keys)
    mean, log_scale = model.apply({"params": params}, z, label, method="decode")
    nats = kl_divergence(moments) - log_likelihood(images, mean, log_scale).sum(axis=(1, 2, 3))
    return nats / (images[0].size * jnp.log(2.0))


def sample(model: VAE, params, label: jax.Array, keys: jax.Array) -> jax.Array:
    """Samples: images uint8 [N, H, W, C] of these labels [N], decoded means of latents sampled with the keys [N]."""
    z = jax.vmap(lambda key: jax.random.normal(key, (1, 1, model.latent)))(keys)
    mean, _ = model.apply({"params": params}, z, label, method="decode")
    return to_uint8(mean)
