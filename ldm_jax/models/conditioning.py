"""Conditioning: from what the user asks for to the tokens that the UNet attends to, tau(y) in Rombach et al. 2022."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from ldm_jax.models.clip import CLIPTextEncoder
from ldm_jax.models.layers import Dtype
from ldm_jax.models.unet import Added


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


def texts_of(
    tokenizers: Sequence[Callable[[Sequence[str]], Any]],
    prompts: Sequence[str],
    negative: str | None,
    *,
    zeros_for_nothing: bool,
    size: tuple[int, int],
    noise_level: int,
) -> tuple[dict[str, Any], int]:
    """What `tau` takes of each prompt, and in the last row of the negative one: [P + 1, ...].

    Args:
      tokenizers: one for each text encoder: texts to `interop.tokenizer.Tokens`.
      prompts: one or more.
      negative: what guidance leads away from; None = nothing.
      zeros_for_nothing: whether nothing is told by zeros, as SDXL has it, or by the empty text.
      size: (height, width) of the pictures in pixels, which SDXL is told.
      noise_level: of the picture that is enlarged, which the upscaler is told.

    Returns:
      The arrays, and how many prompts were longer than the model reads.
    """
    said = [tokenizer([*prompts, negative or ""]) for tokenizer in tokenizers]
    n = len(prompts) + 1
    nothing = np.arange(n) == n - 1 if negative is None and zeros_for_nothing else np.zeros(n, bool)
    sizes = np.tile(np.float32([*size, 0, 0, *size]), (n, 1))  # original, crop from top and left, target
    cut = np.any([tokens.cut for tokens in said], axis=0)
    texts = {"ids": [tokens.ids for tokens in said], "nothing": nothing, "sizes": sizes}
    return texts | {"noise_level": np.full(n, noise_level, np.int32)}, int(cut.sum())


def make_tau(
    encoders: tuple[CLIPTextEncoder, ...], *, upscales: bool = False
) -> Callable[[Any, Any], dict[str, jax.Array]]:
    """(params, rows of `texts_of`) -> the arguments by which the UNet is told of a text.

    Of one encoder, what its last layer says of each token (Rombach 2022, section 4.3.1); of two, what the layers before
    the last say, side by side, and the second's summary of the whole text (Podell 2023, section 2.1).
    """

    def tau(params: Any, texts: Any) -> dict[str, Any]:
        if not encoders:
            return {}
        said = [encoder.apply({"params": p}, ids) for encoder, p, ids in zip(encoders, params, texts["ids"])]
        if len(said) == 1:
            return {"context": said[0].last} | ({"class_labels": texts["noise_level"]} if upscales else {})
        told = (jnp.concatenate([features.penultimate for features in said], axis=-1), said[-1].pooled)
        context, pooled = (jnp.where(_beside(texts["nothing"], a), 0, a) for a in told)
        return {"context": context, "added": Added(pooled, texts["sizes"])}

    return tau


def make_class_tau(classes: ClassEmbedder) -> Callable[[Any, Any], dict[str, jax.Array]]:
    """(params, labels) -> the arguments by which the UNet is told of a class."""
    return lambda params, label: {"context": classes.apply({"params": params}, label)}


def _beside(rows: jax.Array, array: jax.Array) -> jax.Array:
    """[B] in the shape [B, 1, ...] that goes with an array [B, ...]."""
    return rows.reshape(-1, *[1] * (array.ndim - 1))
