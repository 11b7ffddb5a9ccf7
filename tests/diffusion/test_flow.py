"""Rectified flow: its path and target in closed form, its timesteps, Euler's method, and orders of convergence."""

from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.flow import FlowSpacing, shifted
from ldm_jax.diffusion.forward import q_sample, target
from ldm_jax.diffusion.losses import diffusion_loss
from ldm_jax.diffusion.prediction import from_z0, to_z0
from ldm_jax.diffusion.schedules import make_process
from ldm_jax.diffusion.solvers import SOLVERS, make_table
from ldm_jax.diffusion.spacing import noise_levels
from ldm_jax.diffusion.tables import HISTORY, X, Z
from ldm_jax.diffusion.weighting import loss_weights

T = 40
FLOW = make_process("rectified_flow", T)
RNG = np.random.default_rng(0)
Z0, EPS = RNG.standard_normal((2, T, 3)).astype(np.float32)
S = (np.arange(T)[:, None] + 1) / T  # of timestep t; z_0 has noise already, z_{T-1} is noise alone
DISTILLED = ("lcm", "tcd")


def test_the_path_is_straight_and_the_target_its_slope():
    t = jnp.arange(T)
    z_t = q_sample(Z0, t, EPS, FLOW)
    np.testing.assert_allclose(z_t, (1 - S) * Z0 + S * EPS, atol=1e-6)
    u = target("flow", Z0, EPS, t, FLOW)
    np.testing.assert_allclose(u, EPS - Z0, atol=1e-6)
    path = q_sample(jnp.broadcast_to(Z0[0], Z0.shape), t, jnp.broadcast_to(EPS[0], EPS.shape), FLOW)
    np.testing.assert_allclose(T * np.diff(path, axis=0), np.broadcast_to(u[0], (T - 1, 3)), atol=2e-5)
    np.testing.assert_allclose(path[-1], EPS[0], atol=1e-7)


def test_z0_and_noise_from_the_slope():
    """z0 = z_t - s u and eps = z_t + (1 - s) u (Liu 2022), at the noisy end too."""
    z_t, u = (1 - S) * Z0 + S * EPS, EPS - Z0
    np.testing.assert_allclose(to_z0("flow", u, z_t, 1 - S, S), z_t - S * u, atol=1e-6)
    np.testing.assert_allclose(to_z0("flow", u, z_t, 1 - S, S), Z0, atol=1e-5)
    np.testing.assert_allclose(from_z0("flow", Z0, z_t, 1 - S, S), u, atol=1e-4)


def test_the_loss_is_the_plain_error_of_the_slope_and_min_snr_weighs_it():
    output, t = RNG.standard_normal((T, 3)).astype(np.float32), jnp.arange(T)
    error = np.mean((output - (EPS - Z0)) ** 2, axis=1)
    for weighting, expected in (
        ("uniform", np.ones(T)),
        ("min_snr", np.minimum(((1 - S) / S)[:, 0] ** 2, 5.0) * S[:, 0] ** 2),  # d z0 / d u = -s
    ):
        np.testing.assert_allclose(loss_weights(weighting, "flow", FLOW, 5.0), expected, atol=1e-12)
        loss = diffusion_loss(output, Z0, EPS, t, prediction="flow", weighting=weighting, process=FLOW)
        np.testing.assert_allclose(loss, expected * error, rtol=1e-4, atol=1e-6)


def test_timesteps_of_sampling_are_those_of_training():
    """Trailing steps n are s = 1, 1 - 1/n ... 1/n, and t = T s - 1 of each is a timestep of training."""
    for n in (1, 4, 8, T):
        points = noise_levels("trailing", FLOW, n)
        np.testing.assert_allclose([p.sigma for p in points], np.arange(n, 0, -1) / n)
        np.testing.assert_allclose([p.t for p in points], T * np.arange(n, 0, -1) / n - 1)


@pytest.mark.parametrize("t", [0.0, 0.4, 17.25, 38.5, 39.0])
def test_noise_levels_between_timesteps_are_exact(t):
    s = (t + 1) / T
    ratio = s / (1 - s) if s < 1 else np.inf
    point = FLOW.between(t, ratio)
    np.testing.assert_allclose(point, (t, 1 - s, s), atol=1e-12)
    assert FLOW.time_of(ratio) == pytest.approx(t, abs=1e-9)
    assert FLOW.is_flow and not make_process("linear", 10).is_flow


def test_linspace_between_timesteps_is_even_in_sigma():
    points = noise_levels("linspace", FLOW, 7, grid="continuous")
    np.testing.assert_allclose([p.sigma for p in points], np.linspace(1, 1 / T, 7), atol=1e-7)
    np.testing.assert_allclose([p.alpha + p.sigma for p in points], 1, atol=1e-12)
    even = noise_levels("flow", FLOW, 7)
    np.testing.assert_allclose(points, even, atol=1e-5)


def test_the_noise_levels_of_schedulers_by_hand():
    def levels(steps, **fields):
        points = FlowSpacing(**fields).levels(4, steps)
        np.testing.assert_allclose([p.alpha + p.sigma for p in points], 1)
        return [p.sigma for p in points], [p.t for p in points]

    assert shifted(0.25, 3.0) == pytest.approx(0.5)
    sigma, t = levels(3)
    np.testing.assert_allclose((sigma, t), ([1, 0.625, 0.25], [3, 1.5, 0]))
    sigma, t = levels(2, shift=3.0)  # 1/4 -> 1/2 -> 3/4
    np.testing.assert_allclose((sigma, t), ([1, 0.75], [3, 2]))
    np.testing.assert_allclose(levels(3, terminal=0.1)[0], [1, 0.55, 0.1])
    np.testing.assert_allclose(levels(3, uneven="exponential")[0], [1, 0.5, 0.25])
    np.testing.assert_allclose(levels(3, uneven="karras")[0], [1, ((1 + 0.25 ** (1 / 7)) / 2) ** 7, 0.25])
    np.testing.assert_allclose(levels(3, uneven="beta")[0], [1, 0.625, 0.25])  # the median of a symmetric Beta
    np.testing.assert_allclose(levels(2, ramp="unipc"), ([1 - 1e-6, 0.625], [3 - 4e-6, 1.5]), atol=1e-9)
    np.testing.assert_allclose(levels(3, ramp="dpm", whole_t=True), ([0.75, 0.5, 0.25], [2, 1, 0]))
    np.testing.assert_allclose(levels(2, ramp="dpm", whole_t=True), ([0.75, 0.375], [2, 0]))
    np.testing.assert_allclose(levels(2, ramp="dpm", shift=3.0)[0], [0.9, 9 / 14])


@pytest.mark.parametrize("steps, process, problem", [
    (2, make_process("linear", T), "flow is for rectified flow"),
    (T + 1, FLOW, "steps must lie in 1..40"),
    (0, FLOW, "steps must lie in 1..40"),
])  # fmt: skip
def test_what_the_spacing_flow_refuses(steps, process, problem):
    with pytest.raises(ValueError, match=problem):
        make_table("euler", process, steps, prediction="flow", spacing="flow")


def test_a_terminal_needs_two_steps():
    with pytest.raises(ValueError, match=r"to the terminal 0.1 are 2 steps or more, got 1"):
        make_table("euler", FLOW, 1, prediction="flow", spacing="flow", flow=FlowSpacing(terminal=0.1))
    with pytest.raises(ValueError, match="lcm and tcd have timesteps of their own"):
        make_table("lcm", FLOW, 4, prediction="flow", spacing="flow")


def test_shifts_below_1_reach_below_the_first_timestep():
    """Where t = T s - 1 is negative; all steps are run."""
    table = make_table("euler", FLOW, 6, prediction="flow", spacing="flow", flow=FlowSpacing(shift=0.5))
    assert table.rows == 6 and -1 < table.t[5] < 0
    assert (table.reached_alpha[5], table.reached_sigma[5]) == (1, 0)


@pytest.mark.parametrize("solver", ["euler", "ddim"])
def test_eulers_method_of_the_flow_papers_is_ddim_without_noise(solver):
    """z' = z + (s' - s) u, the sampler of Liu 2022 and Esser 2024, with u = (z - z0_hat) / s, is the table's row."""
    table = make_table(solver, FLOW, 9, prediction="flow", spacing="trailing")
    s = [*table.sigma[:9], 0.0]
    for weights, (now, after) in zip(table.weights, pairwise(s)):
        np.testing.assert_allclose(weights, Z[0] + (after - now) * (Z[0] - X[0]) / now, atol=1e-12)


def heun_by_hand(s, u, z):
    """Heun's method for dz / ds = u, the last step Euler's."""
    for now, after in pairwise(s):
        slope = u(z, now)
        middle = z + (after - now) * slope
        z = middle if after == 0 else z + (after - now) * (slope + u(middle, after)) / 2
    return z


MEAN, STD = 0.5, 0.6


def exact_u(z, s):
    """eps - z0 expected at z, for z0 ~ N(MEAN, STD^2)."""
    variance = (1 - s) ** 2 * STD**2 + s**2
    z0 = MEAN + (1 - s) * STD**2 / variance * (z - (1 - s) * MEAN)
    eps = s / variance * (z - (1 - s) * MEAN)
    return eps - z0


def in_float64(table, z):
    """A table of a deterministic solver with the exact denoiser."""
    zs, z0s = [z], []
    for sigma, weights in zip(table.sigma[: table.rows], table.weights):
        z0s.insert(0, zs[0] - sigma * exact_u(zs[0], sigma))
        terms = [*zip(weights, zs), *zip(weights[HISTORY + 1 :], z0s)]
        zs, z0s = [sum(w * term for w, term in terms), *zs[:HISTORY]], z0s[:HISTORY]
    return zs[0]


def test_heuns_method_is_that_of_the_flow():
    table = make_table("heun", FLOW, 6, prediction="flow", spacing="flow", flow=FlowSpacing(shift=2.0))
    assert table.rows == 11
    s = [p.sigma for p in FlowSpacing(shift=2.0).levels(T, 6)]
    z = RNG.standard_normal((4, 4))
    np.testing.assert_allclose(in_float64(table, z), heun_by_hand([*s, 0.0], exact_u, z), rtol=1e-10)


LONG = make_process("rectified_flow", 3841)
# From z_T, where alpha = 0, only heun is of second order in its first step. Steps near alpha = 0 are long in the log
# SNR that multistep solvers extrapolate over; unipc corrects this, the DPM-Solvers keep some of the error.
ORDERS = {"euler": 1, "ddim": 1, "heun": 2, "dpmpp_2s": 2, "deis": 2, "plms": 2, "kdpm2": 2, "edm": 2}
ORDERS |= {"dpmpp_2m": 1.6, "dpmpp_3m": 1.8, "unipc": 2.9, "lms": 2.2}


@pytest.mark.parametrize("solver", ORDERS)
def test_order_of_convergence_on_an_exact_flow(solver):
    """From pure noise to s = 0.2 of Gaussian data, whose flow keeps (z - a m) / sqrt(a^2 std^2 + s^2)."""
    z, errors = np.random.default_rng(1).standard_normal((4, 4)), []
    exact = 0.8 * MEAN + np.hypot(0.8 * STD, 0.2) * z
    for steps in (60, 120, 240):
        table = make_table(solver, LONG, steps, prediction="flow", spacing="flow", flow=FlowSpacing(terminal=1 / steps))
        stop = np.flatnonzero(np.isclose(table.reached_sigma[: table.rows], 0.2))[-1] + 1
        errors.append(np.abs(in_float64(table._replace(rows=stop), z) - exact).max())
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(orders, ORDERS[solver], atol=0.17)


def test_every_solver_has_its_order_here_or_adds_noise():
    noisy = {"ddpm", "euler_a", "dpmpp_2m_sde", "kdpm2_a"}
    assert set(ORDERS) | noisy | set(DISTILLED) == set(SOLVERS)
