"""Between the bytes of a picture and the network's x in [-1, 1], and the mirror: pure functions, run on the device."""

import jax
import jax.numpy as jnp
from jax import Array


def to_pixels(images: Array) -> Array:
    """uint8 [..., H, W, C] -> x float32 in [-1, 1]: 0 is -1, 255 is 1."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(x: Array) -> Array:
    """x [..., H, W, C] -> uint8, the nearest level (half to even), clipped. The inverse of `to_pixels` on all 256."""
    return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)


def flip_images(x: Array, keys: Array) -> Array:
    """Each x[k] of [B, H, W, C] mirrored left to right if the coin of its own keys[k] falls so; keys [B]."""
    mirrored = jax.vmap(jax.random.bernoulli)(keys)  # [B]
    return jnp.where(mirrored[:, None, None, None], x[:, :, ::-1], x)
