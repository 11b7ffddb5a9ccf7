"""Our schedules, timesteps and solvers against diffusers' schedulers, where diffusers is right.

torch and diffusers are oracles and no requirement of the program: `make parity` installs them.
"""

from functools import cache

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ldm_jax.diffusion.guidance import clip_z0, from_network
from ldm_jax.diffusion.schedules import make_schedule, timesteps
from ldm_jax.diffusion.solvers import make_table, sample_keys, solve

THEIR_SCHEDULE = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
THEIR_PREDICTION = {"eps": "epsilon", "v": "v_prediction", "z0": "sample"}
SHAPE = (4, 4, 3)
KEYS = sample_keys(0, jnp.arange(2))
Z_T = np.random.default_rng(0).standard_normal((2, *SHAPE))


def network(z_t, t, xp=jnp):
    """A fixed linear network, different for each t and entry."""
    gain = 0.5 + 0.3 * xp.sin(xp.arange(SHAPE[-1]) + 0.01 * t)
    return gain * z_t + 0.1


def row_noise(i):
    return np.stack([jax.random.normal(jax.random.fold_in(key, i), SHAPE) for key in KEYS]).astype(np.float64)


def scheduler(kind, schedule, *, zero_terminal_snr=False, spacing="leading", offset=0, prediction="eps", **options):
    """Theirs, with its table of alpha_bar made again in float64 so that rounding does not hide a real difference."""
    options.setdefault("clip_sample", False)
    if kind is diffusers.DPMSolverMultistepScheduler:
        del options["clip_sample"]
    theirs = kind(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule=THEIR_SCHEDULE[schedule],
        prediction_type=THEIR_PREDICTION[prediction],
        timestep_spacing=spacing,
        steps_offset=offset,
        rescale_betas_zero_snr=zero_terminal_snr,
        **options,
    )
    ours = make_schedule(schedule, 1000, zero_terminal_snr=zero_terminal_snr)
    np.testing.assert_allclose(theirs.betas.numpy(), ours.beta, rtol=0, atol=1e-5)  # theirs are 1 - ratio in float32
    if not (zero_terminal_snr and kind is diffusers.DPMSolverMultistepScheduler):
        np.testing.assert_allclose(theirs.alphas_cumprod.numpy(), ours.alpha_bar, rtol=0, atol=1e-5)
    theirs.alphas_cumprod = torch.from_numpy(ours.alpha_bar)
    if hasattr(theirs, "final_alpha_cumprod") and not options.get("set_alpha_to_one", True):
        theirs.final_alpha_cumprod = theirs.alphas_cumprod[0]
    return theirs, ours


def run_theirs(theirs, steps, **step_options):
    theirs.set_timesteps(steps)
    z = torch.from_numpy(Z_T)
    for i, t in enumerate(theirs.timesteps):
        options = {name: value(i) if callable(value) else value for name, value in step_options.items()}
        z = theirs.step(torch.from_numpy(network(z.numpy(), int(t), np)), t, z, **options).prev_sample.double()
    return z.numpy()


@cache
def solver(alpha_bar, prediction):
    denoise = from_network(lambda z, t, _: network(z, t.reshape(-1, 1, 1, 1)), prediction, np.array(alpha_bar))
    return jax.jit(lambda table, bound: solve(clip_z0(lambda z, t: denoise(z, t, None), bound), Z_T, table, KEYS)[0])


def run_ours(schedule, prediction, bound=np.inf, **options):
    table = make_table(schedule=schedule, prediction=prediction, **options)
    return np.asarray(solver(tuple(schedule.alpha_bar), prediction)(table, bound))


def assert_same(ours, theirs):
    """1e-5 of the largest value: eps prediction divides by sqrt(alpha_bar), which makes large intermediate values."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(1.0, np.abs(theirs).max()))


@pytest.mark.parametrize("spacing, offset", [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)])
def test_timesteps_for_every_number_of_steps(spacing, offset):
    theirs, _ = scheduler(diffusers.DDIMScheduler, "linear", spacing=spacing, offset=offset)
    multistep, _ = scheduler(diffusers.DPMSolverMultistepScheduler, "linear", spacing=spacing, offset=offset)
    schedule = make_schedule("linear", 1000)
    for steps in range(1, 1000):
        theirs.set_timesteps(steps)
        multistep.set_timesteps(steps)
        if multistep.timesteps[0] >= 1000 or theirs.timesteps[0] >= 1000:
            assert steps == 999  # the offset leads out of range there, and is refused here
            continue
        # A float rounding gives their trailing a timestep too many, -1, for some numbers of steps.
        expected, expected_multistep = theirs.timesteps.numpy()[:steps], multistep.timesteps.numpy()[:steps]
        np.testing.assert_array_equal(timesteps(spacing, 1000, steps, offset), expected, err_msg=str(steps))
        table = make_table("dpmpp_2m", schedule, steps, spacing=spacing, steps_offset=offset)
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
def test_ddpm(schedule, spacing, steps, prediction, variance, monkeypatch):
    """Spacings that do not divide T are right in diffusers' DDPM, which looks up the next timestep."""
    rows = iter(range(steps))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: torch.from_numpy(row_noise(next(rows)))
    )
    theirs, ours = scheduler(
        diffusers.DDPMScheduler, schedule, spacing=spacing, prediction=prediction, variance_type=variance
    )
    expected = run_theirs(theirs, steps)
    if spacing == "trailing" and variance == "fixed_large":
        # Its last timestep is not 0, so diffusers adds noise of variance beta to the finished sample; Ho 2020 does not.
        expected = expected - np.sqrt(1 - ours.alpha_bar[theirs.timesteps[-1]]) * row_noise(steps - 1)
    got = run_ours(ours, prediction, solver="ddpm", steps=steps, spacing=spacing, variance=variance)
    assert_same(got, expected)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("prediction", THEIR_PREDICTION)
@pytest.mark.parametrize(
    "schedule, spacing, steps, offset, to_one",
    [
        ("scaled_linear", "leading", 5, 1, False),  # Stable Diffusion's
        ("linear", "leading", 30, 0, True),
        ("cosine", "trailing", 10, 0, True),  # where T is a multiple of steps, theirs is right
        ("scaled_linear", "trailing", 1, 0, False),
    ],
)
def test_ddim(schedule, spacing, steps, offset, to_one, prediction, eta):
    theirs, ours = scheduler(
        diffusers.DDIMScheduler,
        schedule,
        spacing=spacing,
        offset=offset,
        prediction=prediction,
        set_alpha_to_one=to_one,
    )
    expected = run_theirs(theirs, steps, eta=eta, variance_noise=lambda i: torch.from_numpy(row_noise(i)))
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
def test_ddim_with_eta_1_is_their_ddpm_where_their_ddim_is_wrong(spacing, steps, prediction, monkeypatch):
    """diffusers' DDIM takes t - T // steps for the previous timestep (diffusers#9261); at eta = 1 its DDPM judges."""
    rows = iter(range(steps))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: torch.from_numpy(row_noise(next(rows)))
    )
    theirs, ours = scheduler(diffusers.DDPMScheduler, "linear", spacing=spacing, prediction=prediction)
    expected = run_theirs(theirs, steps)
    assert_same(run_ours(ours, prediction, solver="ddim", steps=steps, eta=1.0, spacing=spacing), expected)


@pytest.mark.parametrize("prediction", THEIR_PREDICTION)
def test_ddim_clips_as_theirs_with_clipped_model_output(prediction):
    theirs, ours = scheduler(diffusers.DDIMScheduler, "linear", prediction=prediction, clip_sample=True)
    expected = run_theirs(theirs, 10, use_clipped_model_output=True)
    assert_same(run_ours(ours, prediction, bound=1.0, solver="ddim", steps=10), expected)


@pytest.mark.parametrize("prediction", ["v", "z0"])
def test_ddim_at_zero_terminal_snr(prediction):
    theirs, ours = scheduler(
        diffusers.DDIMScheduler, "scaled_linear", zero_terminal_snr=True, spacing="trailing", prediction=prediction
    )
    assert theirs.alphas_cumprod[-1] == 0
    assert_same(run_ours(ours, prediction, solver="ddim", steps=8, spacing="trailing"), run_theirs(theirs, 8))


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
    theirs, ours = scheduler(
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
    assert_same(got, run_theirs(theirs, steps))


@pytest.mark.parametrize("prediction", THEIR_PREDICTION)
def test_dpmpp_2m_at_zero_terminal_snr_with_their_floor(prediction):
    """diffusers lifts alpha_bar[T - 1] from 0 to 2^-24 in this solver. We take the limit; their floor is a schedule."""
    theirs, ours = scheduler(
        diffusers.DPMSolverMultistepScheduler,
        "scaled_linear",
        zero_terminal_snr=True,
        spacing="trailing",
        prediction=prediction,
    )
    floored = ours._replace(alpha_bar=np.maximum(ours.alpha_bar, 2**-24))
    theirs.alphas_cumprod = torch.from_numpy(floored.alpha_bar)
    assert_same(run_ours(floored, prediction, solver="dpmpp_2m", steps=10, spacing="trailing"), run_theirs(theirs, 10))
