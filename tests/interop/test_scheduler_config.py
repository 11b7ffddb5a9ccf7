"""Scheduler configs: published ones, values that are not supported, and export."""

import jax.numpy as jnp
import numpy as np
import pytest
from scheduler_configs import EDM, PUBLISHED, clipped, initial_noise_scale, table_of

from ldm_jax.diffusion.forward import NoiseLevel
from ldm_jax.diffusion.schedules import BETAS, make_process
from ldm_jax.diffusion.solvers import SOLVERS, make_table
from ldm_jax.diffusion.spacing import SPACINGS
from ldm_jax.errors import InputError
from ldm_jax.interop.scheduler_config import config_from_schedule, edm_from_config, scheduler_from_config

SD_END = {"spacing": "leading", "between": "leading", "steps_offset": 1, "set_alpha_to_one": False}
PLAIN = {"spacing": "leading", "between": "leading", "steps_offset": 0, "set_alpha_to_one": True}
LINSPACE = {"spacing": "linspace", "between": "linspace", "steps_offset": 0, "set_alpha_to_one": True}


def timesteps(scheduler, steps):
    table = table_of(scheduler, steps)
    return table.t[: table.rows].tolist()


@pytest.mark.parametrize(
    "model, sampler, prediction, options, last_alpha_bar",
    [
        ("sd15", "plms", "eps", SD_END, 0.004660),
        ("sd21_v", "ddim", "v", SD_END, 0.004660),
        ("sdxl", "euler", "eps", SD_END | {"set_alpha_to_one": True}, 0.004660),
        ("sd15_inpainting", "ddim", "eps", SD_END, 0.004660),
        ("sd2_inpainting", "plms", "eps", SD_END, 0.004660),
        ("x4_upscaler", "ddim", "v", SD_END, 0.0007334),
        ("x4_upscaler_low_res", "ddpm", "eps", PLAIN | {"variance": "fixed_small"}, 0.0007334),
        ("ldm_celebahq", "ddim", "eps", PLAIN, 0.0001423),
        ("dit", "ddim", "eps", PLAIN, 0.00004036),
    ],
)
def test_published_models(model, sampler, prediction, options, last_alpha_bar):
    scheduler = scheduler_from_config(PUBLISHED[model])
    assert (scheduler.sampler, scheduler.prediction, scheduler.options) == (sampler, prediction, options)
    assert len(scheduler.process) == 1000
    assert scheduler.process.alpha[-1] ** 2 == pytest.approx(last_alpha_bar, rel=1e-3)
    assert scheduler.clip_sample_range == (1.0 if model == "x4_upscaler_low_res" else np.inf)
    assert scheduler.threshold is None
    assert initial_noise_scale(scheduler, 5) == 1.0


def test_timesteps_of_stable_diffusion():
    assert timesteps(scheduler_from_config(PUBLISHED["sd15_inpainting"]), 5) == [801, 601, 401, 201, 1]
    assert timesteps(scheduler_from_config(PUBLISHED["sd15"]), 5) == [801, 601, 601, 401, 201, 1]
    assert timesteps(scheduler_from_config(PUBLISHED["sdxl"]), 2) == [501, 1]
    assert timesteps(scheduler_from_config(PUBLISHED["sdxl"], "unipc"), 4) == [801, 601, 401, 201]


def test_another_sampler_has_its_own_defaults():
    """SD1.5's file says nothing of spacing, so that its PNDM has leading and Euler linspace."""
    scheduler = scheduler_from_config(PUBLISHED["sd15"], "euler")
    assert scheduler.options == LINSPACE | {"steps_offset": 1}
    assert table_of(scheduler, 3).t[:3].tolist() == [999, 499.5, 0]
    assert scheduler_from_config(PUBLISHED["sdxl"], "euler_a").options["spacing"] == "leading"
    assert scheduler_from_config({"_class_name": "PNDMScheduler"}, "ddim").clip_sample_range == 1.0
    assert scheduler_from_config({"_class_name": "EulerDiscreteScheduler"}, "heun").process.sigma[
        0
    ] ** 2 == pytest.approx(0.00085)


def test_a_field_of_another_class_carries_over():
    """PNDM has no clip_sample, but SD1.5's file states it, for DDIM."""
    assert scheduler_from_config(PUBLISHED["sd15"], "ddim").clip_sample_range == np.inf
    assert scheduler_from_config(PUBLISHED["sd15"], "ddim").options == SD_END


def test_every_sampler_of_every_published_model():
    for model, config in PUBLISHED.items():
        for sampler in SOLVERS:
            if sampler == "plms" and "skip_prk_steps" not in config:
                with pytest.raises(InputError, match="skip_prk_steps = False is not supported; supported: True"):
                    scheduler_from_config(config, sampler)
                continue
            scheduler = scheduler_from_config(config, sampler)
            assert scheduler.sampler == sampler, model
            assert np.isfinite(table_of(scheduler, 5).weights).all()


def test_the_pipelines_of_stable_diffusion_have_their_own_offset_and_clipping():
    old = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}
    scheduler = scheduler_from_config(old, pipeline="StableDiffusionPipeline")
    assert scheduler.clip_sample_range == np.inf
    assert scheduler.options["steps_offset"] == 1
    assert scheduler_from_config(old).clip_sample_range == 1.0
    assert scheduler_from_config(old).options["steps_offset"] == 0
    # As diffusers takes the pipeline's values for defaults, another class does not hear of them, unless the file spoke.
    assert scheduler_from_config(old, "lcm", pipeline="StableDiffusionPipeline").options["steps_offset"] == 0
    stated = old | {"steps_offset": 0}
    assert scheduler_from_config(stated, "lcm", pipeline="StableDiffusionPipeline").options["steps_offset"] == 1
    pndm = {"_class_name": "PNDMScheduler"}
    assert scheduler_from_config(pndm, pipeline="StableDiffusionInpaintPipeline").sampler == "plms"
    with pytest.raises(InputError, match="skip_prk_steps"):
        scheduler_from_config(pndm, pipeline="StableDiffusionPipeline")


def test_start_is_the_first_level_of_data_that_are_0_unless_spacing_is_leading():
    for sampler in ("euler", "euler_a", "heun", "edm"):
        scheduler = scheduler_from_config(PUBLISHED["sd15"], sampler)
        assert initial_noise_scale(scheduler, 5) == pytest.approx((1 - 0.004660) ** 0.5, abs=1e-6)
        assert initial_noise_scale(scheduler, 1) == pytest.approx(0.00085**0.5)  # linspace alone ends at 0: begins
        leading = scheduler_from_config(PUBLISHED["sdxl"], sampler)
        assert initial_noise_scale(leading, 5) == 1.0
    for sampler in ("dpmpp_2m", "unipc", "ddim", "lcm"):
        scheduler = scheduler_from_config(PUBLISHED["sd15"], sampler)
        assert initial_noise_scale(scheduler, 5) == 1.0


def test_algorithm_type_and_sampler():
    sde = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}
    assert scheduler_from_config(sde).sampler == "dpmpp_2m_sde"
    assert scheduler_from_config(sde | {"algorithm_type": "dpmsolver++"}).sampler == "dpmpp_2m"
    assert scheduler_from_config(sde | {"algorithm_type": "deis"}).sampler == "dpmpp_2m"
    assert scheduler_from_config(sde, "dpmpp_2m").sampler == "dpmpp_2m"
    assert scheduler_from_config(sde, "dpmpp_2s").sampler == "dpmpp_2s"
    old = sde | {"algorithm_type": "dpmsolver"}
    assert scheduler_from_config(old, "dpmpp_2m_sde").sampler == "dpmpp_2m_sde"


@pytest.mark.parametrize(
    "field, spacing",
    [("use_karras_sigmas", "karras"), ("use_exponential_sigmas", "exponential"), ("use_beta_sigmas", "beta")],
)
def test_uneven_sigmas(field, spacing):
    config = PUBLISHED["sdxl"] | {field: True}
    assert scheduler_from_config(config).options == PLAIN | {"spacing": spacing, "steps_offset": 1}
    assert scheduler_from_config(config, "dpmpp_2m").options["spacing"] == spacing
    assert scheduler_from_config(config, "ddim").options["spacing"] == "leading"  # has no such field
    with pytest.raises(InputError, match=r"sigma_max = 80\.0 is not supported"):
        scheduler_from_config(config | {"sigma_max": 80.0})


def test_lu_lambdas_are_exponential_sigmas_of_one_class():
    config = DPM | {"use_lu_lambdas": True}
    for sampler in ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m"):
        assert scheduler_from_config(config, sampler).options["spacing"] == "exponential"
    assert scheduler_from_config(config, "unipc").options["spacing"] == "linspace"  # has no such field
    assert scheduler_from_config(config | {"use_karras_sigmas": True}).options["spacing"] == "karras"
    exported = config_from_schedule("linear", **OURS, sampler="dpmpp_2m", spacing="exponential")
    assert exported["use_lu_lambdas"] and exported["use_exponential_sigmas"]
    assert scheduler_from_config(exported, "unipc").options["spacing"] == "exponential"


def test_orders_of_dpm_solver():
    assert scheduler_from_config(DPM | {"solver_order": 3}).sampler == "dpmpp_3m"
    assert scheduler_from_config(DPM | {"solver_order": 3}, "dpmpp_2m").sampler == "dpmpp_2m"
    assert scheduler_from_config(DPM, "dpmpp_3m").sampler == "dpmpp_3m"
    config = config_from_schedule("linear", **OURS, sampler="dpmpp_3m")
    assert (config["solver_order"], config["algorithm_type"]) == (3, "dpmsolver++")


def test_what_a_class_does_whatever_its_fields_say():
    """TCD never clips, and like DEIS it ends at timestep 0; LCM ends on clean data."""
    stated = PUBLISHED["sd15"] | {"clip_sample": True, "set_alpha_to_one": True, "thresholding": True}
    for sampler in ("tcd", "deis"):
        assert not scheduler_from_config(stated | {"thresholding": False}, sampler).options["set_alpha_to_one"]
    tcd = scheduler_from_config(stated, "tcd")
    assert tcd.clip_sample_range == np.inf and tcd.threshold is None
    assert scheduler_from_config(PUBLISHED["sd15"], "lcm").options["set_alpha_to_one"]


def test_the_end():
    dpm = {"_class_name": "DPMSolverMultistepScheduler", "final_sigmas_type": "sigma_min"}
    assert not scheduler_from_config(dpm).options["set_alpha_to_one"]
    assert not scheduler_from_config(dpm, "unipc").options["set_alpha_to_one"]
    assert not scheduler_from_config(dpm, "dpmpp_2s").options["set_alpha_to_one"]
    assert scheduler_from_config(dpm, "ddim").options["set_alpha_to_one"]
    assert scheduler_from_config(PUBLISHED["sd15"], "lcm").options["set_alpha_to_one"]
    whole = {"_class_name": "DPMSolverMultistepScheduler", "lower_order_final": False, "euler_at_final": True}
    assert scheduler_from_config(whole).options["set_alpha_to_one"]  # at sigma 0 these two say nothing


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "lcm"])
def test_zero_terminal_snr(sampler):
    config = PUBLISHED["sd21_v"] | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert scheduler_from_config(config, sampler).process.alpha[-1] == 0
    with pytest.raises(InputError, match="eps"):
        scheduler_from_config(config | {"prediction_type": "epsilon"}, sampler)


@pytest.mark.parametrize("sampler", ["euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "unipc"])
def test_zero_terminal_snr_with_a_floor(sampler):
    config = PUBLISHED["sd21_v"] | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    process = scheduler_from_config(config, sampler).process
    assert process.alpha[-1] == 2**-12
    np.testing.assert_allclose(process.alpha**2 + process.sigma**2, 1, rtol=1e-9)


@pytest.mark.parametrize("sampler", ["heun", "plms", "dpmpp_2s"])
def test_classes_that_cannot_rescale(sampler):
    config = PUBLISHED["sd21_v"] | {"rescale_betas_zero_snr": True}
    assert scheduler_from_config(config, sampler).process.alpha[-1] ** 2 == pytest.approx(0.00466, rel=1e-3)


def test_trained_betas():
    beta = np.linspace(0.01, 0.3, 20)
    config = {"_class_name": "DDIMScheduler", "trained_betas": beta.tolist(), "num_train_timesteps": 20}
    np.testing.assert_allclose(scheduler_from_config(config).process.alpha ** 2, np.cumprod(1 - beta), rtol=1e-12)
    rescaled = config | {"rescale_betas_zero_snr": True, "prediction_type": "sample"}
    assert scheduler_from_config(rescaled).process.alpha[-1] == 0
    for wrong in (beta[:-1].tolist(), [0.0, *beta[1:]], "many"):
        with pytest.raises(InputError):
            scheduler_from_config(config | {"trained_betas": wrong})


@pytest.mark.parametrize(
    "variance_type, variance",
    [("fixed_small", "fixed_small"), ("fixed_small_log", "fixed_small"), (None, "fixed_small"),
     ("fixed_large", "fixed_large"), ("learned_range", "learned")],
)  # fmt: skip
def test_variances(variance_type, variance):
    config = {"_class_name": "DDPMScheduler", "variance_type": variance_type}
    assert scheduler_from_config(config).options["variance"] == variance
    assert "variance" not in scheduler_from_config(config, "ddim").options


def test_bounds():
    level, far = NoiseLevel(jnp.zeros(()), jnp.ones(()), jnp.zeros(())), jnp.asarray([[-3.0, 0.5, 2.0, 1.0]])

    def bounded(**fields):
        scheduler = scheduler_from_config({"_class_name": "DDPMScheduler", **fields})
        return clipped(scheduler, lambda z_t, level: z_t)(far, level).tolist()

    assert bounded(clip_sample=False) == far.tolist()
    assert bounded() == [[-1.0, 0.5, 1.0, 1.0]]
    assert bounded(clip_sample_range=2.5) == [[-2.5, 0.5, 2.0, 1.0]]
    thresholds = {"thresholding": True, "dynamic_thresholding_ratio": 1.0}
    assert bounded(**thresholds, sample_max_value=2.0) == [[-1.0, 0.25, 1.0, 0.5]]
    assert bounded(**thresholds) == [[-1.0, 0.5, 1.0, 1.0]]  # sample_max_value 1, whatever the quantile
    assert (
        scheduler_from_config({"_class_name": "EulerDiscreteScheduler", "clip_sample": True}).clip_sample_range
        == np.inf
    )


DPM, UNIPC = {"_class_name": "DPMSolverMultistepScheduler"}, {"_class_name": "UniPCMultistepScheduler"}
DEIS = {"_class_name": "DEISMultistepScheduler"}
EULER, SINGLE = {"_class_name": "EulerDiscreteScheduler"}, {"_class_name": "DPMSolverSinglestepScheduler"}


@pytest.mark.parametrize(
    "config, named",
    [
        ({}, "class None is not supported"),
        ({"_class_name": "FlowMatchLCMScheduler"}, "'FlowMatchLCMScheduler' is not supported"),
        ({"_class_name": "DPMSolverSDEScheduler"}, "the scheduler DPMSolverSDEScheduler is not supported"),
        ({"_class_name": "PNDMScheduler"}, "skip_prk_steps = False"),
        (PUBLISHED["sd15"] | {"beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid'.*squaredcos_cap_v2"),
        (PUBLISHED["sd15"] | {"beta_start": 0.5}, "beta_start"),
        (PUBLISHED["sd15"] | {"beta_start": "0.5"}, "beta_start must be a number, got '0.5'"),
        (PUBLISHED["sd15"] | {"steps_offset": True}, "steps_offset must be an integer, got True"),
        (PUBLISHED["sd15"] | {"num_train_timesteps": 0}, "T >= 1"),
        (PUBLISHED["sd15"] | {"timestep_spacing": "logarithmic"}, "timestep_spacing = 'logarithmic'.*'trailing'"),
        (DPM | {"prediction_type": "flow_prediction"}, "prediction_type = 'flow_prediction'.*'v_prediction'"),
        (DPM | {"solver_order": 1}, "DPMSolverMultistepScheduler: solver_order = 1 is not supported; supported: 2, 3"),
        (DPM | {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}, "3 with noise.*'sde-dpmsolver\\+\\+'"),
        (DPM | {"solver_order": 3, "lower_order_final": False}, "lower_order_final = False"),
        (DEIS | {"solver_order": 3}, "DEISMultistepScheduler: solver_order = 3 is not supported; supported: 2"),
        (DEIS | {"lower_order_final": False}, "lower_order_final = False"),
        ({"_class_name": "TCDScheduler", "original_inference_steps": 100}, "original_inference_steps = 100"),
        (DPM | {"algorithm_type": "dpmsolver"}, "algorithm_type = 'dpmsolver'"),
        (DPM | {"solver_type": "heun"}, "solver_type = 'heun'"),
        (DPM | {"use_flow_sigmas": True}, "prediction_type = 'epsilon' is not supported; supported: 'flow_prediction'"),
        (DPM | {"use_dynamic_shifting": True}, "use_dynamic_shifting = True"),
        (DPM | {"use_karras_sigmas": True, "use_exponential_sigmas": True}, "cannot both be true"),
        (DPM | {"use_karras_sigmas": True, "use_beta_sigmas": True}, "use_karras_sigmas and use_beta_sigmas cannot"),
        (DPM | {"lambda_min_clipped": -5.0}, "lambda_min_clipped = -5.0.*-5.059 and below"),
        (DPM | {"final_sigmas_type": "sigma_min", "euler_at_final": True}, "euler_at_final = True"),
        (DPM | {"final_sigmas_type": "sigma_min", "lower_order_final": False}, "lower_order_final = False"),
        (SINGLE | {"final_sigmas_type": "sigma_min", "lower_order_final": True}, "lower_order_final = True"),
        (SINGLE | {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type = 'sde-dpmsolver\\+\\+'"),
        (UNIPC | {"solver_type": "bh1"}, "solver_type = 'bh1'"),
        (UNIPC | {"predict_x0": False}, "predict_x0 = False"),
        (UNIPC | {"disable_corrector": [0]}, "disable_corrector = \\[0\\]"),
        (UNIPC | {"lower_order_final": False}, "lower_order_final = False"),
        (EULER | {"final_sigmas_type": "sigma_min"}, "final_sigmas_type = 'sigma_min'.*'zero'"),
        (EULER | {"interpolation_type": "log_linear"}, "interpolation_type = 'log_linear'"),
        (EULER | {"timestep_type": "continuous"}, "timestep_type = 'continuous'"),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned"}, "variance_type = 'learned'.*'learned_range'"),
        ({"_class_name": "LCMScheduler", "original_inference_steps": 100}, "original_inference_steps = 100"),
        ({"_class_name": "LCMScheduler", "timestep_scaling": 1.0}, "timestep_scaling = 1.0"),
    ],
)
def test_refusals(config, named):
    with pytest.raises(InputError, match=named) as error:
        scheduler_from_config(config)
    assert "\n" not in str(error.value)


EDM_DPM, EDM_EULER = EDM.values()


def test_published_edm_models():
    playground, cosxl = map(scheduler_from_config, EDM.values())
    assert (playground.sampler, playground.prediction) == ("dpmpp_2m", "edm")
    assert (cosxl.sampler, cosxl.prediction) == ("euler", "v")
    assert playground.options == {"spacing": "karras", "fractional_t": True}
    assert cosxl.options == {"spacing": "exponential", "fractional_t": True}
    for scheduler, config in zip((playground, cosxl), EDM.values()):
        sigma = scheduler.process.sigma / scheduler.process.alpha * config["sigma_data"]
        assert len(sigma) == 1000
        np.testing.assert_allclose(sigma[[0, -1]], [config["sigma_min"], config["sigma_max"]], rtol=1e-9)
        assert initial_noise_scale(scheduler, 5) == 1.0
    assert edm_from_config(EDM_EULER) == (0.002, 120.0, 1.0, 1000)
    assert edm_from_config(PUBLISHED["sdxl"]) is None


@pytest.mark.parametrize(
    "fields, sampler",
    [
        ({}, "dpmpp_2m"),
        ({"algorithm_type": "deis", "solver_type": "bh2"}, "dpmpp_2m"),  # which mean the defaults in diffusers
        ({"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde"),
        ({"solver_order": 3}, "dpmpp_3m"),
        ({"lower_order_final": False, "euler_at_final": True}, "dpmpp_2m"),  # at sigma 0 these two say nothing
    ],
)
def test_the_sampler_of_edms_dpm_solver(fields, sampler):
    assert scheduler_from_config(EDM_DPM | fields).sampler == sampler


@pytest.mark.parametrize("model", EDM)
def test_every_sampler_of_an_edm_model_has_its_noise_levels(model):
    """Whatever the fields of the config's own solver are; but those of distilled models."""
    config = EDM[model] | {"solver_order": 1, "final_sigmas_type": "sigma_min", "thresholding": True}
    own = table_of(scheduler_from_config(EDM[model]), 7)
    for sampler in SOLVERS:
        if sampler in ("lcm", "tcd"):
            with pytest.raises(InputError, match=f"the sampler {sampler} is for distilled models; .* of an EDM model"):
                scheduler_from_config(config, sampler)
            continue
        scheduler = scheduler_from_config(config, sampler)
        table = table_of(scheduler, 7)
        assert scheduler.sampler == sampler and not scheduler.scaled_initial_noise
        assert np.isfinite(table.weights).all()
        assert np.isin(own.t[:7], table.t).all() and table.reached_sigma[table.rows - 1] == 0


def test_a_sampler_of_an_edm_model_is_what_the_other_edm_class_is():
    assert scheduler_from_config(EDM_EULER, "dpmpp_2m") == scheduler_from_config(
        EDM_EULER | {"_class_name": "EDMDPMSolverMultistepScheduler"}
    )
    assert scheduler_from_config(EDM_DPM, "euler") == scheduler_from_config(
        EDM_DPM | {"_class_name": "EDMEulerScheduler"}
    )


@pytest.mark.parametrize("sampler", [None, "heun"])
@pytest.mark.parametrize(
    "fields, named",
    [
        ({"prediction_type": "sample"}, "prediction_type = 'sample' is not supported; supported: 'epsilon', 'v_pred"),
        ({"sigma_schedule": "beta"}, "sigma_schedule = 'beta' is not supported; supported: 'karras', 'exponential'"),
        ({"rho": 5.0}, r"rho = 5.0 is not supported; supported: 7\.0"),
        ({"sigma_min": 0.0}, "sigma_min = 0.0, sigma_max = .*; it must be 0 < sigma_min < sigma_max"),
        ({"sigma_max": 0.001}, "sigma_max = 0.001"),
        ({"sigma_max": float("inf")}, "sigma_max = inf"),
        ({"sigma_data": -0.5}, "sigma_data = -0.5"),
        ({"sigma_data": None}, "sigma_data must be a number, got None"),
        ({"num_train_timesteps": 1}, "timesteps = 1; it must be .* num_train_timesteps > 1"),
    ],
)
def test_edm_processes_that_are_refused_whatever_the_sampler(fields, named, sampler):
    for config in EDM.values():
        with pytest.raises(InputError, match=named) as error:
            scheduler_from_config(config | fields, sampler)
        assert "\n" not in str(error.value) and str(error.value).startswith(config["_class_name"])


@pytest.mark.parametrize(
    "fields, named",
    [
        (EDM_DPM | {"final_sigmas_type": "sigma_min"}, "final_sigmas_type = 'sigma_min' is not supported"),
        (EDM_EULER | {"final_sigmas_type": "sigma_min"}, "final_sigmas_type = 'sigma_min' is not supported"),
        (EDM_DPM | {"thresholding": True}, "thresholding = True"),
        (EDM_DPM | {"solver_order": 1}, "solver_order = 1 is not supported; supported: 2, 3"),
        (EDM_DPM | {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}, "3 with noise"),
        (EDM_DPM | {"solver_order": 3, "lower_order_final": False}, "lower_order_final = False"),
        (EDM_DPM | {"solver_type": "heun"}, "solver_type = 'heun'"),
        (EDM_DPM | {"algorithm_type": "dpmsolver"}, "algorithm_type = 'dpmsolver'"),
    ],
)
def test_edm_solvers_that_are_refused(fields, named):
    with pytest.raises(InputError, match=named):
        scheduler_from_config(fields)


def test_lambda_min_clipped_of_published_models_leaves_the_schedule_whole():
    assert scheduler_from_config(DPM | {"lambda_min_clipped": -5.1}).sampler == "dpmpp_2m"


def test_another_sampler_may_be_named_for_a_class_that_none_here_is():
    deis = {"_class_name": "DEISMultistepScheduler", "algorithm_type": "deis", "solver_type": "logrho"}
    for sampler in ("dpmpp_2m", "dpmpp_2s", "unipc", "ddim"):
        assert scheduler_from_config(deis, sampler).sampler == sampler
    with pytest.raises(InputError, match=r"sampler must be one of ddpm, .*, got 'k_lms'"):
        scheduler_from_config(deis, "k_lms")


def test_tables_that_cannot_be_made():
    with pytest.raises(ValueError, match=r"steps must lie in 1\.\.1000"):
        table_of(scheduler_from_config(PUBLISHED["sd15"]), 1001)
    with pytest.raises(ValueError, match="eta is for ddim and tcd only"):
        table_of(scheduler_from_config(PUBLISHED["sd15"]), 5, eta=1.0)
    assert table_of(scheduler_from_config(PUBLISHED["sd15"], "ddim"), 5, eta=1.0).weights[0, -1] > 0


OURS = {"T": 1000, "beta_start": 0.00085, "beta_end": 0.012, "zero_terminal_snr": False, "prediction": "v"}


@pytest.mark.parametrize("sampler", SOLVERS)
@pytest.mark.parametrize("name", BETAS)
def test_export_and_back(name, sampler):
    process = make_process(name, 1000)
    for spacing in SPACINGS:
        try:
            options = {"sampler": sampler, "spacing": spacing, "set_alpha_to_one": sampler not in ("deis", "tcd")}
            config = config_from_schedule(name, **OURS, **options)
            expected = make_table(options.pop("sampler"), process, 12, prediction="v", **options)
        except (InputError, ValueError):
            uneven, without = SPACINGS[3:], ("ddpm", "ddim", "plms", "euler_a", "lcm", "tcd")
            assert (
                (sampler in without and spacing in uneven)
                or spacing == "flow"
                or ((sampler, spacing) in {("dpmpp_2s", "leading"), ("dpmpp_2s", "trailing")})
            )
            continue
        scheduler = scheduler_from_config(config)
        assert scheduler.sampler == ("heun" if sampler == "edm" else sampler)
        assert scheduler.prediction == "v"
        assert scheduler.process == process
        for got, wanted in zip(table_of(scheduler, 12), expected):
            np.testing.assert_array_equal(got, wanted)


def test_export_of_other_options():
    ours = OURS | {"name": "linear", "zero_terminal_snr": True, "steps_offset": 1, "set_alpha_to_one": False}
    back = scheduler_from_config(config_from_schedule(**ours, clip_sample_range=2.0))
    beta = {name: OURS[name] for name in ("beta_start", "beta_end")}
    assert back.process == make_process("linear", 1000, zero_terminal_snr=True, **beta)
    assert back.options == SD_END
    assert back.clip_sample_range == 2.0
    assert not scheduler_from_config(config_from_schedule(**ours, sampler="unipc")).options["set_alpha_to_one"]
    learned = config_from_schedule("linear", **OURS, sampler="ddpm", variance="learned")
    assert scheduler_from_config(learned).options["variance"] == "learned"


@pytest.mark.parametrize(
    "change, named",
    [
        (
            {"sampler": "heun", "zero_terminal_snr": True},
            "HeunDiscreteScheduler does not support rescale_betas",
        ),
        ({"sampler": "unipc", "clip_sample_range": 1.0}, "UniPCMultistepScheduler does not support clip_sample = True"),
        ({"sampler": "euler_a", "set_alpha_to_one": False}, "does not support set_alpha_to_one = False"),
        ({"sampler": "euler", "set_alpha_to_one": False}, "final_sigmas_type = 'sigma_min' is not supported"),
        ({"sampler": "dpmpp_2s", "spacing": "trailing"}, "does not support timestep_spacing = 'trailing'"),
        ({"sampler": "euler_a", "spacing": "karras"}, "does not support use_karras_sigmas = True"),
        ({"sampler": "ddim", "spacing": "beta"}, "does not support use_beta_sigmas = True"),
        ({"sampler": "deis"}, "DEISMultistepScheduler does not support set_alpha_to_one = True"),
        ({"sampler": "tcd"}, "TCDScheduler does not support set_alpha_to_one = True"),
        ({"sampler": "lcm", "set_alpha_to_one": False}, "LCMScheduler does not support set_alpha_to_one = False"),
        ({"prediction": "flow"}, "have no 'flow'; they have eps, v, z0"),
        ({"prediction": "edm"}, "have no 'edm'; they have eps, v, z0"),
        ({"spacing": "flow"}, "the spacing flow is for rectified flow"),
        ({"name": "rectified_flow"}, "have no 'rectified_flow'; they have linear, scaled_linear, cosine"),
    ],
)
def test_what_diffusers_has_no_field_for(change, named):
    with pytest.raises(InputError, match=named):
        config_from_schedule(**({"name": "linear"} | OURS | change))


def test_an_exported_config_means_the_same_with_another_sampler():
    config = config_from_schedule("cosine", **OURS, sampler="unipc", spacing="trailing")
    for sampler in ("ddim", "ddpm", "plms", "euler", "heun", "dpmpp_2m"):
        scheduler = scheduler_from_config(config, sampler)
        assert scheduler.options["spacing"] == "trailing"
        assert scheduler.options["set_alpha_to_one"]
        assert scheduler.clip_sample_range == np.inf
