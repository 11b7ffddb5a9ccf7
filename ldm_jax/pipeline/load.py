"""A trained model, read back from its run folder."""

from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.config import io as config_io
from ldm_jax.config import rules as config_rules
from ldm_jax.errors import InputError
from ldm_jax.pipeline import base_model, from_diffusers, from_exported, from_run, trainable
from ldm_jax.pipeline.from_config import build_conditioner, build_unet, latent_shape
from ldm_jax.pipeline.model import Trained
from ldm_jax.pipeline.overrides import NO_EXTRAS, Extras
from ldm_jax.run_folder import checkpoint
from ldm_jax.run_folder.checkpoint import load_latest
from ldm_jax.runtime import files as runtime_files


def load(path: Path, dtype: str | None = None, extras: Extras = NO_EXTRAS) -> Trained:
    """Reads a run folder, or what `convert` made of one, a diffusers folder or a single file.

    Args:
      path: of any of them.
      dtype: of the arithmetic; None: as in the config.
      extras: what a diffusers folder or a single file does not say.

    Raises:
      InputError: it is none of them, is not trained yet, or does not fit its own config.
    """
    if is_pretrained(path):
        model, config, params = from_diffusers.load(path, dtype or "float32", extras)
        return Trained(config, model.class_names, params, 0, model)
    for name, value in extras._asdict().items():
        if value:
            raise InputError(f"--{name} is for diffusers folders and single files; --model={path} is neither")
    if from_exported.is_exported(path):
        found = from_exported.load(path)
        class_names = tuple(found.data["class_names"])
        return Trained(_with_dtype(found.config, dtype), class_names, found.params, found.step)
    if not path.is_dir():
        problem = "is a file of another kind" if path.exists() else "does not exist"
        raise InputError(
            f"--model={path} {problem}; it must be a run folder, e.g. runs/fashion_mnist, a diffusers folder, or a "
            "model in one .safetensors or .ckpt"
        )
    config = config_io.of_run(path / "config.json")
    config_rules.validate(config)
    class_names = tuple(runtime_files.read_json(path / "data.json", "class_names")["class_names"])
    if "diffusion" not in config.stages:
        raise InputError(f"--model={path} has no diffusion model: its config.stages are {', '.join(config.stages)}")
    if config.init_from or config_rules.tells_texts(config):
        return _load_fine_tuned(path, _with_dtype(config, dtype))
    model = at_step(Trained(_with_dtype(config, dtype), class_names, {}, 0), path)
    return model._replace(params=model.params | from_run.load_first_stage(path, config))


def at_step(model: Trained, path: Path, up_to: float = np.inf) -> Trained:
    """The model of a run folder, which is not fine-tuned, as it was at its newest checkpoint of `up_to` steps at most.

    Raises:
      InputError: there is none, or it does not fit the model's config.
    """
    flat = load_latest(path / "diffusion", up_to)
    unet, conditioner = build_unet(model.config), build_conditioner(model.config, len(model.class_names))
    network = trainable.labelled(unet, conditioner, (*latent_shape(model.config)[:2], unet.in_channels))
    like = jax.eval_shape(network.init, jax.random.key(0))
    params = checkpoint.averaged(flat, like, path / "diffusion")
    return model._replace(params=model.params | params, step=int(flat["step"]))


def is_pretrained(path: Path) -> bool:
    """Whether this is a model of other people: a diffusers folder, unless `convert` made it of a run, or one file."""
    return not from_exported.is_exported(path) and (
        from_diffusers.is_folder(path) or from_diffusers.is_single_file(path)
    )


def _with_dtype(config: ConfigDict, dtype: str | None) -> ConfigDict:
    if dtype is not None:
        with config.unlocked():
            config.dtype = dtype
    return config


def _load_fine_tuned(path: Path, config: ConfigDict) -> Trained:
    """The model that the run began with, which must still be there, with what the run has made of it."""
    about = runtime_files.read_json(path / "data.json", "class_names")
    if config.init_from:
        base, config = base_model.load_base(config, config.dtype)
        if about.get("init_from_fingerprint") != base.fingerprint:
            raise InputError(
                f"--model={path} was fine-tuned from another model than config.init_from={config.init_from} is"
            )
    else:
        base = from_run.base_of(path, config, draw_unet=False)
    flat = load_latest(path / "diffusion")
    params = trainable.with_trained(
        config, base, checkpoint.averaged(flat, trainable.trained_shapes(config, base), path / "diffusion")
    )
    class_names = tuple(about["class_names"]) if base.model.classes else ()
    return Trained(config, class_names, params, int(flat["step"]), base.model)
