"""CLIP as transformers keeps it: config.json -> module, state dict <-> parameters, of either encoder or of both.

The names are those of `ldm_jax.interop.diffusers`, in most files below `text_model.` or `vision_model.`: transformers
5.6 and later leave that prefix out for a CLIPTextModel. Both layouts are read; written is the older one, which every
version reads.
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

# Name of a class of transformers -> whether it projects the pooled features.
ARCHITECTURES = {"CLIPTextModel": False, "CLIPTextModelWithProjection": True}
IMAGE_ARCHITECTURE, WHOLE = "CLIPVisionModelWithProjection", "CLIPModel"

# The keys that matter, and their types. What else a config holds is of training (dropout, initialisation), or of
# generation, or, like `dtype`, tells of the file.
LAYERS = {
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "hidden_act": str,
    "layer_norm_eps": float,
    "projection_dim": int,
}
KEYS = {"vocab_size": int, "max_position_embeddings": int, "eos_token_id": int} | LAYERS
IMAGE_KEYS = {"image_size": int, "patch_size": int, "num_channels": int} | LAYERS
PROJECTION_DIM = 512  # the default of the three config classes; the others are the modules' own

PREFIX, IMAGE_PREFIX = "text_model.", "vision_model."  # of all names but these:
TEXT_PROJECTION, IMAGE_PROJECTION, LOGIT_SCALE = "text_projection.", "visual_projection.", "logit_scale"
IGNORED = "embeddings.position_ids"  # 0, 1, 2 ...: a buffer that older files have


def text_encoder_from_config(config: Mapping[str, Any]) -> CLIPTextEncoder:
    """The module that a text encoder's config.json describes; keys it lacks have the defaults of CLIPTextConfig.

    Raises:
      InputError: for another architecture or activation, or a value that makes no sense.
    """
    _check_architecture(config, list(ARCHITECTURES), "text encoder")
    fields = {"projection_dim": PROJECTION_DIM} | {name: config[name] for name in KEYS if name in config}
    if not ARCHITECTURES[config["architectures"][0]]:
        del fields["projection_dim"]
    return _module(CLIPTextEncoder, fields, KEYS, "text encoder")


def image_encoder_from_config(config: Mapping[str, Any]) -> CLIPImageEncoder:
    """The module that an image encoder's config.json describes; keys it lacks have the defaults of CLIPVisionConfig.

    Raises:
      InputError: for another architecture or activation, or a value that makes no sense.
    """
    _check_architecture(config, [IMAGE_ARCHITECTURE], "image encoder")
    fields = {name: config[name] for name in IMAGE_KEYS if name in config}
    return _module(CLIPImageEncoder, fields, IMAGE_KEYS, "image encoder")


def clip_from_config(config: Mapping[str, Any]) -> CLIP:
    """Both encoders, from the config.json of a CLIPModel, whose projection_dim is that of both.

    Raises:
      InputError: as the two above.
    """
    _check_architecture(config, [WHOLE], "CLIP")
    parts = [config.get(f"{name}_config", {}) for name in ("text", "vision")]
    if not all(isinstance(part, Mapping) for part in parts):
        raise InputError("CLIP: text_config and vision_config must be objects with the encoders' fields")
    projection = {"projection_dim": config.get("projection_dim", PROJECTION_DIM)}
    text, image = (dict(part) | projection for part in parts)
    return CLIP(
        text_encoder_from_config(text | {"architectures": ["CLIPTextModelWithProjection"]}),
        image_encoder_from_config(image | {"architectures": [IMAGE_ARCHITECTURE]}),
    )


def _check_architecture(config: Mapping[str, Any], known: list[str], what: str) -> None:
    given = config.get("architectures")
    if given not in [[name] for name in known]:
        raise InputError(f"{what}: architectures must be one of {known}; got {given!r}")


def _module(kind: type[nn.Module], fields: Mapping[str, Any], types: Mapping[str, type], what: str) -> Any:
    """The module of these fields, once they are found to be of their types and to fit each other."""
    for name, value in fields.items():
        if not isinstance(value, types[name]) or isinstance(value, bool):
            raise InputError(f"{what}: {name} must be of type {types[name].__name__}; got {value!r}")
    encoder = kind(**fields)
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
    parts = {"text": config_from_text_encoder(clip.text), "vision": config_from_image_encoder(clip.image)}
    return {
        "architectures": [WHOLE],
        "model_type": "clip",
        "projection_dim": clip.image.projection_dim,
        "logit_scale_init_value": round(-float(np.log(INITIAL_TEMPERATURE)), 4),
        **{f"{name}_config": {k: v for k, v in part.items() if k != "architectures"} for name, part in parts.items()},
    }


def text_params_from_state_dict(state: Mapping[str, np.ndarray | Stored], target: Params) -> dict[str, Any]:
    """A text encoder's parameters from a state dict of transformers, with or without the prefix `text_model.`.

    Args and errors are those of `params_from_state_dict`; its message names keys without the prefix. `position_ids` are
    left out.
    """
    return _unprefixed(state, PREFIX, target)


def image_params_from_state_dict(state: Mapping[str, np.ndarray | Stored], target: Params) -> dict[str, Any]:
    """The same of an image encoder, whose prefix is `vision_model.`."""
    return _unprefixed(state, IMAGE_PREFIX, target)


def clip_params_from_state_dict(state: Mapping[str, np.ndarray | Stored], target: Params) -> dict[str, Any]:
    """The parameters {"text", "image", "logit_scale"} of CLIP from a CLIPModel's state dict; see the two above."""
    of_image = {key: value for key, value in state.items() if key.startswith((IMAGE_PREFIX, IMAGE_PROJECTION))}
    of_text = {key: value for key, value in state.items() if key not in of_image and key != LOGIT_SCALE}
    of_both = {key: value for key, value in state.items() if key == LOGIT_SCALE}
    return {
        "text": text_params_from_state_dict(of_text, target["text"]),
        "image": image_params_from_state_dict(of_image, target["image"]),
    } | params_from_state_dict(of_both, {LOGIT_SCALE: target[LOGIT_SCALE]})


def _unprefixed(state: Mapping[str, np.ndarray | Stored], prefix: str, target: Params) -> dict[str, Any]:
    named = {key.removeprefix(prefix): value for key, value in state.items()}
    return params_from_state_dict({key: value for key, value in named.items() if key != IGNORED}, target)


def state_dict_from_text_params(params: Params) -> dict[str, np.ndarray]:
    """The inverse: a state dict with the prefix."""
    return _prefixed(params, PREFIX, TEXT_PROJECTION)


def state_dict_from_image_params(params: Params) -> dict[str, np.ndarray]:
    """The inverse: a state dict with the prefix."""
    return _prefixed(params, IMAGE_PREFIX, IMAGE_PROJECTION)


def state_dict_from_clip_params(params: Params) -> dict[str, np.ndarray]:
    """The inverse: a state dict for a CLIPModel."""
    scale = state_dict_from_params({LOGIT_SCALE: params[LOGIT_SCALE]})
    return state_dict_from_text_params(params["text"]) | state_dict_from_image_params(params["image"]) | scale


def _prefixed(params: Params, prefix: str, projection: str) -> dict[str, np.ndarray]:
    state = state_dict_from_params(params)
    return {key if key.startswith(projection) else prefix + key: value for key, value in state.items()}
