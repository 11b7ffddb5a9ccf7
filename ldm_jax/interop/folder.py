"""Folders of diffusers: a pipeline's index, and the config and weights of its components, read and written."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn
from numpy.typing import DTypeLike

from ldm_jax.errors import InputError
from ldm_jax.interop import class_table
from ldm_jax.interop.diffusers import params_from_state_dict
from ldm_jax.interop.modules import VERSION, abstract_params, autoencoder_from_config, unet_from_config
from ldm_jax.interop.weights import read_state_dict, weight_files, write_safetensors
from ldm_jax.models.autoencoder import AutoencoderKL, VQModel
from ldm_jax.models.layers import Dtype
from ldm_jax.models.unet import UNet
from ldm_jax.models.unet2d import UNet2D
from ldm_jax.runtime.files import read_json, write_json

INDEX = "model_index.json"
# Judges of the pictures and what prepares them for these: no part of the model.
SKIPPED = ("safety_checker", "feature_extractor")


def read_index(path: Path) -> dict[str, tuple[str, str]]:
    """The components of a pipeline's folder: name -> (library, class); absent ones and `SKIPPED` are left out.

    Raises:
      InputError: if there is no model_index.json, or it is damaged, or names no component.
    """
    entries = _read_object(path, INDEX)
    components = {
        name: tuple(entry)
        for name, entry in entries.items()
        if _is_component(name, entry) and None not in entry and name not in SKIPPED
    }
    if not components:
        raise InputError(f"{Path(path) / INDEX} is damaged: it names no component")
    return components


def read_settings(path: Path) -> dict[str, Any]:
    """What else a pipeline's model_index.json says: `_class_name` and options; same errors as `read_index`."""
    entries = _read_object(path, INDEX)
    return {name: entry for name, entry in entries.items() if not _is_component(name, entry)}


def _is_component(name: str, entry: Any) -> bool:
    """A custom pipeline's own class is such a pair too: the file that has it, and its name."""
    return (
        name != "_class_name"
        and isinstance(entry, list)
        and len(entry) == 2
        and all(isinstance(e, str | None) for e in entry)
    )


def component_config(path: Path, name: str) -> dict[str, Any]:
    """The JSON config of a pipeline's component; InputError if it is missing or damaged."""
    return _read_object(Path(path) / name, "scheduler_config.json" if name.endswith("scheduler") else "config.json")


def _read_object(folder: Path, name: str) -> dict[str, Any]:
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}")
    value = read_json(folder / name)
    if not isinstance(value, dict):
        raise InputError(f"{folder / name} is damaged: it holds no JSON object")
    return value


def load_unet(
    folder: Path, *, variant: str | None = None, dtype: Dtype = None, params_dtype: DTypeLike = np.float32
) -> tuple[UNet | UNet2D, dict[str, Any]]:
    """The network of a UNet's folder.

    Args:
      folder: with config.json and weights, such as the unet/ of Stable Diffusion.
      variant: of the weights, see `read_state_dict`.
      dtype: type of the computation; None means that of the input.
      params_dtype: type of the parameters, float32 or bfloat16.

    Returns:
      The module; its parameters, NumPy arrays.

    Raises:
      InputError: if anything is missing, damaged, or not supported.
    """
    config = _read_object(folder, "config.json")
    with _told_of(folder):
        unet = unet_from_config(config, dtype=dtype)
    return unet, _load_params(folder, unet, variant, params_dtype)


def load_unet_of_classes(
    folder: Path, rows: int, *, dtype: Dtype = None, params_dtype: DTypeLike = np.float32
) -> tuple[UNet, dict[str, Any], np.ndarray]:
    """As `load_unet`, and what it is told of classes (see `class_table`), of which there are so many rows."""
    config = _read_object(folder, "config.json")
    with _told_of(folder):
        unet = unet_from_config(config | class_table.NO_FIELDS, dtype=dtype)
        if not isinstance(unet, UNet):
            raise InputError(f"a {config['_class_name']} is told of no classes; it must be a UNet2DConditionModel")
        state = read_state_dict(folder, dtype=params_dtype)
        state, table = class_table.split_table(state, rows, unet.cross_attention_dim)
        return unet, params_from_state_dict(state, abstract_params(unet)), table


def load_autoencoder(
    folder: Path, *, variant: str | None = None, dtype: Dtype = None, params_dtype: DTypeLike = np.float32
) -> tuple[AutoencoderKL | VQModel, dict[str, Any], np.ndarray, np.ndarray]:
    """The network of an autoencoder's folder; arguments and errors as in `load_unet`.

    Returns:
      The module; its parameters; shift and scale of its latents, each [c], see `autoencoder_from_config`.
    """
    config = _read_object(folder, "config.json")
    with _told_of(folder):
        autoencoder, shift, scale = autoencoder_from_config(config, dtype=dtype)
    return autoencoder, _load_params(folder, autoencoder, variant, params_dtype), shift, scale


def _load_params(folder: Path, module: nn.Module, variant: str | None, dtype: DTypeLike) -> dict[str, Any]:
    with _told_of(folder):
        target = abstract_params(module)
    state = read_state_dict(folder, variant=variant, dtype=dtype)
    with _told_of(folder):
        return params_from_state_dict(state, target)


@contextmanager
def _told_of(folder: Path) -> Iterator[None]:
    """Says which folder an error is about."""
    try:
        yield
    except InputError as error:
        told = str(error)
        raise InputError(told if str(folder) in told else f"{folder}: {told}") from error


def write_component(folder: Path, config: Mapping[str, Any], state: Mapping[str, np.ndarray]) -> None:
    """Writes a component's config and weights; each file appears whole, the config last.

    Args:
      folder: a new one, or one that this function wrote: any weights in it must be those that are replaced.
      config: of a diffusers class if it has a `_class_name`, else of transformers; see `modules` for the former.
      state: name -> array, as `state_dict_from_params` gives.

    Raises:
      InputError: if the folder is a file, or holds other weights, which a reader might prefer.
      OSError: if a file cannot be written.
    """
    folder, is_diffusers = Path(folder), "_class_name" in config
    name = f"{'diffusion_pytorch_model' if is_diffusers else 'model'}.safetensors"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; it must be a folder or not exist yet")
    others = [other for other in weight_files(folder) if other != name]
    if others:
        raise InputError(f"{folder} holds other weights ({others[0]}); remove them, or choose another folder")
    write_safetensors(folder / name, state)
    write_json(folder / "config.json", {"_diffusers_version": VERSION} | dict(config) if is_diffusers else dict(config))
