"""LoRA (Hu et al. 2021, arXiv:2106.09685) for training: W + alpha / r B A, written in diffusers' format.

| diffusers, below the layer's name          | here, below its path                  |
|--------------------------------------------|---------------------------------------|
| `lora.down.weight` (A), [r, I]             | `lora` / `down` / `kernel`, [I, r]    |
| `lora.up.weight` (B), [O, r]               | `lora` / `up` / `kernel`, [r, O]      |

`lora_files` reads the files of others.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ldm_jax.interop.diffusers import Params, state_dict_from_params
from ldm_jax.interop.weights import write_safetensors

FILE = "pytorch_lora_weights.safetensors"  # its name in diffusers
# The layers of every attention, in the UNet and in text encoders.
LAYERS = ("to_q", "to_k", "to_v", "to_out_0", "q_proj", "k_proj", "v_proj", "out_proj")


def init_lora(rng: jax.Array, params: Params, rank: int) -> dict[str, Any]:
    """LoRA for all attention layers of a network: A ~ N(0, 1 / rank^2) [I, r], B = 0 [r, O]."""
    flat = {}
    for i, (path, kernel) in enumerate(sorted(flatten_dict(params).items())):
        if path[-2] in LAYERS and path[-1] == "kernel":
            width, out = kernel.shape
            noise = jax.random.normal(jax.random.fold_in(rng, i), (width, rank))
            flat[*path[:-1], "lora", "down", "kernel"] = noise / rank
            flat[*path[:-1], "lora", "up", "kernel"] = jnp.zeros((rank, out))
    return unflatten_dict(flat)


def merge(params: Params, lora: Params, scale: float) -> dict[str, Any]:
    """A network's parameters with scale * B A added to the kernels, in float32."""
    flat, pairs = dict(flatten_dict(params)), flatten_dict(lora)
    for path, up in pairs.items():
        if path[-2] == "up":
            *layer, _, _, _ = path
            down = pairs[*layer, "lora", "down", "kernel"]
            kernel = flat[*layer, "kernel"]
            flat[*layer, "kernel"] = kernel.astype(np.float32) + scale * (down @ up)
    return unflatten_dict(flat)


def save_lora(path: Path, lora: Params, scale: float, texts: Sequence[Params] = ()) -> None:
    """Writes A and scale * B in diffusers' format, without an alpha, so that diffusers does not scale them again.

    `lora` is of the UNet, `texts` of the text encoders.
    """
    state = {f"unet.{name}": value for name, value in state_dict_from_params(lora).items()}
    for component, text in zip(("text_encoder", "text_encoder_2"), texts):
        for name, value in state_dict_from_params(text).items():
            state[f"{component}.text_model.{name.replace('.lora.', '.lora_linear_layer.')}"] = value
    ups = {name: (value * scale).astype(np.float32) for name, value in state.items() if ".up." in name}
    write_safetensors(path, state | ups)
