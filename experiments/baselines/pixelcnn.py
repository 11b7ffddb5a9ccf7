"""Gated PixelCNN with class conditioning (van den Oord 2016, "Conditional image generation with PixelCNN decoders").

p(x | y) is the product over the pixels, in raster order, of a 256-way softmax conditioned on the preceding pixels: bits
per dim are exact. For greyscale images.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ldm_jax.models.pixels import to_pixels

LEVELS = 256  # of a pixel
CLASS_BIAS = "told"  # the name is part of the key of the initial weights; results.json was measured with this one


class GatedLayer(nn.Module):
    """A gated layer of both stacks (figure 2): the receptive field of the vertical stack is the rows above, that of the
    horizontal stack its row to the left. With `first` both exclude the pixel itself (mask A).
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
        bias = nn.Dense(2 * double, name=CLASS_BIAS)(embedding)[:, None, None]
        gated = gate(along + bias[..., double:])
        onward = nn.Conv(self.features, (1, 1), name="onward")(gated)
        return gate(down + bias[..., :double]), onward if self.first else horizontal + onward


def gate(x: jax.Array) -> jax.Array:
    """tanh(a) sigmoid(b) (eq. 2), a and b the two halves of the channels."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.tanh(a) * nn.sigmoid(b)


class PixelCNN(nn.Module):
    """The network: x [B, H, W, 1] in [-1, 1], labels [B] -> logits [B, H, W, 256], conditioned on preceding pixels."""

    num_classes: int
    features: int = 64
    layers: int = 12

    @nn.compact
    def __call__(self, x: jax.Array, label: jax.Array) -> jax.Array:
        embedding = nn.Embed(self.num_classes, self.features)(label)
        x = jnp.concatenate([x, jnp.ones_like(x)], axis=-1)  # distinguishes the image from padding
        vertical = horizontal = x
        for number in range(self.layers):
            layer = GatedLayer(self.features, first=number == 0)
            vertical, horizontal = layer(vertical, horizontal, embedding)
        hidden = nn.Conv(2 * self.features, (1, 1))(nn.relu(horizontal))
        return nn.Conv(LEVELS, (1, 1))(nn.relu(hidden))


def bits_per_dim(
    model: PixelCNN, params, images: jax.Array, label: jax.Array, keys: jax.Array | None = None
) -> jax.Array:
    """Exact bits per dim [B] of images uint8 [B, H, W, 1]; `keys` are not used."""
    logits = model.apply({"params": params}, to_pixels(images), label)
    chosen = jnp.take_along_axis(nn.log_softmax(logits), images.astype(jnp.int32), axis=-1)
    return -chosen.mean(axis=(1, 2, 3)) / jnp.log(2.0)


def sample(model: PixelCNN, params, label: jax.Array, keys: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Samples: images uint8 [N, H, W, 1] of these labels [N], each with its own key [N], pixel by pixel.

    The activations of the row above and of the pixel to the left are cached (Ramachandran 2017), so that all pixels
    together cost one pass of the network, not one pass each.
    """
    (height, width), n = shape, len(label)
    embedding = params["Embed_0"]["embedding"][label]
    layers = [params[f"GatedLayer_{number}"] for number in range(model.layers)]
    # Biases of the vertical and the horizontal stack.
    biases = [jnp.split(dense(layer[CLASS_BIAS], embedding), 2, axis=-1) for layer in layers]
    channels = [2, *[model.features] * (model.layers - 1)]  # of each layer's input

    def one_row(carry: tuple, row: jax.Array) -> tuple[tuple, jax.Array]:
        current, above = carry  # network input of the previous row [N, W, 2]; each layer's input of the row above it
        inputs, downs = [], []
        for layer, (bias, _), before in zip(layers, biases, above):
            inputs.append(current)
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
        return (network_input(pixels), inputs), pixels

    def one_pixel(carry: tuple, column: tuple) -> tuple[tuple, jax.Array]:
        (current, left), (number, downs) = carry, column
        inputs = []
        for index, (layer, (_, bias), before, down) in enumerate(zip(layers, biases, left, downs)):
            inputs.append(current)
            kernel = layer["horizontal"]["kernel"][0]
            along = before @ kernel[0] + current @ kernel[1] + layer["horizontal"]["bias"] + down
            onward = dense(layer["onward"], gate(along + bias))
            current = onward if index == 0 else current + onward
        logits = dense(params["Conv_1"], nn.relu(dense(params["Conv_0"], nn.relu(current))))
        chosen = jax.vmap(lambda key, logits: jax.random.categorical(jax.random.fold_in(key, number), logits))
        pixels = chosen(keys, logits).astype(jnp.uint8)
        return (network_input(pixels), inputs), pixels

    start = (jnp.zeros((n, width, 2)), [jnp.zeros((n, width, c)) for c in channels])
    _, rows = jax.lax.scan(one_row, start, jnp.arange(height))
    return jnp.moveaxis(rows, 0, 1)[..., None]


def network_input(pixels: jax.Array) -> jax.Array:
    """The input [..., 2] of the first layer for pixels uint8 [...]: see `PixelCNN`."""
    x = to_pixels(pixels)
    return jnp.stack([x, jnp.ones_like(x)], axis=-1)


def dense(params, x: jax.Array) -> jax.Array:
    """A dense layer, or a 1 x 1 convolution, at one pixel."""
    return x @ params["kernel"].reshape(params["kernel"].shape[-2:]) + params["bias"]
