import numpy as np
import pytest

from ldm_jax.diffusion.schedules import (
    BETAS,
    SCHEDULES,
    cosine_betas,
    linear_betas,
    make_process,
    rescale_zero_terminal_snr,
    scaled_linear_betas,
)


def alpha_bar(*arguments, **options):
    return make_process(*arguments, **options).alpha ** 2


def test_linear_by_hand():
    np.testing.assert_allclose(linear_betas(3, 0.1, 0.5), [0.1, 0.3, 0.5], rtol=1e-14)
    np.testing.assert_allclose(alpha_bar("linear", 3, beta_start=0.1, beta_end=0.5), [0.9, 0.63, 0.315], rtol=1e-14)


def test_scaled_linear_by_hand():
    np.testing.assert_allclose(scaled_linear_betas(3, 0.01, 0.09), [0.01, 0.04, 0.09], rtol=1e-14)  # roots .1, .2, .3
    found = alpha_bar("scaled_linear", 3, beta_start=0.01, beta_end=0.09)
    np.testing.assert_allclose(found, [0.99, 0.9504, 0.864864], rtol=1e-14)


def test_cosine_by_hand():
    """T = 2: f(0) = cos^2(.008/1.008 pi/2), f(1) = cos^2(.508/1.008 pi/2), f(2) = 0, so the last beta is clipped."""
    f0, f1 = np.cos(0.0124666) ** 2, np.cos(0.791629) ** 2
    np.testing.assert_allclose(cosine_betas(2), [1 - f1 / f0, 0.999], rtol=1e-5)
    np.testing.assert_allclose(alpha_bar("cosine", 2), [f1 / f0, f1 / f0 * 0.001], rtol=1e-5)


def test_rectified_flow_by_hand():
    process = make_process("rectified_flow", 4)
    np.testing.assert_allclose(process.alpha, [0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(process.sigma, [0.25, 0.5, 0.75, 1])


def test_published_endpoints():
    """alpha_bar[-1] of Ho 2020 (4.0e-5) and of Stable Diffusion (0.0047)."""
    assert alpha_bar("linear", 1000, beta_start=1e-4, beta_end=0.02)[-1] == pytest.approx(4.036e-5, 1e-3)
    assert alpha_bar("scaled_linear", 1000)[-1] == pytest.approx(0.0046602, 1e-4)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_tables_are_float64_and_monotone(name, zero_terminal_snr):
    process = make_process(name, 1000, zero_terminal_snr=zero_terminal_snr)
    for table in (process.alpha, process.sigma):
        assert table.dtype == np.float64 and table.shape == (1000,)
    assert (np.diff(process.alpha) < 0).all() and (np.diff(process.sigma) >= 0).all()
    assert (process.alpha[-1] == 0) == (zero_terminal_snr or name not in BETAS)
    if name in BETAS:
        np.testing.assert_allclose(process.alpha**2 + process.sigma**2, 1, rtol=1e-12)


def test_zero_terminal_snr_by_hand():
    """sqrt(alpha_bar) = (.9, .6, .3) is shifted by .3 and scaled by .9/.6: (.9, .45, 0)."""
    alpha_bar = np.array([0.81, 0.36, 0.09])
    beta = 1 - alpha_bar / np.array([1.0, 0.81, 0.36])
    rescaled = rescale_zero_terminal_snr(beta)
    np.testing.assert_allclose(np.cumprod(1 - rescaled), [0.81, 0.2025, 0.0], atol=1e-15)
    np.testing.assert_allclose(rescaled, [0.19, 0.75, 1.0], rtol=1e-12)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: make_process("quadratic", 10),
            "schedule must be one of linear, scaled_linear, cosine, rectified_flow, got 'quadrati",
        ),
        (lambda: make_process("linear", 0), "a schedule needs T >= 1 timesteps, got T = 0"),
        (lambda: make_process("linear", 10, beta_start=0.0), "got 0.0 and 0.012"),
        (lambda: make_process("linear", 10, beta_start=0.03, beta_end=0.02), "got 0.03 and 0.02"),
        (lambda: make_process("linear", 10, beta_end=1.0), "got 0.00085 and 1.0"),
        (lambda: make_process("linear", 1, zero_terminal_snr=True), "zero terminal SNR needs T >= 2"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
