"""The forward process as a value: its tables, its noise levels between timesteps, and its Gaussian steps."""

import numpy as np
import pytest

from ldm_jax.diffusion.process import Process, forward_step, neighbours, posterior
from ldm_jax.diffusion.schedules import SCHEDULES, make_process

HAND = Process.variance_preserving([0.81, 0.36, 0.04])


def test_equal_tables_are_equal_processes():
    again = Process.variance_preserving([0.81, 0.36, 0.04])
    assert again == HAND and hash(HAND) == hash(again) and HAND is not again
    assert Process.variance_preserving([0.81, 0.36]) != HAND and HAND != 0.81
    assert {HAND: 1}[again] == 1


def test_the_tables_are_read_only_float64():
    with pytest.raises(ValueError):
        HAND.alpha[0] = 1
    assert HAND.alpha.dtype == HAND.sigma.dtype == np.float64 and len(HAND) == 3


@pytest.mark.parametrize("alpha, sigma", [([0.9, 0.6], [0.1]), ([], []), ([[0.9]], [[0.1]])])
def test_tables_that_are_none(alpha, sigma):
    with pytest.raises(ValueError, match="alpha and sigma must be"):
        Process(alpha, sigma)


def test_points_by_hand():
    point = HAND.point(1)
    assert (point.t, point.alpha, point.sigma) == (1.0, pytest.approx(0.6), pytest.approx(0.8))
    assert point.ratio == pytest.approx(0.8 / 0.6) and point.half_log_snr == pytest.approx(np.log(0.6 / 0.8))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_point_between_timesteps_is_the_table_s_own_at_a_timestep(schedule):
    process = make_process(schedule, 20)
    for t in range(19):
        point = process.point(t)
        assert process.time_of(point.ratio) == pytest.approx(t, abs=1e-6)
        np.testing.assert_allclose(process.between(t, point.ratio), point, rtol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_point_between_timesteps_has_its_ratio_and_the_scale_of_its_neighbours(schedule):
    process = make_process(schedule, 1000)
    point = process.between(600.5, np.sqrt(process.point(600).ratio * process.point(601).ratio))
    assert process.point(600).ratio < point.ratio < process.point(601).ratio
    total = point.alpha + point.sigma if schedule == "rectified_flow" else np.hypot(point.alpha, point.sigma)
    assert total == pytest.approx(1, abs=1e-6)


def test_pure_noise_between_timesteps():
    flow = make_process("rectified_flow", 10)
    assert flow.between(8.5, np.inf) == (8.5, 0.0, 1.0)
    zero_snr = make_process("linear", 10, zero_terminal_snr=True)
    assert zero_snr.between(8.5, np.inf) == (8.5, 0.0, pytest.approx(1.0))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_forward_steps_compose_to_the_marginals(schedule):
    """z_t = alpha_ts z_s + noise of z_s = alpha_s z0 + sigma_s eps has alpha_t and sigma_t."""
    alpha_t, sigma_t, alpha_s, sigma_s = neighbours(make_process(schedule, 50))
    alpha_ts, variance = forward_step(alpha_t, sigma_t, alpha_s, sigma_s)
    np.testing.assert_allclose(alpha_ts * alpha_s, alpha_t)
    np.testing.assert_allclose(np.sqrt(alpha_ts**2 * sigma_s**2 + variance), sigma_t)
    assert (variance > 0).all()


def test_posterior_by_hand():
    """Ho 2020, eq. 7, with alpha_bar .81, .36: beta = 5/9; on z0 .9 (5/9) / .64, on z (2/3) .19 / .64."""
    on_z0, on_z, variance = (table[1] for table in posterior(*neighbours(HAND)))
    assert (on_z0, on_z) == (pytest.approx(0.78125), pytest.approx(2 / 3 * 0.19 / 0.64))
    assert variance == pytest.approx(0.19 / 0.64 * 5 / 9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_posterior_averaged_over_z0_is_the_marginal(schedule):
    """For z0 ~ N(0, 1): on_z0 z0 + on_z z_t + noise has the variance alpha_s^2 + sigma_s^2."""
    levels = alpha_t, sigma_t, alpha_s, sigma_s = neighbours(make_process(schedule, 50))
    on_z0, on_z, variance = posterior(*levels)
    total = (on_z0 + on_z * alpha_t) ** 2 + (on_z * sigma_t) ** 2 + variance
    np.testing.assert_allclose(total, alpha_s**2 + sigma_s**2, rtol=1e-9)
