"""The models published as single files by CompVis and Stability AI: how to detect them, and what the files lack.

Numbers of heads, scaling factors and noise schedules are those of the yaml files published with the weights; samplers
those of the diffusers folders of the same models.

| family                | detected by                       | published as                                   |
|-----------------------|-----------------------------------|------------------------------------------------|
| Stable Diffusion 1    | CLIP under transformers' names    | v1-inference.yaml, v1-inpainting-inference.yaml|
| Stable Diffusion 2    | one OpenCLIP                      | v2-inference[-v].yaml, v2-inpainting-...yaml   |
| Stable Diffusion XL   | CLIP and OpenCLIP                 | sd_xl_base.yaml                                |
| SDXL refiner          | OpenCLIP, first of its embedders  | sd_xl_refiner.yaml                             |
| x4 upscaler           | an embedding of noise levels      | x4-upscaling.yaml                              |
| class-conditional LDM | an embedding of classes           | cin256-v2.yaml                                 |
| unconditional LDM     | no conditioning, plain attention  | celebahq-, ffhq-, lsun_bedrooms-ldm-vq-4.yaml  |
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ldm_jax.errors import InputError

UNET, FIRST_STAGE = "model.diffusion_model.", "first_stage_model."
CLASSES = "cond_stage_model."  # prefix of class-conditional LDM's embedding.weight

# Tensors in the files that sampling does not need.
IGNORED = re.compile(
    "|".join(
        (
            r"(.*\.)?model_ema\..*",  # EMA weights; diffusers ignores them too, unless extract_ema is set
            # The noise schedule.
            r"(low_scale_model\.)?((sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|betas)",
            r"posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)|denoiser\.sigmas",
            r"logvar|lvlb_weights",  # weights of losses
            r"(first_stage_model\.)?loss\..*",  # the autoencoder's discriminator and perceptual loss
            r".*\.position_ids|.*\.attn_mask",  # 0, 1, 2 ...; a triangle of -inf
            r"(.*\.)?logit_scale",  # the temperature of CLIP's contrastive loss
            r"v_pred|ztsnr",  # markers: see `V_MARKER`
        )
    )
)


class TextEncoder(NamedTuple):
    """A text encoder in a family's files."""

    prefix: str
    open_clip: bool  # else under transformers' names
    last: bool  # whether OpenCLIP's last layer and projection are part of it
    pad: str  # pad token of its tokenizer


class Family(NamedTuple):
    """What the files of a family of models lack."""

    pipeline: str  # class in diffusers, for text to image or unconditional; of class-conditional LDM our own
    scheduler: Mapping[str, Any]  # scheduler_config.json
    text_encoders: tuple[TextEncoder, ...] = ()
    autoencoder: str = "vae"  # the component's name in diffusers
    heads: int | None = None  # number of heads of every attention
    head_size: int | None = None  # or channels of a head
    scaling_factor: float = 0.18215
    sample_size: int = 64  # height and width of the latents
    inpainting: tuple[str, Mapping[str, Any]] | None = None  # pipeline and scheduler if the UNet has 9 input channels
    low_res_scheduler: Mapping[str, Any] | None = None  # noise augmentation of the x4 upscaler's low-resolution image
    time_ids: str | None = None  # and force_zeros_for_empty_prompt: of SDXL's TextConditioning
    force_zeros_for_empty_prompt: bool = True


def _betas(start: float, end: float) -> dict[str, Any]:
    fields = {"beta_start": start, "beta_end": end, "beta_schedule": "scaled_linear"}
    return fields | {"num_train_timesteps": 1000, "trained_betas": None}


_SD = _betas(0.00085, 0.012) | {
    "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False, "prediction_type": "epsilon"
}  # fmt: skip
_PNDM = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **_SD}
_DDIM = {"_class_name": "DDIMScheduler", **_SD}
_EULER = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", **_SD}
_LDM = {"_class_name": "DDIMScheduler", **_betas(0.0015, 0.0195), "clip_sample": False}
_UPSCALER = _betas(0.0001, 0.02)

SD2, UPSCALER, REFINER = "Stable Diffusion 2", "x4 upscaler", "SDXL refiner"
_END, _BANG = "<|endoftext|>", "!"
_CLIP = TextEncoder("cond_stage_model.transformer.", open_clip=False, last=True, pad=_END)
_OPEN_CLIP = TextEncoder("cond_stage_model.model.", open_clip=True, last=False, pad=_BANG)
_XL_CLIP = TextEncoder("conditioner.embedders.0.transformer.", open_clip=False, last=True, pad=_END)
_XL_OPEN_CLIP = TextEncoder("conditioner.embedders.1.model.", open_clip=True, last=True, pad=_BANG)
_REFINER_OPEN_CLIP = _XL_OPEN_CLIP._replace(prefix="conditioner.embedders.0.model.")
_SD1_INPAINTING = "StableDiffusionInpaintPipeline", _DDIM
_SD2_INPAINTING = "StableDiffusionInpaintPipeline", _PNDM
_XL_INPAINTING = "StableDiffusionXLInpaintPipeline", _EULER
_XL_SIZES = {"head_size": 64, "scaling_factor": 0.13025, "sample_size": 128}
_UPSCALER_SIZES = {"heads": 8, "scaling_factor": 0.08333, "sample_size": 128}
_V_SCHEDULER = _DDIM | _UPSCALER | {"prediction_type": "v_prediction"}
_LOW_RES = {"_class_name": "DDPMScheduler", **_UPSCALER, "variance_type": "fixed_small"}
FAMILIES = {
    "Stable Diffusion 1": Family("StableDiffusionPipeline", _PNDM, (_CLIP,), heads=8, inpainting=_SD1_INPAINTING),
    SD2: Family("StableDiffusionPipeline", _PNDM, (_OPEN_CLIP,), head_size=64, inpainting=_SD2_INPAINTING),
    "Stable Diffusion XL": Family(
        "StableDiffusionXLPipeline",
        _EULER,
        (_XL_CLIP, _XL_OPEN_CLIP),
        inpainting=_XL_INPAINTING,
        **_XL_SIZES,
        time_ids="target_size",
    ),
    REFINER: Family(
        "StableDiffusionXLImg2ImgPipeline",
        _EULER,
        (_REFINER_OPEN_CLIP,),
        **_XL_SIZES,
        time_ids="aesthetic_score",
        force_zeros_for_empty_prompt=False,
    ),
    UPSCALER: Family(
        "StableDiffusionUpscalePipeline", _V_SCHEDULER, (_OPEN_CLIP,), low_res_scheduler=_LOW_RES, **_UPSCALER_SIZES
    ),
    "class-conditional LDM": Family("LatentDiffusionPipeline", _LDM, heads=1, scaling_factor=1.0),
    "unconditional LDM": Family("LDMPipeline", _LDM, autoencoder="vqvae", head_size=32, scaling_factor=1.0),
}

# There are two of Stable Diffusion 2 with equal shapes: `base` of 512 pixels predicts eps; the other, of 768, v.
V_MODEL = {"sample_size": 96, "scheduler": _DDIM}
V_MARKER, ZERO_SNR_MARKER = "v_pred", "ztsnr"  # empty tensors: predicts v; trained with zero terminal SNR
STEP_OF_BASE = 875_000  # the training step of 512-base-ema.ckpt, by which diffusers detects it

# Other files that may be taken for a model: part of a tensor's name -> what they are.
_OTHERS = {
    "lora": "is a LoRA, which changes a model; it is no model by itself: --lora=FILE with --model=MODEL",
    "control_model.": "is a ControlNet, which is not supported",
    "edm_": "is an EDM model (Playground 2.5, CosXL), which is read as a diffusers folder, not as a single file",
    "down_blocks.": "is a component of a diffusers folder; --model must be that folder, with model_index.json",
}


def detect_family(names: Mapping[str, Any]) -> str:
    """The key of FAMILIES for a file with tensors of these names; raises InputError if there is none."""
    for part, reason in _OTHERS.items():
        if any(part in name for name in names):
            raise InputError(reason)
    has_unet, has_first_stage, has_ema, has_text = (
        any(name.startswith(prefix) for name in names)
        for prefix in (UNET, FIRST_STAGE, "model_ema.", ("cond_stage_model.", "conditioner."))
    )
    if not has_unet and has_ema:
        raise InputError("has EMA weights (model_ema.) alone; it must have those under model.diffusion_model. too")
    if not has_unet and (has_first_stage or "decoder.conv_in.weight" in names):
        raise InputError("is an autoencoder (VAE) alone, not a model; use it with --model=MODEL --vae=FILE")
    if f"{UNET}label_emb.weight" in names:
        return UPSCALER
    for family, fields in FAMILIES.items():
        prefixes = [encoder.prefix for encoder in fields.text_encoders]
        if has_unet and prefixes and all(any(n.startswith(prefix) for n in names) for prefix in prefixes):
            return family
    if has_unet and f"{CLASSES}embedding.weight" in names:
        return "class-conditional LDM"
    if f"{UNET}middle_block.1.qkv.weight" in names and not has_text:
        return "unconditional LDM"
    raise InputError(f"is no supported checkpoint, by the names of its tensors; supported are {', '.join(FAMILIES)}")
