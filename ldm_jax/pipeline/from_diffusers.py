"""Somebody's model, read from a diffusers folder or a single file: its modules, and its parameters as NumPy arrays."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.errors import InputError
from ldm_jax.interop import folder, pipelines, single_file
from ldm_jax.interop.clip_weights import text_encoder_from_config, text_params_from_state_dict
from ldm_jax.interop.pipelines import family_of
from ldm_jax.interop.tokenizer import load_tokenizer
from ldm_jax.interop.weights import read_state_dict
from ldm_jax.models.clip import CLIPTextEncoder
from ldm_jax.models.unet import UNet
from ldm_jax.pipeline import from_class_folder, upscaler
from ldm_jax.pipeline.model import Pretrained, config_of
from ldm_jax.pipeline.overrides import NO_EXTRAS, Extras, find_tokenizers, other_autoencoder


def is_folder(path: Path) -> bool:
    """Whether this is a diffusers folder rather than a run folder."""
    return (path / folder.INDEX).is_file()


def is_single_file(path: Path) -> bool:
    """Whether this is a file that may hold a whole model."""
    return path.is_file() and path.suffix in single_file.SUFFIXES


def load(
    path: Path, dtype: str = "float32", extras: Extras = NO_EXTRAS
) -> tuple[Pretrained, ConfigDict, dict[str, Any]]:
    """Reads a diffusers folder or a single file.

    Args:
      path: a folder with model_index.json, or a .safetensors or .ckpt in the layout of CompVis and Stability AI.
      dtype: of parameters and arithmetic, float32 or bfloat16.
      extras: what such a path does not say.

    Returns:
      What it is; a config with the fields of ours that say how it draws; params as `generate.make_generator` takes
      them, NumPy arrays.

    Raises:
      InputError: something is missing or damaged, or of a kind that is not supported; the line names it.
    """
    if path.is_file():
        model, params, size = _load_file(path, dtype, extras)
    else:
        given = [name for name in ("tokenizer", "prediction") if getattr(extras, name)]
        if given:
            raise InputError(f"--{given[0]} is for models in a single file; {path} says it itself")
        model, params, size = _load_folder(path, dtype)
    if extras.vae:
        autoencoder, own = other_autoencoder(
            Path(extras.vae), model.autoencoder, params["shift"], params["scale"], dtype
        )
        model, params = model._replace(autoencoder=autoencoder), params | {"autoencoder": own}
    _check_widths(path, model, len(params["scale"]))
    return model, config_of(model, size, dtype), params


def _load_folder(path: Path, dtype: str) -> tuple[Pretrained, dict[str, Any], tuple[int, int]]:
    """The model, its parameters, and the (height, width) of its latents."""
    index, settings = folder.read_index(path), folder.read_settings(path)
    pipeline, family = family_of(path)
    for name in ("unet", *family.schedulers, family.autoencoder, *family.encoders):
        if name not in index:
            raise InputError(f"--model={path}: {folder.INDEX} names no {name}, which a {pipeline} needs")
    if pipeline == pipelines.PIPELINE_CLASS:
        return *_with_classes(path, from_class_folder.load(path, dtype)), _latent_size(path)
    kind = {"dtype": jnp.dtype(dtype), "params_dtype": jnp.dtype(dtype)}
    unet, unet_params = folder.load_unet(path / "unet", **kind)
    if isinstance(unet, UNet) != bool(family.encoders):
        raise InputError(f"--model={path}: the class of its UNet, which unet/config.json names, is not a {pipeline}'s")
    autoencoder, autoencoder_params, shift, scale = folder.load_autoencoder(path / family.autoencoder, **kind)
    texts = [load_text_encoder(path / name, dtype) for name in family.encoders]
    upscales = "low_res_scheduler" in family.schedulers
    model = Pretrained(
        pipeline=pipeline,
        unet=unet,
        autoencoder=autoencoder,
        encoders=tuple(encoder for encoder, _ in texts),
        tokenizers=tuple(load_tokenizer(path / name.replace("text_encoder", "tokenizer")) for name in family.encoders),
        scheduler=folder.component_config(path, "scheduler"),
        zeros_for_nothing=bool(settings.get("force_zeros_for_empty_prompt", True)),
        tile=_tile(path / family.autoencoder),
        upscaling=upscaler.read(path, settings, unet.num_class_embeds) if upscales else None,
    )
    params = {"unet": unet_params, "autoencoder": autoencoder_params, "shift": shift, "scale": scale}
    params["conditioner"] = [text_params for _, text_params in texts]
    if upscales:
        params["scale"] = np.full_like(scale, upscaler.SCALE)
    return model, params, _latent_size(path)


def _with_classes(path: Path, found: from_class_folder.ClassModel) -> tuple[Pretrained, dict[str, Any]]:
    """A class-conditional model, and its parameters."""
    parts = {"unet": found.unet, "autoencoder": found.autoencoder, "conditioner": found.classes}
    model = Pretrained(
        pipeline=pipelines.PIPELINE_CLASS,
        unet=found.unet[0],
        autoencoder=found.autoencoder[0],
        encoders=(),
        tokenizers=(),
        scheduler=folder.component_config(path, "scheduler"),
        zeros_for_nothing=True,
        tile=_tile(path / "vae"),
        upscaling=None,
        classes=found.classes[0],
        class_names=found.class_names,
        draws=found.draws,
    )
    return model, {name: params for name, (_, params) in parts.items()} | {"shift": found.shift, "scale": found.scale}


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


def _load_file(path: Path, dtype: str, extras: Extras) -> tuple[Pretrained, dict[str, Any], tuple[int, int]]:
    """As `_load_folder`, of a single file."""
    kind = {"dtype": jnp.dtype(dtype), "params_dtype": jnp.dtype(dtype)}
    found = single_file.read(path, prediction=extras.prediction, **kind)
    encoders, unet, noising = tuple(encoder for encoder, _ in found.texts), found.unet[0], found.low_res_scheduler
    levels = noising and unet.num_class_embeds
    model = Pretrained(
        pipeline=found.pipeline,
        unet=unet,
        autoencoder=found.autoencoder[0],
        encoders=encoders,
        tokenizers=find_tokenizers(path, extras.tokenizer, encoders, found.pads),
        scheduler=found.scheduler,
        zeros_for_nothing=True,
        tile=found.sample_size * found.autoencoder[0].downsampling,
        upscaling=noising and upscaler.make(noising, upscaler.MAX_NOISE_LEVEL, levels, where=path),
        classes=found.classes[0] if found.classes else None,
        class_names=tuple(map(str, range(found.classes[0].num_classes))) if found.classes else (),
    )
    params = {"unet": found.unet[1], "autoencoder": found.autoencoder[1], "shift": found.shift, "scale": found.scale}
    params["conditioner"] = found.classes[1] if found.classes else [text_params for _, text_params in found.texts]
    return model, params, (found.sample_size, found.sample_size)


def load_text_encoder(path: Path, dtype: str) -> tuple[CLIPTextEncoder, dict[str, Any]]:
    """The network of a text encoder's folder, and its parameters, NumPy arrays; raises InputError."""
    encoder = text_encoder_from_config(folder.component_config(path.parent, path.name)).clone(dtype=jnp.dtype(dtype))
    target = jax.eval_shape(encoder.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    return encoder, text_params_from_state_dict(read_state_dict(path, dtype=jnp.dtype(dtype)), target)


def _check_widths(path: Path, model: Pretrained, channels: int) -> None:
    """Raises InputError unless the networks fit together."""
    # Beside the latents an upscaler sees the small picture, an inpainting model the mask and the masked latents.
    fit = (channels + model.autoencoder.in_channels,) if model.upscaling else (channels, 2 * channels + 1)
    if model.unet.in_channels not in fit or model.unet.out_channels != channels:
        raise InputError(
            f"--model={path}: latents of {channels} channels do not go with a UNet of {model.unet.in_channels} to "
            f"{model.unet.out_channels}; it must be {' or '.join(map(str, fit))} to {channels}"
        )
    if model.encoders:
        if not model.upscaling and model.unet.num_class_embeds is not None:
            raise InputError(f"--model={path}: a {model.pipeline} knows no classes, but its UNet has num_class_embeds")
        width = sum(encoder.hidden_size for encoder in model.encoders)
        if width != model.unet.cross_attention_dim:
            raise InputError(
                f"--model={path}: texts of {width} features do not go with a UNet whose cross_attention_dim is "
                f"{model.unet.cross_attention_dim}"
            )


def _tile(path: Path) -> int:
    """The side of the pictures that the autoencoder was trained on, as its config tells; raises InputError."""
    size = folder.component_config(path.parent, path.name).get("sample_size", 32)  # diffusers' default
    side = size[0] if isinstance(size, list) and size else size
    if not isinstance(side, int) or side < 1:
        raise InputError(f"{path / 'config.json'}: sample_size is {size}; it must be the side of pictures in pixels")
    return side
