"""The distribution of training timesteps, against closed forms."""

import jax
import numpy as np
import pytest
import scipy.stats

from ldm_jax.diffusion.timesteps import UNIFORM, TimestepDistribution, sample_timesteps

T, N = 1000, 20_000


def shifted(s, shift):
    """The noise level s moved by Esser 2024, eq. 23."""
    return shift * s / (1 + (shift - 1) * s)


# distribution -> the quantile function of s = t / T
QUANTILES = {
    UNIFORM: lambda u: u,
    TimestepDistribution(shift=3.0): lambda u: shifted(u, 3.0),
    TimestepDistribution(shift=0.5): lambda u: shifted(u, 0.5),
    TimestepDistribution("logit_normal"): lambda u: 1 / (1 + np.exp(-scipy.stats.norm.ppf(u))),
    TimestepDistribution("logit_normal", mean=-0.4, std=1.2): lambda u: (
        1 / (1 + np.exp(0.4 - 1.2 * scipy.stats.norm.ppf(u)))
    ),
    TimestepDistribution("logit_normal", mean=1.0, std=0.5, shift=2.0): lambda u: shifted(
        1 / (1 + np.exp(-1.0 - 0.5 * scipy.stats.norm.ppf(u))), 2.0
    ),
}


@pytest.mark.parametrize("distribution", QUANTILES)
def test_quantiles_are_those_of_the_closed_form(distribution):
    t = np.asarray(sample_timesteps(jax.random.split(jax.random.key(0), N), T, distribution))
    assert t.dtype == np.int32 and t.min() >= 0 and t.max() < T
    levels = np.linspace(0.05, 0.95, 19)
    exact = QUANTILES[distribution](levels)
    below = np.array([np.mean(t < T * s) for s in exact])  # t = floor(T s)
    np.testing.assert_allclose(below, levels, atol=4 * np.sqrt(0.25 / N) + 1e-3)


@pytest.mark.parametrize("distribution", QUANTILES)
def test_each_example_has_its_own_key(distribution):
    keys = jax.random.split(jax.random.key(1), 6)
    t = sample_timesteps(keys, T, distribution)
    np.testing.assert_array_equal(sample_timesteps(keys[4:], T, distribution), t[4:])
    assert len(set(map(int, t))) > 3


def test_extreme_distributions_stay_within_the_process():
    keys = jax.random.split(jax.random.key(2), 2_000)
    most = sample_timesteps(keys, T, TimestepDistribution("logit_normal", mean=10.0, std=10.0, shift=100.0))
    assert int(most.max()) == T - 1 and int(most.min()) >= 0
    assert set(map(int, sample_timesteps(keys, 1, TimestepDistribution("logit_normal")))) == {0}


def test_an_unknown_distribution_is_refused():
    with pytest.raises(ValueError, match="must be one of uniform, logit_normal, got 'lognormal'"):
        sample_timesteps(jax.random.split(jax.random.key(0), 2), T, TimestepDistribution("lognormal"))
