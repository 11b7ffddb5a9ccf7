"""Convolutional autoencoders between pixels and latents (Rombach et al. 2022, section 3.1).

`AutoencoderKL` regularises its latents by a KL term towards N(0, 1), `VQModel` by a codebook. Topology, names and
fields are those of the diffusers classes of the same names.
"""

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ldm_jax.models.blocks import DownBlock, Layer, MidBlock, UpBlock, no_attention, self_attention
from ldm_jax.models.layers import Downsample, ResnetBlock, Upsample, check_groups
from ldm_jax.models.primitives import Conv, Dtype, GroupNorm
from ldm_jax.models.quantizer import Quantized, VectorQuantizer

EPS = 1e-6  # of the norms


class _Coder(nn.Module):
    """The base of encoder and decoder."""

    out_channels: int
    block_out_channels: Sequence[int]
    layers_per_block: int
    norm_num_groups: int
    mid_block_add_attention: bool
    dtype: Dtype = None

    def _resnet(self, width: int) -> Layer:
        return partial(ResnetBlock, width, self.norm_num_groups, EPS, dtype=self.dtype)

    def _mid_attention(self) -> Layer:
        attention = self_attention(self.norm_num_groups, EPS, heads=1, dtype=self.dtype)
        return attention if self.mid_block_add_attention else no_attention


class Encoder(_Coder):
    """The encoder: pixels to the features of the bottleneck, halving the size at every level but the last."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, H/f, W/f, out_channels] with f = 2^(levels - 1)."""
        widths = self.block_out_channels
        h = Conv(widths[0], dtype=self.dtype, name="conv_in")(x)
        for i, width in enumerate(widths):
            downsample = partial(Downsample, width, (0, 1), dtype=self.dtype) if i < len(widths) - 1 else None
            layers = self._resnet(width), None, self.layers_per_block, downsample
            h, _ = DownBlock(*layers, name=f"down_blocks_{i}")(h)
        h = MidBlock(self._resnet(widths[-1]), self._mid_attention(), name="mid_block")(h)
        h = nn.silu(GroupNorm(self.norm_num_groups, EPS, dtype=self.dtype, name="conv_norm_out")(h))
        return Conv(self.out_channels, dtype=self.dtype, name="conv_out")(h)


class Decoder(_Coder):
    """The decoder: latents to pixels, with one ResNet block more per level than the encoder.

    In two parts, for a cheap gradient with respect to the last layer alone.
    """

    def setup(self):
        """Makes the layers."""
        widths, layers = self.block_out_channels[::-1], self.layers_per_block + 1
        upsample = [partial(Upsample, width, dtype=self.dtype) for width in widths[:-1]] + [None]
        self.conv_in = Conv(widths[0], dtype=self.dtype)
        self.mid_block = MidBlock(self._resnet(widths[0]), self._mid_attention())
        self.up_blocks = [UpBlock(self._resnet(width), None, layers, up) for width, up in zip(widths, upsample)]
        self.conv_norm_out = GroupNorm(self.norm_num_groups, EPS, dtype=self.dtype)
        self.conv_out = Conv(self.out_channels, dtype=self.dtype)

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
    """The base of the autoencoders: fields, their checks, encoder and decoder."""

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
            raise ValueError("block_out_channels is empty; it needs one width per level, for instance (32, 64)")
        check_groups(self.block_out_channels, self.norm_num_groups)
        shape = (self.block_out_channels, self.layers_per_block, self.norm_num_groups, self.mid_block_add_attention)
        self.encoder = Encoder(encoder_channels, *shape, dtype=self.dtype)
        self.decoder = Decoder(self.out_channels, *shape, dtype=self.dtype)

    def _encode(self, x: Array) -> Array:
        if x.shape[-1] != self.in_channels:
            raise ValueError(f"the autoencoder takes {self.in_channels} channels on the last axis; got {x.shape}")
        f = self.downsampling
        if x.shape[1] % f or x.shape[2] % f:
            raise ValueError(f"the autoencoder takes heights and widths that divide by {f}; got {x.shape}")
        return self.encoder(x)

    def to_pixels(self, h: Array) -> Array:
        """The decoder's last convolution: features of `decode_features` -> pixels [B, H, W, C] float32.

        Needs no other parameters than `{"decoder": {"conv_out": ...}}`.
        """
        return self.decoder.to_pixels(h)


class AutoencoderKL(_Autoencoder):
    """A variational autoencoder with a diagonal Gaussian over latents (Kingma & Welling 2014; Rombach et al. 2022).

    Calls go through `apply(..., method="encode")` and so on. Latents here are raw: before shift and scale.
    """

    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    def setup(self):
        """Checks the fields and makes the layers."""
        self._build(2 * self.latent_channels)
        if self.use_quant_conv:
            self.quant_conv = Conv(2 * self.latent_channels, 1, dtype=self.dtype)
        if self.use_post_quant_conv:
            self.post_quant_conv = Conv(self.latent_channels, 1, dtype=self.dtype)

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
        """The reconstruction from the mean; `init` traces it, to make all parameters."""
        mean, _ = jnp.split(self.encode(x), 2, axis=-1)
        return self.decode(mean)


class VQModel(_Autoencoder):
    """A vector-quantised autoencoder, with latents from a codebook (van den Oord et al. 2017; Esser et al. 2021).

    `encode` does not quantise and `decode` does, so that the diffusion model works on unquantised latents and the
    codebook is part of the decoder (Rombach et al. 2022, section 3.1). `vq_embed_dim` None means `latent_channels`.
    """

    latent_channels: int = 3
    num_vq_embeddings: int = 256
    vq_embed_dim: int | None = None

    def setup(self):
        """Checks the fields and makes the layers."""
        self._build(self.latent_channels)
        width = self.latent_channels if self.vq_embed_dim is None else self.vq_embed_dim
        self.quant_conv = Conv(width, 1, dtype=self.dtype)
        self.codebook = VectorQuantizer(self.num_vq_embeddings, width, name="quantize")
        self.post_quant_conv = Conv(self.latent_channels, 1, dtype=self.dtype)

    def encode(self, x: Array) -> Array:
        """Pixels [B, H, W, C] in [-1, 1] -> raw latents [B, H/f, W/f, vq_embed_dim] float32, not quantised."""
        return self.quant_conv(self._encode(x)).astype(jnp.float32)

    def quantize(self, raw: Array) -> Quantized:
        """Raw latents [B, h, w, d] -> the nearest codes, the two loss terms and the codes' usage."""
        return self.codebook(raw)

    def decode_features(self, z_q: Array) -> Array:
        """Quantised latents [B, h, w, d] -> features [B, H, W, block_out_channels[0]] before the last convolution."""
        return self.decoder.features(self.post_quant_conv(z_q))

    def decode(self, raw: Array) -> Array:
        """Raw latents [B, h, w, d], quantised here -> pixels [B, f h, f w, C], about [-1, 1] but not clipped."""
        return self.to_pixels(self.decode_features(self.quantize(raw).z_q))

    def __call__(self, x: Array) -> Array:
        """The reconstruction; `init` traces it, to make all parameters."""
        return self.decode(self.encode(x))
