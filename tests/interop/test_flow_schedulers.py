"""Schedulers of rectified flow read from scheduler_config.json, without diffusers: see tests/parity for the rest."""

import numpy as np
import pytest
from scheduler_configs import FLOW, table_of

from ldm_jax.diffusion.flow import FlowSpacing
from ldm_jax.diffusion.schedules import rectified_flow
from ldm_jax.diffusion.solvers import SOLVERS
from ldm_jax.errors import InputError
from ldm_jax.interop.flow_schedulers import flow_config, is_flow
from ldm_jax.interop.scheduler_config import edm_from_config, process_from_config, scheduler_from_config

OWN = {"sd3": "euler", "flux_schnell": "euler", "heun": "heun", "wan": "unipc", "sana": "dpmpp_2m",
       "single_step": "dpmpp_2s"}  # fmt: skip


@pytest.mark.parametrize("model", FLOW)
def test_the_own_scheduler(model):
    scheduler = scheduler_from_config(FLOW[model])
    assert (scheduler.process, scheduler.prediction, scheduler.sampler) == (rectified_flow(1000), "flow", OWN[model])
    assert process_from_config(FLOW[model]) == (rectified_flow(1000), "flow")
    assert edm_from_config(FLOW[model]) is None and is_flow(FLOW[model])
    assert scheduler.threshold is None and not scheduler.scaled_initial_noise
    assert scheduler.clip_sample_range == np.inf
    for steps in (1, 2, 7):
        table = table_of(scheduler, steps)
        assert np.isfinite(table.weights).all() and table.reached_sigma[table.rows - 1] == 0


def test_spacings_by_class():
    def spacing(model, sampler=None, **changes):
        return scheduler_from_config(FLOW[model] | changes, sampler).options["flow"]

    assert spacing("sd3") == FlowSpacing(shift=3.0)
    assert spacing("sd3", shift_terminal=0.02, use_beta_sigmas=True) == FlowSpacing("flow_match", 3.0, 0.02, "beta")
    assert spacing("sd3", shift_terminal=0.0) == spacing("sd3", shift_terminal=None) == FlowSpacing(shift=3.0)
    assert spacing("heun") == FlowSpacing(shift=3.0)
    assert spacing("wan") == FlowSpacing("unipc", 5.0, whole_t=True)
    assert spacing("wan", shift_terminal=0.1) == FlowSpacing("unipc", 5.0, 0.1, whole_t=True)
    assert spacing("sana") == FlowSpacing("dpm", 3.0, whole_t=True)
    # Another class of diffusers with flow sigmas has its own levels; one without has the model's.
    assert spacing("wan", "dpmpp_2m") == spacing("wan", "dpmpp_2s") == FlowSpacing("dpm", 5.0, whole_t=True)
    assert spacing("sana", "unipc") == FlowSpacing("unipc", 3.0, whole_t=True)
    assert spacing("sana", "heun") == spacing("sana", "ddpm") == spacing("sana", "deis") == spacing("sana")
    assert spacing("sd3", "unipc") == spacing("sd3", "dpmpp_2m_sde") == spacing("sd3")


def test_the_sampler_of_a_class_by_its_fields():
    def sampler(other=None, **changes):
        return scheduler_from_config(FLOW["sana"] | changes, other).sampler

    assert sampler(solver_order=3) == "dpmpp_3m"
    assert sampler(algorithm_type="sde-dpmsolver++") == "dpmpp_2m_sde"
    assert sampler("dpmpp_2m", algorithm_type="sde-dpmsolver++", solver_order=3) == "dpmpp_2m"


@pytest.mark.parametrize("model", FLOW)
def test_every_sampler_but_those_of_distilled_models(model):
    """Whatever the fields of the config's own solver are."""
    for sampler in SOLVERS:
        config = FLOW[model] | ({"stochastic_sampling": True} if sampler != OWN[model] else {})
        if sampler in ("lcm", "tcd"):
            with pytest.raises(InputError, match=f"the sampler {sampler} is for distilled models; .* of a flow model"):
                scheduler_from_config(config, sampler)
            continue
        scheduler = scheduler_from_config(config, sampler)
        table = table_of(scheduler, 7)
        assert scheduler.sampler == sampler
        assert np.isfinite(table.weights).all() and table.reached_sigma[table.rows - 1] == 0


@pytest.mark.parametrize(
    "model, change, named",
    [
        ("sd3", {"use_dynamic_shifting": True}, "use_dynamic_shifting = True is not supported; supported: False"),
        ("sd3", {"invert_sigmas": True}, "invert_sigmas = True is not supported; supported: False"),
        ("sd3", {"stochastic_sampling": True}, "stochastic_sampling = True is not supported; supported: False"),
        ("sd3", {"shift": 0.0}, "FlowMatchEulerDiscreteScheduler: shift = 0.0; it must be above 0"),
        ("sd3", {"shift": "3"}, "shift must be a number, got '3'"),
        ("sd3", {"shift_terminal": 1.0}, "shift_terminal = 1.0; it must be null, or from 0 to below 1"),
        ("sd3", {"shift_terminal": "0.1"}, "shift_terminal = '0.1'; it must be"),
        ("sd3", {"num_train_timesteps": 0}, "num_train_timesteps is 0; it must be 1 or more"),
        ("sd3", {"use_karras_sigmas": True, "use_beta_sigmas": True}, "use_karras_sigmas and use_beta_sigmas cannot"),
        ("wan", {"flow_shift": -1.0}, "UniPCMultistepScheduler: flow_shift = -1.0; it must be above 0"),
        ("wan", {"use_dynamic_shifting": True}, "use_dynamic_shifting = True"),
        ("wan", {"final_sigmas_type": "sigma_min"}, "final_sigmas_type = 'sigma_min' is not supported"),
        ("wan", {"prediction_type": "epsilon"}, "prediction_type = 'epsilon' is not supported"),
        ("sana", {"use_karras_sigmas": True}, "use_karras_sigmas = True is not supported; supported: False"),
        ("sana", {"thresholding": True}, "thresholding = True is not supported"),
        ("sana", {"use_flow_sigmas": False}, "prediction_type = 'flow_prediction' is not supported"),
        ("sana", {"_class_name": "DEISMultistepScheduler"}, "use_flow_sigmas = True is not supported"),
        ("sana", {"_class_name": "SASolverScheduler"}, "is not supported"),
    ],
)  # fmt: skip
def test_refusals(model, change, named):
    with pytest.raises(InputError, match=named):
        scheduler_from_config(FLOW[model] | change)


def test_levels_that_are_refused_are_so_for_every_sampler():
    for sampler in ("ddim", "unipc"):
        with pytest.raises(InputError, match="use_dynamic_shifting = True"):
            scheduler_from_config(FLOW["sd3"] | {"use_dynamic_shifting": True}, sampler)
    with pytest.raises(InputError, match="use_karras_sigmas = True"):
        scheduler_from_config(FLOW["sana"] | {"use_karras_sigmas": True}, "euler")


def test_a_config_that_is_written_is_read_as_it_was():
    scheduler = scheduler_from_config(flow_config(50, shift=2.0))
    assert (scheduler.process, scheduler.sampler) == (rectified_flow(50), "euler")
    assert scheduler.options == {"spacing": "flow", "flow": FlowSpacing(shift=2.0)}
