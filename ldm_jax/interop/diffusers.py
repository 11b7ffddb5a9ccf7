"""diffusers' state dicts <-> Flax parameters: renaming and transposing, nothing else.

| diffusers                           | Flax                                                      |
|-------------------------------------|-----------------------------------------------------------|
| `down_blocks.0.resnets.1.conv1`     | `params["down_blocks_0"]["resnets_1"]["conv1"]`           |
| convolution `weight` [O, I, H, W]   | `kernel` [H, W, I, O]                                     |
| linear `weight` [O, I]              | `kernel` [I, O]                                           |
| norm `weight`, embedding `weight`   | `scale`, `embedding`                                      |
| `bias`, parameters of no layer      | the same name                                             |
"""

import re
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ldm_jax.errors import InputError
from ldm_jax.interop.stored import Stored

Params = Mapping[str, Any]
Path = tuple[str, ...]

# `linear_1` (time embedding) and `proj_out_1` (DiT) are names; every other `name_N` is entry N of a list, `name.N` in
# torch.
_LIST_ENTRY = re.compile(r"(?!linear_|proj_out_)(.+)_(\d+)")

# The names of self-attention layers in diffusers before 0.16.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(rf"(?<=\.attentions\.\d\.)({'|'.join(_OLD_NAMES)})(?=\.)")

# Axes of kernels by their number: Flax from torch, and back.
_FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0)}
_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}

_WEIGHTS = ("kernel", "scale", "embedding")  # `weight` in torch


def params_from_state_dict(state: Mapping[str, np.ndarray | Stored], target: Params) -> dict[str, Any]:
    """Flax parameters from a diffusers state dict.

    Args:
      state: name -> array or `Stored`; names and 1x1-convolution shapes of attention in old files are understood too.
      target: a tree of arrays or `jax.ShapeDtypeStruct` with the structure and shapes of the parameters.

    Returns:
      A tree like `target` of NumPy arrays with the dtypes of `state`: views of its arrays where possible; `Stored`
      tensors are read into aligned memory.

    Raises InputError: keys are missing, unexpected or of another shape, all of which are named; a tensor is not finite.
    """
    state = {new_name(key): value for key, value in state.items()}
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten_dict(target).items()}
    keys = {path: _torch_name(path) for path in shapes}
    flat, misshapen = {}, []
    for path, key in keys.items():
        if key in state:
            flat[path] = _from_torch(path, state[key], shapes[path])
            if flat[path].shape != shapes[path]:
                misshapen.append(f"{key} {state[key].shape} for {shapes[path]}")
            check_finite(key, flat[path])
    missing, unexpected = set(keys.values()) - set(state), set(state) - set(keys.values())
    if wrong := mismatch({"missing keys": missing, "unexpected keys": unexpected, "size mismatch": misshapen}):
        raise InputError(f"the state_dict does not fit this model: {wrong}")
    return unflatten_dict(flat)


def new_name(key: str) -> str:
    """The name in diffusers of a tensor that may have one of before version 0.16."""
    return _OLD_NAME.sub(lambda match: _OLD_NAMES[match[0]], key)


def check_finite(name: str, tensor: np.ndarray) -> None:
    """Raises InputError, with its name, for a tensor of floats [...] with nan or inf."""
    if not _is_finite(tensor):
        raise InputError(f"{name} has values that are not finite (nan or inf): the file is damaged")


def _is_finite(tensor: np.ndarray) -> bool:
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        return True
    with np.errstate(all="ignore"):
        total = tensor.sum(dtype=np.float32)  # not finite if one is not, and faster than looking at each
    return bool(np.isfinite(total) or np.isfinite(tensor.astype(np.float32)).all())


def cast(state: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """The arrays of a state dict in another dtype; raises InputError for values beyond its range."""
    with np.errstate(over="ignore"):  # named below
        converted = {name: array.astype(jnp.dtype(dtype), copy=False) for name, array in state.items()}
    for name, array in converted.items():
        if not _is_finite(array):
            beyond = "and bfloat16 has the range of float32" if dtype == "float16" else "the model is damaged"
            raise InputError(f"in {dtype} {name} has values that are not finite (nan or inf); {beyond}")
    return converted


def mismatch(names: Mapping[str, Collection[str]]) -> str:
    """The part of an error message that lists keys by what is wrong with them, with their number; "" if none is."""
    return "; ".join(f"{what} ({len(each)}): {', '.join(sorted(each))}" for what, each in names.items() if each)


def state_dict_from_params(params: Params) -> dict[str, np.ndarray]:
    """The inverse: a diffusers state dict of NumPy arrays, each of its Flax shape but for kernels, transposed views.

    `weights.write_safetensors` writes such views correctly; safetensors' own `save_file` does not.
    """
    state = {}
    for path, leaf in flatten_dict(params).items():
        value = np.asarray(leaf)
        if path[-1] == "kernel":
            value = value.transpose(_TO_TORCH[value.ndim])
        state[_torch_name(path)] = value
    return state


def names_of(params: Params) -> list[str]:
    """The names of a tree of parameters in a diffusers state dict."""
    return [_torch_name(path) for path in flatten_dict(params)]


def _torch_name(path: Path) -> str:
    """("down_blocks_0", "conv_in", "kernel") -> "down_blocks.0.conv_in.weight"."""
    *modules, leaf = path
    names = [_LIST_ENTRY.sub(r"\1.\2", name) if _LIST_ENTRY.fullmatch(name) else name for name in modules]
    return ".".join([*names, "weight" if leaf in _WEIGHTS else leaf])


def _from_torch(path: Path, value: np.ndarray | Stored, shape: tuple[int, ...]) -> np.ndarray:
    """One array in Flax's layout, of `shape` if the state dict fits."""
    change = partial(_kernel_from_torch, shape=shape) if path[-1] == "kernel" else lambda value: value
    return value.then(change).laid_out() if isinstance(value, Stored) else change(np.asarray(value))


def _kernel_from_torch(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if value.ndim == 4 and len(shape) == 2 and value.shape[2:] == (1, 1):
        value = value[:, :, 0, 0]  # old files store linear maps of attention as 1x1 convolutions
    return value.transpose(_FROM_TORCH[value.ndim]) if value.ndim in _FROM_TORCH else value
