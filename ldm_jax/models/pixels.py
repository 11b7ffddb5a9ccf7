"""Images as uint8 and as pixels x in [-1, 1], and random flips, on the device."""

import jax
import jax.numpy as jnp
from jax import Array


def to_pixels(images: Array) -> Array:
    """Images uint8 [..., H, W, C] -> x float32 in [-1, 1]: 0 is -1, 255 is 1."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(x: Array) -> Array:
    """Pixels x [..., H, W, C] -> uint8, rounded (half to even) and clipped: the inverse of `to_pixels`."""
    return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)


def flip_images(x: Array, keys: Array) -> Array:
    """Images x [B, H, W, C], each flipped left to right with probability 1/2; keys [B]."""
    flipped = jax.vmap(jax.random.bernoulli)(keys)  # [B]
    return jnp.where(flipped[:, None, None, None], x[:, :, ::-1], x)
