"""Our schedules, timesteps and solvers against diffusers' schedulers, where diffusers is right.

torch and diffusers are oracles and no requirement of the program: `make parity` installs them.
"""

import inspect

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity.fixed_network import (
    KEYS,
    Z_T,
    assert_same,
    network,
    row_noise,
    run_ours,
    run_reference,
    share_alpha_bar,
    solver,
    use_exact_kdpm2,
    variance_output,
)

from ldm_jax.diffusion.denoiser import from_network
from ldm_jax.diffusion.process import Process, forward_step, neighbours
from ldm_jax.diffusion.schedules import make_process
from ldm_jax.diffusion.solve import solve
from ldm_jax.diffusion.solvers import make_inversion_table, make_table
from ldm_jax.diffusion.spacing import timesteps

THEIR_SCHEDULE = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
THEIR_PREDICTION = {"eps": "epsilon", "v": "v_prediction", "z0": "sample"}


def scheduler(kind, schedule, *, zero_terminal_snr=False, spacing="leading", offset=0, prediction="eps", **options):
    """diffusers' scheduler, with the table of alpha_bar of a process, and that process."""
    options = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": THEIR_SCHEDULE[schedule],
        "prediction_type": THEIR_PREDICTION[prediction],
        "timestep_spacing": spacing,
        "steps_offset": offset,
        "rescale_betas_zero_snr": zero_terminal_snr,
        "clip_sample": False,
    } | options
    known = inspect.signature(kind).parameters
    assert all(name in known or value in (False, "leading", 0) for name, value in options.items())
    reference = kind(**{name: value for name, value in options.items() if name in known})
    ours = make_process(schedule, 1000, zero_terminal_snr=zero_terminal_snr)
    betas = forward_step(*neighbours(ours))[1]
    np.testing.assert_allclose(reference.betas.numpy(), betas, rtol=0, atol=1e-5)  # they are 1 - ratio in float32
    share_alpha_bar(reference, ours)
    return reference, ours


@pytest.mark.parametrize("spacing, offset", [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)])
def test_timesteps_for_every_number_of_steps(spacing, offset):
    reference, _ = scheduler(diffusers.DDIMScheduler, "linear", spacing=spacing, offset=offset)
    multistep, _ = scheduler(diffusers.DPMSolverMultistepScheduler, "linear", spacing=spacing, offset=offset)
    process = make_process("linear", 1000)
    for steps in range(1, 1000):
        reference.set_timesteps(steps)
        multistep.set_timesteps(steps)
        if multistep.timesteps[0] >= 1000 or reference.timesteps[0] >= 1000:
            assert steps == 999  # the offset leads out of range there, and is refused here
            continue
        # A float rounding gives diffusers' trailing a timestep too many, -1, for some numbers of steps.
        expected, expected_multistep = reference.timesteps.numpy()[:steps], multistep.timesteps.numpy()[:steps]
        np.testing.assert_array_equal(timesteps(spacing, 1000, steps, offset), expected, err_msg=str(steps))
        table = make_table("dpmpp_2m", process, steps, spacing=spacing, steps_offset=offset)
        np.testing.assert_array_equal(table.t[:steps], expected_multistep, err_msg=str(steps))


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("schedule", THEIR_SCHEDULE)
def test_schedules(schedule, zero_terminal_snr):
    scheduler(diffusers.DDIMScheduler, schedule, zero_terminal_snr=zero_terminal_snr)  # compares beta and alpha_bar


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", THEIR_PREDICTION)
@pytest.mark.parametrize(
    "schedule, spacing, steps",
    [("linear", "leading", 10), ("scaled_linear", "trailing", 7), ("cosine", "linspace", 20), ("linear", "leading", 1)],
)
def test_ddpm(schedule, spacing, steps, prediction, variance, same_noise):
    """Spacings that do not divide T are right in diffusers' DDPM, which looks up the next timestep."""
    same_noise("ddpm", steps)
    reference, ours = scheduler(
        diffusers.DDPMScheduler, schedule, spacing=spacing, prediction=prediction, variance_type=variance
    )
    expected = run_reference(reference, steps)
    if spacing == "trailing" and variance == "fixed_large":
        # Its last timestep is not 0, so diffusers adds noise of variance beta to the finished sample; Ho 2020 does not.
        expected = expected - ours.sigma[reference.timesteps[-1]] * row_noise(steps - 1)
    got = run_ours(ours, prediction, solver="ddpm", steps=steps, spacing=spacing, variance=variance)
    assert_same(got, expected)


@pytest.mark.parametrize("prediction", THEIR_PREDICTION)
@pytest.mark.parametrize("schedule, spacing, steps", [("linear", "leading", 10), ("cosine", "linspace", 20)])
def test_ddpm_with_a_learned_variance(schedule, spacing, steps, prediction, same_noise):
    """Spacings that end at timestep 0, where diffusers adds no noise. It has the channels at axis 1."""
    same_noise("ddpm", steps)
    reference, ours = scheduler(
        diffusers.DDPMScheduler, schedule, spacing=spacing, prediction=prediction, variance_type="learned_range"
    )
    reference.set_timesteps(steps)
    z = torch.from_numpy(Z_T)
    for t in reference.timesteps:
        outputs = [f(z.numpy(), float(t), np) for f in (network, variance_output)]
        z = reference.step(torch.from_numpy(np.concatenate(outputs, axis=1)), t, z).prev_sample.double()
    table = make_table("ddpm", ours, steps, prediction=prediction, spacing=spacing, variance="learned")
    wide = lambda z, t, _: jnp.concatenate([f(z, t.reshape(-1, 1, 1, 1)) for f in (network, variance_output)], -1)  # noqa: E731
    denoise = from_network(wide, prediction, ours)
    got, _ = jax.jit(lambda table: solve(lambda z, level: denoise(z, level, None), Z_T, table, KEYS))(table)
    assert_same(got, z.numpy())


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("prediction", THEIR_PREDICTION)
@pytest.mark.parametrize(
    "schedule, spacing, steps, offset, to_one",
    [
        ("scaled_linear", "leading", 5, 1, False),  # Stable Diffusion's
        ("linear", "leading", 30, 0, True),
        ("cosine", "trailing", 10, 0, True),  # where T is a multiple of steps, diffusers is right
        ("scaled_linear", "trailing", 1, 0, False),
    ],
)
def test_ddim(schedule, spacing, steps, offset, to_one, prediction, eta):
    reference, ours = scheduler(
        diffusers.DDIMScheduler,
        schedule,
        spacing=spacing,
        offset=offset,
        prediction=prediction,
        set_alpha_to_one=to_one,
    )
    expected = run_reference(reference, steps, eta=eta, variance_noise=lambda i: torch.from_numpy(row_noise(i)))
    got = run_ours(
        ours,
        prediction,
        solver="ddim",
        steps=steps,
        eta=eta,
        spacing=spacing,
        steps_offset=offset,
        set_alpha_to_one=to_one,
    )
    assert_same(got, expected)


@pytest.mark.parametrize("prediction", THEIR_PREDICTION)
@pytest.mark.parametrize("steps", [7, 30])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_ddim_with_eta_1_is_their_ddpm_where_their_ddim_is_wrong(spacing, steps, prediction, same_noise):
    """diffusers' DDIM takes t - T // steps for the previous timestep (diffusers#9261); at eta = 1 its DDPM judges."""
    same_noise("ddpm", steps)
    reference, ours = scheduler(diffusers.DDPMScheduler, "linear", spacing=spacing, prediction=prediction)
    expected = run_reference(reference, steps)
    assert_same(run_ours(ours, prediction, solver="ddim", steps=steps, eta=1.0, spacing=spacing), expected)


@pytest.mark.parametrize("prediction", THEIR_PREDICTION)
def test_ddim_clips_as_theirs_with_clipped_model_output(prediction):
    reference, ours = scheduler(diffusers.DDIMScheduler, "linear", prediction=prediction, clip_sample=True)
    expected = run_reference(reference, 10, use_clipped_model_output=True)
    assert_same(run_ours(ours, prediction, clip_range=1.0, solver="ddim", steps=10), expected)


@pytest.mark.parametrize("prediction", ["v", "z0"])
def test_ddim_at_zero_terminal_snr(prediction):
    reference, ours = scheduler(
        diffusers.DDIMScheduler, "scaled_linear", zero_terminal_snr=True, spacing="trailing", prediction=prediction
    )
    assert reference.alphas_cumprod[-1] == 0
    assert_same(run_ours(ours, prediction, solver="ddim", steps=8, spacing="trailing"), run_reference(reference, 8))


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("prediction", THEIR_PREDICTION)
@pytest.mark.parametrize(
    "schedule, spacing, steps, offset",
    [
        ("scaled_linear", "leading", 10, 1),
        ("linear", "linspace", 20, 0),
        ("linear", "trailing", 14, 0),
        ("scaled_linear", "linspace", 2, 0),
        ("scaled_linear", "trailing", 1, 0),
    ],
)
def test_dpmpp_2m(schedule, spacing, steps, offset, prediction, to_one):
    reference, ours = scheduler(
        diffusers.DPMSolverMultistepScheduler,
        schedule,
        spacing=spacing,
        offset=offset,
        prediction=prediction,
        final_sigmas_type="zero" if to_one else "sigma_min",
    )
    got = run_ours(
        ours,
        prediction,
        solver="dpmpp_2m",
        steps=steps,
        spacing=spacing,
        steps_offset=offset,
        set_alpha_to_one=to_one,
    )
    assert_same(got, run_reference(reference, steps))


@pytest.mark.parametrize("prediction", THEIR_PREDICTION)
def test_dpmpp_2m_at_zero_terminal_snr_with_their_floor(prediction):
    """diffusers lifts alpha_bar[T - 1] from 0 to 2^-24 in this solver. We take the limit; its floor is a schedule."""
    reference, ours = scheduler(
        diffusers.DPMSolverMultistepScheduler,
        "scaled_linear",
        zero_terminal_snr=True,
        spacing="trailing",
        prediction=prediction,
    )
    floored = Process.variance_preserving(np.maximum(ours.alpha**2, 2**-24))
    reference.alphas_cumprod = torch.from_numpy(floored.alpha**2)
    assert_same(
        run_ours(floored, prediction, solver="dpmpp_2m", steps=10, spacing="trailing"), run_reference(reference, 10)
    )


SCHEDULES = list(THEIR_SCHEDULE)
CONTINUOUS = {
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
    "kdpm2": diffusers.KDPM2DiscreteScheduler,
    "kdpm2_a": diffusers.KDPM2AncestralDiscreteScheduler,
}


PLACES = [("leading", 1, 10), ("trailing", 0, 7), ("linspace", 0, 20)]


@pytest.mark.parametrize(
    "prediction, schedule, spacing, offset, steps",
    [
        (prediction, schedule, *place)
        for prediction in ("eps", "v")
        for schedule in SCHEDULES
        for place in PLACES
        # diffusers' hold z / alpha in float32, 20,000 at the end of a cosine schedule: with v that costs them digits.
        if (prediction, schedule) != ("v", "cosine") or place[0] == "leading"
    ],
)
@pytest.mark.parametrize("solver", CONTINUOUS)
def test_k_diffusion(solver, prediction, schedule, spacing, offset, steps, same_noise):
    same_noise("euler_ancestral_discrete", steps)
    same_noise("k_dpm_2_ancestral_discrete", range(1, 2 * steps, 2))  # after every second call
    reference, ours = scheduler(CONTINUOUS[solver], schedule, spacing=spacing, offset=offset, prediction=prediction)
    if solver == "kdpm2_a" and schedule == "cosine":
        use_exact_kdpm2(reference)
    got = run_ours(ours, prediction, solver=solver, steps=steps, spacing=spacing, steps_offset=offset)
    assert_same(got, run_reference(reference, steps), solver)
    if solver not in ("euler", "euler_a"):
        calls = make_table(solver, ours, steps, spacing=spacing, steps_offset=offset).t[: len(reference.timesteps)]
        np.testing.assert_allclose(calls, reference.timesteps.numpy(), atol=1e-3)


SIGMAS = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
}


@pytest.mark.parametrize("between, offset", [("leading", 1), ("linspace", 0)])
@pytest.mark.parametrize("spacing", SIGMAS)
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("solver", ["euler", "heun", "lms", "kdpm2"])
def test_k_diffusion_with_sigmas(solver, prediction, schedule, spacing, between, offset):
    reference, ours = scheduler(
        CONTINUOUS[solver], schedule, spacing=between, offset=offset, prediction=prediction, **SIGMAS[spacing]
    )
    if (solver, spacing) == ("kdpm2", "karras"):
        use_exact_kdpm2(reference)
    got = run_ours(ours, prediction, solver=solver, steps=12, spacing=spacing, between=between, steps_offset=offset)
    assert_same(got, run_reference(reference, 12))


ENDPOINT = {
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_3m": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 3}),
    "dpmpp_2s": (diffusers.DPMSolverSinglestepScheduler, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
}


def assert_endpoint(solver, prediction, schedule, steps, same_noise, *, spacing, between="leading", **rest):
    same_noise("dpmsolver_multistep", steps)
    kind, options = ENDPOINT[solver]
    reference, ours = scheduler(kind, schedule, spacing=between, prediction=prediction, **options, **rest)
    got = run_ours(
        ours,
        prediction,
        solver=solver,
        steps=steps,
        spacing=spacing,
        steps_offset=rest.get("offset", 0),
        set_alpha_to_one=rest.get("final_sigmas_type", "zero") == "zero",
    )
    assert_same(got, run_reference(reference, steps), solver)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("spacing, offset, steps", PLACES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", THEIR_PREDICTION)
@pytest.mark.parametrize("solver", ["dpmpp_2m_sde", "dpmpp_3m", "unipc"])
def test_multistep(solver, prediction, schedule, spacing, offset, steps, final, same_noise):
    assert_endpoint(
        solver,
        prediction,
        schedule,
        steps,
        same_noise,
        spacing=spacing,
        between=spacing,
        offset=offset,
        final_sigmas_type=final,
    )


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 15])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", THEIR_PREDICTION)
def test_dpmpp_2s(prediction, schedule, steps, final, same_noise):
    """Its steps are linspace's, whatever its config says."""
    assert_endpoint("dpmpp_2s", prediction, schedule, steps, same_noise, spacing="linspace", final_sigmas_type=final)


@pytest.mark.parametrize("steps", [1, 2, 5, 12])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("solver", ENDPOINT)
def test_endpoint_solvers_with_karras_sigmas(solver, prediction, schedule, steps, same_noise):
    assert_endpoint(solver, prediction, schedule, steps, same_noise, spacing="karras", **SIGMAS["karras"])


@pytest.mark.parametrize("steps", [1, 2, 3, 12])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_dpmpp_2m_with_lu_lambdas_is_exponential(schedule, steps):
    """Even in lambda is even in log(sigma / alpha)."""
    reference, ours = scheduler(diffusers.DPMSolverMultistepScheduler, schedule, use_lu_lambdas=True)
    assert_same(
        run_ours(ours, "eps", solver="dpmpp_2m", steps=steps, spacing="exponential"), run_reference(reference, steps)
    )


@pytest.mark.parametrize("steps", [1, 2, 3, 14, 15, 20])
@pytest.mark.parametrize("spacing, offset", [("leading", 1), ("trailing", 0), ("linspace", 0)])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", THEIR_PREDICTION)
def test_deis(prediction, schedule, spacing, offset, steps):
    """diffusers' ends at timestep 0."""
    assert_deis(prediction, schedule, spacing, offset, steps, {"spacing": spacing})


@pytest.mark.parametrize("steps", [2, 3, 14, 15, 20])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", THEIR_PREDICTION)
def test_deis_with_karras_sigmas(prediction, schedule, steps):
    """diffusers' last step stands still at timestep 0."""
    assert_deis(prediction, schedule, "karras", 0, steps, SIGMAS["karras"])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", THEIR_PREDICTION)
def test_deis_in_one_step_with_karras_sigmas(prediction, schedule):
    """diffusers' step ends where it begins. Ours is DDIM's, as every solver's of first order, to timestep 0."""
    reference, ours = scheduler(diffusers.DEISMultistepScheduler, schedule, prediction=prediction, **SIGMAS["karras"])
    reference.set_timesteps(1)
    assert reference.sigmas[0] == reference.sigmas[1]
    options = {"steps": 1, "spacing": "karras", "set_alpha_to_one": False}
    deis, ddim = (run_ours(ours, prediction, solver=solver, **options) for solver in ("deis", "ddim"))
    assert_same(deis, ddim)


def assert_deis(prediction, schedule, spacing, offset, steps, fields):
    """Our samples and timesteps are those of diffusers' scheduler with these `fields`."""
    reference, ours = scheduler(
        diffusers.DEISMultistepScheduler, schedule, prediction=prediction, offset=offset, **fields
    )
    options = {"solver": "deis", "steps": steps, "spacing": spacing, "steps_offset": offset, "set_alpha_to_one": False}
    table = make_table(process=ours, **options)
    use_exact_sigmas(reference, table)
    # It begins at the second of two equal timesteps, as the first ones of Karras sigmas are, and ends in an IndexError.
    reference.index_for_timestep = lambda *_: 0
    got, expected = run_ours(ours, prediction, **options), run_reference(reference, steps)
    if (spacing, schedule, steps) == ("karras", "cosine", 3) and prediction != "eps":
        # Ours in float32 at sigma / alpha = 20,000; in float64 they are equal to 1e-11.
        np.testing.assert_allclose(got, expected, rtol=0, atol=5e-5 * max(1.0, np.abs(expected).max()))
    else:
        assert_same(got, expected)
    np.testing.assert_array_equal(table.t[:steps], reference.timesteps.numpy())


def use_exact_sigmas(reference, table):
    """Gives a scheduler the table's sigma / alpha in float64: its own, in float32, lose digits where alpha is small."""
    set_timesteps, rows = reference.set_timesteps, int(table.rows)

    def with_exact_sigmas(steps):
        set_timesteps(steps)
        exact = [
            *table.sigma[:rows] / table.alpha[:rows],
            table.reached_sigma[rows - 1] / table.reached_alpha[rows - 1],
        ]
        np.testing.assert_allclose(reference.sigmas.numpy(), exact, rtol=1e-5)
        reference.sigmas = torch.tensor(exact, dtype=torch.float64)

    reference.set_timesteps = with_exact_sigmas


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 10, 50])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("to_one, offset", [(True, 0), (False, 1)])
def test_plms(schedule, steps, to_one, offset):
    """eps only: of a v or z0 reference mixes the outputs at several z as if they were at one."""
    reference, ours = scheduler(
        diffusers.PNDMScheduler, schedule, offset=offset, skip_prk_steps=True, set_alpha_to_one=to_one
    )
    got = run_ours(ours, "eps", solver="plms", steps=steps, steps_offset=offset, set_alpha_to_one=to_one)
    assert_same(got, run_reference(reference, steps))


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", THEIR_PREDICTION)
def test_lcm(prediction, schedule, steps, same_noise):
    same_noise("lcm", steps)
    reference, ours = scheduler(diffusers.LCMScheduler, schedule, prediction=prediction)
    assert_same(run_ours(ours, prediction, solver="lcm", steps=steps), run_reference(reference, steps))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", THEIR_PREDICTION)
def test_tcd(prediction, schedule, steps, eta, same_noise):
    same_noise("tcd", steps)
    reference, ours = scheduler(diffusers.TCDScheduler, schedule, prediction=prediction)
    options = {"solver": "tcd", "steps": steps, "eta": eta, "set_alpha_to_one": False}
    assert_same(run_ours(ours, prediction, **options), run_reference(reference, steps, eta=eta))
    np.testing.assert_array_equal(make_table(process=ours, **options).t[:steps], reference.timesteps.numpy())


@pytest.mark.parametrize("spacing, offset, steps", [("leading", 0, 10), ("leading", 1, 20), ("trailing", 0, 8)])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", THEIR_PREDICTION)
def test_ddim_inversion(prediction, schedule, spacing, offset, steps):
    reference, ours = scheduler(
        diffusers.DDIMInverseScheduler,
        schedule,
        spacing=spacing,
        offset=offset,
        prediction=prediction,
        set_alpha_to_one=False,
    )
    reference.initial_alpha_cumprod = reference.alphas_cumprod[0]
    table = make_inversion_table(ours, steps, spacing=spacing, steps_offset=offset)
    got = np.asarray(solver(ours, prediction)(table, np.inf))
    assert_same(got, run_reference(reference, steps))
