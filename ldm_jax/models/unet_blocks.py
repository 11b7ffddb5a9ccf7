"""The three kinds of blocks that the UNet is made of, for any ResNet block, attention and resampling.

The layers come as factories that lack only a name. `attention` None stands for diffusers' DownBlock2D, UpBlock2D and
UNetMidBlock2D, a transformer for their CrossAttn relatives.
"""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

Layer = Callable[..., nn.Module]


class DownBlock(nn.Module):
    """ResNet blocks, each followed by `attention` unless that is None, then a convolution of stride 2."""

    resnet: Layer
    attention: Layer | None
    layers: int
    downsample: Layer | None

    @nn.compact
    def __call__(self, h: Array, temb: Array, context: Array | None, deterministic: bool) -> tuple[Array, list[Array]]:
        """[B, H, W, C] -> [B, ceil(H/2), ceil(W/2), features] and what each layer left for the way up."""
        skips = []
        for i in range(self.layers):
            h = self.resnet(name=f"resnets_{i}")(h, temb, deterministic)
            if self.attention is not None:
                h = self.attention(name=f"attentions_{i}")(h, context)
            skips.append(h)
        if self.downsample is not None:
            h = self.downsample(name="downsamplers_0")(h)
            skips.append(h)
        return h, skips


class MidBlock(nn.Module):
    """A ResNet block and, unless `attention` is None, that and a second ResNet block."""

    resnet: Layer
    attention: Layer | None

    @nn.compact
    def __call__(self, h: Array, temb: Array, context: Array | None, deterministic: bool) -> Array:
        """[B, H, W, C] -> [B, H, W, C]."""
        h = self.resnet(name="resnets_0")(h, temb, deterministic)
        if self.attention is not None:
            h = self.attention(name="attentions_0")(h, context)
            h = self.resnet(name="resnets_1")(h, temb, deterministic)
        return h


class UpBlock(nn.Module):
    """One layer per skip, which it takes beside its input, then upsampling to the size of the next block's skips."""

    resnet: Layer
    attention: Layer | None
    upsample: Layer | None

    @nn.compact
    def __call__(
        self,
        h: Array,
        skips: list[Array],
        temb: Array,
        context: Array | None,
        size: tuple[int, int] | None,
        deterministic: bool,
    ) -> Array:
        """[B, H, W, C] -> [B, *size, features]."""
        for i, skip in enumerate(skips):
            h = self.resnet(name=f"resnets_{i}")(jnp.concatenate([h, skip], axis=-1), temb, deterministic)
            if self.attention is not None:
                h = self.attention(name=f"attentions_{i}")(h, context)
        if self.upsample is not None:
            h = self.upsample(name="upsamplers_0")(h, size)
        return h
