"""Training stages from config fields."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ldm_jax.data.datasets import Dataset
from ldm_jax.errors import InputError
from ldm_jax.models.clip_vision import CLIP
from ldm_jax.models.discriminator import PatchDiscriminator
from ldm_jax.models.first_stage import make_first_stage
from ldm_jax.models.perceptual import LPIPS
from ldm_jax.pipeline import from_config as pipeline_from_config
from ldm_jax.pipeline import model as pipeline_model
from ldm_jax.pipeline import upscaler
from ldm_jax.pipeline.base_model import Base
from ldm_jax.pipeline.from_config import (
    build_autoencoder,
    build_classifier,
    build_conditioner,
    build_first_stage,
    build_map_condition,
    build_process,
    build_unet,
    latent_shape,
    pixel_levels,
)
from ldm_jax.pipeline.trainable import (
    Captions,
    _learning,
    build_network,
    labelled,
    trained_shapes,
)
from ldm_jax.training.autoencoder import AutoencoderStage, make_autoencoder_stage
from ldm_jax.training.classifier import ClassifierStage, make_classifier_stage
from ldm_jax.training.clip import CLIPStage, make_clip_stage
from ldm_jax.training.diffusion import DiffusionStage, make_diffusion_stage
from ldm_jax.training.state import make_optimizer
from ldm_jax.training.text_embeddings import check_texts, numbered, tell_of


def check_data(config: ConfigDict, base: Base, train_set: Dataset) -> None:
    """Raises InputError if the model cannot be told of the data set's texts or classes, or has no place for LoRA."""
    where, classes = f"config.init_from={config.init_from}", base.model.classes
    if not jax.tree.leaves(trained_shapes(config, base)):
        raise InputError(f"config.lora.rank is {config.lora.rank}; {where} has no attention that LoRA could be of")
    if base.model.encoders:
        check_texts(config, base.model, base.params["conditioner"], numbered(train_set.captions).texts)
    if classes and not train_set.num_classes:
        raise InputError(f"{where} is a model of classes; {train_set.name} has none: see config.data.label_key")
    if classes and train_set.num_classes > classes.num_classes:
        raise InputError(
            f"{where} knows {classes.num_classes} classes; {train_set.name} has {train_set.num_classes}, which must be "
            "no more"
        )


def build_stage(config: ConfigDict, base: Base, captions: Captions) -> DiffusionStage:
    """Stage 2 from a model's parameters, on its own noise schedule and for its own kind of prediction."""
    diffusion, scheduler, upscales = config.diffusion, pipeline_model.scheduler_of(base.model), base.model.upscaling
    first_stage, latent_shape = make_first_stage(base.model.autoencoder), pipeline_from_config.latent_shape(config)
    return make_diffusion_stage(
        network=build_network(config, base, captions),
        map_condition=pipeline_model.map_condition_of(base.model, first_stage, latent_shape),
        augment=upscaler.make_augment(upscales) if upscales else None,
        first_stage=first_stage,
        latent_shape=latent_shape,
        process=scheduler.process,
        prediction=scheduler.prediction,
        weighting=diffusion.weighting,
        snr_gamma=diffusion.snr_gamma,
        label_dropout=diffusion.label_dropout,
        flip=config.data.flip,
        optimizer=make_optimizer(**optimizer_fields(diffusion)),
        ema_decay=diffusion.ema_decay,
    )


def frozen_arrays(config: ConfigDict, base: Base, captions: Captions, cache: Path) -> dict[str, Any]:
    """What the stage's steps need beside what they train: the first stage, "told" from `tell_of` and the "rows" of it
    that a class has, and the model itself beside its LoRA."""
    names = ("autoencoder", "shift", "scale", *(_learning(config, base) if config.lora.rank else ()))
    frozen = {name: base.params[name] for name in names}
    if base.model.encoders:
        frozen["told"] = tell_of(config, base.model, base.params["conditioner"], captions.texts, cache)
    return frozen | ({"rows": captions.rows} if captions.rows.shape[1] > 1 else {})


def build_clip_stage(config: ConfigDict, clip: CLIP) -> CLIPStage:
    """The stage that trains `clip`, from `build_clip`."""
    fields = config.clip
    return make_clip_stage(
        clip=clip,
        flip=config.data.flip,
        max_shift=fields.max_shift,
        max_zoom=fields.max_zoom,
        optimizer=make_optimizer(**optimizer_fields(fields)),
        ema_decay=fields.ema_decay,
    )


def build_lpips(config: ConfigDict) -> LPIPS | None:
    """The perceptual distance of stage 1, or None where its weight is 0."""
    loss = config.autoencoder.loss
    return LPIPS(loss.perceptual_net, loss.perceptual_size or None) if loss.perceptual else None


def build_autoencoder_stage(config: ConfigDict) -> AutoencoderStage:
    """Stage 1 of the config."""
    autoencoder, channels = config.autoencoder, config.data.channels
    adversary, optimizer = autoencoder.discriminator, optimizer_fields(autoencoder)
    discriminator = PatchDiscriminator(
        in_channels=channels,
        features=adversary.channels,
        layers=adversary.layers,
        norm_num_groups=autoencoder.norm_num_groups,
        dtype=jnp.dtype(config.dtype),
    )
    return make_autoencoder_stage(
        autoencoder=build_autoencoder(config),
        kind=autoencoder.kind,
        discriminator=discriminator if autoencoder.loss.adversarial else None,
        lpips=build_lpips(config),
        image_shape=(config.data.image_size, config.data.image_size, channels),
        weights=autoencoder.loss,
        perceptual_every=autoencoder.loss.perceptual_every,
        flip=config.data.flip,
        optimizer=make_optimizer(**optimizer),
        discriminator_optimizer=make_optimizer(**optimizer | {"learning_rate": adversary.learning_rate}),
        ema_decay=autoencoder.ema_decay,
    )


def build_diffusion_stage(config: ConfigDict, num_classes: int) -> DiffusionStage:
    """Stage 2 of the config."""
    diffusion, unet = config.diffusion, build_unet(config)
    return make_diffusion_stage(
        network=labelled(unet, build_conditioner(config, num_classes), (*latent_shape(config)[:2], unet.in_channels)),
        map_condition=build_map_condition(config),
        first_stage=build_first_stage(config),
        latent_shape=latent_shape(config),
        process=build_process(config),
        prediction=diffusion.prediction,
        weighting=diffusion.weighting,
        snr_gamma=diffusion.snr_gamma,
        label_dropout=diffusion.label_dropout,
        flip=config.data.flip,
        optimizer=make_optimizer(**optimizer_fields(diffusion)),
        ema_decay=diffusion.ema_decay,
        bound_weight=diffusion.bound_weight if diffusion.variance == "learned" else 0.0,
        levels=pixel_levels(config),
    )


def build_classifier_stage(config: ConfigDict, num_classes: int) -> ClassifierStage:
    """The stage of the config's classifier."""
    return make_classifier_stage(
        classifier=build_classifier(config, num_classes),
        first_stage=build_first_stage(config),
        latent_shape=latent_shape(config),
        process=build_process(config),
        flip=config.data.flip,
        optimizer=make_optimizer(**optimizer_fields(config.classifier)),
        ema_decay=config.classifier.ema_decay,
    )


def optimizer_fields(stage: ConfigDict) -> dict[str, Any]:
    """The arguments of `make_optimizer` in the section of a stage."""
    names = ("steps", "learning_rate", "warmup_steps", "decay", "adam_b2", "weight_decay", "clip_norm")
    return {name: stage[name] for name in names}
