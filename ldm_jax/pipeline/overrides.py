"""Overrides of what a model's files state or leave open: tokenizer, prediction target, LoRA."""

from pathlib import Path
from typing import NamedTuple

from ldm_jax.errors import InputError
from ldm_jax.interop.lora import add_lora, read_lora
from ldm_jax.interop.tokenizer import Tokenizer, tokenizer_of_vocabulary
from ldm_jax.models.clip import CLIPTextEncoder
from ldm_jax.pipeline.model import Params


class Overrides(NamedTuple):
    """What a user states about a model's files; "" = nothing."""

    tokenizer: str = ""  # of a single file: a folder with the vocabulary
    prediction: str = ""  # of a single file: eps or v
    vae: str = ""  # a folder or a single file with an autoencoder in place of the model's own


NO_OVERRIDES = Overrides()


def find_tokenizers(
    path: Path, tokenizer: str, encoders: tuple[CLIPTextEncoder, ...], pads: tuple[str, ...]
) -> tuple[Tokenizer, ...]:
    """CLIP's one vocabulary for each text encoder: from --tokenizer, or the folder `tokenizer` next to the file.

    Raises:
      InputError: there is none, it does not fit an encoder, or there are no encoders.
    """
    if not encoders:
        if tokenizer:
            raise InputError(f"--tokenizer={tokenizer} is for text-to-image models; {path} is none")
        return ()
    where = Path(tokenizer) if tokenizer else path.parent / "tokenizer"
    if not where.is_dir():
        if tokenizer:
            raise InputError(f"--tokenizer={tokenizer} does not exist; it must have CLIP's vocab.json and merges.txt")
        raise InputError(
            f"{path} has no tokenizer in it, nor next to it; CLIP's vocab.json and merges.txt must be in a folder "
            f"{where}, or, for sample, evaluate and convert, in any that --tokenizer=FOLDER names"
        )
    where = where / "tokenizer" if (where / "tokenizer").is_dir() else where
    tokenizers = []
    for encoder, pad in zip(encoders, pads):
        each = tokenizer_of_vocabulary(where, pad_token=pad, max_length=encoder.max_position_embeddings)
        if each.vocab_size != encoder.vocab_size:
            sizes = f"{each.vocab_size} tokens; the text encoder of {path} has {encoder.vocab_size}"
            raise InputError(f"{where}: the tokenizer has {sizes}")
        tokenizers.append(each)
    return tuple(tokenizers)


def with_lora(params: Params, path: Path, scale: float) -> Params:
    """The parameters with a file's LoRA times `scale` added to the denoiser's.

    Raises:
      InputError: the file is missing, damaged or of another model.
    """
    return params | {"denoiser": add_lora(params["denoiser"], read_lora(path), scale, where=f"--lora={path}")}
