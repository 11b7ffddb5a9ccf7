"""The trained parts of a run folder, read back: the averaged parameters, the autoencoder, the scale of its latents."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.errors import InputError
from ldm_jax.interop.modules import abstract_params
from ldm_jax.models.unet import UNet
from ldm_jax.pipeline import clip as pipeline_clip
from ldm_jax.pipeline import from_config as pipeline_from_config
from ldm_jax.pipeline.base_model import Base
from ldm_jax.pipeline.model import Pretrained
from ldm_jax.pipeline.scheduler_config import scheduler_config
from ldm_jax.run_folder.checkpoint import load_latest, subtree
from ldm_jax.runtime import files as runtime_files
from ldm_jax.runtime.files import content_hash

SCALE = "scale.json"  # beside the checkpoints of the autoencoder


def load_first_stage(path: Path, config: ConfigDict) -> dict[str, Any]:
    """{"autoencoder", "shift", "scale"} of a run folder; pixel space has no parameters, shift 0 and scale 1."""
    if config.autoencoder.kind == "none":
        channels = config.data.channels
        return {"autoencoder": {}, "shift": np.zeros(channels, np.float32), "scale": np.ones(channels, np.float32)}
    shift, scale, _ = load_scale(path)
    return {"autoencoder": load_autoencoder_params(path), "shift": shift, "scale": scale}


def load_autoencoder_params(path: Path) -> dict[str, Any]:
    """The averaged parameters of a run folder's autoencoder; raises InputError if it has none."""
    return subtree(load_latest(path / "autoencoder"), "ema_params/autoencoder")


def load_scale(path: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """The latents' shift and scale, each [c], of a run folder, and what they were measured on."""
    stored = runtime_files.read_json(path / "autoencoder" / SCALE, "shift", "scale", "measured_on")
    return np.asarray(stored["shift"], np.float32), np.asarray(stored["scale"], np.float32), stored["measured_on"]


def save_scale(path: Path, shift: np.ndarray, scale: np.ndarray, *, measured_on: str) -> None:
    """Stores the latents' shift and scale, each [c], with the autoencoder."""
    values = {"shift": shift.tolist(), "scale": scale.tolist(), "measured_on": measured_on}
    runtime_files.write_json(path / "autoencoder" / SCALE, values)


PIPELINE = "StableDiffusionPipeline"


def check(config: ConfigDict) -> None:
    """Raises InputError for a way of drawing that diffusers has not."""
    _, notes = scheduler_config(config)
    if notes:
        raise InputError(f"config.sampling: a model of texts draws as diffusers does. {notes[0]}")


def base_of(path: Path, config: ConfigDict, *, draw_unet: bool) -> Base:
    """What the run folder has beside the UNet, whose parameters are drawn at random, or zeros if they do not matter.

    Raises:
      InputError: the run folder lacks a part, or it does not fit the config.
    """
    found, first_stage = pipeline_clip.load(path, config), load_first_stage(path, config)
    encoder = found.clip.text.clone(projection_dim=None)  # what is said of each token, not of the whole text
    text = {name: tree for name, tree in found.params["text"].items() if name != "text_projection"}
    unet = pipeline_from_config.build_unet(config)
    model = Pretrained(
        pipeline=PIPELINE,
        unet=unet,
        autoencoder=pipeline_from_config.build_autoencoder(config),
        encoders=(encoder,),
        tokenizers=(found.tokenizer,),
        scheduler=scheduler_config(config)[0],
        zeros_for_nothing=False,
        tile=config.data.image_size,
        upscaling=None,
    )
    params = first_stage | {"conditioner": [text]}
    fingerprint = content_hash(params, config.dtype)
    return Base(model, params | {"unet": _drawn(unet, config) if draw_unet else _zeros(unet)}, fingerprint)


def _drawn(unet: UNet, config: ConfigDict) -> dict[str, Any]:
    """A UNet's parameters, as the config's seed draws them."""
    h, w, c = pipeline_from_config.latent_shape(config)
    z, t, context = jnp.zeros((1, h, w, c)), jnp.zeros(1, jnp.int32), jnp.zeros((1, 1, config.unet.context_dim))
    init = jax.jit(unet.init, compiler_options={"xla_backend_optimization_level": 0})  # run once, as in `loop.train`
    return jax.device_get(init(jax.random.fold_in(jax.random.key(config.seed), 1), z, t, context)["params"])


def _zeros(unet: UNet) -> dict[str, Any]:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract_params(unet))
