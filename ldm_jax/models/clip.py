"""CLIP's text encoder (Radford et al. 2021, section 2.4): from token ids to the context of Stable Diffusion.

Topology, names and fields are those of transformers' CLIPTextModel and, with a projection, CLIPTextModelWithProjection.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ldm_jax.models.attention import Attention
from ldm_jax.models.primitives import Dense, Dtype, LayerNorm, gelu

# This `eos_token_id` of many published configs is wrong: with it transformers takes the highest id as the end of the
# text, as it is in CLIP's vocabulary.
LEGACY_EOS = 2


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x), elementwise, the quick approximation of Hendrycks & Gimpel 2016, section 2."""
    return x * nn.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu}


class TextFeatures(NamedTuple):
    """Text features of token ids [B, L]; Stable Diffusion 1 and 2 attend to `last`, SDXL uses the others."""

    last: Array  # [B, L, D], the last layer's output after the final layer norm
    penultimate: Array  # [B, L, D], the output of the layer before the last; not normalised
    pooled: Array  # [B, D or projection_dim] float32, `last` where the text ends, projected if there is a projection


class MLP(nn.Module):
    """Two linear maps with an activation between."""

    intermediate_size: int
    hidden_act: str
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, L, D] -> [B, L, D]."""
        h = Dense(self.intermediate_size, dtype=self.dtype, name="fc1")(x)
        return Dense(x.shape[-1], dtype=self.dtype, name="fc2")(ACTIVATIONS[self.hidden_act](h))


class EncoderLayer(nn.Module):
    """A transformer layer: self-attention and two linear maps, each with norm before and skip around."""

    heads: int
    intermediate_size: int
    hidden_act: str
    eps: float
    causal: bool
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, L, D] -> [B, L, D]."""
        h = LayerNorm(self.eps, dtype=self.dtype, name="layer_norm1")(x)
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        x = x + Attention(self.heads, self.dtype, True, self.causal, names, name="self_attn")(h, h)
        h = LayerNorm(self.eps, dtype=self.dtype, name="layer_norm2")(x)
        return x + MLP(self.intermediate_size, self.hidden_act, self.dtype, name="mlp")(h)


class Encoder(nn.Module):
    """The transformer of both of CLIP's encoders."""

    layers: int
    heads: int
    intermediate_size: int
    hidden_act: str
    eps: float
    causal: bool
    dtype: Dtype = None

    @nn.compact
    def __call__(self, h: Array) -> tuple[Array, Array]:
        """[B, L, D] -> the input and the output of the last layer, [B, L, D] each."""
        shape = (self.heads, self.intermediate_size, self.hidden_act, self.eps, self.causal)
        before = h
        for i in range(self.layers):
            before, h = h, EncoderLayer(*shape, dtype=self.dtype, name=f"layers_{i}")(h)
        return before, h


class CLIPEncoder(nn.Module):
    """The base of CLIP's two encoders: the fields of their transformer, and its checks."""

    hidden_size: int = 512  # the width D
    intermediate_size: int = 2048  # width between the two linear maps of a layer
    num_hidden_layers: int = 12
    num_attention_heads: int = 8  # must divide hidden_size
    hidden_act: str = "quick_gelu"  # or "gelu" (exact)
    layer_norm_eps: float = 1e-5
    projection_dim: int | None = (
        None  # of the pooled features after a linear map without bias; None: no map (text only)
    )
    dtype: Dtype = None  # of the computation; None means that of the parameters

    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "projection_dim")

    def setup(self):
        """Checks the fields."""
        self.check_fields()

    def check_fields(self) -> None:
        """ValueError for fields of which no network can be made."""
        for name in self.sizes:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more; got {getattr(self, name)}")
        heads, width = self.num_attention_heads, self.hidden_size
        if width % heads:
            raise ValueError(f"num_attention_heads must divide hidden_size; got {heads} for {width}")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}; got {self.hidden_act!r}")

    def _transformer(self, h: Array, causal: bool) -> tuple[Array, Array]:
        """The `Encoder` of [B, L, D]; called in a compact method, so that it belongs to the module."""
        layers, heads, eps = self.num_hidden_layers, self.num_attention_heads, self.layer_norm_eps
        fields = (layers, heads, self.intermediate_size, self.hidden_act, eps, causal)
        return Encoder(*fields, dtype=self.dtype, name="encoder")(h)


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
    """The end of each text: token ids [B, L] -> [B], the first position of `eos_token_id`, or 0 if there is none.

    With the legacy `eos_token_id` 2 it is the first position of the highest id.
    """
    return jnp.argmax(ids if eos_token_id == LEGACY_EOS else ids == eos_token_id, axis=-1)


class CLIPTextEncoder(CLIPEncoder):
    """CLIP's text encoder: `apply({"params": p}, ids)`. Fields and their defaults are those of CLIPTextConfig."""

    vocab_size: int = 49408
    max_position_embeddings: int = 77  # the longest text, in tokens
    eos_token_id: int = 49407  # the token that ends a text, see `end_of_text`

    sizes = (*CLIPEncoder.sizes, "vocab_size", "max_position_embeddings")

    @nn.compact
    def __call__(self, ids: Array) -> TextFeatures:
        """Features of ids [B, L], integers in [0, vocab_size), L at most `max_position_embeddings`, else ValueError.

        Those at a token do not depend on the tokens after it.
        """
        if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"ids must be integers [B, L]; got {ids.dtype} {ids.shape}")
        if not 1 <= ids.shape[1] <= self.max_position_embeddings:
            raise ValueError(f"a text has 1 to {self.max_position_embeddings} tokens; got {ids.shape[1]}")
        size, positions = self.hidden_size, self.max_position_embeddings
        h = TextEmbeddings(self.vocab_size, size, positions, self.dtype, name="embeddings")(ids)
        penultimate, h = self._transformer(h, causal=True)
        last = LayerNorm(self.layer_norm_eps, dtype=self.dtype, name="final_layer_norm")(h)
        pooled = last[jnp.arange(len(ids)), end_of_text(ids, self.eos_token_id)]
        if self.projection_dim is not None:
            pooled = Dense(self.projection_dim, use_bias=False, dtype=self.dtype, name="text_projection")(pooled)
        return TextFeatures(last, penultimate, pooled.astype(jnp.float32))
