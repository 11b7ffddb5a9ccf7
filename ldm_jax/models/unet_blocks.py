"""What every UNet is made of: three kinds of blocks for any attention, and the way down, through and back up.

The layers come as factories that lack only a name. `attention` None stands for diffusers' DownBlock2D, UpBlock2D and
UNetMidBlock2D, a transformer for their CrossAttn relatives, plain self-attention for AttnDownBlock2D and AttnUpBlock2D.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ldm_jax.models.attention import SelfAttention2D
from ldm_jax.models.layers import Downsample, Dtype, ResnetBlock, Upsample

EPS = 1e-5

Layer = Callable[..., nn.Module]


def self_attention(groups: int, heads: int, dtype: Dtype) -> Layer:
    """Self-attention as the blocks call it: with a context, of which it takes no notice."""
    return lambda name: lambda h, context: SelfAttention2D(groups, EPS, heads, dtype=dtype, name=name)(h)


def check_block_types(field: str, types: Sequence[str], known: Collection[str], levels: int) -> None:
    """Raises ValueError unless `types`, the value of `field`, has one known name for each level."""
    if len(types) != levels or levels == 0:
        raise ValueError(f"{field} must have one entry for each of the {levels} block_out_channels; got {len(types)}")
    for name in types:
        if name not in known:
            raise ValueError(f"unknown block {name!r} in {field}; known are {list(known)}")


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


class Level(NamedTuple):
    """The layers of one resolution."""

    resnet: Layer
    down_attention: Layer | None
    up_attention: Layer | None
    downsample: Layer
    upsample: Layer


def make_level(
    width: int,
    groups: int,
    *,
    down_attention: Layer | None,
    up_attention: Layer | None,
    dropout: float,
    dtype: Dtype,
) -> Level:
    """A level whose ResNet blocks and resampling are `width` channels wide; the attention is given."""
    return Level(
        resnet=partial(ResnetBlock, width, groups, EPS, dropout=dropout, dtype=dtype),
        down_attention=down_attention,
        up_attention=up_attention,
        downsample=partial(Downsample, width, (1, 1), dtype=dtype),
        upsample=partial(Upsample, width, dtype=dtype),
    )


def down_and_up(
    h: Array,
    temb: Array,
    context: Array | None,
    levels: Sequence[Level],
    middle: Layer | None,
    layers: int,
    deterministic: bool,
) -> Array:
    """From the first convolution's output [B, H, W, C] down all levels, through the middle and up: [B, H, W, C].

    Called within a compact method: the blocks become the calling module's own.

    Args:
      h: [B, H, W, C] with C the width of the first level.
      temb: [B, E].
      context: what the attention looks at, if it does.
      levels: from the finest to the coarsest; each but the last halves the size.
      middle: a `MidBlock`, or None for none.
      layers: ResNet blocks per level on the way down; one more on the way up.
      deterministic: False switches dropout on.
    """
    skips, last = [h], len(levels) - 1
    for i, level in enumerate(levels):
        downsample = level.downsample if i < last else None
        block = DownBlock(level.resnet, level.down_attention, layers, downsample, name=f"down_blocks_{i}")
        h, new_skips = block(h, temb, context, deterministic)
        skips += new_skips

    if middle is not None:
        h = middle(name="mid_block")(h, temb, context, deterministic)

    for i, level in enumerate(reversed(levels)):
        upsample = level.upsample if i < last else None
        taken = [skips.pop() for _ in range(layers + 1)]
        size = skips[-1].shape[1:3] if skips else None
        block = UpBlock(level.resnet, level.up_attention, upsample, name=f"up_blocks_{i}")
        h = block(h, taken, temb, context, size, deterministic)
    return h
