"""The denoising UNet with cross-attention to a context (Rombach et al. 2022, section 3.3).

Topology, names and (but for `attention_heads`) fields are those of diffusers' UNet2DConditionModel, so that one class
is a two-million-parameter Fashion-MNIST model and Stable Diffusion alike.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ldm_jax.models.attention import Transformer2D
from ldm_jax.models.blocks import DownBlock, Layer, MidBlock, UpBlock
from ldm_jax.models.layers import Downsample, ResnetBlock, TimestepEmbedding, Upsample, check_groups, timestep_embedding
from ldm_jax.models.primitives import Conv, Dtype, GroupNorm

# Block type in diffusers' configs -> whether a transformer follows each of its ResNet blocks.
DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
MID_BLOCKS = {"UNetMidBlock2D": False, "UNetMidBlock2DCrossAttn": True, None: False}

EPS = 1e-5  # of the norms


class Added(NamedTuple):
    """The conditioning of SDXL that is embedded and added to the time embedding (Podell et al. 2023, section 2.2)."""

    pooled: Array  # [B, P] the whole text as one vector
    time_ids: Array  # [B, N] numbers embedded like times: original size, crop and target size of the image, N = 6


def guidance_embedding(scale: Array, dim: int) -> Array:
    """The embedding of guidance scales [B] -> [B, dim], as in latent consistency models (Luo 2023, section 4.2).

    Scales are those of Rombach 2022, where 1 is no guidance; the paper's omega is scale - 1, and its sinusoids those of
    1000 omega.
    """
    return timestep_embedding(1000.0 * (scale - 1), dim, flip_sin_to_cos=False, freq_shift=1.0)


FLOW_TIME = 4.0  # MeanFlow's network counts times in [0, 1] so: sinusoids of faster times make du/dt large


def interval_embedding(interval: Array, dim: int) -> Array:
    """The embedding of intervals t - r [B] in [0, 1] of MeanFlow -> [B, dim] (Geng 2025, section 4.3)."""
    return timestep_embedding(FLOW_TIME * interval, dim)


class BaseUNet(nn.Module):
    """A UNet but for its attention and time embedding: fields, their checks, blocks and skips.

    Dropout masks depend on the shape of the whole batch: only with 0 are results independent of the number of devices.
    """

    in_channels: int = 4  # of z_t
    out_channels: int = 4  # of the prediction
    block_out_channels: Sequence[int] = (320, 640, 1280, 1280)  # width of each level; all but the last halve the size
    down_block_types: Sequence[str] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: Sequence[str] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3  # from the last level to the first
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"  # None for no middle block
    layers_per_block: int = 2  # ResNet blocks of a down block; an up block has one more
    norm_num_groups: int = 32  # must divide every width
    flip_sin_to_cos: bool = True  # see `timestep_embedding`, as for freq_shift
    freq_shift: float = 0.0
    dropout: float = 0.0  # in ResNet blocks; needs `deterministic=False` and `rngs={"dropout": key}`
    dtype: Dtype = None  # of the computation; None means that of the input
    remat: bool = False  # recompute the activations of each block for the gradient (Chen 2016) instead of storing them

    down_blocks: ClassVar[Mapping[str, bool]] = DOWN_BLOCKS
    up_blocks: ClassVar[Mapping[str, bool]] = UP_BLOCKS
    mid_blocks: ClassVar[Mapping[str | None, bool]] = MID_BLOCKS

    def setup(self):
        """Checks the fields."""
        widths, n = self.block_out_channels, len(self.block_out_channels)
        for field, known in (("down_block_types", self.down_blocks), ("up_block_types", self.up_blocks)):
            types = getattr(self, field)
            if len(types) != n or n == 0:
                raise ValueError(f"{field} must have one entry for each of the {n} levels; got {len(types)}")
            for name in types:
                if name not in known:
                    raise ValueError(f"unknown block {name!r} in {field}; known are {list(known)}")
        if self.mid_block_type not in self.mid_blocks:
            raise ValueError(f"unknown mid_block_type {self.mid_block_type!r}; known are {list(self.mid_blocks)}")
        if widths[0] % 2:
            raise ValueError(f"block_out_channels[0] must be even for the time embedding; got {widths[0]}")
        check_groups(widths, self.norm_num_groups)
        self._check_attention()

    def attends(self, i: int) -> bool:
        """Whether any block of level i has attention; the middle block belongs to the last level."""
        last = len(self.block_out_channels) - 1
        down, up = self.down_blocks[self.down_block_types[i]], self.up_blocks[self.up_block_types[last - i]]
        return down or up or (i == last and self._mid_attends())

    def _mid_attends(self) -> bool:
        return self.mid_blocks[self.mid_block_type]

    def _trunk(self, z_t: Array, temb: Array, context: Array | None, deterministic: bool) -> Array:
        """From z_t to the prediction, float32. Called in a compact method, so that its layers are the UNet's."""
        widths, last = self.block_out_channels, len(self.block_out_channels) - 1
        resnets = [
            partial(ResnetBlock, width, self.norm_num_groups, EPS, dropout=self.dropout, dtype=self.dtype)
            for width in widths
        ]
        remat = nn.remat if self.remat else lambda block, static_argnums: block  # 4: deterministic, 6: size
        h = Conv(widths[0], dtype=self.dtype, name="conv_in")(z_t)
        skips = [h]
        for i, type_ in enumerate(self.down_block_types):
            attention = self._attention(i) if self.down_blocks[type_] else None
            downsample = partial(Downsample, widths[i], (1, 1), dtype=self.dtype) if i < last else None
            down_block = remat(DownBlock, static_argnums=(4,))
            block = down_block(resnets[i], attention, self.layers_per_block, downsample, name=f"down_blocks_{i}")
            h, new_skips = block(h, temb, context, deterministic)
            skips += new_skips

        if self.mid_block_type is not None:
            block = remat(MidBlock, static_argnums=(4,))(resnets[last], self._mid_attention(), name="mid_block")
            h = block(h, temb, context, deterministic)

        for k, type_ in enumerate(self.up_block_types):
            i, layers = last - k, self.layers_per_block + 1
            attention = self._attention(i) if self.up_blocks[type_] else None
            upsample = partial(Upsample, widths[i], dtype=self.dtype) if i > 0 else None
            used = [skips.pop() for _ in range(layers)]
            size = skips[-1].shape[1:3] if skips else None  # of the next block's skips
            up_block = remat(UpBlock, static_argnums=(4, 6))
            block = up_block(resnets[i], attention, layers, upsample, name=f"up_blocks_{k}")
            h = block(h, temb, context, deterministic, used, size)

        h = nn.silu(GroupNorm(self.norm_num_groups, EPS, dtype=self.dtype, name="conv_norm_out")(h))
        return Conv(self.out_channels, zero=True, dtype=self.dtype, name="conv_out")(h).astype(jnp.float32)

    def _check_z(self, z_t: Array) -> None:
        if z_t.ndim != 4 or z_t.shape[-1] != self.in_channels:
            raise ValueError(f"z_t must be [B, h, w, {self.in_channels}]; got {z_t.shape}")

    def _time_embedding(self, t: Array, cond: Array | None = None) -> Array:
        """t [B], and a condition [B, k] that is added to its sinusoids -> [B, 4 block_out_channels[0]]."""
        width = self.block_out_channels[0]
        return TimestepEmbedding(4 * width, dtype=self.dtype, name="time_embedding")(self._sinusoids(t, width), cond)

    def _sinusoids(self, t: Array, dim: int) -> Array:
        return timestep_embedding(t, dim, flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift)


class UNet(BaseUNet):
    """A UNet that predicts eps, v or z0 from noised latents: `apply({"params": p}, z_t, t, context)`.

    Block types are "DownBlock2D" or "CrossAttnDownBlock2D", "UpBlock2D" or "CrossAttnUpBlock2D", and
    "UNetMidBlock2DCrossAttn", "UNetMidBlock2D" or None.
    """

    attention_heads: int | Sequence[int] = 8  # their NUMBER, for all levels or each; diffusers: `attention_head_dim`
    transformer_layers_per_block: int | Sequence[int] = 1  # blocks of each transformer, for all levels or each
    cross_attention_dim: int = 768  # D of the context
    only_cross_attention: bool | Sequence[bool] = False  # instead of self-attention, for all levels or each
    use_linear_projection: bool = False  # the transformers' projections are linear maps, not 1x1 convolutions
    num_class_embeds: int | None = None  # of `class_labels`, whose embedding is added to the time embedding
    addition_embed_type: str | None = None  # "text_time": an embedding of `added` is added to it too (SDXL)
    addition_time_embed_dim: int | None = None  # then the number of sinusoids of each time id; SDXL 256
    projection_class_embeddings_input_dim: int | None = None  # then P + N times that, SDXL 1280 + 6 * 256 = 2816
    # Of `timestep_cond`, an embedding of the guidance scale (Meng 2023) or of MeanFlow's interval (Geng 2025).
    time_cond_proj_dim: int | None = None

    def _check_attention(self) -> None:
        fields = ("attention_heads", "transformer_layers_per_block", "only_cross_attention")
        heads_per_level, *_ = map(self._per_level, fields)
        for i, (width, heads) in enumerate(zip(self.block_out_channels, heads_per_level)):
            if self.attends(i) and (heads < 1 or width % heads):
                raise ValueError(f"attention_heads of a level must divide its width; level {i} has {heads} for {width}")
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

    def _per_level(self, field: str) -> tuple:
        """The field's value for each level."""
        value, n = getattr(self, field), len(self.block_out_channels)
        values = (value,) * n if isinstance(value, int) else tuple(value)
        if len(values) != n:
            raise ValueError(f"{field} must be one value or one for each of the {n} levels; got {len(values)}")
        return values

    def _attention(self, i: int, only_cross_attention: bool | None = None) -> Layer:
        if only_cross_attention is None:
            only_cross_attention = self._per_level("only_cross_attention")[i]
        return partial(
            Transformer2D,
            self._per_level("attention_heads")[i],
            self._per_level("transformer_layers_per_block")[i],
            self.norm_num_groups,
            self.use_linear_projection,
            only_cross_attention,
            dtype=self.dtype,
        )

    def _mid_attention(self) -> Layer | None:
        last = len(self.block_out_channels) - 1
        return self._attention(last, only_cross_attention=False) if self._mid_attends() else None

    @nn.compact
    def __call__(
        self,
        z_t: Array,
        t: Array,
        context: Array | None = None,
        *,
        class_labels: Array | None = None,
        added: Added | None = None,
        timestep_cond: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """The prediction, [B, h, w, out_channels] float32; ValueError for shapes that don't fit the fields.

        Args:
          z_t: [B, h, w, in_channels]; any h and w, as in diffusers.
          t: integer or float, [B] or a scalar.
          context: [B, L, cross_attention_dim]; may be None if no block attends.
          class_labels: [B] integers if `num_class_embeds` is set, else None.
          added: the pooled text and the time ids if `addition_embed_type` is set, else None.
          timestep_cond: [B, time_cond_proj_dim] if that is set, else None; of `guidance_embedding` or
            `interval_embedding`.
          deterministic: False switches dropout on.
        """
        self._check_inputs(z_t, context, class_labels, added, timestep_cond)
        width = 4 * self.block_out_channels[0]
        temb = self._time_embedding(jnp.broadcast_to(t, z_t.shape[:1]), timestep_cond)
        if class_labels is not None:
            embed = nn.Embed(self.num_class_embeds, width, dtype=self.dtype, name="class_embedding")
            temb = temb + embed(class_labels)
        if added is not None:
            sinusoids = self._sinusoids(added.time_ids.reshape(-1), self.addition_time_embed_dim)
            both = jnp.concatenate([added.pooled, sinusoids.reshape(len(added.pooled), -1)], axis=-1)
            temb = temb + TimestepEmbedding(width, dtype=self.dtype, name="add_embedding")(both)
        return self._trunk(z_t, temb, context, deterministic)

    def _check_inputs(
        self,
        z_t: Array,
        context: Array | None,
        class_labels: Array | None,
        added: Added | None,
        timestep_cond: Array | None,
    ) -> None:
        self._check_z(z_t)
        expected = f"context must be [{z_t.shape[0]}, L, {self.cross_attention_dim}]"
        if context is None:
            if any(self.attends(i) for i in range(len(self.block_out_channels))):
                raise ValueError(f"{expected}; got None, but this UNet has cross-attention")
        elif context.ndim != 3 or context.shape[::2] != (z_t.shape[0], self.cross_attention_dim):
            raise ValueError(f"{expected}; got {context.shape}")
        pairs = (
            ("class_labels", class_labels, "num_class_embeds"),
            ("added", added, "addition_embed_type"),
            ("timestep_cond", timestep_cond, "time_cond_proj_dim"),
        )
        for name, value, field in pairs:
            if (value is None) != (getattr(self, field) is None):
                got = f"{field}={getattr(self, field)!r} and {name} {'None' if value is None else 'not None'}"
                raise ValueError(f"{name} and {field} must both be None or neither; got {got}")
        if added is None:
            return
        batch, shapes = z_t.shape[0], (added.pooled.shape, added.time_ids.shape)
        width, total = self.addition_time_embed_dim, self.projection_class_embeddings_input_dim
        if any(len(s) != 2 or s[0] != batch for s in shapes) or shapes[0][1] + shapes[1][1] * width != total:
            raise ValueError(
                f"added must be pooled [{batch}, P] and time_ids [{batch}, N] with P + {width} N = {total}; "
                f"got {shapes[0]} and {shapes[1]}"
            )
