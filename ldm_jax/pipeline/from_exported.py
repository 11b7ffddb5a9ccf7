"""A model from a diffusers folder that `convert` wrote of a run.

model_index.json   of diffusers; the latents' scaling, the concat conditioning   unet/        with the class embedding
pipeline.py        the class of diffusers that samples from it                   vae/         unless it is of pixels
guide_unet/        of an earlier step, by which the run guides its samples: only with sampling.guide_step
recipe.json        config and data of the run, and its numbers of steps          scheduler/
README.md          the model card

The class embedding is part of the UNet there: see `class_table`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ldm_jax.config import io as config_io
from ldm_jax.config.rules import validate
from ldm_jax.errors import InputError
from ldm_jax.interop.class_table import split_table
from ldm_jax.interop.diffusers import params_from_state_dict
from ldm_jax.interop.modules import abstract_params
from ldm_jax.interop.pipelines import GUIDE, RECIPE
from ldm_jax.interop.weights import read_state_dict
from ldm_jax.pipeline.from_config import from_config
from ldm_jax.pipeline.from_diffusers import latents_scaling
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.runtime.files import read_json


class Record(NamedTuple):
    """The record of a run in recipe.json."""

    config: ConfigDict
    data: dict[str, Any]  # its data.json
    step: int  # updates of the denoiser
    autoencoder_step: int  # and of the autoencoder; 0 of a model of pixels
    measured_on: str  # the data that the latents' scale was measured on


TYPES = {"config": dict, "data": dict, "step": int, "autoencoder_step": int, "measured_on": str}


def from_exported(path: Path, dtype: str | None = None, step: float = np.inf) -> tuple[LatentDiffusion, Params]:
    """The model of an exported folder; `dtype` is of the computation, None: of its config.

    Of fewer than the run's steps it is the earlier checkpoint that guides the samples.

    Raises InputError if something is missing or damaged, or does not fit the config in recipe.json.
    """
    record = read_record(path)
    if dtype is not None:
        with record.config.unlocked():
            record.config.dtype = dtype
    model = from_config(record.config, tuple(record.data["class_names"]))
    whole = step >= record.step
    params, autoencoder = _load_unet(path / ("unet" if whole else GUIDE), model), model.first_stage.module
    params |= dict(zip(("shift", "scale"), latents_scaling(path, model.latent_shape[-1])), first_stage={})
    if autoencoder is not None:
        state = read_state_dict(path / "vae", dtype=np.float32)
        params["first_stage"] = params_from_state_dict(state, abstract_params(autoencoder))
    done = record.step if whole else record.config.sampling.guide_step
    return replace(model, origin=model.origin._replace(path=path, step=done, data=record.data)), params


def read_record(path: Path) -> Record:
    """The record of the run in an exported folder; raises InputError if it is damaged."""
    fields = read_json(path / RECIPE, *TYPES)
    wrong = [name for name, of_type in TYPES.items() if not isinstance(fields[name], of_type)]
    if wrong or not isinstance(fields["data"].get("class_names"), list):
        raise InputError(f"{path / RECIPE} is damaged: its {wrong[0] if wrong else 'data'} is of another type")
    config = config_io.with_defaults(config_io.from_fields(fields["config"]), str(path / RECIPE))
    validate(config)
    return Record(**{name: fields[name] for name in TYPES} | {"config": config})


def _load_unet(path: Path, model: LatentDiffusion) -> Params:
    """{"denoiser", "conditioning"}."""
    embedder = model.conditioning.embedder
    rows = embedder.num_classes + 1
    try:
        state, table = split_table(read_state_dict(path, dtype=np.float32), rows * embedder.tokens, embedder.dim)
    except InputError as error:
        raise InputError(f"{path}: {error}, which {RECIPE} describes") from error
    return {
        "denoiser": params_from_state_dict(state, abstract_params(model.denoiser)),
        "conditioning": {"embedding": {"embedding": table.reshape(rows, embedder.tokens * embedder.dim)}},
    }
