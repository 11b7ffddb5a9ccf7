import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import ks_2samp

from ldm_jax.diffusion.forward import noise_level, q_posterior, q_sample, target
from ldm_jax.diffusion.prediction import to_z0
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.schedules import linear_betas, make_process

HAND = Process.variance_preserving([0.81, 0.36, 0.04])  # alpha .9, .6, .2; sigma .43589, .8, .979796
BETA = linear_betas(10, 0.02, 0.5)
PROCESS = make_process("linear", 10, beta_start=0.02, beta_end=0.5)
ZERO_SNR = make_process("scaled_linear", 100, zero_terminal_snr=True)
FLOW = make_process("rectified_flow", 10)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_q_sample_by_hand():
    z0 = jnp.array([[1.0, 2.0], [1.0, 2.0]])
    eps = jnp.array([[1.0, -1.0], [0.5, 0.0]])
    z_t = q_sample(z0, jnp.array([1, 2]), eps, HAND)
    np.testing.assert_allclose(z_t, [[1.4, 0.4], [0.2 + 0.979796 * 0.5, 0.4]], rtol=1e-6)


def test_q_sample_composes_the_markov_chain():
    """Unrolled, z_t = sqrt(1 - beta) z_{t-1} + sqrt(beta) noise weighs z0 and the noises as alpha_bar says."""
    on_z0, on_noise = 1.0, np.zeros(10)
    for t, beta in enumerate(BETA):
        on_z0, on_noise = np.sqrt(1 - beta) * on_z0, np.sqrt(1 - beta) * on_noise
        on_noise[t] = np.sqrt(beta)
        one, zero = jnp.ones((1, 1)), jnp.zeros((1, 1))
        assert q_sample(one, jnp.array([t]), zero, PROCESS)[0, 0] == pytest.approx(on_z0, rel=1e-6)
        std = np.sqrt(np.sum(on_noise**2))
        assert q_sample(zero, jnp.array([t]), one, PROCESS)[0, 0] == pytest.approx(std, rel=1e-6)


def test_q_sample_has_the_distribution_of_the_markov_chain():
    n, t, z0 = 100_000, 6, 1.7
    rng = np.random.default_rng(0)
    chain = np.full(n, z0)
    for beta in BETA[: t + 1]:
        chain = np.sqrt(1 - beta) * chain + np.sqrt(beta) * rng.standard_normal(n)
    jump = q_sample(jnp.full((n, 1), z0), jnp.full(n, t), normal(1, n, 1), PROCESS)[:, 0]
    assert ks_2samp(chain, np.asarray(jump)).pvalue > 0.01
    assert abs(chain.mean() - jump.mean()) < 4 * np.sqrt(2 / n)


@pytest.mark.parametrize("t", [0, 1, 5, 9])
def test_posterior_is_bayes(t):
    """Precision-weighted product of N(z_{t-1}; sqrt(a_prev) z0, 1 - a_prev) and N(z_t; sqrt(1-beta) z_{t-1}, beta)."""
    z0, z_t = normal(2, 4, 3, 3, 2), normal(3, 4, 3, 3, 2)
    beta = BETA[t]
    previous = PROCESS.alpha[t - 1] ** 2 if t else 1.0
    mean, variance = q_posterior(z0, z_t, jnp.full(4, t), PROCESS)
    assert mean.shape == z0.shape and variance.shape == (4, 1, 1, 1)
    if t == 0:  # the prior is a point
        np.testing.assert_allclose(mean, z0, rtol=1e-6)
        np.testing.assert_array_equal(variance, 0)
        return
    precision = 1 / (1 - previous) + (1 - beta) / beta
    bayes = (np.sqrt(previous) * z0 / (1 - previous) + np.sqrt(1 - beta) * z_t / beta) / precision
    np.testing.assert_allclose(mean, bayes, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, np.full((4, 1, 1, 1), 1 / precision), rtol=1e-6)


def test_posterior_by_quadrature():
    """The same without any algebra: prior times likelihood on a grid."""
    t, z0, z_t = 4, 0.8, -0.3
    grid = np.linspace(-8, 8, 20_001)
    previous, beta = PROCESS.alpha[t - 1] ** 2, BETA[t]
    density = np.exp(-((grid - np.sqrt(previous) * z0) ** 2) / (2 * (1 - previous)))
    density *= np.exp(-((z_t - np.sqrt(1 - beta) * grid) ** 2) / (2 * beta))
    density /= density.sum()
    mean, variance = q_posterior(jnp.array([[z0]]), jnp.array([[z_t]]), jnp.array([t]), PROCESS)
    assert mean[0, 0] == pytest.approx((density * grid).sum(), rel=1e-5)
    assert variance[0, 0] == pytest.approx((density * (grid - (density * grid).sum()) ** 2).sum(), rel=1e-5)


def test_targets_by_hand():
    z0, eps, t = jnp.array([[2.0]]), jnp.array([[3.0]]), jnp.array([1])
    assert target("eps", z0, eps, t, HAND)[0, 0] == 3
    assert target("z0", z0, eps, t, HAND)[0, 0] == 2
    assert target("flow", z0, eps, t, HAND)[0, 0] == 1
    assert target("v", z0, eps, t, HAND)[0, 0] == pytest.approx(0.6 * 3 - 0.8 * 2)


def test_noise_levels_by_hand():
    level = noise_level(jnp.array([0, 2]), HAND)
    np.testing.assert_allclose(level[:3], [[0, 2], [0.9, 0.2], [0.43589, 0.979796]], rtol=1e-5)
    assert level.interval == 0
    alpha, sigma = level.broadcast_to(jnp.zeros((2, 4, 4, 3)))
    assert alpha.shape == sigma.shape == (2, 1, 1, 1)
    assert noise_level(1, HAND).broadcast_to(jnp.zeros((2, 4)))[0].shape == (1, 1)


def test_a_scalar_t_is_every_t():
    z0, eps = normal(0, 3, 2, 2), normal(1, 3, 2, 2)
    each = q_sample(z0, jnp.full(3, 2), eps, HAND)
    np.testing.assert_array_equal(q_sample(z0, 2, eps, HAND), each)
    assert q_posterior(z0, eps, 2, HAND)[1].shape == (1, 1, 1)


@pytest.mark.parametrize("prediction", ["v", "z0", "flow"])
def test_zero_terminal_snr_is_finite(prediction):
    z0, eps, t = normal(0, 1, 4), normal(1, 1, 4), jnp.array([99])
    z_t = q_sample(z0, t, eps, ZERO_SNR)
    np.testing.assert_array_equal(z_t, eps)
    output = target(prediction, z0, eps, t, ZERO_SNR)
    levels = noise_level(t, ZERO_SNR).broadcast_to(z_t)
    np.testing.assert_allclose(to_z0(prediction, output, z_t, *levels), z0, rtol=1e-6, atol=1e-7)
    mean, variance = q_posterior(z0, z_t, t, ZERO_SNR)
    assert np.isfinite(mean).all() and np.isfinite(variance).all()


@pytest.mark.parametrize("t", [1, 5, 8])
def test_posterior_of_rectified_flow_by_quadrature(t):
    """The Gaussian chain with these marginals: z_t = a z_{t-1} + noise, where a = alpha_t / alpha_{t-1}."""
    z0, z_t, s = 0.8, -0.3, np.arange(1, 11) / 10
    a = (1 - s[t]) / (1 - s[t - 1])
    beta = s[t] ** 2 - a**2 * s[t - 1] ** 2
    grid = np.linspace(-8, 8, 20_001)
    density = np.exp(-((grid - (1 - s[t - 1]) * z0) ** 2) / (2 * s[t - 1] ** 2) - (z_t - a * grid) ** 2 / (2 * beta))
    density /= density.sum()
    mean, variance = q_posterior(jnp.array([[z0]]), jnp.array([[z_t]]), jnp.array([t]), FLOW)
    assert mean[0, 0] == pytest.approx((density * grid).sum(), rel=1e-5)
    assert variance[0, 0] == pytest.approx((density * (grid - (density * grid).sum()) ** 2).sum(), rel=1e-5)


X, T0 = jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: target("eps", X, X, T0, ZERO_SNR), "zero terminal SNR"),
        (lambda: noise_level(3, HAND), "got 3"),
        (
            lambda: q_sample(X, jnp.array([0, 3]), X, HAND),
            "t must lie in 0..2 for a schedule of 3 timesteps, got 3",
        ),
        (lambda: q_sample(X, jnp.array([-1, 0]), X, HAND), "got -1"),
        (lambda: q_posterior(X, X, 3, HAND), "got 3"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("t", [-1, 3, 1000])
def test_a_traced_t_out_of_range_is_nan_and_never_clamped(t):
    ones = jnp.ones((2, 3))
    z_t = jax.jit(lambda t: q_sample(ones, t, ones, HAND))(jnp.array([1, t]))
    assert np.isfinite(z_t[0]).all()
    assert np.isnan(z_t[1]).all()
