"""A model from a diffusers folder.

Stable Diffusion 1, 2, XL, their inpainting models, the x4 upscaler, and latent diffusion on classes or unconditional.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ldm_jax.errors import InputError
from ldm_jax.interop import folder
from ldm_jax.interop.clip_weights import text_encoder_from_config, text_params_from_state_dict
from ldm_jax.interop.modules import abstract_params
from ldm_jax.interop.pipelines import PIPELINE_CLASS, PIPELINES, Components, read_pipeline
from ldm_jax.interop.scheduler_config import scheduler_from_config
from ldm_jax.interop.tokenizer import load_tokenizer
from ldm_jax.interop.weights import read_state_dict
from ldm_jax.models.clip import CLIPTextEncoder
from ldm_jax.models.concat_conditioning import ConcatConditioning, Inpainting, LowResolution, NoiseAugmentation
from ldm_jax.models.conditioning import (
    ClassConditioning,
    ClassEmbedder,
    Conditioning,
    NoConditioning,
    TextConditioning,
)
from ldm_jax.models.first_stage import FirstStage
from ldm_jax.models.unet import UNet
from ldm_jax.pipeline.model import LatentDiffusion, Origin, Params, SamplingDefaults
from ldm_jax.pipeline.scheduler import own_scheduler, solvers_of_scheduler

MAX_NOISE_LEVEL = 350  # of an upscaler whose model_index.json does not say
UPSCALER_SCALE = 0.08333  # of its latents; diffusers' pipeline takes it whatever the autoencoder's config says
DEFAULTS = {  # field of SamplingDefaults -> argument of LatentDiffusionPipeline that states it
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "guidance_interval": "guidance_interval",
    "guidance_rescale": "guidance_rescale",
    "eta": "eta",
}


def from_diffusers(path: Path, dtype: str = "float32") -> tuple[LatentDiffusion, Params]:
    """Reads a diffusers folder.

    Args:
      path: a folder with model_index.json.
      dtype: of parameters and computation, float32 or bfloat16.

    Returns:
      The model; its parameters, NumPy arrays.

    Raises:
      InputError: something is missing, damaged or not supported; the message names it.
    """
    index, settings = folder.read_index(path), folder.read_settings(path)
    pipeline, components = read_pipeline(path)
    for name in ("unet", *components.schedulers, components.autoencoder, *components.encoders):
        if name not in index:
            raise InputError(f"--model={path}: {folder.INDEX} names no {name}, which a {pipeline} needs")
    dtypes = {"dtype": jnp.dtype(dtype), "params_dtype": jnp.dtype(dtype)}
    if pipeline == PIPELINE_CLASS:
        names, parts = _classes(path, settings, **dtypes)
    else:
        names, parts = (), _unet_and_texts(path, pipeline, components, dtype)
    denoiser, denoiser_params, conditioning, conditioning_params = parts
    autoencoder, autoencoder_params, shift, scale = folder.load_autoencoder(path / components.autoencoder, **dtypes)
    if pipeline == PIPELINE_CLASS:
        shift, scale = latents_scaling(path, denoiser.in_channels)
    if "low_res_scheduler" in components.schedulers:
        scale = np.full_like(scale, UPSCALER_SCALE)
    model = assemble(
        path=path,
        pipeline=pipeline,
        denoiser=denoiser,
        first_stage=FirstStage(autoencoder, _sample_size(path / components.autoencoder)),
        conditioning=conditioning,
        schedulers={name: folder.component_config(path, name) for name in components.schedulers},
        max_noise_level=settings.get("max_noise_level", MAX_NOISE_LEVEL),
        latent_size=_latent_size(path),
        stated=_stated_defaults(path, settings) if pipeline == PIPELINE_CLASS else {},
        class_names=names,
        channels=len(scale),
    )
    params = {"denoiser": denoiser_params, "conditioning": conditioning_params, "first_stage": autoencoder_params}
    return model, params | {"shift": shift, "scale": scale}


def assemble(
    *,
    path: Path,
    pipeline: str,
    denoiser: nn.Module,
    first_stage: FirstStage,
    conditioning: Conditioning,
    schedulers: dict[str, dict[str, Any]],
    max_noise_level: Any,
    latent_size: tuple[int, int],
    stated: dict[str, Any],
    class_names: tuple[str, ...],
    channels: int,
) -> LatentDiffusion:
    """The model of components read from another library's files; `path` is for errors, which name it.

    Args:
      pipeline: the class in diffusers that samples from it.
      schedulers: component -> its scheduler_config.json: "scheduler", and of the upscaler "low_res_scheduler".
      max_noise_level: the upscaler's highest.
      latent_size: (height, width) of the latents that it was trained on.
      stated: fields of SamplingDefaults, and "eta", that the files state themselves.
      class_names: of a model conditioned on classes.
      channels: of the latents.
    """
    components, scheduler = PIPELINES[pipeline], own_scheduler(schedulers["scheduler"], pipeline)
    factor, image_channels = first_stage.downsampling, first_stage.module.in_channels
    concat = _concat(path, denoiser, first_stage, schedulers, max_noise_level)
    _check_widths(path, pipeline, denoiser, conditioning, channels, concat)
    solvers = solvers_of_scheduler(schedulers["scheduler"], pipeline)
    own, eta = solvers[scheduler.sampler], stated.pop("eta", 0.0)
    return LatentDiffusion(
        denoiser=denoiser,
        first_stage=first_stage,
        conditioning=conditioning,
        concat=concat,
        process=scheduler.process,
        prediction=scheduler.prediction,
        image_shape=(latent_size[0] * factor, latent_size[1] * factor, image_channels),
        defaults=SamplingDefaults(
            sampler=scheduler.sampler,
            solvers=solvers | {scheduler.sampler: own._replace(options=own.options | {"eta": eta})},
            batch_size=jax.local_device_count(),
            **{"steps": components.steps, "guidance": components.guidance} | stated,
        ),
        origin=Origin(
            path=path,
            class_names=class_names,
            hashed=(scheduler.prediction,),
            pipeline=pipeline,
            schedulers=schedulers,
        ),
    )


def _unet_and_texts(
    path: Path, pipeline: str, components: Components, dtype: str
) -> tuple[nn.Module, Params, Conditioning, Any]:
    """The UNet with its parameters, and the conditioning with its own."""
    unet, params = folder.load_unet(path / "unet", dtype=jnp.dtype(dtype), params_dtype=jnp.dtype(dtype))
    if isinstance(unet, UNet) != bool(components.encoders):
        raise InputError(f"--model={path}: the class of its UNet, which unet/config.json names, is not a {pipeline}'s")
    if not components.encoders:
        return unet, params, NoConditioning(), {}
    texts = [load_text_encoder(path / name, dtype) for name in components.encoders]
    conditioning = TextConditioning(
        tuple(encoder for encoder, _ in texts),
        tuple(load_tokenizer(path / name.replace("text_encoder", "tokenizer")) for name in components.encoders),
        bool(folder.read_settings(path).get("force_zeros_for_empty_prompt", True)),
    )
    return unet, params, conditioning, [text_params for _, text_params in texts]


def _classes(path: Path, settings: dict[str, Any], **dtypes: Any) -> tuple[tuple[str, ...], tuple]:
    """The names of the classes of a LatentDiffusionPipeline, and what `_unet_and_texts` gives.

    The class embedding is part of the UNet there: see `interop.class_table`.
    """
    names, tokens = settings.get("id2label"), settings.get("class_tokens")
    if settings.get("map_kind", "none") != "none":
        raise InputError(f"{path} lacks recipe.json, without which concat conditioning cannot be read")
    names = [names.get(str(number)) for number in range(len(names))] if isinstance(names, dict) else [None]
    if not all(isinstance(name, str) for name in names) or not isinstance(tokens, int) or tokens < 1:
        raise InputError(
            f"{path / folder.INDEX} is damaged: it must have id2label, from 0, and class_tokens, 1 or more"
        )
    rows = len(names) + 1
    unet, params, table = folder.load_class_conditional_unet(path / "unet", rows * tokens, **dtypes)
    embedder = ClassEmbedder(len(names), unet.cross_attention_dim, tokens, dtype=dtypes["dtype"])
    embedding = {"embedding": {"embedding": table.reshape(rows, -1)}}
    return tuple(names), (unet, params, ClassConditioning(embedder), embedding)


def _stated_defaults(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The sampling defaults that a LatentDiffusionPipeline's index states; raises InputError for what is none."""
    return {field: _numbers(settings[name], path, name) for field, name in DEFAULTS.items() if name in settings}


def _numbers(value: Any, path: Path, name: str) -> float | tuple[float, ...]:
    """A number or, of an interval, two; raises InputError for anything else."""
    values = value if isinstance(value, list) else [value]
    known = len(values) == 1 + isinstance(value, list) and all(type(v) in (int, float) and v >= 0 for v in values)
    if not known or (name == DEFAULTS["steps"] and not (isinstance(value, int) and value)):
        raise InputError(f"{path / folder.INDEX} is damaged: {name} is {value!r}")
    return tuple(map(float, value)) if isinstance(value, list) else value


def latents_scaling(path: Path, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """The latents' shift and scale, each [c] float32, of model_index.json; raises InputError if it lacks them."""
    settings, scaling = folder.read_settings(path), []
    for name in ("latents_shift", "latents_scale"):
        values = settings.get(name)
        if not isinstance(values, list) or len(values) != channels:
            raise InputError(f"{path / folder.INDEX} is damaged: {name} must be {channels} numbers")
        scaling.append(np.array(values, np.float32))
    return tuple(scaling)


def load_text_encoder(path: Path, dtype: str) -> tuple[CLIPTextEncoder, dict[str, Any]]:
    """The network of a text encoder's folder, and its parameters, NumPy arrays; raises InputError."""
    encoder = text_encoder_from_config(folder.component_config(path.parent, path.name)).clone(dtype=jnp.dtype(dtype))
    return encoder, text_params_from_state_dict(read_state_dict(path, dtype=jnp.dtype(dtype)), abstract_params(encoder))


def _concat(
    path: Path, denoiser: nn.Module, first_stage: FirstStage, schedulers: dict[str, dict], highest: Any
) -> ConcatConditioning | None:
    """The denoiser's concat conditioning: an upscaler's if it has a second scheduler, else by its channels."""
    if "low_res_scheduler" in schedulers:
        process = scheduler_from_config(schedulers["low_res_scheduler"]).process
        levels = min(denoiser.num_class_embeds or 0, len(process))
        if not isinstance(highest, int) or not 0 <= highest < levels:
            where = path / folder.INDEX if path.is_dir() else path
            raise InputError(
                f"{where}: max_noise_level is {highest}; the UNet's num_class_embeds and low_res_scheduler have "
                f"{levels} levels, from 0"
            )
        noise = NoiseAugmentation(process, highest)
        return LowResolution(first_stage.downsampling, first_stage.module.in_channels, noise)
    return None if denoiser.in_channels == denoiser.out_channels else Inpainting(denoiser.out_channels)


def _check_widths(
    path: Path,
    pipeline: str,
    denoiser: nn.Module,
    conditioning: Conditioning,
    channels: int,
    concat: ConcatConditioning | None,
) -> None:
    """Raises InputError unless the networks fit together."""
    upscales = isinstance(concat, LowResolution)
    fit = (channels + concat.channels,) if upscales else (channels, 2 * channels + 1)
    if denoiser.in_channels not in fit or denoiser.out_channels != channels:
        raise InputError(
            f"--model={path}: latents of {channels} channels do not go with a UNet of {denoiser.in_channels} to "
            f"{denoiser.out_channels}; it must be {' or '.join(map(str, fit))} to {channels}"
        )
    if not isinstance(conditioning, TextConditioning):
        return
    if not upscales and denoiser.num_class_embeds is not None:
        raise InputError(f"--model={path}: a {pipeline} has no classes, but its UNet has num_class_embeds")
    width = sum(encoder.hidden_size for encoder in conditioning.encoders)
    if width != denoiser.cross_attention_dim:
        raise InputError(
            f"--model={path}: text features of {width} channels do not go with a UNet whose cross_attention_dim is "
            f"{denoiser.cross_attention_dim}"
        )


def _latent_size(path: Path) -> tuple[int, int]:
    """(height, width) of the latents that the UNet is made for; raises InputError if its config does not say."""
    size = folder.component_config(path, "unet").get("sample_size")
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise InputError(
            f"{path / 'unet' / 'config.json'}: sample_size is {size}; it must be that of the latents, one number or "
            "height and width"
        )
    return tuple(sides)


def _sample_size(path: Path) -> int:
    """The side of the images that the autoencoder was trained on, in its config; raises InputError."""
    size = folder.component_config(path.parent, path.name).get("sample_size", 32)  # diffusers' default
    side = size[0] if isinstance(size, list) and size else size
    if not isinstance(side, int) or side < 1:
        raise InputError(f"{path / 'config.json'}: sample_size is {size}; it must be the side of images in pixels")
    return side
