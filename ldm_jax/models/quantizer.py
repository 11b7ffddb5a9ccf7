"""Vector quantisation with a learned codebook (van den Oord et al. 2017)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array


class Quantized(NamedTuple):
    """Quantised raw latents [B, h, w, d], with K codes."""

    z_q: Array  # [B, h, w, d] the codes; their gradient goes straight through to the raw latents
    indices: Array  # [B, h, w] int32 in [0, K)
    codebook_loss: Array  # [] mean |sg(raw) - e|^2, moves the codes
    commitment_loss: Array  # [] mean |raw - sg(e)|^2, moves the encoder; its usual weight is beta = 0.25
    usage: Array  # [K] float32, the fraction of positions with each code; sums to 1


def perplexity(usage: Array) -> Array:
    """The perplexity exp(entropy) of the codebook, in [1, K]: the effective number of codes. usage [K] sums to 1.

    Average `usage` over devices or batches first: the perplexity of a mean is not the mean of perplexities.
    """
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(usage, usage)))


class VectorQuantizer(nn.Module):
    """A vector quantiser: replaces each latent vector by the nearest of `num_embeddings` codes of `features`."""

    num_embeddings: int
    features: int

    @nn.compact
    def __call__(self, raw: Array) -> Quantized:
        """Raw latents [B, h, w, features] -> Quantized, computed in float32."""
        k = self.num_embeddings
        init = nn.initializers.uniform(2 / k)
        embed = nn.Embed(k, self.features, embedding_init=lambda *a: init(*a) - 1 / k, name="embedding")
        raw = raw.astype(jnp.float32)

        # argmin_k |raw - e_k|^2 = argmin_k |e_k|^2 - 2 raw . e_k (the paper's eq. 1)
        codes = jax.lax.stop_gradient(embed.embedding)
        similarity = jnp.einsum("bhwd,kd->bhwk", jax.lax.stop_gradient(raw), codes, precision="highest")
        indices = jnp.argmin(jnp.sum(codes**2, axis=-1) - 2 * similarity, axis=-1).astype(jnp.int32)
        e = embed(indices)

        return Quantized(
            z_q=raw + jax.lax.stop_gradient(e - raw),
            indices=indices,
            codebook_loss=jnp.mean((jax.lax.stop_gradient(raw) - e) ** 2),
            commitment_loss=jnp.mean((raw - jax.lax.stop_gradient(e)) ** 2),
            usage=jnp.bincount(indices.reshape(-1), length=k) / indices.size,
        )
