"""Somebody's model beside its parameters: Stable Diffusion 1, 2, XL, inpainting, the x4 upscaler, LDMs.

Its modules, and how its pictures are drawn unless one is told otherwise. `pretrained_files` reads it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from ldm_jax.errors import InputError
from ldm_jax.interop.lora import add_lora, read_lora
from ldm_jax.interop.pipelines import PIPELINES
from ldm_jax.interop.scheduler_config import Scheduler, scheduler_from_config
from ldm_jax.interop.tokenizer import Tokenizer
from ldm_jax.models.autoencoder import AutoencoderKL
from ldm_jax.models.clip import CLIPTextEncoder
from ldm_jax.models.concat_conditioning import MapCondition, make_map_condition
from ldm_jax.models.conditioning import ClassEmbedder, texts_of
from ldm_jax.models.first_stage import FirstStage, make_first_stage, reconstruct
from ldm_jax.pipeline import from_config as pipeline_from_config
from ldm_jax.pipeline.upscaler import Upscaling
from ldm_jax.runtime.files import content_hash
from ldm_jax.runtime.parallel import map_in_batches, parallel_map, replicate


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
            "diffusion": {"timesteps": len(scheduler.process), "prediction": scheduler.prediction},
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


class Trained(NamedTuple):
    """Everything that makes pictures."""

    config: ConfigDict
    class_names: tuple[str, ...]  # () for unlabelled sets
    params: dict[str, Any]  # unet, conditioner, autoencoder, shift, scale: what `generate` takes
    step: int  # updates behind the parameters
    pretrained: Pretrained | None = None  # what a diffusers folder or file holds beside; None for a run of ours


def with_lora(model: Trained, path: Path, scale: float) -> Trained:
    """The model with a file's LoRA added to its UNet, `scale` times; raises InputError for one of another model."""
    unet = add_lora(model.params["unet"], read_lora(path), scale, where=f"--lora={path}")
    return model._replace(params=model.params | {"unet": unet})


def fingerprint(model: Trained) -> str:
    """A hash of all parameters, and of what they predict if a user can say: equal means the same model."""
    return content_hash(model.params, *([model.config.diffusion.prediction] if model.pretrained else []))


def reconstructions(model: Trained, images: np.ndarray, batch_size: int) -> np.ndarray | None:
    """Images uint8 [N, H, W, C] through the autoencoder and back; None in pixel space, which has none."""
    if model.config.autoencoder.kind == "none":
        return None
    autoencoder = (
        model.pretrained.autoencoder if model.pretrained else pipeline_from_config.build_autoencoder(model.config)
    )
    first_stage = make_first_stage(autoencoder)
    decode = parallel_map(lambda params, batch: reconstruct(first_stage, params, batch["x"]))
    return map_in_batches(decode, replicate(model.params["autoencoder"]), {"x": images}, batch_size)


def at_size(model: Trained, size: tuple[int, int]) -> Trained:
    """The model for pictures of this (height, width); a run of ours has but one size."""
    if tuple(size) == pipeline_from_config.picture_size(model.config):
        return model
    config = model.config.copy_and_resolve_references().unlock()
    config.data.image_size = tuple(size)
    return model._replace(config=config.lock())
