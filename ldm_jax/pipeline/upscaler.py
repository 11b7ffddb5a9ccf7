"""What the x4 upscaler of Stable Diffusion 2 has beside: the picture to enlarge is noised first, by a level it is told.

As in diffusers' StableDiffusionUpscalePipeline (0.42.1), after Ho 2022 (cascaded diffusion, section 4).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.forward import q_sample
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.random import low_resolution_noise, sample_keys
from ldm_jax.errors import InputError
from ldm_jax.interop import folder
from ldm_jax.interop.scheduler_config import scheduler_from_config

NOISE_LEVEL = 20  # unless one is told otherwise
MAX_NOISE_LEVEL = 350  # of a pipeline whose model_index.json does not say
SCALE = 0.08333  # of its latents; diffusers' pipeline takes it whatever the autoencoder's config says


class Upscaling(NamedTuple):
    """How the picture that is to be enlarged is noised."""

    process: Process
    max_noise_level: int
    scheduler: Mapping[str, Any]  # the scheduler_config.json that says so


def read(path: Path, settings: Mapping[str, Any], levels: int | None) -> Upscaling:
    """Of a pipeline's folder.

    Args:
      path: of the folder.
      settings: what its model_index.json says beside its components.
      levels: how many noise levels the UNet can be told: its num_class_embeds.

    Raises:
      InputError: no such scheduler, or a highest level that it or the UNet does not know.
    """
    scheduler = folder.component_config(path, "low_res_scheduler")
    return make(scheduler, settings.get("max_noise_level", MAX_NOISE_LEVEL), levels, where=path / folder.INDEX)


def make(scheduler: Mapping[str, Any], highest: Any, levels: int | None, *, where: Path) -> Upscaling:
    """By a scheduler's config and the highest level; errors, which name the file `where`, as in `read`."""
    process = scheduler_from_config(scheduler).process
    known = min(levels or 0, len(process))
    if not isinstance(highest, int) or not 0 <= highest < known:
        raise InputError(
            f"{where}: max_noise_level is {highest}; the UNet's num_class_embeds and low_res_scheduler know {known} "
            "levels, from 0"
        )
    return Upscaling(process, highest, scheduler)


def noised(maps: np.ndarray, noise_level: int, upscaling: Upscaling, seed: int, num: int) -> np.ndarray:
    """The small picture, as each of `num` samples is told of it.

    Args:
      maps: [1, h, w, C] float32 in [-1, 1].
      noise_level: from 0 to `upscaling.max_noise_level`.
      seed, num: noise k is that of sample k of this seed.

    Returns:
      [num, h, w, C] float32.
    """
    noise = low_resolution_noise(sample_keys(np.uint32(seed), np.arange(num)), maps.shape[1:])
    return np.asarray(q_sample(jnp.asarray(maps), np.full(num, noise_level), noise, upscaling.process))


def make_augment(upscaling: Upscaling) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]:
    """What training does to the small pictures: `augment(maps [B, h, w, C], keys [B])`, see `training.diffusion`.

    Each is noised by a level of its own, any from 0 to the highest alike, which the UNet is told as its class.
    """

    def augment(maps: jax.Array, keys: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        highest = upscaling.max_noise_level
        key_level, key_noise = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        level = jax.vmap(lambda key: jax.random.randint(key, (), 0, highest + 1))(key_level)
        noise = low_resolution_noise(key_noise, maps.shape[1:])
        return q_sample(maps, level, noise, upscaling.process), {"class_labels": level}

    return augment
