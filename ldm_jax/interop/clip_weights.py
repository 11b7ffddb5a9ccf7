"""CLIP in transformers' format: config.json <-> module, state dict <-> parameters, of either encoder or of both.

Names are mapped by `ldm_jax.interop.diffusers`, below `text_model.` or `vision_model.` in most files: transformers 5.6
and later write a CLIPTextModel without that prefix. Both layouts are read; the older one, which every version reads, is
written.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn

from ldm_jax.errors import InputError
from ldm_jax.interop.diffusers import Params, params_from_state_dict, state_dict_from_params
from ldm_jax.interop.stored import Stored
from ldm_jax.models.clip import CLIPTextEncoder
from ldm_jax.models.clip_vision import CLIP, INITIAL_TEMPERATURE, CLIPImageEncoder

# Class in transformers -> whether it projects the pooled features.
ARCHITECTURES = {"CLIPTextModel": False, "CLIPTextModelWithProjection": True}
IMAGE_ARCHITECTURE, CLIP_ARCHITECTURE = "CLIPVisionModelWithProjection", "CLIPModel"

# The keys of config.json that define the network, and their types; the others are about training (dropout,
# initialisation), generation, or the file (`dtype`).
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "projection_dim")
LAYERS = dict.fromkeys(_SIZES, int) | {"hidden_act": str, "layer_norm_eps": float}
KEYS = {"vocab_size": int, "max_position_embeddings": int, "eos_token_id": int} | LAYERS
IMAGE_KEYS = {"image_size": int, "patch_size": int, "num_channels": int} | LAYERS
PROJECTION_DIM = 512  # the default of the three config classes; the other defaults are the modules'

PREFIX, IMAGE_PREFIX = "text_model.", "vision_model."  # of all names but these:
PROJECTIONS = TEXT_PROJECTION, IMAGE_PROJECTION = "text_projection.", "visual_projection."
LOGIT_SCALE = "logit_scale"
IGNORED = "embeddings.position_ids"  # 0, 1, 2 ...: a buffer in older files

StateDict = Mapping[str, np.ndarray | Stored]


def text_encoder_from_config(config: Mapping[str, Any]) -> CLIPTextEncoder:
    """The text encoder of a config.json, with CLIPTextConfig's defaults; InputError if it is not supported."""
    _check_architecture(config, list(ARCHITECTURES), "text encoder")
    fields = {"projection_dim": PROJECTION_DIM} | {name: config[name] for name in KEYS if name in config}
    if not ARCHITECTURES[config["architectures"][0]]:
        del fields["projection_dim"]
    return _module(CLIPTextEncoder, fields, KEYS, "text encoder")


def image_encoder_from_config(config: Mapping[str, Any]) -> CLIPImageEncoder:
    """The image encoder of a config.json, with CLIPVisionConfig's defaults; errors as above."""
    _check_architecture(config, [IMAGE_ARCHITECTURE], "image encoder")
    return _module(CLIPImageEncoder, {k: config[k] for k in IMAGE_KEYS if k in config}, IMAGE_KEYS, "image encoder")


def clip_from_config(config: Mapping[str, Any]) -> CLIP:
    """Both encoders of a CLIPModel's config.json, whose projection_dim applies to both; errors as above."""
    _check_architecture(config, [CLIP_ARCHITECTURE], "CLIP")
    encoders = [config.get(f"{name}_config", {}) for name in ("text", "vision")]
    if not all(isinstance(encoder, Mapping) for encoder in encoders):
        raise InputError("CLIP: text_config and vision_config must be objects with the encoders' fields")
    projection = {"projection_dim": config.get("projection_dim", PROJECTION_DIM)}
    text, image = (dict(encoder) | projection for encoder in encoders)
    return CLIP(
        text_encoder_from_config(text | {"architectures": ["CLIPTextModelWithProjection"]}),
        image_encoder_from_config(image | {"architectures": [IMAGE_ARCHITECTURE]}),
    )


def _check_architecture(config: Mapping[str, Any], supported: list[str], what: str) -> None:
    if (got := config.get("architectures")) not in [[name] for name in supported]:
        raise InputError(f"{what}: architectures must be one of {supported}; got {got!r}")


def _module(encoder_class: type[nn.Module], fields: Mapping[str, Any], types: Mapping[str, type], what: str) -> Any:
    """The module of these fields, after checking their types and that they fit each other."""
    for name, value in fields.items():
        if not isinstance(value, types[name]) or isinstance(value, bool):
            raise InputError(f"{what}: {name} must be of type {types[name].__name__}; got {value!r}")
    encoder = encoder_class(**fields)
    try:
        encoder.check_fields()
    except ValueError as error:
        raise InputError(f"{what}: {error}") from error
    return encoder


def config_from_text_encoder(encoder: CLIPTextEncoder) -> dict[str, Any]:
    """The inverse of `text_encoder_from_config`: a config.json for transformers."""
    projects = encoder.projection_dim is not None
    architecture = next(name for name, has in ARCHITECTURES.items() if has == projects)
    fields = {name: getattr(encoder, name) for name in KEYS if name != "projection_dim" or projects}
    return {"architectures": [architecture], "model_type": "clip_text_model"} | fields


def config_from_image_encoder(encoder: CLIPImageEncoder) -> dict[str, Any]:
    """The inverse of `image_encoder_from_config`: a config.json for transformers."""
    fields = {name: getattr(encoder, name) for name in IMAGE_KEYS}
    return {"architectures": [IMAGE_ARCHITECTURE], "model_type": "clip_vision_model"} | fields


def config_from_clip(clip: CLIP) -> dict[str, Any]:
    """The inverse of `clip_from_config`: a config.json for transformers."""
    configs = {"text": config_from_text_encoder(clip.text), "vision": config_from_image_encoder(clip.image)}
    return {
        "architectures": [CLIP_ARCHITECTURE],
        "model_type": "clip",
        "projection_dim": clip.image.projection_dim,
        "logit_scale_init_value": round(-float(np.log(INITIAL_TEMPERATURE)), 4),
        **{f"{name}_config": {k: v for k, v in c.items() if k != "architectures"} for name, c in configs.items()},
    }


def text_params_from_state_dict(state: StateDict, target: Params) -> dict[str, Any]:
    """A text encoder's parameters from a state dict of transformers; args and errors as in `params_from_state_dict`."""
    return _remove_prefix(state, PREFIX, target)


def image_params_from_state_dict(state: StateDict, target: Params) -> dict[str, Any]:
    """An image encoder's parameters from a state dict of transformers; its prefix is `vision_model.`."""
    return _remove_prefix(state, IMAGE_PREFIX, target)


def clip_params_from_state_dict(state: StateDict, target: Params) -> dict[str, Any]:
    """The parameters {"text", "image", "logit_scale"} of CLIP from a CLIPModel's state dict."""
    parts = {"text": {}, "image": {}, LOGIT_SCALE: {}}
    for key, value in state.items():
        is_image = key.startswith((IMAGE_PREFIX, IMAGE_PROJECTION))
        parts["image" if is_image else LOGIT_SCALE if key == LOGIT_SCALE else "text"][key] = value
    return {
        "text": text_params_from_state_dict(parts["text"], target["text"]),
        "image": image_params_from_state_dict(parts["image"], target["image"]),
    } | params_from_state_dict(parts[LOGIT_SCALE], {LOGIT_SCALE: target[LOGIT_SCALE]})


def _remove_prefix(state: StateDict, prefix: str, target: Params) -> dict[str, Any]:
    named = {key.removeprefix(prefix): value for key, value in state.items()}
    return params_from_state_dict({key: value for key, value in named.items() if key != IGNORED}, target)


def state_dict_from_text_params(params: Params) -> dict[str, np.ndarray]:
    """A text encoder's state dict, with the prefix `text_model.`."""
    return _add_prefix(params, PREFIX)


def state_dict_from_image_params(params: Params) -> dict[str, np.ndarray]:
    """An image encoder's state dict, with the prefix `vision_model.`."""
    return _add_prefix(params, IMAGE_PREFIX)


def state_dict_from_clip_params(params: Params) -> dict[str, np.ndarray]:
    """The state dict of a CLIPModel."""
    scale = state_dict_from_params({LOGIT_SCALE: params[LOGIT_SCALE]})
    return state_dict_from_text_params(params["text"]) | state_dict_from_image_params(params["image"]) | scale


def _add_prefix(params: Params, prefix: str) -> dict[str, np.ndarray]:
    state = state_dict_from_params(params)
    return {key if key.startswith(PROJECTIONS) else prefix + key: value for key, value in state.items()}
