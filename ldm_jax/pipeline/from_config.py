"""From config fields to data, modules, schedules and stages with plain keyword arguments."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from ldm_jax.config.fields import SCHEDULE
from ldm_jax.diffusion.guidance import ClassLogProbabilities, class_log_probabilities
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.schedules import make_process
from ldm_jax.models.autoencoder import AutoencoderKL, VQModel
from ldm_jax.models.classifier import NoisyClassifier
from ldm_jax.models.clip import CLIPTextEncoder
from ldm_jax.models.clip_vision import CLIP, CLIPImageEncoder
from ldm_jax.models.concat_conditioning import MapCondition, make_map_condition
from ldm_jax.models.conditioning import ClassEmbedder
from ldm_jax.models.first_stage import FirstStage, make_first_stage
from ldm_jax.models.unet import UNet


def build_process(config: ConfigDict) -> Process:
    """The noise schedule of the config."""
    return make_process(**{name: config.diffusion[name] for name in SCHEDULE})


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


def build_classify(config: ConfigDict, num_classes: int) -> ClassLogProbabilities:
    """(params, z_t, t) -> log p(y | z_t) of the config's classifier."""
    return class_log_probabilities(build_classifier(config, num_classes).apply, build_process(config))


def build_clip(config: ConfigDict, *, vocab_size: int, max_length: int, eos_token_id: int) -> CLIP:
    """Both encoders of the config, for ids of a tokenizer with `vocab_size` tokens and texts of `max_length`."""
    fields, dtype = config.clip, jnp.dtype(config.dtype)
    text = CLIPTextEncoder(
        vocab_size=vocab_size,
        hidden_size=fields.text_width,
        intermediate_size=4 * fields.text_width,
        num_hidden_layers=fields.text_layers,
        num_attention_heads=fields.text_heads,
        max_position_embeddings=max_length,
        eos_token_id=eos_token_id,
        projection_dim=fields.projection_dim,
        dtype=dtype,
    )
    image = CLIPImageEncoder(
        image_size=config.data.image_size,
        patch_size=fields.patch_size,
        num_channels=config.data.channels,
        hidden_size=fields.image_width,
        intermediate_size=4 * fields.image_width,
        num_hidden_layers=fields.image_layers,
        num_attention_heads=fields.image_heads,
        projection_dim=fields.projection_dim,
        dtype=dtype,
    )
    return CLIP(text, image)
