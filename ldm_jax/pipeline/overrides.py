"""What the path of a model of other people may leave open: its tokenizer, what it predicts, another autoencoder."""

from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.interop import folder, single_file
from ldm_jax.interop.tokenizer import Tokenizer, tokenizer_of_vocabulary
from ldm_jax.models.autoencoder import AutoencoderKL, VQModel
from ldm_jax.models.clip import CLIPTextEncoder


class Extras(NamedTuple):
    """What a user may have to say beside the path of a model; "" = nothing."""

    tokenizer: str = ""  # of a single file: a folder with the vocabulary
    prediction: str = ""  # of a single file: eps or v
    vae: str = ""  # a folder or a single file with an autoencoder in place of the model's own


NO_EXTRAS = Extras()


def find_tokenizers(
    path: Path, given: str, encoders: tuple[CLIPTextEncoder, ...], pads: tuple[str, ...]
) -> tuple[Tokenizer, ...]:
    """CLIP's one vocabulary for each text encoder: from --tokenizer, or the folder `tokenizer` beside the file."""
    if not encoders:
        if given:
            raise InputError(f"--tokenizer={given} is for models of texts; {path} is none")
        return ()
    where = Path(given) if given else path.parent / "tokenizer"
    if not where.is_dir():
        if given:
            raise InputError(f"there is no folder --tokenizer={given}; it must have CLIP's vocab.json and merges.txt")
        raise InputError(
            f"{path} has no tokenizer in it, nor beside it; CLIP's vocab.json and merges.txt must be in a folder "
            f"{where}, or, for sample, evaluate and convert, in any that --tokenizer=FOLDER names"
        )
    where = where / "tokenizer" if (where / "tokenizer").is_dir() else where
    tokenizers = tuple(
        tokenizer_of_vocabulary(where, pad_token=pad, max_length=encoder.max_position_embeddings)
        for encoder, pad in zip(encoders, pads)
    )
    for encoder, tokenizer in zip(encoders, tokenizers):
        if tokenizer.vocab_size != encoder.vocab_size:
            sizes = f"{tokenizer.vocab_size} tokens; the text encoder of {path} knows {encoder.vocab_size}"
            raise InputError(f"{where}: the tokenizer has {sizes}")
    return tokenizers


def other_autoencoder(
    path: Path, own: AutoencoderKL | VQModel, shift: np.ndarray, scale: np.ndarray, dtype: str
) -> tuple[AutoencoderKL | VQModel, dict[str, Any]]:
    """Reads an autoencoder that is to take the place of a model's own.

    Args:
      path: its folder, the folder of a model that it is of, or a single file.
      own: the one whose place it takes.
      shift, scale: of the latents, [c] each. A folder says its own, which must be these; a single file does not.
      dtype: of parameters and arithmetic.

    Returns:
      The module; its parameters.

    Raises:
      InputError: damaged, or its latents are not those of the model.
    """
    kind = {"dtype": jnp.dtype(dtype), "params_dtype": jnp.dtype(dtype)}
    if path.is_file():
        autoencoder, params = single_file.read_autoencoder(path, **kind)
    else:
        where = path / "vae" if (path / "vae").is_dir() else path
        autoencoder, params, *scaling = folder.load_autoencoder(where, **kind)
        for name, theirs, ours in zip(("shift", "scale"), scaling, (shift, scale)):
            if not np.array_equal(theirs, ours):
                told = f"{theirs.tolist()}, those of --model {ours.tolist()}"
                raise InputError(f"--vae={path} has other latents than --model: their {name} is {told}")
    fields = ("latent_channels", "in_channels", "downsampling")
    ours, theirs = ([type(a).__name__, *(getattr(a, name) for name in fields)] for a in (own, autoencoder))
    if ours != theirs:
        raise InputError(f"--vae={path} has other latents than --model: kind, {', '.join(fields)} {theirs}, not {ours}")
    return autoencoder, params
