"""The model that a run fine-tunes, `config.init_from`, with the run's dtype and size, checked against its config."""

import hashlib
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.data.datasets import Dataset
from ldm_jax.errors import InputError
from ldm_jax.models.concat_conditioning import Inpainting, LowResolution
from ldm_jax.models.conditioning import NoConditioning, TextConditioning
from ldm_jax.pipeline.from_config import sampling_defaults
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.pipeline.trainable import trainable_of, trained_shapes

SAMPLED_BYTES = 1 << 16  # of each sample, for the fingerprint
SAMPLES_OF_FILE = 256


def prepare_base(config: ConfigDict, model: LatentDiffusion, path: Path) -> tuple[LatentDiffusion, ConfigDict]:
    """The model as a run trains it, and the run's config with the fields that are the model's own.

    Args:
      config: of the run, with init_from.
      model: read from `config.init_from`.
      path: it was read from.

    Raises:
      InputError: the config does not fit the model.
    """
    _check(config, model)
    resolved, dtype = _resolved(config, model), jnp.dtype(config.dtype)
    conditioning = model.conditioning
    if isinstance(conditioning, TextConditioning):
        encoders = tuple(encoder.clone(dtype=dtype) for encoder in conditioning.encoders)
        conditioning = replace(conditioning, encoders=encoders)
    model = replace(
        model.at_size((config.data.image_size, config.data.image_size)),
        denoiser=model.denoiser.clone(dtype=dtype),
        first_stage=replace(model.first_stage, module=model.first_stage.module.clone(dtype=dtype)),
        conditioning=conditioning,
        defaults=sampling_defaults(resolved, model.defaults.solvers),
        origin=model.origin._replace(config=resolved, fingerprint=weights_fingerprint(path)),
    )
    return model, resolved


def weights_fingerprint(path: Path) -> str:
    """A hash of the names and sizes of the files with weights, and of samples of these, of which there are gigabytes.

    Of a folder's files the beginnings and ends are hashed. Models of one architecture may agree at both ends of a
    single file, so that it is sampled throughout.
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


def _check(config: ConfigDict, model: LatentDiffusion) -> None:
    """Raises InputError for fields that do not fit the model."""
    where, data, factor = f"config.init_from={config.init_from}", config.data, model.first_stage.downsampling
    texts = isinstance(model.conditioning, TextConditioning)
    if data.channels != model.image_shape[-1]:
        raise InputError(f"config.data.channels is {data.channels}; {where} takes images of {model.image_shape[-1]}")
    if data.image_size % factor:
        raise InputError(f"config.data.image_size is {data.image_size}; {where} needs a multiple of {factor}")
    if data.bucket_step:
        _check_buckets(config, model, factor)
    if texts and data.caption_key == "none":
        raise InputError(f"{where} is a text-to-image model; config.data.caption_key must name the captions' feature")
    if config.sampling.prompts and not texts:
        raise InputError(f"config.sampling.prompts is {config.sampling.prompts}; {where} is not conditioned on texts")


def _check_buckets(config: ConfigDict, model: LatentDiffusion, factor: int) -> None:
    """Raises InputError for image shapes that the model cannot take."""
    step, size = config.data.bucket_step, config.data.image_size
    given = f"config.data.bucket_step is {step}; "
    if step % factor or step > size:
        raise InputError(f"{given}it must be a multiple of {factor}, no more than config.data.image_size = {size}")
    if config.data.group_key != "none":
        raise InputError(f"{given}with it config.data.group_key must be 'none'; it is {config.data.group_key!r}")
    two_encoders = isinstance(model.conditioning, TextConditioning) and len(model.conditioning.encoders) > 1
    if model.concat or two_encoders:
        why = "has concat conditioning" if model.concat else "is conditioned on the size of each image"
        raise InputError(f"{given}it must be 0 for config.init_from={config.init_from}, which {why}")


def _resolved(config: ConfigDict, model: LatentDiffusion) -> ConfigDict:
    """The config with the fields that the model decides, which are recorded and hashed with the run's checkpoints."""
    module, texts = model.first_stage.module, isinstance(model.conditioning, TextConditioning)
    resolved = config.copy_and_resolve_references().unlock()
    resolved.autoencoder.type = "kl" if model.first_stage.stochastic else "vq"
    resolved.autoencoder.block_out_channels = tuple(module.block_out_channels)
    resolved.autoencoder.latent_channels = model.latent_shape[-1]
    resolved.concat.type = {Inpainting: "inpainting", LowResolution: "low_resolution"}.get(type(model.concat), "none")
    if isinstance(model.concat, LowResolution):
        resolved.concat.factor = model.concat.factor
    resolved.diffusion.timesteps, resolved.diffusion.prediction = len(model.process), model.prediction
    if not texts:
        resolved.data.caption_key = "none"
    if isinstance(model.conditioning, NoConditioning):
        resolved.data.label_key, resolved.sampling.guidance = "none", 1.0
    if config.sampling.sampler == "own":
        options = model.defaults.solver(model.defaults.sampler).options
        plain = {"eta": 0.0, "churn": 0.0, "variance": "fixed_small"}
        for name, value in ({"sampler": model.defaults.sampler} | plain | dict(options)).items():
            if name in resolved.sampling:
                resolved.sampling[name] = value
    return resolved.lock()


def check_data(config: ConfigDict, model: LatentDiffusion, params: Params, train_set: Dataset) -> None:
    """Raises InputError if the model cannot be trained on the data set's classes, or has no layer for LoRA."""
    where, num_classes = f"config.init_from={config.init_from}", model.conditioning.num_classes
    if not jax.tree.leaves(trained_shapes(trainable_of(config, model), params)):
        raise InputError(f"config.lora.rank is {config.lora.rank}; {where} has no attention that LoRA could be of")
    if num_classes and not train_set.num_classes:
        raise InputError(f"{where} is conditioned on classes; {train_set.name} has none: see config.data.label_key")
    if num_classes and train_set.num_classes > num_classes:
        raise InputError(
            f"{where} has {num_classes} classes; {train_set.name} has {train_set.num_classes}, which must be no more"
        )
