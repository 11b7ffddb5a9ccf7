"""The allowed values of each config field by itself: choices and ranges; `rules` checks how fields go together."""

import difflib
import functools
import math
import operator
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from ldm_jax.diffusion.posthoc_ema import LONGEST, SHORTEST
from ldm_jax.diffusion.prediction import PREDICTIONS
from ldm_jax.diffusion.process import VARIANCES
from ldm_jax.diffusion.schedules import SCHEDULES
from ldm_jax.diffusion.solvers import SOLVERS
from ldm_jax.diffusion.spacing import SPACINGS
from ldm_jax.diffusion.weighting import WEIGHTINGS
from ldm_jax.errors import InputError

STAGES = ("autoencoder", "clip", "diffusion", "classifier")  # in the order in which they are trained
SCHEDULE = ("schedule", "timesteps", "beta_start", "beta_end", "zero_terminal_snr")  # config.diffusion's noise schedule
DTYPES = ("float32", "bfloat16")
LPIPS_MIN_SIZE = {"vgg16": 16, "alexnet": 31}  # pixels: see models/perceptual.py
OWN = "own"  # config.sampling.sampler: the scheduler of the pretrained model

_CHOICES = {
    "dtype": DTYPES,
    "data.channels": (1, 3),
    "data.crop": ("center", "none"),
    "autoencoder.type": ("kl", "vq", "none"),
    "autoencoder.loss.perceptual_net": tuple(LPIPS_MIN_SIZE),
    **{f"{stage}.decay": ("constant", "cosine") for stage in STAGES},
    **{f"{stage}.optimizer": ("adamw", "muon") for stage in STAGES},
    "diffusion.objective": ("diffusion", "mean_flow", "consistency"),
    "mean_flow.tangent": ("sample", "network"),
    "diffusion.schedule": SCHEDULES,
    "diffusion.prediction": tuple(PREDICTIONS),
    "diffusion.weighting": tuple(WEIGHTINGS),
    "diffusion.timestep_sampling": ("uniform", "logit_normal"),
    "diffusion.variance": ("fixed", "learned"),
    "denoiser": ("unet", "dit"),
    "dit.norm": ("layer", "rms"),
    "dit.qk_norm": ("none", "rms"),
    "concat.type": ("none", "low_resolution", "inpainting", "segments"),
    "textual_inversion.learnable_property": ("object", "style"),
    "parallel.engine": ("pmap", "fsdp"),
    "sampling.sampler": (*SOLVERS, OWN),
    "sampling.spacing": SPACINGS,
    "sampling.variance": VARIANCES,
}

# (lowest, highest) -> the fields with this range, bounds included; None = no bound. "*" stands for each of STAGES.
_FIELDS_IN_RANGE = {
    (0, None): """
        data.bucket_step data.memory_limit_gb autoencoder.loss.perceptual_size autoencoder.loss.perceptual_start
        autoencoder.loss.adversarial_start clip.max_shift diffusion.vlb_weight lora.rank lora.alpha
        mean_flow.guidance consistency.guidance_min consistency.guidance_max
        sampling.num sampling.churn sampling.guidance sampling.guide_step sampling.progress_every
        evaluation.vlb_examples *.learning_rate *.warmup_steps *.weight_decay parallel.fsdp
        autoencoder.loss.reconstruction autoencoder.loss.perceptual autoencoder.loss.kl autoencoder.loss.codebook
        autoencoder.loss.commitment autoencoder.loss.adversarial autoencoder.discriminator.learning_rate""",
    (1, None): """
        autoencoder.latent_channels autoencoder.layers_per_block autoencoder.norm_num_groups
        autoencoder.loss.perceptual_every autoencoder.discriminator.channels autoencoder.discriminator.layers
        clip.projection_dim clip.text_width clip.text_layers clip.text_heads clip.patch_size clip.image_width
        clip.image_layers clip.image_heads clip.validation_examples diffusion.validation_examples
        unet.layers_per_block unet.attention_heads unet.transformer_layers unet.norm_num_groups unet.context_dim
        unet.context_tokens dit.patch_size dit.depth dit.heads
        classifier.layers_per_block classifier.attention_heads classifier.norm_num_groups
        textual_inversion.vectors parallel.accumulate sampling.steps sampling.batch_size evaluation.batch_size
        diffusion.ema_snapshot_every log_every checkpoint_every keep_checkpoints *.steps *.batch_size""",
    (2, None): "autoencoder.codebook_size diffusion.timesteps concat.factor evaluation.num_reference",
    (4, None): "data.image_size dit.hidden_size",
    (16, None): "evaluation.resize",
    (514, None): "clip.vocab_size",
    (0, 2**32 - 1): "seed",
    (3, 10_000): "clip.max_length",
    (2, 256): "concat.num_segments",
    (-10.0, 10.0): "diffusion.timestep_mean",
    (0.01, 10.0): "diffusion.timestep_std",
    (0.01, 100.0): "diffusion.timestep_shift",
    (0.0, 0.99): "clip.max_zoom mean_flow.kappa",
    (0.0, 2.0): "mean_flow.adaptive_power",
    (1e-6, 10.0): "consistency.huber_c",
    (1e-6, None): "*.clip_norm diffusion.snr_gamma",
    (0.0, 0.999999): "*.adam_b2",  # 1 would never include a gradient; in float32 also 0.99999999
    (0.25, 100.0): "dit.mlp_ratio",
    (0.0, 0.999): "diffusion.beta_end",
    (0.0, 1.0): """
        diffusion.beta_start diffusion.label_dropout mean_flow.interval_ratio sampling.eta sampling.guidance_rescale
        sampling.threshold *.ema_decay""",
}
_RANGES = {
    pattern.replace("*", stage): bounds
    for bounds, patterns in _FIELDS_IN_RANGE.items()
    for pattern in patterns.split()
    for stage in STAGES
}


def check_fields(fields: Mapping[str, Any]) -> None:
    """Raises InputError for a missing config field, or a value outside the field's choices or range.

    `fields` maps full names, e.g. "diffusion.steps", to values.
    """
    others = ("stages", "init_from", "wandb", "diffusion.ema_sigma_rels", "sampling.prompts")
    for name in (*others, "sampling.guidance_interval", *_CHOICES, *_RANGES):
        if name not in fields:
            raise InputError(f"the config has no field config.{name}; configs start from configs/base.py")
    for name, value in fields.items():
        numbers = value if isinstance(value, (tuple, list)) else (value,)
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise InputError(f"config.{name} is {value}; it must be finite")
    for name, choices in _CHOICES.items():
        check_choice(f"config.{name}", fields[name], choices)
    for name, (low, high) in _RANGES.items():
        value = fields[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(f"config.{name} is {value!r}; it must be a number")
        if not (value >= low and (high is None or value <= high)):
            bounds = f"{low} or more" if high is None else f"from {low} to {high}"
            raise InputError(f"config.{name} is {value}; it must be {bounds}")
    check_interval("config.sampling.guidance_interval", fields["sampling.guidance_interval"])
    _check_sigma_rels("config.diffusion.ema_sigma_rels", fields["diffusion.ema_sigma_rels"])


def wrong_field(config: ConfigDict, name: str, rule: str) -> InputError:
    """The error of field `name`, dotted and without "config.", that breaks `rule`."""
    return InputError(f"config.{name} is {functools.reduce(operator.getitem, name.split('.'), config)!r}; {rule}")


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """Raises InputError, which names `name`, unless `value` is one of `choices`."""
    if value not in choices:
        near = nearest(str(value), [str(choice) for choice in choices])
        raise InputError(f"{name} is {value!r}; it must be one of {', '.join(map(str, choices))}{near}")


def _check_sigma_rels(name: str, value: Any) -> None:
    """Raises InputError, which names `name`, unless `value` is a tuple of rising lengths of averages."""
    numbers = isinstance(value, tuple) and all(isinstance(number, float) for number in value)
    if not numbers or not all(SHORTEST <= number <= LONGEST for number in value) or list(value) != sorted({*value}):
        rule = f"it must be rising numbers from {SHORTEST} to {LONGEST}, e.g. (0.05, 0.1), or () for none"
        raise InputError(f"{name} is {value!r}; {rule}")


def nearest(name: str, known: list[str]) -> str:
    """The end of an error message that suggests the known name nearest to `name`, or "" if none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def check_interval(name: str, value: Any) -> None:
    """Raises InputError, which names `name`, unless `value` is two rising numbers from 0 to 1."""
    numbers = isinstance(value, (tuple, list)) and all(isinstance(number, (int, float)) for number in value)
    if not numbers or len(value) != 2 or not 0 <= value[0] < value[1] <= 1:
        raise InputError(f"{name} is {value}; it must be two rising numbers from 0 to 1, e.g. 0.15,0.85")
