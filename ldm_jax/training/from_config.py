"""Training stages from a config."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from ldm_jax.diffusion.timesteps import TimestepDistribution
from ldm_jax.models.clip_vision import CLIP
from ldm_jax.models.discriminator import PatchDiscriminator
from ldm_jax.models.perceptual import LPIPS
from ldm_jax.pipeline.from_config import build_autoencoder, build_classifier
from ldm_jax.pipeline.model import LatentDiffusion
from ldm_jax.pipeline.trainable import Trainable
from ldm_jax.training.autoencoder import AutoencoderStage, LossWeights
from ldm_jax.training.classifier import ClassifierStage
from ldm_jax.training.clip import CLIPStage
from ldm_jax.training.consistency import ConsistencyStage
from ldm_jax.training.diffusion import DiffusionStage
from ldm_jax.training.mean_flow import MeanFlowStage
from ldm_jax.training.optimizer import Optimization

# Each objective of the diffusion stage; but for the first, a section of the config has its fields.
OBJECTIVES = {"diffusion": DiffusionStage, "mean_flow": MeanFlowStage, "consistency": ConsistencyStage}


def make_autoencoder_stage(config: ConfigDict) -> AutoencoderStage:
    """The training stage of the config's autoencoder."""
    autoencoder, channels, loss = config.autoencoder, config.data.channels, config.autoencoder.loss
    training = _training_fields(config, "autoencoder")
    discriminator = PatchDiscriminator(
        in_channels=channels,
        features=autoencoder.discriminator.channels,
        layers=autoencoder.discriminator.layers,
        norm_num_groups=autoencoder.norm_num_groups,
        dtype=jnp.dtype(config.dtype),
    )
    return AutoencoderStage(
        autoencoder=build_autoencoder(config),
        discriminator=discriminator if loss.adversarial else None,
        lpips=LPIPS(loss.perceptual_net, loss.perceptual_size or None) if loss.perceptual else None,
        weights=LossWeights(**{name: loss[name] for name in LossWeights._fields}),
        perceptual_every=loss.perceptual_every,
        image_shape=(config.data.image_size, config.data.image_size, channels),
        discriminator_optimization=training["optimization"]._replace(
            optimizer="adamw", learning_rate=autoencoder.discriminator.learning_rate
        ),
        **training,
    )


def autoencoder_terms(config: ConfigDict, step: int) -> dict[str, bool]:
    """The loss terms of a step of the autoencoder's training that start late, as arguments of its `step`."""
    loss = config.autoencoder.loss
    return {name: loss[name] > 0 and step >= loss[f"{name}_start"] for name in ("perceptual", "adversarial")}


def make_diffusion_stage(model: LatentDiffusion, trainable: Trainable, config: ConfigDict) -> DiffusionStage:
    """The stage that trains the `trainable` parameters of a model."""
    if config.parallel.remat:
        model = replace(model, denoiser=model.denoiser.clone(remat=True))
    names = ("weighting", "snr_gamma", "label_dropout", "vlb_weight", "ema_sigma_rels")
    loss = {name: config.diffusion[name] for name in names}
    fields = {name: config.diffusion[f"timestep_{name}"] for name in ("mean", "std", "shift")}
    timesteps = TimestepDistribution(config.diffusion.timestep_sampling, **fields)
    objective = config.diffusion.objective
    of_objective = {} if objective == "diffusion" else dict(config[objective])
    fields = loss | of_objective | _training_fields(config, "diffusion")
    return OBJECTIVES[objective](model, trainable, timesteps=timesteps, **fields)


def make_classifier_stage(model: LatentDiffusion, num_classes: int, config: ConfigDict) -> ClassifierStage:
    """The training stage of the config's classifier of a model's noisy latents."""
    return ClassifierStage(model, build_classifier(config, num_classes), **_training_fields(config, "classifier"))


def make_clip_stage(clip: CLIP, config: ConfigDict) -> CLIPStage:
    """The stage that trains both encoders of a CLIP."""
    augmentation = {"max_shift": config.clip.max_shift, "max_zoom": config.clip.max_zoom}
    return CLIPStage(clip, **augmentation, **_training_fields(config, "clip"))


def _training_fields(config: ConfigDict, stage: str) -> dict[str, Any]:
    """The fields that all stages have."""
    optimization = Optimization(**{name: config[stage][name] for name in Optimization._fields})
    fields = {"flip": config.data.flip, "optimization": optimization, "ema_decay": config[stage].ema_decay}
    return fields | {"accumulate": config.parallel.accumulate}
