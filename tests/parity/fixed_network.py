"""One fixed network, run through a scheduler of diffusers and through our table, from the same noise."""

from functools import cache, partial

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch

from ldm_jax.diffusion.denoiser import clip_z0, from_network
from ldm_jax.diffusion.random import sample_keys
from ldm_jax.diffusion.solve import solve
from ldm_jax.diffusion.solvers import make_table

SHAPE = (4, 4, 3)
# Theirs has float32 coefficients, which are small differences in these samplers.
ROUNDED = {"dpmpp_3m": 5e-5, "kdpm2_a": 5e-5}
TWO_CALLS = (  # a step, on z / alpha
    diffusers.HeunDiscreteScheduler,
    diffusers.KDPM2DiscreteScheduler,
    diffusers.KDPM2AncestralDiscreteScheduler,
)
KEYS = sample_keys(0, jnp.arange(2))
Z_T = np.random.default_rng(0).standard_normal((2, *SHAPE))


def network(z_t, t, xp=jnp):
    """A fixed linear network, different for each t and entry."""
    gain = 0.5 + 0.3 * xp.sin(xp.arange(SHAPE[-1]) + 0.01 * t)
    return gain * z_t + 0.1


def variance_output(z_t, t, xp=jnp):
    """The variance channels of a learned variance, from -1 to 1 and beyond."""
    return 1.2 * xp.cos(z_t + 0.01 * t)


def row_noise(i):
    return np.stack([jax.random.normal(jax.random.fold_in(key, i), SHAPE) for key in KEYS]).astype(np.float64)


def share_alpha_bar(scheduler, process):
    """Gives a diffusers scheduler our table of alpha_bar in float64: rounding must not hide a real difference."""
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), process.alpha**2, rtol=0, atol=1e-5)
    scheduler.alphas_cumprod = torch.from_numpy(process.alpha**2)
    if hasattr(scheduler, "final_alpha_cumprod") and not scheduler.config.set_alpha_to_one:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]


def unit_start(scheduler):
    """The factor that makes the network's first input the noise itself; some hold z / alpha."""
    if hasattr(scheduler, "is_scale_input_called") or isinstance(scheduler, TWO_CALLS):
        return (scheduler.sigmas[0].double() ** 2 + 1) ** 0.5
    return 1.0


def use_exact_kdpm2(scheduler):
    """Corrects a KDPM2 scheduler of diffusers: it rounds the timesteps of Karras sigmas, and loses sigma_down.

    The ancestral one has sigma_down = sqrt(sigma'^2 - sigma_up^2) in float32, nothing but rounding where sigma' / sigma
    is small; it is sigma'^2 / sigma.
    """
    set_timesteps = scheduler.set_timesteps

    def exact(steps):
        set_timesteps(steps)
        timestep = partial(scheduler._sigma_to_t, log_sigmas=np.asarray(scheduler.log_sigmas))
        sigma = np.append(scheduler.sigmas[: 2 * steps : 2].double(), 0.0)
        scheduler.timesteps = scheduler.timesteps.double()
        if scheduler.config.use_karras_sigmas:
            unrounded = torch.from_numpy(timestep(sigma[:-1]))
            np.testing.assert_allclose(scheduler.timesteps[::2], unrounded, rtol=0, atol=0.501)
            scheduler.timesteps[::2] = unrounded
        if hasattr(scheduler, "sigmas_down"):
            down = np.append(sigma[1:] ** 2 / sigma[:-1], 0.0)
            between = np.sqrt(sigma * down)
            up = np.sqrt(np.append(sigma[1:], 0.0) ** 2 - down**2)
            for name, values in (("sigmas_down", down), ("sigmas_up", up), ("sigmas_interpol", between)):
                repeated = np.concatenate([values[:1], values[1:].repeat(2), values[-1:]])
                setattr(scheduler, name, torch.from_numpy(repeated))
            scheduler.timesteps[1::2] = torch.from_numpy(timestep(between[:-2]))

    scheduler.set_timesteps = exact


def run_reference(scheduler, steps, start=unit_start, network=network, **step_options):
    """The latents of a diffusers scheduler in float64.

    A step option may be a function of the step's number; `start` is one of the scheduler.
    """
    scheduler.set_timesteps(steps)
    z = torch.from_numpy(Z_T) * start(scheduler)
    for i, t in enumerate(scheduler.timesteps):
        options = {name: value(i) if callable(value) else value for name, value in step_options.items()}
        scaled = scheduler.scale_model_input(z, t)
        z = scheduler.step(
            torch.from_numpy(network(scaled.numpy(), float(t), np)), t, z, **options
        ).prev_sample.double()
    return z.numpy()


@cache
def solver(process, prediction):
    """The compiled loop for one process and prediction: (table, clip range of z0_hat, z_T) -> latents."""
    denoise = from_network(lambda z, t, _: network(z, t.reshape(-1, 1, 1, 1)), prediction, process)
    plain = lambda z, level: denoise(z, level, None)  # noqa: E731
    return jax.jit(lambda table, clip_range, z_T=Z_T: solve(clip_z0(plain, clip_range), z_T, table, KEYS)[0])


def run_ours(process, prediction, clip_range=np.inf, **options):
    table = make_table(process=process, prediction=prediction, **options)
    return np.asarray(solver(process, prediction)(table, clip_range))


def assert_same(ours, expected, sampler=""):
    """1e-5 of the largest value: eps prediction divides by sqrt(alpha_bar), which makes large intermediate values."""
    tolerance = ROUNDED.get(sampler, 1e-5)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max()))
