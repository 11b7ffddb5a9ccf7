"""Attention over the positions of an image: self-attention of autoencoders, transformer blocks of the UNet and DiT.

Topology and names are those of diffusers: `to_q`, `to_out_0`, `ff.net_0.proj`. Feature h * D + d of a projection is
component d of head h.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ldm_jax.models import flash_attention
from ldm_jax.models.primitives import Conv, Dense, Dtype, GroupNorm, LayerNorm, RMSNorm, gelu

NAMES = ("to_q", "to_k", "to_v", "to_out_0")


def attend(q: Array, k: Array, v: Array, *, causal: bool = False) -> Array:
    """Attention softmax(q k^T / sqrt(D)) v (Vaswani et al. 2017, eq. 1), the softmax in float32.

    q [B, Lq, N, D], k and v [B, L, N, D], with N heads -> [B, Lq, N, D]; or [B, 1, N, D], the same for each query, if
    there is one key. With `causal` query i attends to keys 0 to i only.
    """
    if k.shape[1] == 1:  # the softmax over one key is 1 whatever the query
        return v
    if _cudnn_supports(q, k):
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    if not causal and flash_attention.supports(q, k):
        return flash_attention.flash_attention(q, k, v)
    scores = jnp.einsum("bqnd,bknd->bnqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if causal:
        scores = jnp.where(jnp.tri(*scores.shape[-2:], dtype=bool), scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bnqk,bknd->bqnd", weights, v)


def _cudnn_supports(q: Array, k: Array) -> bool:
    """Whether cuDNN's fused attention has a kernel, forward and backward, for these arrays on this device."""
    head_size, even = q.shape[-1], q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0
    half_precision = q.dtype in (jnp.bfloat16, jnp.float16)
    return half_precision and even and head_size % 8 == 0 and head_size <= 128 and _on_ampere_or_later()


def _on_ampere_or_later() -> bool:
    device = jax.local_devices()[0]
    return "cuda" in device.client.platform_version and int(device.compute_capability.split(".")[0]) >= 8


def _multi_head(
    x: Array,
    context: Array,
    heads: int,
    dtype: Dtype,
    use_bias: bool,
    names=NAMES,
    zero_out=False,
    causal=False,
    qk_norm=False,
) -> Array:
    """Multi-head attention, queries from x [B, Lq, C], keys and values from context [B, L, D] -> [B, Lq or 1, C].

    Called within a compact method: the layers `names` belong to the calling module. `use_bias` is of the first three;
    `qk_norm` is RMS norm of the queries and keys of each head (Henry 2020), `norm_q` and `norm_k`.
    """
    features = x.shape[-1]

    def project(y, name):
        y = Dense(features, use_bias, dtype=dtype, name=name)(y)
        return y.reshape(*y.shape[:2], heads, features // heads)

    q, k, v = project(x, names[0]), project(context, names[1]), project(context, names[2])
    if qk_norm:
        q, k = RMSNorm(dtype=dtype, name="norm_q")(q), RMSNorm(dtype=dtype, name="norm_k")(k)
    h = attend(q, k, v, causal=causal)
    return Dense(features, zero=zero_out, dtype=dtype, name=names[3])(h.reshape(*h.shape[:2], features))


class SelfAttention2D(nn.Module):
    """Group norm, self-attention over all positions with biases, plus the input: the autoencoders' attention."""

    groups: int
    eps: float
    heads: int = 1
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, H, W, C]."""
        b, height, width, c = x.shape
        h = GroupNorm(self.groups, self.eps, dtype=self.dtype, name="group_norm")(x).reshape(b, height * width, c)
        h = _multi_head(h, h, self.heads, self.dtype, use_bias=True, zero_out=True)
        return x + h.reshape(b, height, width, c)


class Attention(nn.Module):
    """Multi-head attention; `use_bias` is of queries, keys and values, `names` of these and the output projection.

    `qk_norm` normalises queries and keys, `zero_out` makes the output projection's kernel start at 0.
    """

    heads: int
    dtype: Dtype = None
    use_bias: bool = False
    causal: bool = False
    names: tuple[str, str, str, str] = NAMES
    qk_norm: bool = False
    zero_out: bool = False

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        """Queries from x [B, Lq, C], keys and values from context [B, L, D] -> [B, Lq, C], or [B, 1, C] if L is 1."""
        options = {"zero_out": self.zero_out, "causal": self.causal, "qk_norm": self.qk_norm}
        return _multi_head(x, context, self.heads, self.dtype, self.use_bias, self.names, **options)


class GEGLU(nn.Module):
    """A linear map to values and gates, then value * gelu(gate) with the exact (erf) GELU (Shazeer 2020, eq. 6)."""

    features: int
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, L, C] -> [B, L, features]."""
        value, gate = jnp.split(Dense(2 * self.features, dtype=self.dtype, name="proj")(x), 2, axis=-1)
        return value * gelu(gate)


class TanhGELU(nn.Module):
    """A linear map, then the GELU by its tanh approximation (Hendrycks & Gimpel 2016, section 2)."""

    features: int
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, L, C] -> [B, L, features]."""
        return jax.nn.gelu(Dense(self.features, dtype=self.dtype, name="proj")(x), approximate=True)


class FeedForward(nn.Module):
    """The feed-forward network: GEGLU, or `activation`, to `ratio` times the width and a linear map back."""

    dtype: Dtype = None
    activation: type[nn.Module] = GEGLU
    ratio: float = 4.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, L, C] -> [B, L, C]."""
        h = self.activation(int(self.ratio * x.shape[-1]), dtype=self.dtype, name="net_0")(x)
        return Dense(x.shape[-1], dtype=self.dtype, name="net_2")(h)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context and feed-forward network, each with norm before and skip around.

    With `only_cross_attention` the first attention is cross-attention too.
    """

    heads: int
    only_cross_attention: bool = False
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        """x [B, L, C], context [B, M, D] -> [B, L, C]."""
        h = LayerNorm(dtype=self.dtype, name="norm1")(x)
        x = x + Attention(self.heads, self.dtype, name="attn1")(h, context if self.only_cross_attention else h)
        h = LayerNorm(dtype=self.dtype, name="norm2")(x)
        x = x + Attention(self.heads, self.dtype, name="attn2")(h, context)
        return x + FeedForward(self.dtype, name="ff")(LayerNorm(dtype=self.dtype, name="norm3")(x))


class Transformer2D(nn.Module):
    """The spatial transformer (Rombach et al. 2022, appendix E.2.1): norm, projection, blocks, projection, plus input.

    With `use_linear_projection` the projections are linear maps (Stable Diffusion 2, SDXL), else 1x1 convolutions
    (Stable Diffusion 1): only the shapes of their parameters differ.
    """

    heads: int
    layers: int
    groups: int
    use_linear_projection: bool = False
    only_cross_attention: bool = False
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        """x [B, H, W, C], context [B, L, D] -> [B, H, W, C]."""
        b, height, width, c = x.shape
        projection = Dense if self.use_linear_projection else partial(Conv, kernel_size=1)
        h = GroupNorm(self.groups, 1e-6, dtype=self.dtype, name="norm")(x)
        h = projection(c, dtype=self.dtype, name="proj_in")(h).reshape(b, height * width, c)
        for i in range(self.layers):
            block = TransformerBlock(self.heads, self.only_cross_attention, self.dtype, name=f"transformer_blocks_{i}")
            h = block(h, context)
        return x + projection(c, zero=True, dtype=self.dtype, name="proj_out")(h.reshape(b, height, width, c))
