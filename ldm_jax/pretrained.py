"""A diffusers folder as a trained model: Stable Diffusion 1, 2 and XL, their inpainting kin, unconditional LDMs.

What `trained` makes of a run folder, this makes of other people's files: modules, parameters, and how their pictures
are drawn unless one is told otherwise.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from ldm_jax.errors import InputError
from ldm_jax.first_stage import make_first_stage
from ldm_jax.generate import Generator, make_generator
from ldm_jax.interop import folder
from ldm_jax.interop.clip_weights import text_encoder_from_config, text_params_from_state_dict
from ldm_jax.interop.scheduler_config import Scheduler, scheduler_from_config
from ldm_jax.interop.tokenizer import Tokenizer, load_tokenizer
from ldm_jax.interop.weights import read_state_dict
from ldm_jax.map_condition import inpainting
from ldm_jax.models.autoencoder import AutoencoderKL
from ldm_jax.models.clip import CLIPTextEncoder
from ldm_jax.models.unet import Added

# Class of the pipeline -> its text encoders, its autoencoder, and the guidance it has unless told otherwise.
SD = (("text_encoder",), "vae", 7.5)
XL = (("text_encoder", "text_encoder_2"), "vae", 5.0)
PIPELINES = {
    "StableDiffusionPipeline": SD,
    "StableDiffusionImg2ImgPipeline": SD,
    "StableDiffusionInpaintPipeline": SD,
    "StableDiffusionXLPipeline": XL,
    "StableDiffusionXLImg2ImgPipeline": XL,
    "StableDiffusionXLInpaintPipeline": (*XL[:2], 7.5),
    "LDMPipeline": ((), "vqvae", 1.0),
}
STEPS = 50  # diffusers' own default


class Pretrained(NamedTuple):
    """What a folder holds beside the parameters."""

    pipeline: str  # its class
    unet: nn.Module
    autoencoder: nn.Module
    encoders: tuple[CLIPTextEncoder, ...]  # none of an unconditional model
    tokenizers: tuple[Tokenizer, ...]
    scheduler: Mapping[str, Any]  # its scheduler_config.json
    zeros_for_nothing: bool  # SDXL: no negative prompt is told by zeros, not by the empty text


def is_folder(path: Path) -> bool:
    """Whether this is a diffusers folder rather than a run folder."""
    return (path / folder.INDEX).is_file()


def load(path: Path, dtype: str = "float32") -> tuple[Pretrained, ConfigDict, dict[str, Any]]:
    """Reads a diffusers folder.

    Args:
      path: with model_index.json.
      dtype: of parameters and arithmetic, float32 or bfloat16.

    Returns:
      What it is; a config with the fields of ours that say how it draws; params as `generate.make_generator` takes
      them, NumPy arrays.

    Raises:
      InputError: something is missing or damaged, or of a kind that is not supported; the line names it.
    """
    index, settings = folder.read_index(path), folder.read_settings(path)
    pipeline = settings.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        raise InputError(f"--model={path} is a {pipeline}; supported are {', '.join(PIPELINES)}")
    encoder_names, autoencoder_name, guidance = PIPELINES[pipeline]
    for name in ("unet", "scheduler", autoencoder_name, *encoder_names):
        if name not in index:
            raise InputError(f"--model={path}: {folder.INDEX} names no {name}, which a {pipeline} needs")
    kind = {"dtype": jnp.dtype(dtype), "params_dtype": jnp.dtype(dtype)}
    unet, unet_params = folder.load_unet(path / "unet", **kind)
    autoencoder, autoencoder_params, shift, scale = folder.load_autoencoder(path / autoencoder_name, **kind)
    texts = [_load_text_encoder(path / name, dtype) for name in encoder_names]
    model = Pretrained(
        pipeline=pipeline,
        unet=unet,
        autoencoder=autoencoder,
        encoders=tuple(encoder for encoder, _ in texts),
        tokenizers=tuple(load_tokenizer(path / name.replace("text_encoder", "tokenizer")) for name in encoder_names),
        scheduler=folder.component_config(path, "scheduler"),
        zeros_for_nothing=bool(settings.get("force_zeros_for_empty_prompt", True)),
    )
    _check_widths(path, model, len(scale))
    params = {"unet": unet_params, "autoencoder": autoencoder_params, "shift": shift, "scale": scale}
    params["conditioner"] = [text_params for _, text_params in texts]
    size = folder.component_config(path, "unet").get("sample_size")
    if not isinstance(size, int):
        raise InputError(f"{path / 'unet' / 'config.json'}: sample_size is {size}; it must be that of square latents")
    return model, _config(model, size, guidance, dtype), params


def _load_text_encoder(path: Path, dtype: str) -> tuple[CLIPTextEncoder, dict[str, Any]]:
    encoder = text_encoder_from_config(folder.component_config(path.parent, path.name)).clone(dtype=jnp.dtype(dtype))
    target = jax.eval_shape(encoder.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    return encoder, text_params_from_state_dict(read_state_dict(path, dtype=jnp.dtype(dtype)), target)


def _check_widths(path: Path, model: Pretrained, channels: int) -> None:
    """Raises InputError unless the networks fit together."""
    takes, gives = model.unet.in_channels, (channels, 2 * channels + 1)
    if takes not in gives or model.unet.out_channels != channels:
        raise InputError(
            f"--model={path}: latents of {channels} channels do not go with a UNet of {takes} to "
            f"{model.unet.out_channels}; it must be {channels}, or {2 * channels + 1} to {channels} for inpainting"
        )
    if model.encoders:
        width = sum(encoder.hidden_size for encoder in model.encoders)
        if width != model.unet.cross_attention_dim:
            raise InputError(
                f"--model={path}: texts of {width} features do not go with a UNet whose cross_attention_dim is "
                f"{model.unet.cross_attention_dim}"
            )


def _config(model: Pretrained, size: int, guidance: float, dtype: str) -> ConfigDict:
    """The fields of configs/base.py that drawing looks at, for latents of `size` pixels."""
    scheduler, autoencoder = scheduler_of(model), model.autoencoder
    levels = len(autoencoder.block_out_channels)
    return ConfigDict(
        {
            "seed": 0,
            "dtype": dtype,
            "data": {
                "image_size": size * 2 ** (levels - 1),
                "channels": autoencoder.in_channels,
                "crop": "center",
            },
            "autoencoder": {
                "kind": "kl" if isinstance(autoencoder, AutoencoderKL) else "vq",
                "block_out_channels": tuple(autoencoder.block_out_channels),
                "latent_channels": model.unet.out_channels,
            },
            "concat": {"kind": "none" if model.unet.in_channels == model.unet.out_channels else "inpainting"},
            "diffusion": {"timesteps": len(scheduler.schedule.alpha_bar), "prediction": scheduler.prediction},
            "sampling": {
                "sampler": scheduler.sampler,
                "steps": STEPS,
                "spacing": scheduler.options["spacing"],
                "eta": 0.0,
                "variance": scheduler.options.get("variance", "fixed_small"),
                "churn": 0.0,
                "guidance": guidance,
                "guidance_interval": (0.0, 1.0),
                "guidance_rescale": 0.0,
                "threshold": 0.0,
                "batch_size": jax.local_device_count(),
            },
        }
    ).lock()


def scheduler_of(model: Pretrained, sampler: str | None = None) -> Scheduler:
    """The model's own scheduler, or what another sampler makes of its config; raises InputError."""
    scheduler = scheduler_from_config(model.scheduler, sampler, pipeline=model.pipeline)
    if scheduler.threshold is not None:
        raise InputError(f"the scheduler {model.scheduler['_class_name']} has thresholding, which latents are not for")
    return scheduler


def texts_of(model: Pretrained, prompts: Sequence[str], negative: str | None, size: int) -> tuple[dict[str, Any], int]:
    """What `tau` takes of each prompt, and in the last row of the negative one: [P + 1, ...].

    Args:
      prompts: one or more.
      negative: what guidance leads away from; None = nothing.
      size: of the pictures in pixels, which SDXL is told.

    Returns:
      The arrays, and how many prompts were longer than the model reads.
    """
    said = [tokenizer([*prompts, negative or ""]) for tokenizer in model.tokenizers]
    n = len(prompts) + 1
    nothing = np.arange(n) == n - 1 if negative is None and model.zeros_for_nothing else np.zeros(n, bool)
    sizes = np.tile(np.float32([size, size, 0, 0, size, size]), (n, 1))  # original, crop from top and left, target
    cut = np.any([tokens.cut for tokens in said], axis=0)
    return {"ids": [tokens.ids for tokens in said], "nothing": nothing, "sizes": sizes}, int(cut.sum())


def make_tau(encoders: tuple[CLIPTextEncoder, ...]) -> Callable[[Any, Any], dict[str, jax.Array]]:
    """(params, rows of `texts_of`) -> the arguments by which the UNet is told of a text.

    Of one encoder, what its last layer says of each token (Rombach 2022, section 4.3.1); of two, what the layers before
    the last say, side by side, and the second's summary of the whole text (Podell 2023, section 2.1).
    """

    def tau(params: Any, texts: Any) -> dict[str, Any]:
        if not encoders:
            return {}
        said = [encoder.apply({"params": p}, ids) for encoder, p, ids in zip(encoders, params, texts["ids"])]
        if len(said) == 1:
            return {"context": said[0].last}
        told = (jnp.concatenate([features.penultimate for features in said], axis=-1), said[-1].pooled)
        context, pooled = (jnp.where(_beside(texts["nothing"], a), 0, a) for a in told)
        return {"context": context, "added": Added(pooled, texts["sizes"])}

    return tau


def _beside(rows: jax.Array, array: jax.Array) -> jax.Array:
    """[B] in the shape [B, 1, ...] that goes with an array [B, ...]."""
    return rows.reshape(-1, *[1] * (array.ndim - 1))


def build_generator(
    model: Pretrained, latent_shape: tuple[int, int, int], batch_size: int, snapshots: int
) -> Generator:
    """Noise to pictures, as `generate.make_generator` makes it."""
    first_stage, scheduler = make_first_stage(model.autoencoder), scheduler_of(model)
    masked = model.unet.in_channels != model.unet.out_channels
    return make_generator(
        unet=model.unet,
        tau=make_tau(model.encoders),
        null=None if model.encoders else 0,
        map_condition=inpainting(first_stage, latent_shape) if masked else None,
        first_stage=first_stage,
        latent_shape=latent_shape,
        alpha_bar=scheduler.schedule.alpha_bar,
        prediction=scheduler.prediction,
        pixels=False,
        batch_size=batch_size,
        snapshots=snapshots,
    )
