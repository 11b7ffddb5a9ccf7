"""A model from a single file in the layout of CompVis and Stability AI, .safetensors or a pickle of PyTorch's."""

from pathlib import Path

import jax.numpy as jnp

from ldm_jax.interop import single_file
from ldm_jax.models.conditioning import ClassConditioning, NoConditioning, TextConditioning
from ldm_jax.models.first_stage import FirstStage
from ldm_jax.pipeline.from_diffusers import MAX_NOISE_LEVEL, assemble
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.pipeline.overrides import NO_OVERRIDES, Overrides, find_tokenizers


def from_single_file(
    path: Path, dtype: str = "float32", overrides: Overrides = NO_OVERRIDES
) -> tuple[LatentDiffusion, Params]:
    """Reads a whole model.

    Args:
      path: of the file.
      dtype: of parameters and computation, float32 or bfloat16.
      overrides: what the file does not state: its tokenizer and its prediction target.

    Returns:
      The model; its parameters, NumPy arrays.

    Raises:
      InputError: damaged, of no family that is supported, or without a tokenizer that it needs.
    """
    dtypes = {"dtype": jnp.dtype(dtype), "params_dtype": jnp.dtype(dtype)}
    found = single_file.read(path, prediction=overrides.prediction, **dtypes)
    encoders = tuple(encoder for encoder, _ in found.text_encoders)
    tokenizers = find_tokenizers(path, overrides.tokenizer, encoders, found.pad_tokens)
    if found.class_embedder:
        conditioning, conditioning_params = ClassConditioning(found.class_embedder[0]), found.class_embedder[1]
    elif encoders:
        conditioning = TextConditioning(encoders, tokenizers)
        conditioning_params = [text_params for _, text_params in found.text_encoders]
    else:
        conditioning, conditioning_params = NoConditioning(), {}
    autoencoder = found.autoencoder[0]
    schedulers = {"scheduler": found.scheduler}
    if found.low_res_scheduler:
        schedulers["low_res_scheduler"] = found.low_res_scheduler
    model = assemble(
        path=path,
        pipeline=found.pipeline,
        denoiser=found.unet[0],
        first_stage=FirstStage(autoencoder, found.sample_size * autoencoder.downsampling),
        conditioning=conditioning,
        schedulers=schedulers,
        max_noise_level=MAX_NOISE_LEVEL,
        latent_size=(found.sample_size, found.sample_size),
        stated={},
        class_names=tuple(map(str, range(conditioning.num_classes))),
        channels=len(found.scale),
    )
    params = {"denoiser": found.unet[1], "conditioning": conditioning_params, "first_stage": found.autoencoder[1]}
    return model, params | {"shift": found.shift, "scale": found.scale}
