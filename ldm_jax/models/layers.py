"""Layers of the networks: resampling, ResNet block, time embedding.

Images are NHWC. Names of submodules are those of diffusers (`conv1`, `time_emb_proj`), so that its weights load by
renaming alone (see `interop/diffusers.py`). The last layer of every residual branch starts at 0 (`zero=True`), so that
each block begins as the identity (Ho et al. 2020; Dhariwal & Nichol 2021).
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ldm_jax.models.primitives import Conv, Dense, Dtype, GroupNorm


def check_groups(channels: Sequence[int], groups: int) -> None:
    """ValueError unless `groups` divides every number of channels."""
    if groups < 1:
        raise ValueError(f"norm_num_groups must be 1 or more; got {groups}")
    if others := [c for c in channels if c % groups]:
        which = f"{others[0]} in {tuple(channels)} is not"
        raise ValueError(f"every width must be a multiple of norm_num_groups={groups}; {which}")


def upsample_nearest(x: Array, size: tuple[int, int] | None = None) -> Array:
    """Nearest-neighbour upsampling by 2, [B, H, W, C] -> [B, 2H, 2W, C], or to `size` = 2H or 2H - 1 (same for W).

    A stride-2 convolution takes sizes 2n - 1 and 2n to n, so that these are the sizes of skips. For 2n - 1 the nearest
    neighbour floor(i * n / (2n - 1)) of pixel i is floor(i / 2): the doubled image, cropped.
    """
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
    return x if size is None else x[:, : size[0], : size[1], :]


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2 (or to `size`), then a 3x3 convolution."""

    features: int
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array, size: tuple[int, int] | None = None) -> Array:
        """[B, H, W, C] -> [B, 2H, 2W, features], or [B, *size, features]."""
        if size is None or size == (2 * x.shape[1], 2 * x.shape[2]):
            return Conv(self.features, upsample=True, dtype=self.dtype, name="conv")(x)
        return Conv(self.features, dtype=self.dtype, name="conv")(upsample_nearest(x, size))


class Downsample(nn.Module):
    """A 3x3 convolution with stride 2. `padding` is (before, after): (1, 1) in UNets, (0, 1) in autoencoders."""

    features: int
    padding: tuple[int, int]
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), features] for padding (1, 1); floor for (0, 1)."""
        return Conv(self.features, strides=2, padding=self.padding, dtype=self.dtype, name="conv")(x)


class ResnetBlock(nn.Module):
    """ResNet block: norm, silu, conv twice, plus the input; the time embedding is added in between (Ho et al. 2020)."""

    features: int
    groups: int
    eps: float
    dropout: float = 0.0
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array, temb: Array | None = None, deterministic: bool = True) -> Array:
        """x [B, H, W, C], temb [B, E] or None -> [B, H, W, features]."""
        h = nn.silu(GroupNorm(self.groups, self.eps, dtype=self.dtype, name="norm1")(x))
        h = Conv(self.features, dtype=self.dtype, name="conv1")(h)
        if temb is not None:
            h = h + Dense(self.features, dtype=self.dtype, name="time_emb_proj")(nn.silu(temb))[:, None, None, :]
        h = nn.silu(GroupNorm(self.groups, self.eps, dtype=self.dtype, name="norm2")(h))
        h = nn.Dropout(self.dropout)(h, deterministic=deterministic)
        h = Conv(self.features, zero=True, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, dtype=self.dtype, name="conv_shortcut")(x)
        return x + h


def timestep_embedding(t: Array, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0.0) -> Array:
    """Sinusoids of t (Vaswani et al. 2017, section 3.5): sin and cos of t * 10000^(-i / (dim/2 - freq_shift)).

    t [B], integer or float -> [B, dim] float32, dim even. flip_sin_to_cos: cosines first, as in Stable Diffusion.
    freq_shift: 1 makes the lowest frequency 1/10000, 0 a little more.
    """
    half = dim // 2
    frequency = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angle = t.astype(jnp.float32)[:, None] * frequency[None, :]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([cos, sin] if flip_sin_to_cos else [sin, cos], axis=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers with a silu between: sinusoids [B, dim] -> time embedding [B, features]."""

    features: int
    dtype: Dtype = None

    @nn.compact
    def __call__(self, sinusoids: Array, cond: Array | None = None) -> Array:
        """[B, dim] -> [B, features]; `cond` [B, k] is added to the sinusoids by a projection that starts at 0."""
        if cond is not None:
            width = sinusoids.shape[-1]
            sinusoids = sinusoids + Dense(width, use_bias=False, dtype=self.dtype, zero=True, name="cond_proj")(cond)
        h = Dense(self.features, dtype=self.dtype, name="linear_1")(sinusoids)
        return Dense(self.features, dtype=self.dtype, name="linear_2")(nn.silu(h))
