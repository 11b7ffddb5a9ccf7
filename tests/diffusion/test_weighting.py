import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.forward import gather, noise_level, q_sample, target
from ldm_jax.diffusion.prediction import PREDICTIONS
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.schedules import make_process
from ldm_jax.diffusion.weighting import loss_weights

PROCESS = Process.variance_preserving([0.81, 0.36, 0.04])
ZERO_SNR = make_process("scaled_linear", 100, zero_terminal_snr=True)
SNR_0, SNR_1 = 0.81 / 0.19, 0.36 / 0.64  # 4.263, 0.5625


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(
    "weighting, prediction, expected",
    [
        ("uniform", "eps", [1, 1]),
        ("uniform", "v", [1, 1]),
        ("uniform", "z0", [1, 1]),
        ("uniform", "flow", [1, 1]),
        ("min_snr", "eps", [2 / SNR_0, 1]),
        ("min_snr", "v", [2 / (SNR_0 + 1), SNR_1 / (SNR_1 + 1)]),
        ("min_snr", "z0", [2, SNR_1]),
        ("min_snr", "flow", [2 * 0.19 / (0.9 + 0.19**0.5) ** 2, SNR_1 * 0.64 / 1.96]),
    ],
)
def test_loss_weights_by_hand(weighting, prediction, expected):
    np.testing.assert_allclose(loss_weights(weighting, prediction, PROCESS, 2.0)[:2], expected, rtol=1e-12)


def test_min_snr_is_one_loss_of_every_prediction():
    """Weighted squared errors agree, whichever prediction the same wrong guess is expressed in."""
    z0, eps, guess, t = normal(0, 3, 5), normal(1, 3, 5), normal(2, 3, 5), jnp.array([0, 1, 2])
    z_t = q_sample(z0, t, eps, PROCESS)
    alpha, sigma = noise_level(t, PROCESS).broadcast_to(z_t)
    eps_guess = (z_t - alpha * guess) / sigma
    losses = []
    for prediction in PREDICTIONS:
        error = target(prediction, guess, eps_guess, t, PROCESS) - target(prediction, z0, eps, t, PROCESS)
        losses.append(gather(loss_weights("min_snr", prediction, PROCESS), t, 2) * error**2)
    for other in losses[1:]:
        np.testing.assert_allclose(other, losses[0], rtol=1e-3)


@pytest.mark.parametrize("prediction", ["v", "z0", "flow"])
def test_min_snr_is_finite_at_zero_snr(prediction):
    assert loss_weights("min_snr", prediction, ZERO_SNR)[99] == 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: loss_weights("p2", "eps", PROCESS), "weighting must be one of uniform, min_snr, got 'p2'"),
        (lambda: loss_weights("min_snr", "eps", PROCESS, gamma=0.0), "min_snr needs gamma > 0, got 0.0"),
        (lambda: loss_weights("min_snr", "eps", ZERO_SNR), "zero terminal SNR"),
        (lambda: loss_weights("uniform", "x0", PROCESS), "got 'x0'"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
