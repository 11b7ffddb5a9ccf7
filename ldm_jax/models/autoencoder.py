"""The first stage: convolutional autoencoders between pixels and latents (Rombach et al. 2022, section 3.1).

`AutoencoderKL` regularises its latents by a KL term towards N(0, 1), `VQModel` by a codebook. Topology, names and the
meaning of the fields are those of the diffusers classes of the same names. All norms have eps 1e-6.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ldm_jax.models.attention import SelfAttention2D
from ldm_jax.models.layers import Downsample, Dtype, ResnetBlock, Upsample, check_groups, conv, group_norm
from ldm_jax.models.quantizer import Quantized, VectorQuantizer

EPS = 1e-6


class DownEncoderBlock(nn.Module):
    """ResNet blocks, then (except at the last level) a convolution of stride 2 padded at the bottom and right only."""

    features: int
    layers: int
    groups: int
    downsample: bool
    dtype: Dtype = None

    @nn.compact
    def __call__(self, h: Array) -> Array:
        """[B, H, W, C] -> [B, H/2, W/2, features] or [B, H, W, features]."""
        for i in range(self.layers):
            h = ResnetBlock(self.features, self.groups, EPS, dtype=self.dtype, name=f"resnets_{i}")(h)
        if self.downsample:
            h = Downsample(self.features, (0, 1), dtype=self.dtype, name="downsamplers_0")(h)
        return h


class UpDecoderBlock(nn.Module):
    """ResNet blocks, then (except at the last level) nearest-neighbour upsampling and a convolution."""

    features: int
    layers: int
    groups: int
    upsample: bool
    dtype: Dtype = None

    @nn.compact
    def __call__(self, h: Array) -> Array:
        """[B, h, w, C] -> [B, 2h, 2w, features] or [B, h, w, features]."""
        for i in range(self.layers):
            h = ResnetBlock(self.features, self.groups, EPS, dtype=self.dtype, name=f"resnets_{i}")(h)
        if self.upsample:
            h = Upsample(self.features, dtype=self.dtype, name="upsamplers_0")(h)
        return h


class MidBlock(nn.Module):
    """Two ResNet blocks with, if `attention`, single-head self-attention between them."""

    groups: int
    attention: bool
    dtype: Dtype = None

    @nn.compact
    def __call__(self, h: Array) -> Array:
        """[B, h, w, C] -> [B, h, w, C]."""
        h = ResnetBlock(h.shape[-1], self.groups, EPS, dtype=self.dtype, name="resnets_0")(h)
        if self.attention:
            h = SelfAttention2D(self.groups, EPS, dtype=self.dtype, name="attentions_0")(h)
        return ResnetBlock(h.shape[-1], self.groups, EPS, dtype=self.dtype, name="resnets_1")(h)


class Encoder(nn.Module):
    """Pixels to the features of the bottleneck, halving the size at every level but the last."""

    out_channels: int
    block_out_channels: Sequence[int]
    layers_per_block: int
    norm_num_groups: int
    mid_block_add_attention: bool
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, H/f, W/f, out_channels] with f = 2^(levels - 1)."""
        widths, groups = self.block_out_channels, self.norm_num_groups
        h = conv(widths[0], dtype=self.dtype, name="conv_in")(x)
        for i, width in enumerate(widths):
            down = i < len(widths) - 1
            h = DownEncoderBlock(width, self.layers_per_block, groups, down, self.dtype, name=f"down_blocks_{i}")(h)
        h = MidBlock(groups, self.mid_block_add_attention, self.dtype, name="mid_block")(h)
        h = nn.silu(group_norm(groups, EPS, dtype=self.dtype, name="conv_norm_out")(h))
        return conv(self.out_channels, dtype=self.dtype, name="conv_out")(h)


class Decoder(nn.Module):
    """Latents to pixels; one ResNet block more per level than the encoder.

    In two parts, so that the gradient with respect to the last layer alone can be had cheaply.
    """

    out_channels: int
    block_out_channels: Sequence[int]
    layers_per_block: int
    norm_num_groups: int
    mid_block_add_attention: bool
    dtype: Dtype = None

    def setup(self):
        """Makes the layers."""
        widths, groups = self.block_out_channels[::-1], self.norm_num_groups
        last = len(widths) - 1
        self.conv_in = conv(widths[0], dtype=self.dtype)
        self.mid_block = MidBlock(groups, self.mid_block_add_attention, self.dtype)
        self.up_blocks = [
            UpDecoderBlock(width, self.layers_per_block + 1, groups, i < last, self.dtype)
            for i, width in enumerate(widths)
        ]
        self.conv_norm_out = group_norm(groups, EPS, dtype=self.dtype)
        self.conv_out = conv(self.out_channels, dtype=self.dtype)

    def features(self, z: Array) -> Array:
        """[B, h, w, c] -> [B, f h, f w, block_out_channels[0]]: everything before the last convolution."""
        h = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            h = block(h)
        return nn.silu(self.conv_norm_out(h))

    def to_pixels(self, h: Array) -> Array:
        """The last convolution, [B, H, W, block_out_channels[0]] -> [B, H, W, out_channels] float32."""
        return self.conv_out(h).astype(jnp.float32)


class _Autoencoder(nn.Module):
    """What both kinds share: the fields, their checks, and decoding in two parts."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: Sequence[int] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    dtype: Dtype = None

    @property
    def downsampling(self) -> int:
        """f = 2^(levels - 1), the ratio of image size to latent size."""
        return 2 ** (len(self.block_out_channels) - 1)

    def _build(self, encoder_channels: int) -> None:
        """Checks the fields, then makes the encoder and the decoder."""
        if not self.block_out_channels:
            raise ValueError("block_out_channels is empty; give one width per level, for instance (32, 64)")
        check_groups(self.block_out_channels, self.norm_num_groups)
        shape = (self.block_out_channels, self.layers_per_block, self.norm_num_groups, self.mid_block_add_attention)
        self.encoder = Encoder(encoder_channels, *shape, dtype=self.dtype)
        self.decoder = Decoder(self.out_channels, *shape, dtype=self.dtype)

    def _encode(self, x: Array) -> Array:
        if x.shape[-1] != self.in_channels:
            raise ValueError(f"the autoencoder takes {self.in_channels} channels on the last axis; got {x.shape}")
        if x.shape[1] % self.downsampling or x.shape[2] % self.downsampling:
            raise ValueError(
                f"the autoencoder takes heights and widths that divide by {self.downsampling}; got {x.shape}"
            )
        return self.encoder(x)

    def to_pixels(self, h: Array) -> Array:
        """The decoder's last convolution on what `decode_features` returned: -> pixels [B, H, W, C] float32.

        Needs no other parameters than `{"decoder": {"conv_out": ...}}`.
        """
        return self.decoder.to_pixels(h)


class AutoencoderKL(_Autoencoder):
    """An autoencoder whose encoder gives a diagonal Gaussian over latents (Kingma & Welling 2014; Rombach et al. 2022).

    Calls go through `apply(..., method="encode")` and so on. Latents here are raw, that is before shift and scale.
    """

    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    def setup(self):
        """Checks the fields and makes the layers."""
        self._build(2 * self.latent_channels)
        if self.use_quant_conv:
            self.quant_conv = conv(2 * self.latent_channels, 1, dtype=self.dtype)
        if self.use_post_quant_conv:
            self.post_quant_conv = conv(self.latent_channels, 1, dtype=self.dtype)

    def encode(self, x: Array) -> Array:
        """Pixels [B, H, W, C] in [-1, 1] -> moments [B, H/f, W/f, 2c] float32: mean, then log-variance."""
        moments = self._encode(x)
        return (self.quant_conv(moments) if self.use_quant_conv else moments).astype(jnp.float32)

    def decode_features(self, raw: Array) -> Array:
        """Raw latents [B, h, w, c] -> features [B, H, W, block_out_channels[0]] before the last convolution."""
        return self.decoder.features(self.post_quant_conv(raw) if self.use_post_quant_conv else raw)

    def decode(self, raw: Array) -> Array:
        """Raw latents [B, h, w, c] -> pixels [B, f h, f w, C], about [-1, 1] but not clipped."""
        return self.to_pixels(self.decode_features(raw))

    def __call__(self, x: Array) -> Array:
        """Reconstruction from the mean: what `init` traces, so that it makes all parameters."""
        mean, _ = jnp.split(self.encode(x), 2, axis=-1)
        return self.decode(mean)


class VQModel(_Autoencoder):
    """An autoencoder whose latents are vectors of a codebook (van den Oord et al. 2017; Esser et al. 2021).

    The diffusion model works on the output of `encode`, which is not quantised; `decode` quantises first, so that the
    codebook is part of the decoder (Rombach et al. 2022, section 3.1). `vq_embed_dim` None means `latent_channels`.
    """

    latent_channels: int = 3
    num_vq_embeddings: int = 256
    vq_embed_dim: int | None = None

    def setup(self):
        """Checks the fields and makes the layers."""
        self._build(self.latent_channels)
        width = self.latent_channels if self.vq_embed_dim is None else self.vq_embed_dim
        self.quant_conv = conv(width, 1, dtype=self.dtype)
        self.codebook = VectorQuantizer(self.num_vq_embeddings, width, name="quantize")
        self.post_quant_conv = conv(self.latent_channels, 1, dtype=self.dtype)

    def encode(self, x: Array) -> Array:
        """Pixels [B, H, W, C] in [-1, 1] -> raw latents [B, H/f, W/f, vq_embed_dim] float32, not quantised."""
        return self.quant_conv(self._encode(x)).astype(jnp.float32)

    def quantize(self, raw: Array) -> Quantized:
        """Raw latents [B, h, w, d] -> the nearest codes, the two loss terms and the codes' use."""
        return self.codebook(raw)

    def decode_features(self, z_q: Array) -> Array:
        """Quantised latents [B, h, w, d] -> features [B, H, W, block_out_channels[0]] before the last convolution."""
        return self.decoder.features(self.post_quant_conv(z_q))

    def decode(self, raw: Array) -> Array:
        """Raw latents [B, h, w, d], quantised here -> pixels [B, f h, f w, C], about [-1, 1] but not clipped."""
        return self.to_pixels(self.decode_features(self.quantize(raw).z_q))

    def __call__(self, x: Array) -> Array:
        """Reconstruction: what `init` traces, so that it makes all parameters."""
        return self.decode(self.encode(x))
