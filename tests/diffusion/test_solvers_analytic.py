"""Solvers on data whose exact denoiser is known: the sampled distribution must be the data's."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kstest, norm

from ldm_jax.diffusion.denoiser import Estimate
from ldm_jax.diffusion.edm import EDM
from ldm_jax.diffusion.prediction import from_z0, to_z0
from ldm_jax.diffusion.process import Process, forward_step, neighbours, posterior
from ldm_jax.diffusion.random import initial_latents, sample_keys
from ldm_jax.diffusion.schedules import make_process
from ldm_jax.diffusion.solve import solve
from ldm_jax.diffusion.solvers import make_inversion_table, make_table
from ldm_jax.diffusion.tables import HISTORY, with_resampling

PROCESSES = {
    "linear": make_process("linear", 1000, beta_start=1e-4, beta_end=0.02),
    "cosine": make_process("cosine", 1000),
    "zero_snr": make_process("scaled_linear", 1000, zero_terminal_snr=True),
    "rectified_flow": make_process("rectified_flow", 1000),
    "edm": EDM(0.002, 80.0, 0.5, 1000).process,
}
# Two normal components: weight, mean and standard deviation of each.
MIXTURE = np.array([[0.3, 0.7], [-1.2, 0.8], [0.3, 0.4]])
GAUSSIAN = np.array([[0.5, 0.5], [0.5, 0.5], [0.6, 0.6]])


def exact_z0(data, z_t, a, sigma):
    """E[z0 | z_t] for data from sum_i w_i N(m_i, s_i^2), each entry of z on its own, at z_t = a z0 + sigma eps.

    z_t comes from component i with density N(z_t; a m_i, a^2 s_i^2 + sigma^2); given that, the mean of z0 is
    m_i + a s_i^2 / (a^2 s_i^2 + sigma^2) (z_t - a m_i).
    """
    w, m, s = data
    variance = a**2 * s**2 + sigma**2
    centred = z_t[..., None] - a * m
    responsibility = jax.nn.softmax(jnp.log(w) - 0.5 * jnp.log(variance) - centred**2 / (2 * variance))
    return jnp.sum(responsibility * (m + a * s**2 / variance * centred), axis=-1)


# Unlike most tests these compute for longer than they compile.
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


@cache
def sampler(prediction):
    """n = 16,384 independent samples as 64 latents of [16, 16, 1], by a network whose `prediction` is exact."""

    def denoise(z_t, level, data):  # by way of the network's output, so that the conversions are in it
        z0 = exact_z0(data, z_t, level.alpha, level.sigma)
        levels = level.broadcast_to(z_t)
        return to_z0(prediction, from_z0(prediction, z0, z_t, *levels), z_t, *levels)

    keys = sample_keys(0, jnp.arange(64))

    @partial(jax.jit, compiler_options=OPTIMIZED)
    def sample(table, data):
        z, _ = solve(lambda z_t, level: denoise(z_t, level, data), initial_latents(keys, (16, 16, 1)), table, keys)
        return z.ravel()

    return lambda table, data: np.asarray(sample(table, jnp.asarray(data, jnp.float32)), np.float64)


def moments(data):
    w, m, s = data
    mean = np.sum(w * m)
    return mean, np.sqrt(np.sum(w * (s**2 + m**2)) - mean**2)


def faults(draws, data):
    """What is wrong with draws that should be the data's: Kolmogorov-Smirnov, mean (4 sigma), spread (3 %)."""
    mean, std = moments(data)
    ks = kstest(draws, lambda x: sum(w * norm.cdf(x, m, s) for w, m, s in data.T))
    found = []
    if ks.pvalue < 0.001:
        found.append(f"KS distance {ks.statistic:.4f}")
    if abs(draws.mean() - mean) > 4 * std / np.sqrt(len(draws)):
        found.append(f"mean {draws.mean():.4f}, not {mean:.4f}")
    if abs(draws.std() / std - 1) > 0.03:
        found.append(f"std {draws.std():.4f}, not {std:.4f}")
    return found


CASES = [
    ("linear", "eps", {"solver": "ddpm", "steps": 1000}),
    ("linear", "eps", {"solver": "ddpm", "steps": 500, "variance": "fixed_large"}),
    ("linear", "eps", {"solver": "ddim", "steps": 200, "spacing": "trailing"}),
    ("linear", "eps", {"solver": "ddim", "steps": 250, "eta": 0.5}),
    ("linear", "eps", {"solver": "dpmpp_2m", "steps": 40}),
    ("cosine", "z0", {"solver": "ddpm", "steps": 500, "spacing": "linspace"}),
    ("cosine", "z0", {"solver": "ddim", "steps": 200, "spacing": "linspace", "set_alpha_to_one": False}),
    ("zero_snr", "v", {"solver": "ddpm", "steps": 500, "spacing": "trailing"}),
    ("zero_snr", "v", {"solver": "ddim", "steps": 200, "spacing": "trailing"}),
    ("zero_snr", "v", {"solver": "ddim", "steps": 300, "spacing": "trailing", "eta": 0.8}),
    ("zero_snr", "v", {"solver": "dpmpp_2m", "steps": 200, "spacing": "trailing"}),
    ("linear", "eps", {"solver": "plms", "steps": 50}),
    ("linear", "eps", {"solver": "euler", "steps": 200, "spacing": "karras"}),
    ("linear", "eps", {"solver": "euler_a", "steps": 500, "spacing": "linspace"}),
    ("linear", "v", {"solver": "heun", "steps": 40, "spacing": "karras"}),
    ("linear", "v", {"solver": "edm", "steps": 100, "spacing": "karras", "churn": 40.0}),
    ("linear", "v", {"solver": "edm", "steps": 200, "spacing": "exponential", "churn": 10.0}),
    ("linear", "eps", {"solver": "dpmpp_2m_sde", "steps": 100, "spacing": "karras"}),
    ("linear", "eps", {"solver": "dpmpp_2s", "steps": 60, "spacing": "karras"}),
    ("linear", "eps", {"solver": "unipc", "steps": 40, "spacing": "karras"}),
    ("cosine", "v", {"solver": "unipc", "steps": 100, "spacing": "linspace"}),
    ("zero_snr", "v", {"solver": "plms", "steps": 100, "spacing": "trailing"}),
    ("zero_snr", "v", {"solver": "euler_a", "steps": 500, "spacing": "trailing"}),
    ("zero_snr", "v", {"solver": "heun", "steps": 100, "spacing": "trailing"}),
    ("zero_snr", "v", {"solver": "edm", "steps": 200, "spacing": "trailing", "churn": 20.0}),
    ("zero_snr", "v", {"solver": "dpmpp_2m_sde", "steps": 200, "spacing": "trailing"}),
    ("zero_snr", "v", {"solver": "dpmpp_2s", "steps": 200, "spacing": "trailing"}),
    ("zero_snr", "v", {"solver": "unipc", "steps": 200, "spacing": "trailing"}),
    ("rectified_flow", "flow", {"solver": "ddpm", "steps": 500, "spacing": "trailing"}),
    ("rectified_flow", "flow", {"solver": "ddpm", "steps": 500, "variance": "fixed_large", "spacing": "trailing"}),
    ("rectified_flow", "z0", {"solver": "ddim", "steps": 200, "spacing": "trailing"}),
    ("rectified_flow", "flow", {"solver": "ddim", "steps": 300, "spacing": "trailing", "eta": 0.8}),
    ("rectified_flow", "flow", {"solver": "plms", "steps": 100, "spacing": "trailing"}),
    ("rectified_flow", "flow", {"solver": "euler", "steps": 200, "spacing": "linspace"}),
    ("rectified_flow", "flow", {"solver": "euler_a", "steps": 500, "spacing": "trailing"}),
    ("rectified_flow", "flow", {"solver": "heun", "steps": 100, "spacing": "linspace"}),
    ("rectified_flow", "flow", {"solver": "edm", "steps": 200, "spacing": "trailing", "churn": 20.0}),
    ("rectified_flow", "flow", {"solver": "dpmpp_2m", "steps": 200, "spacing": "trailing"}),
    ("rectified_flow", "flow", {"solver": "dpmpp_2m_sde", "steps": 200, "spacing": "trailing"}),
    ("rectified_flow", "flow", {"solver": "dpmpp_2s", "steps": 200, "spacing": "trailing"}),
    ("rectified_flow", "flow", {"solver": "unipc", "steps": 200, "spacing": "trailing"}),
    ("linear", "eps", {"solver": "lms", "steps": 50, "spacing": "karras"}),
    ("linear", "eps", {"solver": "kdpm2", "steps": 40, "spacing": "karras"}),
    ("linear", "eps", {"solver": "kdpm2_a", "steps": 150, "spacing": "karras"}),
    ("linear", "eps", {"solver": "dpmpp_3m", "steps": 40}),
    ("linear", "eps", {"solver": "deis", "steps": 50, "spacing": "karras"}),
    ("linear", "eps", {"solver": "dpmpp_2m", "steps": 400, "spacing": "beta"}),
    ("linear", "eps", {"solver": "heun", "steps": 400, "spacing": "beta"}),
    ("cosine", "v", {"solver": "dpmpp_3m", "steps": 100, "spacing": "linspace"}),
    ("zero_snr", "v", {"solver": "lms", "steps": 100, "spacing": "trailing"}),
    ("zero_snr", "v", {"solver": "kdpm2", "steps": 100, "spacing": "trailing"}),
    ("zero_snr", "v", {"solver": "kdpm2_a", "steps": 250, "spacing": "trailing"}),
    ("zero_snr", "v", {"solver": "dpmpp_3m", "steps": 200, "spacing": "trailing"}),
    ("zero_snr", "v", {"solver": "deis", "steps": 200, "spacing": "trailing"}),
    ("rectified_flow", "flow", {"solver": "lms", "steps": 100, "spacing": "trailing"}),
    ("rectified_flow", "flow", {"solver": "kdpm2", "steps": 100, "spacing": "trailing"}),
    ("rectified_flow", "flow", {"solver": "kdpm2_a", "steps": 250, "spacing": "trailing"}),
    ("rectified_flow", "flow", {"solver": "dpmpp_3m", "steps": 200, "spacing": "trailing"}),
    ("rectified_flow", "flow", {"solver": "deis", "steps": 200, "spacing": "trailing"}),
    ("linear", "flow", {"solver": "ddim", "steps": 200, "spacing": "trailing"}),
    ("edm", "edm", {"solver": "ddpm", "steps": 500, "spacing": "karras", "fractional_t": True}),
    ("edm", "edm", {"solver": "ddim", "steps": 200, "spacing": "exponential", "fractional_t": True}),
    ("edm", "edm", {"solver": "plms", "steps": 60, "spacing": "karras", "fractional_t": True}),
    ("edm", "edm", {"solver": "heun", "steps": 40, "spacing": "karras", "fractional_t": True}),
    ("edm", "v", {"solver": "dpmpp_2m", "steps": 60, "spacing": "karras", "fractional_t": True}),
    ("edm", "v", {"solver": "dpmpp_2m_sde", "steps": 150, "spacing": "exponential", "fractional_t": True}),
    ("edm", "v", {"solver": "unipc", "steps": 60, "spacing": "exponential", "fractional_t": True}),
]


@pytest.mark.parametrize("data", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("schedule, prediction, options", CASES)
def test_the_sampled_distribution_is_the_datas(schedule, prediction, options, data):
    table = make_table(process=PROCESSES[schedule], prediction=prediction, **options)
    assert faults(sampler(prediction)(table, data), data) == []


NOISE = 2 * HISTORY + 2


def scaled(weights, column, by):
    """The weights with one column multiplied."""
    factors = np.ones_like(weights)
    factors[:, column] = by
    return factors * weights


@pytest.mark.parametrize(
    "spoil",
    [
        lambda table: table._replace(weights=scaled(table.weights, NOISE, 0.9)),
        lambda table: table._replace(weights=scaled(table.weights, NOISE, table.weights[:, NOISE])),  # the variance
        lambda table: table._replace(alpha=np.minimum(1.03 * table.alpha, 1)),
        lambda table: table._replace(weights=scaled(table.weights, HISTORY + 1, 1.05)),
        lambda table: table._replace(rows=table.rows - 25),
    ],
)
def test_a_spoilt_table_is_found_out(spoil):
    """The judges above have the power to fail: somewhat wrong samplers do."""
    table = make_table("ddim", PROCESSES["linear"], 250, eta=0.5)  # as it is, it passes above
    assert faults(sampler("eps")(spoil(table), GAUSSIAN), GAUSSIAN) != []


ORDER_T = 961


def uniform_log_snr():
    """lambda = log(alpha / sigma) falls from 2.5 to -2.5 in equal steps of t: doubling the steps halves each h."""
    alpha_bar = 1 / (1 + np.exp(-2 * np.linspace(2.5, -2.5, ORDER_T)))
    return Process.variance_preserving(alpha_bar)


def gaussian_flow(start, end, z_T, mean, std):
    """The probability flow of N(m, s^2) keeps (z - a m) / sqrt(a^2 s^2 + sigma^2), from one (a, sigma) to another."""
    (a_start, std_start), (a_end, std_end) = ((a, np.sqrt(a**2 * std**2 + sigma**2)) for a, sigma in (start, end))
    return a_end * mean + std_end * (np.asarray(z_T, np.float64) - a_start * mean) / std_start


# plms and lms would be of fourth order but for their first rows, dpmpp_3m of third, unipc of third but for its last.
ORDERS = {"ddim": 1, "euler": 1, "dpmpp_2m": 2, "dpmpp_2s": 2, "heun": 2, "edm": 2, "plms": 2, "unipc": 2}
ORDERS |= {"kdpm2": 2, "deis": 2, "dpmpp_3m": 2, "lms": 2}


@pytest.mark.parametrize("solver", ORDERS)
def test_order_of_convergence_on_the_gaussian_flow(solver):
    """In float64, by the sentence at the top of solvers.py: rounding would hide the higher orders."""
    process = uniform_log_snr()
    z_T = np.random.default_rng(0).standard_normal((4, 4))
    exact = gaussian_flow(process.point(-1)[1:], process.point(0)[1:], z_T, *moments(GAUSSIAN))
    errors = []
    for steps in (240, 480, 960):
        endpoint = solver in ("dpmpp_2m", "dpmpp_2s", "dpmpp_3m", "deis", "unipc")
        rows = steps if endpoint else steps + 1  # the others' linspace visits t = 0 too; their last row stands still
        table = make_table(solver, process, rows, spacing="linspace", set_alpha_to_one=False)
        errors.append(np.abs(in_float64(table, z_T) - exact).max())
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    if solver == "lms":  # from above: the first step's share of the error is small
        assert orders[0] > orders[1] > 2 and errors[-1] < 1e-7
        return
    np.testing.assert_allclose(orders, ORDERS[solver], atol=0.15)


def test_unipc_is_of_third_order_up_to_its_last_row():
    """Zhao 2023, theorem 3.1: the corrector adds one to the order 2 of the predictor. The last row has order 1."""
    process = uniform_log_snr()
    z_T = np.random.default_rng(0).standard_normal((4, 4))
    errors = []
    for steps in (60, 120, 240):
        table = make_table("unipc", process, steps, spacing="linspace", set_alpha_to_one=False)
        table = table._replace(rows=table.rows - 1)
        end = table.reached_alpha[table.rows - 1], table.reached_sigma[table.rows - 1]
        exact = gaussian_flow(process.point(-1)[1:], end, z_T, *moments(GAUSSIAN))
        errors.append(np.abs(in_float64(table, z_T) - exact).max())
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(orders, 3, atol=0.15)


def in_float64(table, z):
    """A table of a deterministic solver, with the exact denoiser of GAUSSIAN."""
    mean, std = moments(GAUSSIAN)
    zs, z0_hats = [z], []
    for a, sigma, weights in zip(*(column[: table.rows] for column in table[1:4])):
        z0_hats.insert(0, mean + a * std**2 / (a**2 * std**2 + sigma**2) * (zs[0] - a * mean))
        terms = [(w, z) for w, z in zip(weights, zs)] + [(w, z0) for w, z0 in zip(weights[HISTORY + 1 :], z0_hats)]
        zs = [sum(w * term for w, term in terms), *zs[:HISTORY]]
        z0_hats = z0_hats[:HISTORY]
    return zs[0]


def test_lcm_with_the_exact_consistency_function():
    """The flow's own map from z_t to z0 (Song 2023): noising and mapping again keeps the data's distribution."""
    mean, std = moments(GAUSSIAN)

    def consistency(z_t, level):
        spread = jnp.sqrt(level.alpha**2 * std**2 + level.sigma**2)
        return mean + std * (z_t - level.alpha * mean) / spread

    keys = sample_keys(0, jnp.arange(64))
    for schedule, prediction in (("linear", "eps"), ("rectified_flow", "flow")):
        for steps in (1, 4):
            table = make_table("lcm", PROCESSES[schedule], steps, prediction=prediction)
            z, _ = jax.jit(partial(solve, consistency))(initial_latents(keys, (16, 16, 1)), table, keys)
            assert faults(np.ravel(z).astype(np.float64), GAUSSIAN) == []


def exact_denoiser(data):
    return lambda z_t, level: exact_z0(data, z_t, level.alpha, level.sigma)


def test_inversion_leads_to_the_noise_and_back():
    """The flow's own start, and DDIM from there to the same data; the error falls with the steps."""
    process, run = PROCESSES["linear"], jax.jit(partial(solve, exact_denoiser(MIXTURE)))
    keys = sample_keys(0, jnp.arange(64))
    weights, means, stds = MIXTURE
    rng = np.random.default_rng(0)
    part = rng.choice(2, 64 * 256, p=weights)
    z0 = rng.normal(means[part], stds[part]).reshape(64, 16, 16, 1).astype(np.float32)
    errors = []
    for steps in (50, 250):
        noise, _ = run(z0, make_inversion_table(process, steps), keys)
        again, _ = run(noise, make_table("ddim", process, steps, set_alpha_to_one=False), keys)
        errors.append(float(np.abs(again - z0).mean()))
    assert kstest(np.ravel(noise), "norm").pvalue > 0.001
    assert errors[1] < errors[0] / 3 and errors[1] < 0.02


def test_resampling_alone_changes_nothing():
    table = make_table("ddpm", PROCESSES["linear"], 200)
    twice = with_resampling(table, times=2, jump=10)
    assert twice.rows == 200 + 190  # all parts but the last are done twice
    assert faults(sampler("eps")(twice, MIXTURE), MIXTURE) == []


@pytest.mark.slow
def test_resampling_harmonizes_the_samples_with_the_known_region():
    """Pairs (x, y) from a Gaussian of correlation 0.9, x known: y must come from N(0.9 x, 0.19)."""
    covariance = jnp.array([[1.0, 0.9], [0.9, 1.0]])

    def denoise(z_t, level):
        marginal = level.alpha**2 * covariance + level.sigma**2 * jnp.eye(2)
        return level.alpha * z_t @ jnp.linalg.solve(marginal, covariance)

    keys = sample_keys(0, jnp.arange(8192))
    x = 1.5

    def project(z, level, keys):
        eps = jax.vmap(lambda key: jax.random.normal(key, ()))(keys)
        return z.at[:, 0].set(level.alpha * x + level.sigma * eps)

    run = jax.jit(partial(solve, denoise, project=project))
    once = make_table("ddpm", PROCESSES["linear"], 250)
    means = [run(initial_latents(keys, (2,)), t, keys)[0][:, 1].mean() for t in (once, with_resampling(once, 8, 1))]
    assert means[1] == pytest.approx(0.9 * x, abs=0.05)
    assert abs(means[0] - 0.9 * x) > 5 * abs(means[1] - 0.9 * x)


def test_the_right_variance_needs_few_steps():
    """Gaussian data: 20 reverse steps with the variance of q(z_{t-1} | z_t) (Bao 2022, theorem 1) end on the data's."""
    T, std, stds = 20, 0.6, {}
    process = make_process("linear", T, beta_start=1e-3, beta_end=0.5)
    levels = [table[1:] for table in neighbours(process)]
    (on_z0, _, small), (_, large) = posterior(*levels), forward_step(*levels)
    alpha, sigma = levels[:2]
    exact = small + on_z0**2 * std**2 * sigma**2 / (alpha**2 * std**2 + sigma**2)
    var_frac = np.log(exact / small) / np.log(large / small)
    var_frac = jnp.asarray([0, *var_frac], jnp.float32)  # the step from t = 0 adds no noise

    def denoise(z_t, level):
        z0_hat = level.alpha * std**2 / (level.alpha**2 * std**2 + level.sigma**2) * z_t
        return Estimate(z0_hat, jnp.full_like(z_t, var_frac[level.t.astype(int)]))

    keys = sample_keys(0, jnp.arange(64))
    run = jax.jit(lambda table: solve(denoise, initial_latents(keys, (32, 32)), table, keys)[0])
    for variance in ("learned", "fixed_small", "fixed_large"):
        stds[variance] = float(run(make_table("ddpm", process, T, variance=variance)).std())
    assert stds["learned"] == pytest.approx(std, rel=0.015)
    assert stds["fixed_small"] < 0.97 * std < 1.03 * std < stds["fixed_large"]
