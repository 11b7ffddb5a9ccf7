"""scheduler_config.json of published models, as far as it bears on the samples."""

from ldm_jax.diffusion.denoiser import clip_z0, threshold_z0
from ldm_jax.diffusion.solvers import make_table

_STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
_UPSCALER = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}

PUBLISHED = {
    "sd15": {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **_STABLE_DIFFUSION},
    "sd21_v": {"_class_name": "DDIMScheduler", **_STABLE_DIFFUSION, "prediction_type": "v_prediction"},
    "sdxl": {
        "_class_name": "EulerDiscreteScheduler",
        **_STABLE_DIFFUSION,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "interpolation_type": "linear",
        "sample_max_value": 1.0,
        "use_karras_sigmas": False,
    },
    "sd15_inpainting": {"_class_name": "DDIMScheduler", **_STABLE_DIFFUSION},
    "sd2_inpainting": {"_class_name": "PNDMScheduler", **_STABLE_DIFFUSION, "prediction_type": "epsilon"},
    "x4_upscaler": {
        "_class_name": "DDIMScheduler",
        **_UPSCALER,
        "clip_sample": False,
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    },
    "x4_upscaler_low_res": {
        "_class_name": "DDPMScheduler",
        **_UPSCALER,
        "clip_sample": True,
        "variance_type": "fixed_small",
    },
    "ldm_celebahq": {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.0.4",
        "beta_start": 0.0015,
        "beta_end": 0.0195,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "timestep_values": None,
        "trained_betas": None,
    },
    "dit": {
        "_class_name": "DDIMScheduler",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "clip_sample": False,
        "num_train_timesteps": 1000,
    },
}

EDM = {
    "playground_2_5": {
        "_class_name": "EDMDPMSolverMultistepScheduler",
        "_diffusers_version": "0.27.0.dev0",
        "algorithm_type": "dpmsolver++",
        "dynamic_thresholding_ratio": 0.995,
        "euler_at_final": False,
        "final_sigmas_type": "zero",
        "lower_order_final": True,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "rho": 7.0,
        "sample_max_value": 1.0,
        "sigma_data": 0.5,
        "sigma_max": 80.0,
        "sigma_min": 0.002,
        "solver_order": 2,
        "solver_type": "midpoint",
        "thresholding": False,
    },
    "cosxl": {
        "_class_name": "EDMEulerScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "rho": 7.0,
        "sigma_data": 1.0,
        "sigma_max": 120.0,
        "sigma_min": 0.002,
        "sigma_schedule": "exponential",
    },
}

_FLOW_SIGMAS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "num_train_timesteps": 1000}
FLOW = {
    "sd3": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
    "flux_schnell": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": False,
    },
    "heun": {"_class_name": "FlowMatchHeunDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
    "wan": {
        "_class_name": "UniPCMultistepScheduler",
        **_FLOW_SIGMAS,
        "flow_shift": 5.0,
        "solver_order": 2,
        "solver_type": "bh2",
        "final_sigmas_type": "zero",
        "timestep_spacing": "linspace",
        "use_dynamic_shifting": False,
    },
    "sana": {
        "_class_name": "DPMSolverMultistepScheduler",
        **_FLOW_SIGMAS,
        "algorithm_type": "dpmsolver++",
        "final_sigmas_type": "zero",
        "flow_shift": 3.0,
        "solver_order": 2,
        "timestep_spacing": "linspace",
    },
    "single_step": {"_class_name": "DPMSolverSinglestepScheduler", **_FLOW_SIGMAS, "flow_shift": 2.0},
}


def table_of(scheduler, steps, **more):
    """The solver table of a `Scheduler`."""
    options = scheduler.options | more
    return make_table(scheduler.sampler, scheduler.process, steps, prediction=scheduler.prediction, **options)


def initial_noise_scale(scheduler, steps):
    """The factor between unit noise and z_T."""
    return float(table_of(scheduler, steps).sigma[0]) if scheduler.scaled_initial_noise else 1.0


def clipped(scheduler, denoise):
    """The denoiser with z0_hat clipped or thresholded according to a `Scheduler`."""
    if scheduler.threshold is None:
        return clip_z0(denoise, scheduler.clip_sample_range)
    return threshold_z0(denoise, *scheduler.threshold)
