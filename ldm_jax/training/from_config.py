"""Training stages from config fields."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from ldm_jax.models.clip_vision import CLIP
from ldm_jax.models.discriminator import PatchDiscriminator
from ldm_jax.models.perceptual import LPIPS
from ldm_jax.pipeline.from_config import build_autoencoder, build_classifier
from ldm_jax.pipeline.model import LatentDiffusion
from ldm_jax.pipeline.trainable import Trainable
from ldm_jax.training.autoencoder import AutoencoderStage, LossWeights
from ldm_jax.training.classifier import ClassifierStage
from ldm_jax.training.clip import CLIPStage
from ldm_jax.training.diffusion import DiffusionStage
from ldm_jax.training.state import AdamW


def make_autoencoder_stage(config: ConfigDict) -> AutoencoderStage:
    """Stage 1 of the config."""
    autoencoder, channels, loss = config.autoencoder, config.data.channels, config.autoencoder.loss
    adamw = adamw_of(autoencoder)
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
        flip=config.data.flip,
        adamw=adamw,
        discriminator_adamw=adamw._replace(learning_rate=autoencoder.discriminator.learning_rate),
        ema_decay=autoencoder.ema_decay,
    )


def make_diffusion_stage(model: LatentDiffusion, trainable: Trainable, config: ConfigDict) -> DiffusionStage:
    """Stage 2 of the config: training of these parameters of a model."""
    diffusion = config.diffusion
    return DiffusionStage(
        model=model,
        trainable=trainable,
        weighting=diffusion.weighting,
        snr_gamma=diffusion.snr_gamma,
        label_dropout=diffusion.label_dropout,
        vlb_weight=diffusion.vlb_weight,
        flip=config.data.flip,
        adamw=adamw_of(diffusion),
        ema_decay=diffusion.ema_decay,
    )


def make_classifier_stage(model: LatentDiffusion, num_classes: int, config: ConfigDict) -> ClassifierStage:
    """The stage of the config's classifier, on a model's noisy latents."""
    return ClassifierStage(
        model=model,
        classifier=build_classifier(config, num_classes),
        flip=config.data.flip,
        adamw=adamw_of(config.classifier),
        ema_decay=config.classifier.ema_decay,
    )


def make_clip_stage(clip: CLIP, config: ConfigDict) -> CLIPStage:
    """The stage that trains both encoders."""
    return CLIPStage(
        clip=clip,
        flip=config.data.flip,
        max_shift=config.clip.max_shift,
        max_zoom=config.clip.max_zoom,
        adamw=adamw_of(config.clip),
        ema_decay=config.clip.ema_decay,
    )


def adamw_of(stage: ConfigDict) -> AdamW:
    """The optimizer in the section of a stage."""
    return AdamW(**{name: stage[name] for name in AdamW._fields})
