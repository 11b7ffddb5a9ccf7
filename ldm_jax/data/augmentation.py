"""Random shifts and zooms of images: a pure function of images and keys, run on the device."""

import jax
import jax.numpy as jnp
from jax import Array


def check_ranges(max_shift: int, max_zoom: float) -> None:
    """Raises ValueError for a shift below 0 or a zoom outside [0, 1)."""
    if max_shift < 0 or not 0 <= max_zoom < 1:
        raise ValueError(f"max_shift must be 0 or more and max_zoom in [0, 1); got {max_shift} and {max_zoom}")


def move_and_zoom(x: Array, keys: Array, *, max_shift: int, max_zoom: float) -> Array:
    """Images resized about their centre and shifted, each x[k] by its own keys[k]; border pixels are repeated.

    Args:
      x, keys: float32 [B, H, W, C] and [B].
      max_shift: of whole pixels in [-max_shift, max_shift], vertically and horizontally.
      max_zoom: of factors of the size in [1 - max_zoom, 1 + max_zoom], with linear interpolation.

    Returns [B, H, W, C]; raises ValueError as `check_ranges`.
    """
    check_ranges(max_shift, max_zoom)
    _, height, width, _ = x.shape

    def resample(image: Array, key: Array) -> Array:
        key_shift, key_zoom = jax.random.split(key)
        down, right = jax.random.randint(key_shift, (2,), -max_shift, max_shift + 1)
        zoom = jax.random.uniform(key_zoom, minval=1 - max_zoom, maxval=1 + max_zoom)
        rows, columns = _interpolation(height, down, zoom), _interpolation(width, right, zoom)
        return jnp.einsum("ih,jw,hwc->ijc", rows, columns, image, precision=jax.lax.Precision.HIGHEST)

    return jax.vmap(resample)(x, keys)


def _interpolation(size: int, shift: Array, zoom: Array) -> Array:
    """[size, size]: row i holds the weights of the input's pixels in the output's pixel i."""
    centre = (size - 1) / 2
    source = jnp.clip((jnp.arange(size) - centre - shift) / zoom + centre, 0, size - 1)
    return jnp.maximum(0.0, 1 - jnp.abs(source[:, None] - jnp.arange(size)))
