"""CLIP's text encoder (Radford et al. 2021, section 2.4): from token ids to the context of Stable Diffusion.

Topology, names and fields are those of transformers' CLIPTextModel and, with a projection, CLIPTextModelWithProjection.
The image encoder, `clip_vision`, is made of the same layers.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ldm_jax.models.attention import attend
from ldm_jax.models.layers import Dtype, layer_norm, linear

# An `eos_token_id` that is wrong in most published configurations: transformers takes it as "the highest id ends the
# text", which is true of CLIP's own vocabulary.
LEGACY_EOS = 2


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x), the quick approximation of Hendrycks & Gimpel 2016, section 2."""
    return x * nn.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": partial(nn.gelu, approximate=False), "quick_gelu": quick_gelu}


class TextFeatures(NamedTuple):
    """What a text encoder says of token ids [B, L]; Stable Diffusion 1 and 2 attend to `last`, SDXL takes the others.

    Fields:
      last: [B, L, D], the last layer's output after the final layer norm.
      penultimate: [B, L, D], the output of the layer before the last; not normalised.
      pooled: [B, D] or [B, projection_dim] float32, `last` where the text ends, projected if there is a projection.
    """

    last: Array
    penultimate: Array
    pooled: Array


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases; `causal` lets a position see itself and those before it only."""

    heads: int
    causal: bool
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, L, D] -> [B, L, D]."""
        b, length, width = x.shape

        def project(name):
            return linear(width, dtype=self.dtype, name=name)(x).reshape(b, length, self.heads, width // self.heads)

        h = attend(project("q_proj"), project("k_proj"), project("v_proj"), causal=self.causal)
        return linear(width, dtype=self.dtype, name="out_proj")(h.reshape(b, length, width))


class MLP(nn.Module):
    """Two linear maps with an activation between."""

    intermediate_size: int
    hidden_act: str
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, L, D] -> [B, L, D]."""
        h = linear(self.intermediate_size, dtype=self.dtype, name="fc1")(x)
        return linear(x.shape[-1], dtype=self.dtype, name="fc2")(ACTIVATIONS[self.hidden_act](h))


class EncoderLayer(nn.Module):
    """Self-attention and two linear maps, each normalised before and added after."""

    heads: int
    intermediate_size: int
    hidden_act: str
    eps: float
    causal: bool
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, L, D] -> [B, L, D]."""
        h = layer_norm(self.eps, dtype=self.dtype, name="layer_norm1")(x)
        x = x + SelfAttention(self.heads, self.causal, self.dtype, name="self_attn")(h)
        h = layer_norm(self.eps, dtype=self.dtype, name="layer_norm2")(x)
        return x + MLP(self.intermediate_size, self.hidden_act, self.dtype, name="mlp")(h)


class Encoder(nn.Module):
    """The transformer that CLIP's two towers share."""

    layers: int
    heads: int
    intermediate_size: int
    hidden_act: str
    eps: float
    causal: bool
    dtype: Dtype = None

    @nn.compact
    def __call__(self, h: Array) -> tuple[Array, Array]:
        """[B, L, D] -> two of [B, L, D]: what goes into the last layer, and what comes out of it."""
        shape = (self.heads, self.intermediate_size, self.hidden_act, self.eps, self.causal)
        before = h
        for i in range(self.layers):
            before, h = h, EncoderLayer(*shape, dtype=self.dtype, name=f"layers_{i}")(h)
        return before, h


def check_sizes(tower: nn.Module, *more: str) -> None:
    """Raises ValueError unless an `Encoder` can be made of a tower's fields; those in `more` must be 1 or more too."""
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", *more):
        if getattr(tower, name) is not None and getattr(tower, name) < 1:
            raise ValueError(f"{name} must be 1 or more; got {getattr(tower, name)}")
    if tower.hidden_size % tower.num_attention_heads:
        raise ValueError(
            f"num_attention_heads must divide hidden_size; got {tower.num_attention_heads} for {tower.hidden_size}"
        )
    if tower.hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}; got {tower.hidden_act!r}")


class TextEmbeddings(nn.Module):
    """A learned vector for each token plus one for each position."""

    vocab_size: int
    features: int
    positions: int
    dtype: Dtype = None

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        """Token ids [B, L] -> [B, L, features]; an id outside the vocabulary gives NaN."""
        embed = partial(nn.Embed, features=self.features, embedding_init=nn.initializers.normal(0.02), dtype=self.dtype)
        tokens = embed(self.vocab_size, name="token_embedding")(ids)
        return tokens + embed(self.positions, name="position_embedding")(jnp.arange(ids.shape[1]))


def end_of_text(ids: Array, eos_token_id: int) -> Array:
    """Where each text ends: token ids [B, L] -> [B], the first position of `eos_token_id`, or 0 if there is none.

    With the legacy `eos_token_id` 2 it is the first position of the highest id.
    """
    return jnp.argmax(ids if eos_token_id == LEGACY_EOS else ids == eos_token_id, axis=-1)


class CLIPTextEncoder(nn.Module):
    """Token ids to features: `apply({"params": p}, ids)`. Fields and their defaults are those of CLIPTextConfig.

    Fields:
      vocab_size: number of token ids.
      hidden_size: the width D.
      intermediate_size: width between the two linear maps of a layer.
      num_hidden_layers, num_attention_heads: the heads must divide `hidden_size`.
      max_position_embeddings: the longest text, in tokens.
      hidden_act: "gelu" (exact) or "quick_gelu".
      layer_norm_eps: of all layer norms.
      eos_token_id: the token that ends a text, see `end_of_text`.
      projection_dim: width of the pooled features after a linear map without bias; None leaves that out.
      dtype: type of the computation; None means that of the parameters.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    projection_dim: int | None = None
    dtype: Dtype = None

    def setup(self):
        """Checks the fields."""
        self.check_fields()

    def check_fields(self) -> None:
        """Raises ValueError for fields of which no network can be made."""
        check_sizes(self, "vocab_size", "max_position_embeddings", "projection_dim")

    @nn.compact
    def __call__(self, ids: Array) -> TextFeatures:
        """Features of whole texts; what comes after a token changes nothing of what is said at it.

        Args:
          ids: [B, L] integers in [0, vocab_size), L at most `max_position_embeddings`.

        Returns:
          TextFeatures.

        Raises:
          ValueError: for a shape or type that does not fit.
        """
        if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"ids must be integers [B, L]; got {ids.dtype} {ids.shape}")
        if not 1 <= ids.shape[1] <= self.max_position_embeddings:
            raise ValueError(f"a text has 1 to {self.max_position_embeddings} tokens; got {ids.shape[1]}")
        size, positions = self.hidden_size, self.max_position_embeddings
        h = TextEmbeddings(self.vocab_size, size, positions, self.dtype, name="embeddings")(ids)
        penultimate, h = Encoder(
            self.num_hidden_layers,
            self.num_attention_heads,
            self.intermediate_size,
            self.hidden_act,
            self.layer_norm_eps,
            causal=True,
            dtype=self.dtype,
            name="encoder",
        )(h)
        last = layer_norm(self.layer_norm_eps, dtype=self.dtype, name="final_layer_norm")(h)
        pooled = last[jnp.arange(len(ids)), end_of_text(ids, self.eos_token_id)]
        if self.projection_dim is not None:
            pooled = linear(self.projection_dim, use_bias=False, dtype=self.dtype, name="text_projection")(pooled)
        return TextFeatures(last, penultimate, pooled.astype(jnp.float32))
