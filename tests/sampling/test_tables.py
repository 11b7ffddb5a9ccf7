"""The tables of a recipe on a model: DDIM inversion ends where its sampler begins; combinations that are refused."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import random_runs

from ldm_jax.diffusion.flow import FlowSpacing
from ldm_jax.diffusion.schedules import make_process
from ldm_jax.diffusion.solvers import SOLVERS, make_inversion_table
from ldm_jax.diffusion.spacing import SPACINGS
from ldm_jax.errors import InputError
from ldm_jax.pipeline.model import LatentDiffusion, Solver
from ldm_jax.pipeline.scheduler import solvers_of_scheduler
from ldm_jax.sampling.recipe import Edit, Solving, solving_defaults
from ldm_jax.sampling.tables import inversion_table, make_table

FLOW = {"diffusion.schedule": "rectified_flow", "diffusion.prediction": "flow"}
STABLE_DIFFUSION = {
    "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
}  # fmt: skip


def assert_inverted(model: LatentDiffusion, solving: Solving):
    """The inversion's last level is the first of the sampler; between data and it, noise rises."""
    table, inversion = make_table(model, solving), inversion_table(model, solving)
    rows = int(inversion.rows)
    np.testing.assert_allclose(inversion.reached_alpha[rows - 1], table.alpha[0], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(inversion.reached_sigma[rows - 1], table.sigma[0], rtol=1e-12)
    assert inversion.t[rows - 1] == table.t[0] and np.isfinite(inversion.weights).all()
    assert (np.diff(inversion.reached_sigma[:rows]) >= 0).all() and inversion.sigma[0] > 0


OWN_TIMESTEPS = ("lcm", "tcd")  # solvers that take none of these spacings
UNEVEN = ("karras", "exponential", "beta", "flow")


@pytest.mark.parametrize(
    ("solver", "spacing"),
    [pair for pair in product(SOLVERS, SPACINGS) if not (pair[0] in OWN_TIMESTEPS and pair[1] in UNEVEN)],
)
def test_inversion_ends_where_the_sampler_begins(solver, spacing):
    model, _ = random_runs.random_model(FLOW if spacing == "flow" else {})
    for steps in (1, 4, 7):
        assert_inverted(model, solving_defaults(model, solver, steps)._replace(spacing=spacing))


@pytest.mark.parametrize("solver", SOLVERS)
def test_inversion_ends_where_the_sampler_of_a_scheduler_begins(solver):
    """Stable Diffusion's: leading with an offset of 1, and a process of its own."""
    own, solvers = solvers_of_scheduler(STABLE_DIFFUSION, "StableDiffusionPipeline")
    model, _ = random_runs.random_model()
    process = make_process("scaled_linear", 1000, beta_start=0.00085, beta_end=0.012)
    model = replace(model, process=process, defaults=model.defaults._replace(solvers=solvers, sampler=own))
    if isinstance(solvers[solver], Solver):
        for steps in (10, 50):
            assert_inverted(model, solving_defaults(model, solver, steps))


@pytest.mark.parametrize("solver", SOLVERS)
def test_inversion_ends_at_the_first_of_listed_timesteps(solver):
    model, _ = random_runs.random_model()
    assert_inverted(model, solving_defaults(model, solver, 4)._replace(spacing=[14, 10, 6, 2]))


def test_inversion_of_steps_that_do_not_fit_is_refused():
    model, _ = random_runs.random_model()
    with pytest.raises(InputError, match=r"inversion: steps must lie in 1\.\.20"):
        inversion_table(model, solving_defaults(model, "ddim", 21))


def test_inversion_to_less_noise_than_timestep_0_has():
    """FlowMatchEulerDiscreteScheduler with a shift below 1."""
    process, flow = make_process("rectified_flow", 1000), FlowSpacing(shift=0.5)
    table = make_inversion_table(process, 10, solver="euler", spacing="flow", flow=flow)
    assert table.sigma[0] < process.sigma[0] and (np.diff(table.reached_sigma[:10]) > 0).all()


@pytest.mark.parametrize(("resample", "jump", "steps"), [(3, 4, 4), (2, 9, 4), (2, 1, 1)])
def test_resampling_of_nothing_is_refused(resample, jump, steps):
    model, _ = random_runs.random_model()
    edit = Edit(init_image="a.png", mask="m.png", resample=resample, resample_jump=jump)
    with pytest.raises(InputError, match=f"sampling: resampling by jumps of {jump} has no effect on {steps} steps"):
        make_table(model, solving_defaults(model, "ddpm", steps), edit)
    assert make_table(model, solving_defaults(model, "ddpm", 10), edit).rows > 10


@pytest.mark.parametrize(("solving", "edit", "message"), [
    ({"eta": 0.5}, {}, "eta is 0.5; it must be 0 for a MeanFlow model"),
    ({"threshold": 0.9}, {}, "threshold is 0.9; it must be 0 for a MeanFlow model"),
    ({}, {"resample": 2, "mask": "m.png"}, "resample is 2; it must be 1 for a MeanFlow model"),
])  # fmt: skip
def test_what_is_not_defined_for_mean_flow_is_refused(solving, edit, message):
    model, _ = random_runs.random_model(MEAN_FLOW)
    with pytest.raises(InputError, match=f"sampling: {message}"):
        make_table(model, solving_defaults(model, "ddim", 4)._replace(**solving), Edit(**edit))


MEAN_FLOW = FLOW | {"diffusion.objective": "mean_flow", "sampling.sampler": "ddim", "sampling.steps": 1}
