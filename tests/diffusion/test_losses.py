import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.likelihood import bound_term, log_variance_bounds
from ldm_jax.diffusion.losses import diffusion_loss, variance_loss
from ldm_jax.diffusion.process import (
    PREDICTIONS,
    WEIGHTINGS,
    from_z0,
    level_at,
    loss_weight,
    posterior_coefficients,
    q_sample,
    target,
)
from ldm_jax.diffusion.schedules import make_schedule

ALPHA_BAR = np.array([0.81, 0.36, 0.04])
T = jnp.array([1, 2])


def test_by_hand():
    """eps: ((1-0)^2 + (3-1)^2) / 2 = 2.5 and 0.5; SNR = .5625 and .041667 are below gamma, so min_snr weighs 1."""
    output, eps, z0 = jnp.array([[1.0, 3.0], [1.0, 0.0]]), jnp.array([[0.0, 1.0], [0.0, 0.0]]), jnp.ones((2, 2))
    for weighting in WEIGHTINGS:
        loss = diffusion_loss(output, z0, eps, T, prediction="eps", weighting=weighting, alpha_bar=ALPHA_BAR)
        np.testing.assert_allclose(loss, [2.5, 0.5], rtol=1e-6)
    loss = diffusion_loss(output, z0, eps, T, prediction="eps", weighting="min_snr", alpha_bar=ALPHA_BAR, gamma=0.225)
    np.testing.assert_allclose(loss, [1.0, 0.5], rtol=1e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_zero_at_the_target_and_weighted_elsewhere(prediction, weighting):
    z0, eps = jax.random.normal(jax.random.key(0), (2, 2, 4, 4, 3))
    right = target(prediction, z0, eps, T, ALPHA_BAR)
    options = {"prediction": prediction, "weighting": weighting, "alpha_bar": ALPHA_BAR, "gamma": 0.2}
    np.testing.assert_array_equal(diffusion_loss(right, z0, eps, T, **options), 0)
    off_by_two = diffusion_loss(right + 2, z0, eps, T, **options)
    np.testing.assert_allclose(off_by_two, 4 * loss_weight(weighting, prediction, T, ALPHA_BAR, 0.2), rtol=1e-5)


def test_bfloat16_is_squared_in_float32():
    z0 = jnp.zeros((2, 3), jnp.bfloat16)
    output = jnp.full((2, 3), 1.0078125, jnp.bfloat16)  # its square has too many digits for bfloat16
    loss = diffusion_loss(output, z0, z0, T, prediction="z0", weighting="uniform", alpha_bar=ALPHA_BAR)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, 1.0078125**2, rtol=1e-6)


def test_refusals():
    z0 = jnp.zeros((2, 4))
    zero_snr = make_schedule("linear", 10, zero_terminal_snr=True).alpha_bar
    with pytest.raises(ValueError, match=r"shape of z0, \(2, 4\), got \(2, 8\)"):
        diffusion_loss(jnp.zeros((2, 8)), z0, z0, T, prediction="eps", weighting="uniform", alpha_bar=ALPHA_BAR)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        diffusion_loss(z0, z0, z0, T, prediction="eps", weighting="uniform", alpha_bar=zero_snr)
    with pytest.raises(ValueError, match="got 'x0'"):
        diffusion_loss(z0, z0, z0, T, prediction="x0", weighting="uniform", alpha_bar=ALPHA_BAR)
    with pytest.raises(ValueError, match="got 'snr'"):
        diffusion_loss(z0, z0, z0, T, prediction="eps", weighting="snr", alpha_bar=ALPHA_BAR)


def test_zero_terminal_snr_has_a_finite_loss_and_gradient():
    zero_snr = make_schedule("linear", 10, zero_terminal_snr=True).alpha_bar
    z0, eps = jax.random.normal(jax.random.key(0), (2, 2, 4))

    @jax.grad
    def gradient(output):
        loss = diffusion_loss(
            output, z0, eps, jnp.array([0, 9]), prediction="v", weighting="min_snr", alpha_bar=zero_snr
        )
        return loss.sum()

    assert np.isfinite(gradient(jnp.zeros((2, 4)))).all()


@pytest.mark.parametrize("levels", [None, 256])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_variance_alone_learns_from_the_bound(prediction, levels):
    """It is the term of the bound at the z0_hat that the output means, and the output gets no gradient of it."""
    z0, eps, z0_hat, spread = jax.random.uniform(jax.random.key(0), (4, 3, 4), minval=-1)
    t = jnp.array([0, 1, 2])
    z_t = q_sample(z0, t, eps, ALPHA_BAR)
    output = from_z0(prediction, z0_hat, z_t, level_at(t, ALPHA_BAR))

    @jax.jit
    def loss(output, spread):
        return variance_loss(output, spread, z0, z_t, t, prediction=prediction, alpha_bar=ALPHA_BAR, levels=levels)

    expected = bound_term(z0, z_t, z0_hat, t, ALPHA_BAR, variance="learned", learned=spread, levels=levels)
    np.testing.assert_allclose(loss(output, spread), expected, rtol=1e-3)
    to_output, to_spread = jax.jit(jax.grad(lambda *inputs: loss(*inputs).sum(), (0, 1)))(output, spread)
    np.testing.assert_array_equal(to_output, 0)
    assert (to_spread != 0).all()
    step = 0.05
    slope = (loss(output, spread + step) - loss(output, spread - step)) / (2 * step)
    np.testing.assert_allclose(to_spread.sum(1), slope, rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("t", [1, 2, 5])
def test_the_best_spread_for_gaussian_data_is_that_of_the_true_reverse_step(t):
    """Var[z_{t-1} | z_t] = beta_tilde + (weight of z0)^2 Var[z0 | z_t] (Bao 2022, theorem 1): the loss falls to it."""
    alpha_bar, std, n = make_schedule("linear", 100, beta_start=0.001, beta_end=0.15).alpha_bar, 0.6, 400_000
    z0, eps = jax.random.normal(jax.random.key(t), (2, n, 1)) * jnp.array([std, 1.0]).reshape(2, 1, 1)
    at = jnp.full(n, t)
    z_t = q_sample(z0, at, eps, alpha_bar)
    a2 = alpha_bar[t]
    z0_hat = np.sqrt(a2) * std**2 / (a2 * std**2 + 1 - a2) * z_t
    on_z0, _, small = posterior_coefficients(alpha_bar[t], alpha_bar[t - 1])
    exact = small + on_z0**2 * std**2 * (1 - a2) / (a2 * std**2 + 1 - a2)
    low, high = (bound[t] for bound in log_variance_bounds(alpha_bar))
    best = 2 * (np.log(exact) - low) / (high - low) - 1
    assert -1 < best < 1

    @jax.jit
    @jax.grad
    def slope(v):
        spread = jnp.broadcast_to(v, (n, 1))
        return variance_loss(z0_hat, spread, z0, z_t, at, prediction="z0", alpha_bar=alpha_bar).mean()

    assert slope(jnp.float32(best - 0.06)) < 0 < slope(jnp.float32(best + 0.06))
