"""The diffusion transformer, DiT: a denoiser of image patches with adaptive layer norm (Peebles & Xie 2023).

Topology and names are those of diffusers' DiTTransformer2DModel, but for `timestep_embedder_N`, which it has in its
blocks, and the class embedding, which is the conditioning's: see `interop/dit.py`.
"""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from ldm_jax.models.attention import Attention, FeedForward, TanhGELU
from ldm_jax.models.layers import TimestepEmbedding, timestep_embedding
from ldm_jax.models.primitives import Conv, Dense, Dtype, layer_norm, rms_norm

NORMS = ("layer", "rms")
QK_NORMS = ("none", "rms")
SINUSOIDS = 256  # of the timestep
EPS, EPS_MLP = 1e-6, 1e-5  # of the norms; before the feed-forward network, as in diffusers


def sincos_positions(height: int, width: int, features: int, base_size: int) -> np.ndarray:
    """Sinusoids of the positions of a grid (Peebles & Xie 2023, section 3.2), float32 [height * width, features].

    The first half of the features is of the column, the second of the row, each sines first. Both axes are interpolated
    to `base_size` positions.
    """
    frequency = 10000.0 ** -(np.arange(features // 4) / (features / 4))
    rows, columns = (np.arange(n) * (base_size / n) for n in (height, width))
    angle = np.stack(np.meshgrid(columns, rows), axis=-1)[..., None] * frequency  # [height, width, 2, features / 4]
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1).reshape(-1, features).astype(np.float32)


def normalize(x: Array, norm: str, eps: float = EPS) -> Array:
    """Layer norm or RMS norm of x [..., C] without parameters, computed in float32."""
    wide, ones = x.astype(jnp.float32), jnp.ones(x.shape[-1])
    y = rms_norm(wide, ones, eps) if norm == "rms" else layer_norm(wide, ones, jnp.zeros_like(ones), eps)
    return y.astype(x.dtype)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """x (1 + scale) + shift, of x [B, L, C] with shift and scale [B, C]."""
    return x * (1 + scale[:, None]) + shift[:, None]


def unpatchify(patches: Array, height: int, width: int, patch_size: int) -> Array:
    """Patches [B, h w, p p c], in the order of rows, to images [B, h p, w p, c]."""
    x = patches.reshape(len(patches), height, width, patch_size, patch_size, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(len(patches), height * patch_size, width * patch_size, -1)


class PatchEmbed(nn.Module):
    """A linear map of patches, plus fixed sinusoids of their positions."""

    patch_size: int
    features: int
    base_size: int
    dtype: Dtype = None

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """[B, H, W, C] -> [B, L, features], L patches in the order of rows."""
        p = self.patch_size
        h = Conv(self.features, p, strides=p, padding=(0, 0), dtype=self.dtype, name="proj")(z)
        batch, height, width, _ = h.shape
        positions = sincos_positions(height, width, self.features, self.base_size)
        return (h.reshape(batch, height * width, -1) + positions).astype(h.dtype)


class AdaLayerNormZero(nn.Module):
    """adaLN-Zero: a norm with shift and scale, and gates, from a linear map of the embedding that starts at 0."""

    norm: str
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array, emb: Array) -> tuple[Array, Array, tuple[Array, Array], Array]:
        """x [B, L, C], emb [B, C] -> x normalised, the gate, then shift and scale, and the gate, of the second half."""
        six = Dense(6 * x.shape[-1], zero=True, dtype=self.dtype, name="linear")(emb)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = jnp.split(six, 6, axis=-1)
        return modulate(normalize(x, self.norm), shift, scale), gate[:, None], (shift_mlp, scale_mlp), gate_mlp[:, None]


class DiTBlock(nn.Module):
    """Self-attention and feed-forward network by adaLN-Zero, between them cross-attention if there is a context.

    It begins as the identity.
    """

    heads: int
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    norm: str = "layer"
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array, emb: Array, context: Array | None = None) -> Array:
        """x [B, L, C], emb [B, C], context [B, M, D] or None -> [B, L, C]."""
        options = {"dtype": self.dtype, "use_bias": True, "qk_norm": self.qk_norm}
        h, gate, of_mlp, gate_mlp = AdaLayerNormZero(self.norm, self.dtype, name="norm1")(x, emb)
        x = x + gate * Attention(self.heads, **options, name="attn1")(h, h)
        if context is not None:
            x = x + Attention(self.heads, **options, zero_out=True, name="attn2")(normalize(x, self.norm), context)
        h = modulate(normalize(x, self.norm, EPS_MLP), *of_mlp)
        return x + gate_mlp * FeedForward(self.dtype, TanhGELU, self.mlp_ratio, name="ff")(h)


class DiT(nn.Module):
    """A diffusion transformer that predicts eps, v or z0 from noised latents: `apply({"params": p}, z_t, t, context)`.

    The defaults are those of DiT-XL/2. The context is either the class embedding, which is added to the embedding of
    the timestep, or, with `cross_attention_dim`, of a text, to which each block has cross-attention.
    """

    in_channels: int = 4  # of z_t
    out_channels: int = 8  # of the prediction
    sample_size: int = 32  # height of the latents in training; positions of other sizes are interpolated to it
    patch_size: int = 2
    hidden_size: int = 1152  # a multiple of 4 and of `heads`
    depth: int = 28  # number of blocks
    heads: int = 16
    mlp_ratio: float = 4.0  # width of the feed-forward network over hidden_size
    cross_attention_dim: int | None = None  # D of a text's context
    qk_norm: str = "none"  # none | rms: of the queries and keys of each head (Esser 2024, section 5.3.2)
    norm: str = "layer"  # layer | rms
    separate_embeddings: bool = False  # each block has its own embedding of timestep and class, as in diffusers
    dtype: Dtype = None  # of the computation; None means that of the input
    remat: bool = False  # recompute the activations of each block for the gradient (Chen 2016) instead of storing them

    def setup(self):
        """Checks the fields."""
        if self.hidden_size % 4 or self.hidden_size % self.heads:
            rule = f"a multiple of 4 and of heads = {self.heads}"
            raise ValueError(f"hidden_size must be {rule}; got {self.hidden_size}")
        for field, known in (("norm", NORMS), ("qk_norm", QK_NORMS)):
            if getattr(self, field) not in known:
                raise ValueError(f"{field} must be one of {', '.join(known)}; got {getattr(self, field)!r}")

    @property
    def num_embeddings(self) -> int:
        """The number of embeddings of the timestep and the class."""
        return self.depth if self.separate_embeddings else 1

    @nn.compact
    def __call__(self, z_t: Array, t: Array, context: Array) -> Array:
        """The prediction, [B, h, w, out_channels] float32; ValueError for shapes that don't fit the fields.

        Args:
          z_t: [B, h, w, in_channels]; h and w multiples of the patch size.
          t: integer or float, [B] or a scalar.
          context: of a class, [B, num_embeddings, hidden_size]; of a text, [B, L, cross_attention_dim].
        """
        self._check_inputs(z_t, context)
        p, width, options = self.patch_size, self.hidden_size, {"dtype": self.dtype}
        x = PatchEmbed(p, width, self.sample_size // p, **options, name="pos_embed")(z_t)
        sinusoids = timestep_embedding(jnp.broadcast_to(t, z_t.shape[:1]), SINUSOIDS, freq_shift=1.0)
        embeddings = []
        for i in range(self.num_embeddings):
            emb = TimestepEmbedding(width, **options, name=f"timestep_embedder_{i}")(sinusoids)
            embeddings.append(nn.silu(emb if self.cross_attention_dim else emb + context[:, i].astype(emb.dtype)))
        text = context if self.cross_attention_dim else None
        block = nn.remat(DiTBlock) if self.remat else DiTBlock
        fields = {"mlp_ratio": self.mlp_ratio, "qk_norm": self.qk_norm == "rms", "norm": self.norm} | options
        for i in range(self.depth):
            emb = embeddings[i if self.separate_embeddings else 0]
            x = block(self.heads, **fields, name=f"transformer_blocks_{i}")(x, emb, text)
        shift, scale = jnp.split(Dense(2 * width, zero=True, **options, name="proj_out_1")(embeddings[0]), 2, axis=-1)
        x = modulate(normalize(x, self.norm), shift, scale)
        x = Dense(p * p * self.out_channels, zero=True, **options, name="proj_out_2")(x)
        return unpatchify(x, z_t.shape[1] // p, z_t.shape[2] // p, p).astype(jnp.float32)

    def _check_inputs(self, z_t: Array, context: Array) -> None:
        p, text = self.patch_size, self.cross_attention_dim is not None
        if z_t.ndim != 4 or z_t.shape[-1] != self.in_channels or z_t.shape[1] % p or z_t.shape[2] % p:
            rule = f"[B, h, w, {self.in_channels}] with h and w multiples of patch_size = {p}"
            raise ValueError(f"z_t must be {rule}; got {z_t.shape}")
        expected = (len(z_t), "L" if text else self.num_embeddings, self.cross_attention_dim or self.hidden_size)
        if context.ndim != 3 or any(size != n for size, n in zip(context.shape, expected) if n != "L"):
            raise ValueError(f"context must be {list(expected)}; got {context.shape}")
