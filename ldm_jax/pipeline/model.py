"""A latent diffusion model in memory: one shape, whether it comes from a config, a run folder or another library.

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

from ldm_jax.diffusion.process import Process
from ldm_jax.errors import InputError
from ldm_jax.models.concat_conditioning import ConcatConditioning
from ldm_jax.models.conditioning import Conditioning
from ldm_jax.models.first_stage import FirstStage, from_latents, to_latents
from ldm_jax.models.pixels import to_pixels
from ldm_jax.run_folder.checkpoint import STORED_NAMES
from ldm_jax.runtime.files import content_hash

Params = dict[str, Any]


class Solver(NamedTuple):
    """How a sampler runs on a model unless a user says otherwise."""

    process: Process  # the model's own but where diffusers' class changes its end
    options: Mapping[str, Any]  # arguments of `solvers.make_table` beyond the number of steps
    clip_sample_range: float = np.inf  # z0_hat of latents is kept within [-range, range]
    scaled_initial_noise: bool = False  # z_T = sigma_T eps, diffusers' init_noise_sigma of k-diffusion's samplers


class SamplingDefaults(NamedTuple):
    """How a model is sampled unless a user says otherwise."""

    sampler: str
    steps: int
    solvers: Mapping[str, Solver | str]  # sampler -> how it runs, or why it cannot
    guidance: float
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    threshold: float = 0.0
    batch_size: int = 1
    crop: str = "center"  # how images are brought to the model's size: see `data.images.fit`

    def solver(self, sampler: str) -> Solver:
        """How this sampler runs on the model; raises InputError if it cannot."""
        found = self.solvers.get(sampler, f"sampler must be one of {', '.join(self.solvers)}, got {sampler!r}")
        if isinstance(found, str):
            raise InputError(found)
        return found


class Origin(NamedTuple):
    """Where a model comes from: what is recorded and exported, and nothing that sampling or training depends on."""

    path: Path | None = None
    step: int = 0  # updates behind the denoiser
    class_names: tuple[str, ...] = ()  # () without classes
    other_class_names: tuple[str, ...] = ()  # of the further classes of a fine-tuned model, without data
    config: ConfigDict | None = None  # of the run that trained it, with its data set; None: it has none
    fingerprint: str = ""  # of the weights' files: equal means the same parameters
    hashed: tuple[str, ...] = ()  # part of the fingerprint in recipes, with the parameters
    pipeline: str = ""  # the class of diffusers that samples from such a model
    schedulers: Mapping[str, Mapping[str, Any]] = MappingProxyType({})  # component -> its scheduler_config.json


@dataclass(frozen=True)
class LatentDiffusion:
    """A latent diffusion model (Rombach 2022) without its parameters: static, equal and hashed by value.

    Attributes:
      denoiser: a Flax module: apply({"params": p}, z_t or z_t with concatenated channels, t, **cond) -> prediction.
      first_stage: the autoencoder; the identity for diffusion on pixels.
      conditioning: on classes, texts or nothing.
      concat: further input channels of the denoiser, if it has such.
      process: the forward process that the denoiser was trained with.
      prediction: what it predicts, a key of `prediction.PREDICTIONS`.
      image_shape: (H, W, C).
      defaults: how it is sampled.
      origin: where it comes from.
    """

    denoiser: nn.Module
    first_stage: FirstStage
    conditioning: Conditioning
    concat: ConcatConditioning | None
    process: Process
    prediction: str
    image_shape: tuple[int, int, int]
    defaults: SamplingDefaults = field(compare=False)
    origin: Origin = field(default=Origin(), compare=False)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of one example's latents."""
        height, width, _ = self.image_shape
        factor = self.first_stage.downsampling
        concat = self.concat.channels if self.concat else 0
        return height // factor, width // factor, self.denoiser.in_channels - concat

    @property
    def learned_variance(self) -> bool:
        """Whether the denoiser predicts the variance of the reverse process too (Nichol 2021)."""
        return self.denoiser.out_channels == 2 * self.latent_shape[-1]

    @property
    def num_bins(self) -> int | None:
        """How many values a number of z0 can take: 256 in pixel space; latents are continuous, None."""
        return 256 if self.first_stage.module is None else None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the classes, in the order of their labels; () without classes."""
        return self.origin.class_names

    @property
    def dtype(self) -> str:
        """Of the computation."""
        return jnp.dtype(self.denoiser.dtype).name

    def at_size(self, size: tuple[int, int]) -> "LatentDiffusion":
        """The model for images of this (height, width): every part of it is convolutional."""
        return replace(self, image_shape=(*size, self.image_shape[-1]))


def apply_denoiser(
    model: LatentDiffusion, params: Params, z_t: jax.Array, t: jax.Array, cond: dict[str, Any], **options: Any
) -> Any:
    """The one place where the denoiser is called: in training, sampling and likelihood.

    Args:
      model, params: the model; only params["denoiser"] is used.
      z_t: [B, h, w, c] noised latents.
      t: [B] timesteps, perhaps fractional.
      cond: the denoiser's arguments from `model.conditioning.encode`, and "concat" [B, h, w, k] of `model.concat`.
      options: of Flax' `apply`, such as capture_intermediates.

    Returns:
      [B, h, w, c], or 2c with a learned variance, float32; with such options what Flax returns.
    """
    arguments = {name: value for name, value in cond.items() if name != "concat"}
    denoiser_input = jnp.concatenate([z_t, cond["concat"]], axis=-1) if "concat" in cond else z_t
    return model.denoiser.apply({"params": params["denoiser"]}, denoiser_input, t, **arguments, **options)


def encode_images(model: LatentDiffusion, params: Params, images: jax.Array) -> jax.Array:
    """The most likely latents z [B, h, w, c] of images uint8 [B, H, W, C]."""
    raw = model.first_stage.mode(model.first_stage.encode(params["first_stage"], to_pixels(images)))
    return to_latents(raw, params["shift"], params["scale"])


def decode_latents(model: LatentDiffusion, params: Params, z: jax.Array) -> jax.Array:
    """Pixels x [B, H, W, C] in [-1, 1] of latents z [B, h, w, c]."""
    return model.first_stage.decode(params["first_stage"], from_latents(z, params["shift"], params["scale"]))


def stored(params: Params) -> Params:
    """The parameters under the names that hashes and checkpoints have had since the first version."""
    return {STORED_NAMES.get(name, name): tree for name, tree in params.items()}


def fingerprint(model: LatentDiffusion, params: Params) -> str:
    """A hash of all parameters: equal means the same model. Recipes carry it."""
    return content_hash(stored(params), *model.origin.hashed)
