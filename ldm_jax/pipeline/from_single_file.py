"""A model from a single file in the layout of CompVis and Stability AI, .safetensors or a pickle of PyTorch's."""

from pathlib import Path

import jax.numpy as jnp

from ldm_jax.interop import single_file
from ldm_jax.models.conditioning import ClassConditioning, NoConditioning, TextConditioning
from ldm_jax.models.first_stage import FirstStage
from ldm_jax.pipeline.from_diffusers import assemble
from ldm_jax.pipeline.model import LatentDiffusion, Params
from ldm_jax.pipeline.overrides import NO_OVERRIDES, Overrides, find_tokenizers


def from_single_file(
    path: Path, dtype: str = "float32", overrides: Overrides = NO_OVERRIDES
) -> tuple[LatentDiffusion, Params]:
    """The model of a single file and its parameters, NumPy arrays.

    Args:
      path: of the file.
      dtype: of parameters and computation, float32 or bfloat16.
      overrides: its tokenizer and its prediction target, which the file does not state.

    Raises:
      InputError: damaged, of no family that is supported, or without a tokenizer that it needs.
    """
    dtypes = {"dtype": jnp.dtype(dtype), "params_dtype": jnp.dtype(dtype)}
    file = single_file.read(path, prediction=overrides.prediction, **dtypes)
    fields, (autoencoder, first_stage) = file.fields, file.autoencoder
    encoders = tuple(encoder for encoder, _ in file.text_encoders)
    tokenizers = find_tokenizers(path, overrides.tokenizer, encoders, tuple(each.pad for each in fields.text_encoders))
    conditioning, conditioning_params = NoConditioning(), {}
    if file.class_embedder:
        conditioning, conditioning_params = ClassConditioning(file.class_embedder[0]), file.class_embedder[1]
    elif encoders:
        conditioning, conditioning_params = TextConditioning(encoders, tokenizers), [p for _, p in file.text_encoders]
    schedulers = {"scheduler": fields.scheduler, "low_res_scheduler": fields.low_res_scheduler}
    model = assemble(
        path,
        fields.pipeline,
        file.unet[0],
        FirstStage(autoencoder, fields.sample_size * autoencoder.downsampling),
        conditioning,
        {name: config for name, config in schedulers.items() if config},
        channels=len(file.scale),
        latent_size=(fields.sample_size, fields.sample_size),
        class_names=tuple(map(str, range(conditioning.num_classes))),
    )
    params = {"denoiser": file.unet[1], "conditioning": conditioning_params, "first_stage": first_stage}
    return model, params | {"shift": file.shift, "scale": file.scale}
