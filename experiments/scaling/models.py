"""diffusers folders of Stable Diffusion at full size with zero weights: compiling needs only their shapes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from experiments.parity_full_size.models import NETWORKS
from ldm_jax.interop.clip_weights import state_dict_from_text_params
from ldm_jax.interop.diffusers import state_dict_from_params
from ldm_jax.interop.folder import INDEX, write_component
from ldm_jax.interop.ldm_families import FAMILIES
from ldm_jax.interop.modules import abstract_params, autoencoder_from_config, unet_from_config
from ldm_jax.models.clip import CLIPTextEncoder
from ldm_jax.runtime.files import write_json

CLIP_L, CLIP_BIG_G = "CLIP ViT-L/14 of SD 1 and XL", "OpenCLIP ViT-bigG/14 of SDXL"
# Name -> (family of models, UNet, text encoders); the networks are those of NETWORKS.
MODELS = {
    "SD 1.5": (FAMILIES["Stable Diffusion 1"], "UNet of SD 1", [CLIP_L]),
    "SDXL": (FAMILIES["Stable Diffusion XL"], "UNet of SDXL", [CLIP_L, CLIP_BIG_G]),
}
TOKENS = ("<|startoftext|>", "<|endoftext|>")


def write_model(name: str, folder: Path) -> dict[str, int]:
    """Writes the diffusers folder of a model, float16; returns the number of parameters of each component."""
    family, unet_name, encoders = MODELS[name]
    size = family.sample_size
    unet_config = {"_class_name": "UNet2DConditionModel", **NETWORKS[unet_name][1], "sample_size": size}
    vae_config = {"_class_name": "AutoencoderKL", **NETWORKS["VAE of SD 1, 2 and XL"][1], "sample_size": 8 * size}
    unet, vae = unet_from_config(unet_config), autoencoder_from_config(vae_config)[0]
    counts = {"unet": _write(folder / "unet", unet_config, state_dict_from_params(_zeros(abstract_params(unet))))}
    counts["vae"] = _write(folder / "vae", vae_config, state_dict_from_params(_zeros(abstract_params(vae))))
    for number, encoder_name in enumerate(encoders):
        suffix = "" if number == 0 else f"_{number + 1}"
        class_name, fields = NETWORKS[encoder_name]
        config = fields | {"architectures": [class_name]}
        module = CLIPTextEncoder(**{field: value for field, value in fields.items() if field != "bos_token_id"})
        state = state_dict_from_text_params(_zeros(_text_shapes(module)))
        counts[f"text_encoder{suffix}"] = _write(folder / f"text_encoder{suffix}", config, state)
        _write_tokenizer(folder / f"tokenizer{suffix}", module.max_position_embeddings)
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", family.scheduler)
    components = {part: ["diffusers", "AutoencoderKL"] for part in ("scheduler", *counts)}
    components |= {part.replace("text_encoder", "tokenizer"): ["transformers", "CLIPTokenizer"] for part in counts
                   if part.startswith("text_encoder")}  # fmt: skip
    write_json(folder / INDEX, {"_class_name": family.pipeline, **components})
    return counts


def _text_shapes(module: nn.Module) -> Mapping[str, Any]:
    return jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]


def _zeros(shapes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Arrays of zeros that have no memory of their own."""
    return jax.tree.map(lambda leaf: np.broadcast_to(np.float16(0), leaf.shape), shapes)


def _write(folder: Path, config: Mapping[str, Any], state: Mapping[str, np.ndarray]) -> int:
    write_component(folder, config, state)
    return sum(array.size for array in state.values())


def _write_tokenizer(folder: Path, length: int) -> None:
    """A CLIP tokenizer without merges: a token for each printable character of ASCII, and for it at a word's end."""
    characters = [chr(code) for code in range(33, 127)]
    vocabulary = [*characters, *(f"{character}</w>" for character in characters), *TOKENS]
    begin, end = TOKENS
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length}
    config |= {"bos_token": begin, "eos_token": end, "unk_token": end, "pad_token": end}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", {token: number for number, token in enumerate(vocabulary)})
    write_json(folder / "tokenizer_config.json", config)
    (folder / "merges.txt").write_text("#version: 0.2\n")
