"""A class-conditional model of other people, such as CompVis', in the shape of a diffusers folder.

Diffusers has no pipeline for these. `convert` writes them as it does a run of ours (see `exported`): unet/ with tau(y)
in it, vae/, scheduler/, model_index.json with the latents' shift and scale, and the pipeline.py that draws with them.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.interop import folder
from ldm_jax.models.autoencoder import AutoencoderKL, VQModel
from ldm_jax.models.conditioning import ClassEmbedder
from ldm_jax.models.unet import UNet

DRAWS = {  # field of config.sampling -> argument of the pipeline that says it
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "guidance_interval": "guidance_interval",
    "guidance_rescale": "guidance_rescale",
    "eta": "eta",
}


class ClassModel(NamedTuple):
    """What such a folder holds beside the scheduler: modules with their parameters, NumPy arrays."""

    unet: tuple[UNet, dict[str, Any]]
    autoencoder: tuple[AutoencoderKL | VQModel, dict[str, Any]]
    classes: tuple[ClassEmbedder, dict[str, Any]]
    class_names: tuple[str, ...]
    draws: dict[str, Any]  # fields of config.sampling
    shift: np.ndarray  # of the latents, [c], as is `scale`
    scale: np.ndarray


def load(path: Path, dtype: str) -> ClassModel:
    """Reads such a folder; `dtype` of parameters and arithmetic. Raises InputError for what is missing or damaged."""
    settings, kind = folder.read_settings(path), {"dtype": jnp.dtype(dtype), "params_dtype": jnp.dtype(dtype)}
    told, tokens = settings.get("id2label"), settings.get("class_tokens")
    if settings.get("map_kind", "none") != "none":
        raise InputError(f"{path} lacks recipe.json, without which a model with a map beside its latents is not known")
    names = [told.get(str(number)) for number in range(len(told))] if isinstance(told, dict) else [None]
    if not all(isinstance(name, str) for name in names) or not isinstance(tokens, int) or tokens < 1:
        raise InputError(
            f"{path / folder.INDEX} is damaged: it must have id2label, from 0, and class_tokens, 1 or more"
        )
    rows = len(names) + 1
    unet, unet_params, table = folder.load_unet_of_classes(path / "unet", rows * tokens, **kind)
    autoencoder, autoencoder_params, *_ = folder.load_autoencoder(path / "vae", **kind)
    classes = ClassEmbedder(len(names), unet.cross_attention_dim, tokens, dtype=kind["dtype"])
    return ClassModel(
        (unet, unet_params),
        (autoencoder, autoencoder_params),
        (classes, {"embedding": {"embedding": table.reshape(rows, -1)}}),
        tuple(names),
        {field: _numbers(settings[name], path, name) for field, name in DRAWS.items() if name in settings},
        *latents_scaling(path, unet.in_channels),
    )


def _numbers(value: Any, path: Path, name: str) -> float | tuple[float, ...]:
    """A number or, of an interval, two; raises InputError for anything else."""
    values = value if isinstance(value, list) else [value]
    known = len(values) == 1 + isinstance(value, list) and all(type(v) in (int, float) and v >= 0 for v in values)
    if not known or (name == DRAWS["steps"] and not (isinstance(value, int) and value)):
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
