"""The classifier of noisy latents for classifier guidance: half a UNet (Dhariwal & Nichol 2021, section 4)."""

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ldm_jax.models.blocks import DownBlock, MidBlock, self_attention
from ldm_jax.models.layers import Downsample, ResnetBlock, TimestepEmbedding, check_groups, timestep_embedding
from ldm_jax.models.primitives import Conv, Dense, Dtype, GroupNorm
from ldm_jax.models.unet import EPS


class NoisyClassifier(nn.Module):
    """A classifier p(y | z_t): `apply({"params": p}, z_t, t, alpha)` -> logits. Blocks and names are the UNet's."""

    num_classes: int
    block_out_channels: Sequence[int]  # width of each level; all but the last halve the size
    attention: Sequence[bool]  # for each level, whether self-attention follows each ResNet block; middle: as the last
    layers_per_block: int = 1
    attention_heads: int = 4  # must divide the width of each level with attention
    norm_num_groups: int = 32  # must divide every width
    dtype: Dtype = None  # of the computation; None means that of the input. The logits are float32

    def setup(self):
        """Checks the fields."""
        if self.num_classes < 2:
            raise ValueError(f"a classifier needs data of 2 or more classes; got {self.num_classes}")
        if len(self.attention) != len(self.block_out_channels) or not self.attention:
            raise ValueError(f"attention must have one entry for each of block_out_channels; got {self.attention}")
        check_groups(self.block_out_channels, self.norm_num_groups)

    @nn.compact
    def __call__(self, z_t: Array, t: Array, alpha: Array) -> Array:
        """Logits [B, num_classes] float32 of z_t [B, h, w, c] at t [B], integer or float, with alpha [B] at t.

        At high noise the true logits are prior(y) + alpha f(z_t, y), f of order 1; the network predicts f and the
        prior. Its gradient then fades with alpha, and guidance, which divides by alpha, does not amplify its errors.
        """
        width, last = self.block_out_channels[0], len(self.block_out_channels) - 1
        attention = self_attention(self.norm_num_groups, EPS, self.attention_heads, self.dtype)
        temb = TimestepEmbedding(4 * width, dtype=self.dtype, name="time_embedding")(timestep_embedding(t, width))
        h = Conv(width, dtype=self.dtype, name="conv_in")(z_t)
        for i, (features, attends) in enumerate(zip(self.block_out_channels, self.attention)):
            resnet = partial(ResnetBlock, features, self.norm_num_groups, EPS, dtype=self.dtype)
            downsample = partial(Downsample, features, (1, 1), dtype=self.dtype) if i < last else None
            layers = resnet, attention if attends else None, self.layers_per_block, downsample
            h, _ = DownBlock(*layers, name=f"down_blocks_{i}")(h, temb)
        h = MidBlock(resnet, attention if attends else None, name="mid_block")(h, temb)
        h = nn.silu(GroupNorm(self.norm_num_groups, EPS, dtype=self.dtype, name="norm_out")(h)).mean((1, 2))
        f = Dense(self.num_classes, use_bias=False, dtype=jnp.float32, name="head")(h)
        return alpha[:, None] * f + self.param("prior", nn.initializers.zeros, (self.num_classes,))
