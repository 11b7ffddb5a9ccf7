"""Space-to-depth and back: the resampling of the GAN, the VAE and the flow (Dinh 2017; Shi 2016)."""

import jax


def squeeze(y: jax.Array) -> jax.Array:
    """Space to depth: [B, 2h, 2w, c] -> [B, h, w, 4c] (Dinh 2017, section 3.6)."""
    b, height, width, c = y.shape
    y = y.reshape(b, height // 2, 2, width // 2, 2, c)
    return y.transpose(0, 1, 3, 2, 4, 5).reshape(b, height // 2, width // 2, 4 * c)


def unsqueeze(y: jax.Array) -> jax.Array:
    """Depth to space, the inverse of `squeeze`: [B, h, w, 4c] -> [B, 2h, 2w, c]."""
    b, height, width, c = y.shape
    y = y.reshape(b, height, width, 2, 2, c // 4)
    return y.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * height, 2 * width, c // 4)
