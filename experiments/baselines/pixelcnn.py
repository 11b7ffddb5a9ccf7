"""Gated PixelCNN with class conditioning (van den Oord 2016, "Conditional image generation with PixelCNN decoders").

p(x | y) is a product over the pixels, in raster order, of a 256-way softmax that sees the pixels before. So the bits
per dim are exact, and sampling takes one pass of the network for each pixel. For grey images.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ldm_jax.models.pixels import to_pixels

LEVELS = 256


class GatedLayer(nn.Module):
    """One layer of both stacks (figure 2): the vertical sees the rows above, the horizontal its own row to the left.

    With `first`, neither sees the pixel itself: mask A.
    """

    features: int
    first: bool = False

    @nn.compact
    def __call__(self, vertical: jax.Array, horizontal: jax.Array, embedding: jax.Array) -> tuple[jax.Array, jax.Array]:
        double = 2 * self.features
        above, left = vertical, horizontal
        if self.first:
            above = jnp.pad(above, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]
            left = jnp.pad(left, ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :-1]
        down = nn.Conv(double, (2, 3), padding=((1, 0), (1, 1)), name="vertical")(above)
        along = nn.Conv(double, (1, 2), padding=((0, 0), (1, 0)), name="horizontal")(left)
        along += nn.Conv(double, (1, 1), name="from_vertical")(down)
        bias = nn.Dense(2 * double, name="told")(embedding)[:, None, None]
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
        embedding = nn.Embed(self.num_classes, self.features)(label)
        x = jnp.concatenate([x, jnp.ones_like(x)], axis=-1)  # where there is an image, and where its border
        vertical = horizontal = x
        for number in range(self.layers):
            layer = GatedLayer(self.features, first=number == 0)
            vertical, horizontal = layer(vertical, horizontal, embedding)
        hidden = nn.Conv(2 * self.features, (1, 1))(nn.relu(horizontal))
        return nn.Conv(LEVELS, (1, 1))(nn.relu(hidden))


def bits_per_dim(
    model: PixelCNN, params, images: jax.Array, label: jax.Array, keys: jax.Array | None = None
) -> jax.Array:
    """Exact, [B], of uint8 images [B, H, W, 1]; nothing is random, and `keys` are not used."""
    logits = model.apply({"params": params}, to_pixels(images), label)
    chosen = jnp.take_along_axis(nn.log_softmax(logits), images.astype(jnp.int32), axis=-1)
    return -chosen.mean(axis=(1, 2, 3)) / jnp.log(2.0)


def sample(model: PixelCNN, params, label: jax.Array, keys: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Images uint8 [N, H, W, 1] of these labels [N], each with its own key [N]: one pixel after the other.

    A pixel needs what each layer made of its own place, and of the row above and the pixel to the left, which is kept
    (Ramachandran 2017). So all pixels together cost what one pass of the network does, not one pass each.
    """
    (height, width), n = shape, len(label)
    embedding = params["Embed_0"]["embedding"][label]
    layers = [params[f"GatedLayer_{number}"] for number in range(model.layers)]
    # Of the vertical and the horizontal stack.
    biases = [jnp.split(dense(layer["told"], embedding), 2, axis=-1) for layer in layers]
    channels = [2, *[model.features] * (model.layers - 1)]  # that a layer sees

    def one_row(carry: tuple, row: jax.Array) -> tuple[tuple, jax.Array]:
        current, above = carry  # the row before, as the first layer sees it [N, W, 2]; what each layer saw before that
        seen, downs = [], []
        for layer, (bias, _), before in zip(layers, biases, above):
            seen.append(current)
            rows = jnp.pad(jnp.stack([before, current], axis=1), ((0, 0), (0, 0), (1, 1), (0, 0)))
            down = jax.lax.conv_general_dilated(
                rows, layer["vertical"]["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )[:, 0]
            down += layer["vertical"]["bias"]
            downs.append(dense(layer["from_vertical"], down))
            current = gate(down + bias[:, None])
        start = (jnp.zeros((n, 2)), [jnp.zeros((n, c)) for c in channels])
        columns = (row * width + jnp.arange(width), [jnp.moveaxis(down, 1, 0) for down in downs])
        _, pixels = jax.lax.scan(one_pixel, start, columns)
        pixels = pixels.T  # [N, W]
        return (as_seen(pixels), seen), pixels

    def one_pixel(carry: tuple, place: tuple) -> tuple[tuple, jax.Array]:
        (current, left), (number, downs) = carry, place
        seen = []
        for index, (layer, (_, bias), before, down) in enumerate(zip(layers, biases, left, downs)):
            seen.append(current)
            kernel = layer["horizontal"]["kernel"][0]
            along = before @ kernel[0] + current @ kernel[1] + layer["horizontal"]["bias"] + down
            onward = dense(layer["onward"], gate(along + bias))
            current = onward if index == 0 else current + onward
        logits = dense(params["Conv_1"], nn.relu(dense(params["Conv_0"], nn.relu(current))))
        chosen = jax.vmap(lambda key, logits: jax.random.categorical(jax.random.fold_in(key, number), logits))
        pixels = chosen(keys, logits).astype(jnp.uint8)
        return (as_seen(pixels), seen), pixels

    start = (jnp.zeros((n, width, 2)), [jnp.zeros((n, width, c)) for c in channels])
    _, rows = jax.lax.scan(one_row, start, jnp.arange(height))
    return jnp.moveaxis(rows, 0, 1)[..., None]


def as_seen(pixels: jax.Array) -> jax.Array:
    """Pixels uint8 [...] as the first layer sees them, [..., 2]: see `PixelCNN`."""
    x = to_pixels(pixels)
    return jnp.stack([x, jnp.ones_like(x)], axis=-1)


def dense(params, x: jax.Array) -> jax.Array:
    """A dense layer, or a convolution of 1 x 1, at one place."""
    return x @ params["kernel"].reshape(params["kernel"].shape[-2:]) + params["bias"]
