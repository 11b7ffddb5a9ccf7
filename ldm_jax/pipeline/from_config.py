"""A model from the fields of a config: modules, process and defaults, with parameters at random."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.config.fields import SCHEDULE
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.schedules import make_process
from ldm_jax.diffusion.solvers import SOLVERS
from ldm_jax.errors import InputError
from ldm_jax.models.autoencoder import AutoencoderKL, VQModel
from ldm_jax.models.classifier import NoisyClassifier
from ldm_jax.models.clip import CLIPTextEncoder
from ldm_jax.models.clip_vision import CLIP, CLIPImageEncoder
from ldm_jax.models.concat_conditioning import ConcatConditioning, Inpainting, LowResolution, Segmentation
from ldm_jax.models.conditioning import ClassConditioning, ClassEmbedder, TextConditioning
from ldm_jax.models.first_stage import FirstStage
from ldm_jax.models.unet import UNet
from ldm_jax.pipeline.model import LatentDiffusion, Origin, Params, SamplingDefaults, Solver
from ldm_jax.pipeline.scheduler import scheduler_of_run, solvers_of_scheduler

TEXT_PIPELINE = "StableDiffusionPipeline"  # the class of diffusers that samples from a text-to-image run


def from_config(
    config: ConfigDict, class_names: tuple[str, ...], text: TextConditioning | None = None
) -> LatentDiffusion:
    """The model that a config describes.

    Args:
      config: a valid one: see `config.rules.validate`.
      class_names: of the data set; () of an unlabelled one.
      text: the conditioning of a text-to-image model, from the run's own CLIP; None: on the classes.

    Raises:
      InputError: a text-to-image model with a solver that diffusers does not have.
    """
    shape = (config.data.image_size, config.data.image_size, config.data.channels)
    process, first_stage, concat = build_process(config), build_first_stage(config), build_concat(config)
    solvers = {name: Solver(process, {"spacing": config.sampling.spacing}) for name in SOLVERS}
    origin = Origin(class_names=class_names, config=config)
    if text:  # samples as its export does in diffusers
        scheduler, notes = scheduler_of_run(config)
        if notes:
            raise InputError(f"config.sampling: a text-to-image model must sample as diffusers does. {notes[0]}")
        solvers = solvers_of_scheduler(scheduler, TEXT_PIPELINE)
        origin = Origin(config=config, pipeline=TEXT_PIPELINE, schedulers={"scheduler": scheduler},
                        hashed=(config.diffusion.prediction,))  # fmt: skip
    latent_channels = config.data.channels if first_stage.module is None else config.autoencoder.latent_channels
    embedder = ClassEmbedder(len(class_names), config.unet.context_dim, config.unet.context_tokens)
    return LatentDiffusion(
        denoiser=build_unet(config, latent_channels, concat),
        first_stage=first_stage,
        conditioning=text or ClassConditioning(embedder),
        concat=concat,
        process=process,
        prediction=config.diffusion.prediction,
        image_shape=shape,
        defaults=sampling_defaults(config, solvers),
        origin=origin,
    )


def sampling_defaults(config: ConfigDict, solvers: Mapping[str, Solver | str]) -> SamplingDefaults:
    """The defaults of `config.sampling`, whose own sampler runs as the config says, the others as `solvers` say."""
    sampling = config.sampling
    own = {name: sampling[name] for name in ("spacing", "eta", "churn", "variance")}
    solver = solvers[sampling.sampler]
    if isinstance(solver, Solver):
        solvers = {**solvers, sampling.sampler: solver._replace(options={**solver.options, **own})}
    return SamplingDefaults(
        sampler=sampling.sampler,
        steps=sampling.steps,
        solvers=solvers,
        guidance=sampling.guidance,
        guidance_interval=tuple(sampling.guidance_interval),
        guidance_rescale=sampling.guidance_rescale,
        threshold=sampling.threshold,
        batch_size=sampling.batch_size,
        crop=config.data.crop,
    )


def init_params(model: LatentDiffusion, rng: jax.Array) -> Params:
    """{"denoiser", "conditioning"} at random; of a text-to-image model "denoiser" alone."""
    rng_denoiser, rng_conditioning = jax.random.split(rng)
    conditioning, params = model.conditioning, {}
    if isinstance(conditioning, TextConditioning):
        cond = {"context": jnp.zeros((1, 1, model.denoiser.cross_attention_dim))}
    else:
        params["conditioning"] = conditioning.init(rng_conditioning)
        cond = conditioning.encode(params["conditioning"], jnp.zeros((1,), jnp.int32))
    z = jnp.zeros((1, *model.latent_shape[:2], model.denoiser.in_channels))
    params["denoiser"] = model.denoiser.init(rng_denoiser, z, jnp.zeros((1,), jnp.int32), **cond)["params"]
    return params


def build_process(config: ConfigDict) -> Process:
    """The forward process of the config's noise schedule."""
    return make_process(**{name: config.diffusion[name] for name in SCHEDULE})


def build_autoencoder(config: ConfigDict) -> AutoencoderKL | VQModel | None:
    """The autoencoder, or None for diffusion on pixels."""
    autoencoder = config.autoencoder
    fields = {
        "in_channels": config.data.channels,
        "out_channels": config.data.channels,
        "latent_channels": autoencoder.latent_channels,
        "block_out_channels": autoencoder.block_out_channels,
        "layers_per_block": autoencoder.layers_per_block,
        "norm_num_groups": autoencoder.norm_num_groups,
        "mid_block_add_attention": autoencoder.mid_block_attention,
        "dtype": jnp.dtype(config.dtype),
    }
    if autoencoder.type == "none":
        return None
    if autoencoder.type == "vq":
        return VQModel(num_vq_embeddings=autoencoder.codebook_size, **fields)
    return AutoencoderKL(**fields)


def build_first_stage(config: ConfigDict) -> FirstStage:
    """The autoencoder's pure functions; the identity for diffusion on pixels."""
    return FirstStage(build_autoencoder(config), config.data.image_size)


def build_concat(config: ConfigDict) -> ConcatConditioning | None:
    """The concat conditioning of the config, if it has one."""
    concat, latent_channels = config.concat, config.autoencoder.latent_channels
    if concat.type == "low_resolution":
        return LowResolution(concat.factor, config.data.channels)
    if concat.type == "inpainting":
        return Inpainting(config.data.channels if config.autoencoder.type == "none" else latent_channels)
    return Segmentation(concat.num_segments) if concat.type == "segments" else None


def build_unet(config: ConfigDict, latent_channels: int, concat: ConcatConditioning | None) -> UNet:
    """The denoiser on latents of so many channels."""
    unet = config.unet
    return UNet(
        in_channels=latent_channels + (concat.channels if concat else 0),
        out_channels=2 * latent_channels if config.diffusion.variance == "learned" else latent_channels,
        block_out_channels=unet.block_out_channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in unet.attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(unet.attention)),
        mid_block_type="UNetMidBlock2DCrossAttn" if unet.attention[-1] else "UNetMidBlock2D",
        layers_per_block=unet.layers_per_block,
        attention_heads=unet.attention_heads,
        transformer_layers_per_block=unet.transformer_layers,
        cross_attention_dim=unet.context_dim,
        norm_num_groups=unet.norm_num_groups,
        dtype=jnp.dtype(config.dtype),
    )


def build_classifier(config: ConfigDict, num_classes: int) -> NoisyClassifier:
    """The classifier of the config's noised latents."""
    classifier = config.classifier
    return NoisyClassifier(
        num_classes=num_classes,
        block_out_channels=classifier.block_out_channels,
        attention=classifier.attention,
        layers_per_block=classifier.layers_per_block,
        attention_heads=classifier.attention_heads,
        norm_num_groups=classifier.norm_num_groups,
        dtype=jnp.dtype(config.dtype),
    )


def build_clip(config: ConfigDict, *, vocab_size: int, max_length: int, eos_token_id: int) -> CLIP:
    """Both encoders of `config.clip`, for a tokenizer with `vocab_size` tokens and texts of `max_length`."""
    fields, dtype = config.clip, jnp.dtype(config.dtype)
    text = CLIPTextEncoder(
        vocab_size=vocab_size,
        hidden_size=fields.text_width,
        intermediate_size=4 * fields.text_width,
        num_hidden_layers=fields.text_layers,
        num_attention_heads=fields.text_heads,
        max_position_embeddings=max_length,
        eos_token_id=eos_token_id,
        projection_dim=fields.projection_dim,
        dtype=dtype,
    )
    image = CLIPImageEncoder(
        image_size=config.data.image_size,
        patch_size=fields.patch_size,
        num_channels=config.data.channels,
        hidden_size=fields.image_width,
        intermediate_size=4 * fields.image_width,
        num_hidden_layers=fields.image_layers,
        num_attention_heads=fields.image_heads,
        projection_dim=fields.projection_dim,
        dtype=dtype,
    )
    return CLIP(text, image)


def identity_scale(channels: int) -> dict[str, np.ndarray]:
    """The scale of latents that have none: shift 0 and scale 1, each [channels]."""
    return {"shift": np.zeros(channels, np.float32), "scale": np.ones(channels, np.float32)}
