"""Overrides of what a model's files state or leave open: tokenizer, prediction target, autoencoder, LoRA."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.interop import folder, single_file
from ldm_jax.interop.lora import add_lora, read_lora
from ldm_jax.interop.tokenizer import Tokenizer, tokenizer_of_vocabulary
from ldm_jax.models.clip import CLIPTextEncoder
from ldm_jax.pipeline.model import LatentDiffusion, Params


class Overrides(NamedTuple):
    """What a user states about a model's files; "" = nothing."""

    tokenizer: str = ""  # of a single file: a folder with the vocabulary
    prediction: str = ""  # of a single file: eps or v
    vae: str = ""  # a folder or a single file with an autoencoder in place of the model's own


NO_OVERRIDES = Overrides()


def find_tokenizers(
    path: Path, tokenizer: str, encoders: tuple[CLIPTextEncoder, ...], pads: tuple[str, ...]
) -> tuple[Tokenizer, ...]:
    """CLIP's one vocabulary for each text encoder: from --tokenizer, or the folder `tokenizer` next to the file."""
    if not encoders:
        if tokenizer:
            raise InputError(f"--tokenizer={tokenizer} is for text-to-image models; {path} is none")
        return ()
    where = Path(tokenizer) if tokenizer else path.parent / "tokenizer"
    if not where.is_dir():
        if tokenizer:
            raise InputError(
                f"there is no folder --tokenizer={tokenizer}; it must have CLIP's vocab.json and merges.txt"
            )
        raise InputError(
            f"{path} has no tokenizer in it, nor next to it; CLIP's vocab.json and merges.txt must be in a folder "
            f"{where}, or, for sample, evaluate and convert, in any that --tokenizer=FOLDER names"
        )
    where = where / "tokenizer" if (where / "tokenizer").is_dir() else where
    tokenizers = tuple(
        tokenizer_of_vocabulary(where, pad_token=pad, max_length=encoder.max_position_embeddings)
        for encoder, pad in zip(encoders, pads)
    )
    for encoder, each in zip(encoders, tokenizers):
        if each.vocab_size != encoder.vocab_size:
            sizes = f"{each.vocab_size} tokens; the text encoder of {path} has {encoder.vocab_size}"
            raise InputError(f"{where}: the tokenizer has {sizes}")
    return tokenizers


def with_autoencoder(model: LatentDiffusion, params: Params, path: Path) -> tuple[LatentDiffusion, Params]:
    """The model with another autoencoder, read from its folder, the folder of a model that it is of, or a single file.

    A folder states the shift and scale of its latents, which must be the model's; a single file does not.

    Raises:
      InputError: damaged, or its latents are not those of the model.
    """
    own = model.first_stage.module
    dtypes = {"dtype": jnp.dtype(model.dtype), "params_dtype": jnp.dtype(model.dtype)}
    if path.is_file():
        autoencoder, autoencoder_params = single_file.read_autoencoder(path, **dtypes)
    else:
        where = path / "vae" if (path / "vae").is_dir() else path
        autoencoder, autoencoder_params, *scaling = folder.load_autoencoder(where, **dtypes)
        for name, its in zip(("shift", "scale"), scaling):
            if not np.array_equal(its, params[name]):
                values = f"{its.tolist()}, those of --model {params[name].tolist()}"
                raise InputError(f"--vae={path} has other latents than --model: their {name} is {values}")
    fields = ("latent_channels", "in_channels", "downsampling")
    expected, found = ([type(a).__name__, *(getattr(a, name) for name in fields)] for a in (own, autoencoder))
    if expected != found:
        raise InputError(
            f"--vae={path} has other latents than --model: class, {', '.join(fields)} {found}, not {expected}"
        )
    first_stage = replace(model.first_stage, module=autoencoder)
    return replace(model, first_stage=first_stage), params | {"first_stage": autoencoder_params}


def with_lora(params: Params, path: Path, scale: float) -> Params:
    """The parameters with a file's LoRA added to the denoiser's, times `scale`.

    Raises:
      InputError: the file is missing, damaged or of another model.
    """
    return params | {"denoiser": add_lora(params["denoiser"], read_lora(path), scale, where=f"--lora={path}")}
