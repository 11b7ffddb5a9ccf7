"""Models written as one file in the layout of CompVis and Stability AI, which other programs read.

The inverse of `interop.single_file`: each tensor of diffusers is put where `ldm_names` says that it is taken from.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.interop import ldm_names, single_file
from ldm_jax.interop.clip_weights import PREFIX, PROJECTIONS
from ldm_jax.interop.diffusers import cast, state_dict_from_params
from ldm_jax.interop.ldm_families import (
    FAMILIES,
    FIRST_STAGE,
    REFINER,
    UNET,
    V_MARKER,
    ZERO_SNR_MARKER,
    Family,
    TextEncoder,
)
from ldm_jax.interop.ldm_names import Source
from ldm_jax.interop.weights import write_safetensors
from ldm_jax.models.clip import CLIPTextEncoder
from ldm_jax.models.conditioning import TextConditioning
from ldm_jax.models.dit import DiT
from ldm_jax.models.unet import UNet
from ldm_jax.pipeline.model import LatentDiffusion, Params

SD1, SD2, XL = "Stable Diffusion 1", "Stable Diffusion 2", "Stable Diffusion XL"
ARCHITECTURES = {
    SD1: "stable-diffusion-v1",
    SD2: "stable-diffusion-v2",
    XL: "stable-diffusion-xl-v1-base",
    REFINER: "stable-diffusion-xl-v1-refiner",
}
CLIP_VOCABULARY = 49_408


def write_single_file(model: LatentDiffusion, params: Params, to: Path, *, dtype: str = "float32") -> list[str]:
    """Writes a model as one .safetensors; `dtype` is of the weights.

    The text encoders' tokenizer is not in it: all such files are of CLIP's. Returns notes for the user.

    Raises InputError for a model that is not of the architecture of Stable Diffusion 1, 2 or XL, or has weights beyond
    the range of `dtype`.
    """
    family = _family(model)
    fields = FAMILIES[family]
    state = _unet(model, params) | _autoencoder(model, params)
    for encoder, module, tree in zip(fields.text_encoders, model.conditioning.encoders, params["conditioning"]):
        state |= _text_encoder(encoder, module, tree)
    state = cast(state, dtype) | {marker: np.zeros(0, np.float32) for marker in _markers(model)}
    _check_schedule(model, fields)
    predicts = {"v": "v", "eps": "epsilon"}[model.prediction]
    metadata = {"modelspec.architecture": ARCHITECTURES[family], "modelspec.prediction_type": predicts}
    write_safetensors(to, state, metadata)
    _check_read(model, params, to, family)
    vocabulary = model.conditioning.encoders[0].vocab_size
    if vocabulary == CLIP_VOCABULARY:
        return []
    return [f"its vocabulary of {vocabulary} tokens is not CLIP's: keep the tokenizer's folder next to the file"]


def _family(model: LatentDiffusion) -> str:
    """The family of a model; raises InputError if it has none of these."""
    conditioning = model.conditioning
    if model.edm is not None:
        raise InputError(
            "single files of EDM models, which do not state their noise schedule, are not written; choose a folder"
        )
    if isinstance(model.denoiser, DiT):
        raise InputError(f"single files are of {SD1}, 2 and XL, with a UNet; this model has a DiT")
    if not isinstance(conditioning, TextConditioning) or model.prediction not in ("eps", "v"):
        raise InputError(f"single files are of {SD1}, 2 and XL; this is a {model.origin.pipeline or 'model of a run'}")
    if added := conditioning.tokenizers[0].added:
        other = "choose a folder, or convert the model that the token was trained for"
        raise InputError(f"a single file has no tokens beyond CLIP's vocabulary, and this one has {added[0]}; {other}")
    if model.concat and model.concat.noise is not None:
        raise InputError("single files of the x4 upscaler are not written; choose a folder")
    by_time_ids = {FAMILIES[family].time_ids: family for family in (XL, REFINER)}
    if model.guidance_dim is not None:
        raise InputError("single files of latent consistency models are not written; choose a folder")
    if conditioning.time_ids:
        return by_time_ids[conditioning.time_ids]
    return SD1 if conditioning.encoders[0].hidden_act == "quick_gelu" else SD2


def _unet(model: LatentDiffusion, params: Params) -> dict[str, np.ndarray]:
    unet = model.denoiser
    attention = ["CrossAttn" in block for block in unet.down_block_types]
    source = partial(
        ldm_names.unet_source, layers=unet.layers_per_block, attention=attention, head_size=64, width_of=lambda _: 64
    )
    return _renamed(state_dict_from_params(params["denoiser"]), UNET, source)


def _autoencoder(model: LatentDiffusion, params: Params) -> dict[str, np.ndarray]:
    """With its attention as 1x1 convolutions."""
    levels = len(model.first_stage.module.block_out_channels)
    source = partial(ldm_names.autoencoder_source, levels=levels)
    state = _renamed(state_dict_from_params(params["first_stage"]), FIRST_STAGE, source)
    return {n: v[:, :, None, None] if ".attn_1." in n and v.ndim == 2 else v for n, v in state.items()}


def _text_encoder(encoder: TextEncoder, module: CLIPTextEncoder, params: Params) -> dict[str, np.ndarray]:
    state = state_dict_from_params(params)
    if not encoder.open_clip:
        return {f"{encoder.prefix}{'' if n.startswith(PROJECTIONS) else PREFIX}{n}": v for n, v in state.items()}
    fused = {}
    for i in range(module.num_hidden_layers):
        for leaf in ("weight", "bias"):
            rows = [state.pop(f"encoder.layers.{i}.self_attn.{x}_proj.{leaf}") for x in "qkv"]
            fused[f"{encoder.prefix}transformer.resblocks.{i}.attn.in_proj_{leaf}"] = np.concatenate(rows)
    projection = state.pop("text_projection.weight", None)
    if projection is not None:
        fused[f"{encoder.prefix}text_projection"] = projection.T
    return fused | _renamed(state, encoder.prefix, ldm_names.open_clip_source)


def _renamed(state: Mapping[str, np.ndarray], prefix: str, source: Callable[[str], Source]) -> dict[str, np.ndarray]:
    return {prefix + source(name).name: value for name, value in state.items()}


def _markers(model: LatentDiffusion) -> list[str]:
    """The empty tensors that state the prediction of v, and zero terminal SNR."""
    zero_snr = model.origin.schedulers["scheduler"].get("rescale_betas_zero_snr", False)
    return [V_MARKER] * (model.prediction == "v") + [ZERO_SNR_MARKER] * bool(zero_snr)


def _check_schedule(model: LatentDiffusion, fields: Family) -> None:
    """Raises InputError if the noise schedule is not the family's: a single file does not state it."""
    scheduler = model.origin.schedulers["scheduler"]
    for name in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule"):
        if scheduler.get(name) != fields.scheduler[name]:
            own = f"its {name} is {scheduler.get(name)!r}, not {fields.scheduler[name]!r}"
            raise InputError(f"a single file does not state the noise schedule, and {own}; choose a folder")


def _check_read(model: LatentDiffusion, params: Params, path: Path, family: str) -> None:
    """Raises InputError if the file would be read as another network: it does not state all sizes."""
    found = single_file.read(path, dtype=model.denoiser.dtype)
    pairs = {
        "UNet": (found.unet[0], model.denoiser),
        "autoencoder": (found.autoencoder[0], model.first_stage.module),
        **{f"text encoder {i}": pair for i, pair in enumerate(zip(
            [encoder for encoder, _ in found.text_encoders], model.conditioning.encoders), start=1)},
    }  # fmt: skip
    for name, (read, written) in pairs.items():
        fields = [field for field in written.__dataclass_fields__ if field not in ("parent", "name", "eos_token_id")]
        different = [field for field in fields if not _equal(*(_value(module, field) for module in (read, written)))]
        if different:
            own = f"{different[0]} = {getattr(written, different[0])!r}, not {getattr(read, different[0])!r}"
            raise InputError(f"its {name} is not that of {family}: {own}; choose a folder")
    for name, value in (("shift", found.shift), ("scale", found.scale)):
        if not np.array_equal(value, params[name]):
            own = f"{name} of {np.asarray(params[name]).tolist()}, not {value.tolist()}"
            raise InputError(f"a single file does not state the scaling of latents, and these have a {own}")


def _value(module: Any, field: str) -> Any:
    """The value of a module's field, of the transformers of a UNet for each level that has them."""
    if field != "transformer_layers_per_block" or not isinstance(module, UNet):
        return getattr(module, field)
    depths, n = module.transformer_layers_per_block, len(module.block_out_channels)
    return tuple(d for i, d in enumerate((depths,) * n if isinstance(depths, int) else depths) if module.attends(i))


def _equal(one: Any, other: Any) -> bool:
    """Whether fields are equal, where one value may stand for all levels."""
    if isinstance(one, tuple) == isinstance(other, tuple):
        return one == other
    each, single = (one, other) if isinstance(one, tuple) else (other, one)
    return all(value == single for value in each)
