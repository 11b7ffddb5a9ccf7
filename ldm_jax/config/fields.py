"""What each field of a config may be, by itself: choices and ranges; `config_rules` says how they go together."""

import difflib
from collections.abc import Mapping
from typing import Any

from ldm_jax.diffusion.prediction import PREDICTIONS
from ldm_jax.diffusion.process import VARIANCES
from ldm_jax.diffusion.schedules import SCHEDULES
from ldm_jax.diffusion.solvers import SOLVERS
from ldm_jax.diffusion.spacing import SPACINGS
from ldm_jax.diffusion.weighting import WEIGHTINGS
from ldm_jax.errors import InputError

OWN = "own"  # the sampler of the model that is fine-tuned
DTYPES = ("float32", "bfloat16")

# Everything that can be trained, in the order in which it may be.
STAGES = ("autoencoder", "clip", "diffusion", "classifier")

_CHOICES = {
    "dtype": DTYPES,
    "data.channels": (1, 3),
    "data.crop": ("center", "none"),
    "autoencoder.type": ("kl", "vq", "none"),
    "autoencoder.loss.perceptual_net": ("vgg16", "alexnet"),
    "autoencoder.decay": ("constant", "cosine"),
    "clip.decay": ("constant", "cosine"),
    "diffusion.decay": ("constant", "cosine"),
    "classifier.decay": ("constant", "cosine"),
    "diffusion.schedule": SCHEDULES,
    "diffusion.prediction": tuple(PREDICTIONS),
    "diffusion.weighting": tuple(WEIGHTINGS),
    "concat.type": ("none", "low_resolution", "inpainting", "segments"),
    "diffusion.variance": ("fixed", "learned"),
    "sampling.sampler": (*SOLVERS, OWN),
    "sampling.spacing": SPACINGS,
    "sampling.variance": VARIANCES,
}

# Fields that are two rising numbers from 0 to 1.
_INTERVALS = ("sampling.guidance_interval",)

# Fields with a range: (lowest, highest), both allowed; None = no bound.
_RANGES = {
    "seed": (0, 2**32 - 1),
    "data.bucket_step": (0, None),
    "data.image_size": (4, None),
    "data.memory_limit_gb": (0.0, None),
    "autoencoder.latent_channels": (1, None),
    "autoencoder.layers_per_block": (1, None),
    "autoencoder.norm_num_groups": (1, None),
    "autoencoder.codebook_size": (2, None),
    "autoencoder.loss.perceptual_every": (1, None),
    "autoencoder.loss.perceptual_size": (0, None),
    "autoencoder.discriminator.channels": (1, None),
    "autoencoder.discriminator.layers": (1, None),
    "clip.vocab_size": (514, None),
    "clip.max_length": (3, 10_000),
    "clip.projection_dim": (1, None),
    "clip.text_width": (1, None),
    "clip.text_layers": (1, None),
    "clip.text_heads": (1, None),
    "clip.patch_size": (1, None),
    "clip.image_width": (1, None),
    "clip.image_layers": (1, None),
    "clip.image_heads": (1, None),
    "clip.max_shift": (0, None),
    "clip.max_zoom": (0.0, 0.99),
    "clip.validation_examples": (1, None),
    "diffusion.timesteps": (2, None),
    "diffusion.beta_start": (0.0, 1.0),
    "diffusion.beta_end": (0.0, 0.999),
    "diffusion.label_dropout": (0.0, 1.0),
    "diffusion.validation_examples": (1, None),
    "diffusion.vlb_weight": (0.0, None),
    "diffusion.snr_gamma": (0.0, None),
    "concat.factor": (2, None),
    "concat.num_segments": (2, 256),
    "unet.layers_per_block": (1, None),
    "unet.attention_heads": (1, None),
    "unet.transformer_layers": (1, None),
    "unet.norm_num_groups": (1, None),
    "unet.context_dim": (1, None),
    "unet.context_tokens": (1, None),
    "classifier.layers_per_block": (1, None),
    "classifier.attention_heads": (1, None),
    "classifier.norm_num_groups": (1, None),
    "lora.rank": (0, None),
    "lora.alpha": (0.0, None),
    "sampling.num": (0, None),
    "sampling.steps": (1, None),
    "sampling.eta": (0.0, 1.0),
    "sampling.churn": (0.0, None),
    "sampling.guidance_rescale": (0.0, 1.0),
    "sampling.threshold": (0.0, 1.0),
    "sampling.guidance": (0.0, None),
    "sampling.batch_size": (1, None),
    "sampling.progress_every": (0, None),
    "evaluation.num_reference": (2, None),
    "evaluation.vlb_examples": (0, None),
    "evaluation.resize": (16, None),
    "evaluation.batch_size": (1, None),
    "log_every": (1, None),
    "checkpoint_every": (1, None),
    "keep_checkpoints": (1, None),
} | {
    f"{stage}.{field}": bounds
    for stage in STAGES
    for field, bounds in {
        "steps": (1, None),
        "batch_size": (1, None),
        "learning_rate": (0.0, None),
        "warmup_steps": (0, None),
        "adam_b2": (0.0, 1.0),
        "weight_decay": (0.0, None),
        "clip_norm": (0.0, None),
        "ema_decay": (0.0, 1.0),
    }.items()
}


def check_fields(fields: Mapping[str, Any]) -> None:
    """Raises InputError for a field, by its full name, that is not there or has a value that it cannot have."""
    for name in ("stages", "init_from", "sampling.prompts", *_CHOICES, *_RANGES, *_INTERVALS):
        if name not in fields:
            raise InputError(f"the config has no field config.{name}; configs start from configs/base.py")
    for name, choices in _CHOICES.items():
        check_choice(f"config.{name}", fields[name], choices)
    for name, (low, high) in _RANGES.items():
        value = fields[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(f"config.{name} is {value!r}; it must be a number")
        if not ((low is None or value >= low) and (high is None or value <= high)):
            bounds = f"{low} or more" if high is None else f"from {low} to {high}"
            raise InputError(f"config.{name} is {value}; it must be {bounds}")
    for name in _INTERVALS:
        check_interval(f"config.{name}", fields[name])


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """Raises InputError unless `value` is one of `choices`."""
    if value not in choices:
        near = nearest(str(value), [str(choice) for choice in choices])
        raise InputError(f"{name} is {value!r}; it must be one of {', '.join(map(str, choices))}{near}")


def nearest(name: str, known: list[str]) -> str:
    """The end of an error's line: which of the known names may have been meant, if one is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def check_interval(name: str, value: Any) -> None:
    """Raises InputError unless `value` is two rising numbers from 0 to 1."""
    numbers = isinstance(value, (tuple, list)) and all(isinstance(number, (int, float)) for number in value)
    if not numbers or len(value) != 2 or not 0 <= value[0] < value[1] <= 1:
        raise InputError(f"{name} is {value}; it must be two rising numbers from 0 to 1, e.g. 0.15,0.85")


# The fields of config.diffusion that the noise schedule is made of.
SCHEDULE = ("schedule", "timesteps", "beta_start", "beta_end", "zero_terminal_snr")
