"""From config fields to data, modules, schedules and stages with plain keyword arguments."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from ldm_jax.data.datasets import Dataset, load_buckets, load_dataset
from ldm_jax.diffusion.classification import Classify, make_classify
from ldm_jax.diffusion.schedules import Schedule, make_schedule
from ldm_jax.evaluation.bound import Bound, make_bound
from ldm_jax.first_stage import FirstStage, make_first_stage
from ldm_jax.map_condition import MapCondition, make_map_condition
from ldm_jax.models.autoencoder import AutoencoderKL, VQModel
from ldm_jax.models.classifier import NoisyClassifier
from ldm_jax.models.conditioning import ClassEmbedder
from ldm_jax.models.discriminator import PatchDiscriminator
from ldm_jax.models.perceptual import LPIPS
from ldm_jax.models.unet import UNet
from ldm_jax.training.autoencoder import AutoencoderStage, make_autoencoder_stage
from ldm_jax.training.classifier import ClassifierStage, make_classifier_stage
from ldm_jax.training.diffusion import DiffusionStage, labelled, make_diffusion_stage
from ldm_jax.training.state import make_optimizer

# The fields of config.diffusion that the noise schedule is made of.
SCHEDULE = ("schedule", "timesteps", "beta_start", "beta_end", "zero_terminal_snr")


def load_split(config: ConfigDict, split: str) -> Dataset:
    """One split of the config's data set; see `load_dataset` for the errors."""
    return load_dataset(config.data.name, split, **_data_fields(config))


def load_train_buckets(config: ConfigDict) -> list[Dataset]:
    """The training split in buckets of the pictures' own proportions; see `load_dataset` for the errors."""
    data = config.data
    return load_buckets(data.name, data.train_split, step=data.bucket_step, **_data_fields(config))


def _data_fields(config: ConfigDict) -> dict[str, Any]:
    data = config.data
    keys = ("image_key", "label_key", "segments_key", "caption_key", "kind_key")
    same = ("image_size", "channels", "crop", *keys)
    return {
        "data_dir": data.dir,
        "manual_dir": data.path or None,
        "memory_limit": int(data.memory_limit_gb * 2**30),
        **{name: data[name] for name in same},
    }


def build_schedule(config: ConfigDict) -> Schedule:
    """The noise schedule of the config."""
    diffusion = config.diffusion
    return make_schedule(
        diffusion.schedule,
        diffusion.timesteps,
        beta_start=diffusion.beta_start,
        beta_end=diffusion.beta_end,
        zero_terminal_snr=diffusion.zero_terminal_snr,
    )


def build_autoencoder(config: ConfigDict) -> nn.Module | None:
    """The autoencoder, or None for diffusion on pixels."""
    autoencoder = config.autoencoder
    fields = {
        "in_channels": config.data.channels,
        "out_channels": config.data.channels,
        "latent_channels": autoencoder.latent_channels,
        "block_out_channels": autoencoder.block_out_channels,
        "layers_per_block": autoencoder.layers_per_block,
        "norm_num_groups": autoencoder.norm_num_groups,
        "mid_block_add_attention": autoencoder.mid_block_attention,
        "dtype": jnp.dtype(config.dtype),
    }
    if autoencoder.kind == "none":
        return None
    if autoencoder.kind == "vq":
        return VQModel(num_vq_embeddings=autoencoder.codebook_size, **fields)
    return AutoencoderKL(**fields)


def build_first_stage(config: ConfigDict) -> FirstStage:
    """The autoencoder's pure functions; those of pixel space keep x as it is."""
    return make_first_stage(build_autoencoder(config))


def picture_size(config: ConfigDict) -> tuple[int, int]:
    """(H, W) of the pictures: a run's are square, and have one number in its config; a diffusers model's have two."""
    size = config.data.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def latent_shape(config: ConfigDict) -> tuple[int, int, int]:
    """(h, w, c) of one example's latents."""
    height, width = picture_size(config)
    if config.autoencoder.kind == "none":
        return height, width, config.data.channels
    factor = downsampling(config)
    return height // factor, width // factor, config.autoencoder.latent_channels


def downsampling(config: ConfigDict) -> int:
    """How many pixels a latent is high and wide."""
    return 2 ** (len(config.autoencoder.block_out_channels) - 1) if config.autoencoder.kind != "none" else 1


def build_map_condition(config: ConfigDict) -> MapCondition | None:
    """The map that the UNet sees beside its latents, if the config has one."""
    concat = config.concat
    if concat.kind == "none":
        return None
    return make_map_condition(
        concat.kind,
        first_stage=build_first_stage(config),
        latent_shape=latent_shape(config),
        channels=config.data.channels,
        factor=concat.factor,
        segments=concat.num_segments,
    )


def build_unet(config: ConfigDict) -> UNet:
    """The denoising network on the config's latents."""
    unet, channels = config.unet, latent_shape(config)[-1]
    beside = build_map_condition(config)
    return UNet(
        in_channels=channels + (beside.channels if beside else 0),
        out_channels=2 * channels if config.diffusion.variance == "learned" else channels,
        block_out_channels=unet.block_out_channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in unet.attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(unet.attention)),
        mid_block_type="UNetMidBlock2DCrossAttn" if unet.attention[-1] else "UNetMidBlock2D",
        layers_per_block=unet.layers_per_block,
        attention_heads=unet.attention_heads,
        transformer_layers_per_block=unet.transformer_layers,
        cross_attention_dim=unet.context_dim,
        norm_num_groups=unet.norm_num_groups,
        dtype=jnp.dtype(config.dtype),
    )


def pixel_levels(config: ConfigDict) -> int | None:
    """How many values a number of z0 can take: 256 in pixel space; latents are continuous, None."""
    return 256 if config.autoencoder.kind == "none" else None


def build_conditioner(config: ConfigDict, num_classes: int) -> ClassEmbedder:
    """tau: labels -> context tokens. Unlabelled sets have num_classes 0: the null row alone."""
    return ClassEmbedder(num_classes, config.unet.context_dim, config.unet.context_tokens)


def build_tau(config: ConfigDict, num_classes: int) -> tuple[Callable[[Any, Any], dict[str, jax.Array]], int | None]:
    """(params, y) -> the arguments by which the UNet is told of y, and the y that stands for nothing."""
    conditioner = build_conditioner(config, num_classes)
    return lambda params, label: {"context": conditioner.apply({"params": params}, label)}, conditioner.null


def build_classifier(config: ConfigDict, num_classes: int) -> NoisyClassifier:
    """The classifier of the config's noised latents."""
    classifier = config.classifier
    return NoisyClassifier(
        num_classes=num_classes,
        block_out_channels=classifier.block_out_channels,
        attention=classifier.attention,
        layers_per_block=classifier.layers_per_block,
        attention_heads=classifier.attention_heads,
        norm_num_groups=classifier.norm_num_groups,
        dtype=jnp.dtype(config.dtype),
    )


def build_classify(config: ConfigDict, num_classes: int) -> Classify:
    """(params, z_t, t) -> log p(y | z_t) of the config's classifier."""
    return make_classify(build_classifier(config, num_classes).apply, build_schedule(config).alpha_bar)


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
        alpha_bar=build_schedule(config).alpha_bar,
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


def build_bound(config: ConfigDict, num_classes: int) -> Callable[[Any, dict[str, np.ndarray], int], Bound]:
    """The variational bound of a config's model (see `evaluation.bound.make_bound`)."""
    levels = pixel_levels(config)
    return make_bound(
        unet=build_unet(config),
        conditioner=build_conditioner(config, num_classes),
        first_stage=build_first_stage(config),
        alpha_bar=build_schedule(config).alpha_bar,
        prediction=config.diffusion.prediction,
        clip=1.0 if levels else float("inf"),
        levels=levels,
        batch_size=config.evaluation.batch_size,
        map_condition=build_map_condition(config),
    )


def build_classifier_stage(config: ConfigDict, num_classes: int) -> ClassifierStage:
    """The stage of the config's classifier."""
    return make_classifier_stage(
        classifier=build_classifier(config, num_classes),
        first_stage=build_first_stage(config),
        latent_shape=latent_shape(config),
        alpha_bar=build_schedule(config).alpha_bar,
        flip=config.data.flip,
        optimizer=make_optimizer(**optimizer_fields(config.classifier)),
        ema_decay=config.classifier.ema_decay,
    )


def optimizer_fields(stage: ConfigDict) -> dict[str, Any]:
    """The arguments of `make_optimizer` in the section of a stage."""
    names = ("steps", "learning_rate", "warmup_steps", "decay", "adam_b2", "weight_decay", "clip_norm")
    return {name: stage[name] for name in names}
