"""Trainable parameters of a model: whole parts of it, LoRA of its denoiser, or the vectors of a new token.

`init` makes them from the model's parameters, which training starts from; `merge` puts trained ones back.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.interop import lora
from ldm_jax.models.conditioning import NoConditioning, TextConditioning
from ldm_jax.pipeline.model import LatentDiffusion, Params

TEXT_KEY = 2**32 - 1  # folded into the key of the text encoders' LoRA; the denoiser's layers have indices from 0


@dataclass(frozen=True)
class Parts:
    """Training of whole parts of a model."""

    names: tuple[str, ...]

    def init(self, rng: jax.Array, params: Params) -> Params:
        """The parts' parameters, as in the model."""
        return {name: params[name] for name in self.names}

    def merge(self, params: Params, trained: Params) -> Params:
        """The model's parameters with the trained parts."""
        return params | trained

    def trains(self, name: str) -> bool:
        """Whether a part of the model changes."""
        return name in self.names

    def frozen(self, params: Params) -> Params:
        """The model's parameters that are not trained."""
        return {name: tree for name, tree in params.items() if name not in self.names}


@dataclass(frozen=True)
class LoRA:
    """Training of low-rank updates of attention: W + alpha / rank B A (Hu 2021, section 4.1)."""

    rank: int
    alpha: float
    text: bool = False  # of the text encoders too, not of the denoiser alone

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / self.rank

    def init(self, rng: jax.Array, params: Params) -> Params:
        """{"lora": A at random and B = 0}, and of text encoders "lora_text"."""
        trained = {"lora": lora.init_lora(rng, params["denoiser"], self.rank)}
        if self.text:
            keys = jax.random.split(jax.random.fold_in(rng, TEXT_KEY), len(params["conditioning"]))
            encoders = zip(keys, params["conditioning"])
            trained["lora_text"] = [lora.init_lora(key, encoder, self.rank) for key, encoder in encoders]
        return trained

    def merge(self, params: Params, trained: Params) -> Params:
        """The model's parameters with the updates added."""
        merged = {"denoiser": lora.merge(params["denoiser"], trained["lora"], self.scale)}
        if self.text:
            encoders = zip(params["conditioning"], trained["lora_text"])
            merged["conditioning"] = [lora.merge(encoder, update, self.scale) for encoder, update in encoders]
        return params | merged

    def trains(self, name: str) -> bool:
        """Whether a part of the model changes."""
        return name == "denoiser" or (self.text and name == "conditioning")

    def frozen(self, params: Params) -> Params:
        """All of the model's parameters."""
        return params


@dataclass(frozen=True)
class TokenVectors:
    """Training of a new token's vectors, the last rows of the text encoders' embedding tables (Gal 2022, eq. 2)."""

    num: int  # of vectors, in each text encoder

    def init(self, rng: jax.Array, params: Params) -> Params:
        """{"token": the last `num` rows of each table, [num, D]}."""
        return {"token": [jnp.asarray(token_table(tree)[-self.num :], jnp.float32) for tree in params["conditioning"]]}

    def merge(self, params: Params, trained: Params) -> Params:
        """The model's parameters with these rows."""
        trees = []
        for tree, vectors in zip(params["conditioning"], trained["token"]):
            table = token_table(tree)
            trees.append(with_token_table(tree, jnp.concatenate([table[: -self.num], vectors.astype(table.dtype)])))
        return params | {"conditioning": trees}

    def trains(self, name: str) -> bool:
        """Whether a part of the model changes."""
        return name == "conditioning"

    def frozen(self, params: Params) -> Params:
        """All of the model's parameters."""
        return params


Trainable = Parts | LoRA | TokenVectors


def token_table(encoder: Params) -> Any:
    """The embedding table [V, D] of the tokens in a text encoder's parameters."""
    return encoder["embeddings"]["token_embedding"]["embedding"]


def with_token_table(encoder: Params, table: Any) -> Params:
    """A text encoder's parameters with another embedding table [V, D]."""
    return encoder | {"embeddings": encoder["embeddings"] | {"token_embedding": {"embedding": table}}}


def trainable_of(config: ConfigDict, model: LatentDiffusion) -> Trainable:
    """The trainable parameters: the denoiser's with the class embedding or, by config, the text encoders'; or LoRA.

    In textual inversion those of the new token, which `model` has already.
    """
    if config.textual_inversion.token:
        return TokenVectors(config.textual_inversion.vectors)
    texts = isinstance(model.conditioning, TextConditioning) and config.diffusion.train_text_encoder
    if config.lora.rank:
        return LoRA(config.lora.rank, config.lora.alpha, texts)
    if isinstance(model.conditioning, TextConditioning):
        return Parts(("denoiser", "conditioning") if texts else ("denoiser",))
    return Parts(("denoiser",) if isinstance(model.conditioning, NoConditioning) else ("denoiser", "conditioning"))


def trained_shapes(trainable: Trainable, params: Params) -> Any:
    """Shapes and types of the trained parameters, as checkpoints have them: float32."""
    shapes = jax.eval_shape(trainable.init, jax.random.key(0), params)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float32), shapes)


def merge_trained(trainable: Trainable, params: Params, trained: Params) -> Params:
    """The model's parameters with the trained ones, as NumPy arrays of their former types."""
    merged = trainable.merge(params, jax.device_get(trained))
    return params | {
        name: jax.tree.map(lambda new, old: np.asarray(new, old.dtype), tree, params[name])
        for name, tree in merged.items()
        if tree is not params.get(name)
    }
