"""New tokens of a model's tokenizers and text encoders: of a textual inversion file, or to be trained."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from ldm_jax.errors import InputError
from ldm_jax.interop.textual_inversion import Embedding, read_embedding
from ldm_jax.models.conditioning import TextConditioning
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.pipeline.trainable import token_table, with_token_table


def with_embedding(model: LatentDiffusion, params: Params, path: Path) -> tuple[LatentDiffusion, Params, str]:
    """The model with a file's token, its parameters, and the token, which prompts can then contain.

    Raises InputError for a model without text encoders or of another width, or a token that it has already.
    """
    where, conditioning = f"--embedding={path}", model.conditioning
    if not isinstance(conditioning, TextConditioning):
        raise InputError(f"{where} is for text-to-image models; this one has no text encoder")
    embedding = read_embedding(path)
    widths, own = [v.shape[1] for v in embedding.vectors], [encoder.hidden_size for encoder in conditioning.encoders]
    if widths != own:
        raise InputError(f"{where} is for another model: its vectors have {widths} channels; its text encoders {own}")
    return *_with_token(model, params, embedding, where), embedding.token


def with_initial_token(model: LatentDiffusion, params: Params, config: ConfigDict) -> tuple[LatentDiffusion, Params]:
    """The model with the token of `config.textual_inversion` before its training, and its parameters.

    All of the token's vectors are that of `init_word`. Raises InputError for a model without text encoders, a token
    that is a word of their vocabulary, or an init_word that is not one token of it.
    """
    inversion, conditioning, base = config.textual_inversion, model.conditioning, f"config.init_from={config.init_from}"
    token, vocabulary = f"config.textual_inversion.token is {inversion.token!r}", f"the vocabulary of {base}"
    if not isinstance(conditioning, TextConditioning):
        raise InputError(f"{token}; it must be '' for {base}, which has no text encoder")
    vectors = []
    for tokenizer, tree in zip(conditioning.tokenizers, params["conditioning"]):
        ids = tokenizer.ids_of(inversion.init_word)
        if len(ids) != 1:
            word = f"config.textual_inversion.init_word is {inversion.init_word!r}"
            raise InputError(f"{word}, which is {len(ids)} tokens of {vocabulary}; it must be one")
        if len(tokenizer.ids_of(inversion.token)) < 2:
            raise InputError(f"{token}, a word of {vocabulary}; it must be new, e.g. '<{inversion.token}>'")
        vectors.append(np.tile(token_table(tree)[ids[0]], (inversion.vectors, 1)))
    return _with_token(model, params, Embedding(inversion.token, tuple(vectors)), token)


def _with_token(
    model: LatentDiffusion, params: Params, embedding: Embedding, where: str
) -> tuple[LatentDiffusion, Params]:
    """The model with a token; an InputError begins with `where`: it has the token, or a tokenizer too large."""
    conditioning, encoders, tokenizers, trees = model.conditioning, [], [], []
    parts = zip(conditioning.encoders, conditioning.tokenizers, params["conditioning"], embedding.vectors)
    for encoder, tokenizer, tree, added in parts:
        try:
            tokenizers.append(tokenizer.with_token(embedding.token, len(added)))
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error
        table, first = token_table(tree), tokenizers[-1].ids_of(embedding.token)[0]
        if first > len(table):
            raise InputError(f"{where}: the text encoder has vectors of {len(table)} tokens, its tokenizer {first}")
        table = np.concatenate([table[:first], added.astype(table.dtype)])  # the rows after it are of no token
        trees.append(with_token_table(tree, table))
        encoders.append(encoder.clone(vocab_size=len(table)))
    conditioning = replace(conditioning, encoders=tuple(encoders), tokenizers=tuple(tokenizers))
    return replace(model, conditioning=conditioning), params | {"conditioning": trees}
