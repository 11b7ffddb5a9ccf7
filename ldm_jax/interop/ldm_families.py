"""The models in single files of CompVis and Stability AI: what tells them apart, and what their files do not say.

Numbers of heads, factors and noise levels are those of the yaml files that CompVis and Stability AI published with the
weights; samplers those of the diffusers folders of the same models.

| family                | told by                           | published as                                   |
|-----------------------|-----------------------------------|------------------------------------------------|
| Stable Diffusion 1    | CLIP under transformers' names    | v1-inference.yaml, v1-inpainting-inference.yaml|
| Stable Diffusion 2    | one OpenCLIP                      | v2-inference[-v].yaml, v2-inpainting-...yaml   |
| Stable Diffusion XL   | CLIP and OpenCLIP                 | sd_xl_base.yaml                                |
| x4 upscaler           | an embedding of noise levels      | x4-upscaling.yaml                              |
| class-conditional LDM | an embedding of classes           | cin256-v2.yaml                                 |
| unconditional LDM     | no condition, plain attention     | celebahq-, ffhq-, lsun_bedrooms-ldm-vq-4.yaml  |
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ldm_jax.errors import InputError

UNET, FIRST_STAGE = "model.diffusion_model.", "first_stage_model."

# What is in files beside the weights that pictures are drawn with.
IGNORED = re.compile(
    "|".join(
        (
            r"(.*\.)?model_ema\..*",  # averaged weights; diffusers leaves them out too, unless told otherwise
            # The noise levels: the schedule has them.
            r"(low_scale_model\.)?((sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|betas)",
            r"posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)|denoiser\.sigmas",
            r"logvar|lvlb_weights",  # weights of losses
            r"(first_stage_model\.)?loss\..*",  # the autoencoder's discriminator and perceptual loss
            r".*\.position_ids|.*\.attn_mask",  # 0, 1, 2 ...; a triangle of -inf
            r"(.*\.)?logit_scale",  # of the contrast with pictures, as CLIP was trained
        )
    )
)


class Text(NamedTuple):
    """A text encoder of a family."""

    prefix: str
    open_clip: bool  # else under transformers' names
    last: bool  # whether OpenCLIP's last layer and projection are part of it
    pad: str  # the token that fills up its texts


class Family(NamedTuple):
    """What a file does not say."""

    pipeline: str  # diffusers' class, for text to image or without a text
    texts: tuple[Text, ...]
    autoencoder: str  # the component's name in diffusers
    heads: int | None  # of all attention
    head_size: int | None  # or their size
    scaling_factor: float
    sample_size: int  # of the latents in pixels
    scheduler: Mapping[str, Any]
    inpainting: tuple[str, Mapping[str, Any]] | None = None  # the same of 9 channels: pipeline and scheduler
    low_res_scheduler: Mapping[str, Any] | None = None  # by which the picture to enlarge is noised


_END, _BANG = "<|endoftext|>", "!"
_SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
    "prediction_type": "epsilon",
}
_PNDM = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **_SD}
_DDIM = {"_class_name": "DDIMScheduler", **_SD}
_EULER = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", **_SD}
_LDM = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "clip_sample": False,
}
_UPSCALER = {
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "trained_betas": None,
}

SD2, UPSCALER = "Stable Diffusion 2", "x4 upscaler"
_TEXT_OF_SD2 = Text("cond_stage_model.model.", open_clip=True, last=False, pad=_BANG)
FAMILIES = {
    "Stable Diffusion 1": Family(
        pipeline="StableDiffusionPipeline",
        texts=(Text("cond_stage_model.transformer.", open_clip=False, last=True, pad=_END),),
        autoencoder="vae",
        heads=8,
        head_size=None,
        scaling_factor=0.18215,
        sample_size=64,
        scheduler=_PNDM,
        inpainting=("StableDiffusionInpaintPipeline", _DDIM),
    ),
    SD2: Family(
        pipeline="StableDiffusionPipeline",
        texts=(_TEXT_OF_SD2,),
        autoencoder="vae",
        heads=None,
        head_size=64,
        scaling_factor=0.18215,
        sample_size=64,
        scheduler=_PNDM,
        inpainting=("StableDiffusionInpaintPipeline", _PNDM),
    ),
    "Stable Diffusion XL": Family(
        pipeline="StableDiffusionXLPipeline",
        texts=(
            Text("conditioner.embedders.0.transformer.", open_clip=False, last=True, pad=_END),
            Text("conditioner.embedders.1.model.", open_clip=True, last=True, pad=_BANG),
        ),
        autoencoder="vae",
        heads=None,
        head_size=64,
        scaling_factor=0.13025,
        sample_size=128,
        scheduler=_EULER,
        inpainting=("StableDiffusionXLInpaintPipeline", _EULER),
    ),
    UPSCALER: Family(
        pipeline="StableDiffusionUpscalePipeline",
        texts=(_TEXT_OF_SD2,),
        autoencoder="vae",
        heads=8,
        head_size=None,
        scaling_factor=0.08333,
        sample_size=128,
        scheduler=_DDIM | _UPSCALER | {"prediction_type": "v_prediction"},
        low_res_scheduler={"_class_name": "DDPMScheduler", **_UPSCALER, "variance_type": "fixed_small"},
    ),
    "class-conditional LDM": Family(
        pipeline="LDMPipeline",
        texts=(),
        autoencoder="vqvae",
        heads=1,
        head_size=None,
        scaling_factor=1.0,
        sample_size=64,
        scheduler=_LDM,
    ),
    "unconditional LDM": Family(
        pipeline="LDMPipeline",
        texts=(),
        autoencoder="vqvae",
        heads=None,
        head_size=32,
        scaling_factor=1.0,
        sample_size=64,
        scheduler=_LDM,
    ),
}
CLASSES = "cond_stage_model."  # above class-conditional LDM's embedding.weight

# Of Stable Diffusion 2 there are two, alike in every shape: `base` of 512 pixels predicts eps, the other, of 768, v.
V_MODEL = {"sample_size": 96, "scheduler": _DDIM}
STEP_OF_BASE = 875_000  # the updates behind 512-base-ema.ckpt, by which diffusers tells it from the other

# Other files that people may take for a model: part of a name -> what they are.
_OTHERS = {
    "lora": "is a LoRA, which changes a model; it is no model by itself",
    "control_model.": "is a ControlNet, which is not supported",
    "conditioner.embedders.0.model.": "is the refiner of Stable Diffusion XL, which is not supported",
    "down_blocks.": "is a part of a diffusers folder; --model must be that folder, with model_index.json",
}


def family_of(names: Mapping[str, Any]) -> str:
    """The key of FAMILIES for a file with tensors of such names; InputError for what is none of them."""
    for part, told in _OTHERS.items():
        if any(part in name for name in names):
            raise InputError(told)
    has = {prefix: any(name.startswith(prefix) for name in names) for prefix in (UNET, FIRST_STAGE, "model_ema.")}
    if not has[UNET] and has["model_ema."]:
        raise InputError("has averaged weights alone (model_ema.); it must have those under model.diffusion_model. too")
    if not has[UNET] and (has[FIRST_STAGE] or "decoder.conv_in.weight" in names):
        raise InputError("is an autoencoder alone; it goes beside a model, by --vae")
    if f"{UNET}label_emb.weight" in names:
        return UPSCALER
    for family, fields in FAMILIES.items():
        prefixes = [text.prefix for text in fields.texts]
        if has[UNET] and prefixes and all(any(n.startswith(prefix) for n in names) for prefix in prefixes):
            return family
    if has[UNET] and f"{CLASSES}embedding.weight" in names:
        return "class-conditional LDM"
    told = any(name.startswith(("cond_stage_model.", "conditioner.")) for name in names)
    if f"{UNET}middle_block.1.qkv.weight" in names and not told:
        return "unconditional LDM"
    raise InputError(f"has none of the layouts that are known: {', '.join(FAMILIES)}")
