"""The fields of diffusers' config.json files: defaults, as in the classes of diffusers 0.42.1, and supported values."""

import json
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from ldm_jax.errors import InputError
from ldm_jax.models import unet, unet2d


class FieldType(NamedTuple):
    """The supported values of a field (lists as tuples), and a description of them for error messages."""

    supports: Callable[[Any], bool]
    words: str


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _list_of(is_item: Callable[[Any], bool], words: str) -> FieldType:
    return FieldType(lambda value: isinstance(value, tuple) and value != () and all(map(is_item, value)), words)


def _per_level(one: FieldType, words: str) -> FieldType:
    many = _list_of(one.supports, words)
    return FieldType(lambda value: one.supports(value) or many.supports(value), f"{one.words} or a list of {words}")


def _or_null(type: FieldType) -> FieldType:
    return FieldType(lambda value: value is None or type.supports(value), f"{type.words} or null")


def _one_of(*values: str | None) -> FieldType:
    return FieldType(lambda value: value in values, " or ".join(map(json.dumps, values)))


def modern_block(name: str) -> str:
    """The current name of a UNet block type; in the first versions of diffusers all began with "UNetRes"."""
    return name.removeprefix("UNetRes")


def _blocks(types: Collection[str]) -> FieldType:
    is_type = lambda name: isinstance(name, str) and modern_block(name) in types  # noqa: E731
    return _list_of(is_type, f"a list of {' and '.join(types)}")


INTEGER = FieldType(_is_integer, "a positive integer")
INTEGERS = _list_of(_is_integer, "a list of positive integers")
PER_LEVEL = _per_level(INTEGER, "positive integers")
SAME_AT_ALL_LEVELS = FieldType(
    lambda value: PER_LEVEL.supports(value) and (_is_integer(value) or len(set(value)) == 1),
    "a positive integer, the same for every level",
)
NUMBER = FieldType(_is_number, "a number")
POSITIVE = FieldType(lambda value: _is_number(value) and value > 0, "a positive number")
RATE = FieldType(lambda value: _is_number(value) and 0 <= value < 1, "a number in [0, 1)")
FLAG = FieldType(lambda value: isinstance(value, bool), "true or false")
FIXED = None  # nothing but the default
IGNORED = FieldType(lambda value: True, "")  # no effect on what the supported networks compute

Table = dict[str, tuple[Any, FieldType | None]]  # field -> default, supported values


def _fields(type: FieldType | None, **defaults: Any) -> Table:
    return {field: (default, type) for field, default in defaults.items()}


# Ignored without loss: `upcast_attention` and `force_upcast`, which keep float16 from overflowing (scores and softmax
# are float32 here in every dtype, and bfloat16 has the range of float32); the middle block's own flag of
# only_cross_attention, which UNetMidBlock2DCrossAttn never sees; and the details of values that are refused.
_UNETS = {
    **_fields(IGNORED, sample_size=None),
    **_fields(FLAG, flip_sin_to_cos=True),
    **_fields(NUMBER, freq_shift=0),
    **_fields(RATE, dropout=0.0),
    **_fields(INTEGER, norm_num_groups=32),
    **_fields(FIXED, center_input_sample=False, downsample_padding=1, mid_block_scale_factor=1, act_fn="silu"),
    **_fields(FIXED, norm_eps=1e-5, resnet_time_scale_shift="default", class_embed_type=None),
    **_fields(FIXED, time_embedding_type="positional", time_embedding_dim=None),
}
_AUTOENCODERS = {
    **_fields(IGNORED, sample_size=32),
    **_fields(INTEGER, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=32),
    **_fields(INTEGERS, block_out_channels=(64,)),
    **_fields(POSITIVE, scaling_factor=0.18215),
    **_fields(FLAG, mid_block_add_attention=True),
    **_fields(FIXED, act_fn="silu"),
    "down_block_types": (("DownEncoderBlock2D",), _blocks(("DownEncoderBlock2D",))),
    "up_block_types": (("UpDecoderBlock2D",), _blocks(("UpDecoderBlock2D",))),
}
TABLES: dict[str, Table] = {
    "UNet2DConditionModel": {
        **_UNETS,
        "down_block_types": (("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), _blocks(unet.DOWN_BLOCKS)),
        "mid_block_type": ("UNetMidBlock2DCrossAttn", _one_of(*unet.MID_BLOCKS)),
        "up_block_types": (("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, _blocks(unet.UP_BLOCKS)),
        "only_cross_attention": (False, _per_level(FLAG, "them")),
        "num_attention_heads": (None, _or_null(PER_LEVEL)),
        "addition_embed_type": (None, _one_of("text_time", None)),
        **_fields(INTEGER, in_channels=4, out_channels=4),
        **_fields(INTEGERS, block_out_channels=(320, 640, 1280, 1280)),
        **_fields(SAME_AT_ALL_LEVELS, layers_per_block=2, cross_attention_dim=1280),
        **_fields(PER_LEVEL, transformer_layers_per_block=1, attention_head_dim=8),
        **_fields(FLAG, use_linear_projection=False),
        **_fields(_or_null(INTEGER), addition_time_embed_dim=None, projection_class_embeddings_input_dim=None),
        **_fields(_or_null(INTEGER), num_class_embeds=None, time_cond_proj_dim=None),
        **_fields(IGNORED, upcast_attention=False, mid_block_only_cross_attention=None),
        **_fields(IGNORED, addition_embed_type_num_heads=64),
        **_fields(FIXED, dual_cross_attention=False, class_embeddings_concat=False, attention_type="default"),
        **_fields(FIXED, resnet_skip_time_act=False, resnet_out_scale_factor=1.0, conv_in_kernel=3, conv_out_kernel=3),
        **_fields(FIXED, reverse_transformer_layers_per_block=None, encoder_hid_dim=None, encoder_hid_dim_type=None),
        **_fields(FIXED, time_embedding_act_fn=None, timestep_post_act=None),
        **_fields(FIXED, cross_attention_norm=None),
    },
    "UNet2DModel": {
        **_UNETS,
        "down_block_types": (("DownBlock2D",) + ("AttnDownBlock2D",) * 3, _blocks(unet2d.DOWN_BLOCKS)),
        "mid_block_type": ("UNetMidBlock2D", _one_of(*unet2d.MID_BLOCKS)),
        "up_block_types": (("AttnUpBlock2D",) * 3 + ("UpBlock2D",), _blocks(unet2d.UP_BLOCKS)),
        **_fields(INTEGER, in_channels=3, out_channels=3, layers_per_block=2),
        **_fields(INTEGERS, block_out_channels=(224, 448, 672, 896)),
        **_fields(_or_null(INTEGER), attention_head_dim=8),
        **_fields(FLAG, add_attention=True),
        **_fields(IGNORED, num_train_timesteps=None),
        **_fields(FIXED, downsample_type="conv", upsample_type="conv", attn_norm_num_groups=None),
        **_fields(FIXED, num_class_embeds=None),
    },
    "DiTTransformer2DModel": {
        **_fields(INTEGER, num_attention_heads=16, attention_head_dim=72, num_layers=28, in_channels=4, patch_size=2),
        **_fields(INTEGER, sample_size=32, num_embeds_ada_norm=1000),
        **_fields(_or_null(INTEGER), out_channels=None),
        **_fields(IGNORED, norm_num_groups=32, upcast_attention=False),
        **_fields(FIXED, dropout=0.0, attention_bias=True, activation_fn="gelu-approximate"),
        **_fields(FIXED, norm_type="ada_norm_zero", norm_elementwise_affine=False, norm_eps=1e-5),
    },
    "AutoencoderKL": {
        **_AUTOENCODERS,
        **_fields(INTEGER, latent_channels=4),
        **_fields(_or_null(NUMBER), shift_factor=None),
        **_fields(_or_null(_list_of(_is_number, "a list of numbers")), latents_mean=None),
        **_fields(_or_null(_list_of(POSITIVE.supports, "a list of positive numbers")), latents_std=None),
        **_fields(FLAG, use_quant_conv=True, use_post_quant_conv=True),
        **_fields(IGNORED, force_upcast=True),
    },
    "VQModel": {
        **_AUTOENCODERS,
        **_fields(INTEGER, latent_channels=3, num_vq_embeddings=256),
        **_fields(_or_null(INTEGER), vq_embed_dim=None),
        **_fields(IGNORED, force_upcast=False),
        **_fields(FIXED, norm_type="group", lookup_from_codebook=False),
    },
}


def defaults(name: str) -> dict[str, Any]:
    """The defaults of all fields of the diffusers class `name`."""
    return {field: default for field, (default, _) in TABLES[name].items()}


def ignored_fields(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The fields of a config of the diffusers class `name` that have no effect here, but may have one in diffusers."""
    return {field: config[field] for field, (_, type) in TABLES[name].items() if type is IGNORED and field in config}


def class_name(config: Mapping[str, Any], supported: Collection[str]) -> str:
    """The diffusers class of a config, its `_class_name`; raises InputError unless it is `supported`."""
    name = config.get("_class_name")
    if name not in supported:
        got = "it has no _class_name" if name is None else f"its _class_name is {json.dumps(name)}"
        raise InputError(f"the config.json is of no supported model: {got}; supported is {' or '.join(supported)}")
    return name


def read_fields(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """All fields of the diffusers class `name`, defaults filled in, lists as tuples.

    Raises InputError for the first field whose value is not supported. A field that is not in the table is not, unless
    it is null or false, which turns features off, or its name begins with "_".
    """
    table = TABLES[name]
    for field, value in config.items():
        if field not in table and not field.startswith("_") and value is not None and value is not False:
            raise InputError(f"{name}: {field}={json.dumps(value)} is not supported: the field is not known here")
    filled = defaults(name) | dict(config)
    return {field: _read(name, field, filled[field]) for field in table}


def _read(name: str, field: str, stated: Any) -> Any:
    default, type = TABLES[name][field]
    value = tuple(stated) if isinstance(stated, list) else stated
    if value is None and default is False:  # as in diffusers
        value = False
    if value == default if type is FIXED else type.supports(value):
        return value
    words = json.dumps(default) if type is FIXED else type.words
    raise InputError(f"{name}: {field}={json.dumps(stated)} is not supported; supported is {words}")
