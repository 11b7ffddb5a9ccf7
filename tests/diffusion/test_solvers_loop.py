"""The compiled loop against a plain one, and its contracts: no recompilation, indexed randomness, snapshots, hooks."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kstest

from ldm_jax.diffusion.denoiser import Estimate
from ldm_jax.diffusion.forward import NoiseLevel
from ldm_jax.diffusion.guidance import classifier_free
from ldm_jax.diffusion.random import initial_latents, sample_keys
from ldm_jax.diffusion.schedules import make_process
from ldm_jax.diffusion.solve import solve
from ldm_jax.diffusion.solvers import make_table
from ldm_jax.diffusion.tables import HISTORY, Table

T = 40
PROCESS = make_process("linear", T, beta_start=0.002, beta_end=0.3)
ZERO_SNR = make_process("linear", T, beta_start=0.002, beta_end=0.3, zero_terminal_snr=True)
SHAPE = (3, 2, 2)
KEYS = sample_keys(0, jnp.arange(4))
Z_T = initial_latents(KEYS, SHAPE)


def denoise(z_t, level, xp=jnp):
    """Nonlinear, and different for each level, so that a wrong one, order or history shows."""
    return xp.sin(2 * z_t + 0.3 * level.t + level.alpha - level.sigma) + 0.5 * z_t


run = jax.jit(partial(solve, denoise), static_argnames="snapshots")


@cache
def row_noise(i):
    """The noise contract: row i, sample k: fold_in(keys[k], i)."""
    return np.stack([jax.random.normal(jax.random.fold_in(key, i), SHAPE) for key in KEYS]).astype(np.float64)


def any_table(rows, seed=0):
    """A table no solver would make: every column in use, so that each term of the loop is seen."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(-0.4, 0.4, (2 * T, 2 * HISTORY + 3))
    weights[:, -1] = np.maximum(weights[:, -1], 0)
    return Table(
        t=rng.uniform(0, T, 2 * T),
        alpha=rng.uniform(0, 1, 2 * T),
        sigma=rng.uniform(0, 1, 2 * T),
        weights=weights,
        log_std_ratio=rng.uniform(0, 0.8, 2 * T),
        reached_alpha=rng.uniform(0, 1, 2 * T),
        reached_sigma=rng.uniform(0, 1, 2 * T),
        rows=np.int32(rows),
    )


def var_frac(z_t, level, xp=jnp):
    return 0.75 * xp.cos(z_t + 0.2 * level.t + level.sigma) + 0.5


def plain_loop(table, learned=False):
    """The sentence at the top of tables.py. Returns z and z0_hat after each row."""
    zs, z0_hats, states = [np.asarray(Z_T, np.float64)], [], []
    for i in range(int(table.rows)):
        level = NoiseLevel(table.t[i], table.alpha[i], table.sigma[i])
        z0_hats.insert(0, denoise(zs[0], level, np))
        z = table.weights[i, -1] * row_noise(i)
        if learned:
            z = z * np.exp(table.log_std_ratio[i] * var_frac(zs[0], level, np))
        for j in range(min(i, HISTORY) + 1):
            z = z + table.weights[i, j] * zs[j] + table.weights[i, HISTORY + 1 + j] * z0_hats[j]
        zs.insert(0, z)
        states.append((z, z0_hats[0]))
    return states


@pytest.mark.parametrize("rows", [1, 2, 5, 12])
def test_any_table_runs_as_written(rows):
    got, _ = run(Z_T, any_table(rows), KEYS)
    np.testing.assert_allclose(got, plain_loop(any_table(rows))[-1][0], rtol=1e-3, atol=1e-4)


def test_any_table_runs_as_written_on_a_learned_variance():
    learned = lambda z_t, level: Estimate(denoise(z_t, level), var_frac(z_t, level))  # noqa: E731
    z, trajectory = jax.jit(partial(solve, learned, snapshots=1))(Z_T, any_table(9), KEYS)
    expected = plain_loop(any_table(9), learned=True)[-1]
    np.testing.assert_allclose(z, expected[0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(trajectory.z0_hat[0], expected[1], rtol=1e-3, atol=1e-4)
    assert np.abs(z - plain_loop(any_table(9))[-1][0]).max() > 0.1


@pytest.mark.parametrize(
    "rows, snapshots, kept",
    [(12, 4, [2, 5, 8, 11]), (9, 4, [2, 4, 6, 8]), (2, 4, [0, 0, 1, 1]), (5, 1, [4])],
)
def test_snapshots_are_evenly_spaced_and_end_on_the_last_row(rows, snapshots, kept):
    z, trajectory = run(Z_T, any_table(rows), KEYS, snapshots=snapshots)
    states = plain_loop(any_table(rows))
    for j, row in enumerate(kept):
        np.testing.assert_allclose(trajectory.z_t[j], states[row][0], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(trajectory.z0_hat[j], states[row][1], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(trajectory.z_t[-1], z)


def test_no_snapshots_is_an_empty_trajectory():
    _, trajectory = run(Z_T, any_table(3), KEYS)
    assert trajectory.z_t.shape == trajectory.z0_hat.shape == (0, *Z_T.shape)


def test_project_sees_every_level_with_fresh_keys():
    """Row by row z is replaced by q at the level reached; the last, at alpha = 1, is exactly the known z0."""
    known = jnp.arange(12.0).reshape(SHAPE)
    seen = []

    def project(z, level, keys):
        eps = jax.vmap(lambda key: jax.random.normal(key, SHAPE))(keys)
        jax.debug.callback(lambda *values: seen.append(values), (level.alpha, level.sigma), eps, z)
        return level.alpha * known + level.sigma * eps

    table = make_table("ddpm", PROCESS, 4, spacing="trailing")
    z, _ = jax.jit(partial(solve, denoise, project=project))(Z_T, table, KEYS)
    jax.effects_barrier()
    np.testing.assert_array_equal(z, jnp.broadcast_to(known, z.shape))
    levels = np.stack([table.reached_alpha, table.reached_sigma], 1)[:4]
    np.testing.assert_allclose([s[0] for s in seen], levels, rtol=1e-6)
    noises = [s[1] for s in seen] + [row_noise(i) for i in range(4)] + [Z_T]
    values = np.stack(noises).ravel()
    assert len(np.unique(values.astype(np.float32))) == len(values)  # no draw is used twice


def test_bfloat16_latents_and_denoiser_are_solved_in_float32():
    def half(z_t, level):
        assert z_t.dtype == jnp.float32
        return denoise(z_t, level).astype(jnp.bfloat16)

    z, _ = solve(half, Z_T.astype(jnp.bfloat16), make_table("ddim", PROCESS, 3), KEYS)
    assert z.dtype == jnp.float32


def test_nothing_recompiles():
    """One trace for every solver, step count, eta, variance, spacing, seed and guidance scale."""
    traces = []
    context, null = jnp.ones((4, 1, 1)), jnp.zeros((1, 1, 1))

    @jax.jit
    def sample(seed, table, scale):
        traces.append(table)
        keys = sample_keys(seed, jnp.arange(4))
        guided = classifier_free(
            lambda z, level, c: denoise(z, jax.tree.map(lambda v: v[0], level)) * c[..., None], context, null, scale
        )
        return solve(guided, initial_latents(keys, SHAPE), table, keys)[0]

    options = [
        {"solver": "ddpm", "steps": 40},
        {"solver": "ddpm", "steps": 5, "variance": "fixed_large"},
        {"solver": "ddim", "steps": 10},
        {"solver": "ddim", "steps": 10, "eta": 0.3, "spacing": "trailing"},
        {"solver": "ddim", "steps": 11, "spacing": "linspace", "set_alpha_to_one": False},
        {"solver": "dpmpp_2m", "steps": 6, "steps_offset": 1},
        {"solver": "dpmpp_2m", "steps": 20, "prediction": "v"},
    ]
    results = []
    for seed, option in enumerate(options):
        for scale in (1.0, 4.0):
            results.append(sample(jnp.uint32(seed), make_table(process=PROCESS, **option), jnp.float32(scale)))
    results.append(sample(jnp.uint32(0), make_table("ddim", ZERO_SNR, 3, prediction="v"), jnp.float32(1)))
    assert len(traces) == 1
    assert np.isfinite(results).all()
    assert len({float(jnp.sum(result)) for result in results}) == len(results)


@pytest.mark.parametrize("solver, eta", [("ddpm", 0.0), ("ddim", 0.7), ("dpmpp_2m", 0.0)])
@pytest.mark.parametrize("split", [[2, 4], [1, 1, 1, 1, 1, 1]])
def test_sample_k_depends_on_seed_and_k_alone(solver, eta, split):
    table = make_table(solver, PROCESS, 8, eta=eta)

    def sample(index):
        keys = sample_keys(3, index)
        return run(initial_latents(keys, SHAPE), table, keys)[0]

    whole = sample(jnp.arange(10, 16))
    batches = np.split(np.arange(10, 16), np.cumsum(split)[:-1])
    np.testing.assert_allclose(np.concatenate([sample(jnp.array(b)) for b in batches]), whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sample(jnp.array([15, 10]))[1], whole[0], rtol=1e-5, atol=1e-6)  # the order is no matter
    assert not np.allclose(whole[0], whole[1])


def test_seeds_and_samples_differ():
    draws = [initial_latents(sample_keys(seed, jnp.arange(3)), SHAPE) for seed in (0, 1)]
    values = np.concatenate(draws).reshape(6, -1)
    assert len(np.unique(values)) == values.size


def test_initial_latents_are_unit_gaussian():
    z = initial_latents(sample_keys(5, jnp.arange(2000)), (4, 4))
    assert z.dtype == jnp.float32
    assert kstest(np.ravel(z), "norm").pvalue > 0.01


def test_runs_under_pmap():
    table = make_table("ddpm", PROCESS, 6)
    got = jax.pmap(lambda z, table, keys: solve(denoise, z, table, keys)[0], in_axes=(0, None, 0))(
        Z_T[None], table, KEYS[None]
    )
    np.testing.assert_allclose(got[0], run(Z_T, table, KEYS)[0], rtol=1e-5, atol=1e-6)
