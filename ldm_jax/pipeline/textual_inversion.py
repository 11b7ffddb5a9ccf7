"""The tokens of a textual inversion file, added to a model's tokenizers and text encoders."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.interop.textual_inversion import read_embedding
from ldm_jax.models.conditioning import TextConditioning
from ldm_jax.pipeline.model import LatentDiffusion, Params


def with_embedding(model: LatentDiffusion, params: Params, path: Path) -> tuple[LatentDiffusion, Params, str]:
    """The model with a file's token, its parameters, and the token, which prompts can then contain.

    Raises InputError for a model without text encoders or of another width, or a token that it has already.
    """
    where, conditioning = f"--embedding={path}", model.conditioning
    if not isinstance(conditioning, TextConditioning):
        raise InputError(f"{where} is for text-to-image models; this one has no text encoder")
    token, vectors = read_embedding(path)
    widths, own = [v.shape[1] for v in vectors], [encoder.hidden_size for encoder in conditioning.encoders]
    if widths != own:
        raise InputError(f"{where} is for another model: its vectors have {widths} channels; its text encoders {own}")
    encoders, tokenizers, trees = [], [], []
    parts = zip(conditioning.encoders, conditioning.tokenizers, params["conditioning"], vectors)
    for encoder, tokenizer, tree, added in parts:
        try:
            tokenizers.append(tokenizer.with_token(token, len(added)))
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error
        table = tree["embeddings"]["token_embedding"]["embedding"]
        table = np.concatenate([table, added.astype(table.dtype)])
        embeddings = tree["embeddings"] | {"token_embedding": {"embedding": table}}
        trees.append(tree | {"embeddings": embeddings})
        encoders.append(encoder.clone(vocab_size=len(table)))
    conditioning = replace(conditioning, encoders=tuple(encoders), tokenizers=tuple(tokenizers))
    return replace(model, conditioning=conditioning), params | {"conditioning": trees}, token
