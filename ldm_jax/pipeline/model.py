"""A latent diffusion model in memory, the same from a config, a run folder or another library.

The static half, `LatentDiffusion`, has modules, tables and numbers; the parameters are a separate tree of arrays:
{"denoiser", "conditioning", "first_stage", "shift", "scale"}.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from ldm_jax.diffusion.edm import EDM
from ldm_jax.diffusion.process import Process
from ldm_jax.errors import InputError
from ldm_jax.models.concat_conditioning import ConcatConditioning
from ldm_jax.models.conditioning import Conditioning
from ldm_jax.models.first_stage import FirstStage, from_latents, to_latents
from ldm_jax.models.pixels import to_pixels
from ldm_jax.models.unet import FLOW_TIME, UNet, guidance_embedding, interval_embedding
from ldm_jax.run_folder.checkpoint import STORED_NAMES
from ldm_jax.runtime.files import content_hash

Params = dict[str, Any]


class Solver(NamedTuple):
    """The default settings of a sampler on a model."""

    process: Process  # the model's own, but for the end that some classes of diffusers change
    options: Mapping[str, Any]  # arguments of `solvers.make_table` beyond the number of steps
    clip_sample_range: float = np.inf  # z0_hat of latents is clipped to [-range, range]
    scaled_initial_noise: bool = False  # z_T = sigma_T eps, diffusers' init_noise_sigma of k-diffusion's samplers


class SamplingDefaults(NamedTuple):
    """The sampling defaults of a model."""

    sampler: str  # a key of `solvers`
    steps: int
    solvers: Mapping[str, Solver | str]  # by sampler; or why the model does not have it
    guidance: float
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    guide_step: int = 0  # updates of the run's own earlier checkpoint that guides; 0 = classifier-free guidance
    threshold: float = 0.0
    batch_size: int = 1
    crop: str = "center"  # of images resized to the model's size: see `data.images.fit`
    concat_split: str | None = None  # whose degraded images are the default inputs of concat conditioning

    def solver(self, sampler: str) -> Solver:
        """The settings of a sampler; raises InputError if the model does not have it."""
        solver = self.solvers.get(sampler, f"sampler must be one of {', '.join(self.solvers)}, got {sampler!r}")
        if isinstance(solver, str):
            raise InputError(solver)
        return solver


class Origin(NamedTuple):
    """The origin of a model, for records and export; neither sampling nor training depends on it."""

    path: Path | None = None
    step: int = 0  # updates of the denoiser
    ema_sigma_rel: float | None = None  # length of the power function average that the parameters are; None: the EMA
    class_names: tuple[str, ...] = ()  # () without classes
    other_class_names: tuple[str, ...] = ()  # of the further classes of a fine-tuned model, without data
    config: ConfigDict | None = None  # of the run that trained it
    data: Mapping[str, Any] = MappingProxyType({})  # the run's data.json
    fingerprint: str = ""  # of the weights' files: equal means the same parameters
    hashed: tuple[str, ...] = ()  # part of the fingerprint in recipes, with the parameters
    pipeline: str = ""  # the class of diffusers that samples from such a model
    schedulers: Mapping[str, Mapping[str, Any]] = MappingProxyType({})  # component -> its scheduler_config.json


@dataclass(frozen=True)
class LatentDiffusion:
    """A latent diffusion model (Rombach 2022) without its parameters: static, equal and hashed by value."""

    denoiser: nn.Module  # apply({"params": p}, z_t and concatenated channels, t, **cond) -> prediction
    first_stage: FirstStage  # the autoencoder; the identity for diffusion on pixels
    conditioning: Conditioning
    concat: ConcatConditioning | None  # conditioning by further input channels of the denoiser
    process: Process  # the forward process of the training
    prediction: str  # a key of `prediction.PREDICTIONS`
    image_shape: tuple[int, int, int]  # (H, W, C)
    defaults: SamplingDefaults = field(compare=False)
    origin: Origin = field(default=Origin(), compare=False)
    edm: EDM | None = None  # noise levels of an EDM model, whose denoiser is conditioned on c_noise instead of t
    mean_flow: bool = False  # whether the denoiser predicts the average velocity over an interval (Geng 2025)
    time_offset: int = 0  # the denoiser is conditioned on t + this: 1 of diffusers' flow models, T s = t + 1

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of one example's latents."""
        height, width, _ = self.image_shape
        factor, concat_channels = self.first_stage.downsampling, self.concat.channels if self.concat else 0
        return height // factor, width // factor, self.denoiser.in_channels - concat_channels

    @property
    def size_multiple(self) -> int:
        """The number of pixels that height and width of images are multiples of: a latent's side, or a patch's."""
        return self.first_stage.downsampling * getattr(self.denoiser, "patch_size", 1)

    @property
    def learned_variance(self) -> bool:
        """Whether the denoiser predicts the variance of the reverse process too (Nichol 2021)."""
        return self.denoiser.out_channels == 2 * self.latent_shape[-1]

    @property
    def sigma_data(self) -> float:
        """The standard deviation by which an EDM model's latents are divided, in params["scale"]; 1 of all others."""
        return 1.0 if self.edm is None else self.edm.sigma_data

    @property
    def guidance_dim(self) -> int | None:
        """The width of the embedded guidance scale with which the denoiser is conditioned, None if it is not."""
        return self.denoiser.time_cond_proj_dim if isinstance(self.denoiser, UNet) and not self.mean_flow else None

    @property
    def num_bins(self) -> int | None:
        """The number of values of each z0 in pixel space, 256; latents are continuous: None."""
        return 256 if self.first_stage.module is None else None

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names, in the order of the labels; () without classes."""
        return self.origin.class_names

    @property
    def dtype(self) -> str:
        """The dtype of the computation."""
        return jnp.dtype(self.denoiser.dtype).name

    def at_size(self, size: tuple[int, int]) -> "LatentDiffusion":
        """The model for images of this (height, width), multiples of `size_multiple`: all parts take any such size."""
        return replace(self, image_shape=(*size, self.image_shape[-1]))


def apply_denoiser(
    model: LatentDiffusion, params: Params, z_t: jax.Array, t: jax.Array, cond: dict[str, Any], **options: Any
) -> Any:
    """The output of the denoiser, [B, h, w, c] float32, or 2c with a learned variance; called here only.

    Of noised latents z_t [B, h, w, c] and timesteps t [B], perhaps fractional. `cond` has the denoiser's arguments of
    `model.conditioning.encode`, "concat" [B, h, w, k] of `model.concat`, "guidance" [B] of a model with `guidance_dim`,
    by default 1, no guidance, and of MeanFlow "interval" [B], by default 0. `options` are those of Flax' `apply`, such
    as capture_intermediates, with which it returns more.
    """
    arguments = {name: value for name, value in cond.items() if name not in ("concat", "guidance", "interval")}
    if model.guidance_dim is not None:
        scale = cond.get("guidance", jnp.ones(len(z_t)))
        arguments["timestep_cond"] = guidance_embedding(scale, model.guidance_dim)
    if model.mean_flow:
        interval = cond.get("interval", jnp.zeros(len(z_t)))
        arguments["timestep_cond"] = interval_embedding(interval, model.denoiser.time_cond_proj_dim)
        t = FLOW_TIME * (t + 1) / len(model.process)
    unet_input = jnp.concatenate([z_t, cond["concat"]], axis=-1) if "concat" in cond else z_t
    if model.edm is not None or model.time_offset:
        t = model.edm.c_noise(t) if model.edm else t + model.time_offset
    return model.denoiser.apply({"params": params["denoiser"]}, unet_input, t, **arguments, **options)


def encode_images(model: LatentDiffusion, params: Params, images: jax.Array) -> jax.Array:
    """The latents z [B, h, w, c] of images uint8 [B, H, W, C]: the mode of the posterior."""
    raw = model.first_stage.mode(model.first_stage.encode(params["first_stage"], to_pixels(images)))
    return to_latents(raw, params["shift"], params["scale"])


def decode_latents(model: LatentDiffusion, params: Params, z: jax.Array) -> jax.Array:
    """Pixels x [B, H, W, C] in [-1, 1] of latents z [B, h, w, c]."""
    return model.first_stage.decode(params["first_stage"], from_latents(z, params["shift"], params["scale"]))


def stored(params: Params) -> Params:
    """The parameters under the names of the first version, for hashes and checkpoints."""
    return {STORED_NAMES.get(name, name): tree for name, tree in params.items()}


def fingerprint(model: LatentDiffusion, params: Params) -> str:
    """A hash of all parameters, for recipes: equal means the same model."""
    return content_hash(stored(params), *model.origin.hashed)
