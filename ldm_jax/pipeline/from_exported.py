"""A run of ours in the shape of a diffusers folder, as `convert` writes it: what is in it, and how it is read back.

model_index.json   what diffusers opens; the latents' scaling, kind of map     unet/         with tau(y) in it
pipeline.py        the class that diffusers draws with                         vae/          unless it is of pixels
recipe.json        config and data of the run, and how far it was trained      scheduler/
README.md          the model card

The conditioner is part of the UNet there: see `class_table`.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ldm_jax.config import io as config_io
from ldm_jax.config import rules as config_rules
from ldm_jax.errors import InputError
from ldm_jax.interop import folder
from ldm_jax.interop.class_table import split_table
from ldm_jax.interop.diffusers import params_from_state_dict
from ldm_jax.interop.modules import abstract_params
from ldm_jax.interop.pipelines import RECIPE
from ldm_jax.interop.weights import read_state_dict
from ldm_jax.pipeline import from_config as pipeline_from_config
from ldm_jax.pipeline.from_class_folder import latents_scaling
from ldm_jax.runtime.files import read_json


class Exported(NamedTuple):
    """All of a run that such a folder keeps."""

    config: ConfigDict
    data: dict[str, Any]  # of data.json
    params: dict[str, Any]  # as of `trained.Trained`
    step: int  # updates behind the diffusion model
    autoencoder_step: int  # and behind the autoencoder; 0 of a model of pixels
    measured_on: str  # what the latents' scale was measured on


# The fields of recipe.json.
FIELDS = {"config": dict, "data": dict, "step": int, "autoencoder_step": int, "measured_on": str}


def is_exported(path: Path) -> bool:
    """Whether this is a diffusers folder that was written of a run of ours."""
    return (path / RECIPE).is_file() and (path / folder.INDEX).is_file()


def load(path: Path) -> Exported:
    """Reads such a folder.

    Raises:
      InputError: something is missing or damaged, or does not fit the config in recipe.json.
    """
    recipe = read_json(path / RECIPE, *FIELDS)
    wrong = [name for name, kind in FIELDS.items() if not isinstance(recipe[name], kind)]
    if wrong or not isinstance(recipe["data"].get("class_names"), list):
        raise InputError(f"{path / RECIPE} is damaged: its {wrong[0] if wrong else 'data'} is of another kind")
    config = config_io.completed(config_io.from_fields(recipe["config"]), str(path / RECIPE))
    config_rules.validate(config)
    params = _load_unet(path / "unet", config, len(recipe["data"]["class_names"])) | _load_first_stage(path, config)
    return Exported(params=params, **{name: recipe[name] for name in FIELDS} | {"config": config})


def _load_unet(path: Path, config: ConfigDict, num_classes: int) -> dict[str, Any]:
    """{"unet", "conditioner"}."""
    tokens, width, rows = config.unet.context_tokens, config.unet.context_dim, num_classes + 1
    try:
        state, table = split_table(read_state_dict(path, dtype=np.float32), rows * tokens, width)
    except InputError as error:
        raise InputError(f"{path}: {error}, which {RECIPE} speaks of") from error
    return {
        "unet": params_from_state_dict(state, abstract_params(pipeline_from_config.build_unet(config))),
        "conditioner": {"embedding": {"embedding": table.reshape(rows, tokens * width)}},
    }


def _load_first_stage(path: Path, config: ConfigDict) -> dict[str, Any]:
    """{"autoencoder", "shift", "scale"}."""
    autoencoder = pipeline_from_config.build_autoencoder(config)
    scaling = dict(zip(("shift", "scale"), latents_scaling(path, pipeline_from_config.latent_shape(config)[-1])))
    if autoencoder is None:
        return {"autoencoder": {}, **scaling}
    state = read_state_dict(path / "vae", dtype=np.float32)
    return {"autoencoder": params_from_state_dict(state, abstract_params(autoencoder)), **scaling}
