"""A model from a diffusers folder.

Stable Diffusion 1, 2, XL, their inpainting models, SDXL's refiner, the x4 upscaler, diffusion transformers (DiT) on
classes, and latent diffusion on classes or unconditional.
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
from ldm_jax.interop.dit import load_dit
from ldm_jax.interop.flow_schedulers import is_flow
from ldm_jax.interop.modules import abstract_params
from ldm_jax.interop.pipelines import DIT_PIPELINE, PIPELINE_CLASS, PIPELINES, Components, read_pipeline
from ldm_jax.interop.scheduler_config import edm_from_config, process_from_config
from ldm_jax.interop.tokenizer import load_tokenizer
from ldm_jax.interop.weights import read_state_dict
from ldm_jax.models.clip import CLIPTextEncoder
from ldm_jax.models.concat_conditioning import (
    ConcatConditioning,
    Inpainting,
    LowResolution,
    NoiseAugmentation,
    Segmentation,
)
from ldm_jax.models.conditioning import (
    TIME_IDS,
    ClassConditioning,
    ClassEmbedder,
    Conditioning,
    NoConditioning,
    TextConditioning,
)
from ldm_jax.models.dit import DiT
from ldm_jax.models.first_stage import FirstStage
from ldm_jax.models.unet import UNet
from ldm_jax.pipeline.model import LatentDiffusion, Origin, Params, SamplingDefaults, Solver
from ldm_jax.pipeline.scheduler import solvers_of_scheduler, stated_timesteps

MAX_NOISE_LEVEL = 350  # default of an upscaler
UPSCALER_SCALE = 0.08333  # of its latents: diffusers' pipeline ignores the autoencoder's scaling_factor
# Field of SamplingDefaults, or eta -> argument of LatentDiffusionPipeline, in its model_index.json.
DEFAULTS = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
DEFAULTS |= {name: name for name in ("guidance_interval", "guidance_rescale", "eta")}


def from_diffusers(path: Path, dtype: str = "float32") -> tuple[LatentDiffusion, Params]:
    """The model of a diffusers folder and its parameters, NumPy arrays.

    `dtype` is of parameters and computation, float32 or bfloat16. Raises InputError, which names the file, if something
    is missing, damaged or not supported.
    """
    index, settings = folder.read_index(path), folder.read_settings(path)
    pipeline, components = read_pipeline(path)
    without = components.autoencoder not in index and not (path / components.autoencoder).exists()
    pixels = pipeline == PIPELINE_CLASS and without
    for name in (components.denoiser, *components.schedulers, components.autoencoder, *components.encoders):
        if name not in index and not (pixels and name == components.autoencoder):
            raise InputError(f"--model={path}: {folder.INDEX} names no {name}, which a {pipeline} needs")
    dtypes, stated, scaling = {"dtype": jnp.dtype(dtype), "params_dtype": jnp.dtype(dtype)}, {}, None
    if pipeline == PIPELINE_CLASS:
        stated = _stated_defaults(path, settings) | {"class_names": _class_names(path, settings, with_tokens=True)}
        stated |= stated_timesteps(settings, path / folder.INDEX)
        parts = _class_conditional(path, len(stated["class_names"]), settings["class_tokens"], **dtypes)
        channels = settings.get("map_channels", 0)
        scaling = latents_scaling(path, parts[0].in_channels - (channels if isinstance(channels, int) else 0))
    elif pipeline == DIT_PIPELINE:
        names, *parts = _dit(path, settings, **dtypes)
        stated["class_names"] = names
    else:
        parts = _unet_and_texts(path, pipeline, components, settings, **dtypes)
    denoiser, denoiser_params, conditioning, conditioning_params = parts
    first_stage, module_params, own_scaling = FirstStage(None), {}, ()
    if not pixels:
        module, module_params, *own_scaling = folder.load_autoencoder(path / components.autoencoder, **dtypes)
        first_stage = FirstStage(module, _sample_size(path / components.autoencoder))
    shift, scale = scaling or own_scaling
    if "low_res_scheduler" in components.schedulers:
        scale = np.full_like(scale, UPSCALER_SCALE)
    latent_shape = (*_latent_size(path, components.denoiser), len(scale))
    if pipeline == PIPELINE_CLASS:
        stated["concat"] = _stated_concat(
            path, settings, [side * first_stage.downsampling for side in latent_shape[:2]]
        )
    model = assemble(
        path, pipeline, denoiser, first_stage, conditioning,
        {name: folder.component_config(path, name) for name in components.schedulers}, latent_shape=latent_shape,
        max_noise_level=settings.get("max_noise_level", MAX_NOISE_LEVEL), **stated,
    )  # fmt: skip
    params = {"denoiser": denoiser_params, "conditioning": conditioning_params, "first_stage": module_params}
    return model, params | {"shift": shift, "scale": scale / np.float32(model.sigma_data)}


def assemble(
    path: Path,
    pipeline: str,
    denoiser: nn.Module,
    first_stage: FirstStage,
    conditioning: Conditioning,
    schedulers: dict[str, dict[str, Any]],
    *,
    latent_shape: tuple[int, int, int],
    class_names: tuple[str, ...] = (),
    max_noise_level: Any = MAX_NOISE_LEVEL,
    eta: float = 0.0,
    concat: ConcatConditioning | None = None,
    timestep_offset: int = 0,
    timestep_spacing: str | None = None,
    **defaults: Any,
) -> LatentDiffusion:
    """The model of the components of a pipeline class in diffusers; `path` is that of their files.

    Args:
      schedulers: component -> scheduler_config.json: "scheduler", and of the upscaler "low_res_scheduler".
      latent_shape: (h, w, c) in training.
      class_names: of a model conditioned on classes.
      max_noise_level: of the upscaler.
      eta: of the model's own sampler.
      concat: the concat conditioning of a LatentDiffusionPipeline; those of diffusers' pipelines follow from the rest.
      timestep_offset, timestep_spacing: of a LatentDiffusionPipeline, see there.
      defaults: fields of SamplingDefaults that differ from those of the pipeline.

    Raises:
      InputError: a scheduler whose process is not supported, or components that do not fit together.
    """
    process, prediction = process_from_config(schedulers["scheduler"])
    sampler, solvers = solvers_of_scheduler(schedulers["scheduler"], pipeline, timestep_spacing)
    if isinstance(own := solvers[sampler], Solver):
        solvers[sampler] = own._replace(options={**own.options, "eta": eta})
    if pipeline not in (PIPELINE_CLASS, DIT_PIPELINE):
        concat = _concat(path, denoiser, first_stage, schedulers, max_noise_level)
    plain = isinstance(conditioning, TextConditioning) and concat is None
    if not plain and any(edm_from_config(config) for config in schedulers.values()):
        raise InputError(
            f"--model={path} has an EDM scheduler; these are for text-to-image models without other inputs"
        )
    (h, w, channels), factor = latent_shape, first_stage.downsampling
    colours = first_stage.module.in_channels if first_stage.module is not None else channels
    defaults = {"steps": PIPELINES[pipeline].steps, "guidance": PIPELINES[pipeline].guidance} | defaults
    model = LatentDiffusion(
        denoiser=denoiser,
        first_stage=first_stage,
        conditioning=conditioning,
        concat=concat,
        process=process,
        prediction=prediction,
        image_shape=(h * factor, w * factor, colours),
        defaults=SamplingDefaults(sampler=sampler, solvers=solvers, batch_size=jax.local_device_count(), **defaults),
        origin=Origin(path, class_names=class_names, hashed=(prediction,), pipeline=pipeline, schedulers=schedulers),
        edm=edm_from_config(schedulers["scheduler"]),
        time_offset=int(is_flow(schedulers["scheduler"])) + timestep_offset,
    )
    _check_widths(model, channels)
    return model


def _unet_and_texts(
    path: Path, pipeline: str, components: Components, settings: dict[str, Any], **dtypes: Any
) -> tuple[nn.Module, Params, Conditioning, Any]:
    """The UNet with its parameters, and the conditioning with its own."""
    unet, params = folder.load_unet(path / "unet", **dtypes)
    if isinstance(unet, UNet) != bool(components.encoders):
        raise InputError(f"--model={path}: the class of its UNet, which unet/config.json names, is not a {pipeline}'s")
    if not components.encoders:
        return unet, params, NoConditioning(), {}
    encoders, text_params = zip(*(load_text_encoder(path / name, dtypes["dtype"]) for name in components.encoders))
    tokenizers = [load_tokenizer(path / name.replace("text_encoder", "tokenizer")) for name in components.encoders]
    force_zeros = bool(settings.get("force_zeros_for_empty_prompt", True))
    time_ids = None
    if unet.addition_embed_type == "text_time":
        time_ids = "aesthetic_score" if settings.get("requires_aesthetics_score") else "target_size"
    return unet, params, TextConditioning(encoders, tuple(tokenizers), force_zeros, time_ids), list(text_params)


def _dit(path: Path, settings: dict[str, Any], **dtypes: Any) -> tuple[tuple[str, ...], DiT, Params, Conditioning, Any]:
    """The class names, the diffusion transformer with its parameters, and the conditioning with its own."""
    dit, params, table = load_dit(path / PIPELINES[DIT_PIPELINE].denoiser, **dtypes)
    names = tuple(map(str, range(len(table) - 1)))
    if "id2label" in settings:
        names = _class_names(path, settings)
    if len(names) >= len(table):
        what = f"id2label has {len(names)} classes, but the transformer's num_embeds_ada_norm is {len(table) - 1}"
        raise InputError(f"{path / folder.INDEX} is damaged: {what}")
    table = np.concatenate([table[: len(names)], table[-1:]]).reshape(len(names) + 1, -1)
    embedder = ClassEmbedder(len(names), dit.hidden_size, dit.num_embeddings, dtype=dtypes["dtype"])
    return names, dit, params, ClassConditioning(embedder), {"embedding": {"embedding": table}}


def _class_names(path: Path, settings: dict[str, Any], with_tokens: bool = False) -> tuple[str, ...]:
    """The class names in a LatentDiffusionPipeline's or DiTPipeline's index."""
    names, tokens = settings.get("id2label"), settings.get("class_tokens") if with_tokens else 1
    names = [names.get(str(i)) for i in range(len(names))] if isinstance(names, dict) else [None]
    if not all(isinstance(name, str) for name in names) or not isinstance(tokens, int) or tokens < 1:
        rule = f"id2label, from 0{', and class_tokens, 1 or more' if with_tokens else ''}"
        raise InputError(f"{path / folder.INDEX} is damaged: it must have {rule}")
    return tuple(names)


def _stated_concat(path: Path, settings: dict[str, Any], size: list[int]) -> ConcatConditioning | None:
    """The concat conditioning in a LatentDiffusionPipeline's index, for images of `size`; raises InputError."""
    kind, channels, small = (settings.get(f"map_{name}") for name in ("kind", "channels", "size"))
    if kind in (None, "none"):
        return None
    sides = small if isinstance(small, list) and len(small) == 2 else [0, 0]
    valid = isinstance(channels, int) and channels > 0 and all(isinstance(side, int) and side > 0 for side in sides)
    if valid and kind == "low_resolution" and not size[0] % sides[0]:
        return LowResolution(size[0] // sides[0], channels)
    if valid and kind == "inpainting":
        return Inpainting(channels - 1)
    if valid and kind == "segments":
        return Segmentation(channels)
    what = f"map_kind, map_channels and map_size are {kind!r}, {channels!r} and {small!r}"
    raise InputError(f"{path / folder.INDEX} is damaged: {what}")


def _class_conditional(
    path: Path, num_classes: int, tokens: int, **dtypes: Any
) -> tuple[UNet, Params, Conditioning, Any]:
    """The UNet with its parameters, and the class embedding in it with its own: see `interop.class_table`."""
    rows = num_classes + 1
    unet, params, table = folder.load_class_conditional_unet(path / "unet", rows * tokens, **dtypes)
    embedder = ClassEmbedder(num_classes, unet.cross_attention_dim, tokens, dtype=dtypes["dtype"])
    embedding = {"embedding": {"embedding": table.reshape(rows, -1)}}
    return unet, params, ClassConditioning(embedder), embedding


def _stated_defaults(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The sampling defaults in a LatentDiffusionPipeline's index: numbers, and an interval as a tuple."""
    stated = {}
    for field, name in DEFAULTS.items():
        if name not in settings:
            continue
        value = settings[name]
        values = value if isinstance(value, list) else [value]
        valid = len(values) == 1 + isinstance(value, list) and all(type(v) in (int, float) and v >= 0 for v in values)
        if not valid or (field == "steps" and not (isinstance(value, int) and value)):
            raise InputError(f"{path / folder.INDEX} is damaged: {name} is {value!r}")
        stated[field] = tuple(map(float, value)) if isinstance(value, list) else value
    return stated


def latents_scaling(path: Path, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """The latents' shift and scale, each [c] float32, of model_index.json; raises InputError if it lacks them."""
    settings, scaling = folder.read_settings(path), []
    for name in ("latents_shift", "latents_scale"):
        values = settings.get(name)
        if not isinstance(values, list) or len(values) != channels:
            raise InputError(f"{path / folder.INDEX} is damaged: {name} must be {channels} numbers")
        scaling.append(np.array(values, np.float32))
    return tuple(scaling)


def load_text_encoder(path: Path, dtype: Any) -> tuple[CLIPTextEncoder, dict[str, Any]]:
    """The text encoder in a component's folder, and its parameters, NumPy arrays; raises InputError."""
    encoder = text_encoder_from_config(folder.component_config(path.parent, path.name)).clone(dtype=jnp.dtype(dtype))
    return encoder, text_params_from_state_dict(read_state_dict(path, dtype=jnp.dtype(dtype)), abstract_params(encoder))


def _concat(
    path: Path, denoiser: nn.Module, first_stage: FirstStage, schedulers: dict[str, dict], max_noise_level: Any
) -> ConcatConditioning | None:
    """The denoiser's concat conditioning: an upscaler's if it has a second scheduler, else by its channels."""
    if "low_res_scheduler" in schedulers:
        process, _ = process_from_config(schedulers["low_res_scheduler"])
        levels = min(denoiser.num_class_embeds or 0, len(process))
        if not isinstance(max_noise_level, int) or not 0 <= max_noise_level < levels:
            have = f"the UNet's num_class_embeds and low_res_scheduler have {levels} levels, from 0"
            raise InputError(f"--model={path}: max_noise_level is {max_noise_level}; {have}")
        noise = NoiseAugmentation(process, max_noise_level)
        return LowResolution(first_stage.downsampling, first_stage.module.in_channels, noise)
    return None if denoiser.in_channels == denoiser.out_channels else Inpainting(denoiser.out_channels)


def _check_widths(model: LatentDiffusion, channels: int) -> None:
    """Raises InputError unless the networks fit together and the latents' channels."""
    denoiser, upscales, where = model.denoiser, isinstance(model.concat, LowResolution), f"--model={model.origin.path}"
    custom = model.origin.pipeline in (PIPELINE_CLASS, DIT_PIPELINE)
    added = model.concat.channels if model.concat else 0
    fit = (channels + added,) if upscales or custom else (channels, 2 * channels + 1)
    outputs = (channels, 2 * channels) if custom else (channels,)  # with a learned variance
    if denoiser.in_channels not in fit or denoiser.out_channels not in outputs:
        unet = f"a {type(denoiser).__name__} of {denoiser.in_channels} to {denoiser.out_channels}"
        right = f"it must be {' or '.join(map(str, fit))} to {' or '.join(map(str, outputs))}"
        raise InputError(f"{where}: latents of {channels} channels do not go with {unet}; {right}")
    if not isinstance(model.conditioning, TextConditioning):
        return
    if not upscales and denoiser.num_class_embeds is not None:
        raise InputError(f"{where}: a {model.origin.pipeline} has no classes, but its UNet has num_class_embeds")
    encoders, time_ids = model.conditioning.encoders, model.conditioning.time_ids
    width = sum(encoder.hidden_size for encoder in encoders)
    if width != denoiser.cross_attention_dim or (len(encoders) > 1 and time_ids is None):
        unet = f"a UNet whose cross_attention_dim is {denoiser.cross_attention_dim}"
        unet += "" if time_ids else " and addition_embed_type null"
        raise InputError(f"{where}: {len(encoders)} text encoders of {width} channels do not go with {unet}")
    if time_ids is None:
        return
    added = (encoders[-1].projection_dim or 0) + TIME_IDS[time_ids] * denoiser.addition_time_embed_dim
    if added != denoiser.projection_class_embeddings_input_dim:
        unet = f"the UNet's projection_class_embeddings_input_dim is {denoiser.projection_class_embeddings_input_dim}"
        numbers = (
            f"{encoders[-1].projection_dim} of the pooled text and {TIME_IDS[time_ids]} time ids, up to {time_ids}"
        )
        raise InputError(f"{where}: {unet}; with {numbers}, it must be {added} (see requires_aesthetics_score)")


def _latent_size(path: Path, denoiser: str) -> tuple[int, int]:
    """(height, width) of the latents in the config of the component `denoiser`; raises InputError if it has none."""
    size = folder.component_config(path, denoiser).get("sample_size", 32 if denoiser == "transformer" else None)
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        where = path / denoiser / "config.json"
        raise InputError(f"{where}: sample_size is {size}; it must be that of the latents, one number or two")
    return tuple(sides)


def _sample_size(path: Path) -> int:
    """The side of the images in the autoencoder's training, in its config; raises InputError."""
    size = folder.component_config(path.parent, path.name).get("sample_size", 32)  # diffusers' default
    side = size[0] if isinstance(size, list) and size else size
    if not isinstance(side, int) or side < 1:
        raise InputError(f"{path / 'config.json'}: sample_size is {size}; it must be the side of images in pixels")
    return side
