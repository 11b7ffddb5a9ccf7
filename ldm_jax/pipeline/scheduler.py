"""Schedulers: from scheduler_config.json to the solvers of a model, and from a run's config to such a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ldm_jax.config.fields import OWN
from ldm_jax.config.rules import text_conditioned
from ldm_jax.diffusion.solvers import SOLVERS
from ldm_jax.diffusion.spacing import TIMESTEP_SPACINGS
from ldm_jax.errors import InputError
from ldm_jax.interop.flow_schedulers import flow_config
from ldm_jax.interop.pipelines import DIT_PIPELINE
from ldm_jax.interop.scheduler_config import Scheduler, config_from_schedule, scheduler_from_config
from ldm_jax.interop.scheduler_fields import CLASS_OF, DEFAULTS
from ldm_jax.pipeline.model import Solver


def solvers_of_scheduler(
    config: Mapping[str, Any], pipeline: str, spacing: str | None = None
) -> tuple[str, dict[str, Solver | str]]:
    """The config's own sampler, and solvers by sampler; `spacing` replaces that of the config.

    A solver is what `XScheduler.from_config(pipe.scheduler.config)` is in diffusers, or the reason why it is not
    supported. If that of the config's own class is not, the own sampler is OWN, with the reason.
    """
    solvers: dict[str, Solver | str] = {}
    for sampler in SOLVERS:
        try:
            solvers[sampler] = _solver(scheduler_from_config(config, sampler, pipeline=pipeline), spacing)
        except InputError as error:
            solvers[sampler] = str(error)
    try:
        own = scheduler_from_config(config, pipeline=pipeline)
        return own.sampler, solvers | {own.sampler: _solver(own, spacing)}
    except InputError as error:
        supported = ", ".join(sampler for sampler, solver in solvers.items() if isinstance(solver, Solver))
        another = f"; choose another with --sampler: {supported}" if supported else ""
        return OWN, solvers | {OWN: f"{error}{another}"}


def _solver(scheduler: Scheduler, spacing: str | None) -> Solver:
    if scheduler.threshold is not None:
        raise InputError("the scheduler has thresholding, which is for pixels and not for latents")
    options = scheduler.options | ({} if spacing is None else {"spacing": spacing})
    return Solver(scheduler.process, options, scheduler.clip_sample_range, scheduler.scaled_initial_noise)


def lcm_scheduler(config: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler_config.json of `LCMScheduler.from_config(config)`, for the distilled form of a model."""
    name = CLASS_OF["lcm"]
    return {"_class_name": name} | {field: value for field, value in config.items() if field in DEFAULTS[name]}


def scheduler_of_run(config: ConfigDict, pipeline: str = "") -> tuple[dict[str, Any], list[str]]:
    """The scheduler_config.json with which a pipeline of diffusers samples as a run does; notes on the differences.

    DDIM without noise is Euler's method, and that class of diffusers has the right timesteps whatever their spacing;
    its DDIM has for leading spacing (diffusers#9261). A sampler that no class of diffusers is falls back to DDIM, and
    so do those of k-diffusion in a DiTPipeline, which does not scale its initial noise; on rectified flow all are
    Euler's method. Raises InputError for a flow model that no pipeline of diffusers samples.
    """
    is_dit = pipeline == DIT_PIPELINE
    if config.diffusion.schedule == "rectified_flow":
        return _flow_scheduler_of_run(config)
    diffusion, sampling, pixels = config.diffusion, config.sampling, config.autoencoder.type == "none"
    same = ("beta_start", "beta_end", "zero_terminal_snr", "prediction")
    schedule = {"name": diffusion.schedule, "T": diffusion.timesteps, "clip_sample_range": 1.0 if pixels else np.inf}
    schedule |= {name: diffusion[name] for name in same}
    notes = []
    if sampling.threshold and pixels:
        notes.append("Without dynamic thresholding: z0 is clipped at 1 instead.")
    sampler, spacing = sampling.sampler, sampling.spacing
    noisy = sampling.eta or pixels or diffusion.zero_terminal_snr
    if sampler == "ddim" and spacing != "leading" and not (noisy or is_dit):
        sampler = "euler"
    try:
        if sampling.churn:
            raise InputError("diffusers' HeunDiscreteScheduler adds no noise during sampling")
        fields = config_from_schedule(**schedule, sampler=sampler, spacing=spacing, variance=sampling.variance)
        if is_dit and scheduler_from_config(fields).scaled_initial_noise:
            raise InputError(f"{pipeline} does not scale the initial noise for diffusers' {fields['_class_name']}")
        if is_dit and fields.get("variance_type") == "learned_range":
            raise InputError(f"{pipeline} leaves the learned variance out")
    except InputError as error:
        sampler, spacing = "ddim", spacing if spacing in TIMESTEP_SPACINGS else "trailing"
        notes.append(f"By DDIM with {spacing} steps instead of by {sampling.sampler}: {error}.")
        fields = config_from_schedule(**schedule, sampler=sampler, spacing=spacing)
    if sampler in ("ddim", "plms") and spacing != "leading":
        notes.append(
            f"diffusers' {fields['_class_name']} takes {diffusion.timesteps} // steps for each step (diffusers#9261): "
            f"with {spacing} steps its samples are those of ldm_jax only where that is right."
        )
    return fields, notes


def _flow_scheduler_of_run(config: ConfigDict) -> tuple[dict[str, Any], list[str]]:
    """The scheduler_config.json of a run on rectified flow, and notes on the differences."""
    diffusion, sampling, notes = config.diffusion, config.sampling, []
    if diffusion.prediction != "flow":
        only = "its schedulers of rectified flow are of the prediction flow"
        raise InputError(
            f"diffusers has no scheduler for config.diffusion.prediction = {diffusion.prediction!r}: {only}"
        )
    if text_conditioned(config):
        raise InputError("diffusers' StableDiffusionPipeline, which samples text-to-image runs, has no flow scheduler")
    if config.denoiser == "dit":
        raise InputError("diffusers' DiTPipeline, which samples diffusion transformers, has no flow scheduler")
    if sampling.sampler not in ("ddim", "euler") or sampling.eta:
        notes.append(f"By Euler's method without noise instead of by {sampling.sampler}.")
    if sampling.spacing not in ("trailing", "flow"):
        steps = flow_spacing(sampling.spacing) or "flow"
        notes.append(f"With {steps} steps instead of {sampling.spacing} ones.")
    if config.autoencoder.type == "none":
        notes.append("Without clipping z0 to [-1, 1].")
    return flow_config(diffusion.timesteps), notes


def flow_spacing(spacing: str) -> str | None:
    """The steps in diffusers of a run on rectified flow: "trailing", or None: those of the scheduler."""
    return None if spacing in ("flow", "linspace") else "trailing"


def stated_timesteps(settings: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The timesteps of rectified flow in a LatentDiffusionPipeline's index; raises InputError, which names `where`."""
    stated = {}
    for name, values in {"timestep_offset": (0, -1), "timestep_spacing": (None, "trailing")}.items():
        stated[name] = settings.get(name, values[0])
        if stated[name] not in values or isinstance(stated[name], bool):
            raise InputError(f"{where} is damaged: {name} is {stated[name]!r}")
    return stated
