"""The denoising UNet without a context: plain self-attention instead of transformers (Ho et al. 2020, appendix B).

Topology, names and fields are those of diffusers' UNet2DModel, which the unconditional models of Rombach et al. 2022
are kept as. Its blocks and the way through them are those of `unet.py`.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ldm_jax.models.layers import Dtype, TimestepEmbedding, check_groups, conv, group_norm, timestep_embedding
from ldm_jax.models.unet_blocks import (
    EPS,
    Layer,
    Level,
    MidBlock,
    check_block_types,
    down_and_up,
    make_level,
    self_attention,
)

# Name of a block in diffusers' configurations -> whether self-attention follows each of its ResNet blocks.
DOWN_BLOCKS = {"DownBlock2D": False, "AttnDownBlock2D": True}
UP_BLOCKS = {"UpBlock2D": False, "AttnUpBlock2D": True}
MID_BLOCKS = ("UNetMidBlock2D", None)


def _nothing(name: str) -> Callable[[Array, None], Array]:
    """Takes the place of the middle's attention: its second ResNet block is there without it as well."""
    return lambda h, context: h


class UNet2D(nn.Module):
    """Predicts eps, v or z0 from noised latents alone: `apply({"params": p}, z_t, t)`.

    Fields:
      in_channels, out_channels: of z_t and of the prediction.
      block_out_channels: width of each level; each level but the last halves the size.
      down_block_types: for each level "DownBlock2D" or "AttnDownBlock2D".
      up_block_types: the same from the last level to the first, "UpBlock2D" or "AttnUpBlock2D".
      mid_block_type: "UNetMidBlock2D", or None for no middle.
      add_attention: whether the middle has self-attention.
      layers_per_block: ResNet blocks per level on the way down; one more on the way up.
      attention_head_dim: the SIZE of a head, which must divide the width of each level that attends; None for one head.
      norm_num_groups: must divide every width.
      flip_sin_to_cos, freq_shift: see `timestep_embedding`.
      dropout: rate inside the ResNet blocks, as in `UNet`.
      dtype: type of the computation; None means that of the input.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: Sequence[int] = (224, 448, 672, 896)
    down_block_types: Sequence[str] = ("DownBlock2D",) + ("AttnDownBlock2D",) * 3
    up_block_types: Sequence[str] = ("AttnUpBlock2D",) * 3 + ("UpBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2D"
    add_attention: bool = True
    layers_per_block: int = 2
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    dropout: float = 0.0
    dtype: Dtype = None

    def setup(self):
        """Checks the fields."""
        widths = self.block_out_channels
        check_block_types("down_block_types", self.down_block_types, DOWN_BLOCKS, len(widths))
        check_block_types("up_block_types", self.up_block_types, UP_BLOCKS, len(widths))
        if self.mid_block_type not in MID_BLOCKS:
            raise ValueError(f"unknown mid_block_type {self.mid_block_type!r}; known are {list(MID_BLOCKS)}")
        if widths[0] % 2:
            raise ValueError(f"block_out_channels[0] must be even for the time embedding; got {widths[0]}")
        check_groups(widths, self.norm_num_groups)
        size = self.attention_head_dim
        for i, width in enumerate(widths):
            if self._attends(i) and size is not None and (size < 1 or width % size):
                raise ValueError(f"attention_head_dim must divide the width of a level; level {i}: {size} for {width}")

    def _attends(self, i: int) -> bool:
        """Whether any block of level i has self-attention; the middle belongs to the last level."""
        last = len(self.block_out_channels) - 1
        down, up = DOWN_BLOCKS[self.down_block_types[i]], UP_BLOCKS[self.up_block_types[last - i]]
        return down or up or (i == last and self.mid_block_type is not None and self.add_attention)

    def _attention(self, width: int) -> Layer:
        size = width if self.attention_head_dim is None else self.attention_head_dim
        return self_attention(self.norm_num_groups, width // size, self.dtype)

    def _blocks(self) -> tuple[list[Level], Layer | None]:
        """The layers of each level, and the middle's block if there is one."""
        blocks = []
        for width, down, up in zip(self.block_out_channels, self.down_block_types, reversed(self.up_block_types)):
            level = make_level(
                width,
                self.norm_num_groups,
                down_attention=self._attention(width) if DOWN_BLOCKS[down] else None,
                up_attention=self._attention(width) if UP_BLOCKS[up] else None,
                dropout=self.dropout,
                dtype=self.dtype,
            )
            blocks.append(level)
        if self.mid_block_type is None:
            return blocks, None
        attention = self._attention(self.block_out_channels[-1]) if self.add_attention else _nothing
        return blocks, partial(MidBlock, blocks[-1].resnet, attention)

    @nn.compact
    def __call__(self, z_t: Array, t: Array, context: None = None, *, deterministic: bool = True) -> Array:
        """One evaluation of the network.

        Args:
          z_t: [B, h, w, in_channels]; any h and w.
          t: integer or float, [B] or a scalar.
          context: None; it is here so that this network is called like `UNet`.
          deterministic: False switches dropout on.

        Returns:
          [B, h, w, out_channels] float32.

        Raises:
          ValueError: for shapes that don't fit the fields, or a context.
        """
        if z_t.ndim != 4 or z_t.shape[-1] != self.in_channels:
            raise ValueError(f"z_t must be [B, h, w, {self.in_channels}]; got {z_t.shape}")
        if context is not None:
            raise ValueError(f"this UNet has no cross-attention: the context must be None; got {context.shape}")
        width = self.block_out_channels[0]
        t = jnp.broadcast_to(t, z_t.shape[:1])
        sinusoids = timestep_embedding(t, width, flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift)
        temb = TimestepEmbedding(4 * width, dtype=self.dtype, name="time_embedding")(sinusoids)

        levels, middle = self._blocks()
        h = conv(width, dtype=self.dtype, name="conv_in")(z_t)
        h = down_and_up(h, temb, None, levels, middle, self.layers_per_block, deterministic)
        h = nn.silu(group_norm(self.norm_num_groups, EPS, dtype=self.dtype, name="conv_norm_out")(h))
        return conv(self.out_channels, zero=True, dtype=self.dtype, name="conv_out")(h).astype(jnp.float32)
