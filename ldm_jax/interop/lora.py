"""LoRA (Hu et al. 2021, arXiv:2106.09685) of a UNet: W + alpha / r B A, and its files in diffusers' format.

| diffusers, below the layer's name          | here, below its path                  |
|--------------------------------------------|---------------------------------------|
| `lora.down.weight` (A), [r, I]             | `lora` / `down` / `kernel`, [I, r]    |
| `lora.up.weight` (B), [O, r]               | `lora` / `up` / `kernel`, [r, O]      |

Also read: peft's names `lora_A` and `lora_B`, those of diffusers before 0.22, and LoRA of convolutions.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ldm_jax.errors import InputError
from ldm_jax.interop.diffusers import Params, state_dict_from_params
from ldm_jax.interop.weights import read_weights, write_safetensors

FILE = "pytorch_lora_weights.safetensors"  # its name in diffusers
LAYERS = ("to_q", "to_k", "to_v", "to_out_0")  # of every attention
FROM_TORCH = {2: (1, 0), 4: (2, 3, 1, 0)}  # axes of kernels by their number, as in `interop.diffusers`

_OLD = re.compile(r"\.processor\.(to_q|to_k|to_v|to_out)_lora\.(?=down|up)")
_KEY = re.compile(r"unet\.(?P<layer>.+)\.(?:lora\.(?P<name>down|up)|lora_(?P<letter>[AB]))\.weight")
_ALPHA = re.compile(r"unet\.(?P<layer>.+)\.alpha")


class Pair(NamedTuple):
    """The LoRA of a layer in torch's layout; `scale` is alpha / r."""

    down: np.ndarray  # [r, I] or [r, I, k, k]
    up: np.ndarray  # [O, r] or [O, r, 1, 1]
    scale: float


def init_lora(rng: jax.Array, unet: Params, rank: int) -> dict[str, Any]:
    """LoRA for all attention layers of the UNet: A ~ N(0, 1 / rank^2) [I, r], B = 0 [r, O]."""
    flat = {}
    for i, (path, kernel) in enumerate(sorted(flatten_dict(unet).items())):
        if path[-2] in LAYERS and path[-1] == "kernel":
            width, out = kernel.shape
            noise = jax.random.normal(jax.random.fold_in(rng, i), (width, rank))
            flat[*path[:-1], "lora", "down", "kernel"] = noise / rank
            flat[*path[:-1], "lora", "up", "kernel"] = jnp.zeros((rank, out))
    return unflatten_dict(flat)


def merge(unet: Params, lora: Params, scale: float) -> dict[str, Any]:
    """The UNet's parameters with scale * B A added to the kernels, in float32."""
    flat, pairs = dict(flatten_dict(unet)), flatten_dict(lora)
    for path, up in pairs.items():
        if path[-2] == "up":
            *layer, _, _, _ = path
            down = pairs[*layer, "lora", "down", "kernel"]
            kernel = flat[*layer, "kernel"]
            flat[*layer, "kernel"] = kernel.astype(np.float32) + scale * (down @ up)
    return unflatten_dict(flat)


def save_lora(path: Path, lora: Params, scale: float) -> None:
    """Writes A and scale * B in diffusers' format, without an alpha, so that diffusers does not scale them again."""
    state = {f"unet.{name}": value for name, value in state_dict_from_params(lora).items()}
    ups = {name: (value * scale).astype(np.float32) for name, value in state.items() if ".up." in name}
    write_safetensors(path, state | ups)


def read_lora(path: Path) -> dict[str, Pair]:
    """The LoRA in a file: name of the layer in diffusers -> `Pair`.

    Raises InputError: the file is missing or damaged, or has anything but LoRA of a UNet in a format of diffusers.
    """
    if not path.is_file():
        raise InputError(f"--lora={path} does not exist; it must be a file such as {FILE}")
    if path.suffix != ".safetensors":
        raise InputError(f"--lora={path} must be a .safetensors file, such as {FILE}")
    state, adapter = read_weights(path), _adapter_config(path)
    down, up, alpha = {}, {}, {}
    for key, value in state.items():
        name = _OLD.sub(lambda match: f".{match[1].replace('to_out', 'to_out.0')}.lora.", key)
        if match := _ALPHA.fullmatch(name):
            alpha[match["layer"]] = float(value.reshape(()))
        elif match := _KEY.fullmatch(name):
            side = down if (match["name"] or match["letter"]) in ("down", "A") else up
            side[match["layer"]] = value.astype(np.float32)
        else:
            raise InputError(
                f"--lora={path} has {key}; supported are files of diffusers with LoRA of the UNet alone "
                "(unet.LAYER.lora.down.weight and .up.weight), not those of kohya or ComfyUI (lora_unet_...)"
            )
    incomplete = sorted(down.keys() ^ up.keys()) + sorted(alpha.keys() - down)
    if incomplete or not down:
        reason = f"{incomplete[0]} lacks its down or up weight" if incomplete else "it has no layers"
        raise InputError(f"--lora={path} is damaged: {reason}")
    pairs = {}
    for layer, a in down.items():
        rank = len(a)  # also alpha, unless stated
        pairs[layer] = Pair(a, up[layer], alpha.get(layer, adapter.get("lora_alpha", rank)) / rank)
    return pairs


def add_lora(unet: Params, pairs: Mapping[str, Pair], scale: float, *, where: str) -> dict[str, Any]:
    """The UNet's parameters, NumPy arrays, with a file's LoRA added, times `scale`; dtypes are kept.

    Raises InputError if the UNet lacks a layer, or has it in another shape; `where` names the file.
    """
    flat = dict(flatten_dict(unet))
    for layer, (down, up, own_scale) in pairs.items():
        path = (*re.sub(r"\.(\d+)", r"_\1", layer).split("."), "kernel")
        if path not in flat:
            raise InputError(f"{where} is for another model: this UNet has no layer {layer}")
        kernel, rank = flat[path], len(down)
        fits = up.ndim == down.ndim == kernel.ndim and up.shape[1:] == (rank,) + (1,) * (down.ndim - 2)
        shape = (len(up), *down.shape[1:])
        if not fits or tuple(shape[axis] for axis in FROM_TORCH[kernel.ndim]) != kernel.shape:
            raise InputError(
                f"{where} is for another model: {layer} is {list(up.shape)} x {list(down.shape)} in it, "
                f"but {list(kernel.shape)} in the UNet"
            )
        delta = (up.reshape(-1, rank) @ down.reshape(rank, -1)).reshape(shape).transpose(FROM_TORCH[kernel.ndim])
        flat[path] = (kernel.astype(np.float32) + scale * own_scale * delta).astype(kernel.dtype)
    return unflatten_dict(flat)


def _adapter_config(path: Path) -> dict[str, Any]:
    """peft's config for the UNet in a file's header; {} without one."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    try:
        config = json.loads(header.get("__metadata__", {}).get("lora_adapter_metadata", "{}"))
        config = {name.removeprefix("unet."): value for name, value in config.items() if name.startswith("unet.")}
    except (ValueError, AttributeError) as error:
        raise InputError(f"--lora={path} is damaged: its lora_adapter_metadata cannot be read") from error
    for name in ("use_dora", "use_rslora", "alpha_pattern", "lora_bias"):
        if config.get(name):
            raise InputError(f"--lora={path} has {name}, which is not supported")
    return config
