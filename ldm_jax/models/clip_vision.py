"""CLIP's image encoder (Radford et al. 2021, section 2.4), a vision transformer, and CLIP itself: both encoders.

Topology, names and fields of the image encoder are those of transformers' CLIPVisionModelWithProjection.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from ldm_jax.models.clip import CLIPTextEncoder, Encoder, check_sizes
from ldm_jax.models.layers import Dtype, layer_norm, linear, torch_init
from ldm_jax.models.primitives import matmul

INITIAL_TEMPERATURE = 0.07  # Radford et al. 2021, section 2.5


class ImageFeatures(NamedTuple):
    """What an image encoder says of pictures; N is the number of patches.

    Fields:
      last: [B, 1 + N, D], the last layer's output, not normalised: the class token, then the patches row by row.
      pooled: [B, projection_dim] float32, the class token normalised and projected.
    """

    last: Array
    pooled: Array


class PatchEmbedding(nn.Module):
    """A linear map of each patch; `kernel` [P, P, C, features] is that of a convolution with stride P, without bias."""

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


class CLIPImageEncoder(nn.Module):
    """Pictures to features: `apply({"params": p}, x)`. Fields and their defaults are those of CLIPVisionConfig.

    Pixels are taken as they come. Encoders trained here see x in [-1, 1]; the published ones were trained on
    (u - mean) / std with u in [0, 1] and the mean and std of each colour in their preprocessor_config.json, so for
    these the caller gives them (x / 2 + 1 / 2 - mean) / std.

    Fields:
      image_size: height and width of the pictures, a multiple of `patch_size`.
      patch_size: height and width of a patch.
      num_channels: of the pictures.
      hidden_size: the width D.
      intermediate_size: width between the two linear maps of a layer.
      num_hidden_layers, num_attention_heads: the heads must divide `hidden_size`.
      hidden_act: "gelu" (exact) or "quick_gelu".
      layer_norm_eps: of all layer norms.
      projection_dim: width of the pooled features.
      dtype: type of the computation; None means that of the parameters.
    """

    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    dtype: Dtype = None

    def setup(self):
        """Checks the fields."""
        self.check_fields()

    def check_fields(self) -> None:
        """Raises ValueError for fields of which no network can be made."""
        check_sizes(self, "image_size", "patch_size", "num_channels", "projection_dim")
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size must divide image_size; got {self.patch_size} for {self.image_size}")

    @nn.compact
    def __call__(self, x: Array) -> ImageFeatures:
        """Features of whole pictures.

        Args:
          x: [B, image_size, image_size, num_channels] float32.

        Returns:
          ImageFeatures.

        Raises:
          ValueError: for a shape or type that does not fit.
        """
        expected = (self.image_size, self.image_size, self.num_channels)
        if x.ndim != 4 or x.shape[1:] != expected or not jnp.issubdtype(x.dtype, jnp.floating):
            wanted = ", ".join(map(str, expected))
            raise ValueError(f"x must be floats [B, {wanted}]; got {x.dtype} {list(x.shape)}")
        h = ImageEmbeddings(self.hidden_size, self.patch_size, self.dtype, name="embeddings")(x)
        h = layer_norm(self.layer_norm_eps, dtype=self.dtype, name="pre_layrnorm")(h)  # the name in every file
        _, last = Encoder(
            self.num_hidden_layers,
            self.num_attention_heads,
            self.intermediate_size,
            self.hidden_act,
            self.layer_norm_eps,
            causal=False,
            dtype=self.dtype,
            name="encoder",
        )(h)
        pooled = layer_norm(self.layer_norm_eps, dtype=self.dtype, name="post_layernorm")(last[:, 0])
        pooled = linear(self.projection_dim, use_bias=False, dtype=self.dtype, name="visual_projection")(pooled)
        return ImageFeatures(last, pooled.astype(jnp.float32))


def unit(x: Array) -> Array:
    """x / |x| along the last axis; 0 stays 0, with a finite gradient."""
    return x * lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


class CLIP(nn.Module):
    """Two encoders to one space, in which a text lies near the pictures that it is true of (Radford et al. 2021).

    The parameters are {"text", "image", "logit_scale"}, the last the logarithm of what cosines are multiplied by.
    """

    text: CLIPTextEncoder
    image: CLIPImageEncoder

    def setup(self):
        """Checks the fields."""
        self.check_fields()
        start = nn.initializers.constant(-math.log(INITIAL_TEMPERATURE))
        self.logit_scale = self.param("logit_scale", start, ())

    def check_fields(self) -> None:
        """Raises ValueError for encoders that do not fit together, or of which no network can be made."""
        self.text.check_fields()
        self.image.check_fields()
        if self.text.projection_dim != self.image.projection_dim:
            given = f"{self.text.projection_dim} and {self.image.projection_dim}"
            raise ValueError(f"projection_dim of the text and the image encoder must be the same; got {given}")

    def __call__(self, ids: Array, x: Array) -> tuple[Array, Array, Array]:
        """Token ids [B, L] and pictures [B', H, W, C] -> their embeddings, and the scale [] of their products."""
        return self.embed_text(ids), self.embed_image(x), jnp.exp(self.logit_scale)

    def embed_text(self, ids: Array) -> Array:
        """Token ids [B, L] -> [B, projection_dim] float32 of length 1."""
        return unit(self.text(ids).pooled)

    def embed_image(self, x: Array) -> Array:
        """x [B, H, W, C] -> [B, projection_dim] float32 of length 1."""
        return unit(self.image(x).pooled)
