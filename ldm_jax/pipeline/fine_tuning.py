"""The model that a run fine-tunes, `config.init_from`: checked against the run's config, with its dtype and size."""

import hashlib
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.config.fields import SCHEDULE
from ldm_jax.data.buckets import bucket_sizes
from ldm_jax.data.datasets import Dataset
from ldm_jax.errors import InputError
from ldm_jax.models.concat_conditioning import Inpainting, LowResolution, Segmentation
from ldm_jax.models.conditioning import NoConditioning, TextConditioning
from ldm_jax.pipeline.from_config import sampling_defaults
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.pipeline.scheduler import lcm_scheduler
from ldm_jax.pipeline.trainable import trainable_of, trained_shapes

SAMPLED_BYTES = 1 << 16  # of each sample, for the fingerprint
SAMPLES_OF_FILE = 256
CONCAT_TYPES = {Inpainting: "inpainting", LowResolution: "low_resolution", Segmentation: "segments"}


def prepare_base(config: ConfigDict, model: LatentDiffusion, of_weights: str) -> tuple[LatentDiffusion, ConfigDict]:
    """The model as a run trains it, and the run's config with the fields that the model determines.

    `model` is that of `config.init_from`, `of_weights` a fingerprint of its weights. Raises InputError if the config
    does not fit it.
    """
    _check(config, model)
    resolved, dtype = _resolved(config, model), jnp.dtype(config.dtype)
    conditioning, size, module = model.conditioning, config.data.image_size, model.first_stage.module
    if isinstance(conditioning, TextConditioning):
        encoders = tuple(encoder.clone(dtype=dtype) for encoder in conditioning.encoders)
        conditioning = replace(conditioning, encoders=encoders)
    schedulers = dict(model.origin.schedulers)
    if config.diffusion.objective == "consistency" and schedulers:
        schedulers["scheduler"] = lcm_scheduler(schedulers["scheduler"])
    model = replace(
        model.at_size((size, size)),
        denoiser=model.denoiser.clone(dtype=dtype),
        first_stage=replace(model.first_stage, module=module and module.clone(dtype=dtype)),
        conditioning=conditioning,
        defaults=sampling_defaults(resolved, model.defaults.solvers),
        origin=model.origin._replace(config=resolved, fingerprint=of_weights, schedulers=schedulers),
    )
    return model, resolved


def weights_fingerprint(path: Path) -> str:
    """A hash of the names, sizes and samples of the weights' files, which have gigabytes.

    Of a folder's files the beginnings and ends are hashed. A single file is sampled throughout: models of one
    architecture may agree at both ends.
    """
    digest = hashlib.sha256()
    in_folder = sorted(file for suffix in ("safetensors", "bin") for file in path.rglob(f"*.{suffix}"))
    for file in in_folder or [path]:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}".encode())
        with file.open("rb") as content:
            for fraction in np.linspace(0, 1, 2 if in_folder else SAMPLES_OF_FILE):
                content.seek(int(fraction * max(0, size - SAMPLED_BYTES)))
                digest.update(content.read(SAMPLED_BYTES))
    return digest.hexdigest()[:16]


def _check(config: ConfigDict, model: LatentDiffusion) -> None:
    """Raises InputError for fields that do not fit the model."""
    where, data, factor = f"config.init_from={config.init_from}", config.data, model.size_multiple
    texts = isinstance(model.conditioning, TextConditioning)
    if data.channels != model.image_shape[-1]:
        raise InputError(f"config.data.channels is {data.channels}; {where} takes images of {model.image_shape[-1]}")
    if data.image_size % factor:
        raise InputError(f"config.data.image_size is {data.image_size}; {where} needs a multiple of {factor}")
    if texts and data.caption_key == "none":
        raise InputError(f"{where} is a text-to-image model; config.data.caption_key must name the captions' feature")
    if model.learned_variance and not config.diffusion.vlb_weight:
        raise InputError(f"config.diffusion.vlb_weight is 0; {where} predicts the variance, so it must be above 0")
    if model.edm is not None:
        why = "trained at noise levels that no loss here samples"
        raise InputError(f"{where} is an EDM model (Karras 2022), {why}; it can be sampled and converted only")
    if model.guidance_dim is not None:
        raise InputError(f"{where} is a latent consistency model, distilled from another, which is what to fine-tune")
    if model.mean_flow:
        raise InputError(f"{where} is a MeanFlow model, which is trained from scratch only")
    if isinstance(model.concat, Segmentation) != (data.segments_key != "none"):
        takes = "is conditioned on segmentation maps" if isinstance(model.concat, Segmentation) else "takes none"
        raise InputError(f"config.data.segments_key is {data.segments_key!r}; {where} {takes}")
    if config.sampling.prompts and not texts:
        raise InputError(f"config.sampling.prompts is {config.sampling.prompts}; {where} is not conditioned on texts")
    if config.diffusion.train_text_encoder and not texts:
        raise InputError(f"config.diffusion.train_text_encoder is True; {where} has no text encoder")
    if not data.bucket_step:
        return
    step = f"config.data.bucket_step is {data.bucket_step}"
    if data.bucket_step % factor or data.bucket_step > data.image_size:
        size = f"config.data.image_size={data.image_size}"
        raise InputError(f"{step}; it must be a multiple of {factor}, no more than {size}")
    if not bucket_sizes(data.image_size, data.bucket_step):
        size = f"config.data.image_size={data.image_size}"
        raise InputError(f"{step}, for which {size} has no bucket; it must be at most half of that")
    if data.group_key != "none":
        raise InputError(f"{step}; with it config.data.group_key must be 'none'; it is {data.group_key!r}")
    if model.concat or (texts and model.conditioning.time_ids):
        why = "has concat conditioning" if model.concat else "is conditioned on the size of each image"
        raise InputError(f"{step}; it must be 0 for {where}, which {why}")


def _resolved(config: ConfigDict, model: LatentDiffusion) -> ConfigDict:
    """The config with the fields that the model determines, as it is recorded and hashed with checkpoints."""
    module, concat, of_run = model.first_stage.module, model.concat, model.origin.config
    resolved = config.copy_and_resolve_references().unlock()
    resolved.autoencoder.type = "none" if module is None else "kl" if model.first_stage.stochastic else "vq"
    if module is not None:
        resolved.autoencoder.block_out_channels = tuple(module.block_out_channels)
        resolved.autoencoder.latent_channels = model.latent_shape[-1]
    resolved.concat.type = CONCAT_TYPES.get(type(concat), "none")
    if isinstance(concat, LowResolution):
        resolved.concat.factor = concat.factor
    if isinstance(concat, Segmentation):
        resolved.concat.num_segments = concat.num_segments
    if of_run is not None:  # the noise schedule of a run, which its export states
        resolved.diffusion.update({name: of_run.diffusion[name] for name in SCHEDULE})
    resolved.diffusion.timesteps, resolved.diffusion.prediction = len(model.process), model.prediction
    resolved.diffusion.variance = "learned" if model.learned_variance else "fixed"
    if not isinstance(model.conditioning, TextConditioning):
        resolved.data.caption_key = "none"
    if isinstance(model.conditioning, NoConditioning):
        resolved.data.label_key, resolved.sampling.guidance = "none", 1.0
    if config.sampling.sampler == "own":
        sampler = model.defaults.sampler
        own = {"sampler": sampler, "eta": 0.0, "churn": 0.0, "variance": "fixed_small"}
        own |= model.defaults.solver(sampler).options
        resolved.sampling.update({name: value for name, value in own.items() if name in resolved.sampling})
    return resolved.lock()


def check_data(config: ConfigDict, model: LatentDiffusion, params: Params, train_set: Dataset) -> None:
    """Raises InputError if the model cannot be trained on the data set's classes or captions, or has no LoRA layer."""
    where, num_classes = f"config.init_from={config.init_from}", model.conditioning.num_classes
    token = config.textual_inversion.token
    if without := [caption for captions in train_set.captions for caption in captions if token not in caption]:
        what = f"{len(without):,} captions of {train_set.name} lack it, e.g. {without[0]!r}"
        raise InputError(f"config.textual_inversion.token is {token!r}; {what}; each must contain it, or be left out")
    if not jax.tree.leaves(trained_shapes(trainable_of(config, model), params)):
        raise InputError(f"config.lora.rank is {config.lora.rank}; {where} has no attention that LoRA could be of")
    if num_classes and not train_set.num_classes:
        raise InputError(f"{where} is conditioned on classes; {train_set.name} has none: see config.data.label_key")
    if num_classes and train_set.num_classes > num_classes:
        classes = f"{num_classes} classes; {train_set.name} has {train_set.num_classes}"
        raise InputError(f"{where} has {classes}, which must be no more")
