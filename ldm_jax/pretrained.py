"""Somebody's model beside its parameters: Stable Diffusion 1, 2, XL, inpainting, the x4 upscaler, LDMs.

Its modules, and how its pictures are drawn unless one is told otherwise. `pretrained_files` reads it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from ldm_jax import class_folder
from ldm_jax.errors import InputError
from ldm_jax.first_stage import FirstStage
from ldm_jax.interop import folder
from ldm_jax.interop.scheduler_config import Scheduler, scheduler_from_config
from ldm_jax.interop.tokenizer import Tokenizer
from ldm_jax.map_condition import MapCondition, make_map_condition
from ldm_jax.models.autoencoder import AutoencoderKL
from ldm_jax.models.clip import CLIPTextEncoder
from ldm_jax.models.conditioning import ClassEmbedder
from ldm_jax.text_condition import texts_of
from ldm_jax.upscaling import Upscaling


class Family(NamedTuple):
    """The components of a pipeline, and what it does unless told otherwise, as in diffusers."""

    encoders: tuple[str, ...]
    autoencoder: str
    guidance: float
    steps: int = 50
    schedulers: tuple[str, ...] = ("scheduler",)


SD = Family(("text_encoder",), "vae", 7.5)
XL = Family(("text_encoder", "text_encoder_2"), "vae", 5.0)
PIPELINES = {
    "StableDiffusionPipeline": SD,
    "StableDiffusionImg2ImgPipeline": SD,
    "StableDiffusionInpaintPipeline": SD,
    "StableDiffusionXLPipeline": XL,
    "StableDiffusionXLImg2ImgPipeline": XL,
    "StableDiffusionXLInpaintPipeline": XL._replace(guidance=7.5),
    "StableDiffusionUpscalePipeline": SD._replace(
        guidance=9.0, steps=75, schedulers=("scheduler", "low_res_scheduler")
    ),
    "LDMPipeline": Family((), "vqvae", 1.0),
    class_folder.PIPELINE_CLASS: Family((), "vae", 3.0),  # the guidance that CompVis drew their model's pictures with
}


class Pretrained(NamedTuple):
    """What a folder or file holds beside the parameters."""

    pipeline: str  # its class
    unet: nn.Module
    autoencoder: nn.Module
    encoders: tuple[CLIPTextEncoder, ...]  # none of an unconditional model
    tokenizers: tuple[Tokenizer, ...]
    scheduler: Mapping[str, Any]  # its scheduler_config.json
    zeros_for_nothing: bool  # SDXL: no negative prompt is told by zeros, not by the empty text
    tile: int  # side in pixels of what the autoencoder takes at a time, if asked to tile
    upscaling: Upscaling | None  # of the x4 upscaler
    classes: ClassEmbedder | None = None  # of a class-conditional model
    class_names: tuple[str, ...] = ()  # of that; their numbers where it has no names
    draws: Mapping[str, Any] = MappingProxyType({})  # fields of config.sampling that it says itself

    @property
    def map_kind(self) -> str:
        """Of its map condition: see `map_condition.KINDS`; "none" without one."""
        if self.upscaling:
            return "low_resolution"
        return "none" if self.unet.in_channels == self.unet.out_channels else "inpainting"

    def texts(
        self, prompts: Sequence[str], negative: str | None, size: tuple[int, int], noise_level: int
    ) -> tuple[dict[str, Any], int]:
        """See `texts_of`."""
        told = {"zeros_for_nothing": self.zeros_for_nothing, "size": size, "noise_level": noise_level}
        return texts_of(self.tokenizers, prompts, negative, **told)


def family_of(path: Path) -> tuple[str, Family]:
    """The class of a folder's pipeline, and what that has; raises InputError for one that is not supported."""
    pipeline = folder.read_settings(path).get("_class_name")
    if pipeline == ["pipeline", class_folder.PIPELINE_CLASS]:  # its own, in the file pipeline.py
        pipeline = class_folder.PIPELINE_CLASS
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        raise InputError(f"{path} is a {pipeline}; supported are {', '.join(PIPELINES)}")
    return pipeline, PIPELINES[pipeline]


def config_of(model: Pretrained, size: tuple[int, int], dtype: str) -> ConfigDict:
    """The fields of configs/base.py that drawing looks at, for latents of this (height, width)."""
    scheduler, autoencoder, family = scheduler_of(model), model.autoencoder, PIPELINES[model.pipeline]
    return ConfigDict(
        {
            "seed": 0,
            "dtype": dtype,
            "data": {
                "image_size": tuple(side * autoencoder.downsampling for side in size),
                "channels": autoencoder.in_channels,
                "crop": "center",
                "test_split": "",  # it knows no data set
            },
            "autoencoder": {
                "kind": "kl" if isinstance(autoencoder, AutoencoderKL) else "vq",
                "block_out_channels": tuple(autoencoder.block_out_channels),
                "latent_channels": model.unet.out_channels,
            },
            "concat": {"kind": model.map_kind, "factor": autoencoder.downsampling},
            "diffusion": {"timesteps": len(scheduler.schedule.alpha_bar), "prediction": scheduler.prediction},
            "sampling": {
                "sampler": scheduler.sampler,
                "steps": family.steps,
                "spacing": scheduler.options["spacing"],
                "eta": 0.0,
                "variance": scheduler.options.get("variance", "fixed_small"),
                "churn": 0.0,
                "guidance": family.guidance,
                "guidance_interval": (0.0, 1.0),
                "guidance_rescale": 0.0,
                "threshold": 0.0,
                "batch_size": jax.local_device_count(),
                **model.draws,
            },
        }
    ).lock()


def scheduler_of(model: Pretrained, sampler: str | None = None) -> Scheduler:
    """The model's own scheduler, or what another sampler makes of its config; raises InputError."""
    scheduler = scheduler_from_config(model.scheduler, sampler, pipeline=model.pipeline)
    if scheduler.threshold is not None:
        raise InputError(f"the scheduler {model.scheduler['_class_name']} has thresholding, which latents are not for")
    return scheduler


def map_condition_of(
    model: Pretrained, first_stage: FirstStage, latent_shape: tuple[int, int, int]
) -> MapCondition | None:
    """What the model's UNet sees beside its latents, of the shape (h, w, c); None if nothing."""
    if model.map_kind == "none":
        return None
    return make_map_condition(
        model.map_kind,
        first_stage=first_stage,
        latent_shape=latent_shape,
        channels=model.autoencoder.in_channels,
        factor=model.autoencoder.downsampling,
        segments=0,
    )
