"""Conditioning on classes, on texts or on nothing: the arguments tau(y) of the denoiser (Rombach 2022, section 3.3).

A conditioning has a table with a row for each condition, the last for the null condition, and encodes any rows of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from ldm_jax.models.clip import CLIPTextEncoder
from ldm_jax.models.primitives import Dtype
from ldm_jax.models.unet import Added


class ClassEmbedder(nn.Module):
    """The class embedding: a learned context for each class, and in the last row for the null condition.

    Conditioning dropout trains the null row (Ho & Salimans 2021). An unconditional model has num_classes=0.
    """

    num_classes: int
    dim: int
    tokens: int = 1
    dtype: Dtype = None
    std: float = 1.0  # of the initial embedding; 1 is that of layer-normalised outputs of a text encoder

    def setup(self):
        """Checks the fields and makes the table."""
        if self.num_classes < 0 or self.tokens < 1:
            raise ValueError(f"need num_classes >= 0 and tokens >= 1; got {self.num_classes} and {self.tokens}")
        init = nn.initializers.normal(self.std)
        self.embedding = nn.Embed(self.num_classes + 1, self.tokens * self.dim, embedding_init=init, dtype=self.dtype)

    def __call__(self, label: Array) -> Array:
        """Labels [B], integers in [0, num_classes] -> context [B, tokens, dim]."""
        return self.embedding(label.astype(jnp.int32)).reshape(*label.shape, self.tokens, self.dim)


@dataclass(frozen=True)
class ClassConditioning:
    """Conditioning on class labels; with num_classes 0, on the learned null context alone."""

    embedder: ClassEmbedder

    @property
    def num_classes(self) -> int:
        """The number of classes, without the null condition."""
        return self.embedder.num_classes

    def table(self) -> np.ndarray:
        """int32 [K + 1]: every class, then the null condition."""
        return np.arange(self.num_classes + 1, dtype=np.int32)

    def encode(self, params: Any, rows: Array) -> dict[str, Array]:
        """Rows of the table [B] -> {"context" [B, tokens, dim]}."""
        return {"context": self.embedder.apply({"params": params}, rows)}

    def init(self, rng: Array) -> Any:
        """Random parameters."""
        return self.embedder.init(rng, jnp.zeros((1,), jnp.int32))["params"]


# The numbers that SDXL adds to the time embedding with the pooled text (Podell 2023, section 2.2), by the name of the
# last: the original size and the crop, 2 each, then the target size, 2, or of the refiner an aesthetic score.
TIME_IDS = {"target_size": 6, "aesthetic_score": 5}
AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5  # diffusers' defaults


@dataclass(frozen=True)
class TextConditioning:
    """Conditioning on prompts by one or two CLIP text encoders, whose parameters are a list.

    Without `time_ids` the context is the encoder's last layer (Rombach 2022, section 4.3.1); with them, of SDXL and its
    refiner, it is the concatenated penultimate layers, and the pooled text of the last encoder is added, with the time
    ids (Podell 2023). Then with `force_zeros_for_empty_prompt`, an absent negative prompt is zeros, not the encoded
    empty text.
    """

    encoders: tuple[CLIPTextEncoder, ...]
    tokenizers: tuple[Callable[[Sequence[str]], Any], ...] = field(compare=False)  # texts -> interop.tokenizer.Tokens
    force_zeros_for_empty_prompt: bool = True
    time_ids: str | None = None  # a key of TIME_IDS

    num_classes = 0

    @property
    def components(self) -> tuple[str, ...]:
        """The names of the text encoders in diffusers: SDXL's refiner has the second one alone."""
        names = ("text_encoder", "text_encoder_2")
        return names[-len(self.encoders) :] if self.time_ids else names[:1]

    def table(
        self, prompts: Sequence[str], negative_prompt: str | None, image_size: tuple[int, int]
    ) -> tuple[dict[str, Any], int]:
        """The encoders' inputs for each prompt, then for the negative prompt: a tree of arrays [P + 1, ...].

        negative_prompt None is the null condition; SDXL is conditioned on image_size, (height, width) in pixels. Also
        returns how many prompts are truncated to the encoders' context.
        """
        tokens = [tokenizer([*prompts, negative_prompt or ""]) for tokenizer in self.tokenizers]
        n = len(prompts) + 1
        zeros = np.zeros(n, bool)
        zeros[-1] = negative_prompt is None and self.force_zeros_for_empty_prompt
        truncated = np.any([each.truncated for each in tokens], axis=0)
        table = {"ids": [each.ids for each in tokens], "zeros": zeros, "time_ids": self._time_ids(n, image_size)}
        return table, int(truncated.sum())

    def _time_ids(self, n: int, image_size: tuple[int, int]) -> np.ndarray:
        """float32 [n, 6], or [n, 5] with aesthetic scores, the negative one in the last row."""
        if self.time_ids != "aesthetic_score":
            return np.tile(np.float32([*image_size, 0, 0, *image_size]), (n, 1))
        time_ids = np.tile(np.float32([*image_size, 0, 0, AESTHETIC_SCORE]), (n, 1))
        time_ids[-1, -1] = NEGATIVE_AESTHETIC_SCORE
        return time_ids

    def encode(self, params: Any, rows: Any) -> dict[str, Any]:
        """Rows of the table -> {"context" [B, L, D]}, with time ids also "added"."""
        features = [encoder.apply({"params": p}, ids) for encoder, p, ids in zip(self.encoders, params, rows["ids"])]
        if self.time_ids is None:
            return {"context": features[0].last}
        context = jnp.concatenate([each.penultimate for each in features], axis=-1)
        context, pooled = (
            jnp.where(rows["zeros"].reshape(-1, *[1] * (a.ndim - 1)), 0, a) for a in (context, features[-1].pooled)
        )
        return {"context": context, "added": Added(pooled, rows["time_ids"])}


@dataclass(frozen=True)
class NoConditioning:
    """The conditioning of an unconditional denoiser: a table of the null row alone, and no arguments."""

    num_classes = 0

    def table(self) -> np.ndarray:
        """int32 [1]: the null condition."""
        return np.zeros(1, np.int32)

    def encode(self, params: Any, rows: Array) -> dict[str, Array]:
        """No keyword arguments for the denoiser, of rows int32 [B]."""
        return {}

    def init(self, rng: Array) -> Any:
        """No parameters."""
        return {}


@dataclass(frozen=True)
class EncodedConditioning:
    """Conditioning on precomputed text embeddings: its table has the denoiser's arguments."""

    num_classes = 0

    def encode(self, params: Any, rows: dict[str, Any]) -> dict[str, Any]:
        """The rows."""
        return rows


Conditioning = ClassConditioning | TextConditioning | NoConditioning | EncodedConditioning


def interpolate(cond: dict[str, Any], other: dict[str, Any], weights: Array) -> dict[str, Any]:
    """Linear interpolation of encoded conditions, weights [B] from 0 (cond) to 1 (other); integers are cond's."""

    def lerp(one: Array, two: Array) -> Array:
        if not jnp.issubdtype(one.dtype, jnp.floating):
            return one
        return one + weights.reshape(-1, *[1] * (one.ndim - 1)).astype(one.dtype) * (two - one)

    return jax.tree.map(lerp, cond, other)
