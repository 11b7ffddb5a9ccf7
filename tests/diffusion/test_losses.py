import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.losses import diffusion_loss
from ldm_jax.diffusion.process import PREDICTIONS, WEIGHTINGS, loss_weight, target
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
