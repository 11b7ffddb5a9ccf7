"""Power function averages against closed forms, and averages of other lengths against the average of a trajectory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.posthoc_ema import (
    LONGEST,
    SHORTEST,
    Average,
    correlation,
    gamma_of,
    reconstruction,
    sigma_rel_of,
)
from ldm_jax.training.state import power_ema_rate, power_emas_update

STORED = (0.05, 0.1)
STEPS = 240


def weights_of(sigma_rel, steps, length=STEPS):
    """[length]: integrals of the weights over each update, (i^(gamma + 1) - (i - 1)^(gamma + 1)) / t^(gamma + 1)."""
    edges = np.arange(steps + 1) / steps
    return np.pad(np.diff(edges ** (gamma_of(sigma_rel) + 1)), (0, length - steps))


def trajectory():
    """Parameters [STEPS, 7] after each update: a random walk that slows down, far from 0."""
    rng = np.random.default_rng(0)
    return 3 + np.cumsum(rng.normal(size=(STEPS, 7)) * np.linspace(1, 0.1, STEPS)[:, None], axis=0)


def averages(every):
    """Times, lengths [K] and values [K, 7] of the stored averages at each `every` updates, by the recursion."""
    theta, rows = trajectory(), []
    for sigma_rel in STORED:
        average, exponent = np.zeros(7), gamma_of(sigma_rel) + 1
        for step in range(1, STEPS + 1):
            average = average + (1 - (1 - 1 / step) ** exponent) * (theta[step - 1] - average)
            if step % every == 0:
                rows.append((step, sigma_rel, average))
    times, lengths, values = zip(*rows)
    return np.array(times), np.array(lengths), np.stack(values)


def test_gamma_is_the_root_of_the_cubic():
    np.testing.assert_allclose(gamma_of([0.05, 0.1]), [16.97, 6.94], atol=0.005)  # Karras 2024, section 3.1
    for sigma_rel in (SHORTEST, 0.05, 0.1, 0.2, LONGEST):
        gamma = gamma_of(sigma_rel)
        assert gamma > 0 and sigma_rel_of(gamma) == pytest.approx(sigma_rel, rel=1e-9)
    np.testing.assert_allclose(sigma_rel_of(0), 12**-0.5)  # the standard deviation of a uniform distribution
    assert gamma_of(np.full((2, 3), 0.1)).shape == (2, 3)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_sigma_rel_is_the_standard_deviation_of_the_weights(sigma_rel):
    weights, middle = weights_of(sigma_rel, 100_000, 100_000), (np.arange(100_000) + 0.5) / 100_000
    mean = weights @ middle
    assert np.sqrt(weights @ middle**2 - mean**2) == pytest.approx(sigma_rel, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_the_updates_make_the_weights(sigma_rel):
    """The parameters after update i are the unit vector i, so that their average has their weights."""
    state = {str(sigma_rel): {"w": jnp.full(30, 7.0)}}
    update = jax.jit(power_emas_update)
    for step in range(30):
        state = update(state, {"w": jnp.eye(30)[step]}, step)
    np.testing.assert_allclose(state[str(sigma_rel)]["w"], weights_of(sigma_rel, 30, 30), atol=2e-6)


@pytest.mark.parametrize("step", [0, 1, 1000, 999_999, 10_000_000])
def test_the_rate_is_exact_after_many_steps(step):
    gamma, t = gamma_of(0.1), np.longdouble(step + 1)
    beta = (1 - 1 / t) ** np.longdouble(gamma + 1)
    assert float(power_ema_rate(0.1, jnp.int32(step))) == pytest.approx(float(1 - beta), rel=1e-5)


def test_no_averages_are_none():
    assert power_emas_update((), {"w": jnp.ones(3)}, 0) == ()


@pytest.mark.parametrize("pair", [((1.0, 0.05), (1.0, 0.1)), ((0.5, 0.05), (1.0, 0.1)), ((1.0, 0.2), (0.3, 0.07))])
def test_the_correlation_is_the_integral_of_the_product(pair):
    n = 400_000
    tau = (np.arange(n) + 0.5) / n
    gammas = [gamma_of(sigma_rel) for _, sigma_rel in pair]
    p, q = ((g + 1) * tau**g / t ** (g + 1) * (tau <= t) for (t, _), g in zip(pair, gammas))
    assert float(correlation(Average(*pair[0]), Average(*pair[1]))) == pytest.approx((p * q).mean(), rel=1e-4)


@pytest.mark.parametrize("sigma_rel", STORED)
def test_a_stored_average_is_reconstructed_exactly(sigma_rel):
    times, lengths, values = averages(20)
    coefficients, error = reconstruction(Average(times, lengths), Average(STEPS, sigma_rel))
    is_it = (times == STEPS) & (lengths == sigma_rel)
    np.testing.assert_allclose(coefficients, is_it, atol=1e-9)
    assert error < 1e-7
    np.testing.assert_allclose(coefficients @ values, weights_of(sigma_rel, STEPS) @ trajectory(), rtol=1e-12)


@pytest.mark.parametrize("every", [10, 20, 60])
@pytest.mark.parametrize("sigma_rel", [0.02, 0.04, 0.06, 0.08, 0.12, 0.15, 0.2, 0.28])
def test_another_average_is_reconstructed_as_well_as_predicted(sigma_rel, every):
    times, lengths, values = averages(every)
    target = Average(STEPS, sigma_rel)
    coefficients, error = reconstruction(Average(times, lengths), target)
    assert coefficients.sum() == pytest.approx(1)
    theta, made = trajectory(), coefficients @ values
    expected = weights_of(sigma_rel, STEPS) @ theta
    bound = error * np.sqrt(float(correlation(target, target)) * (theta**2).sum(0))
    assert (np.abs(made - expected) <= bound + 1e-9).all()
    if every == 10 and 0.05 < sigma_rel <= 0.15:
        assert error < 0.01
        np.testing.assert_allclose(made, expected, rtol=3e-4)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.08, 0.2])
def test_the_coefficients_are_those_of_least_squares(sigma_rel):
    """Up to their sum, of weights sampled finely: no others are nearer to the weights of the target."""
    n, every = 6000, 500
    times, lengths = np.tile(np.arange(every, n + 1, every), 2), np.repeat(STORED, n // every)
    stored = np.stack([weights_of(s, t, n) for t, s in zip(times, lengths)])
    target = weights_of(sigma_rel, n, n)
    best = np.linalg.lstsq(stored.T, target)[0]
    coefficients, error = reconstruction(Average(times, lengths), Average(n, sigma_rel))
    np.testing.assert_allclose(coefficients, best / best.sum(), rtol=0.02, atol=0.01)
    apart = np.linalg.norm(coefficients @ stored - target) / np.linalg.norm(target)
    assert apart == pytest.approx(error, rel=0.02)


def test_the_error_falls_with_the_number_of_snapshots():
    errors = [
        reconstruction(Average(np.tile(np.arange(1, k + 1), 2), np.repeat(STORED, k)), Average(k, 0.08))[1]
        for k in (4, 8, 16, 64)
    ]
    np.testing.assert_allclose(errors, [3.1e-2, 1.1e-2, 3.0e-3, 1.9e-4], rtol=0.03)
