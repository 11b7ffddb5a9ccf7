"""Every table, run by the compiled loop, against its paper's algorithm in plain float64 Python; and by hand."""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from ldm_jax.diffusion.denoiser import Estimate
from ldm_jax.diffusion.forward import NoiseLevel
from ldm_jax.diffusion.process import VARIANCES, Process
from ldm_jax.diffusion.random import initial_latents, sample_keys
from ldm_jax.diffusion.schedules import make_process
from ldm_jax.diffusion.solve import solve
from ldm_jax.diffusion.solvers import SOLVERS, make_table
from ldm_jax.diffusion.spacing import SPACINGS, TIMESTEP_SPACINGS, timesteps
from ldm_jax.diffusion.tables import HISTORY, with_resampling

T = 40
PROCESS = make_process("linear", T, beta_start=0.002, beta_end=0.3)
FLOW = make_process("rectified_flow", T)
ZERO_SNR = make_process("linear", T, beta_start=0.002, beta_end=0.3, zero_terminal_snr=True)
SHAPE = (3, 2, 2)
KEYS = sample_keys(0, jnp.arange(4))
Z_T = initial_latents(KEYS, SHAPE)


def denoise(z_t, level, xp=jnp):
    """Nonlinear, and different for each t, so that a wrong t, order or history shows."""
    return xp.sin(2 * z_t + 0.3 * level.t) + 0.5 * z_t


@pytest.mark.parametrize("steps", [8, 9])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_table_in_two_parts(solver, steps):
    """The first part ends at the noise level at which the second begins, and both have all steps."""
    process = make_process("scaled_linear", 1000, beta_start=0.00085, beta_end=0.012)
    whole = make_table(solver, process, steps)
    first, second = (make_table(solver, process, steps, **{f"denoising_{end}": 0.6}) for end in ("end", "start"))
    a, b = int(first.rows), int(second.rows)
    assert (first.reached_alpha[a - 1], first.reached_sigma[a - 1]) == (second.alpha[0], second.sigma[0])
    assert first.t[0] == whole.t[0] and (first.t[: a - 1] >= second.t[0]).all() and second.t[0] < 400
    np.testing.assert_array_equal(first.weights[:a], whole.weights[:a])
    history = np.delete(whole.weights, [0, HISTORY + 1, 2 * HISTORY + 2], axis=1)
    if not history[a].any():  # a row that begins anew
        np.testing.assert_array_equal(second.t[:b], whole.t[a : a + b])
    if solver in ("ddpm", "ddim", "euler", "euler_a", "heun", "kdpm2", "kdpm2_a", "edm", "lcm", "tcd"):
        np.testing.assert_array_equal(second.weights[:b], whole.weights[a : a + b])


@pytest.mark.parametrize("part", [{"denoising_end": 0.6}, {"set_alpha_to_one": False, "spacing": "trailing"}, {}])
def test_edm_adds_no_noise_after_its_last_step(part):
    """Which is a whole step of Heun too: two calls, but at sigma 0."""
    process = make_process("scaled_linear", 1000, beta_start=0.00085, beta_end=0.012)
    table = make_table("edm", process, 10, churn=4.0, **part)
    rows, noise = int(table.rows), table.weights[:, -1]
    assert rows == (19 if not part else 20 if "set_alpha_to_one" in part else 12)
    assert noise[rows - 1] == 0 and (noise[1 : rows - 2 : 2] > 0).all()


@pytest.mark.parametrize("part", [{"denoising_end": 0.05}, {"denoising_start": 0.995}, {"denoising_end": 0.0}])
def test_a_part_without_steps_is_refused(part):
    process = make_process("scaled_linear", 1000, beta_start=0.00085, beta_end=0.012)
    with pytest.raises(ValueError, match="of 4 steps none is between denoising_start"):
        make_table("ddim", process, 4, steps_offset=20, **part)


def var_frac(z_t, level, xp=jnp):
    """Of a learned variance: beyond 0 and 1 too, and different for each entry and t."""
    return 0.75 * xp.cos(2 * z_t + 0.2 * level.t) + 0.5


run = jax.jit(partial(solve, denoise))
run_learned = jax.jit(partial(solve, lambda z_t, level: Estimate(denoise(z_t, level), var_frac(z_t, level))))


@cache
def row_noise(i):
    """The noise contract: row i, sample k: fold_in(keys[k], i)."""
    return np.stack([jax.random.normal(jax.random.fold_in(key, i), SHAPE) for key in KEYS]).astype(np.float64)


def ho_2020(alpha_bar, t, end, variance):
    """Algorithm 2: mu = (z - beta / sqrt(1 - alpha_bar) eps) / sqrt(alpha), with the alpha of each jump.

    A learned variance is Nichol 2021, eq. 15, with the betas of section 4.
    """
    z = np.asarray(Z_T, np.float64)
    levels = [*alpha_bar[t], end]
    for i in range(len(t)):
        now, after = levels[i], levels[i + 1]
        alpha = now / after
        beta = 1 - alpha
        z0 = denoise(z, NoiseLevel(t[i], None, None), np)
        eps = (z - np.sqrt(now) * z0) / np.sqrt(1 - now)
        if alpha > 0:
            mean = (z - beta / np.sqrt(1 - now) * eps) / np.sqrt(alpha)
        else:  # the limit: z_t says nothing of z_{t-1}
            mean = np.sqrt(after) * z0
        beta_tilde = (1 - after) / (1 - now) * beta
        sigma = np.sqrt(beta if variance == "fixed_large" else beta_tilde)
        if variance == "learned" and i < len(t) - 1:
            v = var_frac(z, NoiseLevel(t[i], None, None), np)
            sigma = np.exp((v * np.log(beta) + (1 - v) * np.log(beta_tilde)) / 2)
        z = mean + (sigma * row_noise(i) if i < len(t) - 1 else 0)
    return z


def song_2021(alpha_bar, t, end, eta):
    """Eq. 12, sigma by eq. 16."""
    z = np.asarray(Z_T, np.float64)
    levels = [*alpha_bar[t], end]
    for i in range(len(t)):
        now, after = levels[i], levels[i + 1]
        z0 = denoise(z, NoiseLevel(t[i], None, None), np)
        eps = (z - np.sqrt(now) * z0) / np.sqrt(1 - now)
        sigma = eta * np.sqrt((1 - after) / (1 - now)) * np.sqrt(1 - now / after)
        z = np.sqrt(after) * z0 + np.sqrt(max(1 - after - sigma**2, 0)) * eps + sigma * row_noise(i)
    return z


def lu_2022(alpha_bar, t, end):
    """Algorithm 2 of DPM-Solver++ by log-SNRs; diffusers' rules for the last step, limits at alpha_bar = 0 and 1."""
    z = np.asarray(Z_T, np.float64)
    levels = [*alpha_bar[t], end]
    before = lambda_before = None
    for i in range(len(t)):
        (alpha, alpha_next), (sigma, sigma_next) = np.sqrt(levels[i : i + 2]), np.sqrt(1 - np.array(levels[i : i + 2]))
        z0 = denoise(z, NoiseLevel(t[i], None, None), np)
        if sigma_next == 0:
            return z0  # alpha' (1 - e^-h) -> 1, first order
        with np.errstate(divide="ignore"):
            D, lam, lam_next = z0, np.log(alpha / sigma), np.log(alpha_next / sigma_next)
        h = lam_next - lam
        if i > 0 and not (i == len(t) - 1 and len(t) < 15):
            r = (lam - lambda_before) / h if h > 0 else np.inf
            D = (1 + 1 / (2 * r)) * z0 - 1 / (2 * r) * before
        z = sigma_next / sigma * z - alpha_next * (np.exp(-h) - 1) * D
        before, lambda_before = z0, lam
    return z


def alpha_bar(process):
    return process.alpha**2


ENDS = {True: lambda process: 1.0, False: lambda process: alpha_bar(process)[0]}


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("steps", [1, 7, T])
@pytest.mark.parametrize("variance", VARIANCES)
def test_ddpm_is_ho_2020(variance, steps, spacing, to_one):
    table = make_table("ddpm", PROCESS, steps, variance=variance, spacing=spacing, set_alpha_to_one=to_one)
    got, _ = (run_learned if variance == "learned" else run)(Z_T, table, KEYS)
    expected = ho_2020(alpha_bar(PROCESS), timesteps(spacing, T, steps), ENDS[to_one](PROCESS), variance)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_learned_variance_changes_nothing_but_by_request(solver):
    table = make_table(solver, PROCESS, 7)
    np.testing.assert_allclose(run_learned(Z_T, table, KEYS)[0], run(Z_T, table, KEYS)[0], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("steps", [1, 7, T])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_song_2021(eta, steps, spacing, to_one):
    table = make_table("ddim", PROCESS, steps, eta=eta, spacing=spacing, set_alpha_to_one=to_one)
    got, _ = run(Z_T, table, KEYS)
    expected = song_2021(alpha_bar(PROCESS), timesteps(spacing, T, steps), ENDS[to_one](PROCESS), eta)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("spacing, offset", [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)])
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_dpmpp_2m_is_lu_2022(steps, spacing, offset, to_one):
    table = make_table("dpmpp_2m", PROCESS, steps, spacing=spacing, steps_offset=offset, set_alpha_to_one=to_one)
    got, _ = run(Z_T, table, KEYS)
    t = timesteps(spacing, T, steps) if spacing == "trailing" else timesteps(spacing, T, steps + 1, offset)[:-1]
    np.testing.assert_array_equal(table.t[:steps], t)
    np.testing.assert_allclose(got, lu_2022(alpha_bar(PROCESS), t, ENDS[to_one](PROCESS)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 5, T])
@pytest.mark.parametrize("solver, eta", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0)])
def test_zero_terminal_snr_is_the_papers_too(solver, eta, steps):
    table = make_table(solver, ZERO_SNR, steps, prediction="v", eta=eta, spacing="trailing")
    assert table.t[0] == T - 1 and ZERO_SNR.alpha[T - 1] == 0
    reference = partial(ho_2020, variance="fixed_small") if solver == "ddpm" else partial(song_2021, eta=eta)
    expected = reference(alpha_bar(ZERO_SNR), timesteps("trailing", T, steps), 1.0)
    np.testing.assert_allclose(run(Z_T, table, KEYS)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 5, T])
@pytest.mark.parametrize("prediction", ["v", "z0"])
def test_zero_terminal_snr_multistep_is_the_limit(prediction, steps):
    table = make_table("dpmpp_2m", ZERO_SNR, steps, prediction=prediction, spacing="trailing")
    assert all(np.isfinite(column).all() for column in table)
    got, _ = run(Z_T, table, KEYS)
    expected = lu_2022(alpha_bar(ZERO_SNR), timesteps("trailing", T, steps), 1.0)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def k_diffusion_lms(alpha_bar, t):
    """k-diffusion's sample_lms of order 4, whose coefficients are integrals by quadrature, on x = z / alpha."""
    sigmas = np.append(np.sqrt((1 - alpha_bar[t]) / alpha_bar[t]), 0)
    x, ds = np.asarray(Z_T, np.float64) / np.sqrt(alpha_bar[t[0]]), []
    for i in range(len(t)):
        ds.insert(0, (x - denoise(x * np.sqrt(alpha_bar[t[i]]), NoiseLevel(t[i], None, None), np)) / sigmas[i])
        order = min(i + 1, 4)

        def basis(tau, j, i=i, order=order):
            others = [k for k in range(order) if k != j]
            return np.prod([(tau - sigmas[i - k]) / (sigmas[i - j] - sigmas[i - k]) for k in others])

        x = x + sum(quad(basis, sigmas[i], sigmas[i + 1], args=(j,))[0] * ds[j] for j in range(order))
    return x


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_lms_is_k_diffusions(spacing, steps):
    got, _ = run(Z_T, make_table("lms", PROCESS, steps, spacing=spacing), KEYS)
    expected = k_diffusion_lms(alpha_bar(PROCESS), timesteps(spacing, T, steps))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def zhang_2022(alpha_bar, t, end):
    """tAB-DEIS of order 2, eq. 15 by quadrature over rho of the line through the last eps in log(rho)."""
    z, old = np.asarray(Z_T, np.float64), None
    levels = [*alpha_bar[t], end]
    for i in range(len(t)):
        rho, rho_next = (np.sqrt(1 / level - 1) for level in levels[i : i + 2])
        z0 = denoise(z, NoiseLevel(t[i], None, None), np)
        eps = (z - np.sqrt(levels[i]) * z0) / np.sqrt(1 - levels[i])
        change = (rho_next - rho) * eps
        if i > 0 and not (i == len(t) - 1 and (len(t) < 15 or end == 1)):
            rho_old, eps_old = old
            line = lambda x, a=rho, b=rho_old: np.log(x / b) / np.log(a / b)  # noqa: E731
            weight = quad(line, rho, rho_next)[0]
            change = weight * eps + (rho_next - rho - weight) * eps_old
        z, old = np.sqrt(levels[i + 1]) * (z / np.sqrt(levels[i]) + change), (rho, eps)
    return z


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_deis_is_zhang_2022(spacing, steps, to_one):
    table = make_table("deis", PROCESS, steps, spacing=spacing, set_alpha_to_one=to_one)
    t = timesteps(spacing, T, steps) if spacing == "trailing" else timesteps(spacing, T, steps + 1)[:-1]
    expected = zhang_2022(alpha_bar(PROCESS), t, ENDS[to_one](PROCESS))
    np.testing.assert_allclose(run(Z_T, table, KEYS)[0], expected, rtol=1e-4, atol=1e-4)


def zheng_2024(alpha_bar, t, end, gamma):
    """Algorithm 4 of trajectory consistency models: DDIM to s = (1 - gamma) t', then noise up to t'."""
    z = np.asarray(Z_T, np.float64)
    for i in range(len(t)):
        now, after = alpha_bar[t[i]], alpha_bar[t[i + 1]] if i < len(t) - 1 else end
        s = alpha_bar[int((1 - gamma) * t[i + 1])] if i < len(t) - 1 else end
        z0 = denoise(z, NoiseLevel(t[i], None, None), np)
        z_s = np.sqrt(s) * z0 + np.sqrt(1 - s) * (z - np.sqrt(now) * z0) / np.sqrt(1 - now)
        z = np.sqrt(after / s) * z_s + np.sqrt(1 - after / s) * row_noise(i)
    return z


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_tcd_is_zheng_2024(gamma, steps, to_one):
    table = make_table("tcd", PROCESS, steps, eta=gamma, set_alpha_to_one=to_one)
    t = make_table("lcm", PROCESS, steps).t[:steps].astype(int)
    expected = zheng_2024(alpha_bar(PROCESS), t, ENDS[to_one](PROCESS), gamma)
    np.testing.assert_allclose(run(Z_T, table, KEYS)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("strength", "steps", "expected"),
    [
        (1.0, 4, [999, 759, 499, 259]),
        (0.6, 4, [599, 459, 299, 159]),  # the 1st, 8th, 16th and 23rd of 30 timesteps
        (0.58, 2, [559, 279]),  # 0.58 of 50 is 28 in floating point, as in diffusers
        (0.08, 4, [79, 59, 39, 19]),
    ],
)
def test_a_strength_that_keeps_the_steps_of_a_consistency_model(strength, steps, expected):
    process = make_process("scaled_linear", 1000)
    table = make_table("lcm", process, steps, strength=strength, strength_keeps_steps=True)
    assert table.t[:steps].tolist() == expected


@pytest.mark.parametrize("solver", ["lms", "kdpm2", "kdpm2_a", "dpmpp_3m", "deis", "tcd"])
@pytest.mark.parametrize("steps", [1, 2, 5, 15])
def test_tables_from_zero_terminal_snr_are_finite(solver, steps):
    table = make_table(solver, ZERO_SNR, steps, prediction="v", spacing="trailing")
    assert all(np.isfinite(column).all() for column in table)
    assert table.alpha[0] == 0 and np.isfinite(run(Z_T, table, KEYS)[0]).all()


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_tables_that_end_at_timestep_0_are_finite(solver, spacing):
    """Also where the last noise level of the spacing is that of timestep 0 up to rounding: a step of no length."""
    names = ("scaled_linear", "cosine", "linear") if spacing != "flow" else ("rectified_flow",)
    for name, eta in itertools.product(names, (0.0, 0.5)):
        process, prediction = make_process(name, 1000), "flow" if spacing == "flow" else "v"
        if (solver in ("lcm", "tcd") and spacing not in TIMESTEP_SPACINGS) or (eta and solver not in ("ddim", "tcd")):
            continue
        for steps in (1, 5, 14, 15, 20, 49):
            options = {"prediction": prediction, "eta": eta, "spacing": spacing, "set_alpha_to_one": False}
            table = make_table(solver, process, steps, **options)
            assert all(np.isfinite(column).all() for column in table), (name, steps)
            rows = int(table.rows)
            np.testing.assert_allclose(table.reached_alpha[rows - 1], process.alpha[0], rtol=1e-12)


HAND = Process.variance_preserving([0.81, 0.36])


def column(table, name):
    """One column of the weights."""
    return table.weights[: table.rows, {"z": 0, "z0": HISTORY + 1, "noise": -1}[name]]


def test_ddpm_table_by_hand():
    """Row 0: beta = 5/9, alpha = 4/9: on z0 .9 (5/9) / .64, on z (2/3) .19 / .64, variance .19/.64 (5/9)."""
    table = make_table("ddpm", HAND, 2)
    np.testing.assert_array_equal(table.t, [1, 0, 0, 0])
    np.testing.assert_allclose(table.alpha[:2], [0.6, 0.9])
    np.testing.assert_allclose(table.sigma[:2], [0.8, np.sqrt(0.19)])
    np.testing.assert_allclose(column(table, "z0"), [0.78125, 1.0], rtol=1e-12)
    np.testing.assert_allclose(column(table, "z"), [0.19791666667, 0.0], atol=1e-11)
    np.testing.assert_allclose(column(table, "noise"), [np.sqrt(0.19 / 0.64 * 5 / 9), 0.0], atol=1e-12)
    np.testing.assert_allclose(table.reached_alpha[:2], [0.9, 1.0])
    np.testing.assert_allclose(table.reached_sigma[:2], [np.sqrt(0.19), 0.0])
    assert np.count_nonzero(table.weights) == 4
    large = make_table("ddpm", HAND, 2, variance="fixed_large")
    np.testing.assert_allclose(column(large, "noise"), [np.sqrt(5 / 9), 0.0], rtol=1e-12)
    learned = make_table("ddpm", HAND, 2, variance="learned")
    np.testing.assert_allclose(learned.log_std_ratio, [np.log(0.64 / 0.19) / 2, 0, 0, 0], rtol=1e-12)
    for name in set(table._fields) - {"log_std_ratio"}:
        np.testing.assert_array_equal(getattr(learned, name), getattr(table, name))
    assert not (table.log_std_ratio.any() or large.log_std_ratio.any())


def test_ddim_table_by_hand():
    """Row 0: on z sqrt(.19) / .8, on z0 .9 - .6 of it."""
    table = make_table("ddim", HAND, 2, set_alpha_to_one=False)
    np.testing.assert_allclose(column(table, "z"), [0.54486236, 1.0], rtol=1e-7)
    np.testing.assert_allclose(column(table, "z0"), [0.57308258, 0.0], atol=1e-8)
    np.testing.assert_array_equal(column(table, "noise"), 0)
    np.testing.assert_allclose(table.reached_alpha[:2], [0.9, 0.9])


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 3, 11, T])
def test_ddim_with_eta_1_is_ddpm(spacing, steps):
    process, prediction = (FLOW, "flow") if spacing == "flow" else (PROCESS, "eps")
    ddim = make_table("ddim", process, steps, prediction=prediction, eta=1.0, spacing=spacing)
    ddpm = make_table("ddpm", process, steps, prediction=prediction, spacing=spacing)
    for one, other in zip(ddim, ddpm):
        np.testing.assert_allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_tables_are_float64_of_one_shape(solver):
    for steps in (1, 17, T - 1):
        table = make_table(solver, PROCESS, steps)
        calls = {"plms": steps + (steps > 1)} | dict.fromkeys(("heun", "edm", "kdpm2", "kdpm2_a"), 2 * steps - 1)
        calls = calls.get(solver, steps)
        assert table.rows == calls and table.rows.shape == () and table.rows.dtype == np.int32
        assert table.weights.shape == (2 * T, 2 * HISTORY + 3)
        for values in table[:-1]:
            assert values.dtype == np.float64 and len(values) == 2 * T
            assert not values[calls:].any()


def test_a_constant_denoiser_is_reached_exactly():
    """Whatever the solver, if z0_hat is always c then the last row lands on c: coefficients are consistent."""
    constant = jax.jit(partial(solve, lambda z_t, level: jnp.full_like(z_t, 0.7)))
    for solver in SOLVERS:
        for spacing in TIMESTEP_SPACINGS if solver in ("lcm", "tcd") else SPACINGS:
            process, prediction = (FLOW, "flow") if spacing == "flow" else (PROCESS, "eps")
            table = make_table(solver, process, 9, prediction=prediction, spacing=spacing)
            z, _ = constant(Z_T, table, KEYS)
            np.testing.assert_allclose(z, 0.7, rtol=1e-3 if solver == "lcm" else 2e-5)  # lcm keeps c_skip of z


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"solver": "dpm"},
            "solver must be one of ddpm, ddim, plms, euler, euler_a, heun, lms, kdpm2, kdpm2_a, edm, dpmpp_2m, ",
        ),
        (
            {"solver": "lcm", "spacing": "karras"},
            "lcm and tcd have timesteps of their own; karras spacing is for the",
        ),
        ({"solver": "lcm", "steps": 41, "spacing": "trailing"}, "lcm and tcd need steps in 1..40, got 41"),
        (
            {"solver": "lcm", "steps": 21, "strength": 0.5, "strength_keeps_steps": True},
            "need steps in 1..20 with strength 0.5: of 40 timesteps 20 are left, got 21",
        ),
        (
            {"solver": "lcm", "steps": 1, "strength": 0.01, "strength_keeps_steps": True},
            "need steps in 1..0 with strength 0.01",
        ),
        ({"spacing": (30, 20, 10)}, "3 timesteps are listed for 5 steps"),
        ({"spacing": (40, 20, 10, 5, 0)}, "timesteps must be descending whole numbers in 0..39, got"),
        ({"spacing": (20, 30, 10, 5, 0)}, "timesteps must be descending whole numbers"),
        ({"spacing": (30.5, 20, 10, 5, 0)}, "timesteps must be descending whole numbers"),
        ({"solver": "edm", "churn": -1.0}, "churn must be 0 or more, got -1.0"),
        ({"solver": "heun", "churn": 1.0}, "churn is for edm only, got churn = 1.0 with solver 'heun'"),
        ({"strength": 0.0}, "strength must lie above 0 and up to 1, got 0.0"),
        ({"strength": 1.1}, "strength must lie above 0 and up to 1, got 1.1"),
        ({"strength": 0.1}, "strength 0.1 of 5 steps runs none; use 10 or more"),
        (
            {"process": ZERO_SNR, "prediction": "v", "spacing": "karras"},
            "karras spacing needs a schedule that ends above alpha = 0",
        ),
        ({"variance": "small"}, "variance must be one of fixed_small, fixed_large, learned, got 'small'"),
        ({"solver": "ddim", "variance": "learned"}, "variance is for ddpm only, got variance = learned"),
        (
            {"solver": "ddim", "variance": "fixed_large"},
            "variance is for ddpm only, got variance = fixed_large",
        ),
        ({"solver": "ddim", "eta": 1.5}, "eta must lie in [0, 1], got 1.5"),
        ({"solver": "ddim", "eta": -0.5}, "eta must lie in [0, 1], got -0.5"),
        ({"solver": "ddim", "eta": float("nan")}, "eta must lie in [0, 1], got nan"),
        ({"eta": 0.5}, "eta is for ddim and tcd only, got eta = 0.5 with solver 'ddpm'"),
        ({"steps": 0}, "steps must lie in 1..40 for a schedule of 40 timesteps, got 0"),
        ({"steps": 41}, "steps must lie in 1..40 for a schedule of 40 timesteps, got 41"),
        ({"solver": "dpmpp_2m", "steps": 40}, "leading spacing needs steps in 1..39 with this solver, got 40"),
        ({"solver": "dpmpp_2m", "steps": 0}, "leading spacing needs steps in 1..39 with this solver, got 0"),
        (
            {"spacing": "even"},
            "spacing must be one of leading, trailing, linspace, karras, exponential, beta, flow, got 'even'",
        ),
        ({"steps": 40, "steps_offset": 1}, "steps_offset must lie in 0..0"),
        ({"prediction": "x0"}, "prediction must be one of eps, v, z0, flow, edm, got 'x0'"),
        (
            {"process": ZERO_SNR},
            "prediction 'eps' does not determine z0 at timestep 39, where alpha = 0",
        ),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError) as error:
        make_table(**{"solver": "ddpm", "process": PROCESS, "steps": 5, **arguments})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_resampling_refuses_a_learned_variance():
    with pytest.raises(ValueError, match="resampling needs a fixed variance"):
        with_resampling(make_table("ddpm", PROCESS, 5, variance="learned"), times=2, jump=1)
