"""Loads a model from any path: the one place that tells formats apart."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from ldm_jax.config import io as config_io
from ldm_jax.config.rules import validate
from ldm_jax.errors import InputError
from ldm_jax.interop import folder, hub, single_file
from ldm_jax.interop.pipelines import GUIDE, RECIPE
from ldm_jax.pipeline.fine_tuning import prepare_base, weights_fingerprint
from ldm_jax.pipeline.from_diffusers import from_diffusers
from ldm_jax.pipeline.from_exported import from_exported
from ldm_jax.pipeline.from_run import from_run
from ldm_jax.pipeline.from_single_file import NO_OVERRIDES, Overrides, from_single_file
from ldm_jax.pipeline.model import LatentDiffusion, Params, fingerprint
from ldm_jax.pipeline.textual_inversion import with_initial_token
from ldm_jax.pipeline.vae import with_autoencoder
from ldm_jax.run_folder.store import checkpoint_steps, local_folder
from ldm_jax.runtime.object_store import is_url


def load(
    where: str | Path,
    dtype: str | None = None,
    overrides: Overrides = NO_OVERRIDES,
    step: float = np.inf,
    ema_sigma_rel: float | None = None,
) -> tuple[LatentDiffusion, Params]:
    """The model at a path or on the hub, and its parameters, NumPy arrays.

    Args:
      where: a run folder or its URL, a diffusers folder (perhaps made by `convert`), a single file, or a hub id.
      dtype: of the computation, and of the parameters of diffusers folders and single files; None: as in the config of
        a run, else float32.
      overrides: what a diffusers folder or a single file does not state.
      step: of a run: the newest checkpoint of at most so many steps; of an exported one, which of its two.
      ema_sigma_rel: of a run with power function averages: the length of the one to load, in place of the EMA.

    Raises:
      InputError: it is none of them, is not trained yet, or does not fit its own config.
    """
    with find(where) as path:
        return _load_path(path, dtype, overrides, step, ema_sigma_rel)


@contextmanager
def find(where: str | Path, *, flag: str = "--model") -> Iterator[Path]:
    """Yields the local path of a model: of a URL a mirror (see `store.local_folder`), of a hub id its snapshot."""
    if is_url(where):
        with local_folder(where, flag=flag) as path:
            yield path
    else:
        yield hub.find(where, flag=flag) if isinstance(where, str) else where


def _load_path(
    path: Path, dtype: str | None, overrides: Overrides, step: float, ema_sigma_rel: float | None
) -> tuple[LatentDiffusion, Params]:
    if ema_sigma_rel is not None and (is_single_file(path) or (path / folder.INDEX).is_file()):
        raise InputError(f"--ema_sigma_rel={ema_sigma_rel:g} is for run folders; --model={path} is none")
    if is_single_file(path):
        model, params = from_single_file(path, dtype or "float32", overrides)
    elif is_diffusers_folder(path):
        for name in ("tokenizer", "prediction"):
            if getattr(overrides, name):
                raise InputError(f"--{name} is for models in a single file; {path} has its own")
        model, params = from_diffusers(path, dtype or "float32")
    else:
        for name, value in overrides._asdict().items():
            if value:
                raise InputError(f"--{name} is for diffusers folders and single files; --model={path} is neither")
        return from_exported(path, dtype, step) if is_exported(path) else _load_run(path, dtype, step, ema_sigma_rel)
    return with_autoencoder(model, params, overrides.vae) if overrides.vae else (model, params)


def _load_run(
    path: Path, dtype: str | None, step: float, ema_sigma_rel: float | None
) -> tuple[LatentDiffusion, Params]:
    if not path.is_dir():
        problem = "is a file of another type" if path.exists() else "does not exist"
        raise InputError(
            f"--model={path} {problem}; it must be a run folder, e.g. runs/fashion_mnist, a diffusers folder, or a "
            "model in one .safetensors or .ckpt"
        )
    config = config_io.read_with_defaults(path / "config.json")
    validate(config)
    if "diffusion" not in config.stages:
        raise InputError(f"--model={path} has no diffusion model: its config.stages are {', '.join(config.stages)}")
    if dtype is not None:
        with config.unlocked():
            config.dtype = dtype
    base, config = load_base(config, config.dtype) if config.init_from else (None, config)
    return from_run(path, config, base, step, ema_sigma_rel)


def load_base(config: ConfigDict, dtype: str = "float32") -> tuple[tuple[LatentDiffusion, Params], ConfigDict]:
    """The model of `config.init_from` with its parameters in `dtype`, and the config with the fields it determines.

    In textual inversion the model has the new token.

    Raises InputError if there is no such model, or the config does not fit it.
    """
    with find(config.init_from, flag="config.init_from") as path:
        if not (is_diffusers_folder(path) or is_single_file(path) or is_run(path)):
            raise InputError(
                f"config.init_from={path} must be a diffusers folder, with a model_index.json, a model in one "
                ".safetensors or .ckpt, or a run folder; it is none of them"
            )
        try:
            model, params = load(path, dtype)
        except InputError as error:
            raise InputError(f"config.init_from={path}: {error}") from error
        of_weights = fingerprint(model, params) if is_run(path) else weights_fingerprint(path)
    model, config = prepare_base(config, model, of_weights)
    if config.textual_inversion.token:
        model, params = with_initial_token(model, params, config)
    return (model, params), config


def load_guide(model: LatentDiffusion) -> Params | None:
    """The parameters of the run's own earlier checkpoint that guides its samples by default (see `Defaults`).

    None if there is no such step, or it is not there.
    """
    step, path = model.defaults.guide_step, model.origin.path
    there = path is not None and ((path / GUIDE).is_dir() or step in checkpoint_steps(path / "diffusion"))
    return load(path, model.dtype, step=step)[1] if 0 < step < model.origin.step and there else None


def has_data(where: str) -> bool:
    """Whether the model at this path or hub id may have a data set, as a run does."""
    path = Path(where)
    return not (hub.is_hub_id(where) or is_diffusers_folder(path) or is_single_file(path))


def is_diffusers_folder(path: Path) -> bool:
    """Whether this is a diffusers folder that was not exported from a run."""
    return (path / folder.INDEX).is_file() and not is_exported(path)


def is_run(path: Path) -> bool:
    """Whether this is a run folder."""
    return (path / "config.json").is_file() and (path / "data.json").is_file()


def is_exported(path: Path) -> bool:
    """Whether this is a diffusers folder that was exported from a run."""
    return (path / RECIPE).is_file() and (path / folder.INDEX).is_file()


def is_single_file(path: Path) -> bool:
    """Whether this is a file that may hold a whole model."""
    return path.is_file() and path.suffix in single_file.SUFFIXES
