"""A model from a run folder: its config, and the EMA parameters of its checkpoints."""

import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.config.rules import text_conditioned
from ldm_jax.errors import InputError
from ldm_jax.interop.modules import abstract_params
from ldm_jax.models.conditioning import TextConditioning
from ldm_jax.pipeline.clip import clip_of, load_clip, text_conditioning
from ldm_jax.pipeline.data_record import INIT_FROM
from ldm_jax.pipeline.from_config import from_config, identity_scale, init_params
from ldm_jax.pipeline.model import LatentDiffusion, Params, stored
from ldm_jax.pipeline.posthoc_ema import posthoc_ema
from ldm_jax.pipeline.trainable import merge_trained, trainable_of, trained_shapes
from ldm_jax.run_folder.checkpoint import ema_params, load_latest, subtree
from ldm_jax.run_folder.store import address
from ldm_jax.runtime.files import content_hash, read_json, write_json

SCALE = "scale.json"  # of the latents, with the checkpoints of the autoencoder


def from_run(
    path: Path,
    config: ConfigDict,
    base: tuple[LatentDiffusion, Params] | None = None,
    step: float = np.inf,
    ema_sigma_rel: float | None = None,
) -> tuple[LatentDiffusion, Params]:
    """The trained model of a run folder: its newest checkpoint of at most `step` steps.

    `config` is that of the folder; `base`, of a run that fine-tunes, from `load.load_base`; `ema_sigma_rel` is the
    length of the average in place of the EMA, see `pipeline.posthoc_ema`. Raises InputError if the model is not trained
    yet, does not fit its own config, or was fine-tuned from another model.
    """
    about = read_json(path / "data.json", "class_names")
    flat, class_names = load_latest(path / "diffusion", step), tuple(about["class_names"])
    model, params = base or untrained(path, config, class_names)
    if base:
        if about.get(INIT_FROM) != model.origin.fingerprint:
            other = f"config.init_from={config.init_from} is"
            raise InputError(f"--model={path} was fine-tuned from another model than {other}")
        model = of_classes(model, class_names)
    trainable = trainable_of(config, model)
    like = trained_shapes(trainable, params)
    if ema_sigma_rel is None:
        trained = ema_params(flat, like, path / "diffusion")
    else:
        trained = posthoc_ema(path, config, flat, like, ema_sigma_rel)
    done, steps = int(flat["step"]), config.diffusion.steps
    if done < min(steps, step):
        print(f"note: --model={address(path)} is trained for {done:,} of {steps:,} steps so far", file=sys.stderr)
    origin = model.origin._replace(path=path, step=done, data=about, ema_sigma_rel=ema_sigma_rel)
    return replace(model, origin=origin), merge_trained(trainable, params, trained)


def untrained(path: Path, config: ConfigDict, class_names: tuple[str, ...]) -> tuple[LatentDiffusion, Params]:
    """The model of a run folder before its diffusion stage; params to be trained from scratch are shapes."""
    params, text = load_first_stage(path, config), None
    if text_conditioned(config):
        text, params["conditioning"] = text_conditioning(load_clip(path, config))
    model = from_config(config, class_names, text)
    if text:
        fingerprint = content_hash(stored(params), config.dtype)
        model = replace(model, origin=model.origin._replace(fingerprint=fingerprint))
    return model, params | _init_shapes(model)


def on_paper(config: ConfigDict, class_names: tuple[str, ...]) -> tuple[LatentDiffusion, Params]:
    """The model of a config before any stage, and the shapes of the parameters that diffusion trains.

    Raises InputError as `from_config`, or if a network cannot be built.
    """
    text, params = None, {}
    if text_conditioned(config):
        encoder = clip_of(config).text.clone(projection_dim=None)
        text, params = TextConditioning((encoder,), (), False), {"conditioning": [abstract_params(encoder)]}
    model = from_config(config, class_names, text)
    try:
        return model, params | _init_shapes(model)
    except ValueError as error:
        raise InputError(f"config: {error}") from error


@lru_cache(maxsize=8)  # a job needs them five times, and tracing a UNet takes seconds
def _init_shapes(model: LatentDiffusion) -> Params:
    return jax.eval_shape(lambda rng: init_params(model, rng), jax.random.key(0))


def of_classes(model: LatentDiffusion, class_names: tuple[str, ...]) -> LatentDiffusion:
    """A fine-tuned model with the classes of its data set, if it is conditioned on classes."""
    names = class_names if model.conditioning.num_classes else ()
    others = model.class_names[len(names) :]
    return replace(model, origin=model.origin._replace(class_names=names, other_class_names=others))


def load_first_stage(path: Path, config: ConfigDict) -> Params:
    """{"first_stage", "shift", "scale"} of a run folder; pixel space has no parameters, shift 0 and scale 1."""
    if config.autoencoder.type == "none":
        return {"first_stage": {}, **identity_scale(config.data.channels)}
    shift, scale, _ = load_scale(path)
    return {"first_stage": load_autoencoder_params(path), "shift": shift, "scale": scale}


def load_autoencoder_params(path: Path) -> Params:
    """The EMA parameters of a run folder's autoencoder; raises InputError if it has none."""
    return subtree(load_latest(path / "autoencoder"), "ema_params/autoencoder")


def load_scale(path: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """The latents' shift and scale, each [c], of a run folder, and the data that they were measured on."""
    fields = read_json(path / "autoencoder" / SCALE, "shift", "scale", "measured_on")
    return np.asarray(fields["shift"], np.float32), np.asarray(fields["scale"], np.float32), fields["measured_on"]


def save_scale(path: Path, shift: np.ndarray, scale: np.ndarray, *, measured_on: str) -> None:
    """Writes the latents' shift and scale, each [c], to a run folder's autoencoder."""
    fields = {"shift": shift.tolist(), "scale": scale.tolist(), "measured_on": measured_on}
    write_json(path / "autoencoder" / SCALE, fields)
