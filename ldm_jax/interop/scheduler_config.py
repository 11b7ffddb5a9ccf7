"""diffusers' scheduler_config.json <-> process, prediction and solver table (checked against diffusers 0.42.1).

On a diffusers model a sampler means what `OtherScheduler.from_config(pipe.scheduler.config)` means in diffusers: fields
that the file states and the other class has carry over. What the file leaves out is the default of the other class, not
of the class in the file: diffusers marks filled-in defaults and does not pass them on.

The samplers here deliberately differ where diffusers is wrong or inconsistent:

- Its DDIM and PNDM take t - T // steps as the next timestep, which is right for leading spacing alone (diffusers#9261).
- Its PNDM adds up v predictions that were made at different z as if at one; `plms` adds up the eps they imply.
- Its DDPM with variance fixed_large adds noise after the last step too, unless that is at timestep 0.
- Its DDIM clips z0_hat but not eps, unless called with use_clipped_model_output=True; `ddim` clips both.
- Its DPM-Solver, DEIS and UniPC truncate the timesteps of exponential and beta sigmas; here they are rounded. With
  Karras sigmas on a cosine schedule they truncate too, or fail, as the first timesteps coincide.
- Its KDPM2 rounds the timesteps of Karras sigmas, and no others.
- Its DPM-Solver of third order with noise, which is not supported here, has a wrong sign in its last term.
- Its EDM classes begin with noise times sqrt(sigma_max^2 + 1) whatever sigma_data is; here it is sqrt(sigma_max^2 +
  sigma_data^2), 6e-5 less for sigma_data 0.5 and sigma_max 80. A single step of its exponential sigmas is at sigma_min.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.diffusion.edm import EDM
from ldm_jax.diffusion.prediction import coefficient_tables
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.schedules import make_process, process_of_betas
from ldm_jax.diffusion.solvers import SOLVERS
from ldm_jax.diffusion.spacing import TIMESTEP_SPACINGS
from ldm_jax.errors import InputError
from ldm_jax.interop.flow_schedulers import flow_options, flow_process, is_flow
from ldm_jax.interop.scheduler_fields import (
    CLASS_OF,
    DEFAULTS,
    EDM_PREDICTION_TYPES,
    EDM_SAMPLER_OF,
    FIELDS_OF_SAMPLER,
    FIXED,
    PREDICTION_TYPES,
    READABLE,
    SAMPLER_OF,
    SCHEDULES,
    VARIANCE_TYPES,
    WITHOUT,
    check_fields,
    check_process_fields,
    fields_of,
)

# The alpha_bar that these use for 0, so that sigma / alpha is finite.
_FLOOR = 2.0**-24
_FLOORED = (
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    *("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"),
)

# k-diffusion's samplers.
_ON_SIGMA = ("euler", "euler_a", "heun", "edm", "lms", "kdpm2", "kdpm2_a")

# The fields that pipelines override in their scheduler's config.
_FORCED = {
    "StableDiffusionPipeline": {"steps_offset": 1, "clip_sample": False},
    "StableDiffusionImg2ImgPipeline": {"steps_offset": 1, "clip_sample": False},
    "StableDiffusionInpaintPipeline": {"steps_offset": 1, "skip_prk_steps": True},
}


class Scheduler(NamedTuple):
    """A scheduler in this package's terms."""

    process: Process  # of the training
    prediction: str  # eps | v | z0 | edm | flow
    sampler: str  # one of SOLVERS
    options: dict[str, Any]  # arguments of `make_table`, without the number of steps
    clip_sample_range: float = np.inf  # z0_hat is clipped to [-range, range]
    threshold: tuple[float, float] | None = None  # quantile and maximum of `threshold_z0`
    # k-diffusion's samplers hold z / alpha and begin with noise times init_noise_sigma. With leading spacing that is
    # sqrt(sigma^2 + 1) in their sigma / alpha, so z_T = eps, as with all other samplers. With linspace and trailing it
    # is sigma, so z_T = sigma_T eps: q_sample of z0 = 0.
    scaled_initial_noise: bool = False


def scheduler_from_config(config: Mapping[str, Any], sampler: str | None = None, *, pipeline: str = "") -> Scheduler:
    """The scheduler of a model.

    Args:
      config: a scheduler_config.json. Fields that the class lacks are ignored, as in diffusers.
      sampler: one of SOLVERS, for what `from_config` of its class makes of this config; None: the config's own class.
      pipeline: class of the model's pipeline; some override fields of their scheduler's config.

    Raises InputError: unknown sampler, or a field whose value is not supported; the field is named.
    """
    own = _class_name(config)
    if sampler is None and own not in SAMPLER_OF:
        raise InputError(f"the scheduler {own} is not supported")
    if sampler is not None and sampler not in CLASS_OF:
        raise InputError(f"sampler must be one of {', '.join(SOLVERS)}, got {sampler!r}")

    if own in EDM_SAMPLER_OF:
        return _edm_scheduler(config, own, sampler)
    if is_flow(config):
        options, fields = flow_options(config, sampler)
        return Scheduler(*flow_process(config), sampler or _sampler_of(own, fields), options)
    name = own if sampler is None else CLASS_OF[sampler]
    # What a pipeline sets for a field absent in the file counts as a default, which is not passed to other classes.
    forced = {
        field: value
        for field, value in _FORCED.get(pipeline, {}).items()
        if field in config or (sampler is None and field in DEFAULTS[name])
    }
    fields = fields_of({**config, **forced}, name)
    fields |= FIELDS_OF_SAMPLER.get(sampler, {}) | FIXED.get(name, {})
    check_fields(name, fields)
    sampler = sampler or _sampler_of(name, fields)
    process, prediction = _process_and_prediction(name, fields)
    _check_range(config, name, fields, process)
    clips, thresholds = fields["clip_sample"], fields["thresholding"]
    options = _options(fields, sampler)
    if sampler == "lcm" and pipeline.startswith("LatentConsistencyModel"):
        options["strength_keeps_steps"] = True
    return Scheduler(
        process,
        prediction,
        sampler,
        options,
        clip_sample_range=float(fields["clip_sample_range"]) if clips and not thresholds else np.inf,
        threshold=(fields["dynamic_thresholding_ratio"], fields["sample_max_value"]) if thresholds else None,
        scaled_initial_noise=sampler in _ON_SIGMA and fields["timestep_spacing"] != "leading",
    )


def _edm_scheduler(config: Mapping[str, Any], name: str, sampler: str | None) -> Scheduler:
    """The scheduler of an EDM model: of its own class, or another sampler on the same noise levels."""
    if sampler in ("lcm", "tcd"):
        raise InputError(f"the sampler {sampler} is for distilled models; the scheduler {name} is of an EDM model")
    process, prediction = process_from_config(config)
    fields = fields_of(config, name)
    if sampler is None:
        check_fields(name, fields)
        sampler = _sampler_of(name, fields)
    return Scheduler(process, prediction, sampler, {"spacing": fields["sigma_schedule"], "fractional_t": True})


def _sampler_of(name: str, fields: Mapping[str, Any]) -> str:
    """The sampler that a class is with these fields, which are supported."""
    if SAMPLER_OF[name] != "dpmpp_2m":
        return SAMPLER_OF[name]
    noisy = fields["algorithm_type"] == "sde-dpmsolver++"
    return "dpmpp_3m" if fields["solver_order"] == 3 else "dpmpp_2m_sde" if noisy else "dpmpp_2m"


def process_from_config(config: Mapping[str, Any]) -> tuple[Process, str]:
    """The process of a model's training and its prediction, whether or not the config's own sampler is supported.

    Raises InputError: a class whose noise levels come neither from betas nor from the sigmas of EDM or rectified flow,
    or a field of the process is not supported.
    """
    name = _class_name(config)
    if is_flow(config):
        return flow_process(config)
    fields = fields_of(config, name)
    check_process_fields(name, fields)
    if (edm := edm_from_config(config)) is not None:
        return edm.process, EDM_PREDICTION_TYPES[fields["prediction_type"]]
    return _process_and_prediction(name, fields)


def edm_from_config(config: Mapping[str, Any]) -> EDM | None:
    """The noise levels of an EDM model, None of all others; raises InputError if they are out of range."""
    name = _class_name(config)
    if name not in EDM_SAMPLER_OF:
        return None
    fields = fields_of(config, name)
    edm = EDM(*(fields[field] for field in ("sigma_min", "sigma_max", "sigma_data", "num_train_timesteps")))
    if not (0 < edm.sigma_min < edm.sigma_max < np.inf and 0 < edm.sigma_data < np.inf and edm.timesteps > 1):
        right = "0 < sigma_min < sigma_max, sigma_data > 0 and num_train_timesteps > 1"
        raise InputError(f"{name}: {', '.join(f'{k} = {v}' for k, v in edm._asdict().items())}; it must be {right}")
    return edm


def _class_name(config: Mapping[str, Any]) -> str:
    """The config's own class; raises InputError if it is not one whose noise levels are known here."""
    name = config.get("_class_name")
    if name not in READABLE:
        raise InputError(f"the scheduler's class {name!r} is not supported; supported: {', '.join(READABLE)}")
    return name


def _process_and_prediction(name: str, fields: Mapping[str, Any]) -> tuple[Process, str]:
    process, prediction = _process(name, fields), PREDICTION_TYPES[fields["prediction_type"]]
    try:
        coefficient_tables(prediction, process)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error
    return process, prediction


def _check_range(config: Mapping[str, Any], name: str, fields: Mapping[str, Any], process: Process) -> None:
    """Raises InputError for a range of noise levels other than the schedule's.

    diffusers reads sigma_min and sigma_max from the config of any class that supports Karras or other sigmas.
    """
    if fields["use_karras_sigmas"] or fields["use_exponential_sigmas"] or fields["use_beta_sigmas"]:
        for field in ("sigma_min", "sigma_max"):
            if config.get(field) is not None:
                raise InputError(f"{name}: {field} = {config[field]!r} is not supported; supported: None")
    if "lambda_min_clipped" in fields:
        lowest = process.point(-1).half_log_snr
        if fields["lambda_min_clipped"] > lowest:
            raise InputError(
                f"{name}: lambda_min_clipped = {fields['lambda_min_clipped']!r} is not supported; "
                f"supported: values that do not cut the schedule, {lowest:.4g} and below"
            )


def _process(name: str, fields: Mapping[str, Any]) -> Process:
    T, zero_snr, betas = fields["num_train_timesteps"], fields["rescale_betas_zero_snr"], fields["trained_betas"]
    try:
        if betas is None:
            schedule, start, end = SCHEDULES[fields["beta_schedule"]], fields["beta_start"], fields["beta_end"]
            process = make_process(schedule, T, beta_start=start, beta_end=end, zero_terminal_snr=zero_snr)
        else:
            beta = np.asarray(betas, np.float64)
            if beta.shape != (T,) or not ((beta > 0) & (beta < 1)).all():
                raise ValueError(f"trained_betas must be {T} numbers between 0 and 1, as num_train_timesteps is")
            process = process_of_betas(beta, zero_terminal_snr=zero_snr)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error
    if zero_snr and name in _FLOORED:
        ends = np.sqrt(_FLOOR), np.sqrt(1 - _FLOOR)
        return Process(*(np.append(table[:-1], end) for table, end in zip((process.alpha, process.sigma), ends)))
    return process


def _options(fields: Mapping[str, Any], sampler: str) -> dict[str, Any]:
    """Arguments of `make_table`."""
    even = spacing = fields["timestep_spacing"]
    if fields["use_karras_sigmas"]:
        spacing = "karras"
    elif fields["use_lu_lambdas"] or fields["use_exponential_sigmas"]:  # even in lambda = -log(sigma / alpha)
        spacing = "exponential"
    elif fields["use_beta_sigmas"]:
        spacing = "beta"
    to_one = fields["set_alpha_to_one"] and fields["final_sigmas_type"] == "zero"
    options = {"spacing": spacing, "between": even, "steps_offset": fields["steps_offset"]}
    options["set_alpha_to_one"] = bool(to_one)
    return options | ({"variance": VARIANCE_TYPES[fields["variance_type"]]} if sampler == "ddpm" else {})


def config_from_schedule(
    name: str,
    T: int,
    *,
    beta_start: float,
    beta_end: float,
    zero_terminal_snr: bool,
    prediction: str,
    sampler: str = "ddim",
    spacing: str = "leading",
    between: str = "linspace",
    steps_offset: int = 0,
    set_alpha_to_one: bool = True,
    variance: str = "fixed_small",
    clip_sample_range: float = np.inf,
) -> dict[str, Any]:
    """The scheduler_config.json with which diffusers samples as ldm_jax does; the inverse of `scheduler_from_config`.

    It also has fields that its class ignores, so that `from_config` of another class in diffusers keeps the schedule,
    the timesteps and the last step. A config cannot express eta and churn, nor unscaled initial noise (see
    `Scheduler`), nor the differences above. Stable Diffusion's pipelines read a steps_offset of 0 as 1, which
    matters with leading spacing. Some classes raise alpha_bar from 0.

    Args:
      name, T, beta_start, beta_end, zero_terminal_snr: as in `make_process`.
      prediction: eps, v or z0.
      sampler: one of SOLVERS, which determines the class.
      spacing, between, steps_offset, set_alpha_to_one, variance: as in `make_table`.
      clip_sample_range: of z0_hat, inf for latents.

    Raises InputError: a value for which the sampler's class in diffusers has no field.
    """
    even, has = spacing in TIMESTEP_SPACINGS, DEFAULTS[CLASS_OF[sampler]]
    if spacing == "flow":
        raise InputError("the spacing flow is for rectified flow")
    config = {
        "_class_name": CLASS_OF[sampler],
        "num_train_timesteps": T,
        "beta_start": beta_start,
        "beta_end": beta_end,
        "beta_schedule": _key(SCHEDULES, name),
        "trained_betas": None,
        "prediction_type": _key(PREDICTION_TYPES, prediction),
        "rescale_betas_zero_snr": zero_terminal_snr,
        "timestep_spacing": spacing if even else between,
        "steps_offset": steps_offset,
        "use_karras_sigmas": spacing == "karras",
        "use_exponential_sigmas": spacing == "exponential",
        "use_beta_sigmas": spacing == "beta",
        "clip_sample": bool(np.isfinite(clip_sample_range)),
        "clip_sample_range": float(clip_sample_range) if np.isfinite(clip_sample_range) else 1.0,
        "set_alpha_to_one": set_alpha_to_one,
        "skip_prk_steps": True,
    }
    if "final_sigmas_type" in has:
        config["final_sigmas_type"] = "zero" if set_alpha_to_one else "sigma_min"
    if sampler == "ddpm":
        config["variance_type"] = _key(VARIANCE_TYPES, variance)
    if "use_lu_lambdas" in has:  # the same noise levels, with timesteps that are rounded as here
        config["use_lu_lambdas"] = spacing == "exponential"
    config |= FIELDS_OF_SAMPLER.get(sampler, {})
    lacking = {field for field in WITHOUT if config.get(field, WITHOUT[field]) != WITHOUT[field]} - set(has)
    if "final_sigmas_type" in has:
        lacking -= {"set_alpha_to_one"}
    fixed = FIXED.get(config["_class_name"], {})
    lacking = (lacking - set(fixed)) | {field for field in fixed if config.get(field, fixed[field]) != fixed[field]}
    if lacking:
        fields = ", ".join(f"{field} = {config[field]!r}" for field in sorted(lacking))
        raise InputError(f"diffusers' {CLASS_OF[sampler]} does not support {fields}; export it with the sampler ddim")
    scheduler_from_config(config)  # raises InputError for whatever else the class does not support
    return config


def _key(names: Mapping[Any, str], name: str) -> Any:
    """The first key in diffusers for a name here; raises InputError if there is none."""
    for key, value in names.items():
        if value == name:
            return key
    raise InputError(f"diffusers' DDPM schedulers have no {name!r}; they have {', '.join(names.values())}")
