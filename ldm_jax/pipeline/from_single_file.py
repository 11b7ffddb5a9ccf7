"""A model from a single file in the layout of CompVis and Stability AI, .safetensors or a pickle of PyTorch's."""

from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from ldm_jax.errors import InputError
from ldm_jax.interop import hub, single_file
from ldm_jax.interop.tokenizer import Tokenizer, tokenizer_of_vocabulary
from ldm_jax.models.clip import CLIPTextEncoder
from ldm_jax.models.conditioning import ClassConditioning, NoConditioning, TextConditioning
from ldm_jax.models.first_stage import FirstStage
from ldm_jax.pipeline.from_diffusers import assemble
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.pipeline.vae import check_scaling, load_vae


class Overrides(NamedTuple):
    """What a user states about a model's files; "" = nothing."""

    tokenizer: str = ""  # of a single file: a folder with the vocabulary
    prediction: str = ""  # of a single file: eps or v
    vae: str = ""  # a folder or a single file with an autoencoder in place of the model's own


NO_OVERRIDES = Overrides()


def from_single_file(
    path: Path, dtype: str = "float32", overrides: Overrides = NO_OVERRIDES
) -> tuple[LatentDiffusion, Params]:
    """The model of a single file and its parameters, NumPy arrays.

    `dtype` is of parameters and computation, float32 or bfloat16. Raises InputError if the file is damaged or of no
    family that is supported, or if there is no tokenizer for it.
    """
    dtypes = {"dtype": jnp.dtype(dtype), "params_dtype": jnp.dtype(dtype)}
    file = single_file.read(path, prediction=overrides.prediction, **dtypes)
    fields, (autoencoder, first_stage) = file.fields, _autoencoder(path, file, dtype, overrides.vae)
    encoders = tuple(encoder for encoder, _ in file.text_encoders)
    tokenizers = _find_tokenizers(path, overrides.tokenizer, encoders, tuple(each.pad for each in fields.text_encoders))
    conditioning, conditioning_params = NoConditioning(), {}
    if file.class_embedder:
        conditioning, conditioning_params = ClassConditioning(file.class_embedder[0]), file.class_embedder[1]
    elif encoders:
        conditioning = TextConditioning(encoders, tokenizers, fields.force_zeros_for_empty_prompt, fields.time_ids)
        conditioning_params = [params for _, params in file.text_encoders]
    schedulers = {"scheduler": fields.scheduler, "low_res_scheduler": fields.low_res_scheduler}
    size, class_names = fields.sample_size, tuple(map(str, range(conditioning.num_classes)))
    model = assemble(
        path, fields.pipeline, file.unet[0], FirstStage(autoencoder, size * autoencoder.downsampling), conditioning,
        {name: config for name, config in schedulers.items() if config},
        latent_shape=(size, size, len(file.scale)), class_names=class_names,
    )  # fmt: skip
    params = {"denoiser": file.unet[1], "conditioning": conditioning_params, "first_stage": first_stage}
    return model, params | {"shift": file.shift, "scale": file.scale}


def _autoencoder(path: Path, file: single_file.SingleFile, dtype: str, vae: str) -> tuple[nn.Module, Params]:
    """The autoencoder of a single file, or that of --vae if it has none."""
    if file.autoencoder:
        return file.autoencoder
    if not vae:
        raise InputError(f"{path} has no autoencoder (VAE) in it; add --vae=PATH, a file, a folder or a hub id")
    autoencoder = load_vae(vae, dtype)
    check_scaling(autoencoder, file.shift, file.scale, vae)
    return autoencoder.module, autoencoder.params


def _find_tokenizers(
    path: Path, tokenizer: str, encoders: tuple[CLIPTextEncoder, ...], pads: tuple[str, ...]
) -> tuple[Tokenizer, ...]:
    """The tokenizer of each text encoder, CLIP's: from --tokenizer, a folder `tokenizer` by the file, or the hub."""
    if not encoders:
        if tokenizer:
            raise InputError(f"--tokenizer={tokenizer} is for text-to-image models; {path} is none")
        return ()
    where = Path(tokenizer) if tokenizer else path.parent / "tokenizer"
    if not where.is_dir():
        if tokenizer:
            raise InputError(f"--tokenizer={tokenizer} does not exist; it must have CLIP's vocab.json and merges.txt")
        found = hub.find_vocabulary()
        if not found:
            raise InputError(
                f"{path} has no tokenizer in it, nor next to it, nor can {hub.CLIP} be had from the hub; CLIP's "
                f"vocab.json and merges.txt must be in a folder {where}, or, for sample, evaluate and convert, in any "
                "that --tokenizer=FOLDER names"
            )
        where = found
    where = where / "tokenizer" if (where / "tokenizer").is_dir() else where
    tokenizers = []
    for encoder, pad in zip(encoders, pads):
        each = tokenizer_of_vocabulary(where, pad_token=pad, max_length=encoder.max_position_embeddings)
        if each.vocab_size != encoder.vocab_size:
            sizes = f"{each.vocab_size} tokens; the text encoder of {path} has {encoder.vocab_size}"
            raise InputError(f"{where}: the tokenizer has {sizes}")
        tokenizers.append(each)
    return tuple(tokenizers)
