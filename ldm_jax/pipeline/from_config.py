"""A model from the fields of a config: modules, process and sampling defaults; its random parameters."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.config.fields import SCHEDULE
from ldm_jax.diffusion.schedules import make_process
from ldm_jax.diffusion.solvers import SOLVERS
from ldm_jax.errors import InputError
from ldm_jax.models.autoencoder import AutoencoderKL, VQModel
from ldm_jax.models.classifier import NoisyClassifier
from ldm_jax.models.clip import CLIPTextEncoder
from ldm_jax.models.clip_vision import CLIP, CLIPImageEncoder
from ldm_jax.models.concat_conditioning import ConcatConditioning, Inpainting, LowResolution, Segmentation
from ldm_jax.models.conditioning import ClassConditioning, ClassEmbedder, TextConditioning
from ldm_jax.models.dit import DiT
from ldm_jax.models.first_stage import FirstStage
from ldm_jax.models.unet import UNet
from ldm_jax.pipeline.model import LatentDiffusion, Origin, Params, SamplingDefaults, Solver
from ldm_jax.pipeline.scheduler import scheduler_of_run, solvers_of_scheduler

TEXT_PIPELINE = "StableDiffusionPipeline"  # the class of diffusers that samples from a text-to-image run


def from_config(
    config: ConfigDict, class_names: tuple[str, ...], text: TextConditioning | None = None
) -> LatentDiffusion:
    """The model of a valid config, conditioned on texts by `text` (of the run's CLIP), else on classes (() = none).

    Raises InputError for a text-to-image model whose solver diffusers does not have.
    """
    process = make_process(**_fields(config.diffusion, *SCHEDULE))
    first_stage, concat = build_first_stage(config), build_concat(config)
    mean_flow = config.diffusion.objective == "mean_flow"
    solvers = {name: Solver(process, {"spacing": config.sampling.spacing}) for name in SOLVERS}
    if mean_flow:
        why = "a MeanFlow model is sampled by ddim alone, whose steps are those of its average velocity"
        solvers = {name: solver if name == "ddim" else why for name, solver in solvers.items()}
    origin = Origin(class_names=class_names, config=config)
    if text:  # samples as its export does in diffusers
        scheduler, notes = scheduler_of_run(config)
        if notes:
            raise InputError(f"config.sampling: a text-to-image model must sample as diffusers does. {notes[0]}")
        (_, solvers), hashed = solvers_of_scheduler(scheduler, TEXT_PIPELINE), (config.diffusion.prediction,)
        origin = Origin(config=config, pipeline=TEXT_PIPELINE, schedulers={"scheduler": scheduler}, hashed=hashed)
    latent_channels = config.data.channels if first_stage.module is None else config.autoencoder.latent_channels
    embedder = build_class_embedder(config, len(class_names))
    return LatentDiffusion(
        denoiser=build_denoiser(config, latent_channels, concat, text),
        first_stage=first_stage,
        conditioning=text or ClassConditioning(embedder),
        concat=concat,
        process=process,
        prediction=config.diffusion.prediction,
        image_shape=(config.data.image_size, config.data.image_size, config.data.channels),
        defaults=sampling_defaults(config, solvers),
        origin=origin,
        mean_flow=mean_flow,
    )


def sampling_defaults(config: ConfigDict, solvers: Mapping[str, Solver | str]) -> SamplingDefaults:
    """The sampling defaults of a config: its own sampler with its own options, the others as in `solvers`."""
    sampling = config.sampling
    solver = solvers[sampling.sampler]
    if isinstance(solver, Solver):
        own = _fields(sampling, "spacing", "eta", "churn", "variance")
        solvers = {**solvers, sampling.sampler: solver._replace(options={**solver.options, **own})}
    return SamplingDefaults(
        **_fields(sampling, "sampler", "steps", "guidance", "guidance_rescale", "threshold", "batch_size"),
        guide_step=sampling.guide_step,
        solvers=solvers,
        guidance_interval=tuple(sampling.guidance_interval),
        crop=config.data.crop,
        concat_split=None if config.concat.type == "none" else config.data.test_split,
    )


def init_params(model: LatentDiffusion, rng: jax.Array) -> Params:
    """Random parameters {"denoiser", "conditioning"}; of a text-to-image model "denoiser" alone."""
    rng_denoiser, rng_conditioning = jax.random.split(rng)
    conditioning, params = model.conditioning, {}
    if isinstance(conditioning, TextConditioning):
        cond = {"context": jnp.zeros((1, 1, model.denoiser.cross_attention_dim))}
    else:
        params["conditioning"] = conditioning.init(rng_conditioning)
        cond = conditioning.encode(params["conditioning"], jnp.zeros((1,), jnp.int32))
    z = jnp.zeros((1, *model.latent_shape[:2], model.denoiser.in_channels))
    if model.mean_flow:
        cond["timestep_cond"] = jnp.zeros((1, model.denoiser.time_cond_proj_dim))
    params["denoiser"] = model.denoiser.init(rng_denoiser, z, jnp.zeros((1,), jnp.int32), **cond)["params"]
    return params


def build_autoencoder(config: ConfigDict) -> AutoencoderKL | VQModel | None:
    """The autoencoder, or None for diffusion on pixels."""
    autoencoder, channels = config.autoencoder, config.data.channels
    fields = _fields(autoencoder, "latent_channels", "block_out_channels", "layers_per_block", "norm_num_groups")
    fields |= {"in_channels": channels, "out_channels": channels, "dtype": jnp.dtype(config.dtype)}
    fields["mid_block_add_attention"] = autoencoder.mid_block_attention
    if autoencoder.type == "none":
        return None
    if autoencoder.type == "vq":
        return VQModel(num_vq_embeddings=autoencoder.codebook_size, **fields)
    return AutoencoderKL(**fields)


def build_first_stage(config: ConfigDict) -> FirstStage:
    """The first stage; the identity for diffusion on pixels."""
    return FirstStage(build_autoencoder(config), config.data.image_size)


def build_concat(config: ConfigDict) -> ConcatConditioning | None:
    """The concat conditioning, if any."""
    concat, channels = config.concat, config.data.channels
    if concat.type == "low_resolution":
        return LowResolution(concat.factor, channels)
    if concat.type == "inpainting":
        return Inpainting(channels if config.autoencoder.type == "none" else config.autoencoder.latent_channels)
    return Segmentation(concat.num_segments) if concat.type == "segments" else None


def build_class_embedder(config: ConfigDict, num_classes: int) -> ClassEmbedder:
    """The class embedding, of a DiT as wide as its blocks, and with the initial values of Peebles & Xie 2023."""
    if config.denoiser == "dit":
        return ClassEmbedder(num_classes, config.dit.hidden_size, std=0.02)
    return ClassEmbedder(num_classes, config.unet.context_dim, config.unet.context_tokens)


def build_denoiser(
    config: ConfigDict, latent_channels: int, concat: ConcatConditioning | None, text: TextConditioning | None
) -> UNet | DiT:
    """The denoiser of latents with so many channels."""
    channels = {
        "in_channels": latent_channels + (concat.channels if concat else 0),
        "out_channels": 2 * latent_channels if config.diffusion.variance == "learned" else latent_channels,
        "dtype": jnp.dtype(config.dtype),
    }
    if config.denoiser == "dit":
        return DiT(
            **_fields(config.dit, *config.dit),
            **channels,
            sample_size=config.data.image_size // build_first_stage(config).downsampling,
            cross_attention_dim=config.clip.text_width if text else None,
        )
    unet = config.unet
    return UNet(
        **_fields(unet, "block_out_channels", "layers_per_block", "attention_heads", "norm_num_groups"),
        **channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in unet.attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(unet.attention)),
        mid_block_type="UNetMidBlock2DCrossAttn" if unet.attention[-1] else "UNetMidBlock2D",
        transformer_layers_per_block=unet.transformer_layers,
        cross_attention_dim=unet.context_dim,
        time_cond_proj_dim=unet.block_out_channels[0] if config.diffusion.objective == "mean_flow" else None,
    )


def build_classifier(config: ConfigDict, num_classes: int) -> NoisyClassifier:
    """The classifier of noised latents."""
    names = ("block_out_channels", "attention", "layers_per_block", "attention_heads", "norm_num_groups")
    fields = _fields(config.classifier, *names)
    return NoisyClassifier(num_classes=num_classes, dtype=jnp.dtype(config.dtype), **fields)


def build_clip(config: ConfigDict, *, vocab_size: int, max_length: int, eos_token_id: int) -> CLIP:
    """Both encoders of `config.clip`, for a tokenizer with `vocab_size` tokens and texts of `max_length`."""

    def transformer(encoder: str) -> dict[str, Any]:
        width, layers, heads = (config.clip[f"{encoder}_{name}"] for name in ("width", "layers", "heads"))
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
        shared = {"projection_dim": config.clip.projection_dim, "dtype": jnp.dtype(config.dtype)}
        return sizes | shared | {"num_attention_heads": heads}

    text = {"vocab_size": vocab_size, "max_position_embeddings": max_length, "eos_token_id": eos_token_id}
    image = {"image_size": config.data.image_size, "num_channels": config.data.channels}
    image["patch_size"] = config.clip.patch_size
    return CLIP(CLIPTextEncoder(**text, **transformer("text")), CLIPImageEncoder(**image, **transformer("image")))


def identity_scale(channels: int) -> dict[str, np.ndarray]:
    """The scaling of latents that leaves them alone: shift 0 and scale 1, each [channels]."""
    return {"shift": np.zeros(channels, np.float32), "scale": np.ones(channels, np.float32)}


def _fields(section: ConfigDict, *names: str) -> dict[str, Any]:
    return {name: section[name] for name in names}
