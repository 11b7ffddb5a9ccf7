"""A trained model, read back from its run folder."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import (
    builders,
    config_rules,
    configuration,
    exported,
    finetune,
    pretrained_files,
    run_folder,
    run_parts,
    text_run,
)
from ldm_jax.errors import InputError
from ldm_jax.extras import NO_EXTRAS, Extras
from ldm_jax.first_stage import make_first_stage, reconstruct
from ldm_jax.interop.lora import add_lora, read_lora
from ldm_jax.pretrained import Pretrained
from ldm_jax.run_folder import content_hash
from ldm_jax.training.checkpoint import load_latest
from ldm_jax.training.parallel import map_in_batches, parallel_map, replicate


class Trained(NamedTuple):
    """Everything that makes pictures."""

    config: ConfigDict
    class_names: tuple[str, ...]  # () for unlabelled sets
    params: dict[str, Any]  # unet, conditioner, autoencoder, shift, scale: what `generate` takes
    step: int  # updates behind the parameters
    pretrained: Pretrained | None = None  # what a diffusers folder or file holds beside; None for a run of ours


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
        model, config, params = pretrained_files.load(path, dtype or "float32", extras)
        return Trained(config, model.class_names, params, 0, model)
    for name, value in extras._asdict().items():
        if value:
            raise InputError(f"--{name} is for diffusers folders and single files; --model={path} is neither")
    if exported.is_exported(path):
        found = exported.load(path)
        class_names = tuple(found.data["class_names"])
        return Trained(_with_dtype(found.config, dtype), class_names, found.params, found.step)
    if not path.is_dir():
        problem = "is a file of another kind" if path.exists() else "does not exist"
        raise InputError(
            f"--model={path} {problem}; it must be a run folder, e.g. runs/fashion_mnist, a diffusers folder, or a "
            "model in one .safetensors or .ckpt"
        )
    config = configuration.of_run(path / "config.json")
    config_rules.validate(config)
    class_names = tuple(run_folder.read_json(path / "data.json", "class_names")["class_names"])
    if "diffusion" not in config.stages:
        raise InputError(f"--model={path} has no diffusion model: its config.stages are {', '.join(config.stages)}")
    if config.init_from or config_rules.tells_texts(config):
        return _load_fine_tuned(path, _with_dtype(config, dtype))
    model = at_step(Trained(_with_dtype(config, dtype), class_names, {}, 0), path)
    return model._replace(params=model.params | run_parts.load_first_stage(path, config))


def at_step(model: Trained, path: Path, up_to: float = np.inf) -> Trained:
    """The model of a run folder, which is not fine-tuned, as it was at its newest checkpoint of `up_to` steps at most.

    Raises:
      InputError: there is none, or it does not fit the model's config.
    """
    flat = load_latest(path / "diffusion", up_to)
    stage = builders.build_diffusion_stage(model.config, len(model.class_names))
    like = jax.eval_shape(stage.init, jax.random.key(0)).ema_params
    params = run_parts.averaged(flat, like, path / "diffusion")
    return model._replace(params=model.params | params, step=int(flat["step"]))


def is_pretrained(path: Path) -> bool:
    """Whether this is a model of other people: a diffusers folder, unless `convert` made it of a run, or one file."""
    return not exported.is_exported(path) and (
        pretrained_files.is_folder(path) or pretrained_files.is_single_file(path)
    )


def _with_dtype(config: ConfigDict, dtype: str | None) -> ConfigDict:
    if dtype is not None:
        with config.unlocked():
            config.dtype = dtype
    return config


def _load_fine_tuned(path: Path, config: ConfigDict) -> Trained:
    """The model that the run began with, which must still be there, with what the run has made of it."""
    about = run_folder.read_json(path / "data.json", "class_names")
    if config.init_from:
        base, config = finetune.load_base(config, config.dtype)
        if about.get("init_from_fingerprint") != base.fingerprint:
            raise InputError(
                f"--model={path} was fine-tuned from another model than config.init_from={config.init_from} is"
            )
    else:
        base = text_run.base_of(path, config, draw_unet=False)
    flat = load_latest(path / "diffusion")
    params = finetune.with_trained(
        config, base, run_parts.averaged(flat, finetune.trained_shapes(config, base), path / "diffusion")
    )
    class_names = tuple(about["class_names"]) if base.model.classes else ()
    return Trained(config, class_names, params, int(flat["step"]), base.model)


def with_lora(model: Trained, path: Path, scale: float) -> Trained:
    """The model with a file's LoRA added to its UNet, `scale` times; raises InputError for one of another model."""
    unet = add_lora(model.params["unet"], read_lora(path), scale, where=f"--lora={path}")
    return model._replace(params=model.params | {"unet": unet})


def fingerprint(model: Trained) -> str:
    """A hash of all parameters, and of what they predict if a user can say: equal means the same model."""
    return content_hash(model.params, *([model.config.diffusion.prediction] if model.pretrained else []))


def reconstructions(model: Trained, images: np.ndarray, batch_size: int) -> np.ndarray | None:
    """Images uint8 [N, H, W, C] through the autoencoder and back; None in pixel space, which has none."""
    if model.config.autoencoder.kind == "none":
        return None
    autoencoder = model.pretrained.autoencoder if model.pretrained else builders.build_autoencoder(model.config)
    first_stage = make_first_stage(autoencoder)
    decode = parallel_map(lambda params, batch: reconstruct(first_stage, params, batch["x"]))
    return map_in_batches(decode, replicate(model.params["autoencoder"]), {"x": images}, batch_size)


def at_size(model: Trained, size: tuple[int, int]) -> Trained:
    """The model for pictures of this (height, width); a run of ours has but one size."""
    if tuple(size) == builders.picture_size(model.config):
        return model
    config = model.config.copy_and_resolve_references().unlock()
    config.data.image_size = tuple(size)
    return model._replace(config=config.lock())
