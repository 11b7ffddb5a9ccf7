"""CLIP text encoders as transformers keeps them: config.json -> module, state dict <-> parameters.

The names are those of `ldm_jax.interop.diffusers`, in most files below `text_model.`: transformers 5.6 and later leave
that prefix out for a CLIPTextModel. Both layouts are read; written is the older one, which every version reads.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.interop.diffusers import Params, params_from_state_dict, state_dict_from_params
from ldm_jax.interop.stored import Stored
from ldm_jax.models.clip import CLIPTextEncoder

# Name of a class of transformers -> whether it projects the pooled features.
ARCHITECTURES = {"CLIPTextModel": False, "CLIPTextModelWithProjection": True}

# The keys that matter, and their types. What else a config holds is of training (dropout, initialisation), or of
# generation, or, like `dtype`, tells of the file.
KEYS = {
    "vocab_size": int,
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "max_position_embeddings": int,
    "hidden_act": str,
    "layer_norm_eps": float,
    "eos_token_id": int,
    "projection_dim": int,
}
DEFAULTS = {"projection_dim": 512}  # of CLIPTextConfig; the others are the module's own

PREFIX = "text_model."
PROJECTION = "text_projection."
IGNORED = "embeddings.position_ids"  # 0, 1, 2 ...: a buffer that older files have


def text_encoder_from_config(config: Mapping[str, Any]) -> CLIPTextEncoder:
    """The module that a text encoder's config.json describes; keys it lacks have the defaults of CLIPTextConfig.

    Raises:
      InputError: for another architecture or activation, or a value that makes no sense.
    """
    architectures = config.get("architectures")
    if architectures not in [[name] for name in ARCHITECTURES]:
        raise InputError(f"text encoder: architectures must be one of {list(ARCHITECTURES)}; got {architectures!r}")
    fields = DEFAULTS | {name: config[name] for name in KEYS if name in config}
    if not ARCHITECTURES[architectures[0]]:
        del fields["projection_dim"]
    for name, value in fields.items():
        if not isinstance(value, KEYS[name]) or isinstance(value, bool):
            raise InputError(f"text encoder: {name} must be of type {KEYS[name].__name__}; got {value!r}")
    encoder = CLIPTextEncoder(**fields)
    try:
        encoder.check_fields()
    except ValueError as error:
        raise InputError(f"text encoder: {error}") from error
    return encoder


def config_from_text_encoder(encoder: CLIPTextEncoder) -> dict[str, Any]:
    """The inverse of `text_encoder_from_config`: a config.json for transformers."""
    projects = encoder.projection_dim is not None
    architecture = next(name for name, has in ARCHITECTURES.items() if has == projects)
    fields = {name: getattr(encoder, name) for name in KEYS if name != "projection_dim" or projects}
    return {"architectures": [architecture], "model_type": "clip_text_model"} | fields


def text_params_from_state_dict(state: Mapping[str, np.ndarray | Stored], target: Params) -> dict[str, Any]:
    """A text encoder's parameters from a state dict of transformers, with or without the prefix `text_model.`.

    Args and errors are those of `params_from_state_dict`; its message names keys without the prefix. `position_ids` are
    left out.
    """
    named = {key.removeprefix(PREFIX): value for key, value in state.items()}
    return params_from_state_dict({key: value for key, value in named.items() if key != IGNORED}, target)


def state_dict_from_text_params(params: Params) -> dict[str, np.ndarray]:
    """The inverse: a state dict with the prefix."""
    state = state_dict_from_params(params)
    return {key if key.startswith(PROJECTION) else PREFIX + key: value for key, value in state.items()}
