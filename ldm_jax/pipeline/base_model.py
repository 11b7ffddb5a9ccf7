"""Fine-tuning: the UNet of somebody's model trained on, or its LoRA; all else of the model stays as it is.

In each step one of the captions that a picture has is drawn, and the UNet is told what `told` has of it. The classes of
a class-conditional model are those of the data set, and what it is told of each learns with the UNet (Rombach 2022,
section 3.3), unless that is LoRA. An inpainting model is given random parts of the pictures, an upscaler the pictures
made small, as `map_condition` has it, and for the upscaler noised (see `upscaling`).
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.errors import InputError
from ldm_jax.interop import hub
from ldm_jax.pipeline import from_diffusers
from ldm_jax.pipeline.model import Pretrained

# The fields that are the model's, whatever the config says, by their sections.
OF_THE_MODEL = {
    "autoencoder": ("kind", "block_out_channels", "latent_channels"),
    "concat": ("kind",),
    "diffusion": ("timesteps", "prediction"),
}
SAMPLED_BYTES = 1 << 16  # of each sample, for the fingerprint
SAMPLES_OF_FILE = 256
OF_ITS_SAMPLER = ("sampler", "spacing", "eta", "churn", "variance")


class Base(NamedTuple):
    """The model that is fine-tuned."""

    model: Pretrained
    params: dict[str, Any]  # as `pretrained_files.load` gives them
    fingerprint: str  # equal means the same parameters


def load_base(config: ConfigDict, dtype: str = "float32") -> tuple[Base, ConfigDict]:
    """The model of `config.init_from`, its parameters of type `dtype`, and the config with the fields that are its own.

    It is a diffusers folder, or a single file with its tokenizer beside it. What such a file may leave open beside that
    is said as the file is made a folder: see `convert`.

    Raises:
      InputError: there is no such model, or what the config asks for does not fit it.
    """
    path = hub.find(config.init_from, flag="config.init_from")
    if not (from_diffusers.is_folder(path) or from_diffusers.is_single_file(path)):
        raise InputError(
            f"config.init_from={path} must be a diffusers folder, with a model_index.json, or a model in one "
            ".safetensors or .ckpt; it is neither"
        )
    try:
        model, theirs, params = from_diffusers.load(path, dtype)
    except InputError as error:
        raise InputError(f"config.init_from={path}: {error}") from error
    kind = jnp.dtype(config.dtype)
    model = model._replace(
        unet=model.unet.clone(dtype=kind),
        autoencoder=model.autoencoder.clone(dtype=kind),
        encoders=tuple(encoder.clone(dtype=kind) for encoder in model.encoders),
    )
    return Base(model, params, _fingerprint(path)), _resolved(config, model, theirs)


def _fingerprint(path: Path) -> str:
    """A hash of the names and sizes of the files with weights, and of samples of these, of which there are gigabytes.

    Of a folder's files the beginnings and ends are looked at. What models of a kind have in common may be at both ends
    of a single file, so that this is looked at all along.
    """
    digest = hashlib.sha256()
    in_folder = sorted(file for suffix in ("safetensors", "bin") for file in path.rglob(f"*.{suffix}"))
    for file in [path] if path.is_file() else in_folder:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}".encode())
        with file.open("rb") as content:
            for share in np.linspace(0, 1, SAMPLES_OF_FILE if path.is_file() else 2):
                content.seek(int(share * max(0, size - SAMPLED_BYTES)))
                digest.update(content.read(SAMPLED_BYTES))
    return digest.hexdigest()[:16]


def _resolved(config: ConfigDict, model: Pretrained, theirs: ConfigDict) -> ConfigDict:
    """The config of a run with the fields that are its model's; raises InputError for others that do not fit these."""
    where, data = f"config.init_from={config.init_from}", config.data
    if data.channels != theirs.data.channels:
        raise InputError(f"config.data.channels is {data.channels}; {where} takes pictures of {theirs.data.channels}")
    factor = 2 ** (len(theirs.autoencoder.block_out_channels) - 1)
    if data.image_size % factor:
        raise InputError(f"config.data.image_size is {data.image_size}; {where} needs a multiple of {factor}")
    if data.bucket_step:
        _check_buckets(config, model, factor)
    if model.encoders and data.caption_key == "none":
        raise InputError(f"{where} is a model of texts; config.data.caption_key must name the feature with these")
    if config.sampling.prompts and not model.encoders:
        raise InputError(f"config.sampling.prompts is {config.sampling.prompts}; {where} is told no texts")
    resolved = config.copy_and_resolve_references().unlock()
    for section, names in OF_THE_MODEL.items():
        for name in names:
            resolved[section][name] = theirs[section][name]
    if model.upscaling:
        resolved.concat.factor = theirs.concat.factor
    if not model.encoders:
        resolved.data.caption_key = "none"
    if not (model.encoders or model.classes):
        resolved.data.label_key, resolved.sampling.guidance = "none", 1.0
    if config.sampling.sampler == "own":
        for name in OF_ITS_SAMPLER:
            resolved.sampling[name] = theirs.sampling[name]
    return resolved.lock()


def _check_buckets(config: ConfigDict, model: Pretrained, factor: int) -> None:
    """Raises InputError for shapes of pictures that the model cannot take."""
    step, size = config.data.bucket_step, config.data.image_size
    told = f"config.data.bucket_step is {step}; "
    if step % factor or step > size:
        raise InputError(f"{told}it must be a multiple of {factor}, no more than config.data.image_size = {size}")
    if config.data.kind_key != "none":
        raise InputError(f"{told}with it config.data.kind_key must be 'none'; it is {config.data.kind_key!r}")
    if model.map_kind != "none" or len(model.encoders) > 1:
        kind = "is told the size of each picture" if model.map_kind == "none" else "sees a map beside its latents"
        raise InputError(f"{told}it must be 0 for config.init_from={config.init_from}, which {kind}")
