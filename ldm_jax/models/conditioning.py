"""Conditioning: from what the user asks for to the tokens that the UNet attends to, tau(y) in Rombach et al. 2022."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ldm_jax.models.layers import Dtype


class ClassEmbedder(nn.Module):
    """A learned context for each class, and one for "no class": the last row, number `num_classes`.

    Classifier-free guidance trains the null row by conditioning dropout (Ho & Salimans 2021). An unconditional model
    has num_classes=0 and only the null row.
    """

    num_classes: int
    dim: int
    tokens: int = 1
    dtype: Dtype = None

    def setup(self):
        """Checks the fields and makes the table."""
        if self.num_classes < 0 or self.tokens < 1:
            raise ValueError(f"want num_classes >= 0 and tokens >= 1; got {self.num_classes} and {self.tokens}")
        # Unit variance, as the layer-normalised outputs of a text encoder would have.
        init = nn.initializers.normal(1.0)
        self.embedding = nn.Embed(self.num_classes + 1, self.tokens * self.dim, embedding_init=init, dtype=self.dtype)

    @property
    def null(self) -> int:
        """The label that stands for "no class"."""
        return self.num_classes

    def __call__(self, label: Array) -> Array:
        """Labels [B], integers in [0, num_classes] -> context [B, tokens, dim]."""
        return self.embedding(label.astype(jnp.int32)).reshape(*label.shape, self.tokens, self.dim)
