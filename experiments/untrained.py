"""Untrained latent diffusion models, for measurements that do not depend on the parameters (speed, memory)."""

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

CLASSES = tuple(map(str, range(10)))  # of Fashion-MNIST


class DiffusionStart(NamedTuple):
    """The diffusion stage, its initial state and its frozen parameters: everything but the batch of the first step."""

    stage: DiffusionStage
    state: TrainState
    frozen: Params


def untrained_model(config: ConfigDict, rng: jax.Array) -> tuple[LatentDiffusion, Params]:
    """A config's model with random parameters, without latent scale and without parameters of the first stage."""
    model = from_config(config, CLASSES)
    params = {"first_stage": {}, **identity_scale(model.latent_shape[-1])}
    return model, params | jax.jit(partial(init_params, model))(rng)


def diffusion_start(config: ConfigDict, rng: jax.Array) -> DiffusionStart:
    """The start of a config's diffusion stage, on pixels or cached latents."""
    model, params = untrained_model(config, rng)
    trainable = trainable_of(config, model)
    stage = make_diffusion_stage(model, trainable, config)
    frozen = trainable.frozen(params) | {"table": model.conditioning.table()}
    return DiffusionStart(stage, jax.jit(stage.init)(rng, params), frozen)
