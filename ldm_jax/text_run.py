"""A run of ours that is told of texts: Stable Diffusion in small, of the autoencoder and the CLIP that it has trained.

Both are frozen parts of a model whose UNet is then trained as if that were fine-tuned, from what is drawn at random; so
prompts, drawing and export are those of other people's models, and diffusers draws the same with it.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import builders, clip_run, run_parts
from ldm_jax.diffusion_scheduler import scheduler_config
from ldm_jax.errors import InputError
from ldm_jax.finetune import Base
from ldm_jax.interop.modules import abstract_params
from ldm_jax.models.unet import UNet
from ldm_jax.pretrained import Pretrained
from ldm_jax.run_folder import content_hash

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
    found, first_stage = clip_run.load(path, config), run_parts.load_first_stage(path, config)
    encoder = found.clip.text.clone(projection_dim=None)  # what is said of each token, not of the whole text
    text = {name: tree for name, tree in found.params["text"].items() if name != "text_projection"}
    unet = builders.build_unet(config)
    model = Pretrained(
        pipeline=PIPELINE,
        unet=unet,
        autoencoder=builders.build_autoencoder(config),
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
    h, w, c = builders.latent_shape(config)
    z, t, context = jnp.zeros((1, h, w, c)), jnp.zeros(1, jnp.int32), jnp.zeros((1, 1, config.unet.context_dim))
    init = jax.jit(unet.init, compiler_options={"xla_backend_optimization_level": 0})  # run once, as in `loop.train`
    return jax.device_get(init(jax.random.fold_in(jax.random.key(config.seed), 1), z, t, context)["params"])


def _zeros(unet: UNet) -> dict[str, Any]:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract_params(unet))
