"""A class-conditional DiT as the transformer of diffusers' DiTPipeline."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm_jax.errors import InputError
from ldm_jax.interop import folder
from ldm_jax.interop.diffusers import cast
from ldm_jax.interop.dit import NULL_CLASS, state_dict_from_dit
from ldm_jax.interop.modules import config_from_dit
from ldm_jax.interop.pipelines import DIT_PIPELINE, PIPELINES
from ldm_jax.models.autoencoder import AutoencoderKL
from ldm_jax.models.conditioning import ClassConditioning
from ldm_jax.models.dit import DiT
from ldm_jax.pipeline.model import LatentDiffusion, Params


def check(model: LatentDiffusion) -> None:
    """Raises InputError for a model with a DiT that is not one of diffusers' DiTPipeline."""
    dit, conditioning, autoencoder = model.denoiser, model.conditioning, model.first_stage.module
    if not isinstance(conditioning, ClassConditioning):
        raise InputError(
            f"diffusers has no pipeline of such a DiT on texts; its {DIT_PIPELINE} is conditioned on classes"
        )
    for field in ("norm", "qk_norm", "mlp_ratio"):
        value, right = getattr(dit, field), getattr(DiT, field)
        if value != right:
            raise InputError(f"diffusers' {DIT_PIPELINE} has no config.dit.{field} = {value!r}; it must be {right!r}")
    if model.concat is not None:
        raise InputError(f"diffusers' {DIT_PIPELINE} has no concat conditioning; config.concat.type must be 'none'")
    if not isinstance(autoencoder, AutoencoderKL):
        raise InputError(f"diffusers' {DIT_PIPELINE} needs an AutoencoderKL; config.autoencoder.type must be 'kl'")
    if conditioning.num_classes > NULL_CLASS:
        classes = f"the null class of diffusers' {DIT_PIPELINE} is {NULL_CLASS}; this model has"
        raise InputError(f"{classes} {conditioning.num_classes:,} classes, which must be at most {NULL_CLASS:,}")
    if model.latent_shape[:2] != (dit.sample_size, dit.sample_size):
        sizes = f"{dit.sample_size}x{dit.sample_size}; this model has {'x'.join(map(str, model.latent_shape[:2]))}"
        raise InputError(f"diffusers' {DIT_PIPELINE} samples latents of the DiT's sample_size, {sizes}")


def write_transformer(
    to: Path, model: LatentDiffusion, params: Params, dtype: str, ignored: Mapping[str, Any]
) -> dict[str, list[str]]:
    """Writes the DiT, with the class embedding in it; returns its entry in the index."""
    dit, name = model.denoiser, PIPELINES[DIT_PIPELINE].denoiser
    table = params["conditioning"]["embedding"]["embedding"].reshape(-1, dit.num_embeddings, dit.hidden_size)
    fields = config_from_dit(dit, NULL_CLASS)
    folder.write_component(
        to / name, fields | ignored, cast(state_dict_from_dit(dit, params["denoiser"], table), dtype)
    )
    return {name: ["diffusers", fields["_class_name"]]}
