"""CFG++ against the loop of the paper in float64, and its relation to classifier-free guidance."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.denoiser import Estimate
from ldm_jax.diffusion.forward import NoiseLevel, noise_level
from ldm_jax.diffusion.guidance import cfg_plus_plus, classifier_free
from ldm_jax.diffusion.random import fold, normal, sample_keys
from ldm_jax.diffusion.schedules import make_process
from ldm_jax.diffusion.solve import solve
from ldm_jax.diffusion.solvers import make_table

PROCESSES = {"vp": make_process("scaled_linear", 100), "flow": make_process("rectified_flow", 100)}
COND, NULL = np.array([1.0, 2.0, -1.5]).reshape(3, 1), np.full((1, 1), 0.3)
Z_T = np.random.default_rng(0).normal(size=(3, 6))
KEYS = sample_keys(np.uint32(0), np.arange(3))


def z0_of(z_t, t, cond):
    """Of any array library: nonlinear in z_t, different for each condition and t."""
    tanh = jnp.tanh if isinstance(z_t, jax.Array) else np.tanh
    return tanh(0.7 * z_t * cond) + 0.2 * cond + 0.003 * t


def denoise(z_t, level, cond):
    return z0_of(z_t, level.t[:, None], cond)


def run(table, scale, interval=(0, np.inf), rule=cfg_plus_plus):
    """The sampler's z, as it is compiled for any scale."""

    @jax.jit
    def sample(scale, interval, table):
        guided = rule(denoise, jnp.asarray(COND), jnp.asarray(NULL), scale, interval=interval)
        return solve(guided, jnp.asarray(Z_T), table, KEYS)[0]

    return np.asarray(sample(jnp.asarray(scale, jnp.float32), interval, table))


def noise_of(row):
    return np.asarray(normal(fold(KEYS, row), Z_T.shape[1:]), np.float64)


def loop(table, scale, step, interval=(0, np.inf)):
    """Chung 2024, algorithm 2: Tweedie's formula by the guided eps, then noise by the unconditional one."""
    z, scale = Z_T, np.reshape(np.asarray(scale, np.float64), (-1, 1))
    for i in range(int(table.rows)):
        alpha, sigma, t = table.alpha[i], table.sigma[i], table.t[i]
        eps_cond, eps_null = ((z - alpha * z0_of(z, t, cond)) / sigma for cond in (COND, NULL))
        if not interval[0] <= t <= interval[1]:
            eps_null, eps_guided = eps_cond, eps_cond
        else:
            eps_guided = eps_null + scale * (eps_cond - eps_null)
        z0 = (z - sigma * eps_guided) / alpha
        z = step(z0, eps_null, (alpha, sigma), (table.reached_alpha[i], table.reached_sigma[i]), noise_of(i))
    return z


def ddim(z0, eps, now, after, noise, eta=0.0):
    """Song 2021, eq. 12 and 16."""
    (alpha, sigma), (next_alpha, next_sigma) = now, after
    variance = (eta * next_sigma / sigma) ** 2 * max(1 - (alpha / next_alpha) ** 2, 0)
    return next_alpha * z0 + np.sqrt(next_sigma**2 - variance) * eps + np.sqrt(variance) * noise


def ancestral(z0, eps, now, after, noise):
    """k-diffusion's step on z / alpha: down to sigma_down, then up by noise of sigma_up."""
    before, to = now[1] / now[0], after[1] / after[0]
    up = min(to, np.sqrt(to**2 * (before**2 - to**2) / before**2))
    return after[0] * (z0 + np.sqrt(to**2 - up**2) * eps + up * noise)


CASES = {  # solver, its options, the process, the step of the loop
    "ddim": ("ddim", {}, "vp", ddim),
    "ddim with noise": ("ddim", {"eta": 0.6}, "vp", partial(ddim, eta=0.6)),
    "euler": ("euler", {}, "vp", ddim),
    "euler_a": ("euler_a", {}, "vp", ancestral),
    "rectified flow": ("euler", {"prediction": "flow"}, "flow", ddim),
}


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0, [0.2, 0.6, 1.0]])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_loop_of_the_paper(case, scale):
    solver, options, process, step = CASES[case]
    table = make_table(solver, PROCESSES[process], 10, **options)
    np.testing.assert_allclose(run(table, scale), loop(table, scale, step), rtol=1e-4, atol=1e-4)
    if scale != 0:
        assert np.abs(run(table, scale) - run(table, scale, rule=classifier_free)).max() > 1e-2


def test_at_0_it_is_the_unconditional_model():
    table = make_table("ddim", PROCESSES["vp"], 10)
    np.testing.assert_allclose(run(table, 0.0), run(table, 0.0, rule=classifier_free), rtol=1e-5, atol=1e-5)


def test_outside_the_interval_it_is_the_conditional_model():
    table = make_table("ddim", PROCESSES["vp"], 10)
    some = run(table, 0.6, (20.0, 60.0))
    np.testing.assert_allclose(some, loop(table, 0.6, ddim, (20.0, 60.0)), rtol=1e-4, atol=1e-4)
    nowhere = run(table, 0.6, (200.0, 300.0))
    np.testing.assert_allclose(nowhere, run(table, 1.0, rule=classifier_free), rtol=1e-5, atol=1e-5)
    assert np.abs(nowhere - some).max() > 1e-2


def test_a_step_is_classifier_free_guidance_at_a_scale_of_the_step():
    """That scale is lambda / (1 - e^-h), with h the step in log(alpha / sigma)."""
    process = PROCESSES["vp"]
    table = make_table("ddim", process, 2)
    one = table._replace(rows=np.int32(1))
    decay = table.reached_sigma[0] * table.alpha[0] / (table.reached_alpha[0] * table.sigma[0])
    expected = run(one, 0.6 / (1 - decay), rule=classifier_free)
    np.testing.assert_allclose(run(one, 0.6), expected, rtol=1e-4, atol=1e-4)


def test_the_null_half_runs_within_the_interval_only():
    sizes = []

    def counted(z_t, level, cond):
        jax.debug.callback(lambda: sizes.append(z_t.shape[0]))
        return denoise(z_t, level, cond)

    @jax.jit
    def guided(scale, t):
        level = noise_level(jnp.full(3, t), PROCESSES["vp"])
        return cfg_plus_plus(counted, jnp.asarray(COND), jnp.asarray(NULL), scale, interval=(10, 50))(Z_T, level)

    for scale, t, expected in ((0.6, 30, [6]), (1.0, 30, [6]), (0.6, 60, [3])):
        sizes.clear()
        jax.block_until_ready(guided(scale, t))
        jax.effects_barrier()
        assert sizes == expected


def test_a_learned_variance_is_that_of_the_condition():
    def learned(z_t, level, cond):
        return Estimate(denoise(z_t, level, cond), jnp.broadcast_to(cond, z_t.shape))

    level = NoiseLevel(jnp.array([5.0, 30.0, 60.0]), jnp.full(3, 0.8), jnp.full(3, 0.6))
    got = cfg_plus_plus(learned, jnp.asarray(COND), jnp.asarray(NULL), 0.5, interval=(10, 40))(Z_T, level)
    np.testing.assert_allclose(got.var_frac, np.broadcast_to(COND, Z_T.shape))
    cond, null = (denoise(jnp.asarray(Z_T), level, each) for each in (COND, NULL))
    np.testing.assert_allclose(got.z0[1], (cond + null)[1] / 2, rtol=1e-5)
    np.testing.assert_allclose(got.z0_null[1], null[1], rtol=1e-5)
    np.testing.assert_allclose(got.z0[::2], cond[::2], rtol=1e-5)
    np.testing.assert_allclose(got.z0_null[::2], cond[::2], rtol=1e-5)
