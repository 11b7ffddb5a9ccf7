"""diffusers' scheduler_config.json <-> our schedule, prediction and solver table (checked against diffusers 0.42.1).

On a diffusers model a sampler means what `OtherScheduler.from_config(pipe.scheduler.config)` means in diffusers: fields
that the file states and the other class has carry over. What the file leaves out is the other class's own default, not
that of the class the file names: diffusers marks the defaults that it filled in and passes none on.

Where diffusers errs or is at odds with itself, the samplers here stay as they are:

- Its DDIM and PNDM take t - T // steps for the next timestep, which is that of leading spacing alone (diffusers#9261).
- Its PNDM adds up v predictions that were made at different z as if at one; `plms` adds up the eps that they mean.
- Its DDPM of fixed_large variance adds noise after the last step too, unless that is at timestep 0.
- Its DDIM clips z0_hat but not the eps beside it, unless called with use_clipped_model_output=True; `ddim` clips both.
- Its DPM-Solver and UniPC cut fractions off the timesteps of exponential sigmas; here the network is told the nearest
  timestep. With Karras sigmas on a cosine schedule theirs do so too, or fail, as the first timesteps coincide.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.diffusion.denoiser import Denoiser, clip_z0, threshold_z0
from ldm_jax.diffusion.prediction import coefficient_tables
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.schedules import make_process, process_of_betas
from ldm_jax.diffusion.solvers import SOLVERS, make_table
from ldm_jax.diffusion.spacing import EVEN
from ldm_jax.diffusion.tables import Table
from ldm_jax.errors import InputError
from ldm_jax.interop.scheduler_fields import (
    ALGORITHM,
    CLASS_OF,
    DEFAULTS,
    PREDICTIONS,
    READABLE,
    SAMPLER_OF,
    SCHEDULES,
    VARIANCES,
    WITHOUT,
    check_fields,
    fields_of,
)

# Where alpha_bar = 0 these put this level instead, so that sigma / alpha is finite.
_FLOOR = 2.0**-24
_FLOORED = ("euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "unipc")

# k-diffusion's samplers.
_ON_SIGMA = ("euler", "euler_a", "heun", "edm")

# What pipelines set in their scheduler's config whatever the file says.
_FORCED = {
    "StableDiffusionPipeline": {"steps_offset": 1, "clip_sample": False},
    "StableDiffusionImg2ImgPipeline": {"steps_offset": 1, "clip_sample": False},
    "StableDiffusionInpaintPipeline": {"steps_offset": 1, "skip_prk_steps": True},
}


class Scheduler(NamedTuple):
    """What a scheduler's config comes to, for a model's samples."""

    process: Process  # that the network was trained with
    prediction: str  # eps | v | z0
    sampler: str  # one of SOLVERS
    options: dict[str, Any]  # of `make_table`, beyond the number of steps
    clip: float = np.inf  # z0_hat is kept within [-clip, clip]; inf: it is left alone
    threshold: tuple[float, float] | None = None  # quantile and highest of `threshold_z0`; None: none
    starts_at_sigma: bool = False  # see `start`

    def table(self, steps: int, **more: Any) -> Table:
        """The rows of `steps` steps; `more` are further arguments of `make_table`, or others than `options`.

        Raises:
          InputError: a combination that the solver does not take.
        """
        try:
            return make_table(self.sampler, self.process, steps, prediction=self.prediction, **(self.options | more))
        except ValueError as error:
            raise InputError(f"sampling: {error}") from error

    def start(self, table: Table) -> float:
        """What unit noise is multiplied by to be z_T, if no image is begun from.

        k-diffusion's samplers hold z / alpha and begin with noise times init_noise_sigma. With leading spacing that is
        sqrt(sigma^2 + 1) in their sigma / alpha, so z is the unit noise itself, as with all other samplers. With
        linspace and trailing it is sigma, and so z_T = sigma_T eps: what becomes of data that are 0.
        """
        return float(table.sigma[0]) if self.starts_at_sigma else 1.0

    def bounded(self, denoise: Denoiser) -> Denoiser:
        """The denoiser whose z0_hat is clipped or thresholded as the config says."""
        return clip_z0(denoise, self.clip) if self.threshold is None else threshold_z0(denoise, *self.threshold)


def scheduler_from_config(config: Mapping[str, Any], sampler: str | None = None, *, pipeline: str = "") -> Scheduler:
    """The scheduler of a model.

    Args:
      config: of scheduler_config.json. Fields that the class does not have are passed over, as in diffusers.
      sampler: one of SOLVERS, for the scheduler that diffusers would make of this one's config; None for its own.
      pipeline: class of the pipeline that it belongs to; some change their scheduler's config.

    Raises:
      InputError: unknown sampler, or something in the config that no sampler here does; the field is named.
    """
    own = config.get("_class_name")
    if own not in READABLE:
        raise InputError(f"the scheduler's class {own!r} is not supported; supported: {', '.join(READABLE)}")
    if sampler is None and own not in SAMPLER_OF:
        raise InputError(f"no sampler here is {own}; choose one by --sampler: {', '.join(SOLVERS)}")
    if sampler is not None and sampler not in CLASS_OF:
        raise InputError(f"sampler must be one of {', '.join(SOLVERS)}, got {sampler!r}")

    name = own if sampler is None else CLASS_OF[sampler]
    # What a pipeline sets where the file states nothing is marked as a default, and no other class hears of it.
    forced = {
        field: value
        for field, value in _FORCED.get(pipeline, {}).items()
        if field in config or (sampler is None and field in DEFAULTS[name])
    }
    fields = fields_of({**config, **forced}, name)
    if sampler in ALGORITHM:
        fields["algorithm_type"] = ALGORITHM[sampler]
    check_fields(name, fields)
    if sampler is None:
        sampler = SAMPLER_OF[name]
        if sampler == "dpmpp_2m" and fields["algorithm_type"] == ALGORITHM["dpmpp_2m_sde"]:
            sampler = "dpmpp_2m_sde"

    process, prediction = _process(fields, sampler), PREDICTIONS[fields["prediction_type"]]
    _check_range(config, name, fields, process)
    try:
        coefficient_tables(prediction, process)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error
    clips, thresholds = fields["clip_sample"], fields["thresholding"]
    return Scheduler(
        process,
        prediction,
        sampler,
        _options(fields, sampler),
        clip=float(fields["clip_sample_range"]) if clips and not thresholds else np.inf,
        threshold=(fields["dynamic_thresholding_ratio"], fields["sample_max_value"]) if thresholds else None,
        starts_at_sigma=sampler in _ON_SIGMA and fields["timestep_spacing"] != "leading",
    )


def _check_range(config: Mapping[str, Any], name: str, fields: Mapping[str, Any], process: Process) -> None:
    """Refuses another range of noise levels than the schedule's own.

    diffusers looks sigma_min and sigma_max up in the config of any class that has uneven sigmas.
    """
    if fields["use_karras_sigmas"] or fields["use_exponential_sigmas"]:
        for field in ("sigma_min", "sigma_max"):
            if config.get(field) is not None:
                raise InputError(f"{name}: {field} = {config[field]!r} is not supported; supported: None")
    if "lambda_min_clipped" in fields:
        lowest = process.point(-1).half_log_snr
        if fields["lambda_min_clipped"] > lowest:
            raise InputError(
                f"{name}: lambda_min_clipped = {fields['lambda_min_clipped']!r} is not supported; "
                f"supported: values that leave the schedule whole, {lowest:.4g} and below"
            )


def _process(fields: Mapping[str, Any], sampler: str) -> Process:
    T, zero_snr, given = fields["num_train_timesteps"], fields["rescale_betas_zero_snr"], fields["trained_betas"]
    try:
        if given is None:
            name, start, end = SCHEDULES[fields["beta_schedule"]], fields["beta_start"], fields["beta_end"]
            process = make_process(name, T, beta_start=start, beta_end=end, zero_terminal_snr=zero_snr)
        else:
            beta = np.asarray(given, np.float64)
            if beta.shape != (T,) or not ((beta > 0) & (beta < 1)).all():
                raise ValueError(f"trained_betas must be {T} numbers between 0 and 1, as num_train_timesteps says")
            process = process_of_betas(beta, zero_terminal_snr=zero_snr)
    except ValueError as error:
        raise InputError(f"{CLASS_OF[sampler]}: {error}") from error
    if zero_snr and sampler in _FLOORED:
        ends = np.sqrt(_FLOOR), np.sqrt(1 - _FLOOR)
        return Process(*(np.append(table[:-1], end) for table, end in zip((process.alpha, process.sigma), ends)))
    return process


def _options(fields: Mapping[str, Any], sampler: str) -> dict[str, Any]:
    """Arguments of `make_table`."""
    even = fields["timestep_spacing"]
    if fields["use_karras_sigmas"] or fields["use_exponential_sigmas"]:
        spacing = "karras" if fields["use_karras_sigmas"] else "exponential"
    else:
        spacing = even
    # lcm ends on clean data even where set_alpha_to_one is false: diffusers' never looks at that.
    to_one = sampler == "lcm" or (fields["set_alpha_to_one"] and fields["final_sigmas_type"] == "zero")
    options = {
        "spacing": spacing,
        "between": even,
        "steps_offset": fields["steps_offset"],
        "set_alpha_to_one": bool(to_one),
    }
    return options | ({"variance": VARIANCES[fields["variance_type"]]} if sampler == "ddpm" else {})


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
    clip: float = np.inf,
) -> dict[str, Any]:
    """The scheduler_config.json with which diffusers draws as we do; `scheduler_from_config` is the inverse.

    It also states fields that its own class has no use for, so that with another class `from_config` in diffusers
    keeps to the same schedule, steps and end. What no config can say: eta and churn; that noise begins unscaled where
    `Scheduler.start` tells of theirs; and whatever diffusers does otherwise (see above). StableDiffusionPipeline and
    its kin read a steps_offset of 0 as 1, which matters with leading spacing. Some classes lift alpha_bar from 0.

    Args:
      name, T, beta_start, beta_end, zero_terminal_snr: as in `make_process`.
      prediction: eps, v or z0.
      sampler: one of SOLVERS, whose class it will be.
      spacing, between, steps_offset, set_alpha_to_one, variance: as in `make_table`.
      clip: bound of z0_hat, inf for latents.

    Raises:
      InputError: something that the sampler's class in diffusers has no field for.
    """
    even, has = spacing in EVEN, DEFAULTS[CLASS_OF[sampler]]
    config = {
        "_class_name": CLASS_OF[sampler],
        "num_train_timesteps": T,
        "beta_start": beta_start,
        "beta_end": beta_end,
        "beta_schedule": _key(SCHEDULES, name),
        "trained_betas": None,
        "prediction_type": _key(PREDICTIONS, prediction),
        "rescale_betas_zero_snr": zero_terminal_snr,
        "timestep_spacing": spacing if even else between,
        "steps_offset": steps_offset,
        "use_karras_sigmas": spacing == "karras",
        "use_exponential_sigmas": spacing == "exponential",
        "clip_sample": bool(np.isfinite(clip)),
        "clip_sample_range": float(clip) if np.isfinite(clip) else 1.0,
        "set_alpha_to_one": set_alpha_to_one,
        "skip_prk_steps": True,
    }
    if "final_sigmas_type" in has:
        config["final_sigmas_type"] = "zero" if set_alpha_to_one else "sigma_min"
    if sampler == "ddpm":
        config["variance_type"] = _key(VARIANCES, variance)
    if sampler in ALGORITHM:
        config["algorithm_type"] = ALGORITHM[sampler]
    unheard = {field for field in WITHOUT if config.get(field, WITHOUT[field]) != WITHOUT[field]} - set(has)
    if "final_sigmas_type" in has:
        unheard -= {"set_alpha_to_one"}
    if unheard:
        told = ", ".join(f"{field} = {config[field]!r}" for field in sorted(unheard))
        raise InputError(f"diffusers' {CLASS_OF[sampler]} does not know {told}; export it with the sampler ddim")
    scheduler_from_config(config)  # refuses what else that class cannot do
    return config


def _key(names: Mapping[Any, str], ours: str) -> Any:
    """diffusers' name for ours, the first if there are several; raises InputError if there is none."""
    for theirs, name in names.items():
        if name == ours:
            return theirs
    raise InputError(f"diffusers' DDPM schedulers have no {ours!r}; they have {', '.join(names.values())}")
