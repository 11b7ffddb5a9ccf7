"""What the config.json of a diffusers model may say: every field, what its absence means, and what is supported here.

The defaults are those of the classes in diffusers 0.42.1.
"""

import json
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from ldm_jax.errors import InputError
from ldm_jax.models import unet, unet2d


class Kind(NamedTuple):
    """Which values of a field are supported (lists come as tuples), and that in words."""

    supports: Callable[[Any], bool]
    words: str


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _list_of(is_item: Callable[[Any], bool], words: str) -> Kind:
    return Kind(lambda value: isinstance(value, tuple) and value != () and all(map(is_item, value)), words)


def _per_level(one: Kind, words: str) -> Kind:
    many = _list_of(one.supports, words)
    return Kind(lambda value: one.supports(value) or many.supports(value), f"{one.words} or a list of {words}")


def _or_null(kind: Kind) -> Kind:
    return Kind(lambda value: value is None or kind.supports(value), f"{kind.words} or null")


def _one_of(*known: str | None) -> Kind:
    return Kind(lambda value: value in known, " or ".join(map(json.dumps, known)))


def modern_block(name: str) -> str:
    """Today's name of a block: in the first versions of diffusers all names of UNet blocks began with "UNetRes"."""
    return name.removeprefix("UNetRes")


def _blocks(known: Collection[str]) -> Kind:
    is_known = lambda name: isinstance(name, str) and modern_block(name) in known  # noqa: E731
    return _list_of(is_known, f"a list of {' and '.join(known)}")


INTEGER = Kind(_is_integer, "a positive integer")
INTEGERS = _list_of(_is_integer, "a list of positive integers")
PER_LEVEL = _per_level(INTEGER, "positive integers")
SAME_AT_ALL_LEVELS = Kind(
    lambda value: PER_LEVEL.supports(value) and (_is_integer(value) or len(set(value)) == 1),
    "a positive integer, the same for every level",
)
NUMBER = Kind(_is_number, "a number")
POSITIVE = Kind(lambda value: _is_number(value) and value > 0, "a positive number")
RATE = Kind(lambda value: _is_number(value) and 0 <= value < 1, "a number in [0, 1)")
FLAG = Kind(lambda value: isinstance(value, bool), "true or false")
FLAG_PER_LEVEL = _per_level(FLAG, "them")
FIXED = None  # nothing but the default
IGNORED = Kind(lambda value: True, "")  # it does not change what the supported networks compute


# Field -> (what its absence means, what is supported).
#
# Ignored without loss: `upcast_attention` and `force_upcast`, which keep float16 from overflowing (scores and softmax
# are float32 here whatever the type of the rest, and bfloat16 has the range of float32); the middle's own flag of
# only_cross_attention, which UNetMidBlock2DCrossAttn never sees; and what belongs to values that are refused.
UNET2D_CONDITION = {
    "sample_size": (None, IGNORED),
    "in_channels": (4, INTEGER),
    "out_channels": (4, INTEGER),
    "center_input_sample": (False, FIXED),
    "flip_sin_to_cos": (True, FLAG),
    "freq_shift": (0, NUMBER),
    "down_block_types": (("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), _blocks(unet.DOWN_BLOCKS)),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", _one_of(*unet.MID_BLOCKS)),
    "up_block_types": (("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, _blocks(unet.UP_BLOCKS)),
    "only_cross_attention": (False, FLAG_PER_LEVEL),
    "block_out_channels": ((320, 640, 1280, 1280), INTEGERS),
    "layers_per_block": (2, SAME_AT_ALL_LEVELS),
    "downsample_padding": (1, FIXED),
    "mid_block_scale_factor": (1, FIXED),
    "dropout": (0.0, RATE),
    "act_fn": ("silu", FIXED),
    "norm_num_groups": (32, INTEGER),
    "norm_eps": (1e-5, FIXED),
    "cross_attention_dim": (1280, SAME_AT_ALL_LEVELS),
    "transformer_layers_per_block": (1, PER_LEVEL),
    "reverse_transformer_layers_per_block": (None, FIXED),
    "encoder_hid_dim": (None, FIXED),
    "encoder_hid_dim_type": (None, FIXED),
    "attention_head_dim": (8, PER_LEVEL),
    "num_attention_heads": (None, _or_null(PER_LEVEL)),
    "dual_cross_attention": (False, FIXED),
    "use_linear_projection": (False, FLAG),
    "class_embed_type": (None, FIXED),
    "addition_embed_type": (None, _one_of("text_time", None)),
    "addition_time_embed_dim": (None, _or_null(INTEGER)),
    "num_class_embeds": (None, _or_null(INTEGER)),
    "upcast_attention": (False, IGNORED),
    "resnet_time_scale_shift": ("default", FIXED),
    "resnet_skip_time_act": (False, FIXED),
    "resnet_out_scale_factor": (1.0, FIXED),
    "time_embedding_type": ("positional", FIXED),
    "time_embedding_dim": (None, FIXED),
    "time_embedding_act_fn": (None, FIXED),
    "timestep_post_act": (None, FIXED),
    "time_cond_proj_dim": (None, FIXED),
    "conv_in_kernel": (3, FIXED),
    "conv_out_kernel": (3, FIXED),
    "projection_class_embeddings_input_dim": (None, _or_null(INTEGER)),
    "attention_type": ("default", FIXED),
    "class_embeddings_concat": (False, FIXED),
    "mid_block_only_cross_attention": (None, IGNORED),
    "cross_attention_norm": (None, FIXED),
    "addition_embed_type_num_heads": (64, IGNORED),
}

UNET2D = {
    "sample_size": (None, IGNORED),
    "in_channels": (3, INTEGER),
    "out_channels": (3, INTEGER),
    "center_input_sample": (False, FIXED),
    "time_embedding_type": ("positional", FIXED),
    "time_embedding_dim": (None, FIXED),
    "freq_shift": (0, NUMBER),
    "flip_sin_to_cos": (True, FLAG),
    "down_block_types": (("DownBlock2D",) + ("AttnDownBlock2D",) * 3, _blocks(unet2d.DOWN_BLOCKS)),
    "mid_block_type": ("UNetMidBlock2D", _one_of(*unet2d.MID_BLOCKS)),
    "up_block_types": (("AttnUpBlock2D",) * 3 + ("UpBlock2D",), _blocks(unet2d.UP_BLOCKS)),
    "block_out_channels": ((224, 448, 672, 896), INTEGERS),
    "layers_per_block": (2, INTEGER),
    "mid_block_scale_factor": (1, FIXED),
    "downsample_padding": (1, FIXED),
    "downsample_type": ("conv", FIXED),
    "upsample_type": ("conv", FIXED),
    "dropout": (0.0, RATE),
    "act_fn": ("silu", FIXED),
    "attention_head_dim": (8, _or_null(INTEGER)),
    "norm_num_groups": (32, INTEGER),
    "attn_norm_num_groups": (None, FIXED),
    "norm_eps": (1e-5, FIXED),
    "resnet_time_scale_shift": ("default", FIXED),
    "add_attention": (True, FLAG),
    "class_embed_type": (None, FIXED),
    "num_class_embeds": (None, FIXED),
    "num_train_timesteps": (None, IGNORED),
}

AUTOENCODER_KL = {
    "in_channels": (3, INTEGER),
    "out_channels": (3, INTEGER),
    "down_block_types": (("DownEncoderBlock2D",), _blocks(("DownEncoderBlock2D",))),
    "up_block_types": (("UpDecoderBlock2D",), _blocks(("UpDecoderBlock2D",))),
    "block_out_channels": ((64,), INTEGERS),
    "layers_per_block": (1, INTEGER),
    "act_fn": ("silu", FIXED),
    "latent_channels": (4, INTEGER),
    "norm_num_groups": (32, INTEGER),
    "sample_size": (32, IGNORED),
    "scaling_factor": (0.18215, POSITIVE),
    "shift_factor": (None, _or_null(NUMBER)),
    "latents_mean": (None, _or_null(_list_of(_is_number, "a list of numbers"))),
    "latents_std": (None, _or_null(_list_of(POSITIVE.supports, "a list of positive numbers"))),
    "force_upcast": (True, IGNORED),
    "use_quant_conv": (True, FLAG),
    "use_post_quant_conv": (True, FLAG),
    "mid_block_add_attention": (True, FLAG),
}

VQ = {
    "in_channels": (3, INTEGER),
    "out_channels": (3, INTEGER),
    "down_block_types": (("DownEncoderBlock2D",), _blocks(("DownEncoderBlock2D",))),
    "up_block_types": (("UpDecoderBlock2D",), _blocks(("UpDecoderBlock2D",))),
    "block_out_channels": ((64,), INTEGERS),
    "layers_per_block": (1, INTEGER),
    "act_fn": ("silu", FIXED),
    "latent_channels": (3, INTEGER),
    "sample_size": (32, IGNORED),
    "num_vq_embeddings": (256, INTEGER),
    "norm_num_groups": (32, INTEGER),
    "vq_embed_dim": (None, _or_null(INTEGER)),
    "scaling_factor": (0.18215, POSITIVE),
    "norm_type": ("group", FIXED),
    "mid_block_add_attention": (True, FLAG),
    "lookup_from_codebook": (False, FIXED),
    "force_upcast": (False, IGNORED),
}

TABLES = {
    "UNet2DConditionModel": UNET2D_CONDITION,
    "UNet2DModel": UNET2D,
    "AutoencoderKL": AUTOENCODER_KL,
    "VQModel": VQ,
}


def defaults(name: str) -> dict[str, Any]:
    """Field -> what its absence means, of the diffusers class called `name`."""
    return {field: default for field, (default, _) in TABLES[name].items()}


def hints(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The fields of a config of the diffusers class `name` that change nothing here, but may in diffusers."""
    return {field: config[field] for field, (_, kind) in TABLES[name].items() if kind is IGNORED and field in config}


def class_name(config: Mapping[str, Any], known: Collection[str]) -> str:
    """The diffusers class that a config is of; raises InputError unless it is one of `known`."""
    name = config.get("_class_name")
    if name not in known:
        told = "it has no _class_name" if name is None else f"its _class_name is {json.dumps(name)}"
        raise InputError(f"the config is of no supported model: {told}; supported is {' or '.join(known)}")
    return name


def read_fields(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """All fields of the diffusers class `name`, defaults filled in, lists as tuples.

    Raises:
        InputError: for the first field whose value asks for something that is not supported. So does a field that is
            not in the table, unless it is null or false, by which features are off, or its name begins with "_".
    """
    table = TABLES[name]
    for field, value in config.items():
        if field not in table and not field.startswith("_") and value is not None and value is not False:
            raise InputError(f"{name}: {field}={json.dumps(value)} is not supported: the field is not known here")
    filled = defaults(name) | dict(config)
    return {field: _read(name, field, filled[field]) for field in table}


def _read(name: str, field: str, given: Any) -> Any:
    default, kind = TABLES[name][field]
    value = tuple(given) if isinstance(given, list) else given
    if value is None and default is False:  # as diffusers takes it
        value = False
    if value == default if kind is FIXED else kind.supports(value):
        return value
    words = json.dumps(default) if kind is FIXED else kind.words
    raise InputError(f"{name}: {field}={json.dumps(given)} is not supported; supported is {words}")
