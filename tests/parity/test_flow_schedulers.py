"""Schedulers of rectified flow, here and in diffusers: the same timesteps, sigmas and latents from the same noise."""

import diffusers
import numpy as np
import pytest
from parity.fixed_network import TWO_CALLS, Z_T, assert_same, network, solver
from scheduler_configs import FLOW, table_of

from ldm_jax.interop.flow_schedulers import flow_config
from ldm_jax.interop.scheduler_config import scheduler_from_config
from ldm_jax.interop.scheduler_fields import CLASS_OF, FIELDS_OF_SAMPLER, FLOW_RAMPS

CHANGES = [
    *(("sd3", change) for change in ({}, {"shift": 0.5}, {"num_train_timesteps": 50})),
    *(("sd3", {"shift_terminal": 0.02, field: True}) for field in ("use_karras_sigmas", "use_exponential_sigmas")),
    *(("sd3", change) for change in ({"use_beta_sigmas": True}, {"shift_terminal": 0.1, "shift": 1.0})),
    ("flux_schnell", {}),
    ("heun", {}),
    ("heun", {"shift": 1.0}),
    *(("wan", change) for change in ({}, {"flow_shift": 1.0}, {"shift_terminal": 0.1})),
    *(("sana", change) for change in ({}, {"flow_shift": 1.0}, {"solver_order": 3}, {"lower_order_final": False})),
    ("sana", {"lower_order_final": False, "euler_at_final": True}),
    ("sana", {"algorithm_type": "sde-dpmsolver++"}),
    *(("single_step", change) for change in ({}, {"flow_shift": 1.0})),
]
OTHERS = [(model, sampler) for model in ("wan", "sana", "single_step")
          for sampler in ("unipc", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "dpmpp_2s")]  # fmt: skip
MODULES = {"dpmpp_2m_sde": "dpmsolver_multistep"}


def reference_of(config, sampler=None):
    own = getattr(diffusers, config["_class_name"]).from_config(config)
    if sampler is None:
        return own
    return getattr(diffusers, CLASS_OF[sampler]).from_config(own.config, **FIELDS_OF_SAMPLER.get(sampler, {}))


def run_reference(scheduler, steps):
    """The latents of diffusers' scheduler in float64, as its pipelines run it."""
    import torch

    scheduler.set_timesteps(steps)
    z = torch.from_numpy(Z_T)
    for t in scheduler.timesteps:
        output = network(z.numpy(), float(t), np)
        z = scheduler.step(torch.from_numpy(output), t, z).prev_sample.double()
    return z.numpy()


def latents_of(scheduler, steps):
    """The network is conditioned on t + 1 = T sigma, as `model.apply_denoiser` calls it."""
    table = table_of(scheduler, steps)
    table = table._replace(t=table.t + 1)
    return np.asarray(solver(scheduler.process, scheduler.prediction)(table, scheduler.clip_sample_range, Z_T))


def assert_same_samples(scheduler, reference, steps, same_noise):
    if scheduler.sampler in MODULES:
        same_noise(MODULES[scheduler.sampler], steps)
    got, expected = latents_of(scheduler, steps), run_reference(reference, steps)
    if scheduler.sampler == "heun":  # diffusers' divides a difference of float32 by sigma
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    else:
        assert_same(got, expected, scheduler.sampler)


@pytest.mark.parametrize("steps", [1, 2, 5, 14, 15, 20])
@pytest.mark.parametrize("model, change", CHANGES)
def test_flow_models(model, change, steps, same_noise):
    if steps == 1 and "shift_terminal" in change:
        with pytest.raises(ValueError, match="are 2 steps or more, got 1"):  # the only step of diffusers divides by 0
            table_of(scheduler_from_config(FLOW[model] | change), steps)
        return
    config = FLOW[model] | change
    assert_same_samples(scheduler_from_config(config), reference_of(config), steps, same_noise)


@pytest.mark.parametrize("steps", [1, 6, 15])
@pytest.mark.parametrize("model, sampler", OTHERS)
def test_other_schedulers_of_a_flow_model(model, sampler, steps, same_noise):
    config = FLOW[model]
    assert_same_samples(scheduler_from_config(config, sampler), reference_of(config, sampler), steps, same_noise)


@pytest.mark.parametrize("steps", [2, 7, 28, 333])
@pytest.mark.parametrize("model, change", CHANGES)
def test_timesteps_and_sigmas(model, change, steps):
    config = FLOW[model] | change
    steps = min(steps, config["num_train_timesteps"])
    reference = reference_of(config)
    reference.set_timesteps(steps)
    table = table_of(scheduler_from_config(config), steps)
    n = int(table.rows)
    assert len(reference.timesteps) == n
    np.testing.assert_allclose(table.t[:n] + 1, reference.timesteps.numpy(), rtol=0, atol=1e-4)
    sigmas = reference.sigmas.numpy()
    if isinstance(reference, diffusers.FlowMatchHeunDiscreteScheduler):
        sigmas = np.append(sigmas[0], np.append(sigmas[1:-1:2].repeat(2), 0))
    np.testing.assert_allclose(table.sigma[:n], sigmas[:n], rtol=0, atol=1e-7)


def test_the_config_that_is_written_is_diffusers_own():
    """All fields, those of a scheduler of diffusers with these two."""
    config = flow_config(200, shift=2.0)
    reference = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=200, shift=2.0)
    assert config == {"_class_name": "FlowMatchEulerDiscreteScheduler"} | {
        name: value for name, value in reference.config.items() if name in config
    }
    assert set(config) - {"_class_name"} == {name for name in reference.config if not name.startswith("_")}


def test_the_classes_with_two_calls_a_step_are_known():
    assert diffusers.FlowMatchHeunDiscreteScheduler not in TWO_CALLS  # which hold z / alpha
    assert all(hasattr(diffusers, name) for name in FLOW_RAMPS)
