"""The fields of diffusers' schedulers (0.42.1): their defaults, and the values supported here."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ldm_jax.diffusion.spacing import TIMESTEP_SPACINGS
from ldm_jax.errors import InputError

SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTION_TYPES = {"epsilon": "eps", "v_prediction": "v", "sample": "z0"}
EDM_PREDICTION_TYPES = {"epsilon": "edm", "v_prediction": "v"}
# diffusers takes the root of fixed_small_log once, so that it is fixed_small; so is None, of the other classes.
VARIANCE_TYPES = {
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
    "lms": "LMSDiscreteScheduler",
    "kdpm2": "KDPM2DiscreteScheduler",
    "kdpm2_a": "KDPM2AncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "dpmpp_3m": "DPMSolverMultistepScheduler",
    "dpmpp_2s": "DPMSolverSinglestepScheduler",
    "deis": "DEISMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
}
EDM_SAMPLER_OF = {"EDMEulerScheduler": "euler", "EDMDPMSolverMultistepScheduler": "dpmpp_2m"}  # of EDM models
FLOW_SAMPLER_OF = {"FlowMatchEulerDiscreteScheduler": "euler", "FlowMatchHeunDiscreteScheduler": "heun"}
# Classes with noise levels of rectified flow -> the ramp of their `FlowSpacing`.
FLOW_RAMPS = {
    "FlowMatchEulerDiscreteScheduler": "flow_match",
    "FlowMatchHeunDiscreteScheduler": "flow_match",
    "DPMSolverMultistepScheduler": "dpm",
    "DPMSolverSinglestepScheduler": "dpm",
    "UniPCMultistepScheduler": "unipc",
}
SAMPLER_OF = {name: sampler for sampler, name in reversed(CLASS_OF.items())} | EDM_SAMPLER_OF | FLOW_SAMPLER_OF
# The fields that say which of a class's samplers it is: stated, whatever the config has of another class.
FIELDS_OF_SAMPLER: dict[str, dict[str, Any]] = {
    "dpmpp_2m": {"algorithm_type": "dpmsolver++", "solver_order": 2},
    "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++", "solver_order": 2},
    "dpmpp_3m": {"algorithm_type": "dpmsolver++", "solver_order": 3},
    "dpmpp_2s": {"algorithm_type": "dpmsolver++", "solver_order": 2},
    "deis": {"algorithm_type": "deis", "solver_order": 2},
}
# What a class does whatever these fields say.
FIXED: dict[str, dict[str, Any]] = {
    "LCMScheduler": {"set_alpha_to_one": True},
    "TCDScheduler": {"set_alpha_to_one": False, "clip_sample": False, "thresholding": False},
    "DEISMultistepScheduler": {"set_alpha_to_one": False},
}

_COMMON = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_SIGMA_RANGE = {"sigma_min": None, "sigma_max": None}
_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_SOLVER = {
    "use_flow_sigmas": False, "flow_shift": 1.0, "use_dynamic_shifting": False, "time_shift_type": "exponential",
    "solver_order": 2, "solver_type": "midpoint", "lower_order_final": True, "final_sigmas_type": "zero",
}  # fmt: skip
_DEIS = {field: value for field, value in _SOLVER.items() if field != "final_sigmas_type"}
_DPM_SOLVER = {**_SOLVER, "algorithm_type": "dpmsolver++", "lambda_min_clipped": -np.inf, "variance_type": None}
_EDM = {
    "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras", "rho": 7.0,
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "final_sigmas_type": "zero",
}  # fmt: skip

_FLOW_MATCH = {"num_train_timesteps": 1000, "shift": 1.0}

# The defaults of all fields by class.
DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {**_COMMON, **_LEADING, **_ZERO_SNR, **_CLIP, **_THRESHOLD, "variance_type": "fixed_small"},
    "DDIMScheduler": {**_COMMON, **_LEADING, **_ZERO_SNR, **_CLIP, **_THRESHOLD, "set_alpha_to_one": True},
    "PNDMScheduler": {**_COMMON, **_LEADING, "skip_prk_steps": False, "set_alpha_to_one": False},
    "EulerDiscreteScheduler": {
        **_COMMON, **_LINSPACE, **_ZERO_SNR, **_SIGMAS, **_SIGMA_RANGE,
        "timestep_type": "discrete", "interpolation_type": "linear", "final_sigmas_type": "zero",
    },
    "EulerAncestralDiscreteScheduler": {**_COMMON, **_LINSPACE, **_ZERO_SNR},
    "HeunDiscreteScheduler": {**_COMMON, **_LINSPACE, **_SIGMAS, **_CLIP, **_SD_BETAS, "clip_sample": False},
    "LMSDiscreteScheduler": {**_COMMON, **_LINSPACE, **_SIGMAS},
    "KDPM2DiscreteScheduler": {**_COMMON, **_LINSPACE, **_SIGMAS, **_SD_BETAS},
    "KDPM2AncestralDiscreteScheduler": {**_COMMON, **_LINSPACE, **_SIGMAS, **_SD_BETAS},
    "DPMSolverMultistepScheduler": {
        **_COMMON, **_LINSPACE, **_ZERO_SNR, **_THRESHOLD, **_SIGMAS, **_DPM_SOLVER,
        "euler_at_final": False, "use_lu_lambdas": False,
    },
    "DPMSolverSinglestepScheduler": {**_COMMON, **_THRESHOLD, **_SIGMAS, **_DPM_SOLVER, "lower_order_final": False},
    "DEISMultistepScheduler": {
        **_COMMON, **_LINSPACE, **_THRESHOLD, **_SIGMAS, **_DEIS, "algorithm_type": "deis", "solver_type": "logrho"
    },
    "UniPCMultistepScheduler": {
        **_COMMON, **_LINSPACE, **_ZERO_SNR, **_THRESHOLD, **_SIGMAS, **_SIGMA_RANGE, **_SOLVER,
        "solver_type": "bh2", "predict_x0": True, "disable_corrector": [], "solver_p": None, "shift_terminal": None,
    },
    "LCMScheduler": {
        **_COMMON, **_LEADING, **_ZERO_SNR, **_CLIP, **_THRESHOLD, **_SD_BETAS,
        "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": True,
        "original_inference_steps": 50, "timestep_scaling": 10.0,
    },
    "TCDScheduler": {
        **_COMMON, **_LEADING, **_ZERO_SNR, **_CLIP, **_THRESHOLD, **_SD_BETAS,
        "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": True,
        "original_inference_steps": 50, "timestep_scaling": 10.0,
    },
    "EDMEulerScheduler": _EDM,
    "EDMDPMSolverMultistepScheduler": {
        **_EDM, **_THRESHOLD, "algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint",
        "lower_order_final": True, "euler_at_final": False,
    },
    "FlowMatchHeunDiscreteScheduler": _FLOW_MATCH,
    "FlowMatchEulerDiscreteScheduler": {
        **_FLOW_MATCH, **_SIGMAS, "use_dynamic_shifting": False, "base_shift": 0.5, "max_shift": 1.15,
        "base_image_seq_len": 256, "max_image_seq_len": 4096, "invert_sigmas": False, "shift_terminal": None,
        "time_shift_type": "exponential", "stochastic_sampling": False,
    },
}  # fmt: skip

# Of classes without a sampler here, the defaults of the fields that define the process: a sampler has to be chosen.
PROCESS_DEFAULTS: dict[str, dict[str, Any]] = {
    "DPMSolverSDEScheduler": {**_COMMON, **_SD_BETAS},
    "SASolverScheduler": {**_COMMON, "use_flow_sigmas": False},
    "DDIMParallelScheduler": {**_COMMON, **_ZERO_SNR},
    "DDPMParallelScheduler": {**_COMMON, **_ZERO_SNR},
}
READABLE = (*DEFAULTS, *PROCESS_DEFAULTS)

# The behaviour of a class without the field.
WITHOUT = {
    **_ZERO_SNR, **_THRESHOLD, **_SIGMAS, **_LINSPACE,
    "clip_sample": False, "clip_sample_range": 1.0, "set_alpha_to_one": True, "final_sigmas_type": "zero",
    "use_lu_lambdas": False,
}  # fmt: skip

# The supported values of these fields, and where that depends on the class.
_SUPPORTED = {
    "use_flow_sigmas": (False, None),
    "beta_schedule": tuple(SCHEDULES),
    "prediction_type": tuple(PREDICTION_TYPES),
    "timestep_spacing": TIMESTEP_SPACINGS,
    "timestep_type": ("discrete",),
    "interpolation_type": ("linear",),
    "final_sigmas_type": ("zero", "sigma_min"),
    "use_dynamic_shifting": (False, None),
    "skip_prk_steps": (True,),
    "solver_order": (2,),
    "solver_type": ("midpoint", "logrho", "bh1", "bh2"),  # the last three mean midpoint in diffusers' DPM-Solver
    "predict_x0": (True,),
    "disable_corrector": ([],),
    "solver_p": (None,),
    "original_inference_steps": (50,),
    "timestep_scaling": (10.0,),
    "sigma_schedule": ("karras", "exponential"),
    "rho": (7.0,),
    "invert_sigmas": (False,),
    "stochastic_sampling": (False,),
}
# Of classes with `use_flow_sigmas` on rectified flow.
_FLOW_SUPPORTED = {
    "use_flow_sigmas": (True,),
    "prediction_type": ("flow_prediction",),
    "final_sigmas_type": ("zero",),
    **dict.fromkeys((*_SIGMAS, "use_lu_lambdas", "thresholding"), (False, None)),
}
# Of these fields other values mean another process, conditioning on the noise level, or spacing, with any sampler.
_PROCESS_FIELDS = ("beta_schedule", "prediction_type", "use_flow_sigmas", "timestep_type", "sigma_schedule", "rho")
_MULTISTEP = {"algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"), "solver_order": (2, 3)}
# At sigma_min the results of Euler, and of both EDM classes, are z / alpha, off in scale by the remaining noise.
_TO_ZERO = {"final_sigmas_type": ("zero",)}
_EDM_SUPPORTED = {**_TO_ZERO, "prediction_type": tuple(EDM_PREDICTION_TYPES)}
_SUPPORTED_IN: dict[str, dict[str, tuple]] = {
    "DDPMScheduler": {"variance_type": tuple(VARIANCE_TYPES)},
    "EulerDiscreteScheduler": _TO_ZERO,
    "EDMEulerScheduler": _EDM_SUPPORTED,
    "DPMSolverMultistepScheduler": _MULTISTEP,
    "EDMDPMSolverMultistepScheduler": {**_EDM_SUPPORTED, **_MULTISTEP, "thresholding": (False,)},
    "DEISMultistepScheduler": {"algorithm_type": ("deis", "dpmsolver", "dpmsolver++"), "lower_order_final": (True,)},
    "DPMSolverSinglestepScheduler": {"algorithm_type": ("dpmsolver++", "deis")},
    "UniPCMultistepScheduler": {
        "solver_type": ("bh2", "midpoint", "heun", "logrho"),  # the last three mean bh2 in diffusers' UniPC
        "lower_order_final": (True,),
    },
}
# Of the last steps, where they do not end at sigma = 0; there, they are of first order whatever these fields are.
_SUPPORTED_AT_SIGMA_MIN: dict[str, dict[str, tuple]] = {
    "DPMSolverMultistepScheduler": {"lower_order_final": (True,), "euler_at_final": (False,)},
    "DPMSolverSinglestepScheduler": {"lower_order_final": (False,)},
}


def fields_of(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The fields of the scheduler class `name`, made from a config that may be another class's.

    Fields that the class lacks are included, with the values that describe its behaviour. Of a class without a sampler
    they are those of the process.

    Raises InputError: a field is no number where one is required.
    """
    defaults = DEFAULTS[name] if name in DEFAULTS else PROCESS_DEFAULTS[name]
    stated = {field: config[field] for field in defaults if field in config}
    for field, value in stated.items():
        types = {int: (int,), float: (int, float)}.get(type(defaults[field]))
        if types and (not isinstance(value, types) or isinstance(value, bool)):
            words = "an integer" if types == (int,) else "a number"
            raise InputError(f"{name}: {field} must be {words}, got {value!r}")
    return WITHOUT | defaults | stated


def check_fields(name: str, fields: Mapping[str, Any]) -> None:
    """Raises InputError for values not supported here, and for fields that diffusers refuses together."""
    supported = _supported(name, fields)
    if fields["final_sigmas_type"] == "sigma_min":
        supported = supported | _SUPPORTED_AT_SIGMA_MIN.get(name, {})
    if name in ("DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler") and fields["solver_order"] == 3:
        supported = supported | {"lower_order_final": (True,)}
        if fields["algorithm_type"] == "sde-dpmsolver++":  # its last term has a wrong sign in diffusers
            raise InputError(
                f"{name}: solver_order = 3 with noise, algorithm_type = 'sde-dpmsolver++', is not supported"
            )
    _check_values(name, fields, supported)
    uneven = [field for field in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas") if fields[field]]
    if len(uneven) > 1:
        raise InputError(f"{name}: {' and '.join(uneven)} cannot both be true")


def check_process_fields(name: str, fields: Mapping[str, Any]) -> None:
    """Raises InputError for values of a process, or a conditioning on the noise level, that is not supported here."""
    supported = _supported(name, fields)
    _check_values(name, fields, {field: supported[field] for field in _PROCESS_FIELDS})


def _supported(name: str, fields: Mapping[str, Any]) -> dict[str, tuple]:
    flow = _FLOW_SUPPORTED if fields.get("use_flow_sigmas") and name in FLOW_RAMPS else {}
    return _SUPPORTED | _SUPPORTED_IN.get(name, {}) | flow


def _check_values(name: str, fields: Mapping[str, Any], supported: Mapping[str, tuple]) -> None:
    for field, values in supported.items():
        if field in fields and fields[field] not in values:
            words = ", ".join(repr(value) for value in values if value is not None or len(values) == 1)
            raise InputError(f"{name}: {field} = {fields[field]!r} is not supported; supported: {words}")
