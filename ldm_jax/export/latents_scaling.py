"""Shift and scale of latents folded into the autoencoder, as most pipelines of diffusers have one scaling_factor."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def into_autoencoder(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the same model with latents of shift 0 and scale 1, up to rounding.

    The encoder's last layer, quant_conv, outputs means (raw - shift) scale and log-variances + 2 log scale; the
    decoder's first, post_quant_conv, takes z / scale + shift.

    Args:
      params: {"first_stage": of an AutoencoderKL with both convolutions, "shift" [c], "scale" [c], ...}.
    """
    shift, scale = np.asarray(params["shift"]), np.asarray(params["scale"])
    quant, post = params["first_stage"]["quant_conv"], params["first_stage"]["post_quant_conv"]
    kernel, bias = (np.asarray(quant[name]) for name in ("kernel", "bias"))
    post_kernel, post_bias = (np.asarray(post[name]) for name in ("kernel", "bias"))
    mean, logvar = np.split(bias, 2)
    quant = {
        "kernel": kernel * np.concatenate([scale, np.ones_like(scale)]),
        "bias": np.concatenate([(mean - shift) * scale, logvar + 2 * np.log(scale)]),
    }
    post = {"kernel": post_kernel / scale[:, None], "bias": post_bias + shift @ post_kernel[0, 0]}
    autoencoder = {**params["first_stage"], "quant_conv": quant, "post_quant_conv": post}
    return {**params, "first_stage": autoencoder, "shift": np.zeros_like(shift), "scale": np.ones_like(scale)}
