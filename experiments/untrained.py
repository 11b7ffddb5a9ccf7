"""Latent diffusion before it is trained: for what does not depend on what has been learned."""

from functools import partial
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from ldm_jax.pipeline.from_config import from_config, identity_scale, init_params
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.pipeline.trainable import trainable_of
from ldm_jax.training.diffusion import DiffusionStage
from ldm_jax.training.from_config import make_diffusion_stage
from ldm_jax.training.state import TrainState

CLASSES = tuple(map(str, range(10)))  # as many as Fashion-MNIST has


class DiffusionStart(NamedTuple):
    """Everything that the first step of stage 2 needs beside a batch."""

    stage: DiffusionStage
    state: TrainState
    frozen: Params


def untrained(config: ConfigDict, rng: jax.Array) -> tuple[LatentDiffusion, Params]:
    """A config's model with a random denoiser, latents that are not scaled, and no parameters of its first stage."""
    model = from_config(config, CLASSES)
    params = {"first_stage": {}, **identity_scale(model.latent_shape[-1])}
    return model, params | jax.jit(partial(init_params, model))(rng)


def diffusion_start(config: ConfigDict, rng: jax.Array) -> DiffusionStart:
    """The start of a config's stage 2, on pixels or on cached latents."""
    model, params = untrained(config, rng)
    trainable = trainable_of(config, model)
    stage = make_diffusion_stage(model, trainable, config)
    frozen = trainable.frozen(params) | {"table": model.conditioning.table()}
    return DiffusionStart(stage, jax.jit(stage.init)(rng, params), frozen)
