"""Single files of CompVis and Stability AI: a whole model, or an autoencoder, in one .safetensors or .ckpt.

The family and the configs are inferred from tensor names and shapes (`ldm_families`, `ldm_configs`), and each parameter
is mapped to its name in the file (`ldm_names`); the rest is as for a diffusers folder.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from numpy.typing import DTypeLike

from ldm_jax.diffusion.schedules import scaled_linear_betas
from ldm_jax.errors import InputError
from ldm_jax.interop import ldm_configs, ldm_families, ldm_names
from ldm_jax.interop.clip_weights import PREFIX, text_encoder_from_config
from ldm_jax.interop.diffusers import mismatch, names_of, new_name, params_from_state_dict
from ldm_jax.interop.ldm_configs import Shapes
from ldm_jax.interop.ldm_families import CLASSES, FAMILIES, FIRST_STAGE, UNET, Family, TextEncoder
from ldm_jax.interop.ldm_names import Source
from ldm_jax.interop.modules import abstract_params, autoencoder_from_config, unet_from_config
from ldm_jax.interop.weights import WeightFile, open_weights
from ldm_jax.models.autoencoder import AutoencoderKL, VQModel
from ldm_jax.models.clip import CLIPTextEncoder
from ldm_jax.models.conditioning import TIME_IDS, ClassEmbedder
from ldm_jax.models.layers import Dtype
from ldm_jax.models.unet import UNet
from ldm_jax.models.unet2d import UNet2D
from ldm_jax.runtime.files import prefix_errors

PROJECTION = "text_projection"  # of OpenCLIP
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction"}


class SingleFile(NamedTuple):
    """A whole model; modules with their parameters, NumPy arrays."""

    family: str  # a key of FAMILIES
    fields: Family  # for this file: pipeline, scheduler, size of the latents
    unet: tuple[UNet | UNet2D, dict[str, Any]]
    autoencoder: tuple[AutoencoderKL | VQModel, dict[str, Any]] | None  # None: the file has none
    shift: np.ndarray  # of the latents, [c], as is `scale`
    scale: np.ndarray
    text_encoders: tuple[tuple[CLIPTextEncoder, dict[str, Any]], ...]  # none, one or two
    class_embedder: tuple[ClassEmbedder, dict[str, Any]] | None


class _Component(NamedTuple):
    """A module, and the sources of its parameters in the file."""

    module: nn.Module
    target: Mapping[str, Any]  # shapes of the parameters
    sources: dict[str, Source]  # name in diffusers or transformers -> source, with its whole name
    unused: tuple[str, ...] = ()  # prefixes of tensors that the module does not use


def read(path: Path, *, dtype: Dtype = None, params_dtype: DTypeLike = np.float32, prediction: str = "") -> SingleFile:
    """Reads a whole model.

    Args:
      path: .safetensors, or a pickle of PyTorch.
      dtype: of the computation; None: that of the input.
      params_dtype: of the parameters, float32 or bfloat16.
      prediction: prediction target of the UNet, "eps" or "v"; "" is as the file states it by a marker, its metadata or
        its training step. If it does not, it is eps, but v for Stable Diffusion 2, with a warning.

    Raises InputError: the file is damaged or of no supported family; or tensors are missing or of another shape.
    Tensors that the model does not use are named in a warning.
    """
    file = open_weights(path)
    with prefix_errors(path):
        family = ldm_families.detect_family(file.shapes)
        shapes = _used(file)
        fields = _variant(path, family, shapes, prediction, file)
        _check_betas(file, fields)
        factor = fields.scaling_factor
        if shapes.get("scale_factor") == ():  # measured in training
            shapes.pop("scale_factor")
            factor = float(file.view("scale_factor"))
        encoders = {
            f"text_encoder{'' if i == 0 else f'_{i + 1}'}": _text_encoder(shapes, encoder, dtype)
            for i, encoder in enumerate(fields.text_encoders)
        }
        pooled = [*encoders.values()][-1].module.projection_dim or 0 if encoders else 0
        parts = {"unet": _unet(shapes, fields, pooled, dtype), **encoders}
        shift, scale = (np.full(parts["unet"].module.out_channels, value, np.float32) for value in (0.0, factor))
        if any(name.startswith(FIRST_STAGE) for name in shapes):
            autoencoder, shift, scale = _autoencoder(shapes, FIRST_STAGE, factor, fields.sample_size, dtype)
            parts[fields.autoencoder] = autoencoder
        if family == "class-conditional LDM":
            parts["class embedding"] = _class_embedder(shapes, dtype)
        params = _read_params(path, file, shapes, parts, params_dtype)
    loaded = {name: (part.module, params[name]) for name, part in parts.items()}
    text_encoders, class_embedder = tuple(loaded[name] for name in encoders), loaded.get("class embedding")
    networks = loaded["unet"], loaded.get(fields.autoencoder)
    return SingleFile(family, fields, *networks, shift, scale, text_encoders, class_embedder)


def read_autoencoder(
    path: Path, *, dtype: Dtype = None, params_dtype: DTypeLike = np.float32
) -> tuple[AutoencoderKL | VQModel, dict[str, Any], float | None]:
    """Reads an autoencoder, alone, such as vae-ft-mse-840000-ema-pruned, or of a whole model.

    Arguments and errors are those of `read`. Of an autoencoder alone, names may have the prefix "first_stage_model." or
    not, or be those of diffusers.

    Returns:
      The module; its parameters; the scaling factor of its latents, which is known for whole models only, else None.
    """
    file = open_weights(path)
    with prefix_errors(path):
        shapes = _used(file)
        if any(name.startswith("decoder.up_blocks.") for name in shapes):
            return *_read_diffusers_autoencoder(file, dtype, params_dtype), None
        prefix = FIRST_STAGE if any(name.startswith(FIRST_STAGE) for name in shapes) else ""
        if f"{prefix}decoder.conv_in.weight" not in shapes:
            raise InputError("has no autoencoder (VAE): neither in the layout of CompVis, nor of diffusers")
        part, *_ = _autoencoder(shapes, prefix, 1.0, 64, dtype)
        whole, factor = any(name.startswith(UNET) for name in shapes), None
        if whole:
            factor = FAMILIES[ldm_families.detect_family(shapes)].scaling_factor
            shapes = {name: shape for name, shape in shapes.items() if name.startswith(prefix)}
        return part.module, _read_params(path, file, shapes, {"vae": part}, params_dtype)["vae"], factor


def _read_diffusers_autoencoder(file: WeightFile, dtype: Dtype, params_dtype: DTypeLike) -> tuple[Any, dict[str, Any]]:
    """An autoencoder in diffusers' names, without its config.json."""
    levels = ldm_configs.count(file.shapes, "encoder.down_blocks")
    renamed = {ldm_names.autoencoder_source(new_name(name), levels).name: s for name, s in file.shapes.items()}
    with _below(renamed, "") as own:
        config = ldm_configs.autoencoder_config(own, scaling_factor=1.0, sample_size=512)
    module, *_ = autoencoder_from_config(config, dtype=dtype)
    state = {name: file.stored(name, params_dtype) for name in file.shapes}
    return module, params_from_state_dict(state, abstract_params(module))


def _used(file: WeightFile) -> Shapes:
    return {name: shape for name, shape in file.shapes.items() if not ldm_families.IGNORED.fullmatch(name)}


@contextmanager
def _below(shapes: Shapes, prefix: str) -> Iterator[Shapes]:
    """The tensors with a prefix, without it; errors in the block become InputErrors with the names in the file."""
    try:
        yield {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    except KeyError as error:
        raise InputError(f"lacks {prefix}{error.args[0]}") from error
    except (ValueError, IndexError) as error:
        raise InputError(f"has tensors under {prefix!r} whose shapes are of no supported network") from error


def _variant(path: Path, family: str, shapes: Shapes, prediction: str, file: WeightFile) -> Family:
    """The family's fields, adapted to the file's input channels, prediction target and terminal SNR."""
    fields, prediction = FAMILIES[family], prediction or _stated_prediction(file)
    if fields.inpainting and shapes.get(f"{UNET}input_blocks.0.0.weight", (0, 0))[1:2] == (9,):
        fields = fields._replace(pipeline=fields.inpainting[0], scheduler=fields.inpainting[1])
    elif family == ldm_families.SD2:
        if not prediction:
            prediction = "v"
            assumed = "assumed is v, of the model of 768 pixels; for the base model of 512 add --prediction=eps"
            print(f"warning: {path} does not state its prediction target; {assumed}", file=sys.stderr)
        fields = fields._replace(**ldm_families.V_MODEL) if prediction == "v" else fields
    scheduler = dict(fields.scheduler)
    if prediction:
        scheduler["prediction_type"] = PREDICTION_TYPES[prediction]
    if ldm_families.ZERO_SNR_MARKER in file.shapes:
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if scheduler["_class_name"] == "PNDMScheduler":  # which has no zero terminal SNR
            scheduler["_class_name"] = "DDIMScheduler"
    return fields._replace(scheduler=scheduler)


def _stated_prediction(file: WeightFile) -> str:
    """The prediction target that a file states, "eps" or "v"; "" if it does not."""
    if ldm_families.V_MARKER in file.shapes:
        return "v"
    stated = {"epsilon": "eps", "v": "v", "v_prediction": "v"}.get(file.metadata.get("modelspec.prediction_type", ""))
    architecture = str(file.metadata.get("modelspec.architecture", ""))
    by_name = {"stable-diffusion-v2-512": "eps", "stable-diffusion-v2-768-v": "v"}.get(architecture.split("/")[0])
    return stated or by_name or ("eps" if file.step == ldm_families.STEP_OF_BASE else "")


def _check_betas(file: WeightFile, fields: Family) -> None:
    """Raises InputError if the file has a noise schedule, and it is not that of its family."""
    T, start, end = (fields.scheduler[name] for name in ("num_train_timesteps", "beta_start", "beta_end"))
    expected = scaled_linear_betas(T, start, end)
    for name in {"betas", "low_scale_model.betas"} & file.shapes.keys():
        stored = file.view(name)
        if stored.dtype.itemsize == 1:  # fp8 keeps hardly a digit of them
            continue
        betas = stored.astype(np.float64)
        if betas.shape != expected.shape or not np.allclose(betas, expected, rtol=5e-3, atol=0):  # that of bfloat16
            ends = f"{betas.min():.3g} to {betas.max():.3g}" if betas.size else "none"
            raise InputError(f"has another noise schedule than its family: {name} are {ends}, not {start} to {end}")


def _unet(shapes: Shapes, fields: Family, pooled: int, dtype: Dtype) -> _Component:
    sizes = {"heads": fields.heads, "head_size": fields.head_size, "sample_size": fields.sample_size}
    sizes["time_ids"] = TIME_IDS.get(fields.time_ids, 0)
    with _below(shapes, UNET) as own:
        config = ldm_configs.unet_config(own, pooled=pooled, **sizes)
        attention, width_of = ldm_configs.attention_levels(own), lambda name: own.get(name, (0,))[0] // 3
        path = {"layers": config["layers_per_block"], "attention": attention}
        source = partial(ldm_names.unet_source, **path, head_size=fields.head_size, width_of=width_of)
    return _component(unet_from_config(config, dtype=dtype), UNET, source)


def _autoencoder(
    shapes: Shapes, prefix: str, factor: float, sample_size: int, dtype: Dtype
) -> tuple[_Component, np.ndarray, np.ndarray]:
    """The component; shift and scale of its latents, [c] each."""
    with _below(shapes, prefix) as own:
        config = ldm_configs.autoencoder_config(own, scaling_factor=factor, sample_size=sample_size)
    config["sample_size"] *= 2 ** (len(config["block_out_channels"]) - 1)
    module, shift, scale = autoencoder_from_config(config, dtype=dtype)
    linear = "decoder.mid.attn_1.to_q.weight" in own
    source = partial(ldm_names.autoencoder_source, levels=len(module.block_out_channels), linear=linear)
    return _component(module, prefix, source), shift, scale


def _text_encoder(shapes: Shapes, encoder: TextEncoder, dtype: Dtype) -> _Component:
    """A text encoder; transformers' names may have the prefix "text_model." or not."""
    prefix = encoder.prefix
    if not encoder.open_clip and any(name.startswith(prefix + PREFIX) for name in shapes):
        prefix += PREFIX
    with _below(shapes, prefix) as own:
        linear = own.get(f"{PROJECTION}.weight")  # as in files written by way of transformers, and not transposed
        own |= {PROJECTION: linear[::-1]} if linear else {}
        open_clip = partial(ldm_configs.open_clip_config, last=encoder.last)
        config = (open_clip if encoder.open_clip else ldm_configs.clip_config)(own)
    module = text_encoder_from_config(config).clone(dtype=dtype)
    source = partial(ldm_names.open_clip_source, linear=bool(linear)) if encoder.open_clip else Source
    component = _component(module, prefix, source)
    if encoder.last:
        return component
    skipped = f"transformer.resblocks.{module.num_hidden_layers}.", PROJECTION
    return component._replace(unused=tuple(prefix + name for name in skipped))


def _class_embedder(shapes: Shapes, dtype: Dtype) -> _Component:
    """The class embedding, whose last row is the null condition."""
    with _below(shapes, CLASSES) as own:
        rows, width = own["embedding.weight"]
        module = ClassEmbedder(rows - 1, width, dtype=dtype)
    target = jax.eval_shape(module.init, jax.random.key(0), np.zeros(1, np.int32))["params"]
    return _component(module, CLASSES, Source, target)


def _component(module: nn.Module, prefix: str, source: Callable[[str], Source], target: Any = None) -> _Component:
    target = abstract_params(module) if target is None else target
    sources = {name: source(name) for name in names_of(target)}
    return _Component(module, target, {name: s._replace(name=prefix + s.name) for name, s in sources.items()})


def _read_params(
    path: Path, file: WeightFile, shapes: Shapes, parts: Mapping[str, _Component], dtype: DTypeLike
) -> dict[str, dict[str, Any]]:
    """The parameters of each component; raises InputError unless the file has these tensors, of their shapes.

    Prints a warning if it has others.
    """
    required = {s.name: f"{part} {name}" for part, c in parts.items() for name, s in c.sources.items()}
    missing = [f"{name} ({part})" for name, part in required.items() if name not in shapes]
    unused = sum((component.unused for component in parts.values()), ())
    unexpected = [name for name in shapes if name not in required and not name.startswith(unused)]
    if missing:
        wrong = mismatch({"missing keys": missing, "unexpected keys": unexpected})
        raise InputError(f"its state_dict does not fit its family: {wrong}")
    if unexpected:
        more = f" and {len(unexpected) - 3} more" if len(unexpected) > 3 else ""
        named = f"{', '.join(unexpected[:3])}{more}"
        print(f"warning: {path} has tensors that the model does not use: {named}", file=sys.stderr)
    params = {}
    for part, (_, target, sources, _) in parts.items():
        state = {name: file.stored(source.name, dtype).then(source.take) for name, source in sources.items()}
        with prefix_errors(part):
            params[part] = params_from_state_dict(state, target)
    return params
