"""EDM as a variance-preserving process: the formulas of Karras 2022, table 1, and sigmas that are not rounded."""

import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.edm import EDM
from ldm_jax.diffusion.prediction import coefficient_tables, to_z0
from ldm_jax.diffusion.solvers import SOLVERS, make_table
from ldm_jax.diffusion.spacing import noise_levels

LEVELS = [EDM(0.002, 80.0, 0.5, 1000), EDM(0.01, 120.0, 1.0, 50), EDM(0.1, 3.0, 2.0, 7)]
RHO = 7


def sigmas(edm):
    return np.exp(np.linspace(np.log(edm.sigma_min), np.log(edm.sigma_max), edm.timesteps))


@pytest.mark.parametrize("edm", LEVELS)
def test_the_preconditioning_is_that_of_the_paper(edm):
    """x = y + sigma n, F(c_in x) = F: the network's input and the denoiser D, by eq. 7 and table 1."""
    rng, sd, sigma = np.random.default_rng(0), edm.sigma_data, sigmas(edm)
    y, n, F = sd * rng.standard_normal(len(sigma)), rng.standard_normal(len(sigma)), rng.standard_normal(len(sigma))
    x, process = y + sigma * n, edm.process
    c_in = 1 / np.sqrt(sigma**2 + sd**2)
    c_skip, c_out = sd**2 * c_in**2, sigma * sd * c_in
    np.testing.assert_allclose(process.alpha * y / sd + process.sigma * n, c_in * x, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(process.alpha**2 + process.sigma**2, 1, rtol=1e-12)
    levels = process.alpha, process.sigma
    for prediction, sign in (("edm", 1), ("v", -1)):
        coefficient_tables(prediction, process)
        D = sd * to_z0(prediction, F.astype(np.float32), c_in * x, *levels)
        expected = c_skip * x + sign * c_out * F.astype(np.float32)
        np.testing.assert_allclose(D, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("edm", LEVELS)
def test_c_noise_is_log_sigma_over_4_between_the_timesteps_too(edm):
    sigma = np.append(sigmas(edm), np.geomspace(edm.sigma_min, edm.sigma_max, 23))
    t = edm.process.time_of(sigma / edm.sigma_data)
    np.testing.assert_allclose(t[: edm.timesteps], np.arange(edm.timesteps), atol=1e-9)
    got = edm.c_noise(jnp.asarray(t, jnp.float32))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.log(sigma) / 4, rtol=0, atol=1e-6)
    assert edm.c_noise(jnp.arange(edm.timesteps)).dtype == jnp.float32


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name not in ("lcm", "tcd")])
@pytest.mark.parametrize("edm", LEVELS[:2])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_sigmas_of_both_spacings_whatever_the_solver(steps, edm, solver):
    ramp = np.linspace(0, 1, steps)
    low, high = edm.sigma_min ** (1 / RHO), edm.sigma_max ** (1 / RHO)
    expected = {
        "karras": (high + ramp * (low - high)) ** RHO,  # eq. 5
        "exponential": edm.sigma_max * (edm.sigma_min / edm.sigma_max) ** ramp,
    }
    for spacing, sigma in expected.items():
        points = noise_levels(spacing, edm.process, steps, grid="fractional")
        np.testing.assert_allclose([point.ratio * edm.sigma_data for point in points], sigma, rtol=1e-9)
        table = make_table(solver, edm.process, steps, prediction="edm", spacing=spacing, fractional_t=True)
        called = np.exp(4 * np.asarray(edm.c_noise(table.t[: table.rows])))  # the sigmas of the network's time input
        np.testing.assert_allclose(called, table.sigma[: table.rows] / table.alpha[: table.rows] * edm.sigma_data)
        nearest = np.abs(np.log(called)[:, None] - np.log(sigma)).min(axis=0)
        np.testing.assert_allclose(nearest, 0, atol=1e-8)
        assert called[0] == pytest.approx(edm.sigma_max)


def test_without_it_timesteps_are_rounded():
    edm = LEVELS[0]
    exact, rounded = (
        make_table("dpmpp_2m", edm.process, 9, prediction="edm", spacing="karras", fractional_t=fractional)
        for fractional in (True, False)
    )
    np.testing.assert_array_equal(np.round(exact.t), rounded.t)
    assert (exact.t % 1 > 0).sum() == 7
    for one, other in zip(exact[1:], rounded[1:]):
        np.testing.assert_array_equal(one, other)


def test_timesteps_of_even_spacings_are_whole():
    for spacing in ("leading", "trailing", "linspace"):
        for solver in ("euler", "dpmpp_2m", "ddim"):
            table = make_table(solver, LEVELS[0].process, 7, prediction="edm", spacing=spacing, fractional_t=True)
            assert not (table.t % 1).any()
            assert table.t[0] == {"leading": 852, "trailing": 999, "linspace": 999}[spacing]
