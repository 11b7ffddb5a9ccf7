"""The second stage: the denoising UNet with cross-attention to a context (Rombach et al. 2022, section 3.3).

Topology, names and (with the one exception of `attention_heads`) fields are those of diffusers' UNet2DConditionModel,
so that one class is our two-million-parameter Fashion-MNIST model and Stable Diffusion alike.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ldm_jax.models.attention import Transformer2D
from ldm_jax.models.layers import Dtype, TimestepEmbedding, check_groups, conv, group_norm, timestep_embedding
from ldm_jax.models.unet_blocks import EPS, Layer, Level, MidBlock, check_block_types, down_and_up, make_level

# Name of a block in diffusers' configurations -> whether a transformer follows each of its ResNet blocks.
DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
MID_BLOCKS = {"UNetMidBlock2D": False, "UNetMidBlock2DCrossAttn": True, None: False}


class Added(NamedTuple):
    """What SDXL adds to the time embedding (Podell et al. 2023, section 2.2)."""

    pooled: Array  # [B, P] the whole text as one vector
    time_ids: Array  # [B, N] numbers embedded like times: size, crop and target size of the picture, N = 6


class _Attention(NamedTuple):
    """The fields of one level that its transformers are made of."""

    width: int
    heads: int
    transformer_layers: int
    only_cross_attention: bool


class UNet(nn.Module):
    """Predicts eps, v or z0 from noised latents: `apply({"params": p}, z_t, t, context)`.

    Fields:
      in_channels, out_channels: of z_t and of the prediction.
      block_out_channels: width of each level; each level but the last halves the size.
      down_block_types: for each level "DownBlock2D" or "CrossAttnDownBlock2D".
      up_block_types: the same from the last level to the first, "UpBlock2D" or "CrossAttnUpBlock2D".
      mid_block_type: "UNetMidBlock2DCrossAttn", "UNetMidBlock2D" or None for no middle.
      layers_per_block: ResNet blocks per level on the way down; one more on the way up.
      attention_heads: the NUMBER of heads, one for all or one per level. (diffusers keeps it as `attention_head_dim`.)
      transformer_layers_per_block: transformer blocks per transformer, one for all or one per level.
      cross_attention_dim: D of the context.
      only_cross_attention: whether self-attention gives way to a second cross-attention, one for all or one per level.
      use_linear_projection: the transformers' projections are linear maps rather than 1x1 convolutions.
      norm_num_groups: must divide every width.
      flip_sin_to_cos, freq_shift: see `timestep_embedding`.
      num_class_embeds: if not None, `class_labels` in [0, num_class_embeds) are embedded, added to the time embedding.
      addition_embed_type: "text_time" if an embedding of `added` is added to the time embedding too (SDXL), else None.
      addition_time_embed_dim: then the number of sinusoids for each of the time ids; SDXL 256.
      projection_class_embeddings_input_dim: then P + N times that, SDXL 1280 + 6 * 256 = 2816.
      dropout: rate inside the ResNet blocks; needs `deterministic=False` and `rngs={"dropout": key}`. Its masks depend
        on the shape of the whole batch, so only with 0 are results independent of the number of devices.
      dtype: type of the computation; None means that of the input.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: Sequence[int] = (320, 640, 1280, 1280)
    down_block_types: Sequence[str] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: Sequence[str] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    layers_per_block: int = 2
    attention_heads: int | Sequence[int] = 8
    transformer_layers_per_block: int | Sequence[int] = 1
    cross_attention_dim: int = 768
    only_cross_attention: bool | Sequence[bool] = False
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    num_class_embeds: int | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    dropout: float = 0.0
    dtype: Dtype = None

    def setup(self):
        """Checks the fields."""
        n = len(self.block_out_channels)
        check_block_types("down_block_types", self.down_block_types, DOWN_BLOCKS, n)
        check_block_types("up_block_types", self.up_block_types, UP_BLOCKS, n)
        if self.mid_block_type not in MID_BLOCKS:
            raise ValueError(f"unknown mid_block_type {self.mid_block_type!r}; known are {list(MID_BLOCKS)}")
        if self.block_out_channels[0] % 2:
            raise ValueError(
                f"block_out_channels[0] must be even for the time embedding; got {self.block_out_channels[0]}"
            )
        check_groups(self.block_out_channels, self.norm_num_groups)
        for i, level in enumerate(self._levels()):
            if self._attends(i) and (level.heads < 1 or level.width % level.heads):
                raise ValueError(
                    f"attention_heads of a level must divide its width; level {i} has {level.heads} for {level.width}"
                )
        self._check_addition()

    def _check_addition(self) -> None:
        sizes = (self.addition_time_embed_dim, self.projection_class_embeddings_input_dim)
        if self.addition_embed_type not in (None, "text_time"):
            raise ValueError(f"addition_embed_type must be 'text_time' or None; got {self.addition_embed_type!r}")
        if any((size is None) != (self.addition_embed_type is None) for size in sizes):
            raise ValueError(
                "addition_time_embed_dim and projection_class_embeddings_input_dim go with addition_embed_type; "
                f"got {sizes[0]}, {sizes[1]} and {self.addition_embed_type!r}"
            )
        if sizes[0] is not None and (sizes[0] < 2 or sizes[0] % 2):
            raise ValueError(f"addition_time_embed_dim must be even; got {sizes[0]}")

    def _levels(self) -> list[_Attention]:
        """The levels from the finest to the coarsest, with what was given once for all spread over them."""
        n = len(self.block_out_channels)

        def spread(field):
            value = getattr(self, field)
            values = (value,) * n if isinstance(value, int) else tuple(value)
            if len(values) != n:
                raise ValueError(f"{field} must be one value or one for each of the {n} levels; got {len(values)}")
            return values

        fields = ("attention_heads", "transformer_layers_per_block", "only_cross_attention")
        return [_Attention(*level) for level in zip(self.block_out_channels, *map(spread, fields))]

    def _attends(self, i: int) -> bool:
        """Whether any block of level i has transformers; the middle belongs to the last level."""
        last = len(self.block_out_channels) - 1
        down, up = DOWN_BLOCKS[self.down_block_types[i]], UP_BLOCKS[self.up_block_types[last - i]]
        return down or up or (i == last and MID_BLOCKS[self.mid_block_type])

    def _transformer(self, level: _Attention) -> Layer:
        return partial(
            Transformer2D,
            level.heads,
            level.transformer_layers,
            self.norm_num_groups,
            use_linear_projection=self.use_linear_projection,
            only_cross_attention=level.only_cross_attention,
            dtype=self.dtype,
        )

    def _blocks(self) -> tuple[list[Level], Layer | None]:
        """The layers of each level, and the middle's block if there is one."""
        blocks = []
        for attention, down, up in zip(self._levels(), self.down_block_types, reversed(self.up_block_types)):
            level = make_level(
                attention.width,
                self.norm_num_groups,
                down_attention=self._transformer(attention) if DOWN_BLOCKS[down] else None,
                up_attention=self._transformer(attention) if UP_BLOCKS[up] else None,
                dropout=self.dropout,
                dtype=self.dtype,
            )
            blocks.append(level)
        if self.mid_block_type is None:
            return blocks, None
        coarsest = self._levels()[-1]._replace(only_cross_attention=False)
        attention = self._transformer(coarsest) if MID_BLOCKS[self.mid_block_type] else None
        return blocks, partial(MidBlock, blocks[-1].resnet, attention)

    @nn.compact
    def __call__(
        self,
        z_t: Array,
        t: Array,
        context: Array | None = None,
        *,
        class_labels: Array | None = None,
        added: Added | None = None,
        deterministic: bool = True,
    ) -> Array:
        """One evaluation of the network.

        Args:
          z_t: [B, h, w, in_channels]; any h and w, as in diffusers.
          t: integer or float, [B] or a scalar.
          context: [B, L, cross_attention_dim]; may be None if no block attends.
          class_labels: [B] integers if `num_class_embeds` is set, else None.
          added: the pooled text and the time ids if `addition_embed_type` is set, else None.
          deterministic: False switches dropout on.

        Returns:
          [B, h, w, out_channels] float32.

        Raises:
          ValueError: for shapes that don't fit the fields.
        """
        self._check_inputs(z_t, context, class_labels, added)
        temb = self._time_embedding(jnp.broadcast_to(t, z_t.shape[:1]), class_labels, added)
        levels, middle = self._blocks()
        h = conv(self.block_out_channels[0], dtype=self.dtype, name="conv_in")(z_t)
        h = down_and_up(h, temb, context, levels, middle, self.layers_per_block, deterministic)
        h = nn.silu(group_norm(self.norm_num_groups, EPS, dtype=self.dtype, name="conv_norm_out")(h))
        return conv(self.out_channels, zero=True, dtype=self.dtype, name="conv_out")(h).astype(jnp.float32)

    def _time_embedding(self, t: Array, class_labels: Array | None, added: Added | None) -> Array:
        """t [B] -> [B, 4 block_out_channels[0]]; part of __call__, so its layers are the UNet's own."""
        width = self.block_out_channels[0]
        embed_time = partial(timestep_embedding, flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift)
        temb = TimestepEmbedding(4 * width, dtype=self.dtype, name="time_embedding")(embed_time(t, width))
        if self.num_class_embeds is not None:
            embed = nn.Embed(self.num_class_embeds, 4 * width, dtype=self.dtype, name="class_embedding")
            temb = temb + embed(class_labels)
        if self.addition_embed_type is not None:
            pooled, time_ids = added
            sinusoids = embed_time(time_ids.reshape(-1), self.addition_time_embed_dim).reshape(len(pooled), -1)
            both = jnp.concatenate([pooled, sinusoids], axis=-1)
            temb = temb + TimestepEmbedding(4 * width, dtype=self.dtype, name="add_embedding")(both)
        return temb

    def _check_inputs(self, z_t: Array, context: Array | None, class_labels: Array | None, added: Added | None) -> None:
        if z_t.ndim != 4 or z_t.shape[-1] != self.in_channels:
            raise ValueError(f"z_t must be [B, h, w, {self.in_channels}]; got {z_t.shape}")
        wanted = f"context must be [{z_t.shape[0]}, L, {self.cross_attention_dim}]"
        if context is None:
            if any(self._attends(i) for i in range(len(self.block_out_channels))):
                raise ValueError(f"{wanted}; got None, but this UNet has cross-attention")
        elif context.ndim != 3 or context.shape[::2] != (z_t.shape[0], self.cross_attention_dim):
            raise ValueError(f"{wanted}; got {context.shape}")
        if (class_labels is None) != (self.num_class_embeds is None):
            given = "not given" if class_labels is None else "given"
            raise ValueError(
                f"class_labels go with num_class_embeds; got num_class_embeds={self.num_class_embeds}, labels {given}"
            )
        self._check_added(z_t.shape[0], added)

    def _check_added(self, batch: int, added: Added | None) -> None:
        if (added is None) != (self.addition_embed_type is None):
            given = "not given" if added is None else "given"
            raise ValueError(f"added goes with addition_embed_type; got {self.addition_embed_type!r}, added {given}")
        if added is None:
            return
        pooled, time_ids = added
        width, wanted = self.addition_time_embed_dim, self.projection_class_embeddings_input_dim
        shapes = (pooled.shape, time_ids.shape)
        if any(len(s) != 2 or s[0] != batch for s in shapes) or pooled.shape[1] + time_ids.shape[1] * width != wanted:
            raise ValueError(
                f"added must be pooled [{batch}, P] and time_ids [{batch}, N] with P + {width} N = {wanted}; "
                f"got {shapes[0]} and {shapes[1]}"
            )
