"""Gated PixelCNN with class conditioning (van den Oord 2016, "Conditional image generation with PixelCNN decoders").

p(x | y) is a product over the pixels, in raster order, of a 256-way softmax that sees the pixels before. So the bits
per dim are exact, and drawing takes one pass of the network for each pixel. For grey pictures.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ldm_jax.data.pixels import to_pixels

LEVELS = 256


class GatedLayer(nn.Module):
    """One layer of both stacks (figure 2): the vertical sees the rows above, the horizontal its own row to the left.

    With `first`, neither sees the pixel itself: mask A.
    """

    features: int
    first: bool = False

    @nn.compact
    def __call__(self, vertical: jax.Array, horizontal: jax.Array, told: jax.Array) -> tuple[jax.Array, jax.Array]:
        double = 2 * self.features
        above, left = vertical, horizontal
        if self.first:
            above = jnp.pad(above, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]
            left = jnp.pad(left, ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :-1]
        down = nn.Conv(double, (2, 3), padding=((1, 0), (1, 1)), name="vertical")(above)
        along = nn.Conv(double, (1, 2), padding=((0, 0), (1, 0)), name="horizontal")(left)
        along += nn.Conv(double, (1, 1), name="from_vertical")(down)
        bias = nn.Dense(2 * double, name="told")(told)[:, None, None]
        gated = gate(along + bias[..., double:])
        onward = nn.Conv(self.features, (1, 1), name="onward")(gated)
        return gate(down + bias[..., :double]), onward if self.first else horizontal + onward


def gate(x: jax.Array) -> jax.Array:
    """tanh(a) sigmoid(b) (eq. 2), a and b the two halves of the channels."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.tanh(a) * nn.sigmoid(b)


class PixelCNN(nn.Module):
    """x [B, H, W, 1] in [-1, 1] and labels [B] -> logits [B, H, W, 256] of each pixel given those before it."""

    num_classes: int
    features: int = 64
    layers: int = 12

    @nn.compact
    def __call__(self, x: jax.Array, label: jax.Array) -> jax.Array:
        told = nn.Embed(self.num_classes, self.features)(label)
        x = jnp.concatenate([x, jnp.ones_like(x)], axis=-1)  # where there is a picture, and where its border
        vertical = horizontal = x
        for number in range(self.layers):
            layer = GatedLayer(self.features, first=number == 0)
            vertical, horizontal = layer(vertical, horizontal, told)
        hidden = nn.Conv(2 * self.features, (1, 1))(nn.relu(horizontal))
        return nn.Conv(LEVELS, (1, 1))(nn.relu(hidden))


def bits_per_dim(model: PixelCNN, params, images: jax.Array, label: jax.Array) -> jax.Array:
    """Exact, [B], of uint8 images [B, H, W, 1]."""
    logits = model.apply({"params": params}, to_pixels(images), label)
    chosen = jnp.take_along_axis(nn.log_softmax(logits), images.astype(jnp.int32), axis=-1)
    return -chosen.mean(axis=(1, 2, 3)) / jnp.log(2.0)


def draw(model: PixelCNN, params, label: jax.Array, keys: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Pictures uint8 [N, H, W, 1] of these labels [N], each with its own key [N]: one pixel after the other."""
    height, width = shape

    def one_more(number: jax.Array, images: jax.Array) -> jax.Array:
        row, column = number // width, number % width
        logits = model.apply({"params": params}, to_pixels(images), label)[:, row, column]
        chosen = jax.vmap(lambda key, logits: jax.random.categorical(jax.random.fold_in(key, number), logits))
        return images.at[:, row, column, 0].set(chosen(keys, logits).astype(jnp.uint8))

    return jax.lax.fori_loop(0, height * width, one_more, jnp.zeros((len(label), height, width, 1), jnp.uint8))
