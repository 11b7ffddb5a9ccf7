"""Attention over the positions of an image: plain self-attention (autoencoders) and the transformer blocks of the UNet.

Topology and names are those of diffusers: `to_q`, `to_out_0`, `ff.net_0.proj`. Heads are head-major: feature h * D + d
of a projection is component d of head h.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ldm_jax.models.layers import Dtype, conv, group_norm, layer_norm, linear


def attend(q: Array, k: Array, v: Array, *, causal: bool = False) -> Array:
    """softmax(q k^T / sqrt(D)) v (Vaswani et al. 2017, eq. 1), the softmax in float32.

    Args:
      q: [B, Lq, N, D], with N heads.
      k, v: [B, L, N, D].
      causal: query i sees keys 0 to i only.

    Returns:
      [B, Lq, N, D]; or [B, 1, N, D], the same for each query, if there is but one key.
    """
    if k.shape[1] == 1:  # the softmax over one key is 1 whatever the query
        return v
    if _cudnn_takes(q, k):
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    scores = jnp.einsum("bqnd,bknd->bnqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if causal:
        scores = jnp.where(jnp.tri(*scores.shape[-2:], dtype=bool), scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bnqk,bknd->bqnd", weights, v)


def _cudnn_takes(q: Array, k: Array) -> bool:
    """Whether cuDNN's fused attention has a kernel, forward and backward, for these arrays on the device at hand."""
    head_size, even = q.shape[-1], q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0
    half_precision = q.dtype in (jnp.bfloat16, jnp.float16)
    return half_precision and even and head_size % 8 == 0 and head_size <= 128 and _on_ampere_or_later()


def _on_ampere_or_later() -> bool:
    device = jax.local_devices()[0]
    return "cuda" in device.client.platform_version and int(device.compute_capability.split(".")[0]) >= 8


def _multi_head(x: Array, context: Array, heads: int, *, qkv_bias: bool, zero_out: bool, dtype: Dtype) -> Array:
    """Queries from x [B, Lq, C], keys and values from context [B, L, D]: -> [B, Lq or 1, C].

    Called within a compact method: the layers to_q, to_k, to_v and to_out_0 become the calling module's own.
    """
    features = x.shape[-1]

    def project(y, name):
        y = linear(features, use_bias=qkv_bias, dtype=dtype, name=name)(y)
        return y.reshape(*y.shape[:2], heads, features // heads)

    h = attend(project(x, "to_q"), project(context, "to_k"), project(context, "to_v"))
    return linear(features, zero=zero_out, dtype=dtype, name="to_out_0")(h.reshape(*h.shape[:2], features))


class SelfAttention2D(nn.Module):
    """group norm, self-attention over all positions with biases, plus the input: the autoencoders' attention."""

    groups: int
    eps: float
    heads: int = 1
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, H, W, C]."""
        b, height, width, c = x.shape
        h = group_norm(self.groups, self.eps, dtype=self.dtype, name="group_norm")(x).reshape(b, height * width, c)
        h = _multi_head(h, h, self.heads, qkv_bias=True, zero_out=True, dtype=self.dtype)
        # One position is one key, for which `attend` returns one row: here that is all there is.
        return x + h.reshape(b, height, width, c)


class Attention(nn.Module):
    """Multi-head attention whose queries, keys and values have no bias: the transformer's."""

    heads: int
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        """Queries from x [B, Lq, C], keys and values from context [B, L, D] -> [B, Lq, C], or [B, 1, C] if L is 1."""
        return _multi_head(x, context, self.heads, qkv_bias=False, zero_out=False, dtype=self.dtype)


class GEGLU(nn.Module):
    """A linear map to values and gates, then value * gelu(gate) with the exact (erf) GELU (Shazeer 2020, eq. 6)."""

    features: int
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, L, C] -> [B, L, features]."""
        value, gate = jnp.split(linear(2 * self.features, dtype=self.dtype, name="proj")(x), 2, axis=-1)
        return value * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """GEGLU to four times the width and a linear map back."""

    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, L, C] -> [B, L, C]."""
        h = GEGLU(4 * x.shape[-1], dtype=self.dtype, name="net_0")(x)
        return linear(x.shape[-1], dtype=self.dtype, name="net_2")(h)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, feed-forward; each normalised before and added after.

    With `only_cross_attention` the first attention looks at the context too.
    """

    heads: int
    only_cross_attention: bool = False
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        """x [B, L, C], context [B, M, D] -> [B, L, C]."""
        h = layer_norm(dtype=self.dtype, name="norm1")(x)
        x = x + Attention(self.heads, self.dtype, name="attn1")(h, context if self.only_cross_attention else h)
        h = layer_norm(dtype=self.dtype, name="norm2")(x)
        x = x + Attention(self.heads, self.dtype, name="attn2")(h, context)
        return x + FeedForward(self.dtype, name="ff")(layer_norm(dtype=self.dtype, name="norm3")(x))


class Transformer2D(nn.Module):
    """A transformer over the positions of an image: norm, projection, blocks, projection, plus the input.

    The spatial transformer of Rombach et al. 2022, appendix E.2.1. With `use_linear_projection` the two projections are
    linear maps (Stable Diffusion 2, SDXL), else 1x1 convolutions (Stable Diffusion 1): only their shapes differ.
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
        h = group_norm(self.groups, 1e-6, dtype=self.dtype, name="norm")(x)
        h = self._projection(c, "proj_in")(h).reshape(b, height * width, c)
        for i in range(self.layers):
            block = TransformerBlock(self.heads, self.only_cross_attention, self.dtype, name=f"transformer_blocks_{i}")
            h = block(h, context)
        return x + self._projection(c, "proj_out", zero=True)(h.reshape(b, height, width, c))

    def _projection(self, features: int, name: str, zero: bool = False) -> nn.Module:
        if self.use_linear_projection:
            return linear(features, zero=zero, dtype=self.dtype, name=name)
        return conv(features, 1, zero=zero, dtype=self.dtype, name=name)
