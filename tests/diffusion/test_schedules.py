import numpy as np
import pytest

from ldm_jax.diffusion.schedules import EVEN, SCHEDULES, Schedule, make_schedule, rescale_zero_terminal_snr, timesteps


def test_linear_by_hand():
    schedule = make_schedule("linear", 3, beta_start=0.1, beta_end=0.5)
    np.testing.assert_allclose(schedule.beta, [0.1, 0.3, 0.5], rtol=1e-14)
    np.testing.assert_allclose(schedule.alpha_bar, [0.9, 0.63, 0.315], rtol=1e-14)


def test_scaled_linear_by_hand():
    schedule = make_schedule("scaled_linear", 3, beta_start=0.01, beta_end=0.09)  # sqrt(beta) = .1, .2, .3
    np.testing.assert_allclose(schedule.beta, [0.01, 0.04, 0.09], rtol=1e-14)
    np.testing.assert_allclose(schedule.alpha_bar, [0.99, 0.9504, 0.864864], rtol=1e-14)


def test_cosine_by_hand():
    """T = 2: f(0) = cos^2(.008/1.008 pi/2), f(1) = cos^2(.508/1.008 pi/2), f(2) = 0, so the last beta is clipped."""
    f0, f1 = np.cos(0.0124666) ** 2, np.cos(0.791629) ** 2
    schedule = make_schedule("cosine", 2)
    np.testing.assert_allclose(schedule.beta, [1 - f1 / f0, 0.999], rtol=1e-5)
    np.testing.assert_allclose(schedule.alpha_bar, [f1 / f0, f1 / f0 * 0.001], rtol=1e-5)


def test_published_endpoints():
    """alpha_bar[-1] of Ho 2020 (4.0e-5) and of Stable Diffusion (0.0047)."""
    assert make_schedule("linear", 1000, beta_start=1e-4, beta_end=0.02).alpha_bar[-1] == pytest.approx(4.036e-5, 1e-3)
    assert make_schedule("scaled_linear", 1000).alpha_bar[-1] == pytest.approx(0.0046602, 1e-4)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_tables_are_float64_and_fall(name, zero_terminal_snr):
    schedule = make_schedule(name, 1000, zero_terminal_snr=zero_terminal_snr)
    assert schedule.beta.dtype == schedule.alpha_bar.dtype == np.float64
    assert schedule.beta.shape == schedule.alpha_bar.shape == (1000,)
    assert (np.diff(schedule.alpha_bar) < 0).all()
    assert (schedule.beta > 0).all()
    assert (schedule.alpha_bar[-1] == 0) == zero_terminal_snr


def test_zero_terminal_snr_by_hand():
    """sqrt(alpha_bar) = (.9, .6, .3) is shifted by .3 and scaled by .9/.6: (.9, .45, 0)."""
    alpha_bar = np.array([0.81, 0.36, 0.09])
    beta = 1 - alpha_bar / np.array([1.0, 0.81, 0.36])
    rescaled = rescale_zero_terminal_snr(beta)
    np.testing.assert_allclose(np.cumprod(1 - rescaled), [0.81, 0.2025, 0.0], atol=1e-15)
    np.testing.assert_allclose(rescaled, [0.19, 0.75, 1.0], rtol=1e-12)


@pytest.mark.parametrize(
    "spacing, T, steps, offset, expected",
    [
        ("leading", 1000, 5, 0, [800, 600, 400, 200, 0]),
        ("leading", 1000, 5, 1, [801, 601, 401, 201, 1]),
        ("leading", 10, 3, 1, [7, 4, 1]),
        ("leading", 10, 10, 0, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
        ("trailing", 1000, 5, 0, [999, 799, 599, 399, 199]),
        ("trailing", 1000, 5, 1, [999, 799, 599, 399, 199]),  # the offset is for leading only
        ("trailing", 10, 3, 0, [9, 6, 2]),
        ("trailing", 10, 1, 0, [9]),
        ("linspace", 1000, 5, 0, [999, 749, 500, 250, 0]),  # 749.25, 499.5 to even, 249.75
        ("linspace", 10, 4, 0, [9, 6, 3, 0]),
        ("linspace", 10, 1, 0, [0]),
    ],
)
def test_timesteps_by_hand(spacing, T, steps, offset, expected):
    t = timesteps(spacing, T, steps, offset)
    assert t.tolist() == expected
    assert t.dtype == np.int64


@pytest.mark.parametrize("T", [1, 7, 100, 1000])
@pytest.mark.parametrize("spacing", EVEN)
def test_timesteps_descend_within_range(spacing, T):
    """For every number of steps; trailing at 1000 includes the counts where arange gives an element too many."""
    for steps in range(1, T + 1):
        t = timesteps(spacing, T, steps)
        assert len(t) == steps, steps
        assert t[0] < T and t[-1] >= 0, steps
        assert (np.diff(t) < 0).all(), steps


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: make_schedule("quadratic", 10),
            "schedule must be one of linear, scaled_linear, cosine, got 'quadrati",
        ),
        (lambda: make_schedule("linear", 0), "a schedule needs T >= 1 timesteps, got T = 0"),
        (lambda: make_schedule("linear", 10, beta_start=0.0), "got 0.0 and 0.012"),
        (lambda: make_schedule("linear", 10, beta_start=0.03, beta_end=0.02), "got 0.03 and 0.02"),
        (lambda: make_schedule("linear", 10, beta_end=1.0), "got 0.00085 and 1.0"),
        (lambda: make_schedule("linear", 1, zero_terminal_snr=True), "zero terminal SNR needs T >= 2"),
        (lambda: timesteps("karras", 10, 5), "spacing must be one of leading, trailing, linspace here, got 'karras'"),
        (lambda: timesteps("leading", 10, 0), "steps must lie in 1..10 for a schedule of 10 timesteps, got 0"),
        (lambda: timesteps("linspace", 10, 11), "steps must lie in 1..10 for a schedule of 10 timesteps, got 11"),
        (lambda: timesteps("leading", 10, 10, 1), "steps_offset must lie in 0..0 for 10 of 10 timesteps, got 1"),
        (lambda: timesteps("leading", 10, 2, -1), "steps_offset must lie in 0..4 for 2 of 10 timesteps, got -1"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_schedule_unpacks():
    beta, alpha_bar = Schedule(np.array([0.5]), np.array([0.5]))
    assert beta == alpha_bar == 0.5
