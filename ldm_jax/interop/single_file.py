"""Single files of CompVis and Stability AI: a whole model, or an autoencoder, in one .safetensors or .ckpt.

What a file holds is told by its tensors' names and shapes (`ldm_families`, `ldm_configs`); under which name each of our
parameters is in it, by `ldm_names`. From there on it is as with a diffusers folder.
"""

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
from ldm_jax.interop import ldm_names
from ldm_jax.interop.clip_weights import PREFIX, text_encoder_from_config
from ldm_jax.interop.diffusers import names_of, params_from_state_dict
from ldm_jax.interop.ldm_configs import (
    Shapes,
    attending_levels,
    autoencoder_config,
    clip_config,
    open_clip_config,
    unet_config,
)
from ldm_jax.interop.ldm_families import (
    CLASSES,
    FAMILIES,
    FIRST_STAGE,
    IGNORED,
    SD2,
    STEP_OF_BASE,
    UNET,
    V_MODEL,
    Family,
    Text,
    family_of,
)
from ldm_jax.interop.ldm_names import Source
from ldm_jax.interop.modules import abstract_params, autoencoder_from_config, unet_from_config
from ldm_jax.interop.stored import Stored
from ldm_jax.interop.weights import WeightFile, open_weights
from ldm_jax.models.autoencoder import AutoencoderKL, VQModel
from ldm_jax.models.clip import CLIPTextEncoder
from ldm_jax.models.conditioning import ClassEmbedder
from ldm_jax.models.layers import Dtype
from ldm_jax.models.unet import UNet
from ldm_jax.models.unet2d import UNet2D

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}


class SingleFile(NamedTuple):
    """A whole model; modules with their parameters, NumPy arrays."""

    family: str  # one of FAMILIES
    pipeline: str  # the class in diffusers that draws with such a model
    unet: tuple[UNet | UNet2D, dict[str, Any]]
    autoencoder: tuple[AutoencoderKL | VQModel, dict[str, Any]]
    shift: np.ndarray  # of the latents, [c], as is `scale`
    scale: np.ndarray
    texts: tuple[tuple[CLIPTextEncoder, dict[str, Any]], ...]  # none, one or two
    pads: tuple[str, ...]  # for each of them, the token that fills up its texts
    classes: tuple[ClassEmbedder, dict[str, Any]] | None  # of a class-conditional model
    scheduler: Mapping[str, Any]  # as in scheduler_config.json
    low_res_scheduler: Mapping[str, Any] | None  # the same, of the x4 upscaler
    sample_size: int  # of the latents in pixels


class _Component(NamedTuple):
    """A module, and where its parameters are in the file."""

    module: nn.Module
    target: Mapping[str, Any]
    sources: dict[str, Source]  # diffusers' or transformers' name -> whole name in the file
    unused: tuple[str, ...] = ()  # beginnings of the names of tensors that are there for nothing


def read(path: Path, *, dtype: Dtype = None, params_dtype: DTypeLike = np.float32, prediction: str = "") -> SingleFile:
    """Reads a whole model.

    Args:
      path: .safetensors, or a pickle of PyTorch's.
      dtype: type of the computation; None means that of the input.
      params_dtype: type of the parameters, float32 or bfloat16.
      prediction: what the UNet predicts, "eps" or "v", as few files tell. "" is eps for all but Stable Diffusion 2,
        which is taken for the v model of 768 pixels unless it inpaints, or was saved by the run of its base model.

    Raises:
      InputError: damaged; or of no family that is known; or tensors are missing, left over or of another shape.
    """
    file = open_weights(path)
    with _told_of(path):
        family = family_of(file.shapes)
        shapes = {name: shape for name, shape in file.shapes.items() if not IGNORED.fullmatch(name)}
        fields = _variant(family, shapes, prediction, file.step)
        _check_noise_levels(file, fields)
        factor = fields.scaling_factor
        if shapes.get("scale_factor") == ():  # of latents that were measured in training
            shapes.pop("scale_factor")
            factor = float(file.view("scale_factor"))
        autoencoder, shift, scale = _autoencoder(shapes, FIRST_STAGE, factor, fields.sample_size, dtype)
        texts = [_text(shapes, text, dtype) for text in fields.texts]
        pooled = texts[-1].module.projection_dim or 0 if texts else 0
        parts = {"unet": _unet(shapes, fields, pooled, dtype), fields.autoencoder: autoencoder}
        parts |= {f"text_encoder{'' if i == 0 else f'_{i + 1}'}": text for i, text in enumerate(texts)}
        if family == "class-conditional LDM":
            parts["class embedding"] = _classes(shapes, dtype)
        params = _read_params(file, shapes, parts, params_dtype)
    read_parts = {name: (part.module, params[name]) for name, part in parts.items()}
    return SingleFile(
        family,
        fields.pipeline,
        read_parts["unet"],
        read_parts[fields.autoencoder],
        shift,
        scale,
        tuple(part for name, part in read_parts.items() if name.startswith("text_encoder")),
        tuple(text.pad for text in fields.texts),
        read_parts.get("class embedding"),
        fields.scheduler,
        fields.low_res_scheduler,
        fields.sample_size,
    )


def read_autoencoder(
    path: Path, *, dtype: Dtype = None, params_dtype: DTypeLike = np.float32
) -> tuple[AutoencoderKL | VQModel, dict[str, Any]]:
    """Reads an autoencoder alone, such as vae-ft-mse-840000-ema-pruned; it does not say how its latents are scaled.

    Arguments and errors are those of `read`; names may have the prefix "first_stage_model." or not.
    """
    file = open_weights(path)
    with _told_of(path):
        shapes = {name: shape for name, shape in file.shapes.items() if not IGNORED.fullmatch(name)}
        prefix = FIRST_STAGE if any(name.startswith(FIRST_STAGE) for name in shapes) else ""
        if f"{prefix}decoder.conv_in.weight" not in shapes:
            raise InputError("has no autoencoder in the layout of CompVis, with decoder.conv_in.weight")
        part, *_ = _autoencoder(shapes, prefix, 1.0, 64, dtype)
        return part.module, _read_params(file, shapes, {"vae": part}, params_dtype)["vae"]


@contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """Says which file an error is about."""
    try:
        yield
    except InputError as error:
        told = str(error)
        raise InputError(told if str(path) in told else f"{path}: {told}") from error


@contextmanager
def _within(shapes: Shapes, prefix: str) -> Iterator[Shapes]:
    """The tensors below a prefix, without it; tells of one that is wanted but missing, or of a shape that cannot be."""
    try:
        yield {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    except KeyError as error:
        raise InputError(f"lacks {prefix}{error.args[0]}") from error
    except (ValueError, IndexError) as error:
        raise InputError(f"has tensors under {prefix!r} whose shapes are of no network that is known") from error


def _variant(family: str, shapes: Shapes, prediction: str, step: int | None) -> Family:
    """What the file does not say, for its number of channels and what it predicts."""
    fields = FAMILIES[family]
    if fields.inpainting and shapes.get(f"{UNET}input_blocks.0.0.weight", (0, 0))[1:2] == (9,):
        fields = fields._replace(pipeline=fields.inpainting[0], scheduler=fields.inpainting[1])
    elif family == SD2 and (prediction or ("eps" if step == STEP_OF_BASE else "v")) == "v":
        fields, prediction = fields._replace(**V_MODEL), "v"
    if not prediction:
        return fields
    return fields._replace(scheduler={**fields.scheduler, "prediction_type": PREDICTIONS[prediction]})


def _check_noise_levels(file: WeightFile, fields: Family) -> None:
    """Raises InputError if the file tells its noise levels, and they are not those of its family."""
    T, start, end = (fields.scheduler[name] for name in ("num_train_timesteps", "beta_start", "beta_end"))
    wanted = scaled_linear_betas(T, start, end)
    for name in {"betas", "low_scale_model.betas"} & file.shapes.keys():
        betas = file.view(name).astype(np.float64)
        if betas.shape != wanted.shape or not np.allclose(betas, wanted, rtol=5e-3, atol=0):  # that of bfloat16
            ends = f"{betas.min():.3g} to {betas.max():.3g}" if betas.size else "none"
            raise InputError(
                f"was trained with other noise levels than its kind: {name} are {ends}, not {start} to {end}"
            )


def _unet(shapes: Shapes, fields: Family, pooled: int, dtype: Dtype) -> _Component:
    with _within(shapes, UNET) as own:
        config = unet_config(
            own, heads=fields.heads, head_size=fields.head_size, pooled=pooled, sample_size=fields.sample_size
        )
        source = partial(
            ldm_names.unet_source,
            layers=config["layers_per_block"],
            attends=attending_levels(own),
            head_size=fields.head_size,
            width_of=lambda name: own.get(name, (0,))[0] // 3,
        )
    module = unet_from_config(config, dtype=dtype)
    return _component(module, abstract_params(module), UNET, source)


def _autoencoder(
    shapes: Shapes, prefix: str, factor: float, sample_size: int, dtype: Dtype
) -> tuple[_Component, np.ndarray, np.ndarray]:
    """The component; shift and scale of its latents, [c] each."""
    with _within(shapes, prefix) as own:
        config = autoencoder_config(own, scaling_factor=factor, sample_size=sample_size)
    config["sample_size"] *= 2 ** (len(config["block_out_channels"]) - 1)
    module, shift, scale = autoencoder_from_config(config, dtype=dtype)
    source = partial(ldm_names.autoencoder_source, levels=len(module.block_out_channels))
    return _component(module, abstract_params(module), prefix, source), shift, scale


def _text(shapes: Shapes, text: Text, dtype: Dtype) -> _Component:
    """A text encoder; transformers' names may be below "text_model." or not."""
    prefix = text.prefix
    if not text.open_clip and any(name.startswith(prefix + PREFIX) for name in shapes):
        prefix += PREFIX
    with _within(shapes, prefix) as own:
        config = open_clip_config(own, last=text.last) if text.open_clip else clip_config(own)
    module = text_encoder_from_config(config).clone(dtype=dtype)
    target = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    source = ldm_names.open_clip_source if text.open_clip else ldm_names.same_source
    component = _component(module, target, prefix, source)
    if not text.open_clip or text.last:
        return component
    return component._replace(
        unused=(f"{prefix}transformer.resblocks.{module.num_hidden_layers}.", f"{prefix}text_projection")
    )


def _classes(shapes: Shapes, dtype: Dtype) -> _Component:
    """The embedding of classes, whose last row stands for none."""
    with _within(shapes, CLASSES) as own:
        rows, width = own["embedding.weight"]
        module = ClassEmbedder(rows - 1, width, dtype=dtype)
    target = jax.eval_shape(module.init, jax.random.key(0), np.zeros(1, np.int32))["params"]
    return _component(module, target, CLASSES, ldm_names.same_source)


def _component(
    module: nn.Module, target: Mapping[str, Any], prefix: str, source: Callable[[str], Source]
) -> _Component:
    sources = {name: source(name) for name in names_of(target)}
    return _Component(module, target, {name: s._replace(name=prefix + s.name) for name, s in sources.items()})


def _read_params(
    file: WeightFile, shapes: Shapes, parts: Mapping[str, _Component], dtype: DTypeLike
) -> dict[str, dict[str, Any]]:
    """The parameters of each component; raises InputError unless these are all that is in the file."""
    wanted = {s.name: f"{part} {name}" for part, c in parts.items() for name, s in c.sources.items()}
    missing = [f"{name} ({ours})" for name, ours in wanted.items() if name not in shapes]
    unused = sum((component.unused for component in parts.values()), ())
    unexpected = [name for name in shapes if name not in wanted and not name.startswith(unused)]
    wrong = [("missing", missing), ("unexpected", unexpected)]
    if missing or unexpected:
        told = "; ".join(f"{len(names)} {what}: {', '.join(sorted(names))}" for what, names in wrong if names)
        raise InputError(f"has not the tensors of its kind: {told}")
    params = {}
    for part, component in parts.items():
        try:
            params[part] = params_from_state_dict(_state(file, component.sources, dtype), component.target)
        except InputError as error:
            raise InputError(f"{part}: {error}") from error
    return params


def _state(file: WeightFile, sources: Mapping[str, Source], dtype: DTypeLike) -> dict[str, Stored]:
    """A component's state dict, which is yet to be read."""
    return {name: file.stored(source.name, dtype).then(source.take) for name, source in sources.items()}
