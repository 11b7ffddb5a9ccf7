"""diffusers' JSON configs -> our modules, and back. Which values are supported is told by `config_fields`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import Array

from ldm_jax.errors import InputError
from ldm_jax.interop.config_fields import class_name, defaults, modern_block, read_fields
from ldm_jax.models.autoencoder import AutoencoderKL, VQModel
from ldm_jax.models.clip import CLIPTextEncoder
from ldm_jax.models.layers import Dtype
from ldm_jax.models.unet import Added, UNet
from ldm_jax.models.unet2d import UNet2D

VERSION = "0.42.1"  # of diffusers, whose defaults and names these are

UNETS = ("UNet2DConditionModel", "UNet2DModel")
AUTOENCODERS = ("AutoencoderKL", "VQModel")

# The fields that have one name and one meaning on both sides.
BOTH_UNETS = (
    "in_channels", "out_channels", "block_out_channels", "mid_block_type", "norm_num_groups", "flip_sin_to_cos",
    "freq_shift", "dropout",
)  # fmt: skip
SAME = {
    "UNet2DConditionModel": (
        *BOTH_UNETS, "transformer_layers_per_block", "only_cross_attention", "use_linear_projection",
        "num_class_embeds", "addition_embed_type",
    ),
    "UNet2DModel": (*BOTH_UNETS, "layers_per_block", "attention_head_dim", "add_attention"),
    "AutoencoderKL": (
        "in_channels", "out_channels", "block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups",
        "mid_block_add_attention", "use_quant_conv", "use_post_quant_conv",
    ),
    "VQModel": (
        "in_channels", "out_channels", "block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups",
        "mid_block_add_attention", "num_vq_embeddings", "vq_embed_dim",
    ),
}  # fmt: skip

# These go with addition_embed_type; diffusers uses the second for class embeddings too, which are refused.
ADDITION = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")


def unet_from_config(config: Mapping[str, Any], *, dtype: Dtype = None) -> UNet | UNet2D:
    """The network of a UNet2DConditionModel's or UNet2DModel's config.json.

    Args:
      config: the parsed JSON; absent fields have diffusers' defaults.
      dtype: type of the computation.

    Raises:
      InputError: for another class, or the first field whose value is not supported.
    """
    name = class_name(config, UNETS)
    fields = read_fields(config, name)
    ours = {field: fields[field] for field in SAME[name]}
    for types in ("down_block_types", "up_block_types"):
        ours[types] = tuple(map(modern_block, fields[types]))
    if name == "UNet2DModel":
        return UNet2D(**ours, dtype=dtype)
    if fields["addition_embed_type"] is not None:
        ours |= {field: fields[field] for field in ADDITION}
    return UNet(
        **ours,
        layers_per_block=_one(fields["layers_per_block"]),
        cross_attention_dim=_one(fields["cross_attention_dim"]),
        # A slip that diffusers keeps for the sake of old files: attention_head_dim is the NUMBER of heads.
        attention_heads=fields["num_attention_heads"] or fields["attention_head_dim"],
        dtype=dtype,
    )


def config_from_unet(unet: UNet | UNet2D, sample_size: int) -> dict[str, Any]:
    """The inverse of `unet_from_config`: JSON for diffusers, with the height and width of the latents as a hint."""
    name = "UNet2DConditionModel" if isinstance(unet, UNet) else "UNet2DModel"
    same = (*SAME[name], "down_block_types", "up_block_types")
    fields = {field: getattr(unet, field) for field in same} | {"sample_size": sample_size}
    if isinstance(unet, UNet):
        fields |= {field: getattr(unet, field) for field in (*ADDITION, "layers_per_block", "cross_attention_dim")}
        fields["attention_head_dim"] = unet.attention_heads
    return _config(name, fields)


def autoencoder_from_config(
    config: Mapping[str, Any], *, dtype: Dtype = None
) -> tuple[AutoencoderKL | VQModel, np.ndarray, np.ndarray]:
    """The network of an AutoencoderKL's or VQModel's config.json, and the scaling of its latents.

    Args:
      config: the parsed JSON; absent fields have diffusers' defaults, but for the scaling factor of a VQModel: 1, that
        of the models of Rombach et al. 2022, whose files are older than the field.
      dtype: type of the computation.

    Returns:
      The module; shift and scale, each [c] float32 with c the channels of the latents: z = (raw - shift) * scale.

    Raises:
      InputError: for another class, or the first field whose value is not supported.
    """
    name = class_name(config, AUTOENCODERS)
    fields = read_fields(config, name)
    for types in ("down_block_types", "up_block_types"):
        if len(fields[types]) != len(fields["block_out_channels"]):
            given = f"{len(fields[types])} for {len(fields['block_out_channels'])}"
            raise InputError(f"{name}: {types} must have one entry for each of block_out_channels; it has {given}")
    ours = {field: fields[field] for field in SAME[name]}
    if name == "AutoencoderKL":
        return AutoencoderKL(**ours, dtype=dtype), *_scaling(fields)
    channels = fields["vq_embed_dim"] or fields["latent_channels"]
    factor = fields["scaling_factor"] if "scaling_factor" in config else 1.0
    return VQModel(**ours, dtype=dtype), np.zeros(channels, np.float32), np.full(channels, factor, np.float32)


def _scaling(fields: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Shift and scale, [c] each: (raw - shift_factor) * scaling_factor, or (raw - mean) / std * scaling_factor."""
    channels, shift, mean, std = (fields[k] for k in ("latent_channels", "shift_factor", "latents_mean", "latents_std"))
    if (mean is None) != (std is None) or (mean is not None and shift):
        raise InputError("AutoencoderKL: latents_mean goes with latents_std, and neither with a shift_factor")
    if mean is not None and {len(mean), len(std)} != {channels}:
        raise InputError(f"AutoencoderKL: latents_mean and latents_std must have latent_channels={channels} numbers")
    shift = np.full(channels, shift or 0.0) if mean is None else np.array(mean)
    scale = fields["scaling_factor"] / (np.ones(channels) if std is None else np.array(std))
    return shift.astype(np.float32), scale.astype(np.float32)


def config_from_autoencoder(
    autoencoder: AutoencoderKL | VQModel, shift: np.ndarray, scale: np.ndarray, sample_size: int
) -> dict[str, Any]:
    """The inverse of `autoencoder_from_config`: JSON for diffusers, with the height and width of pictures as a hint.

    Raises:
      InputError: for a VQModel whose latents are shifted, or scaled by channel: diffusers' has but one factor.
    """
    name = "AutoencoderKL" if isinstance(autoencoder, AutoencoderKL) else "VQModel"
    levels = len(autoencoder.block_out_channels)
    fields = {field: getattr(autoencoder, field) for field in SAME[name]} | {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "sample_size": sample_size,
    }
    uniform = np.ptp(shift) == 0 and np.ptp(scale) == 0
    if name == "VQModel" and (np.any(shift) or not uniform):
        raise InputError("a VQModel of diffusers knows one scaling_factor and no shift; these latents have more")
    if uniform:
        fields["scaling_factor"] = _shortest(scale[0])
        if shift[0]:
            fields["shift_factor"] = _shortest(shift[0])
    else:
        fields |= {"latents_mean": [_shortest(x) for x in shift], "latents_std": [_inverse(x) for x in scale]}
        fields["scaling_factor"] = 1.0
    return _config(name, fields)


def abstract_params(module: nn.Module) -> Mapping[str, Any]:
    """The shapes of a UNet's, an autoencoder's or a text encoder's parameters, as a tree of `jax.ShapeDtypeStruct`.

    Raises:
      InputError: if the module's fields do not fit each other.
    """
    if isinstance(module, UNet):
        inputs, named = _unet_inputs(module)
    elif isinstance(module, UNet2D):
        inputs, named = (_pixels(1, module.in_channels), np.zeros(1)), {}
    elif isinstance(module, CLIPTextEncoder):
        inputs, named = (np.zeros((1, 1), np.int32),), {}
    else:
        inputs, named = (_pixels(2 ** (len(module.block_out_channels) - 1), module.in_channels),), {}
    try:
        return jax.eval_shape(module.init, jax.random.key(0), *inputs, **named)["params"]
    except ValueError as error:  # the module's own check of its fields
        raise InputError(str(error)) from error


def _unet_inputs(unet: UNet) -> tuple[tuple[Array, ...], dict[str, Any]]:
    labels = None if unet.num_class_embeds is None else np.zeros(1, np.int32)
    added = None
    if unet.addition_embed_type is not None:  # any split of the sum will do
        added = Added(np.zeros((1, unet.projection_class_embeddings_input_dim or 0)), np.zeros((1, 0)))
    context = np.zeros((1, 1, unet.cross_attention_dim), np.float32)
    return (_pixels(1, unet.in_channels), np.zeros(1), context), {"class_labels": labels, "added": added}


def _pixels(size: int, channels: int) -> np.ndarray:
    return np.zeros((1, size, size, channels), np.float32)


def _one(value: int | tuple[int, ...]) -> int:
    """What was given once, or alike for each level."""
    return value if isinstance(value, int) else value[0]


def _shortest(value: float | np.floating) -> float:
    """A float32 as the shortest decimal that means it: 0.18215 rather than 0.18215000629425049."""
    return float(str(np.float32(value)))


def _inverse(scale: np.floating) -> float:
    """1 / scale as a decimal of which the inverse is that scale again: a short one if it will do."""
    exact = 1 / float(scale)
    short = _shortest(exact)
    return short if np.float32(1 / short) == np.float32(scale) else exact


def _config(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A whole config.json of the diffusers class `name`: defaults where nothing is said."""
    whole = {"_class_name": name, "_diffusers_version": VERSION} | defaults(name) | fields
    is_list = lambda value: isinstance(value, Sequence) and not isinstance(value, str)  # noqa: E731
    return {field: list(value) if is_list(value) else value for field, value in whole.items()}
