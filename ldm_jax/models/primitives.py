"""Linear maps, convolutions and norms with the parameters and results of Flax's, and gradients written out.

Only the backward pass differs from `nn.Dense`, `nn.Conv`, `nn.GroupNorm` and `nn.LayerNorm`: on CPUs, XLA sums over the
rows of a matrix in one slow thread, and its gradient of a norm reads the activations more often than necessary.
`dtype` is that of the computation; parameters and statistics of norms are float32.

The variance is the mean of (x - mean)^2: E[x^2] - E[x]^2 loses digits. Kernels start as PyTorch's default, biases at 0.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from ldm_jax.models.backend import target_platform

Dtype = Any
NHWC = ("NHWC", "HWIO", "NHWC")

# Var = 1 / (3 fan_in), that is uniform within ±1/sqrt(fan_in).
torch_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def sum_rows(x: Array) -> Array:
    """[..., C] -> [C], the sum over all axes but the last; on CPUs as a product with ones, which uses all threads."""
    x = x.reshape(-1, x.shape[-1])
    if target_platform() != "cpu":
        return x.sum(0)
    return jnp.dot(jnp.ones((1, x.shape[0]), x.dtype), x, precision=lax.Precision.HIGHEST)[0]


@jax.custom_vjp
def add_bias(y: Array, bias: Array) -> Array:
    """y [..., C] + bias [C]."""
    return y + bias


add_bias.defvjp(lambda y, bias: (y + bias, None), lambda _, dy: (dy, sum_rows(dy)))


@jax.custom_vjp
def matmul(x: Array, kernel: Array) -> Array:
    """x [..., C] times kernel [C, D]: one product of two matrices, forward and backward."""
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[1])


def _matmul_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    rows, d_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return (d_rows @ kernel.T).reshape(x.shape), lax.dot_general(rows, d_rows, (((0,), (0,)), ((), ())))


matmul.defvjp(lambda x, kernel: (matmul(x, kernel), (x, kernel)), _matmul_backward)


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """The exact GELU (Hendrycks & Gimpel 2016), x Phi(x), of any shape; computed in float32.

    By erf: `jax.nn.gelu` computes the same by erfc, which on CPUs takes several times as long.
    """
    return (x * _normal_cdf(x)).astype(x.dtype)


def _normal_cdf(x: Array) -> Array:
    """Phi(x), the distribution function of N(0, 1), in float32."""
    return 0.5 + 0.5 * lax.erf(x.astype(jnp.float32) * 2**-0.5)


def _gelu_backward(x: Array, dy: Array) -> tuple[Array]:
    density = jnp.exp(-0.5 * jnp.square(x.astype(jnp.float32))) * (2 * jnp.pi) ** -0.5
    return ((dy * (_normal_cdf(x) + x * density)).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def _taps(kernel: Array, axis: int) -> list[Array]:
    """For even and for odd pixels, the 3 taps along `axis`, summed where they fall on one pixel of the small image."""
    before, here, after = jnp.split(kernel, 3, axis)
    even, odd = (before, here + after), (before + here, after)
    return [jnp.concatenate(two, axis) for two in (even, odd)]


def upsample_and_convolve(x: Array, kernel: Array) -> Array:
    """x [B, H, W, C] doubled by nearest neighbours, then convolved with kernel [3, 3, C, D] -> [B, 2H, 2W, D].

    Of the 9 pixels under the kernel only 4 differ, and which ones depends on the parity of row and column: four 2x2
    convolutions of the small image, interleaved, are the same sums at 4/9 of the work.
    """
    b, h, w, _ = x.shape
    parts = [
        lax.conv_general_dilated(x, two_by_two, (1, 1), ((1 - i, i), (1 - j, j)), dimension_numbers=NHWC)
        for i, two_rows in enumerate(_taps(kernel, 0))
        for j, two_by_two in enumerate(_taps(two_rows, 1))
    ]
    by_parity = jnp.stack(parts).reshape(2, 2, b, h, w, -1)
    return by_parity.transpose(2, 3, 0, 4, 1, 5).reshape(b, 2 * h, 2 * w, -1)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def group_norm(x: Array, scale: Array, bias: Array, groups: int, eps: float) -> Array:
    """Group normalisation (Wu & He 2018, eq. 7) of x [B, ..., C] float32 with scale and bias [C]."""
    return _group_norm_forward(x, scale, bias, groups, eps)[0]


def _sum_pixels(x: Array) -> Array:
    """[B, P, C] -> [B, C]; on CPUs as a product with ones, as in `sum_rows`."""
    if target_platform() != "cpu":
        return x.sum(1)
    ones = jnp.ones((x.shape[0], 1, x.shape[1]), x.dtype)
    return lax.dot_general(ones, x, (((2,), (1,)), ((0,), (0,))), precision=lax.Precision.HIGHEST)[:, 0]


def _group_means(values: Array, groups: int) -> Array:
    """[B, C] -> [B, 1, C], the mean over the channels of each channel's group."""
    b, c = values.shape
    means = values.reshape(b, groups, c // groups).mean(-1)
    return jnp.repeat(means, c // groups, axis=-1)[:, None]


def _group_norm_forward(x, scale, bias, groups, eps):
    pixels = x.reshape(x.shape[0], -1, x.shape[-1])
    n = pixels.shape[1]
    mean = _group_means(_sum_pixels(pixels) / n, groups)
    variance = _group_means(_sum_pixels(jnp.square(pixels - mean)) / n, groups)
    inverse = lax.rsqrt(variance + eps)
    y = (pixels - mean) * (inverse * scale) + bias
    return y.reshape(x.shape), (pixels, mean, inverse, scale)


def _group_norm_backward(groups, eps, saved, dy):
    pixels, mean, inverse, scale = saved
    d, n = dy.reshape(pixels.shape), pixels.shape[1]
    # The three gradients need these sums over the pixels, [B, C].
    d_bias = _sum_pixels(d)
    d_scale = _sum_pixels(d * (pixels - mean)) * inverse[:, 0]
    along_mean = _group_means(d_bias * scale, groups) / n
    along_normal = _group_means(d_scale * scale, groups) / n * inverse
    dx = inverse * (d * scale - along_mean - (pixels - mean) * along_normal)
    return dx.reshape(dy.shape), sum_rows(d_scale), sum_rows(d_bias)


group_norm.defvjp(_group_norm_forward, _group_norm_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    """Layer normalisation (Ba 2016, eq. 4) of x [..., C] float32 with scale and bias [C]."""
    return _layer_norm_forward(x, scale, bias, eps)[0]


def _layer_norm_forward(x, scale, bias, eps):
    mean = x.mean(-1, keepdims=True)
    inverse = lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + eps)
    return (x - mean) * inverse * scale + bias, (x, mean, inverse, scale)


def _layer_norm_backward(eps, saved, dy):
    x, mean, inverse, scale = saved
    normal, d = (x - mean) * inverse, dy * scale
    dx = inverse * (d - d.mean(-1, keepdims=True) - normal * (d * normal).mean(-1, keepdims=True))
    return dx, sum_rows(dy * normal), sum_rows(dy)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Root mean square normalisation (Zhang & Sennrich 2019, eq. 4) of x [..., C] float32 with scale [C]."""
    return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps) * scale


def _linear_parameters(layer: nn.Module, x: Array, shape: tuple[int, ...], use_bias: bool = True) -> list[Array | None]:
    """The input, the `kernel` of this shape and the `bias` of a layer, in its dtype."""
    kernel = layer.param("kernel", nn.initializers.zeros if layer.zero else torch_init, shape)
    bias = layer.param("bias", nn.initializers.zeros, shape[-1:]) if use_bias else None
    return nn.dtypes.promote_dtype(x, kernel, bias, dtype=layer.dtype)


class Dense(nn.Module):
    """A linear map of the last axis; `kernel` [C, features] and, with `use_bias`, `bias` [features]."""

    features: int
    use_bias: bool = True
    zero: bool = False  # whether the kernel starts at 0
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., C] -> [..., features]."""
        x, kernel, bias = _linear_parameters(self, x, (x.shape[-1], self.features), self.use_bias)
        y = matmul(x, kernel)
        return y if bias is None else add_bias(y, bias)


class Conv(nn.Module):
    """A square convolution, NHWC; `kernel` [k, k, C, features] and `bias` [features].

    `padding` is (before, after) on both axes; None keeps the size at stride 1. With `upsample`, a 3x3 convolution after
    nearest-neighbour upsampling by 2.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    padding: tuple[int, int] | None = None
    upsample: bool = False
    zero: bool = False  # whether the kernel starts at 0
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, H', W', features]."""
        k = self.kernel_size
        x, kernel, bias = _linear_parameters(self, x, (k, k, x.shape[-1], self.features))
        if self.upsample:
            return add_bias(upsample_and_convolve(x, kernel), bias)
        if k == 1 and self.strides == 1:
            return add_bias(matmul(x, kernel[0, 0]), bias)
        padding = (k // 2, k // 2) if self.padding is None else self.padding
        y = lax.conv_general_dilated(x, kernel, (self.strides,) * 2, (padding,) * 2, dimension_numbers=NHWC)
        return add_bias(y, bias)


def _scale_and_bias(layer: nn.Module, x: Array) -> tuple[Array, Array]:
    return tuple(
        layer.param(name, init, x.shape[-1:])
        for name, init in (("scale", nn.initializers.ones), ("bias", nn.initializers.zeros))
    )


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018), computed in float32, returned in `dtype`; `scale` and `bias` [C]."""

    groups: int
    eps: float
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, ..., C] -> [B, ..., C]."""
        y = group_norm(x.astype(jnp.float32), *_scale_and_bias(self, x), self.groups, self.eps)
        return y.astype(self.dtype or x.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation (Ba 2016), computed in float32, returned in `dtype`; `scale` and `bias` [C]."""

    eps: float = 1e-5
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., C] -> [..., C]."""
        y = layer_norm(x.astype(jnp.float32), *_scale_and_bias(self, x), self.eps)
        return y.astype(self.dtype or x.dtype)


class RMSNorm(nn.Module):
    """Root mean square normalisation (Zhang & Sennrich 2019), computed in float32, returned in `dtype`; `scale` [C]."""

    eps: float = 1e-6
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., C] -> [..., C]."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        return rms_norm(x.astype(jnp.float32), scale, self.eps).astype(self.dtype or x.dtype)
