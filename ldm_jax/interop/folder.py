"""diffusers folders: a pipeline's model_index.json, and the config and weights of its components, read and written."""

from collections.abc import Mapping
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
from ldm_jax.runtime.files import prefix_errors, read_json_object, write_json

INDEX = "model_index.json"
SKIPPED = ("safety_checker", "feature_extractor")  # they check samples and are no part of the model


def read_index(path: Path) -> dict[str, tuple[str, str]]:
    """The components in a pipeline's model_index.json: name -> (library, class), without absent ones and `SKIPPED`.

    Raises InputError: there is no model_index.json, or it is damaged, or names no component.
    """
    components = {
        name: tuple(entry)
        for name, entry in _read_object(path, INDEX).items()
        if _is_component(name, entry) and None not in entry and name not in SKIPPED
    }
    if not components:
        raise InputError(f"{Path(path) / INDEX} is damaged: it names no component")
    return components


def read_settings(path: Path) -> dict[str, Any]:
    """The other fields of model_index.json: `_class_name` and the pipeline's options; errors as in `read_index`."""
    return {name: entry for name, entry in _read_object(path, INDEX).items() if not _is_component(name, entry)}


def _is_component(name: str, entry: Any) -> bool:
    """Whether a field of the index is a (library, class) pair; so is a custom pipeline's `_class_name`."""
    is_pair = isinstance(entry, list) and len(entry) == 2 and all(isinstance(e, str | None) for e in entry)
    return is_pair and name != "_class_name"


def component_config(path: Path, name: str) -> dict[str, Any]:
    """The JSON config of a pipeline's component; InputError if it is missing or damaged."""
    return _read_object(Path(path) / name, "scheduler_config.json" if name.endswith("scheduler") else "config.json")


def _read_object(folder: Path, name: str) -> dict[str, Any]:
    if not Path(folder).is_dir():
        raise InputError(f"there is no folder {folder}")
    return read_json_object(Path(folder) / name)


def load_unet(
    folder: Path, *, variant: str | None = None, dtype: Dtype = None, params_dtype: DTypeLike = np.float32
) -> tuple[UNet | UNet2D, dict[str, Any]]:
    """The UNet in a component's folder, and its parameters, NumPy arrays.

    Args:
      folder: with config.json and weights, such as the unet/ of Stable Diffusion.
      variant: of the weights, see `read_state_dict`.
      dtype: of the computation; None: that of the input.
      params_dtype: of the parameters, float32 or bfloat16.

    Raises InputError: a file is missing, damaged, or not supported.
    """
    config = _read_object(folder, "config.json")
    with prefix_errors(folder):
        unet = unet_from_config(config, dtype=dtype)
        return unet, _load_params(folder, unet, variant, params_dtype)


def load_class_conditional_unet(
    folder: Path, rows: int, *, dtype: Dtype = None, params_dtype: DTypeLike = np.float32
) -> tuple[UNet, dict[str, Any], np.ndarray]:
    """As `load_unet`, and the class embedding stored in it, [rows, cross_attention_dim], see `class_table`."""
    config = _read_object(folder, "config.json")
    with prefix_errors(folder):
        unet = unet_from_config(config | class_table.NO_FIELDS, dtype=dtype)
        if not isinstance(unet, UNet):
            raise InputError(f"a class-conditional UNet must be a UNet2DConditionModel; got {config['_class_name']}")
        state = read_state_dict(folder, dtype=params_dtype)
        state, table = class_table.split_table(state, rows, unet.cross_attention_dim)
        return unet, params_from_state_dict(state, abstract_params(unet)), table


def load_autoencoder(
    folder: Path, *, variant: str | None = None, dtype: Dtype = None, params_dtype: DTypeLike = np.float32
) -> tuple[AutoencoderKL | VQModel, dict[str, Any], np.ndarray, np.ndarray]:
    """The autoencoder in a component's folder; arguments and errors as in `load_unet`.

    Returns:
      The module; its parameters; shift and scale of its latents, each [c], see `autoencoder_from_config`.
    """
    config = _read_object(folder, "config.json")
    with prefix_errors(folder):
        autoencoder, shift, scale = autoencoder_from_config(config, dtype=dtype)
        return autoencoder, _load_params(folder, autoencoder, variant, params_dtype), shift, scale


def _load_params(folder: Path, module: nn.Module, variant: str | None, dtype: DTypeLike) -> dict[str, Any]:
    target = abstract_params(module)
    return params_from_state_dict(read_state_dict(folder, variant=variant, dtype=dtype), target)


def write_component(folder: Path, config: Mapping[str, Any], state: Mapping[str, np.ndarray]) -> None:
    """Writes a component's config.json and weights; each file atomically, the config last.

    Args:
      folder: a new one, or one written by this function, whose files are replaced.
      config: of a diffusers class (see `modules`) if it has a `_class_name`, else of transformers.
      state: name -> array, see `state_dict_from_params`.

    Raises InputError if the folder is a file, or holds other weights, which a reader might prefer.
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
