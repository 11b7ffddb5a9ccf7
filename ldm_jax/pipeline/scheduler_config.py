"""A run of ours as diffusers would draw with it."""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ldm_jax.diffusion.spacing import EVEN
from ldm_jax.errors import InputError
from ldm_jax.interop.scheduler_config import config_from_schedule


def scheduler_config(config: ConfigDict) -> tuple[dict[str, Any], list[str]]:
    """The scheduler with which diffusers draws as `config.sampling` says, and what of that it does otherwise, in words.

    DDIM without noise is Euler's method, and that class of diffusers takes the steps right whatever their spacing; its
    DDIM does for leading ones (diffusers#9261). A solver that no class of diffusers is falls back to DDIM.
    """
    diffusion, sampling, pixels = config.diffusion, config.sampling, config.autoencoder.kind == "none"
    schedule = {
        "name": diffusion.schedule,
        "T": diffusion.timesteps,
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "zero_terminal_snr": diffusion.zero_terminal_snr,
        "prediction": diffusion.prediction,
        "clip": 1.0 if pixels else np.inf,
    }
    notes = []
    if sampling.threshold and pixels:
        notes.append("Without dynamic thresholding: z0 is clipped at 1 instead.")
    sampler, spacing = sampling.sampler, sampling.spacing
    as_euler = spacing != "leading" and not (sampling.eta or pixels or diffusion.zero_terminal_snr)
    if sampler == "ddim" and as_euler:
        sampler = "euler"
    try:
        if sampling.churn:
            raise InputError("diffusers' HeunDiscreteScheduler adds no noise on the way")
        fields = config_from_schedule(**schedule, sampler=sampler, spacing=spacing, variance=sampling.variance)
    except InputError as error:
        sampler, spacing = "ddim", spacing if spacing in EVEN else "trailing"
        notes.append(f"By DDIM with {spacing} steps rather than by {sampling.sampler}: {error}.")
        fields = config_from_schedule(**schedule, sampler=sampler, spacing=spacing)
    if sampler in ("ddim", "plms") and spacing != "leading":
        notes.append(
            f"diffusers' {fields['_class_name']} takes {diffusion.timesteps} // steps for each step (diffusers#9261): "
            f"with {spacing} steps it draws as ldm_jax does only where that is so."
        )
    return fields, notes
