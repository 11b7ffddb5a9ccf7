"""The denoising UNet without a context: self-attention instead of transformers (Ho et al. 2020, appendix B).

Topology, names and fields are those of diffusers' UNet2DModel, the format of the unconditional models of Rombach et al.
2022.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ldm_jax.models.blocks import Layer, no_attention, self_attention
from ldm_jax.models.unet import EPS, BaseUNet

# Block type in diffusers' configs -> whether self-attention follows each of its ResNet blocks.
DOWN_BLOCKS = {"DownBlock2D": False, "AttnDownBlock2D": True}
UP_BLOCKS = {"UpBlock2D": False, "AttnUpBlock2D": True}
MID_BLOCKS = {"UNetMidBlock2D": True, None: False}


class UNet2D(BaseUNet):
    """A UNet that predicts eps, v or z0 from noised latents alone: `apply({"params": p}, z_t, t)`.

    Block types are "DownBlock2D" or "AttnDownBlock2D", "UpBlock2D" or "AttnUpBlock2D", and "UNetMidBlock2D" or None.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: Sequence[int] = (224, 448, 672, 896)
    down_block_types: Sequence[str] = ("DownBlock2D",) + ("AttnDownBlock2D",) * 3
    up_block_types: Sequence[str] = ("AttnUpBlock2D",) * 3 + ("UpBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2D"
    add_attention: bool = True  # of the middle block
    attention_head_dim: int | None = 8  # the SIZE of a head, which must divide the width; None for one head

    down_blocks: ClassVar[Mapping[str, bool]] = DOWN_BLOCKS
    up_blocks: ClassVar[Mapping[str, bool]] = UP_BLOCKS
    mid_blocks: ClassVar[Mapping[str | None, bool]] = MID_BLOCKS

    def _check_attention(self) -> None:
        size = self.attention_head_dim
        for i, width in enumerate(self.block_out_channels):
            if self.attends(i) and size is not None and (size < 1 or width % size):
                raise ValueError(f"attention_head_dim must divide the width of a level; level {i}: {size} for {width}")

    def _mid_attends(self) -> bool:
        return self.mid_block_type is not None and self.add_attention

    def _attention(self, i: int) -> Layer:
        width = self.block_out_channels[i]
        return self_attention(self.norm_num_groups, EPS, width // (self.attention_head_dim or width), self.dtype)

    def _mid_attention(self) -> Layer:
        return self._attention(len(self.block_out_channels) - 1) if self.add_attention else no_attention

    @nn.compact
    def __call__(self, z_t: Array, t: Array, context: None = None, *, deterministic: bool = True) -> Array:
        """z_t [B, h, w, in_channels] at t, integer or float, [B] or a scalar -> [B, h, w, out_channels] float32.

        The context is None, and is there for `UNet`'s signature. ValueError for a wrong shape, or a context.
        """
        self._check_z(z_t)
        if context is not None:
            raise ValueError(f"this UNet has no cross-attention: the context must be None; got {context.shape}")
        temb = self._time_embedding(jnp.broadcast_to(t, z_t.shape[:1]))
        return self._trunk(z_t, temb, None, deterministic)
