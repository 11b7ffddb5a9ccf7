"""The down, middle and up blocks of UNets and autoencoders, for any attention.

Layers come as factories that lack only a name. `attention` None stands for diffusers' DownBlock2D and UpBlock2D, a
transformer for CrossAttnDownBlock2D and CrossAttnUpBlock2D, self-attention for AttnDownBlock2D and AttnUpBlock2D.
"""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ldm_jax.models.attention import SelfAttention2D
from ldm_jax.models.primitives import Dtype

Layer = Callable[..., nn.Module]


def self_attention(groups: int, eps: float, heads: int, dtype: Dtype) -> Layer:
    """The factory of a self-attention that is called, like a transformer, with a context, and ignores it."""
    return lambda name: lambda h, context: SelfAttention2D(groups, eps, heads, dtype=dtype, name=name)(h)


def no_attention(name: str) -> Callable[[Array, None], Array]:
    """The identity as `attention`: for a `MidBlock` without attention but with a second ResNet block."""
    return lambda h, context: h


class DownBlock(nn.Module):
    """The down block: ResNet blocks, each followed by `attention` if there is one, then a convolution of stride 2."""

    resnet: Layer
    attention: Layer | None
    layers: int
    downsample: Layer | None

    @nn.compact
    def __call__(
        self, h: Array, temb: Array | None = None, context: Array | None = None, deterministic: bool = True
    ) -> tuple[Array, list[Array]]:
        """[B, H, W, C] -> [B, H/2 rounded, W/2 rounded, features], and the output of each layer: the skips."""
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
    """The middle block: a ResNet block and, if there is `attention`, that and a second ResNet block."""

    resnet: Layer
    attention: Layer | None

    @nn.compact
    def __call__(
        self, h: Array, temb: Array | None = None, context: Array | None = None, deterministic: bool = True
    ) -> Array:
        """[B, H, W, C] -> [B, H, W, C]."""
        h = self.resnet(name="resnets_0")(h, temb, deterministic)
        if self.attention is not None:
            h = self.attention(name="attentions_0")(h, context)
            h = self.resnet(name="resnets_1")(h, temb, deterministic)
        return h


class UpBlock(nn.Module):
    """The up block: ResNet blocks of the input and a skip, each followed by `attention` if there is one; upsampling."""

    resnet: Layer
    attention: Layer | None
    layers: int
    upsample: Layer | None

    @nn.compact
    def __call__(
        self,
        h: Array,
        temb: Array | None = None,
        context: Array | None = None,
        deterministic: bool = True,
        skips: list[Array] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Array:
        """[B, H, W, C], skips [B, H, W, C'] of the layers -> [B, *size, features], size 2H x 2W if None."""
        for i in range(self.layers):
            h = h if skips is None else jnp.concatenate([h, skips[i]], axis=-1)
            h = self.resnet(name=f"resnets_{i}")(h, temb, deterministic)
            if self.attention is not None:
                h = self.attention(name=f"attentions_{i}")(h, context)
        return h if self.upsample is None else self.upsample(name="upsamplers_0")(h, size)
