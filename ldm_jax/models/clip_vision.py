"""CLIP's image encoder, a vision transformer, and CLIP: both encoders (Radford et al. 2021, section 2.4).

Topology, names and fields of the image encoder are those of transformers' CLIPVisionModelWithProjection.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from ldm_jax.models.clip import CLIPEncoder, CLIPTextEncoder
from ldm_jax.models.primitives import Dense, Dtype, LayerNorm, matmul, torch_init

INITIAL_TEMPERATURE = 0.07  # Radford et al. 2021, section 2.5


class ImageFeatures(NamedTuple):
    """Image features; N is the number of patches."""

    last: Array  # [B, 1 + N, D], the last layer's output, not normalised: the class token, then the patches row by row
    pooled: Array  # [B, projection_dim] float32, the class token normalised and projected


class PatchEmbedding(nn.Module):
    """The patch embedding: a linear map, with `kernel` [P, P, C, features] as of a convolution of stride P, no bias."""

    features: int
    patch_size: int
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, H W / P^2, features], row by row."""
        b, height, width, channels = x.shape
        p = self.patch_size
        kernel = self.param("kernel", torch_init, (p, p, channels, self.features))
        x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
        patches = x.reshape(b, height // p, p, width // p, p, channels).swapaxes(2, 3).reshape(b, -1, p * p * channels)
        return matmul(patches, kernel.reshape(-1, self.features))


class ImageEmbeddings(nn.Module):
    """A learned class token and the patches, plus a learned vector for each position."""

    features: int
    patch_size: int
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, 1 + N, features]."""
        init = nn.initializers.normal(0.02)
        patches = PatchEmbedding(self.features, self.patch_size, self.dtype, name="patch_embedding")(x)
        token = self.param("class_embedding", init, (self.features,)).astype(patches.dtype)
        h = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, self.features)), patches], axis=1)
        embed = nn.Embed(h.shape[1], self.features, embedding_init=init, dtype=self.dtype, name="position_embedding")
        return h + embed(jnp.arange(h.shape[1]))


class CLIPImageEncoder(CLIPEncoder):
    """CLIP's image encoder: `apply({"params": p}, x)`. Fields and their defaults are those of CLIPVisionConfig.

    x is in [-1, 1] for encoders trained here. The published ones were trained on (u - mean) / std with u in [0, 1] and
    mean and std of each channel in their preprocessor_config.json: for these, x is (x / 2 + 1 / 2 - mean) / std.
    """

    image_size: int = 224  # height and width, a multiple of patch_size
    patch_size: int = 32
    num_channels: int = 3
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    projection_dim: int = 512

    sizes = (*CLIPEncoder.sizes, "image_size", "patch_size", "num_channels")

    def check_fields(self) -> None:
        """ValueError for fields of which no network can be made."""
        super().check_fields()
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size must divide image_size; got {self.patch_size} for {self.image_size}")

    @nn.compact
    def __call__(self, x: Array) -> ImageFeatures:
        """Features of images x [B, image_size, image_size, num_channels] float32; ValueError for any other x."""
        expected = (self.image_size, self.image_size, self.num_channels)
        if x.ndim != 4 or x.shape[1:] != expected or not jnp.issubdtype(x.dtype, jnp.floating):
            shape = ", ".join(map(str, expected))
            raise ValueError(f"x must be floats [B, {shape}]; got {x.dtype} {list(x.shape)}")
        h = ImageEmbeddings(self.hidden_size, self.patch_size, self.dtype, name="embeddings")(x)
        h = LayerNorm(self.layer_norm_eps, dtype=self.dtype, name="pre_layrnorm")(h)  # spelled so in every file
        _, last = self._transformer(h, causal=False)
        pooled = LayerNorm(self.layer_norm_eps, dtype=self.dtype, name="post_layernorm")(last[:, 0])
        pooled = Dense(self.projection_dim, use_bias=False, dtype=self.dtype, name="visual_projection")(pooled)
        return ImageFeatures(last, pooled.astype(jnp.float32))


def normalize(x: Array) -> Array:
    """x / |x| for x [..., D], along the last axis; 0 stays 0, with a finite gradient."""
    return x * lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


class CLIP(nn.Module):
    """CLIP: text and image encoder into one space, where a text is near the images it describes (Radford et al. 2021).

    The parameters are {"text", "image", "logit_scale"}, the last the logarithm of the factor of the cosines.
    """

    text: CLIPTextEncoder
    image: CLIPImageEncoder

    def setup(self):
        """Checks the fields."""
        self.check_fields()
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(-math.log(INITIAL_TEMPERATURE)), ())

    def check_fields(self) -> None:
        """ValueError for encoders that do not fit together, or of which no network can be made."""
        self.text.check_fields()
        self.image.check_fields()
        dims = self.text.projection_dim, self.image.projection_dim
        if dims[0] != dims[1]:
            raise ValueError(f"projection_dim of text and image encoder must be the same; got {dims[0]} and {dims[1]}")

    def __call__(self, ids: Array, x: Array) -> tuple[Array, Array, Array]:
        """Token ids [B, L] and images [B', H, W, C] -> their embeddings, and the scale [] of their products."""
        return self.embed_text(ids), self.embed_image(x), jnp.exp(self.logit_scale)

    def embed_text(self, ids: Array) -> Array:
        """Token ids [B, L] -> [B, projection_dim] float32 of length 1."""
        return normalize(self.text(ids).pooled)

    def embed_image(self, x: Array) -> Array:
        """x [B, H, W, C] -> [B, projection_dim] float32 of length 1."""
        return normalize(self.image(x).pooled)
