"""diffusers' config.json <-> UNets, DiT and autoencoders; the supported values are in `config_fields`."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from ldm_jax.errors import InputError
from ldm_jax.interop.config_fields import class_name, defaults, modern_block, read_fields
from ldm_jax.models.autoencoder import AutoencoderKL, VQModel
from ldm_jax.models.clip import CLIPTextEncoder
from ldm_jax.models.dit import DiT
from ldm_jax.models.layers import Dtype
from ldm_jax.models.unet import Added, UNet
from ldm_jax.models.unet2d import UNet2D

VERSION = "0.42.1"  # of diffusers, with these defaults and names

UNETS = ("UNet2DConditionModel", "UNet2DModel")
TRANSFORMERS = ("DiTTransformer2DModel", "Transformer2DModel")  # the second in older files
AUTOENCODERS = ("AutoencoderKL", "VQModel")

# The fields with the same name and meaning on both sides.
_UNETS = (
    "in_channels", "out_channels", "block_out_channels", "mid_block_type", "norm_num_groups", "flip_sin_to_cos",
    "freq_shift", "dropout",
)  # fmt: skip
_AUTOENCODERS = (
    "in_channels", "out_channels", "block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups",
    "mid_block_add_attention",
)  # fmt: skip
SAME = {
    "UNet2DConditionModel": (
        *_UNETS, "transformer_layers_per_block", "only_cross_attention", "use_linear_projection", "num_class_embeds",
        "addition_embed_type", "time_cond_proj_dim",
    ),
    "UNet2DModel": (*_UNETS, "layers_per_block", "attention_head_dim", "add_attention"),
    "AutoencoderKL": (*_AUTOENCODERS, "use_quant_conv", "use_post_quant_conv"),
    "VQModel": (*_AUTOENCODERS, "num_vq_embeddings", "vq_embed_dim"),
}  # fmt: skip

# Used with addition_embed_type; diffusers uses the second for class embeddings too, which are not supported.
ADDITION = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")


def unet_from_config(config: Mapping[str, Any], *, dtype: Dtype = None) -> UNet | UNet2D:
    """The UNet of a config.json, with diffusers' defaults; InputError for another class or an unsupported field."""
    name = class_name(config, UNETS)
    fields = read_fields(config, name)
    same = {field: fields[field] for field in SAME[name]}
    for types in ("down_block_types", "up_block_types"):
        same[types] = tuple(map(modern_block, fields[types]))
    if name == "UNet2DModel":
        return UNet2D(**same, dtype=dtype)
    if fields["addition_embed_type"] is not None:
        same |= {field: fields[field] for field in ADDITION}
    return UNet(
        **same,
        # One number, or one for each level, all equal.
        **{field: np.atleast_1d(fields[field])[0].item() for field in ("layers_per_block", "cross_attention_dim")},
        # A misnomer in diffusers, kept for old files: attention_head_dim is the NUMBER of heads.
        attention_heads=fields["num_attention_heads"] or fields["attention_head_dim"],
        dtype=dtype,
    )


def config_from_unet(unet: UNet | UNet2D, sample_size: int) -> dict[str, Any]:
    """The inverse of `unet_from_config`: a config.json, with the latents' height and width as its sample_size."""
    name = "UNet2DConditionModel" if isinstance(unet, UNet) else "UNet2DModel"
    same = (*SAME[name], "down_block_types", "up_block_types")
    fields = {field: getattr(unet, field) for field in same} | {"sample_size": sample_size}
    if isinstance(unet, UNet):
        fields |= {field: getattr(unet, field) for field in (*ADDITION, "layers_per_block", "cross_attention_dim")}
        fields["attention_head_dim"] = unet.attention_heads
    return _config(name, fields)


def dit_from_config(config: Mapping[str, Any], *, dtype: Dtype = None) -> tuple[DiT, int]:
    """The diffusion transformer of a config.json, and its number of classes without the null class.

    All blocks have one embedding of timestep and class. Raises InputError for another class or an unsupported field.
    """
    name = class_name(config, TRANSFORMERS)
    # A field of the general class in older files, which diffusers reads as DiTTransformer2DModel.
    fields = {field: value for field, value in config.items() if (field, value) != ("attention_type", "default")}
    fields = read_fields(fields, TRANSFORMERS[0])
    if fields["sample_size"] % fields["patch_size"]:
        raise InputError(f"{name}: patch_size={fields['patch_size']} must divide sample_size={fields['sample_size']}")
    return DiT(
        **{field: fields[field] for field in ("in_channels", "patch_size", "sample_size")},
        out_channels=fields["out_channels"] or fields["in_channels"],
        hidden_size=fields["num_attention_heads"] * fields["attention_head_dim"],
        depth=fields["num_layers"],
        heads=fields["num_attention_heads"],
        dtype=dtype,
    ), fields["num_embeds_ada_norm"]


def config_from_dit(dit: DiT, num_classes: int) -> dict[str, Any]:
    """The inverse of `dit_from_config`: a config.json, with so many classes besides the null class."""
    same = ("in_channels", "out_channels", "patch_size", "sample_size")
    fields = {field: getattr(dit, field) for field in same} | {"num_embeds_ada_norm": num_classes}
    fields |= {"num_attention_heads": dit.heads, "attention_head_dim": dit.hidden_size // dit.heads}
    return _config(TRANSFORMERS[0], fields | {"num_layers": dit.depth})


def autoencoder_from_config(
    config: Mapping[str, Any], *, dtype: Dtype = None
) -> tuple[AutoencoderKL | VQModel, np.ndarray, np.ndarray]:
    """The autoencoder of an AutoencoderKL's or VQModel's config.json, and the scaling of its latents.

    Args:
      config: the parsed JSON; absent fields have diffusers' defaults, but a VQModel's scaling_factor is 1, as in the
        models of Rombach et al. 2022, whose files are older than the field.
      dtype: of the computation.

    Returns:
      The module; shift and scale, each [c] float32, c = channels of the latents: z = (raw - shift) * scale.

    Raises InputError for another class, or the first field whose value is not supported.
    """
    name = class_name(config, AUTOENCODERS)
    fields = read_fields(config, name)
    for types in ("down_block_types", "up_block_types"):
        if len(fields[types]) != len(fields["block_out_channels"]):
            counts = f"{len(fields[types])} for {len(fields['block_out_channels'])}"
            raise InputError(f"{name}: {types} must have one entry for each of block_out_channels; it has {counts}")
    same = {field: fields[field] for field in SAME[name]}
    if name == "AutoencoderKL":
        return AutoencoderKL(**same, dtype=dtype), *_scaling(fields)
    channels = fields["vq_embed_dim"] or fields["latent_channels"]
    factor = fields["scaling_factor"] if "scaling_factor" in config else 1.0
    return VQModel(**same, dtype=dtype), np.zeros(channels, np.float32), np.full(channels, factor, np.float32)


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
    """The inverse of `autoencoder_from_config`: a config.json, with the images' height and width as its sample_size.

    Shift and scale of the latents are [c] each. Raises InputError for a VQModel with a shift, or a scale per channel.
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
        raise InputError("a VQModel of diffusers has one scaling_factor and no shift or scale per channel; these have")
    if uniform:
        fields["scaling_factor"] = _shortest(scale[0])
        if shift[0]:
            fields["shift_factor"] = _shortest(shift[0])
    else:
        fields |= {"latents_mean": [_shortest(x) for x in shift], "latents_std": [_inverse(x) for x in scale]}
        fields["scaling_factor"] = 1.0
    return _config(name, fields)


@lru_cache(maxsize=64)  # tracing a UNet takes seconds
def abstract_params(module: nn.Module) -> Mapping[str, Any]:
    """A network's parameters as a tree of `jax.ShapeDtypeStruct`; InputError if its fields do not fit each other.

    Equal networks share the tree, which must not be changed.
    """
    named = {}
    if isinstance(module, UNet):
        inputs = _zeros(1, module.in_channels), np.zeros(1), np.zeros((1, 1, module.cross_attention_dim), np.float32)
        named["class_labels"] = None if module.num_class_embeds is None else np.zeros(1, np.int32)
        if module.time_cond_proj_dim is not None:
            named["timestep_cond"] = np.zeros((1, module.time_cond_proj_dim), np.float32)
        if module.addition_embed_type is not None:  # any split of the sum will do
            width = module.projection_class_embeddings_input_dim or 0
            named["added"] = Added(np.zeros((1, width)), np.zeros((1, 0)))
    elif isinstance(module, UNet2D):
        inputs = _zeros(1, module.in_channels), np.zeros(1)
    elif isinstance(module, DiT):
        context = (1, module.num_embeddings, module.cross_attention_dim or module.hidden_size)
        inputs = _zeros(module.patch_size, module.in_channels), np.zeros(1), np.zeros(context, np.float32)
    elif isinstance(module, CLIPTextEncoder):
        inputs = (np.zeros((1, 1), np.int32),)
    else:
        inputs = (_zeros(2 ** (len(module.block_out_channels) - 1), module.in_channels),)
    try:
        return jax.eval_shape(module.init, jax.random.key(0), *inputs, **named)["params"]
    except ValueError as error:  # the module's own check of its fields
        raise InputError(str(error)) from error


def _zeros(size: int, channels: int) -> np.ndarray:
    """Zeros [1, size, size, channels]."""
    return np.zeros((1, size, size, channels), np.float32)


def _shortest(value: float | np.floating) -> float:
    """A float32 as its shortest decimal: 0.18215 rather than 0.18215000629425049."""
    return float(str(np.float32(value)))


def _inverse(scale: np.floating) -> float:
    """1 / scale as a decimal whose inverse is `scale` again: the shortest if that one is."""
    exact = 1 / float(scale)
    short = _shortest(exact)
    return short if np.float32(1 / short) == np.float32(scale) else exact


def _config(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A whole config.json of the diffusers class `name`: `fields`, and the defaults of all others."""
    config = {"_class_name": name, "_diffusers_version": VERSION} | defaults(name) | fields
    is_list = lambda value: isinstance(value, Sequence) and not isinstance(value, str)  # noqa: E731
    return {field: list(value) if is_list(value) else value for field, value in config.items()}
