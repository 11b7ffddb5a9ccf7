"""LPIPS, the learned perceptual distance (Zhang et al. 2018, eq. 1), and its pretrained networks VGG16 and AlexNet.

VGG16 is configuration D of Simonyan and Zisserman 2015, AlexNet that of Krizhevsky 2014 ("one weird trick"), both in
torchvision's layout. The weights come from `ldm_jax.interop.lpips_weights`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

# ImageNet's channel means and deviations, (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225), from [0, 1] to [-1, 1],
# rounded as in the published LPIPS, whose heads were trained with these numbers.
IMAGENET_SHIFT = (-0.030, -0.088, -0.188)
IMAGENET_SCALE = (0.458, 0.448, 0.450)

VGG16_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
VGG16_MIN_SIZE = 16  # four halvings must leave one pixel
# (width, kernel, stride, padding)
ALEXNET_LAYERS = ((64, 11, 4, 2), (192, 5, 1, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))
ALEXNET_MIN_SIZE = 31  # stride 4 and two 3x3 pools must leave one pixel

# Inside the square root of the feature norm: else the gradient would be NaN where every feature is 0. The published
# code adds 1e-10 outside, which agrees wherever the norm is not tiny.
NORM_EPS = 1e-10


def imagenet_input(x: Array, min_size: int, tower: str) -> Array:
    """Pixels [B, H, W, 1 or 3] in [-1, 1] -> [B, H, W, 3] with ImageNet mean 0 and deviation 1; grey is repeated.

    ValueError if the channels are neither 1 nor 3, or the image is smaller than `min_size`, the least for `tower`.
    """
    if x.ndim != 4 or x.shape[-1] not in (1, 3):
        raise ValueError(f"{tower} takes pixels [B, H, W, 1 or 3], got {x.shape}")
    if min(x.shape[1:3]) < min_size:
        size = f"{x.shape[1]}x{x.shape[2]}"
        raise ValueError(f"{tower} needs images of at least {min_size}x{min_size}, got {size}; resize")
    rgb = jnp.broadcast_to(x, (*x.shape[:3], 3))
    return (rgb - jnp.asarray(IMAGENET_SHIFT, x.dtype)) / jnp.asarray(IMAGENET_SCALE, x.dtype)


def conv3x3(conv: nn.Conv, h: Array) -> Array:
    """A 3x3 convolution with padding 1, fast also where [B, H, W, C] has a side below 3.

    XLA's CPU backend computes a convolution whose kernel is larger than its input by a naive loop: at 2x2x512 one
    hundred times slower than the same input padded to 3x3 with zeros, and cropped. The barriers keep XLA from folding
    the padding into the convolution.
    """
    height, width = h.shape[1:3]
    if min(height, width) >= 3:
        return conv(h)
    h = jnp.pad(h, ((0, 0), (0, max(0, 3 - height)), (0, max(0, 3 - width)), (0, 0)))
    return jax.lax.optimization_barrier(conv(jax.lax.optimization_barrier(h)))[:, :height, :width]


class VGG16(nn.Module):
    """The convolutional part of VGG16."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> list[Array]:
        """Pixels [B, H, W, 1 or 3] in [-1, 1] -> the outputs of relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3.

        Output k = 0..4 is [B, H / 2^k, W / 2^k, (64, 128, 256, 512, 512)[k]], halves rounded down.
        """
        h = imagenet_input(x, VGG16_MIN_SIZE, "VGG16").astype(self.dtype)
        taps = []
        for block, widths in enumerate(VGG16_WIDTHS, start=1):
            if block > 1:
                h = nn.max_pool(h, (2, 2), strides=(2, 2))
            for layer, width in enumerate(widths, start=1):
                conv = nn.Conv(width, (3, 3), padding=1, dtype=self.dtype, name=f"conv{block}_{layer}")
                h = nn.relu(conv3x3(conv, h))
            taps.append(h)
        return taps


class AlexNet(nn.Module):
    """The convolutional part of AlexNet."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> list[Array]:
        """Pixels [B, H, W, 1 or 3] in [-1, 1], 31x31 or more -> its five ReLUs, of 64, 192, 384, 256, 256 channels."""
        h, taps = imagenet_input(x, ALEXNET_MIN_SIZE, "AlexNet").astype(self.dtype), []
        for layer, (width, kernel, stride, padding) in enumerate(ALEXNET_LAYERS, start=1):
            if layer in (2, 3):
                h = nn.max_pool(h, (3, 3), strides=(2, 2))
            conv = nn.Conv(width, (kernel,) * 2, stride, padding, dtype=self.dtype, name=f"conv{layer}")
            h = nn.relu(conv(h))
            taps.append(h)
        return taps


TOWERS = {"vgg16": VGG16, "alexnet": AlexNet}


def unit_features(features: Array) -> Array:
    """Feature vectors [B, H, W, C] scaled to length 1, in float32; 0 stays 0, with a finite gradient."""
    features = features.astype(jnp.float32)
    return features * jax.lax.rsqrt(jnp.sum(features**2, axis=-1, keepdims=True) + NORM_EPS)


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity, one distance per pair (Zhang et al. 2018, equation 1).

    d(x, y) = sum_l mean_hw sum_c lin_l[c] * (unit(f_l(x)) - unit(f_l(y)))^2, with f_l the taps of the tower.

    Attributes:
        net: the tower, "vgg16" or "alexnet".
        resize: if not None, both images are first resized to resize x resize, bilinearly (with antialiasing when
            shrinking). AlexNet needs 31 x 31 or more.
        dtype: of the tower's computation; the distance is float32.
    """

    net: str = "vgg16"
    resize: int | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, y: Array) -> Array:
        """Two batches of pixels [B, H, W, 1 or 3] in [-1, 1] -> their distances [B] float32, 0 for equal images.

        ValueError for an unknown `net`, different shapes, or images that `imagenet_input` refuses.
        """
        if self.net not in TOWERS:
            raise ValueError(f"net of LPIPS must be one of {', '.join(TOWERS)}; got {self.net!r}")
        if x.shape != y.shape:
            raise ValueError(f"LPIPS needs images of one shape, got {x.shape} and {y.shape}")
        tower = TOWERS[self.net](dtype=self.dtype, name="tower")
        if self.resize is not None:
            size = (len(x), self.resize, self.resize, x.shape[-1])
            x, y = (jax.image.resize(images, size, "bilinear") for images in (x, y))
        # Two passes, not one over a joint batch: in training only one of the images needs the backward pass.
        taps_x, taps_y = tower(x), tower(y)
        distance = jnp.zeros(x.shape[0], jnp.float32)
        for level, (f_x, f_y) in enumerate(zip(taps_x, taps_y)):
            lin = self.param(f"lin{level}", nn.initializers.ones, (f_x.shape[-1],))
            difference = (unit_features(f_x) - unit_features(f_y)) ** 2
            distance += jnp.mean(difference @ lin, axis=(1, 2))
        return distance
