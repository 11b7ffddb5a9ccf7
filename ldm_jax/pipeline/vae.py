"""The autoencoder of --vae, in place of a model's own."""

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.interop import folder, hub, single_file
from ldm_jax.models.autoencoder import AutoencoderKL, VQModel
from ldm_jax.pipeline.model import LatentDiffusion, Params


class Autoencoder(NamedTuple):
    """An autoencoder from a file or folder, its parameters, and the shift and scale [c] of its latents if known."""

    module: AutoencoderKL | VQModel
    params: Params
    shift: np.ndarray | None
    scale: np.ndarray | None


def load_vae(vae: str, dtype: str) -> Autoencoder:
    """The autoencoder of --vae: a component's folder, a pipeline's, a single file, or a hub id.

    Raises InputError if it is missing or damaged.
    """
    path, dtypes = hub.find_vae(vae), {"dtype": jnp.dtype(dtype), "params_dtype": jnp.dtype(dtype)}
    if not path.is_file():
        where = path / "vae" if (path / "vae").is_dir() else path
        return Autoencoder(*folder.load_autoencoder(where, **dtypes))
    module, params, factor = single_file.read_autoencoder(path, **dtypes)
    if factor is None:
        return Autoencoder(module, params, None, None)
    channels = module.latent_channels
    return Autoencoder(module, params, np.zeros(channels, np.float32), np.full(channels, factor, np.float32))


def with_autoencoder(model: LatentDiffusion, params: Params, vae: str) -> tuple[LatentDiffusion, Params]:
    """The model with the autoencoder of --vae; raises InputError as `load_vae`, or if it has other latents."""
    autoencoder = load_vae(vae, model.dtype)
    check_scaling(autoencoder, params["shift"], params["scale"] * np.float32(model.sigma_data), vae)
    fields = ("latent_channels", "in_channels", "downsampling")
    own, new = (
        [type(m).__name__, *(getattr(m, name) for name in fields)]
        for m in (model.first_stage.module, autoencoder.module)
    )
    if own != new:
        raise InputError(f"{_problem(vae)}: class, {', '.join(fields)} {new}, not {own}")
    first_stage = replace(model.first_stage, module=autoencoder.module)
    return replace(model, first_stage=first_stage), params | {"first_stage": autoencoder.params}


def check_scaling(autoencoder: Autoencoder, shift: np.ndarray, scale: np.ndarray, vae: str) -> None:
    """Raises InputError if shift and scale [c] of an autoencoder's latents are known, and not these."""
    for name, value, own in (("shift", autoencoder.shift, shift), ("scale", autoencoder.scale, scale)):
        if value is not None and not np.array_equal(value, own):
            values = f"{value.tolist()}, those of --model {own.tolist()}"
            raise InputError(f"{_problem(vae)}: their {name} is {values}")


def _problem(vae: str) -> str:
    return f"--vae={vae} has other latents than --model"
