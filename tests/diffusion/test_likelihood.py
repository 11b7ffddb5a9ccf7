"""The VLB against closed forms: quadrature, sums to one, and Gaussian data whose entropy is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.forward import q_sample
from ldm_jax.diffusion.likelihood import (
    discretized_gaussian_nll,
    gaussian_kl,
    log_variance,
    log_variance_bounds,
    prior_kl,
    vlb_term,
)
from ldm_jax.diffusion.process import VARIANCES, Process
from ldm_jax.diffusion.schedules import make_process

PROCESS = make_process("linear", 100, beta_start=0.001, beta_end=0.15)
TWO = Process.variance_preserving([0.81, 0.36])


def test_gaussian_kl_by_quadrature():
    m1, v1, m2, v2 = 0.3, 0.5, -0.4, 1.7
    x = np.linspace(-12, 12, 100_001)
    p, q = (np.exp(-((x - m) ** 2) / (2 * v)) / np.sqrt(2 * np.pi * v) for m, v in ((m1, v1), (m2, v2)))
    expected = np.sum(p * np.log(p / q)) * (x[1] - x[0])
    assert gaussian_kl(m1, np.log(v1), m2, np.log(v2)) == pytest.approx(expected, rel=1e-4)
    assert gaussian_kl(m1, np.log(v1), m1, np.log(v1)) == 0


@pytest.mark.parametrize("num_bins", [2, 5, 256])
@pytest.mark.parametrize("mean, std", [(0.1, 0.5), (-0.99, 0.01), (2.0, 0.3)])
def test_the_bins_have_all_probability(num_bins, mean, std):
    x = jnp.linspace(-1, 1, num_bins)
    nll = discretized_gaussian_nll(x, mean, 2 * np.log(std), num_bins)
    assert np.exp(-np.asarray(nll, np.float64)).sum() == pytest.approx(1, abs=1e-5)


def test_a_bin_by_hand():
    """The middle one of three: from -1/2 to 1/2 of a unit Gaussian."""
    assert discretized_gaussian_nll(jnp.float32(0), 0.0, 0.0, 3) == pytest.approx(-np.log(0.382925), rel=1e-5)


def test_log_variances_by_hand():
    """alpha_bar .81, .36: beta_1 = 5/9, beta_tilde_1 = .19 / .64 * 5/9; beta_0 = .19, beta_tilde_0 that of 1."""
    small, large = log_variance_bounds(TWO)
    tilde = 0.19 / 0.64 * 5 / 9
    np.testing.assert_allclose(np.exp(small), [tilde, tilde], rtol=1e-12)
    np.testing.assert_allclose(np.exp(large), [0.19, 5 / 9], rtol=1e-12)
    t, var_frac = jnp.array([1]), jnp.array([[0.0, 1.0, 0.5]])
    learned = np.exp(log_variance("learned", t, TWO, var_frac))
    np.testing.assert_allclose(learned, [[tilde, 5 / 9, np.sqrt(tilde * 5 / 9)]], rtol=1e-6)
    np.testing.assert_allclose(np.exp(log_variance("fixed_small", t, TWO)), [tilde], rtol=1e-6)
    np.testing.assert_allclose(np.exp(log_variance("fixed_large", t, TWO)), [5 / 9], rtol=1e-6)
    with pytest.raises(ValueError, match="one of fixed_small, fixed_large, learned, got 'small'"):
        log_variance("small", t, PROCESS)


def test_a_perfect_guess_costs_nothing_but_the_decoder():
    """With the posterior's own mean and variance every KL is 0."""
    z0, eps = jax.random.normal(jax.random.key(0), (2, 99, 5))
    t = jnp.arange(1, 100)
    z_t = q_sample(z0, t, eps, PROCESS)
    np.testing.assert_allclose(vlb_term(z0, z_t, z0, t, PROCESS), 0, atol=1e-4)
    assert (vlb_term(z0, z_t, z0, t, PROCESS, variance="fixed_large")[:10] > 1e-3).all()
    assert (vlb_term(z0, z_t, z0 + 0.1, t, PROCESS)[:50] > 1e-5).all()


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_vlb_of_an_exact_model_of_gaussian_data(variance):
    """z0 ~ N(0.2, 0.6^2). With E[z0 | z_t] and the right variance (learned) the sum of all terms is the entropy."""
    mean, std, n = 0.2, 0.6, 40_000
    entropy = 0.5 * np.log2(2 * np.pi * np.e * std**2)
    small, large = log_variance_bounds(PROCESS)
    z0 = mean + std * jax.random.normal(jax.random.key(0), (n, 1))

    @jax.jit
    def term(t, key):
        z_t = q_sample(z0, t, jax.random.normal(key, z0.shape), PROCESS)
        a = jnp.asarray(PROCESS.alpha, jnp.float32)[t]
        spread = a**2 * std**2 + 1 - a**2
        z0_hat = mean + a * std**2 / spread * (z_t - a * mean)
        # Var[z_{t-1} | z_t] = beta_tilde + (weight of z0)^2 Var[z0 | z_t].
        return vlb_term(
            z0, z_t, z0_hat, jnp.full(n, t), PROCESS, variance=variance, var_frac=jnp.full_like(z0, var_frac[t])
        ).mean()

    a2 = PROCESS.alpha**2
    before = np.append(1.0, a2[:-1])
    weight = np.sqrt(before) * (1 - a2 / before) / (1 - a2)
    tilde = (1 - before) / (1 - a2) * (1 - a2 / before)
    exact = tilde + weight**2 * std**2 * (1 - a2) / (a2 * std**2 + 1 - a2)
    var_frac = jnp.asarray((np.log(exact) - small) / (large - small), jnp.float32)
    var_frac = jnp.where(jnp.isfinite(var_frac), var_frac, 0.5)
    keys = jax.random.split(jax.random.key(1), 100)
    total = sum(float(term(t, keys[t])) for t in range(100)) + float(prior_kl(z0, PROCESS).mean())
    if variance == "learned":
        assert total == pytest.approx(entropy, abs=0.02)
    else:
        assert total > entropy + 0.01


def test_the_prior_term_by_hand():
    """KL(N(.2 z0, .96) || N(0, 1)) at z0 = 1: (.04 + .96 - 1 - log .96) / 2 nats."""
    assert prior_kl(jnp.ones((1, 3)), Process.variance_preserving([0.5, 0.04]))[0] == pytest.approx(
        -np.log(0.96) / 2 / np.log(2), rel=1e-4
    )
