import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.forward import noise_level, q_sample, target
from ldm_jax.diffusion.likelihood import log_variance_bounds, vlb_term
from ldm_jax.diffusion.losses import diffusion_loss, variance_loss
from ldm_jax.diffusion.prediction import PREDICTIONS, from_z0
from ldm_jax.diffusion.process import Process, posterior
from ldm_jax.diffusion.schedules import make_process
from ldm_jax.diffusion.weighting import WEIGHTINGS, loss_weights

PROCESS = Process.variance_preserving([0.81, 0.36, 0.04])
T = jnp.array([1, 2])


def test_by_hand():
    """eps: ((1-0)^2 + (3-1)^2) / 2 = 2.5 and 0.5; SNR = .5625 and .041667 are below gamma, so min_snr weighs 1."""
    output, eps, z0 = jnp.array([[1.0, 3.0], [1.0, 0.0]]), jnp.array([[0.0, 1.0], [0.0, 0.0]]), jnp.ones((2, 2))
    for weighting in WEIGHTINGS:
        loss = diffusion_loss(output, z0, eps, T, prediction="eps", weighting=weighting, process=PROCESS)
        np.testing.assert_allclose(loss, [2.5, 0.5], rtol=1e-6)
    loss = diffusion_loss(output, z0, eps, T, prediction="eps", weighting="min_snr", process=PROCESS, gamma=0.225)
    np.testing.assert_allclose(loss, [1.0, 0.5], rtol=1e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_zero_at_the_target_and_weighted_elsewhere(prediction, weighting):
    z0, eps = jax.random.normal(jax.random.key(0), (2, 2, 4, 4, 3))
    right = target(prediction, z0, eps, T, PROCESS)
    options = {"prediction": prediction, "weighting": weighting, "process": PROCESS, "gamma": 0.2}
    np.testing.assert_array_equal(diffusion_loss(right, z0, eps, T, **options), 0)
    off_by_two = diffusion_loss(right + 2, z0, eps, T, **options)
    np.testing.assert_allclose(off_by_two, 4 * loss_weights(weighting, prediction, PROCESS, 0.2)[T], rtol=1e-5)


def test_bfloat16_is_squared_in_float32():
    z0 = jnp.zeros((2, 3), jnp.bfloat16)
    output = jnp.full((2, 3), 1.0078125, jnp.bfloat16)  # its square has too many digits for bfloat16
    loss = diffusion_loss(output, z0, z0, T, prediction="z0", weighting="uniform", process=PROCESS)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, 1.0078125**2, rtol=1e-6)


def test_refusals():
    z0 = jnp.zeros((2, 4))
    zero_snr = make_process("linear", 10, zero_terminal_snr=True)
    with pytest.raises(ValueError, match=r"shape of z0, \(2, 4\), got \(2, 8\)"):
        diffusion_loss(jnp.zeros((2, 8)), z0, z0, T, prediction="eps", weighting="uniform", process=PROCESS)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        diffusion_loss(z0, z0, z0, T, prediction="eps", weighting="uniform", process=zero_snr)
    with pytest.raises(ValueError, match="got 'x0'"):
        diffusion_loss(z0, z0, z0, T, prediction="x0", weighting="uniform", process=PROCESS)
    with pytest.raises(ValueError, match="got 'snr'"):
        diffusion_loss(z0, z0, z0, T, prediction="eps", weighting="snr", process=PROCESS)


def test_zero_terminal_snr_has_a_finite_loss_and_gradient():
    zero_snr = make_process("linear", 10, zero_terminal_snr=True)
    z0, eps = jax.random.normal(jax.random.key(0), (2, 2, 4))

    @jax.grad
    def gradient(output):
        loss = diffusion_loss(output, z0, eps, jnp.array([0, 9]), prediction="v", weighting="min_snr", process=zero_snr)
        return loss.sum()

    assert np.isfinite(gradient(jnp.zeros((2, 4)))).all()


@pytest.mark.parametrize("num_bins", [None, 256])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_variance_alone_learns_from_the_vlb(prediction, num_bins):
    """It is the term of the VLB at the z0_hat that the output means, and the output gets no gradient of it."""
    z0, eps, z0_hat, v = jax.random.uniform(jax.random.key(0), (4, 3, 4), minval=-1)
    var_frac = (v + 1) / 2
    t = jnp.array([0, 1, 2])
    z_t = q_sample(z0, t, eps, PROCESS)
    output = from_z0(prediction, z0_hat, z_t, *noise_level(t, PROCESS).broadcast_to(z_t))

    @jax.jit
    def loss(output, var_frac):
        return variance_loss(output, var_frac, z0, z_t, t, prediction=prediction, process=PROCESS, num_bins=num_bins)

    expected = vlb_term(z0, z_t, z0_hat, t, PROCESS, variance="learned", var_frac=var_frac, num_bins=num_bins)
    np.testing.assert_allclose(loss(output, var_frac), expected, rtol=1e-3)
    to_output, to_variance = jax.jit(jax.grad(lambda *inputs: loss(*inputs).sum(), (0, 1)))(output, var_frac)
    np.testing.assert_array_equal(to_output, 0)
    assert (to_variance != 0).all()
    step = 0.025
    slope = (loss(output, var_frac + step) - loss(output, var_frac - step)) / (2 * step)
    np.testing.assert_allclose(to_variance.sum(1), slope, rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("t", [1, 2, 5])
def test_the_best_variance_for_gaussian_data_is_that_of_the_true_reverse_step(t):
    """Var[z_{t-1} | z_t] = beta_tilde + (weight of z0)^2 Var[z0 | z_t] (Bao 2022, theorem 1): the loss falls to it."""
    process, std, n = make_process("linear", 100, beta_start=0.001, beta_end=0.15), 0.6, 400_000
    z0, eps = jax.random.normal(jax.random.key(t), (2, n, 1)) * jnp.array([std, 1.0]).reshape(2, 1, 1)
    at = jnp.full(n, t)
    z_t = q_sample(z0, at, eps, process)
    a2 = process.alpha[t] ** 2
    z0_hat = np.sqrt(a2) * std**2 / (a2 * std**2 + 1 - a2) * z_t
    on_z0, _, small = posterior(process.alpha[t], process.sigma[t], process.alpha[t - 1], process.sigma[t - 1])
    exact = small + on_z0**2 * std**2 * (1 - a2) / (a2 * std**2 + 1 - a2)
    low, high = (bound[t] for bound in log_variance_bounds(process))
    best = (np.log(exact) - low) / (high - low)
    assert 0 < best < 1

    @jax.jit
    @jax.grad
    def slope(v):
        var_frac = jnp.broadcast_to(v, (n, 1))
        return variance_loss(z0_hat, var_frac, z0, z_t, at, prediction="z0", process=process).mean()

    assert slope(jnp.float32(best - 0.03)) < 0 < slope(jnp.float32(best + 0.03))
