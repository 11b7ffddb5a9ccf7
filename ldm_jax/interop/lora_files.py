"""LoRA files as people have them, of diffusers, PEFT and kohya: read, and added to the parameters of their layers.

| written by       | layers of                | names of A and B                          | scale               |
|------------------|--------------------------|-------------------------------------------|---------------------|
| diffusers        | unet., text_encoder[_2]. | lora.down, lora.up; lora_linear_layer. ...| metadata, or alpha  |
| before 0.22      | unet.                    | processor.to_q_lora.down, .up             | alpha               |
| PEFT             | base_model.model.        | lora_A, lora_B                            | adapter_config.json |
| kohya and others | lora_unet_, lora_te[12]_ | lora_down, lora_up, lora_mid              | alpha               |

kohya's layers have underscores for dots, and of SDXL's UNet the names of Stability AI (`ldm_names`). LoRA of
convolutions is read too, with B of 1 pixel or, as LyCORIS has it, in three factors.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ldm_jax.errors import InputError
from ldm_jax.interop import ldm_names
from ldm_jax.interop.diffusers import Params, check_finite, mismatch, names_of
from ldm_jax.interop.weights import open_weights, read_weights, write_safetensors
from ldm_jax.models.unet import UNet
from ldm_jax.runtime.files import read_json_object

UNET, TEXT_ENCODERS = "unet", ("text_encoder", "text_encoder_2")
# Prefix of a key -> the component; "" = any that has the layer.
PREFIXES = {
    "lora_unet_": UNET,
    "lora_te1_": TEXT_ENCODERS[0],
    "lora_te2_": TEXT_ENCODERS[1],
    "lora_te_": TEXT_ENCODERS[0],
    "unet.": UNET,
    "diffusion_model.": UNET,
    "text_encoder_2.": TEXT_ENCODERS[1],
    "text_encoder.": TEXT_ENCODERS[0],
    "base_model.model.": "",
}
TEXT_MODEL = ("text_model.", "text_model_")  # part of the names of text encoders in most files
# Pattern in a key -> what the file has that is no LoRA.
OTHERS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa of LyCORIS",
    "lokr_": "LoKr of LyCORIS",
    "oft_": "OFT",
    r"\.diff(_b)?$": "whole weights of LyCORIS",
    r"lora_B\.bias": "LoRA of biases",
}
FROM_TORCH = {2: (1, 0), 4: (2, 3, 1, 0)}  # axes of kernels by their number, as in `interop.diffusers`

_OLD = re.compile(r"\.processor\.(to_q|to_k|to_v|to_out)_lora\.(?=down|up)")
_KEY = re.compile(
    r"(?P<layer>.+)\."
    r"(?:(?:lora|lora_linear_layer)\.(?P<of_diffusers>down|up)|lora_(?P<of_kohya>down|up|mid)|lora_(?P<of_peft>A|B)(\.default)?)"
    r"\.weight"
)
_SIDES = {"A": "down", "B": "up"}


class Pair(NamedTuple):
    """The LoRA of a layer in torch's layout: scale up [mid] down."""

    down: np.ndarray  # [r, I] or [r, I, k, k]
    up: np.ndarray  # [O, r] or [O, r, 1, 1]
    scale: float  # alpha / r
    mid: np.ndarray | None = None  # [r, r, k, k], then down is [r, I, 1, 1]

    def delta(self) -> np.ndarray:
        """The update of the weight, float32 [O, I] or [O, I, k, k]; ValueError if the shapes do not agree."""
        up = self.up.reshape(len(self.up), -1)
        if self.mid is not None:
            down = self.down.reshape(len(self.down), -1)
            return self.scale * np.einsum("or,rskl,si->oikl", up, self.mid, down)
        return self.scale * (up @ self.down.reshape(len(self.down), -1)).reshape(len(up), *self.down.shape[1:])


Pairs = dict[tuple[str, str], Pair]  # (component, layer as the file names it) -> its LoRA


def read_lora(path: Path, *, flag: str = "lora") -> Pairs:
    """The LoRA in a file, of diffusers, PEFT or kohya; `flag` is named in errors.

    Raises InputError: the file is missing or damaged, or has anything but LoRA, all of which is named.
    """
    where = f"--{flag}={path}"
    if not path.is_file():
        raise InputError(f"{where} does not exist; it must be a file such as pytorch_lora_weights.safetensors")
    parts: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    unknown = []
    for key, value in read_weights(path).items():
        for part, what in OTHERS.items():
            if re.search(part, key):
                raise InputError(f"{where} has {what} ({key}), which is not supported")
        check_finite(f"{where}: {key}", value)
        place, side = _parse(key)
        if place is None:
            unknown.append(key)
        else:
            parts.setdefault(place, {})[side] = value.astype(np.float32)
    if unknown or not parts:
        raise InputError(f"{where} is no LoRA of a UNet or text encoder: {mismatch({'unknown keys': unknown})}")
    half = [
        f"{component} {layer}".strip() for (component, layer), part in parts.items() if not {"down", "up"} <= {*part}
    ]
    if half:
        raise InputError(f"{where} is damaged: {mismatch({'layers without their down or up weight': half})}")
    config = _adapter_config(path, where)
    return {
        place: Pair(part["down"], part["up"], _scale(place, part, config), part.get("mid"))
        for place, part in parts.items()
    }


def _parse(key: str) -> tuple[tuple[str, str] | None, str]:
    """((component, layer), "down", "up", "mid" or "alpha") of a key; (None, "") if it is of no LoRA."""
    key = _OLD.sub(lambda match: f".{match[1].replace('to_out', 'to_out.0')}.lora.", key)
    match = _KEY.fullmatch(key)
    layer, side = (key.removesuffix(".alpha"), "alpha") if key.endswith(".alpha") else ("", "")
    if match:
        side = match["of_diffusers"] or match["of_kohya"] or _SIDES[match["of_peft"]]
        layer = match["layer"]
    for prefix, component in PREFIXES.items():
        if layer.startswith(prefix):
            layer = layer.removeprefix(prefix)
            for text_model in TEXT_MODEL:
                layer = layer.removeprefix(text_model)
            return (component, layer), side
    return None, ""


def _scale(place: tuple[str, str], part: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> float:
    """alpha / r, or alpha / sqrt(r) of rank-stabilized LoRA; without an alpha 1."""
    rank, (component, layer) = len(part["down"]), place
    if "alpha" in part:
        return float(part["alpha"].reshape(())) / rank
    own = config.get(component, config.get("", {}))
    by_layer = {name: alpha for name, alpha in own.get("alpha_pattern", {}).items() if layer.endswith(name)}
    alpha = next(iter(by_layer.values()), own.get("lora_alpha", rank))
    return alpha / (rank**0.5 if own.get("use_rslora") else rank)


def _adapter_config(path: Path, where: str) -> dict[str, dict[str, Any]]:
    """Component -> PEFT's config of its LoRA, in the file's metadata or in adapter_config.json next to it."""
    text, configs = open_weights(path).metadata.get("lora_adapter_metadata", "{}"), {}
    try:
        for name, value in json.loads(text).items():
            component, _, field = name.partition(".")
            configs.setdefault(component, {})[field] = value
    except (ValueError, AttributeError) as error:
        raise InputError(f"{where} is damaged: its lora_adapter_metadata cannot be read") from error
    if path.stem == "adapter_model" and (path.parent / "adapter_config.json").is_file():
        configs[""] = read_json_object(path.parent / "adapter_config.json")
    for config in configs.values():
        for name in ("use_dora", "lora_bias"):
            if config.get(name):
                raise InputError(f"{where} has {name}, which is not supported")
    return configs


def write_lora(path: Path, pairs: Pairs, *, names: str) -> None:
    """Writes LoRA in the names of "diffusers" or "kohya", which has scales as alphas.

    Raises InputError for layers with kohya's names, from which diffusers' do not follow.
    """
    state, several = {}, any(component == TEXT_ENCODERS[1] for component, _ in pairs)
    kohya = {UNET: "lora_unet_", "": "lora_unet_", TEXT_ENCODERS[0]: "lora_te1_" if several else "lora_te_"}
    kohya[TEXT_ENCODERS[1]] = "lora_te2_"
    for (component, layer), pair in pairs.items():
        text = TEXT_MODEL[0] * (component in TEXT_ENCODERS)
        if names == "kohya":
            name = kohya[component] + (text + layer).replace(".", "_")
            state |= {f"{name}.lora_down.weight": pair.down, f"{name}.lora_up.weight": pair.up}
            state[f"{name}.alpha"] = np.array(pair.scale * len(pair.down), np.float32)
            state |= {} if pair.mid is None else {f"{name}.lora_mid.weight": pair.mid}
        elif "." not in layer or pair.mid is not None:
            raise InputError(f"{component} {layer} has kohya's name, from which diffusers' does not follow")
        else:
            name = f"{component or UNET}.{text}{layer}.{'lora_linear_layer' if text else 'lora'}"
            state |= {f"{name}.down.weight": pair.down, f"{name}.up.weight": pair.up * np.float32(pair.scale)}
    write_safetensors(path, state)


def layer_names(params: Params, unet: UNet | None = None) -> dict[str, tuple[str, ...]]:
    """A component's layers by all names that LoRA files have for them: name -> path of the kernel in `params`.

    `unet` is the module, of a UNet, which has further names in the layout of Stability AI.
    """
    paths = [path for path in flatten_dict(params) if path[-1] == "kernel"]
    named = dict(zip(names_of(unflatten_dict(dict.fromkeys(paths))), paths))
    aliases = {}
    for name, path in named.items():
        layers = [name]
        if unet is not None:
            attention = ["CrossAttn" in level for level in unet.down_block_types]
            layers.append(ldm_names.unet_source(name, unet.layers_per_block, attention, 64, lambda _: 64).name)
        for layer in (layer.removesuffix(".weight") for layer in layers):
            aliases |= {layer: path, layer.replace(".", "_"): path}
    return aliases


def add_lora(params: Params, pairs: Mapping[tuple[str, ...], Pair], scale: float, *, where: str) -> dict[str, Any]:
    """A component's parameters, NumPy arrays, with LoRA times `scale` added to these kernels; dtypes are kept.

    Raises InputError if a shape differs; `where` names the file.
    """
    flat = dict(flatten_dict(params))
    for path, pair in pairs.items():
        kernel = flat[path]
        try:
            delta = pair.delta()
        except ValueError:
            delta = np.zeros(())
        if delta.ndim == 4 and kernel.ndim == 2 and delta.shape[2:] == (1, 1):
            delta = delta[:, :, 0, 0]
        elif delta.ndim == 2 and kernel.ndim == 4:
            delta = delta[:, :, None, None]
        changed = delta.transpose(FROM_TORCH[delta.ndim]) if delta.ndim in FROM_TORCH else delta
        if changed.shape != kernel.shape:
            shapes = f"{list(pair.up.shape)} x {list(pair.down.shape)} in it, but {list(kernel.shape)} in the model"
            raise InputError(f"{where} is for another model: {'.'.join(path[:-1])} is {shapes}")
        flat[path] = (kernel.astype(np.float32) + scale * changed).astype(kernel.dtype)
    return unflatten_dict(flat)
