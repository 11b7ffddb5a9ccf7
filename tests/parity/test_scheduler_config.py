"""Scheduler configs read here and by diffusers: the same latents from the same noise."""

import inspect
import json
from functools import partial
from itertools import product

import diffusers
import jax
import numpy as np
import pytest
import torch
from parity.fixed_network import (
    KEYS,
    SHAPE,
    Z_T,
    assert_same,
    network,
    row_noise,
    run_ours,
    run_reference,
    share_alpha_bar,
    solver,
    use_exact_kdpm2,
)
from scheduler_configs import EDM, PUBLISHED, clipped, initial_noise_scale, table_of

from ldm_jax.diffusion.denoiser import from_network
from ldm_jax.diffusion.schedules import cosine_betas, make_process
from ldm_jax.diffusion.solve import solve
from ldm_jax.diffusion.solvers import SOLVERS
from ldm_jax.interop.scheduler_config import config_from_schedule, edm_from_config, scheduler_from_config
from ldm_jax.interop.scheduler_fields import CLASS_OF, DEFAULTS, FIELDS_OF_SAMPLER, fields_of

NOISY = {
    "ddpm": "ddpm",
    "euler_a": "euler_ancestral_discrete",
    "dpmpp_2m_sde": "dpmsolver_multistep",
    "kdpm2_a": "k_dpm_2_ancestral_discrete",
    "lcm": "lcm",
    "tcd": "tcd",
}


def noisy_rows(sampler, steps):
    """The rows after which diffusers' adds noise: of kdpm2_a every second one."""
    return range(1, 2 * steps, 2) if sampler == "kdpm2_a" else range(steps)


def own_scheduler(config):
    return getattr(diffusers, config["_class_name"]).from_config(config)


def reference_scheduler(config, sampler):
    """As a user of diffusers takes another scheduler for a model's own."""
    stated = FIELDS_OF_SAMPLER.get(sampler, {})
    return getattr(diffusers, CLASS_OF[sampler]).from_config(own_scheduler(config).config, **stated)


def pipeline_start(reference):
    return reference.init_noise_sigma


def latents_of(ours, steps):
    table = table_of(ours, steps)
    return np.asarray(
        solver(ours.process, ours.prediction)(table, ours.clip_sample_range, Z_T * initial_noise_scale(ours, steps))
    )


def latents_of_both(config, sampler, steps, same_noise, correct=lambda reference: None):
    """The latents here, and those of the scheduler of diffusers after `correct(scheduler)`."""
    ours = scheduler_from_config(config, sampler)
    reference = own_scheduler(config) if sampler is None else reference_scheduler(config, sampler)
    correct(reference)
    if ours.sampler in NOISY:
        same_noise(NOISY[ours.sampler], noisy_rows(ours.sampler, steps))
    options = {"eta": 0.0} if ours.sampler == "tcd" else {}  # as in the pipelines
    if ours.sampler == "ddim" and np.isfinite(ours.clip_sample_range):
        options = {"use_clipped_model_output": True}
    return latents_of(ours, steps), run_reference(reference, steps, start=pipeline_start, **options)


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize(
    "model, sampler",
    [
        (model, sampler)
        for model, config in PUBLISHED.items()
        for sampler in (None, *SOLVERS)
        # PNDM is run with skip_prk_steps only, and with v reference errs.
        if sampler != "plms" or ("skip_prk_steps" in config and config.get("prediction_type") != "v_prediction")
    ],
)
def test_published_models(model, sampler, steps, same_noise):
    assert_same(*latents_of_both(PUBLISHED[model], sampler, steps, same_noise), sampler)


SPACED = [
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace", "use_karras_sigmas": True},
    {"use_karras_sigmas": True},
]
SPACED_SAMPLERS = (
    "euler", "euler_a", "heun", "lms", "kdpm2", "kdpm2_a", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "dpmpp_2s", "deis",
    "unipc",
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sampler", "steps"),
    [
        (change, sampler, steps)
        for change, sampler, steps in product(SPACED, SPACED_SAMPLERS, (1, 12))
        # diffusers' one step ends where it begins: see test_schedulers.test_deis_in_one_step_with_karras_sigmas.
        if (sampler, steps) != ("deis", 1) or "use_karras_sigmas" not in change
    ],
)
def test_spacings_and_the_noise_they_start_from(change, sampler, steps, same_noise):
    correct = {"correct": use_exact_kdpm2} if sampler.startswith("kdpm2") and "use_karras_sigmas" in change else {}
    assert_same(*latents_of_both(PUBLISHED["sdxl"] | change, sampler, steps, same_noise, **correct))


def with_rounded_timesteps(reference):
    """A scheduler of diffusers that rounds the timesteps of exponential and beta sigmas, which many there truncate."""
    to_t = reference._sigma_to_t
    reference._sigma_to_t = lambda *arguments: np.round(to_t(*arguments))
    return reference


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("field", ["use_beta_sigmas", "use_exponential_sigmas", "use_lu_lambdas"])
@pytest.mark.parametrize(
    "sampler",
    ["euler", "heun", "lms", "kdpm2", "kdpm2_a", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "dpmpp_2s", "deis", "unipc"],
)
def test_uneven_spacings(sampler, field, steps, same_noise):
    config = PUBLISHED["sdxl"] | {"_class_name": "DPMSolverMultistepScheduler", field: True}
    ours, reference = scheduler_from_config(config, sampler), reference_scheduler(config, sampler)
    lu = field == "use_lu_lambdas" and sampler.startswith("dpmpp_") and sampler != "dpmpp_2s"
    if field != "use_lu_lambdas" or lu:
        assert ours.options["spacing"] == ("beta" if field == "use_beta_sigmas" else "exponential")
    on_timesteps = sampler in ("deis", "unipc") or sampler.startswith("dpmpp_")
    if on_timesteps and not lu and field != "use_lu_lambdas":
        reference = with_rounded_timesteps(reference)
    if ours.sampler in NOISY:
        same_noise(NOISY[ours.sampler], noisy_rows(ours.sampler, steps))
    assert_same(latents_of(ours, steps), run_reference(reference, steps, start=pipeline_start), sampler)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 14, 15, 16])
@pytest.mark.parametrize("config", [{"solver_order": 3}, {"solver_order": 3, "final_sigmas_type": "sigma_min"}])
def test_own_scheduler_of_third_order(config, steps, same_noise):
    config = PUBLISHED["sdxl"] | {"_class_name": "DPMSolverMultistepScheduler"} | config
    assert scheduler_from_config(config).sampler == "dpmpp_3m"
    assert_same(*latents_of_both(config, None, steps, same_noise))


@pytest.mark.parametrize("steps", [1, 2, 5, 14, 15, 16])
@pytest.mark.parametrize(
    "name",
    ["LMSDiscreteScheduler", "DEISMultistepScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
     "TCDScheduler"],
)  # fmt: skip
def test_own_schedulers_with_their_own_defaults(name, steps, same_noise):
    sampler = {"KDPM2AncestralDiscreteScheduler": "kdpm2_a"}.get(name, "")
    assert_same(*latents_of_both({"_class_name": name}, None, steps, same_noise), sampler)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s", "unipc"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_the_end_at_sigma_min(spacing, sampler, same_noise):
    end = {"timestep_spacing": spacing, "final_sigmas_type": "sigma_min"}
    config = PUBLISHED["sdxl"] | {"_class_name": "DPMSolverMultistepScheduler"} | end
    for steps in (6, 15, 16):
        assert_same(*latents_of_both(config, sampler, steps, same_noise))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "lcm", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "euler", "euler_a"])
def test_zero_terminal_snr(sampler, same_noise):
    config = PUBLISHED["sd21_v"] | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    got, expected = latents_of_both(config, sampler, 10, same_noise)
    # With the floor z / alpha is 4096 at first; k-diffusion's samplers hold it in float32 and keep fewer digits.
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-3 if "euler" in sampler else 1e-5)


@pytest.mark.parametrize("sampler", ["ddpm", "lcm", "dpmpp_2m", "unipc"])
def test_dynamic_thresholding(sampler, same_noise):
    thresholds = {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5}
    config = PUBLISHED["ldm_celebahq"] | thresholds
    ours, reference = scheduler_from_config(config, sampler), reference_scheduler(config, sampler)
    share_alpha_bar(reference, ours.process)
    if sampler in NOISY:
        same_noise(NOISY[sampler], 8)
    denoise = from_network(lambda z, t, _: network(z, t.reshape(-1, 1, 1, 1)), ours.prediction, ours.process)
    bounded = clipped(ours, lambda z, level: denoise(z, level, None))
    got, _ = jax.jit(lambda table: solve(bounded, Z_T, table, KEYS))(table_of(ours, 8))
    assert_same(got, run_reference(reference, 8, start=pipeline_start))


@pytest.mark.parametrize("model", ["sd21_v", "x4_upscaler"])
def test_plms_of_v_is_theirs_of_the_eps_that_v_means(model):
    ours = scheduler_from_config(PUBLISHED[model], "plms")
    reference = diffusers.PNDMScheduler.from_config(own_scheduler(PUBLISHED[model]).config, prediction_type="epsilon")
    share_alpha_bar(reference, ours.process)

    def eps(z, t, xp):
        return ours.process.alpha[int(t)] * network(z, t, xp) + ours.process.sigma[int(t)] * z

    assert_same(latents_of(ours, 10), run_reference(reference, 10, network=eps))


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("model", ["sd15", "sd21_v"])
def test_tcd_with_eta(model, eta, same_noise):
    ours, reference = (make(PUBLISHED[model], "tcd") for make in (scheduler_from_config, reference_scheduler))
    share_alpha_bar(reference, ours.process)
    same_noise("tcd", 8)
    expected = run_reference(reference, 8, eta=eta)
    got = solver(ours.process, ours.prediction)(table_of(ours, 8, eta=eta), ours.clip_sample_range)
    assert_same(np.asarray(got), expected)


def test_ddim_with_eta(same_noise):
    ours, reference = (make(PUBLISHED["sd15"], "ddim") for make in (scheduler_from_config, reference_scheduler))
    share_alpha_bar(reference, ours.process)
    expected = run_reference(reference, 10, eta=0.7, variance_noise=lambda i: torch.from_numpy(row_noise(i)))
    got = solver(ours.process, ours.prediction)(table_of(ours, 10, eta=0.7), ours.clip_sample_range)
    assert_same(np.asarray(got), expected)


EDM_CHANGES = [
    (model, change)
    for model, config in EDM.items()
    for change in (
        {}, {"solver_order": 3}, {"algorithm_type": "sde-dpmsolver++"}, {"lower_order_final": False},
        {"lower_order_final": False, "euler_at_final": True},
    )
    if not change or "DPMSolver" in config["_class_name"]  # whose fields these are
]  # fmt: skip
# The only step of diffusers' exponential schedule is at sigma_min.
EDM_STEPS = [("karras", 1), *((spacing, n) for spacing in ("karras", "exponential") for n in (2, 5, 14, 15, 20))]


@pytest.mark.parametrize("spacing, steps", EDM_STEPS)
@pytest.mark.parametrize("model, change", EDM_CHANGES)
def test_edm_models(model, spacing, change, steps, same_noise):
    """The initial noise is of our scale, sqrt(sigma_max^2 + sigma_data^2); a network of c_noise, which both have."""
    config = EDM[model] | {"sigma_schedule": spacing} | change
    if config.get("algorithm_type") == "sde-dpmsolver++":
        same_noise("edm_dpmsolver_multistep", steps)
    ours, edm = scheduler_from_config(config), edm_from_config(config)

    def of_c_noise(z, c_noise, xp=jax.numpy):
        return network(z, 100 * c_noise, xp)

    expected = run_reference(
        own_scheduler(config),
        steps,
        start=lambda reference: np.hypot(edm.sigma_max, edm.sigma_data),
        network=of_c_noise,
    )
    denoise = from_network(
        lambda z, t, _: of_c_noise(z, edm.c_noise(t).reshape(-1, 1, 1, 1)), ours.prediction, ours.process
    )
    got, _ = jax.jit(lambda table: solve(lambda *at: denoise(*at, None), Z_T, table, KEYS))(table_of(ours, steps))
    assert got.shape == (2, *SHAPE)
    assert_same(edm.sigma_data * np.asarray(got), expected, ours.sampler)


def test_the_scale_of_edms_initial_noise_in_diffusers():
    """That of data of standard deviation 1, whatever sigma_data is."""
    for config, off in zip(EDM.values(), (5.9e-5, 0)):
        edm = edm_from_config(config)
        ratio = own_scheduler(config).init_noise_sigma / np.hypot(edm.sigma_max, edm.sigma_data)
        assert ratio == pytest.approx(1 + off, abs=1e-6)


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_the_class(name):
    parameters = inspect.signature(getattr(diffusers, name)).parameters
    assert {field: parameter.default for field, parameter in parameters.items()} == DEFAULTS[name]


ODD = {
    "old DDIM": {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"},
    "DPM-Solver": {
        "_class_name": "DPMSolverMultistepScheduler",
        "thresholding": True,
        "final_sigmas_type": "sigma_min",
        "timestep_spacing": "trailing",
        "use_karras_sigmas": True,
        "variance_type": None,
    },
    "Heun": {"_class_name": "HeunDiscreteScheduler", "clip_sample": True, "clip_sample_range": 2.0, "not_a_field": 3},
    "LCM": {"_class_name": "LCMScheduler", "steps_offset": 1, "set_alpha_to_one": False},
    "UniPC": {"_class_name": "UniPCMultistepScheduler", "rescale_betas_zero_snr": True, "solver_order": 3},
    "DEIS": {"_class_name": "DEISMultistepScheduler", "beta_end": 0.01, "solver_order": 3},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_fields_that_carry_over(name):
    for config in (PUBLISHED | ODD).values():
        reference = getattr(diffusers, name).from_config(own_scheduler(config).config).config
        ours = fields_of(config, name)
        assert {field: reference[field] for field in DEFAULTS[name]} == {field: ours[field] for field in DEFAULTS[name]}


@pytest.mark.parametrize(
    "kind", ["StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"]
)
@pytest.mark.parametrize(
    "config", [ODD["old DDIM"], ODD["old DDIM"] | {"steps_offset": 0, "clip_sample": True}, PUBLISHED["sd15"]]
)
def test_pipelines_that_change_their_schedulers_config(config, kind):
    parts = ("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor")
    pipeline = getattr(diffusers, kind)(
        **dict.fromkeys(parts), scheduler=own_scheduler(config), requires_safety_checker=False
    )
    read = partial(scheduler_from_config, config, pipeline=kind)
    for reference, ours in [
        (pipeline.scheduler, read()),
        (diffusers.DDIMScheduler.from_config(pipeline.scheduler.config), read("ddim")),
        (diffusers.LCMScheduler.from_config(pipeline.scheduler.config), read("lcm")),
    ]:
        assert reference.config.steps_offset == ours.options["steps_offset"]
        assert reference.config.clip_sample == np.isfinite(ours.clip_sample_range)


def test_cosine_is_theirs_to_a_rounding():
    reference = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2").betas.numpy()
    np.testing.assert_array_max_ulp(cosine_betas(1000).astype(np.float32), reference, maxulp=1)


AT_T_0 = ("deis", "tcd")  # diffusers' end there, and never on clean data
EXPORTS = [
    *((sampler, "leading", "scaled_linear", "v") for sampler in SOLVERS if sampler not in ("dpmpp_2s", "plms")),
    *((sampler, "leading", "cosine", "eps") for sampler in SOLVERS if sampler != "dpmpp_2s"),
    *((sampler, "exponential", "linear", "eps") for sampler in ("dpmpp_2m", "dpmpp_3m", "lms")),
    *((sampler, "beta", "linear", "eps") for sampler in ("euler", "heun", "lms", "kdpm2")),
    *((sampler, "trailing", "linear", "eps") for sampler in ("ddpm", "ddim", "euler", "dpmpp_2m", "unipc")),
    *((sampler, "karras", "linear", "eps") for sampler in ("euler", "heun", "dpmpp_2m", "dpmpp_2s", "unipc")),
    ("euler", "exponential", "linear", "eps"),
    ("dpmpp_2s", "linspace", "linear", "z0"),
]


@pytest.mark.parametrize("sampler, spacing, schedule, prediction", EXPORTS)
def test_exported_configs_in_diffusers(sampler, spacing, schedule, prediction, tmp_path, same_noise):
    betas = {"beta_start": 0.00085, "beta_end": 0.012}
    config = config_from_schedule(
        schedule, 1000, **betas, zero_terminal_snr=False, prediction=prediction, sampler=sampler, spacing=spacing,
        set_alpha_to_one=sampler not in AT_T_0,
    )  # fmt: skip
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    reference = getattr(diffusers, config["_class_name"]).from_pretrained(tmp_path)
    ours = make_process(schedule, 1000, **betas)
    share_alpha_bar(reference, ours)
    if sampler in NOISY:
        same_noise(NOISY[sampler], noisy_rows(sampler, 10))
    options = {"eta": 0.0} if sampler == "tcd" else {}
    got = run_ours(ours, prediction, solver=sampler, steps=10, spacing=spacing, set_alpha_to_one=sampler not in AT_T_0)
    assert_same(got, run_reference(reference, 10, **options))


@pytest.mark.parametrize("prediction", ["v", "z0"])
def test_exported_zero_terminal_snr_in_diffusers(prediction, tmp_path):
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "zero_terminal_snr": True}
    config = config_from_schedule("linear", 1000, **betas, prediction=prediction, spacing="trailing")
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    reference, ours = diffusers.DDIMScheduler.from_pretrained(tmp_path), make_process("linear", 1000, **betas)
    share_alpha_bar(reference, ours)
    assert_same(run_ours(ours, prediction, solver="ddim", steps=10, spacing="trailing"), run_reference(reference, 10))
