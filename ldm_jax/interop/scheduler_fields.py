"""The fields of diffusers' schedulers: their defaults, and which values the samplers here know (diffusers 0.42.1)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ldm_jax.diffusion.spacing import EVEN
from ldm_jax.errors import InputError

SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "z0"}
# diffusers takes the root of fixed_small_log once, so that it is fixed_small; None, which other classes have, as well.
VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned",
    "fixed_small_log": "fixed_small",
    None: "fixed_small",
}

CLASS_OF = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "plms": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "edm": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "dpmpp_2s": "DPMSolverSinglestepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
}
SAMPLER_OF = {name: sampler for sampler, name in reversed(CLASS_OF.items())}
ALGORITHM = {"dpmpp_2m": "dpmsolver++", "dpmpp_2m_sde": "sde-dpmsolver++", "dpmpp_2s": "dpmsolver++"}

# Classes that no sampler here runs, but whose configs tell of the schedule as the others do: a sampler has to be named.
READABLE = (
    *SAMPLER_OF,
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DEISMultistepScheduler",
    "DPMSolverSDEScheduler",
    "TCDScheduler",
)

_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
_STEPS = {"timestep_spacing": "leading", "steps_offset": 0}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_FLOW = {
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}
_SOLVER = {"solver_order": 2, "solver_type": "midpoint", "lower_order_final": True, "final_sigmas_type": "zero"}
_DPM_SOLVER = _SOLVER | {"algorithm_type": "dpmsolver++", "lambda_min_clipped": -np.inf, "variance_type": None}

# Every field of every class, with the value that it has when a file does not state it.
DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": _BETAS | _STEPS | _ZERO_SNR | _CLIP | _THRESHOLD | {"variance_type": "fixed_small"},
    "DDIMScheduler": _BETAS | _STEPS | _ZERO_SNR | _CLIP | _THRESHOLD | {"set_alpha_to_one": True},
    "PNDMScheduler": _BETAS | _STEPS | {"skip_prk_steps": False, "set_alpha_to_one": False},
    "EulerDiscreteScheduler": _BETAS
    | _STEPS
    | _ZERO_SNR
    | _SIGMAS
    | {
        "timestep_spacing": "linspace",
        "timestep_type": "discrete",
        "interpolation_type": "linear",
        "sigma_min": None,
        "sigma_max": None,
        "final_sigmas_type": "zero",
    },
    "EulerAncestralDiscreteScheduler": _BETAS | _STEPS | _ZERO_SNR | {"timestep_spacing": "linspace"},
    "HeunDiscreteScheduler": _BETAS
    | _STEPS
    | _SIGMAS
    | _CLIP
    | {"timestep_spacing": "linspace", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False},
    "DPMSolverMultistepScheduler": _BETAS
    | _STEPS
    | _ZERO_SNR
    | _THRESHOLD
    | _SIGMAS
    | _FLOW
    | _DPM_SOLVER
    | {"timestep_spacing": "linspace", "euler_at_final": False, "use_lu_lambdas": False},
    "DPMSolverSinglestepScheduler": _BETAS | _THRESHOLD | _SIGMAS | _FLOW | _DPM_SOLVER | {"lower_order_final": False},
    "UniPCMultistepScheduler": _BETAS
    | _STEPS
    | _ZERO_SNR
    | _THRESHOLD
    | _SIGMAS
    | _FLOW
    | _SOLVER
    | {
        "timestep_spacing": "linspace",
        "solver_type": "bh2",
        "predict_x0": True,
        "disable_corrector": [],
        "solver_p": None,
        "sigma_min": None,
        "sigma_max": None,
        "shift_terminal": None,
    },
    "LCMScheduler": _BETAS
    | _STEPS
    | _ZERO_SNR
    | _CLIP
    | _THRESHOLD
    | {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "original_inference_steps": 50,
        "timestep_scaling": 10.0,
    },
}

# What a class does that has no such field.
WITHOUT = {
    **_ZERO_SNR,
    **_THRESHOLD,
    **_SIGMAS,
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "set_alpha_to_one": True,
    "final_sigmas_type": "zero",
}

# The values of these fields that the samplers here know, and where that depends on the class.
_SUPPORTED = {
    "beta_schedule": tuple(SCHEDULES),
    "prediction_type": tuple(PREDICTIONS),
    "timestep_spacing": EVEN,
    "timestep_type": ("discrete",),
    "interpolation_type": ("linear",),
    "final_sigmas_type": ("zero", "sigma_min"),
    "use_beta_sigmas": (False, None),
    "use_flow_sigmas": (False, None),
    "use_dynamic_shifting": (False, None),
    "use_lu_lambdas": (False, None),
    "skip_prk_steps": (True,),
    "solver_order": (2,),
    "solver_type": ("midpoint", "logrho", "bh1", "bh2"),  # the last three are midpoint to diffusers' DPM-Solver
    "predict_x0": (True,),
    "disable_corrector": ([],),
    "solver_p": (None,),
    "original_inference_steps": (50,),
    "timestep_scaling": (10.0,),
}
_SUPPORTED_IN: dict[str, dict[str, tuple]] = {
    "DDPMScheduler": {"variance_type": tuple(VARIANCES)},
    # At sigma_min its result is z / alpha, off in scale by the little noise that is left.
    "EulerDiscreteScheduler": {"final_sigmas_type": ("zero",)},
    "DPMSolverMultistepScheduler": {"algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis")},
    "DPMSolverSinglestepScheduler": {"algorithm_type": ("dpmsolver++", "deis")},
    "UniPCMultistepScheduler": {
        "solver_type": ("bh2", "midpoint", "heun", "logrho"),  # the last three are bh2 to diffusers' UniPC
        "lower_order_final": (True,),
    },
}
# Of the last steps, where they do not end on clean data; there, they are of first order whatever these fields say.
_SUPPORTED_AT_SIGMA_MIN: dict[str, dict[str, tuple]] = {
    "DPMSolverMultistepScheduler": {"lower_order_final": (True,), "euler_at_final": (False,)},
    "DPMSolverSinglestepScheduler": {"lower_order_final": (False,)},
}


def fields_of(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The fields of the class called `name` when it is made of a config that is perhaps another class's.

    Fields that the class does not have are there too, with the values that describe what it does.

    Raises:
      InputError: something that is no number where one belongs.
    """
    defaults = DEFAULTS[name]
    given = {field: config[field] for field in defaults if field in config}
    for field, value in given.items():
        kinds = {int: (int,), float: (int, float)}.get(type(defaults[field]))
        if kinds and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise InputError(f"{name}: {field} must be {'whole' if kinds == (int,) else 'a number'}, got {value!r}")
    return WITHOUT | defaults | given


def check_fields(name: str, fields: Mapping[str, Any]) -> None:
    """Refuses what no sampler here does. Of fields that exclude each other diffusers refuses the same."""
    supported = _SUPPORTED | _SUPPORTED_IN.get(name, {})
    if fields["final_sigmas_type"] == "sigma_min":
        supported = supported | _SUPPORTED_AT_SIGMA_MIN.get(name, {})
    for field, values in supported.items():
        if field in fields and fields[field] not in values:
            known = ", ".join(repr(value) for value in values if value is not None or len(values) == 1)
            raise InputError(f"{name}: {field} = {fields[field]!r} is not supported; supported: {known}")
    if fields["use_karras_sigmas"] and fields["use_exponential_sigmas"]:
        raise InputError(f"{name}: use_karras_sigmas and use_exponential_sigmas cannot both be true")
