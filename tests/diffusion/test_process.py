import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from ldm_jax.diffusion.process import (
    PREDICTIONS,
    check_prediction,
    from_z0,
    level_at,
    loss_weight,
    q_posterior,
    q_sample,
    snr,
    target,
    to_eps,
    to_z0,
)
from ldm_jax.diffusion.schedules import make_schedule

ALPHA_BAR = np.array([0.81, 0.36, 0.04])  # sqrt: .9, .6, .2; sqrt(1 - .): .43589, .8, .979796
SCHEDULE = make_schedule("linear", 10, beta_start=0.02, beta_end=0.5)
ZERO_SNR = make_schedule("scaled_linear", 100, zero_terminal_snr=True)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_q_sample_by_hand():
    z0 = jnp.array([[1.0, 2.0], [1.0, 2.0]])
    eps = jnp.array([[1.0, -1.0], [0.5, 0.0]])
    z_t = q_sample(z0, jnp.array([1, 2]), eps, ALPHA_BAR)
    np.testing.assert_allclose(z_t, [[1.4, 0.4], [0.2 + 0.979796 * 0.5, 0.4]], rtol=1e-6)


def test_q_sample_composes_the_markov_chain():
    """Unrolled, z_t = sqrt(1 - beta) z_{t-1} + sqrt(beta) noise weighs z0 and the noises as alpha_bar says."""
    on_z0, on_noise = 1.0, np.zeros(10)
    for t, beta in enumerate(SCHEDULE.beta):
        on_z0, on_noise = np.sqrt(1 - beta) * on_z0, np.sqrt(1 - beta) * on_noise
        on_noise[t] = np.sqrt(beta)
        one, zero = jnp.ones((1, 1)), jnp.zeros((1, 1))
        assert q_sample(one, jnp.array([t]), zero, SCHEDULE.alpha_bar)[0, 0] == pytest.approx(on_z0, rel=1e-6)
        spread = np.sqrt(np.sum(on_noise**2))
        assert q_sample(zero, jnp.array([t]), one, SCHEDULE.alpha_bar)[0, 0] == pytest.approx(spread, rel=1e-6)


def test_q_sample_has_the_distribution_of_the_markov_chain():
    n, t, z0 = 100_000, 6, 1.7
    rng = np.random.default_rng(0)
    chain = np.full(n, z0)
    for beta in SCHEDULE.beta[: t + 1]:
        chain = np.sqrt(1 - beta) * chain + np.sqrt(beta) * rng.standard_normal(n)
    jump = q_sample(jnp.full((n, 1), z0), jnp.full(n, t), normal(1, n, 1), SCHEDULE.alpha_bar)[:, 0]
    assert ks_2samp(chain, np.asarray(jump)).pvalue > 0.01
    assert abs(chain.mean() - jump.mean()) < 4 * np.sqrt(2 / n)


@pytest.mark.parametrize("t", [0, 1, 5, 9])
def test_posterior_is_bayes(t):
    """Precision-weighted product of N(z_{t-1}; sqrt(a_prev) z0, 1 - a_prev) and N(z_t; sqrt(1-beta) z_{t-1}, beta)."""
    z0, z_t = normal(2, 4, 3, 3, 2), normal(3, 4, 3, 3, 2)
    beta = SCHEDULE.beta[t]
    previous = SCHEDULE.alpha_bar[t - 1] if t else 1.0
    mean, variance = q_posterior(z0, z_t, jnp.full(4, t), SCHEDULE.alpha_bar)
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
    previous, beta = SCHEDULE.alpha_bar[t - 1], SCHEDULE.beta[t]
    density = np.exp(-((grid - np.sqrt(previous) * z0) ** 2) / (2 * (1 - previous)))
    density *= np.exp(-((z_t - np.sqrt(1 - beta) * grid) ** 2) / (2 * beta))
    density /= density.sum()
    mean, variance = q_posterior(jnp.array([[z0]]), jnp.array([[z_t]]), jnp.array([t]), SCHEDULE.alpha_bar)
    assert mean[0, 0] == pytest.approx((density * grid).sum(), rel=1e-5)
    assert variance[0, 0] == pytest.approx((density * (grid - (density * grid).sum()) ** 2).sum(), rel=1e-5)


def test_targets_by_hand():
    z0, eps, t = jnp.array([[2.0]]), jnp.array([[3.0]]), jnp.array([1])
    assert target("eps", z0, eps, t, ALPHA_BAR)[0, 0] == 3
    assert target("z0", z0, eps, t, ALPHA_BAR)[0, 0] == 2
    assert target("v", z0, eps, t, ALPHA_BAR)[0, 0] == pytest.approx(0.6 * 3 - 0.8 * 2)


@settings(deadline=None, max_examples=30)
@given(
    prediction=st.sampled_from(PREDICTIONS),
    t=st.lists(st.integers(0, 9), min_size=2, max_size=2),
    seed=st.integers(0, 2**31),
)
def test_targets_invert(prediction, t, seed):
    z0, eps = normal(seed, 2, 3), normal(seed + 1, 2, 3)
    t = jnp.array(t)
    z_t = q_sample(z0, t, eps, SCHEDULE.alpha_bar)
    output = target(prediction, z0, eps, t, SCHEDULE.alpha_bar)
    level = level_at(t, SCHEDULE.alpha_bar)
    np.testing.assert_allclose(to_z0(prediction, output, z_t, level), z0, atol=3e-5)
    np.testing.assert_allclose(to_eps(prediction, output, z_t, level), eps, atol=3e-5)
    np.testing.assert_allclose(from_z0(prediction, z0, z_t, level), output, atol=3e-5)


def test_levels_by_hand():
    level = level_at(jnp.array([0, 2]), ALPHA_BAR)
    np.testing.assert_allclose(level, [[0, 2], [0.9, 0.2], [0.43589, 0.979796]], rtol=1e-5)
    alpha, sigma = level.beside(jnp.zeros((2, 4, 4, 3)))
    assert alpha.shape == sigma.shape == (2, 1, 1, 1)
    assert level_at(1, ALPHA_BAR).beside(jnp.zeros((2, 4)))[0].shape == (1, 1)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_bfloat16_network_is_scheduled_in_float32(prediction):
    output = normal(0, 2, 3).astype(jnp.bfloat16)
    for convert in (to_z0, to_eps):
        got = convert(prediction, output, normal(1, 2, 3), level_at(jnp.array([0, 2]), ALPHA_BAR))
        assert got.dtype == jnp.float32


def test_a_scalar_t_is_every_t():
    z0, eps = normal(0, 3, 2, 2), normal(1, 3, 2, 2)
    each = q_sample(z0, jnp.full(3, 2), eps, ALPHA_BAR)
    np.testing.assert_array_equal(q_sample(z0, 2, eps, ALPHA_BAR), each)
    assert q_posterior(z0, eps, 2, ALPHA_BAR)[1].shape == (1, 1, 1)


@pytest.mark.parametrize("prediction", ["v", "z0"])
def test_zero_terminal_snr_is_finite(prediction):
    z0, eps, t = normal(0, 1, 4), normal(1, 1, 4), jnp.array([99])
    z_t = q_sample(z0, t, eps, ZERO_SNR.alpha_bar)
    np.testing.assert_array_equal(z_t, eps)
    output = target(prediction, z0, eps, t, ZERO_SNR.alpha_bar)
    np.testing.assert_allclose(to_z0(prediction, output, z_t, level_at(t, ZERO_SNR.alpha_bar)), z0, rtol=1e-6)
    np.testing.assert_allclose(to_eps(prediction, output, z_t, level_at(t, ZERO_SNR.alpha_bar)), eps, rtol=1e-6)
    mean, variance = q_posterior(z0, z_t, t, ZERO_SNR.alpha_bar)
    assert np.isfinite(mean).all() and np.isfinite(variance).all()


def test_snr_by_hand():
    np.testing.assert_allclose(snr(jnp.array([0, 1, 2]), ALPHA_BAR), [0.81 / 0.19, 0.36 / 0.64, 0.04 / 0.96], rtol=1e-6)


SNR_0, SNR_1 = 0.81 / 0.19, 0.36 / 0.64  # 4.263, 0.5625


@pytest.mark.parametrize(
    "weighting, prediction, expected",
    [
        ("uniform", "eps", [1, 1]),
        ("uniform", "v", [1, 1]),
        ("uniform", "z0", [1, 1]),
        ("min_snr", "eps", [2 / SNR_0, 1]),
        ("min_snr", "v", [2 / (SNR_0 + 1), SNR_1 / (SNR_1 + 1)]),
        ("min_snr", "z0", [2, SNR_1]),
    ],
)
def test_loss_weights_by_hand(weighting, prediction, expected):
    weight = loss_weight(weighting, prediction, jnp.array([0, 1]), ALPHA_BAR, gamma=2.0)
    np.testing.assert_allclose(weight, expected, rtol=1e-6)


def test_min_snr_is_one_loss_in_three_clothes():
    """Weighted squared errors agree, whichever of eps, v and z0 the same wrong guess is expressed in."""
    z0, eps, guess, t = normal(0, 3, 5), normal(1, 3, 5), normal(2, 3, 5), jnp.array([0, 1, 2])
    z_t = q_sample(z0, t, eps, ALPHA_BAR)
    eps_guess = to_eps("z0", guess, z_t, level_at(t, ALPHA_BAR))
    losses = []
    for prediction in PREDICTIONS:
        error = target(prediction, guess, eps_guess, t, ALPHA_BAR) - target(prediction, z0, eps, t, ALPHA_BAR)
        losses.append(loss_weight("min_snr", prediction, t, ALPHA_BAR)[:, None] * error**2)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-3)


@pytest.mark.parametrize("prediction", ["v", "z0"])
def test_min_snr_is_finite_at_zero_snr(prediction):
    assert loss_weight("min_snr", prediction, jnp.array([99]), ZERO_SNR.alpha_bar)[0] == 0


X, T0 = jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: check_prediction("x0", ALPHA_BAR), "prediction must be one of eps, v, z0, got 'x0'"),
        (lambda: check_prediction("eps", ZERO_SNR.alpha_bar), "prediction 'eps' cannot recover z0 where alpha_bar = 0"),
        (lambda: target("eps", X, X, T0, ZERO_SNR.alpha_bar), "zero terminal SNR"),
        (lambda: level_at(3, ALPHA_BAR), "got 3"),
        (lambda: to_z0("x0", X, X, level_at(0, ALPHA_BAR)), "got 'x0'"),
        (lambda: to_eps("score", X, X, level_at(0, ALPHA_BAR)), "got 'score'"),
        (lambda: from_z0("", X, X, level_at(0, ALPHA_BAR)), "got ''"),
        (lambda: loss_weight("p2", "eps", T0, ALPHA_BAR), "weighting must be one of uniform, min_snr, got 'p2'"),
        (lambda: loss_weight("min_snr", "eps", T0, ALPHA_BAR, gamma=0.0), "min_snr needs gamma > 0, got 0.0"),
        (lambda: loss_weight("min_snr", "eps", T0, ZERO_SNR.alpha_bar), "zero terminal SNR"),
        (
            lambda: q_sample(X, jnp.array([0, 3]), X, ALPHA_BAR),
            "t must lie in 0..2 for a schedule of 3 timesteps, got 3",
        ),
        (lambda: q_sample(X, jnp.array([-1, 0]), X, ALPHA_BAR), "got -1"),
        (lambda: q_posterior(X, X, 3, ALPHA_BAR), "got 3"),
        (lambda: snr(np.array([3]), ALPHA_BAR), "got 3"),
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
    z_t = jax.jit(lambda t: q_sample(ones, t, ones, ALPHA_BAR))(jnp.array([1, t]))
    assert np.isfinite(z_t[0]).all()
    assert np.isnan(z_t[1]).all()
