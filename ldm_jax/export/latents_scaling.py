"""Shift and scale of latents, brought into the autoencoder: most pipelines of diffusers know but one factor beside."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def into_autoencoder(params: Mapping[str, Any]) -> dict[str, Any]:
    """The same model with latents of shift 0 and scale 1, up to rounding.

    z = (raw - shift) scale. The last convolution of the encoder, 1x1, makes means and log-variances: the former go that
    way, the latter rise by 2 log scale. The first of the decoder, 1x1 too, takes z / scale + shift.

    Args:
      params: {"first_stage": of an AutoencoderKL with both convolutions, "shift" [c], "scale" [c], ...}.
    """
    shift, scale = np.asarray(params["shift"]), np.asarray(params["scale"])
    quant, post = params["first_stage"]["quant_conv"], params["first_stage"]["post_quant_conv"]
    kernel, bias, post_kernel, post_bias = map(
        np.asarray, (quant["kernel"], quant["bias"], post["kernel"], post["bias"])
    )
    mean, logvar = np.split(bias, 2)
    quant = {
        "kernel": kernel * np.concatenate([scale, np.ones_like(scale)]),
        "bias": np.concatenate([(mean - shift) * scale, logvar + 2 * np.log(scale)]),
    }
    post = {"kernel": post_kernel / scale[:, None], "bias": post_bias + shift @ post_kernel[0, 0]}
    autoencoder = {**params["first_stage"], "quant_conv": quant, "post_quant_conv": post}
    return {**params, "first_stage": autoencoder, "shift": np.zeros_like(shift), "scale": np.ones_like(scale)}
