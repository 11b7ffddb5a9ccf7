"""diffusers' schedulers of rectified flow (0.42.1): FlowMatchEulerDiscreteScheduler, and those with `use_flow_sigmas`.

The process is alpha = 1 - s, sigma = s, the prediction is eps - z0, and the network's timestep is T s, not rounded by
FlowMatchEuler and rounded down by the others. On a flow model a sampler whose class has no `use_flow_sigmas` has the
noise levels of the model's own scheduler. Each ends on clean data; diffusers' DEIS ends before, and is refused.

Dynamic shifting, whose shift a pipeline computes from the number of tokens of a transformer, is refused.
"""

from collections.abc import Mapping
from typing import Any

from ldm_jax.diffusion.flow import FlowSpacing
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.schedules import rectified_flow
from ldm_jax.errors import InputError
from ldm_jax.interop.scheduler_fields import (
    CLASS_OF,
    DEFAULTS,
    FIELDS_OF_SAMPLER,
    FLOW_RAMPS,
    FLOW_SAMPLER_OF,
    check_fields,
    check_process_fields,
    fields_of,
)

_OF_LEVELS = (
    *("num_train_timesteps", "prediction_type", "use_flow_sigmas", "shift", "flow_shift", "shift_terminal"),
    *("use_dynamic_shifting", "invert_sigmas", "use_lu_lambdas"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
)
_UNEVEN = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler_config.json is of rectified flow."""
    name = config.get("_class_name")
    return name in FLOW_RAMPS and (name.startswith("FlowMatch") or bool(config.get("use_flow_sigmas")))


def flow_process(config: Mapping[str, Any]) -> tuple[Process, str]:
    """The process of a flow model's training and its prediction; raises InputError for fields that contradict it."""
    name = config["_class_name"]
    fields = fields_of(config, name)
    check_process_fields(name, fields)
    if fields["num_train_timesteps"] < 1:
        raise InputError(f"{name}: num_train_timesteps is {fields['num_train_timesteps']}; it must be 1 or more")
    return rectified_flow(fields["num_train_timesteps"]), "flow"


def flow_options(config: Mapping[str, Any], sampler: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of `make_table` for a sampler on a flow model, and the fields of the class whose noise levels it has.

    `sampler` None is the config's own class. Raises InputError for a sampler or a field that is not supported.
    """
    name = config["_class_name"]
    if sampler in ("lcm", "tcd"):
        raise InputError(f"the sampler {sampler} is for distilled models; the scheduler {name} is of a flow model")
    of_class = name if sampler is None else CLASS_OF[sampler]
    if sampler is not None and (of_class not in FLOW_RAMPS or name in FLOW_SAMPLER_OF):
        of_class, config = name, {field: config[field] for field in _OF_LEVELS if field in config}
    stated = FIELDS_OF_SAMPLER.get(sampler, {}) if of_class == CLASS_OF.get(sampler) else {}
    fields = fields_of(config, of_class) | stated
    check_fields(of_class, fields)
    return {"spacing": "flow", "flow": _spacing(of_class, fields)}, fields


def _spacing(name: str, fields: Mapping[str, Any]) -> FlowSpacing:
    """The noise levels of a class; raises InputError for a shift or an end that is none."""
    flow_match, ramp = name.startswith("FlowMatch"), FLOW_RAMPS[name]
    field = "shift" if flow_match else "flow_shift"
    shift, terminal = fields[field], fields.get("shift_terminal")
    if shift <= 0:
        raise InputError(f"{name}: {field} = {shift!r}; it must be above 0")
    if terminal is not None and not (isinstance(terminal, int | float) and 0 <= terminal < 1):
        raise InputError(f"{name}: shift_terminal = {terminal!r}; it must be null, or from 0 to below 1")
    uneven = [spacing for field, spacing in _UNEVEN.items() if fields[field]]
    return FlowSpacing(ramp, shift, terminal or None, uneven[0] if uneven else None, whole_t=not flow_match)


def flow_config(T: int, shift: float = 1.0) -> dict[str, Any]:
    """The scheduler_config.json of Euler's method on rectified flow of T timesteps."""
    return {"_class_name": "FlowMatchEulerDiscreteScheduler"} | DEFAULTS["FlowMatchEulerDiscreteScheduler"] | {
        "num_train_timesteps": T,
        "shift": shift,
    }  # fmt: skip
